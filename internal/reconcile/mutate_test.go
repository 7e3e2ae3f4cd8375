package reconcile_test

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/natlens/natlens/pkg/chain"
)

// deletions are the rules that are deleted one by one, and what each deletion is
// to give: exactly that.
var deletions = []struct {
	what string
	rule *regexp.Regexp
	want func(m []string) []string
}{
	{"an endpoint's DNAT", regexp.MustCompile(`-A KUBE-SEP-\w+ -p (\w+) .*"([^"]+)".* -j DNAT --to-destination (\S+)`), func(m []string) []string {
		return []string{fmt.Sprintf("EndpointMissing %s/%s %s", m[2], strings.ToUpper(m[1]), m[3])}
	}},
	{"an endpoint's jump", regexp.MustCompile(`-A KUBE-SVC-\w+ -m comment --comment "(\S+) -> ([^"]+)"( -m statistic .*)? -j KUBE-SEP`), func(m []string) []string {
		return []string{fmt.Sprintf("EndpointMissing %s/%s %s", m[1], protocolOf(m[1]), m[2])}
	}},
	{"a ClusterIP's rule", regexp.MustCompile(`-A KUBE-SERVICES -d (\S+)/32 -p (\w+) .*"(\S+) (?:cluster IP|has no \w+ ?endpoints)".* --dport (\d+) `), func(m []string) []string {
		service := m[3] + "/" + strings.ToUpper(m[2])
		if reached := []string{"shop/np", "shop/lb", "shop/extip", "default/go-app"}; slices.ContainsFunc(reached, func(s string) bool { return strings.HasPrefix(m[3], s) }) {
			return []string{fmt.Sprintf("FrontendMissing %s ClusterIP %s:%s", service, m[1], m[4])}
		}
		return []string{"ServiceMissing " + service}
	}},
	{"a load balancer's rule", regexp.MustCompile(`-A KUBE-SERVICES -d (\S+)/32 -p tcp .*"(\S+) loadbalancer IP".* --dport (\d+) `), func(m []string) []string {
		return []string{fmt.Sprintf("FrontendMissing %s/TCP LoadBalancer %s:%s", m[2], m[1], m[3])}
	}},
	{"an external IP's rule", regexp.MustCompile(`-A KUBE-SERVICES -d (\S+)/32 -p tcp .*"(\S+) external IP".* --dport (\d+) `), func([]string) []string {
		return []string{"FrontendMissing shop/extip/TCP ExternalIP 192.0.2.200:80"}
	}},
	{"a NodePort's rule", regexp.MustCompile(`-A KUBE-NODEPORTS -p tcp .*"([^" ]+)".* --dport (\d+) -j KUBE-EXT`), func(m []string) []string {
		if m[1] == "shop/np-local-none" { // its other rule, which drops, is there still
			return []string{"EndpointMissing shop/np-local-none/TCP 10.52.2.34:8080"}
		}
		return []string{fmt.Sprintf("FrontendMissing %s/TCP NodePort %s", m[1], m[2])}
	}},
	{"the way to endpoints here", regexp.MustCompile(`-A KUBE-EXT-\w+ -j KUBE-SVL-2WCDEXCGSNQYVZVK`), func([]string) []string {
		return []string{"EndpointMissing shop/np-local/TCP 10.52.1.32:8080", "EndpointMissing shop/np-local/TCP 10.52.1.33:8080"}
	}},
}

func protocolOf(port string) string {
	switch port {
	case "shop/sctp":
		return "SCTP"
	case "dns/kube-dns:dns":
		return "UDP"
	}
	return "TCP"
}

// TestRulesDeleted deletes rules one by one, as a hand does: the very frontend or
// endpoint is named, once, and nothing besides.
func TestRulesDeleted(t *testing.T) {
	lines := strings.SplitAfter(recorded(t, "v1.35.4-iptables.save"), "\n")
	o := objects(t)
	alike := regexp.MustCompile(`"shop/forty( -> 10\.52\.3\.(1.|2.|3[0-8]):8080)?" .*(DNAT|SEP)`) // some of many
	for _, d := range deletions {
		t.Run(d.what, func(t *testing.T) {
			hits := 0
			for i, line := range lines {
				m := d.rule.FindStringSubmatch(line)
				if m == nil || alike.MatchString(line) {
					continue
				}
				hits++
				rules := strings.Join(lines[:i], "") + strings.Join(lines[i+1:], "")
				if got, want := texts(compare(o, 35, ruleset(t, "altered", rules))), d.want(m); !slices.Equal(got, want) {
					t.Errorf("without %s: %q, want %q", strings.TrimSpace(line), got, want)
				}
			}
			if hits == 0 {
				t.Error("no such rule")
			}
		})
	}
}

// copy returns a cluster that can be changed by itself.
func (c *cluster) copy() *cluster {
	services, slices := corev1.ServiceList{Items: c.services}, discoveryv1.EndpointSliceList{Items: c.slices}
	return &cluster{services.DeepCopy().Items, slices.DeepCopy().Items, c.nodes}
}

// TestEndpointsLeave takes endpoints away one by one, in each way that the API
// tells it: where the rules have one, it is stale, and nothing besides.
func TestEndpointsLeave(t *testing.T) {
	ways := map[string]func(*discoveryv1.EndpointSlice, int){
		"gone": func(s *discoveryv1.EndpointSlice, i int) { s.Endpoints = slices.Delete(s.Endpoints, i, i+1) },
		"not ready": func(s *discoveryv1.EndpointSlice, i int) {
			s.Endpoints[i].Conditions = discoveryv1.EndpointConditions{Ready: new(bool), Serving: new(bool)}
		},
		"terminating and not serving": func(s *discoveryv1.EndpointSlice, i int) {
			s.Endpoints[i].Conditions = discoveryv1.EndpointConditions{Ready: new(bool), Serving: new(bool), Terminating: ptr(true)}
		},
	}
	besides := map[string][]string{ // where another endpoint steps in, or the last one anywhere left
		"shop/mixedterm":      {"EndpointMissing shop/mixedterm/TCP 10.52.2.16:8080"},
		"shop/np-local-none":  {"VerdictMismatch shop/np-local-none/TCP NodePort 30082"},
		"shop/itp-local-none": {"VerdictMismatch shop/itp-local-none/TCP ClusterIP 10.56.1.18:80"},
	}
	for _, file := range []string{"v1.35.4-iptables.save", "v1.37.2-nftables.nft.json"} {
		rules := ruleset(t, file, recorded(t, file))
		programmed := map[string]bool{}
		for _, s := range chain.NewView(rules, chain.Node{}).Services().Services {
			for _, f := range s.Frontends {
				for _, r := range f.Routes {
					for _, e := range r.Endpoints {
						programmed[fmt.Sprintf("EndpointStale %s/%s %s", s.ServicePort, s.Protocol, e.Address)] = true
					}
				}
			}
		}
		for way, leave := range ways {
			t.Run(way+", "+file, func(t *testing.T) {
				recorded := recordedCluster(t)
				for i, slice := range recorded.slices {
					service := slice.Namespace + "/" + slice.Labels[discoveryv1.LabelServiceName]
					if service == "shop/forty" {
						continue // forty times the same
					}
					for j, e := range slice.Endpoints {
						var want []string
						for _, p := range slice.Ports {
							name := service
							if *p.Name != "" {
								name += ":" + *p.Name
							}
							if stale := fmt.Sprintf("EndpointStale %s/%s %s:%d", name, *p.Protocol, e.Addresses[0], *p.Port); programmed[stale] {
								want = append(want, stale)
							}
						}
						if len(want) > 0 || service == "shop/itp-local-none" {
							want = append(want, besides[service]...)
						}
						slices.Sort(want)
						c := recorded.copy()
						leave(&c.slices[i], j)
						if got := texts(compare(c.objects(), 37, rules)); !slices.Equal(got, want) {
							t.Errorf("%s, endpoint %s: %q, want %q", service, e.Addresses[0], got, want)
						}
					}
				}
			})
		}
	}
}

// TestServicesChange changes Services one by one. Of each port that is in the
// rules the same is told, and of no other.
func TestServicesChange(t *testing.T) {
	type change struct {
		do   func(*corev1.Service)
		want func(sv *chain.Service) string // "" for nothing
	}
	withEndpoints := func(sv *chain.Service) bool {
		return slices.ContainsFunc(sv.Frontends, func(f chain.Frontend) bool {
			return slices.ContainsFunc(f.Routes, func(r chain.Route) bool { return len(r.Endpoints) > 0 })
		})
	}
	changes := map[string]change{
		"made headless":        {func(s *corev1.Service) { s.Spec.ClusterIP, s.Spec.ClusterIPs = "None", []string{"None"} }, func(*chain.Service) string { return "ServiceStale" }},
		"made an ExternalName": {func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeExternalName }, func(*chain.Service) string { return "ServiceStale" }},
		"affinity of another time": {func(s *corev1.Service) {
			s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
			s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: ptr(int32(77))}}
		}, func(sv *chain.Service) string {
			if withEndpoints(sv) {
				return "AffinityMismatch"
			}
			return ""
		}},
		"affinity off": {func(s *corev1.Service) {
			s.Spec.SessionAffinity, s.Spec.SessionAffinityConfig = corev1.ServiceAffinityNone, nil
		}, func(sv *chain.Service) string {
			if sv.AffinitySeconds > 0 {
				return "AffinityMismatch"
			}
			return ""
		}},
	}
	for _, file := range []string{"v1.35.4-iptables.save", "v1.37.2-nftables.nft.json"} {
		rules := ruleset(t, file, recorded(t, file))
		programmed := chain.NewView(rules, chain.Node{}).Services()
		for what, change := range changes {
			t.Run(what+", "+file, func(t *testing.T) {
				recorded := recordedCluster(t)
				for i := range recorded.services {
					c := recorded.copy()
					s := &c.services[i]
					var want []string
					for j := range programmed.Services {
						if sv := &programmed.Services[j]; sv.Namespace == s.Namespace && sv.Name == s.Name {
							if code := change.want(sv); code != "" {
								want = append(want, fmt.Sprintf("%s %s/%s", code, sv.ServicePort, sv.Protocol))
							}
						}
					}
					slices.Sort(want)
					change.do(s)
					if got := texts(compare(c.objects(), 37, rules)); !slices.Equal(got, want) {
						t.Errorf("%s/%s: %q, want %q", s.Namespace, s.Name, got, want)
					}
				}
			})
		}
	}
}
