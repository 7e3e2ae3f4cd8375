package observed

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
)

// rules are those of kube-proxy for default/app with the given connections per
// endpoint; endpoints without a number are left out.
func rulesWith(t *testing.T, counts map[string]uint64) (*netfilter.Ruleset, *chain.Programmed) {
	t.Helper()
	svc := kubeproxy.Service{Namespace: "default", Name: "app", ClusterIP: netip.MustParseAddr("10.96.0.1"), PortNumber: 80, NodePort: 30080}
	for _, a := range []string{"10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"} {
		if _, ok := counts[a]; ok {
			svc.Endpoints = append(svc.Endpoints, kubeproxy.Endpoint{Addr: netip.MustParseAddrPort(a)})
		}
	}
	var b bytes.Buffer
	if err := kubeproxy.Write(&b, kubeproxy.Config{Family: kubeproxy.IPv4, PodCIDR: netip.MustParsePrefix("10.0.0.0/16")}, []kubeproxy.Service{svc}); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for line := range strings.Lines(b.String()) {
		if strings.HasPrefix(line, "-A ") {
			n := uint64(1000) // what nobody is to look at
			for a, count := range counts {
				if strings.Contains(line, "--to-destination "+a+"\n") {
					n = count
				}
			}
			fmt.Fprintf(&out, "[%d:%d] ", n, 60*n)
		}
		out.WriteString(line)
	}
	return parsed(t, out.String())
}

func parsed(t *testing.T, text string) (*netfilter.Ruleset, *chain.Programmed) {
	t.Helper()
	rs, err := iptables.Parse(strings.NewReader(text), "rules")
	if err != nil {
		t.Fatal(err)
	}
	return rs, chain.NewView(rs, chain.Node{}).Services()
}

var app = chain.ServicePort{Namespace: "default", Name: "app", Protocol: netfilter.TCP}

// want compares the connections of default/app with what they are to be: the
// total, then those of the endpoints.
func want(t *testing.T, when string, c *Connections, total uint64, each ...uint64) {
	t.Helper()
	got, ok := c.Of(app)
	if !ok || got.NotCounted != "" || got.Total != total || len(got.Endpoints) != len(each) {
		t.Errorf("%s: %+v (%v), want %d and %d", when, got, ok, total, each)
		return
	}
	for i, e := range got.Endpoints {
		if !e.Counted || e.Count != each[i] {
			t.Errorf("%s: %v has %d, want %d", when, e.Address, e.Count, each[i])
		}
	}
}

// Totals go on over resets, rewritten chains, and endpoints that come and go.
func TestCounter(t *testing.T) {
	var c Counter
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	at := start
	update := func(counts map[string]uint64) *Connections {
		t.Helper()
		rs, p := rulesWith(t, counts)
		at = at.Add(10 * time.Second)
		return c.Update(rs, p, at)
	}
	const a, b, d = "10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"
	first := update(map[string]uint64{a: 100, b: 200})
	want(t, "at first", first, 0, 0, 0)
	want(t, "counted", update(map[string]uint64{a: 103, b: 200}), 3, 3, 0)
	want(t, "set to zero", update(map[string]uint64{a: 2, b: 1}), 6, 5, 1)
	want(t, "a new endpoint", update(map[string]uint64{a: 2, b: 1, d: 4}), 10, 5, 1, 4)
	want(t, "one goes", update(map[string]uint64{a: 3, d: 4}), 11, 6, 4)
	want(t, "it comes back", update(map[string]uint64{a: 3, b: 5, d: 4}), 16, 6, 6, 4)
	want(t, "all go", update(map[string]uint64{}), 16)
	want(t, "all come back", update(map[string]uint64{a: 1, b: 0, d: 0}), 17, 7, 6, 4)
	want(t, "the first is as it was", first, 0, 0, 0)

	// The whole Service goes and comes back.
	rs, p := parsed(t, "*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n")
	if _, ok := c.Update(rs, p, at).Of(app); ok {
		t.Error("connections of a Service that is not there")
	}
	want(t, "the Service comes back", update(map[string]uint64{a: 1}), 18, 8)

	// What has been gone for long begins anew.
	update(map[string]uint64{a: 1, b: 1})
	update(map[string]uint64{a: 1})
	at = at.Add(2 * remembered)
	update(map[string]uint64{a: 1, d: 1})
	want(t, "after long", update(map[string]uint64{a: 1, b: 2, d: 1}), 22, 8, 2, 5)
}

// The very same reading is no work.
func TestCounterSame(t *testing.T) {
	rs, p := rulesWith(t, map[string]uint64{"10.0.0.1:80": 1})
	var c Counter
	first := c.Update(rs, p, time.Now())
	if n := testing.AllocsPerRun(10, func() {
		if c.Update(rs, p, time.Now()) != first {
			t.Error("another result")
		}
	}); n != 0 {
		t.Errorf("%v allocations for the same reading", n)
	}
}

// Counters that moved in a revised table, whatever else is as it was.
func TestCounterRevised(t *testing.T) {
	rs, p := rulesWith(t, map[string]uint64{"10.0.0.1:80": 1, "10.0.0.2:80": 1})
	var c Counter
	c.Update(rs, p, time.Now())
	add := func(endpoint string, now uint64) {
		next := &netfilter.Ruleset{}
		for _, table := range rs.Tables {
			r := table.Revise()
			if ch := r.Lookup(chain.EndpointChain(app, netip.MustParseAddrPort(endpoint))); ch != nil {
				counts := make([]netfilter.Counter, ch.Len())
				counts[ch.Len()-1].Packets = now
				r.Recount(ch.ID, counts, netfilter.Counter{})
			}
			next.Tables = append(next.Tables, r)
		}
		rs = next
	}
	add("10.0.0.1:80", 5)
	want(t, "one moved", c.Update(rs, p, time.Now()), 4, 4, 0)
	add("10.0.0.2:80", 3)
	add("10.0.0.1:80", 2)
	want(t, "both moved, one from zero", c.Update(rs, p, time.Now()), 8, 6, 2)
	last := c.now
	next := &netfilter.Ruleset{}
	for _, table := range rs.Tables {
		next.Tables = append(next.Tables, table.Revise())
	}
	if c.Update(next, p, time.Now()) != last {
		t.Error("something new, though nothing has counted")
	}
}

// Services may be worked out anew of the same rules, as for another address of the
// node; what comes then is held against those.
func TestCounterOtherServices(t *testing.T) {
	var c Counter
	rs, p := rulesWith(t, map[string]uint64{"10.0.0.1:80": 3, "10.0.0.2:80": 4})
	c.Update(rs, p, time.Now())
	c.Update(rs, &chain.Programmed{}, time.Now())
	again := *rs
	want(t, "the Services are back", c.Update(&again, p, time.Now()), 0, 0, 0)
}

func TestNotCounted(t *testing.T) {
	clean := func(text string) string { return strings.ReplaceAll(text, "\t", "") }
	for name, c := range map[string]struct{ rules, why string }{
		"a dump without counters": {`*nat
			:PREROUTING ACCEPT [0:0]
			:KUBE-SERVICES - [0:0]
			:KUBE-SVC-A - [0:0]
			:KUBE-SEP-A - [0:0]
			-A PREROUTING -j KUBE-SERVICES
			-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "default/app cluster IP" -m tcp --dport 80 -j KUBE-SVC-A
			-A KUBE-SVC-A -j KUBE-SEP-A
			-A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination 10.0.0.1:80
			COMMIT
			`, "no counters"},
		"two Services share a rule": {`*nat
			:PREROUTING ACCEPT [0:0]
			:KUBE-SERVICES - [0:0]
			:KUBE-SVC-A - [0:0]
			:KUBE-SVC-B - [0:0]
			:KUBE-SEP-A - [0:0]
			[0:0] -A PREROUTING -j KUBE-SERVICES
			[0:0] -A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "default/app cluster IP" -m tcp --dport 80 -j KUBE-SVC-A
			[0:0] -A KUBE-SERVICES -d 10.96.0.2/32 -p tcp -m comment --comment "default/other cluster IP" -m tcp --dport 80 -j KUBE-SVC-B
			[0:0] -A KUBE-SVC-A -j KUBE-SEP-A
			[0:0] -A KUBE-SVC-B -j KUBE-SEP-A
			[9:0] -A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination 10.0.0.1:80
			COMMIT
			`, "several Services"},
		"a rule that each sync writes anew": {`*nat
			:PREROUTING ACCEPT [0:0]
			:KUBE-SERVICES - [0:0]
			:KUBE-SVC-A - [0:0]
			:KUBE-SEP-A - [0:0]
			[0:0] -A PREROUTING -j KUBE-SERVICES
			[4:0] -A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.9:80
			[0:0] -A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment "default/app cluster IP" -m tcp --dport 80 -j KUBE-SVC-A
			[0:0] -A KUBE-SVC-A -j KUBE-SEP-A
			[9:0] -A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination 10.0.0.1:80
			COMMIT
			`, "no single rule"},
	} {
		got, ok := Count(parsed(t, clean(c.rules))).Of(app)
		if !ok || !strings.Contains(got.NotCounted, c.why) || got.Total != 0 || len(got.Endpoints) != 1 || got.Endpoints[0].Counted {
			t.Errorf("%s: %+v, want it not counted: %s", name, got, c.why)
		}
	}
}

func TestCount(t *testing.T) {
	want(t, "one reading", Count(rulesWith(t, map[string]uint64{"10.0.0.1:80": 3, "10.0.0.2:80": 4})), 7, 3, 4)
}

// Whatever happens, totals never fall, and never exceed what there was; without
// resets between readings they are exact.
func TestCounterProperties(t *testing.T) {
	for seed := range uint64(40) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		resets := seed%2 == 1
		var c Counter
		at := time.Now()
		names := []string{"10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"}
		kernel := map[string]uint64{names[0]: rnd.Uint64N(50)} // what the rules show
		real, total := map[string]uint64{}, uint64(0)          // what there was since the first reading
		rs, p := rulesWith(t, kernel)
		last := c.Update(rs, p, at)
		for range 30 {
			for _, a := range names {
				n, there := kernel[a]
				switch {
				case rnd.IntN(6) == 0 && there:
					delete(kernel, a)
				case !there && rnd.IntN(3) == 0:
					kernel[a] = 0
				case resets && there && rnd.IntN(4) == 0:
					kernel[a] = 0
				case there:
					k := rnd.Uint64N(5)
					kernel[a], real[a], total = n+k, real[a]+k, total+k
				}
			}
			rs, p := rulesWith(t, kernel)
			now := c.Update(rs, p, at)
			before, _ := last.Of(app)
			got, ok := now.Of(app)
			if !ok || got.Total < before.Total || got.Total > total || !resets && got.Total != total {
				t.Fatalf("seed %d: total %d behind %d, want %d", seed, got.Total, before.Total, total)
			}
			for _, e := range got.Endpoints {
				if n := real[e.Address.String()]; e.Count > n || !resets && e.Count != n {
					t.Fatalf("seed %d: %v has %d, want %d", seed, e.Address, e.Count, n)
				}
			}
			last = now
		}
	}
}
