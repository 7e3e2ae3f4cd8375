package reconcile_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"sigs.k8s.io/yaml"

	"github.com/natlens/natlens/internal/desired"
	"github.com/natlens/natlens/internal/reconcile"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
	"github.com/natlens/natlens/pkg/nftables"
)

const captures = "../../testdata/captures"

func recorded(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(captures, file))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// objects are those that the recorded kube-proxies had.
func objects(t *testing.T) *desired.Objects {
	t.Helper()
	o := desired.NewObjects("node1")
	for _, file := range []string{"objects-services.yaml", "objects-endpointslices.yaml", "objects-nodes.yaml"} {
		if _, err := o.Load(strings.NewReader(recorded(t, file)), file); err != nil {
			t.Fatal(err)
		}
	}
	return o
}

func ruleset(t *testing.T, name, text string) *netfilter.Ruleset {
	t.Helper()
	parse := iptables.Parse
	if strings.HasSuffix(name, ".json") {
		parse = nftables.Parse
	}
	rs, err := parse(strings.NewReader(text), name)
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

// compare does what agent diff does. told is the release that the Node reports.
func compare(o *desired.Objects, told desired.Release, rs *netfilter.Ruleset) []reconcile.Difference {
	node, _ := o.Node()
	return reconcile.Compare(sides(o, told, chain.NewView(rs, chain.Node{Local: node.Local}), rs))
}

func sides(o *desired.Objects, told desired.Release, v *chain.View, rs *netfilter.Ruleset) reconcile.Sides {
	oldest, newest := v.Releases()
	releases := desired.Candidates(told, desired.Release(oldest), desired.Release(newest))
	return reconcile.Sides{Desired: o.View(releases[0]), Rules: rs, View: v, Programmed: v.Services(), Others: releases[1:]}
}

// text is a difference in short.
func text(d reconcile.Difference) string {
	s := fmt.Sprintf("%s %s/%s", d.Code, d.Service, d.Service.Protocol)
	if d.About != "" {
		s += " " + d.About
	}
	return s
}

func texts(list []reconcile.Difference) []string {
	var out []string
	for _, d := range list {
		out = append(out, text(d))
	}
	slices.Sort(out)
	return out
}

// What a real kube-proxy wrote for the objects is what they demand, whatever the
// Node says of its release.
func TestNoFalseAlarm(t *testing.T) {
	for _, tt := range []struct {
		file string
		told []desired.Release
	}{
		{"v1.23.17-iptables.save", []desired.Release{0, 23, 24, 26}},
		{"v1.35.4-iptables.save", []desired.Release{0, 35, 37, 32}},
		{"v1.37.2-iptables-legacy-backend.save", []desired.Release{0, 37, 38, 34}},
		{"v1.35.4-nftables.nft.json", []desired.Release{0, 35, 37}},
		{"v1.37.2-nftables.nft.json", []desired.Release{0, 37, 40}},
	} {
		for _, told := range tt.told {
			t.Run(fmt.Sprintf("%s, told %v", tt.file, told), func(t *testing.T) {
				for _, d := range compare(objects(t), told, ruleset(t, tt.file, recorded(t, tt.file))) {
					t.Errorf("false alarm: %s: %s", text(d), d.Message)
				}
			})
		}
	}
}

// cluster are the recorded objects, to be changed by a test.
type cluster struct {
	services []corev1.Service
	slices   []discoveryv1.EndpointSlice
	nodes    []corev1.Node
}

func recordedCluster(t *testing.T) *cluster {
	t.Helper()
	var services corev1.ServiceList
	var endpointSlices discoveryv1.EndpointSliceList
	var nodes corev1.NodeList
	for file, list := range map[string]any{"objects-services.yaml": &services, "objects-endpointslices.yaml": &endpointSlices, "objects-nodes.yaml": &nodes} {
		if err := yaml.Unmarshal([]byte(recorded(t, file)), list); err != nil {
			t.Fatal(err)
		}
	}
	return &cluster{services.Items, endpointSlices.Items, nodes.Items}
}

func (c *cluster) objects() *desired.Objects {
	o := desired.NewObjects("node1")
	for i := range c.nodes {
		o.SetNode(&c.nodes[i])
	}
	for i := range c.services {
		o.SetService(&c.services[i])
	}
	for i := range c.slices {
		o.SetSlice(&c.slices[i])
	}
	return o
}

func (c *cluster) service(t *testing.T, name string) *corev1.Service {
	t.Helper()
	for i := range c.services {
		if s := &c.services[i]; s.Namespace+"/"+s.Name == name {
			return s
		}
	}
	t.Fatalf("no Service %s is recorded", name)
	return nil
}

// slice returns a slice of a Service that has endpoints.
func (c *cluster) slice(t *testing.T, service string) *discoveryv1.EndpointSlice {
	t.Helper()
	for i := range c.slices {
		if s := &c.slices[i]; s.Namespace+"/"+s.Labels[discoveryv1.LabelServiceName] == service && len(s.Endpoints) > 0 {
			return s
		}
	}
	t.Fatalf("no EndpointSlice of %s is recorded", service)
	return nil
}

// TestObjectsChanged changes the objects in one place, with the rules as they
// were, as when kube-proxy hangs. Each difference is to be told, once, and
// nothing besides.
func TestObjectsChanged(t *testing.T) {
	local := corev1.ServiceInternalTrafficPolicyLocal
	for _, tt := range []struct {
		name   string
		change func(*testing.T, *cluster)
		want   []string
	}{
		{"nothing", func(*testing.T, *cluster) {}, nil},
		{"a Service deleted", func(t *testing.T, c *cluster) {
			c.service(t, "shop/seven").Name = "other-name"
			*c.service(t, "shop/other-name") = corev1.Service{}
		}, []string{"ServiceStale shop/seven/TCP"}},
		{"a Service made", func(t *testing.T, c *cluster) {
			s := c.service(t, "shop/seven").DeepCopy()
			s.Name, s.Spec.ClusterIP, s.Spec.ClusterIPs = "new", "10.56.9.1", []string{"10.56.9.1"}
			c.services = append(c.services, *s)
		}, []string{"ServiceMissing shop/new/TCP"}},
		{"a Service made anew with the same address", func(t *testing.T, c *cluster) {
			c.service(t, "shop/single").Name = "double"
		}, []string{"ServiceMissing shop/double/TCP", "ServiceStale shop/single/TCP"}},
		{"a Service given to another proxy", func(t *testing.T, c *cluster) {
			c.service(t, "shop/seven").Labels = map[string]string{"service.kubernetes.io/service-proxy-name": "other"}
		}, []string{"ServiceStale shop/seven/TCP"}},
		{"a port more", func(t *testing.T, c *cluster) {
			s := c.service(t, "shop/multi")
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "more", Protocol: "TCP", Port: 99})
		}, []string{"ServiceMissing shop/multi:more/TCP"}},
		{"another ClusterIP", func(t *testing.T, c *cluster) {
			s := c.service(t, "shop/np")
			s.Spec.ClusterIP, s.Spec.ClusterIPs = "10.56.9.2", []string{"10.56.9.2"}
		}, []string{"FrontendMissing shop/np/TCP ClusterIP 10.56.9.2:80", "FrontendStale shop/np/TCP ClusterIP 10.56.1.8:80"}},
		{"a NodePort less", func(t *testing.T, c *cluster) {
			c.service(t, "shop/np").Spec.Ports[0].NodePort = 0
		}, []string{"FrontendStale shop/np/TCP NodePort 30080"}},
		{"a load balancer's address more", func(t *testing.T, c *cluster) {
			s := c.service(t, "shop/lb")
			s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: "203.0.113.99"}, corev1.LoadBalancerIngress{Hostname: "lb.example"})
		}, []string{"FrontendMissing shop/lb/TCP LoadBalancer 203.0.113.99:80"}},
		{"a load balancer's address to be proxied", func(t *testing.T, c *cluster) {
			mode := corev1.LoadBalancerIPModeProxy
			c.service(t, "shop/lb").Status.LoadBalancer.Ingress[0].IPMode = &mode
		}, []string{"FrontendStale shop/lb/TCP LoadBalancer 203.0.113.10:80"}},
		{"an endpoint more", func(t *testing.T, c *cluster) {
			s := c.slice(t, "shop/seven")
			e := *s.Endpoints[0].DeepCopy()
			e.Addresses = []string{"10.52.9.9"}
			s.Endpoints = append(s.Endpoints, e)
		}, []string{"EndpointMissing shop/seven/TCP 10.52.9.9:8080"}},
		{"an endpoint gone", func(t *testing.T, c *cluster) {
			s := c.slice(t, "shop/seven")
			s.Endpoints = slices.DeleteFunc(s.Endpoints, func(e discoveryv1.Endpoint) bool { return e.Addresses[0] == "10.52.2.3" })
		}, []string{"EndpointStale shop/seven/TCP 10.52.2.3:8080"}},
		{"an endpoint terminating", func(t *testing.T, c *cluster) {
			for i := range c.slice(t, "shop/seven").Endpoints {
				if e := &c.slice(t, "shop/seven").Endpoints[i]; e.Addresses[0] == "10.52.2.4" {
					e.Conditions = discoveryv1.EndpointConditions{Ready: new(bool), Serving: ptr(true), Terminating: ptr(true)}
				}
			}
		}, []string{"EndpointStale shop/seven/TCP 10.52.2.4:8080"}},
		{"all endpoints terminating, which then stand in", func(t *testing.T, c *cluster) {
			for i := range c.slice(t, "shop/single").Endpoints {
				c.slice(t, "shop/single").Endpoints[i].Conditions = discoveryv1.EndpointConditions{Ready: new(bool), Serving: ptr(true), Terminating: ptr(true)}
			}
		}, nil},
		{"the last endpoint not ready", func(t *testing.T, c *cluster) {
			for i := range c.slice(t, "shop/single").Endpoints {
				c.slice(t, "shop/single").Endpoints[i].Conditions = discoveryv1.EndpointConditions{Ready: new(bool), Serving: new(bool)}
			}
		}, []string{"EndpointStale shop/single/TCP 10.52.2.11:8080"}},
		{"the first endpoint", func(t *testing.T, c *cluster) {
			for i := range c.slices {
				if s := &c.slices[i]; s.Labels[discoveryv1.LabelServiceName] == "allnotready" {
					s.Endpoints[0].Conditions = discoveryv1.EndpointConditions{Ready: ptr(true)}
				}
			}
		}, []string{"EndpointMissing shop/allnotready/TCP 10.52.2.12:8080", "VerdictMismatch shop/allnotready/TCP ClusterIP 10.56.1.3:80"}},
		{"a local endpoint gone elsewhere", func(t *testing.T, c *cluster) {
			for i := range c.slice(t, "shop/np-local").Endpoints {
				if e := &c.slice(t, "shop/np-local").Endpoints[i]; e.Addresses[0] == "10.52.1.33" {
					e.NodeName = ptr("node2")
				}
			}
		}, []string{"EndpointStale shop/np-local/TCP 10.52.1.33:8080"}},
		{"externalTrafficPolicy Local", func(t *testing.T, c *cluster) {
			c.service(t, "shop/np").Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		}, []string{"EndpointStale shop/np/TCP 10.52.2.31:8080"}},
		{"internalTrafficPolicy Local", func(t *testing.T, c *cluster) {
			c.service(t, "shop/single").Spec.InternalTrafficPolicy = &local
		}, []string{"EndpointStale shop/single/TCP 10.52.2.11:8080"}},
		{"session affinity", func(t *testing.T, c *cluster) {
			c.service(t, "shop/seven").Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		}, []string{"AffinityMismatch shop/seven/TCP"}},
		{"session affinity of a Service without endpoints", func(t *testing.T, c *cluster) {
			c.service(t, "shop/empty").Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		}, nil},
		{"a source range more", func(t *testing.T, c *cluster) {
			s := c.service(t, "shop/lb-ranges")
			s.Spec.LoadBalancerSourceRanges = append(s.Spec.LoadBalancerSourceRanges, " 192.0.3.0/24 ")
		}, []string{"VerdictMismatch shop/lb-ranges/TCP LoadBalancer 203.0.113.11:443"}},
		{"a source range less", func(t *testing.T, c *cluster) {
			s := c.service(t, "shop/lb-ranges")
			s.Spec.LoadBalancerSourceRanges = s.Spec.LoadBalancerSourceRanges[:1]
		}, []string{"VerdictMismatch shop/lb-ranges/TCP LoadBalancer 203.0.113.11:443"}},
		{"source ranges for all", func(t *testing.T, c *cluster) {
			c.service(t, "shop/lb").Spec.LoadBalancerSourceRanges = []string{"0.0.0.0/0", "10.0.0.0/8"}
		}, nil},
		{"source ranges of the other family", func(t *testing.T, c *cluster) {
			c.service(t, "shop/lb").Spec.LoadBalancerSourceRanges = []string{"fd00::/8"}
		}, nil},
		{"source ranges where there were none", func(t *testing.T, c *cluster) {
			c.service(t, "shop/lb").Spec.LoadBalancerSourceRanges = []string{"198.51.100.0/24"}
		}, []string{"VerdictMismatch shop/lb/TCP LoadBalancer 203.0.113.10:80"}},
		{"the node in another zone", func(t *testing.T, c *cluster) {
			for i := range c.nodes {
				if c.nodes[i].Name == "node1" {
					c.nodes[i].Labels[corev1.LabelTopologyZone] = "nowhere"
				}
			}
		}, []string{"EndpointMissing shop/zones/TCP 10.52.2.49:8080"}},
		{"two Services with one external IP", func(t *testing.T, c *cluster) {
			c.service(t, "shop/single").Spec.ExternalIPs = c.service(t, "shop/extip").Spec.ExternalIPs
		}, nil},
	} {
		for _, file := range []string{"v1.35.4-iptables.save", "v1.37.2-nftables.nft.json"} {
			t.Run(tt.name+", "+file, func(t *testing.T) {
				c := recordedCluster(t)
				tt.change(t, c)
				list := compare(c.objects(), 37, ruleset(t, file, recorded(t, file)))
				if got := texts(list); !slices.Equal(got, tt.want) {
					t.Errorf("differences:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(tt.want, "\n"))
				}
				for _, d := range list {
					if len(d.Rules) == 0 && d.Code != reconcile.ServiceMissing && d.Code != reconcile.FrontendMissing && d.Code != chain.AffinityMismatch && strings.HasSuffix(file, ".save") {
						t.Errorf("%s rests on no rule", text(d))
					}
				}
			})
		}
	}
}

// Rules of IPv4 alone say nothing of IPv6; those of both do.
func TestOtherFamily(t *testing.T) {
	c := recordedCluster(t)
	s := c.service(t, "shop/single")
	s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, "fd00::1")
	for file, want := range map[string][]string{
		"v1.35.4-iptables.save":     nil,
		"v1.37.2-nftables.nft.json": {"FrontendMissing shop/single/TCP ClusterIP [fd00::1]:80"},
	} {
		if got := texts(compare(c.objects(), 37, ruleset(t, file, recorded(t, file)))); !slices.Equal(got, want) {
			t.Errorf("%s: differences %q, want %q", file, got, want)
		}
	}
}

// Where something else alone writes rules of a family, kube-proxy does not do that
// family on this node.
func TestOthersFamily(t *testing.T) {
	c := recordedCluster(t)
	s := c.service(t, "shop/single")
	s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, "fd00::1")
	const others = "*nat\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:DOCKER - [0:0]\nCOMMIT\n*filter\n:FORWARD ACCEPT [0:0]\nCOMMIT\n"
	for rules6, want := range map[string][]string{
		others: nil,
		others + "*mangle\n:KUBE-PROXY-CANARY - [0:0]\nCOMMIT\n": {"FrontendMissing shop/single/TCP ClusterIP [fd00::1]:80"},
		recorded(t, "v1.35.4-iptables.save6"):                    {"FrontendMissing shop/single/TCP ClusterIP [fd00::1]:80"},
	} {
		rs := ruleset(t, "v4", recorded(t, "v1.35.4-iptables.save"))
		six := ruleset(t, "v6", "# Generated by ip6tables-save v1.8.9\n"+rules6)
		rs.Tables = append(rs.Tables, six.Tables...)
		if got := texts(compare(c.objects(), 35, rs)); !slices.Equal(got, want) {
			t.Errorf("beside %.60q: differences %q, want %q", rules6, got, want)
		}
	}
}

func ptr[T any](v T) *T { return &v }

// TestRulesChanged changes the rules in one place, as a hand does.
func TestRulesChanged(t *testing.T) {
	for _, tt := range []struct {
		name     string
		part     string // of exactly one line
		old, new string // both empty takes the line out
		want     []string
	}{
		{"an endpoint's jump deleted", `"shop/seven -> 10.52.2.3:8080" -m statistic`, "", "", []string{"EndpointMissing shop/seven/TCP 10.52.2.3:8080"}},
		{"an endpoint's DNAT deleted", "--to-destination 10.52.2.31:8080", "", "", []string{"EndpointMissing shop/np/TCP 10.52.2.31:8080"}},
		{"an endpoint's DNAT changed", "--to-destination 10.52.2.31:8080", "10.52.2.31", "10.52.2.99", []string{"EndpointMissing shop/np/TCP 10.52.2.31:8080", "EndpointStale shop/np/TCP 10.52.2.99:8080"}},
		{"a probability edited", `"shop/seven -> 10.52.2.3:8080" -m statistic`, "0.20000000019", "0.30000000019", nil},
		{"a ClusterIP's rule deleted", `"shop/single cluster IP" -m tcp --dport 80 -j KUBE-SVC-`, "", "", []string{"ServiceMissing shop/single/TCP"}},
		{"a NodePort's rule deleted", `-A KUBE-NODEPORTS -p tcp -m comment --comment "shop/np" -m`, "", "", []string{"FrontendMissing shop/np/TCP NodePort 30080"}},
		{"the way to all NodePorts deleted, as with a --nodeport-addresses of other machines", `--dst-type LOCAL -j KUBE-NODEPORTS`, "", "", nil},
		{"a REJECT deleted", `"shop/empty has no endpoints"`, "", "", []string{"ServiceMissing shop/empty/TCP"}},
		{"a REJECT made a DROP", `"shop/allnotready has no endpoints"`, "REJECT --reject-with icmp-port-unreachable", "DROP", []string{"VerdictMismatch shop/allnotready/TCP ClusterIP 10.56.1.3:80"}},
		{"a source range deleted", `-s 198.51.100.0/24`, "", "", []string{"VerdictMismatch shop/lb-ranges/TCP LoadBalancer 203.0.113.11:443"}},
		{"a load balancer's own address let in, as where a range holds the node's", `-s 198.51.100.0/24`, "-s 198.51.100.0/24", "-s 203.0.113.11/32 -j KUBE-EXT-DQMF54LKPAANC7RZ\n-A KUBE-FW-DQMF54LKPAANC7RZ -s 198.51.100.0/24", nil},
		{"the affinity's timeout changed", `"shop/sticky -> 10.52.2.21:8080" -m recent`, "--seconds 300", "--seconds 600", []string{"AffinityMismatch shop/sticky/TCP"}},
		{"the way into nat deleted", `-A PREROUTING -m comment --comment "kubernetes service portals"`, "", "", nil},
		{"a foreign DNAT", `-A PREROUTING -m comment --comment "kubernetes service portals"`, "-A PREROUTING", "-A PREROUTING -d 10.56.1.7/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 192.0.2.7:80\n-A PREROUTING", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out []string
			hits := 0
			for line := range strings.Lines(recorded(t, "v1.35.4-iptables.save")) {
				if strings.Contains(line, tt.part) {
					hits++
					if tt.old == "" {
						continue
					}
					line = strings.Replace(line, tt.old, tt.new, 1)
				}
				out = append(out, line)
			}
			if hits != 1 {
				t.Fatalf("%d lines have %q, want one", hits, tt.part)
			}
			list := compare(objects(t), 35, ruleset(t, "altered", strings.Join(out, "")))
			if got := texts(list); !slices.Equal(got, tt.want) {
				t.Errorf("differences:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(tt.want, "\n"))
			}
		})
	}
}

// In nftables mode a Service that nothing leads to is refused: that the way into
// nat is gone says it all, and is found in the rules.
func TestWayIntoNFTGone(t *testing.T) {
	var doc struct {
		NFTables []json.RawMessage `json:"nftables"`
	}
	if err := json.Unmarshal([]byte(recorded(t, "v1.35.4-nftables.nft.json")), &doc); err != nil {
		t.Fatal(err)
	}
	all := len(doc.NFTables)
	doc.NFTables = slices.DeleteFunc(doc.NFTables, func(x json.RawMessage) bool {
		return strings.Contains(string(x), `"chain": "nat-prerouting", "handle"`)
	})
	if len(doc.NFTables) >= all {
		t.Fatal("nothing was taken out")
	}
	text, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	if got := texts(compare(objects(t), 35, ruleset(t, "altered.json", string(text)))); len(got) > 0 {
		t.Errorf("differences:\n%s\nwant none", strings.Join(got, "\n"))
	}
}

// After "nft flush table" the maps still name the Services, and no rule asks them.
func TestNFTFlushed(t *testing.T) {
	var doc struct {
		NFTables []json.RawMessage `json:"nftables"`
	}
	if err := json.Unmarshal([]byte(recorded(t, "v1.35.4-nftables.nft.json")), &doc); err != nil {
		t.Fatal(err)
	}
	doc.NFTables = slices.DeleteFunc(doc.NFTables, func(x json.RawMessage) bool { return strings.HasPrefix(string(x), `{"rule"`) })
	text, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	list := compare(objects(t), 35, ruleset(t, "altered.json", string(text)))
	if got := texts(list); !slices.Contains(got, "ServiceMissing shop/single/TCP") {
		t.Errorf("differences:\n%s", strings.Join(got, "\n"))
	}
	for _, d := range list {
		for _, r := range d.Rules {
			if r.Table == nil || r.Chain == nil {
				t.Fatalf("%s of %v: a rule of no chain", d.Code, d.Service)
			}
		}
	}
}

// Of rules that are kube-proxy's no longer, or never were, nothing is said here.
func TestIncomparable(t *testing.T) {
	flushed := regexp.MustCompile(`(?m)^.*-A .*\n`).ReplaceAllString(recorded(t, "v1.35.4-iptables.save"), "")
	for _, tt := range []struct {
		name, text string
		want       int // differences; each Service port is missing where kube-proxy's chains are there
	}{
		{"flushed", flushed, 31},
		{"kubelet alone", "*mangle\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n", 0},
		{"ipvs", "*nat\n:PREROUTING ACCEPT [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-NODE-PORT - [0:0]\nCOMMIT\n*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n", 0},
		{"Cilium", "*nat\n:PREROUTING ACCEPT [0:0]\n:CILIUM_PRE_nat - [0:0]\nCOMMIT\n", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			list := compare(objects(t), 35, ruleset(t, "dump", tt.text))
			if len(list) != tt.want {
				t.Errorf("%d differences, want %d:\n%s", len(list), tt.want, strings.Join(texts(list), "\n"))
			}
			for _, d := range list {
				if d.Code != reconcile.ServiceMissing {
					t.Errorf("%s: %s", text(d), d.Message)
				}
			}
		})
	}
}
