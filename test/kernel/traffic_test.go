//go:build linux

package kernel

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/internal/nodebox"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
)

// services returns the Services of the box. Those whose name begins with
// "broken" are broken later, by breakRules.
func (p *plan) services() []kubeproxy.Service {
	eps := func(n, local int) []kubeproxy.Endpoint {
		var list []kubeproxy.Endpoint
		for i := range n {
			list = append(list, kubeproxy.Endpoint{Addr: netip.AddrPortFrom(p.pods[i], podPort), Local: i < local})
		}
		return list
	}
	around := func(a netip.Addr, bits int) []netip.Prefix {
		return []netip.Prefix{netip.PrefixFrom(a, a.BitLen()-bits).Masked()}
	}
	list := []kubeproxy.Service{
		{Name: "go-app", NodePort: 1, Endpoints: eps(3, 3)},
		{Name: "five", NodePort: 1, Endpoints: eps(5, 5)},
		{Name: "one", NodePort: 1, Endpoints: eps(1, 1)},
		{Name: "local", NodePort: 1, ExternalLocal: true, Endpoints: eps(5, 2)},
		{Name: "local-none", NodePort: 1, ExternalLocal: true, Endpoints: eps(3, 0)},
		{Name: "internal", NodePort: 1, InternalLocal: true, Endpoints: eps(5, 2)},
		{Name: "internal-none", InternalLocal: true, Endpoints: eps(3, 0)},
		{Name: "sticky", NodePort: 1, AffinitySeconds: 10800, Endpoints: eps(3, 3)},
		{Name: "empty", NodePort: 1},
		{Name: "ranges", NodePort: 1, SourceRanges: around(p.inside, 3), Endpoints: eps(3, 3)},
		{Name: "ranges-node", SourceRanges: []netip.Prefix{around(p.node, 2)[0], around(p.inside, 0)[0]}, Endpoints: eps(3, 3)},
		{Name: "ranges-pod", SourceRanges: around(p.client, 2), Endpoints: eps(3, 3)},
		{Name: "dns", Port: "dns", Protocol: "UDP", NodePort: 1, Endpoints: eps(3, 3)},
		{Name: "dns-empty", Port: "dns", Protocol: "UDP"},
		{Name: "host", NodePort: 1, Endpoints: []kubeproxy.Endpoint{{Addr: netip.AddrPortFrom(p.node, nodePort), Local: true}}},
		{Name: "broken-middle", Endpoints: eps(3, 3)},
		{Name: "broken-last", NodePort: 1, Endpoints: eps(3, 3)},
		{Name: "broken-hollow", Endpoints: eps(3, 3)},
		{Name: "broken-twice", Endpoints: eps(3, 3)},
		{Name: "broken-order", Endpoints: eps(3, 3)},
		{Name: "broken-twin", Endpoints: eps(3, 3)},
	}
	for i := range list {
		s := &list[i]
		s.Namespace, s.PortNumber, s.ClusterIP = "test", uint16(80+i), nth(p.cluster, i)
		if s.NodePort != 0 {
			s.NodePort = uint16(30001 + i)
		}
		if s.SourceRanges != nil || slices.Contains([]string{"go-app", "five", "local", "local-none", "empty"}, s.Name) {
			s.LoadBalancerIPs = []netip.Addr{nth(p.balancer, i)}
		}
		if s.Name == "five" || s.Name == "local" {
			s.ExternalIPs = []netip.Addr{nth(p.external, i)}
		}
	}
	return list
}

// breakRules breaks the Services that are named so, in the ways that rules get
// broken by hand and by races.
func breakRules(t *testing.T, rules string, pods []netip.Addr) string {
	t.Helper()
	lines := strings.SplitAfter(rules, "\n")
	// choices finds the lines of a Service that choose an endpoint.
	choices := func(name string) []int {
		prefix := "-A " + chain.ServiceChain("KUBE-SVC-", chain.ServicePort{Namespace: "test", Name: name, Protocol: netfilter.TCP}) + " "
		var at []int
		for i, line := range lines {
			if strings.HasPrefix(line, prefix) && strings.Contains(line, " -j KUBE-SEP-") {
				at = append(at, i)
			}
		}
		if len(at) != 3 {
			t.Fatalf("%s chooses in lines %v", name, at)
		}
		return at
	}
	rewrite := func(name string, pod netip.Addr) int {
		prefix := "-A " + chain.EndpointChain(chain.ServicePort{Namespace: "test", Name: name, Protocol: netfilter.TCP}, netip.AddrPortFrom(pod, podPort)) + " "
		i := slices.IndexFunc(lines, func(line string) bool {
			return strings.HasPrefix(line, prefix) && strings.Contains(line, "DNAT")
		})
		if i < 0 {
			t.Fatalf("%s does not rewrite to %s", name, pod)
		}
		return i
	}
	lines[choices("broken-middle")[1]] = ""
	lines[choices("broken-last")[2]] = ""
	lines[rewrite("broken-hollow", pods[0])] = ""
	twice := choices("broken-twice")
	lines[twice[1]] = lines[twice[1]] + lines[twice[0]]
	order := choices("broken-order")
	lines[order[0]], lines[order[2]] = lines[order[2]], lines[order[0]]
	// Another endpoint's chain rewrites to the first endpoint too.
	first, second := rewrite("broken-twin", pods[0]), rewrite("broken-twin", pods[1])
	lines[second] = strings.Replace(lines[second], netip.AddrPortFrom(pods[1], podPort).String(), netip.AddrPortFrom(pods[0], podPort).String(), 1)
	if lines[first] == lines[second] {
		t.Fatal("the chains must not be the same")
	}
	return strings.Join(lines, "")
}

// TestTraffic compares the answers of natlens with what connections meet.
func TestTraffic(t *testing.T) {
	for _, backend := range []nodebox.Backend{nodebox.NFT, nodebox.Legacy} {
		for _, family := range []kubeproxy.Family{kubeproxy.IPv4, kubeproxy.IPv6} {
			t.Run(fmt.Sprintf("%s/%s", backend, family), func(t *testing.T) {
				t.Parallel()
				w := newWorld(t, backend, family)
				w.load(t, breakRules(t, write(t, w.config(), w.plan.services()), w.pods))
				if got := w.rules.Table(w.netfilterFamily(), "nat").Backend; string(got) != "iptables-"+string(backend) {
					t.Errorf("the rules were read as those of %s", got)
				}
				t.Run("by hand", w.checkByHand)
				t.Run("connections", w.checkConnections)
				t.Run("affinity", w.checkAffinity)
				t.Run("hairpin", w.checkHairpin)
				t.Run("counters", w.checkCounters)
				t.Run("sums", w.checkPool)
			})
		}
	}
}

// checkConnections goes through all frontends, from everywhere.
func (w *world) checkConnections(t *testing.T) {
	defer w.waiting.Wait()
	for i := range w.services {
		s := &w.services[i]
		if s.AffinitySeconds > 0 {
			continue // see checkAffinity
		}
		factor := 2
		if s.Name == "go-app" || s.Name == "five" {
			factor = 4
		}
		clients := []client{w.pod(), w.host(), w.outside(w.inside)}
		if strings.HasPrefix(s.Name, "ranges") {
			clients = append(clients, w.outside(w.beyond), w.endpointPod(4))
		}
		for _, f := range s.Frontends {
			for _, c := range clients {
				w.check(t, w.cellAt(s.ServicePort, f, c), factor)
			}
			if f.Type == chain.NodePort && s.Name == "go-app" {
				c := w.cellAt(s.ServicePort, f, w.host())
				c.to = netip.AddrPortFrom(w.loopback(), f.Port)
				c.beside = c.to.Addr().Is6() // NodePorts are not on ::1
				w.compare(t, c, w.byTrace(t, c), 1)
				c.beside = false
				// All of the node's addresses take part.
				c.to = netip.AddrPortFrom(w.node2, f.Port)
				w.check(t, c, 1)
				c.client = w.outside(w.beyond)
				w.check(t, c, 1)
			}
		}
	}
}

// checkAffinity makes first and second connections of many clients.
func (w *world) checkAffinity(t *testing.T) {
	c := w.cell(t, "sticky", chain.NodePort, w.outside(w.crowd))
	next := w.crowd
	w.judge(t, c.String()+" and its neighbours", w.byRoute(t, c), func() map[outcome]int {
		got := map[outcome]int{}
		var mu sync.Mutex
		var wg sync.WaitGroup
		for range crowd / 2 {
			c := w.cell(t, "sticky", chain.NodePort, w.outside(next))
			next = next.Next()
			wg.Go(func() {
				first, err := w.connectNoted(t.Context(), c, patience)
				if err != nil {
					t.Errorf("%s: %v", c, err)
					return
				}
				second, err := w.connectNoted(t.Context(), c, patience)
				if err != nil || second != first {
					t.Errorf("%s: first %s, then %s, %v", c, first, second, err)
				}
				mu.Lock()
				got[first]++
				mu.Unlock()
			})
		}
		wg.Wait()
		return got
	})
	for _, cl := range []client{w.pod(), w.host()} {
		c := w.cell(t, "sticky", chain.ClusterIP, cl)
		want := w.byRoute(t, c)
		got := w.sample(t, c, want, 1, patience)
		// Only now: several first connections at once may go apart.
		for o, n := range w.sample(t, c, want, 20, patience) {
			if got[o] += n; n != 20 {
				t.Errorf("%s does not stick", c)
			}
		}
		for o := range got {
			if len(got) != 1 || want[o] == 0 {
				t.Errorf("%s: %v; natlens says that a first connection meets\n%s", c, got, want)
			}
		}
	}
}

// checkHairpin connects from pods to the Services that they serve: the route
// tells the shares, and the trace that a connection to oneself is masqueraded.
func (w *world) checkHairpin(t *testing.T) {
	defer w.waiting.Wait()
	for _, name := range []string{"go-app", "five", "broken-twin"} {
		types := []chain.FrontendType{chain.ClusterIP, chain.NodePort, chain.LoadBalancer}
		if name == "broken-twin" {
			types = types[:1]
		}
		for _, typ := range types {
			c := w.cell(t, name, typ, w.endpointPod(0))
			want := w.byTrace(t, c)
			byPod := map[netip.AddrPort]float64{}
			for _, o := range w.trace(t, c).Outcomes {
				byPod[o.To] += o.Share.Float64()
				if itself := o.To.Addr() == c.client.addr; typ == chain.ClusterIP && name != "broken-twin" && o.Masquerade != itself {
					t.Errorf("%s: masquerade %v on the way to %s", c, o.Masquerade, o.To)
				}
			}
			for _, e := range w.route(t, c).Endpoints {
				if !near(byPod[e.Address], e.Share.Float64()) {
					t.Errorf("%s: share of %s is %v by route, %v by trace", c, e.Address, e.Share.Float64(), byPod[e.Address])
				}
			}
			w.compare(t, c, want, 2)
		}
	}
}

// checkByHand compares with expectations written by hand, so that natlens and
// the rest of this test cannot be wrong together.
func (w *world) checkByHand(t *testing.T) {
	pod, host, inside, beyond := w.pod(), w.host(), w.outside(w.inside), w.outside(w.beyond)
	const (
		dnat, reject, drop, none, mixed = chain.RouteDNAT, chain.RouteReject, chain.RouteDrop, chain.RouteNone, chain.RouteMixed

		cluster, port, balancer, external = chain.ClusterIP, chain.NodePort, chain.LoadBalancer, chain.ExternalIP
	)
	third, half, fifth := 1.0/3, 0.5, 0.2
	for _, h := range []struct {
		service    string
		typ        chain.FrontendType
		from       client
		verdict    chain.RouteVerdict
		masquerade bool
		shares     []float64 // of the pods, in order
	}{
		{"go-app", cluster, pod, dnat, false, []float64{third, third, third}},
		{"go-app", cluster, host, dnat, true, []float64{third, third, third}},
		{"go-app", cluster, inside, dnat, true, []float64{third, third, third}},
		{"go-app", port, pod, dnat, true, []float64{third, third, third}},
		{"go-app", port, inside, dnat, true, []float64{third, third, third}},
		{"go-app", balancer, inside, dnat, true, []float64{third, third, third}},
		{"five", cluster, pod, dnat, false, []float64{fifth, fifth, fifth, fifth, fifth}},
		{"five", external, inside, dnat, true, []float64{fifth, fifth, fifth, fifth, fifth}},
		{"local", cluster, pod, dnat, false, []float64{fifth, fifth, fifth, fifth, fifth}},
		{"local", port, inside, dnat, false, []float64{half, half}},
		{"local", balancer, inside, dnat, false, []float64{half, half}},
		{"local", balancer, pod, dnat, false, []float64{fifth, fifth, fifth, fifth, fifth}},
		{"local", balancer, host, dnat, true, []float64{fifth, fifth, fifth, fifth, fifth}},
		{"local-none", port, inside, drop, false, nil},
		{"local-none", cluster, pod, dnat, false, []float64{third, third, third}},
		{"internal", cluster, pod, dnat, false, []float64{half, half}},
		{"internal", port, inside, dnat, true, []float64{fifth, fifth, fifth, fifth, fifth}},
		{"internal-none", cluster, pod, drop, false, nil},
		{"sticky", cluster, pod, dnat, false, []float64{third, third, third}},
		{"empty", cluster, pod, reject, false, nil},
		{"empty", cluster, host, reject, false, nil},
		{"empty", port, inside, reject, false, nil},
		{"empty", balancer, inside, reject, false, nil},
		{"ranges", balancer, inside, dnat, true, []float64{third, third, third}},
		{"ranges", balancer, beyond, drop, false, nil},
		{"ranges", balancer, pod, drop, false, nil},
		{"ranges", port, beyond, dnat, true, []float64{third, third, third}},
		{"ranges-node", balancer, host, dnat, true, []float64{third, third, third}},
		{"ranges-pod", balancer, pod, dnat, true, []float64{third, third, third}},
		{"ranges-pod", balancer, inside, drop, false, nil},
		{"dns", cluster, pod, dnat, false, []float64{third, third, third}},
		{"dns-empty", cluster, pod, reject, false, nil},
		{"broken-middle", cluster, pod, dnat, false, []float64{third, 0, 2 * third}},
		{"broken-last", cluster, pod, mixed, false, []float64{third, third}},
		{"broken-hollow", cluster, pod, dnat, false, []float64{0, half, half}},
		{"broken-twice", cluster, pod, dnat, false, []float64{third + third*third, third, 2 * third * third}},
		{"broken-order", cluster, pod, dnat, false, []float64{0, 0, 1}},
		{"broken-twin", cluster, pod, dnat, false, []float64{2 * third, 0, third}},
	} {
		r := w.route(t, w.cell(t, h.service, h.typ, h.from))
		if r.Verdict != h.verdict || r.Masquerade != h.masquerade {
			t.Errorf("%s %s from %s: %s, masquerade %v; want %s, %v", h.service, h.typ, h.from.name, r.Verdict, r.Masquerade, h.verdict, h.masquerade)
		}
		got := map[netip.AddrPort]float64{}
		for _, e := range r.Endpoints {
			got[e.Address] = e.Share.Float64()
		}
		for i, want := range h.shares {
			pod := netip.AddrPortFrom(w.pods[i], podPort)
			if !near(got[pod], want) {
				t.Errorf("%s %s from %s: share of %s is %v, want %v", h.service, h.typ, h.from.name, pod, got[pod], want)
			}
			delete(got, pod)
		}
		if len(got) > 0 {
			t.Errorf("%s %s from %s: also goes to %v", h.service, h.typ, h.from.name, got)
		}
	}
	for i := range w.services {
		want := 0
		if w.services[i].Name == "sticky" {
			want = 10800
		}
		if got := w.services[i].AffinitySeconds; got != want {
			t.Errorf("%s: affinity of %d seconds", w.services[i].ServicePort, got)
		}
	}
}
