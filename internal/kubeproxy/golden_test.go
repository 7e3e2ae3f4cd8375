package kubeproxy

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"
)

const captures = "../../testdata/captures"

// TestWriteAsKubeProxy gives Write the objects that a kube-proxy had and wants
// the rules that this kube-proxy wrote: every line of every table, in order,
// with two exceptions. Counters differ by nature, and the order within some
// chains is that of a Go map (see sorted).
//
// v1.37.2 stands beside v1.35.4 because it was recorded with the legacy
// backend: the form of iptables-save must not depend on it.
func TestWriteAsKubeProxy(t *testing.T) {
	for _, tt := range []struct {
		file   string
		family Family
	}{
		{"v1.35.4-iptables.save", IPv4},
		{"v1.35.4-iptables.save6", IPv6},
		{"v1.37.2-iptables-legacy-backend.save", IPv4},
	} {
		t.Run(tt.file, func(t *testing.T) {
			cfg := Config{
				Family: tt.family,
				NodeIP: netip.MustParseAddr("10.146.0.2"),
				NFAcct: true,
				// The cluster had a kube-proxy and no kubelet.
				NoKubelet: true,
			}
			if tt.family == IPv4 {
				cfg.PodCIDR = netip.MustParsePrefix("10.52.0.0/16")
			}
			recorded, err := os.ReadFile(filepath.Join(captures, tt.file))
			if err != nil {
				t.Fatal(err)
			}
			want := parse(t, string(recorded)).sorted()
			got := parse(t, write(t, cfg, selected(t, tt.family)...)).sorted()
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("rules differ (-recorded +written):\n%s", diff)
			}
		})
	}
}

// What follows does kube-proxy's part before the rules: it makes Service ports
// out of API objects and selects their endpoints for one node. It covers what
// the recorded objects have.

const (
	nodeName = "node1"
	nodeZone = "a"
)

type meta struct {
	Namespace string            `json:"namespace"`
	Name      string            `json:"name"`
	Labels    map[string]string `json:"labels"`
}

type apiService struct {
	Metadata meta `json:"metadata"`
	Spec     struct {
		Type       string   `json:"type"`
		ClusterIPs []string `json:"clusterIPs"`
		Ports      []struct {
			Name     string `json:"name"`
			Protocol string `json:"protocol"`
			Port     uint16 `json:"port"`
			NodePort uint16 `json:"nodePort"`
		} `json:"ports"`
		ExternalIPs              []string `json:"externalIPs"`
		ExternalTrafficPolicy    string   `json:"externalTrafficPolicy"`
		InternalTrafficPolicy    string   `json:"internalTrafficPolicy"`
		HealthCheckNodePort      uint16   `json:"healthCheckNodePort"`
		LoadBalancerSourceRanges []string `json:"loadBalancerSourceRanges"`
		SessionAffinity          string   `json:"sessionAffinity"`
		SessionAffinityConfig    struct {
			ClientIP struct {
				TimeoutSeconds int `json:"timeoutSeconds"`
			} `json:"clientIP"`
		} `json:"sessionAffinityConfig"`
	} `json:"spec"`
	Status struct {
		LoadBalancer struct {
			Ingress []struct {
				IP     string `json:"ip"`
				IPMode string `json:"ipMode"`
			} `json:"ingress"`
		} `json:"loadBalancer"`
	} `json:"status"`
}

type apiEndpoint struct {
	Addresses  []string `json:"addresses"`
	NodeName   string   `json:"nodeName"`
	Conditions struct {
		Ready       *bool `json:"ready"`
		Serving     *bool `json:"serving"`
		Terminating *bool `json:"terminating"`
	} `json:"conditions"`
	Hints *struct {
		ForZones []struct {
			Name string `json:"name"`
		} `json:"forZones"`
	} `json:"hints"`

	port uint16 // of the slice's port it was asked for
}

// The API defines what a missing condition means.
func (e apiEndpoint) ready() bool { return e.Conditions.Ready == nil || *e.Conditions.Ready }
func (e apiEndpoint) terminating() bool {
	return e.Conditions.Terminating != nil && *e.Conditions.Terminating
}
func (e apiEndpoint) serving() bool {
	if e.Conditions.Serving == nil {
		return e.ready()
	}
	return *e.Conditions.Serving
}
func (e apiEndpoint) local() bool { return e.NodeName == nodeName }
func (e apiEndpoint) inZone() bool {
	for _, z := range e.Hints.ForZones {
		if z.Name == nodeZone {
			return true
		}
	}
	return false
}

type apiEndpointSlice struct {
	Metadata    meta          `json:"metadata"`
	AddressType string        `json:"addressType"`
	Endpoints   []apiEndpoint `json:"endpoints"`
	Ports       []struct {
		Name     string `json:"name"`
		Port     uint16 `json:"port"`
		Protocol string `json:"protocol"`
	} `json:"ports"`
}

func read[T any](t *testing.T, file string) []T {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(captures, file))
	if err != nil {
		t.Fatal(err)
	}
	var list struct {
		Items []T `json:"items"`
	}
	if err := yaml.Unmarshal(data, &list); err != nil {
		t.Fatalf("parsing %s: %v", file, err)
	}
	if len(list.Items) == 0 {
		t.Fatalf("%s has no objects", file)
	}
	return list.Items
}

// selected returns the recorded objects as kube-proxy on the node sees them.
func selected(t *testing.T, family Family) []Service {
	t.Helper()
	slicesOf := map[string][]apiEndpointSlice{}
	for _, s := range read[apiEndpointSlice](t, "objects-endpointslices.yaml") {
		if s.AddressType == family.String() {
			key := s.Metadata.Namespace + "/" + s.Metadata.Labels["kubernetes.io/service-name"]
			slicesOf[key] = append(slicesOf[key], s)
		}
	}
	var out []Service
	for _, svc := range read[apiService](t, "objects-services.yaml") {
		out = append(out, svc.ports(family, slicesOf[svc.Metadata.Namespace+"/"+svc.Metadata.Name])...)
	}
	return out
}

func (s apiService) ports(family Family, endpointSlices []apiEndpointSlice) []Service {
	if _, other := s.Metadata.Labels["service.kubernetes.io/service-proxy-name"]; other || s.Spec.Type == "ExternalName" {
		return nil
	}
	var clusterIP netip.Addr
	for _, ip := range s.Spec.ClusterIPs {
		// A headless Service has "None" here, which is no address.
		if a, err := netip.ParseAddr(ip); err == nil && family.has(a) {
			clusterIP = a
		}
	}
	if !clusterIP.IsValid() {
		return nil
	}
	var out []Service
	for _, p := range s.Spec.Ports {
		external := s.Spec.Type == "NodePort" || s.Spec.Type == "LoadBalancer" || len(s.Spec.ExternalIPs) > 0
		svc := Service{
			Namespace: s.Metadata.Namespace, Name: s.Metadata.Name, Port: p.Name, Protocol: p.Protocol,
			ClusterIP: clusterIP, PortNumber: p.Port, NodePort: p.NodePort,
			ExternalLocal:       external && s.Spec.ExternalTrafficPolicy == "Local",
			InternalLocal:       s.Spec.InternalTrafficPolicy == "Local",
			HealthCheckNodePort: s.Spec.HealthCheckNodePort,
		}
		for _, ip := range s.Spec.ExternalIPs {
			svc.ExternalIPs = append(svc.ExternalIPs, netip.MustParseAddr(ip))
		}
		for _, in := range s.Status.LoadBalancer.Ingress {
			if in.IP != "" && in.IPMode != "Proxy" {
				svc.LoadBalancerIPs = append(svc.LoadBalancerIPs, netip.MustParseAddr(in.IP))
			}
		}
		for _, r := range s.Spec.LoadBalancerSourceRanges {
			svc.SourceRanges = append(svc.SourceRanges, netip.MustParsePrefix(r))
		}
		if s.Spec.SessionAffinity == "ClientIP" {
			svc.AffinitySeconds = s.Spec.SessionAffinityConfig.ClientIP.TimeoutSeconds
		}
		svc.Endpoints = choose(endpointsOf(endpointSlices, p.Name, p.Protocol))
		out = append(out, svc)
	}
	return out
}

func endpointsOf(endpointSlices []apiEndpointSlice, port, protocol string) []apiEndpoint {
	var out []apiEndpoint
	for _, s := range endpointSlices {
		for _, p := range s.Ports {
			if p.Name != port || p.Protocol != protocol {
				continue
			}
			for _, e := range s.Endpoints {
				e.port = p.Port
				out = append(out, e)
			}
		}
	}
	return out
}

// choose is CategorizeEndpoints of pkg/proxy/topology.go: what is ready, cut
// down to the zone if all hints allow it, else what is terminating and serves;
// and the same again without topology for the endpoints of the node.
func choose(all []apiEndpoint) []Endpoint {
	filter := func(from []apiEndpoint, keep func(apiEndpoint) bool) []apiEndpoint {
		var out []apiEndpoint
		for _, e := range from {
			if keep(e) {
				out = append(out, e)
			}
		}
		return out
	}
	fallback := func(e apiEndpoint) bool { return e.serving() && e.terminating() }

	cluster := filter(all, apiEndpoint.ready)
	unhinted := func(e apiEndpoint) bool { return e.Hints == nil || len(e.Hints.ForZones) == 0 }
	if !slices.ContainsFunc(cluster, unhinted) && slices.ContainsFunc(cluster, apiEndpoint.inZone) {
		cluster = filter(cluster, apiEndpoint.inZone)
	}
	if len(cluster) == 0 {
		cluster = filter(all, fallback)
	}
	onNode := filter(all, apiEndpoint.local)
	local := filter(onNode, apiEndpoint.ready)
	if len(local) == 0 {
		local = filter(onNode, fallback)
	}

	var out []Endpoint
	addr := func(e apiEndpoint) netip.AddrPort {
		return netip.AddrPortFrom(netip.MustParseAddr(e.Addresses[0]), e.port)
	}
	inCluster := map[netip.AddrPort]bool{}
	for _, e := range cluster {
		inCluster[addr(e)] = true
		out = append(out, Endpoint{Addr: addr(e), Local: e.local()})
	}
	for _, e := range local {
		if !inCluster[addr(e)] {
			out = append(out, Endpoint{Addr: addr(e), LocalOnly: true})
		}
	}
	return out
}
