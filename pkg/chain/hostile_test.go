package chain_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
)

// baseNAT begins a nat table without any chain of kube-proxy.
const baseNAT = "*nat\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n"

// traceOf traces a connection to 10.0.0.1:80.
func traceOf(t testing.TB, rules string, node chain.Node, source string) *chain.Trace {
	t.Helper()
	rs, err := iptables.Parse(strings.NewReader(rules), "test")
	if err != nil {
		t.Fatal(err)
	}
	v := chain.NewView(rs, node)
	v.Services() // must not panic either
	trace, ok := v.Trace(v.PacketFrom(netip.MustParseAddr(source), netip.MustParseAddrPort("10.0.0.1:80"), netfilter.TCP))
	if !ok {
		t.Fatal("no table")
	}
	return trace
}

// iptables takes a rule without a match and without a target: it counts.
func TestRuleOfNothing(t *testing.T) {
	trace := traceOf(t, baseNAT+"-A PREROUTING\n-A PREROUTING -d 10.0.0.1/32 -j DNAT --to-destination 10.1.1.1:80\nCOMMIT\n", chain.Node{}, "203.0.113.9")
	if got, _ := summary(trace); got != "10.1.1.1:80" {
		t.Errorf("got %q", got)
	}
}

// In OUTPUT, the filter follows nat in the same hook: there is one state for
// each endpoint, and a long chain's index must be asked for each.
func TestLongOutputChain(t *testing.T) {
	for _, ahead := range []int{5, 30} {
		rules := baseNAT + "-A OUTPUT -d 10.0.0.1/32 -m statistic --mode random --probability 0.50000000000 -j DNAT --to-destination 10.1.1.1:8080\n" +
			"-A OUTPUT -d 10.0.0.1/32 -j DNAT --to-destination 10.1.1.2:8080\nCOMMIT\n*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n"
		for i := range ahead {
			rules += fmt.Sprintf("-A OUTPUT -d 10.9.9.%d/32 -p tcp -m tcp --dport 1 -j DROP\n", i)
		}
		rules += "-A OUTPUT -d 10.1.1.2/32 -p tcp -m tcp --dport 8080 -j DROP\nCOMMIT\n"
		trace := traceOf(t, rules, chain.Node{Local: []netip.Addr{netip.MustParseAddr("192.168.0.5")}}, "192.168.0.5")
		if got, _ := summary(trace); got != "10.1.1.1:8080, DROP" {
			t.Errorf("behind %d rules: %q", ahead, got)
		}
	}
}

// Each sampled log parts a share and joins it again; told as a fraction, it
// would have 2^70 terms.
func TestSampledLogs(t *testing.T) {
	rules := baseNAT + strings.Repeat("-A PREROUTING -m statistic --mode random --probability 0.01000000000 -j NFLOG\n", 70) +
		"-A PREROUTING -d 10.0.0.1/32 -j DNAT --to-destination 10.1.1.1:80\nCOMMIT\n"
	trace := traceOf(t, rules, chain.Node{}, "203.0.113.9")
	if o := trace.Outcomes[0]; !o.Share.IsWhole() || o.Share.Exact() != "" {
		t.Errorf("share %v, exact %q", o.Share.Float64(), o.Share.Exact())
	}
}

// A rule that might do anything leaves every share open.
func TestRulesBeyondBounds(t *testing.T) {
	var rules strings.Builder
	rules.WriteString(baseNAT)
	for i := range 8 {
		fmt.Fprintf(&rules, "-A PREROUTING -m set --match-set s%d src -j MARK --set-xmark 0x%x/0x%x\n", i, 1<<i, 1<<i)
	}
	rules.WriteString("-A PREROUTING -d 10.0.0.1/32 -j DNAT --to-destination 10.1.1.1:80\nCOMMIT\n")
	trace := traceOf(t, rules.String(), chain.Node{}, "203.0.113.9")
	if o := trace.Outcomes[0]; !o.Share.IsZero() || !o.Max.IsWhole() || len(trace.Unknown) == 0 {
		t.Errorf("share %v to %v, %d rules named", o.Share.Float64(), o.Max.Float64(), len(trace.Unknown))
	}
}

// Source ranges may hold pods, and each other.
func TestRangesWithinRanges(t *testing.T) {
	rules := func(allow string) string {
		return baseNAT + `:KUBE-SERVICES - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-FW-57XVOCFNTLTR3Q27 - [0:0]
:KUBE-SVC-57XVOCFNTLTR3Q27 - [0:0]
:KUBE-SEP-AAAAAAAAAAAAAAAA - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SERVICES -d 198.51.200.1/32 -p tcp -m comment --comment "default/web loadbalancer IP" -m tcp --dport 80 -j KUBE-FW-57XVOCFNTLTR3Q27
` + allow + `-A KUBE-SVC-57XVOCFNTLTR3Q27 -j KUBE-SEP-AAAAAAAAAAAAAAAA
-A KUBE-SEP-AAAAAAAAAAAAAAAA -s 10.0.0.9/32 -j KUBE-MARK-MASQ
-A KUBE-SEP-AAAAAAAAAAAAAAAA -p tcp -m tcp -j DNAT --to-destination 10.0.0.9:80
COMMIT
`
	}
	for name, c := range map[string]struct {
		allow, want string
	}{
		"a range that holds the pods": {
			"-A KUBE-FW-57XVOCFNTLTR3Q27 -s 10.0.0.0/8 -j KUBE-SVC-57XVOCFNTLTR3Q27\n", "external [10.0.0.0/8] dnat",
		},
		"a hole in a range": {
			"-A KUBE-FW-57XVOCFNTLTR3Q27 -s 172.16.0.0/16 -j RETURN\n-A KUBE-FW-57XVOCFNTLTR3Q27 -s 172.16.0.0/12 -j KUBE-SVC-57XVOCFNTLTR3Q27\n", "external [172.16.0.0/12] dnat",
		},
	} {
		rs, err := iptables.Parse(strings.NewReader(rules(c.allow)), "test")
		if err != nil {
			t.Fatal(err)
		}
		node := chain.Node{Local: []netip.Addr{netip.MustParseAddr("192.168.0.5")}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}}
		var got []string
		for _, s := range chain.NewView(rs, node).Services().Services {
			for _, f := range s.Frontends {
				for _, r := range f.Routes {
					got = append(got, fmt.Sprintf("%s %v %s", r.From[len(r.From)-1], r.Sources, r.Verdict))
				}
			}
		}
		if !strings.Contains(strings.Join(got, "; "), c.want) {
			t.Errorf("%s: no %q in %q", name, c.want, got)
		}
	}
}

// Whatever can be read can be walked.
func FuzzWalk(f *testing.F) {
	f.Add(baseNAT + "-A PREROUTING\n-A OUTPUT -j KUBE-X\nCOMMIT\n")
	f.Add(baseNAT + ":A - [0:0]\n:B - [0:0]\n-A PREROUTING -m statistic --mode random --probability 0.5 -j A\n-A A -g B\n-A B -m set --match-set x src -j A\n-A PREROUTING -p tcp -j DNAT --to-destination :80\nCOMMIT\n")
	f.Add(unreferenced + "COMMIT\n")
	f.Fuzz(func(t *testing.T, text string) {
		rs, err := iptables.Parse(strings.NewReader(text), "fuzz")
		if err != nil {
			return
		}
		v := chain.NewView(rs, chain.Node{})
		v.Services()
		for _, class := range chain.Classes {
			p, ok := v.Packet(class, netip.MustParseAddrPort("10.0.0.1:80"), netfilter.TCP)
			if !ok {
				continue
			}
			trace, _ := v.Trace(p, class)
			sum := 0.0
			for _, o := range trace.Outcomes {
				o.Share.Exact()
				sum += o.Max.Float64()
			}
			if sum < 1-1e-9 {
				t.Errorf("outcomes add up to %v at most", sum)
			}
		}
	})
}

// unreferenced has a Service that no rule leads to.
const unreferenced = baseNAT + `:KUBE-SERVICES - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]
:KUBE-SEP-AAAAAAAAAAAAAAAA - [0:0]
:OTHER - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A KUBE-SERVICES -d 10.0.0.2/32 -p tcp -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-AAAAAAAAAAAAAAAA -m comment --comment "ns/a -> 10.1.1.1:80" -j KUBE-SEP-AAAAAAAAAAAAAAAA
-A KUBE-SEP-AAAAAAAAAAAAAAAA -p tcp -m tcp -j DNAT --to-destination 10.1.1.1:80
`

// What an unknown target does nobody knows: it may lead to any chain, and its text
// is not the number of one.
func TestUnknownTargetBesideUnreferenced(t *testing.T) {
	for name, c := range map[string]struct {
		rules string
		want  bool
	}{
		"none": {"", true},
		"one":  {`-A OTHER -m comment --comment "` + strings.Repeat("long ", 40) + "\" -j WHATEVER --to \"somewhere\"\n", false},
	} {
		t.Run(name, func(t *testing.T) {
			rs, err := iptables.Parse(strings.NewReader(unreferenced+c.rules+"COMMIT\n"), "test")
			if err != nil {
				t.Fatal(err)
			}
			found := false
			p := chain.NewView(rs, chain.Node{}).Services()
			for _, s := range p.Services {
				found = found || len(s.Findings) > 0
			}
			for _, f := range p.Findings {
				found = found || f.Code == chain.RulesMissing && strings.Contains(f.Message, "KUBE-SVC-AAAAAAAAAAAAAAAA")
			}
			if found != c.want {
				t.Errorf("a chain that no rule leads to is told of: %v, want %v", found, c.want)
			}
		})
	}
}
