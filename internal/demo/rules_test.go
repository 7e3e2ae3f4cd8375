package demo

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
)

// parse returns the rules of the demo.
func parse(t *testing.T) *netfilter.Ruleset {
	t.Helper()
	text, err := Rules()
	if err != nil {
		t.Fatal(err)
	}
	rs, err := iptables.Parse(strings.NewReader(text), "rules")
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

func services(t *testing.T, rs *netfilter.Ruleset) map[string]chain.Service {
	t.Helper()
	node, err := RecordedNode()
	if err != nil {
		t.Fatal(err)
	}
	byName := map[string]chain.Service{}
	for _, s := range chain.NewView(rs, node).Services().Services {
		byName[s.String()] = s
	}
	return byName
}

func route(t *testing.T, s chain.Service, typ chain.FrontendType, from chain.Class) chain.Route {
	t.Helper()
	for _, f := range s.Frontends {
		for _, r := range f.Routes {
			if f.Type == typ && slices.Contains(r.From, from) && len(r.Sources) == 0 {
				return r
			}
		}
	}
	t.Fatalf("%s has no %s for %s", s, typ, from)
	return chain.Route{}
}

func near(a, b float64) bool { return a-b < 1e-9 && b-a < 1e-9 }

func endpointOf(name string) netip.AddrPort {
	for _, p := range pods() {
		if p.name == name {
			return netip.AddrPortFrom(p.addr, echoPort)
		}
	}
	return netip.AddrPort{}
}

// TestPromises wants the rules to show what the demo is there to show, both as
// they are loaded and as they were recorded.
func TestPromises(t *testing.T) {
	recorded, err := Recorded()
	if err != nil {
		t.Fatal(err)
	}
	for name, rs := range map[string]*netfilter.Ruleset{"rules": parse(t), "recorded": recorded} {
		t.Run(name, func(t *testing.T) {
			all := services(t, rs)
			if len(all) != len(Services()) {
				t.Errorf("there are %d Services, want %d", len(all), len(Services()))
			}
			for _, from := range chain.Classes {
				for _, typ := range []chain.FrontendType{chain.ClusterIP, chain.NodePort, chain.LoadBalancer} {
					r := route(t, all["default/go-app"], typ, from)
					if len(r.Endpoints) != 3 || r.Verdict != chain.RouteDNAT || r.Masquerade != (typ != chain.ClusterIP || from != chain.Pod) {
						t.Errorf("default/go-app %s from %s: %+v", typ, from, r)
					}
					for _, e := range r.Endpoints {
						if !near(e.Share.Float64(), 1.0/3) {
							t.Errorf("default/go-app %s from %s: %s has %v", typ, from, e.Address, e.Share.Float64())
						}
					}
				}
				if r := route(t, all["shop/empty"], chain.ClusterIP, from); r.Verdict != chain.RouteReject {
					t.Errorf("shop/empty from %s: %s", from, r.Verdict)
				}
				r := route(t, all["shop/broken"], chain.ClusterIP, from)
				if r.Verdict != chain.RouteMixed || len(r.Endpoints) != 2 || !near(r.Undelivered.Float64(), 1.0/3) {
					t.Errorf("shop/broken from %s: %s, %v undelivered", from, r.Verdict, r.Undelivered.Float64())
				}
			}
			r := route(t, all["shop/local"], chain.NodePort, chain.External)
			if len(r.Endpoints) != 1 || r.Endpoints[0].Address != endpointOf("web-1") || !r.Endpoints[0].Share.IsWhole() || r.Masquerade {
				t.Errorf("shop/local from external: %+v", r.Endpoints)
			}
			if r := route(t, all["shop/local"], chain.ClusterIP, chain.Pod); len(r.Endpoints) != 3 {
				t.Errorf("shop/local from pod: %+v", r.Endpoints)
			}
			for name, s := range all {
				seconds, codes := 0, []chain.Code(nil)
				switch name {
				case "shop/sticky":
					seconds = 10
				case "shop/broken":
					codes = []chain.Code{chain.FallThrough}
				}
				var got []chain.Code
				for _, f := range s.Findings {
					if f.Severity != chain.Info {
						got = append(got, f.Code)
					}
				}
				if s.AffinitySeconds != seconds || !slices.Equal(got, codes) {
					t.Errorf("%s: affinity %d s, findings %v; want %d s, %v", name, s.AffinitySeconds, s.Findings, seconds, codes)
				}
			}
		})
	}
}

// lines returns the chains and rules of each table, without counters. Tables
// that hold nothing are left out.
func lines(rs *netfilter.Ruleset) map[string][]string {
	out := map[string][]string{}
	for _, t := range rs.Tables {
		var chains, rules []string
		for c := range t.Chains() {
			if c.Base == nil {
				chains = append(chains, ":"+c.Name)
			}
			for i := range c.Len() {
				rules = append(rules, iptables.RuleText(t, c, i))
			}
		}
		slices.Sort(chains)
		if all := append(chains, rules...); len(all) > 0 {
			out[t.Name] = all
		}
	}
	return out
}

// TestRecorded wants the recording to be of the rules as they are now.
func TestRecorded(t *testing.T) {
	rs, err := Recorded()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(lines(parse(t)), lines(rs)); diff != "" {
		t.Errorf("recorded.save is out of date: as root, run go test -run TestRecord ./internal/demo -update (-rules +recorded):\n%s", diff)
	}
	for _, nat := range rs.Tables {
		if nat.Name != "nat" {
			continue
		}
		if nat.Backend != netfilter.BackendNFT {
			t.Errorf("the recording is of %s", nat.Backend)
		}
		c := nat.Lookup(chain.ServiceChain("KUBE-SVC-", chain.ServicePort{Namespace: "default", Name: "go-app", Protocol: netfilter.TCP}))
		for i := range c.Len() {
			if n, ok := c.Counter(i); !ok || n.Packets == 0 {
				t.Errorf("rule %d of default/go-app has counted nothing: it shows no traffic", i)
			}
		}
	}
}
