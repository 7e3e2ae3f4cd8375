package chain_test

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
	"github.com/natlens/natlens/pkg/nftables"
)

// flowTest is one of kube-proxy's own packet flow tests: rules as they stood in
// a kernel, and where kube-proxy's authors expect packets to go.
type flowTest struct {
	Test    string
	Rules   string
	NodeIPs []string
	Cases   []struct {
		Name, SourceIP, Protocol, DestIP string
		DestPort                         uint16
		Output                           string
		Masq                             bool
	}
}

func TestFlowsOfKubeProxy(t *testing.T) {
	for _, mode := range []struct {
		file  string
		parse func(io.Reader, string) (*netfilter.Ruleset, error)
		cases int
	}{
		{"flow-iptables-v1.35.4.json", iptables.Parse, 246},
		{"flow-nftables-v1.35.4.json", nftables.Parse, 218},
	} {
		t.Run(mode.file, func(t *testing.T) {
			data, err := os.ReadFile("../../testdata/flows/" + mode.file)
			if err != nil {
				t.Fatal(err)
			}
			var tests []flowTest
			if err := json.Unmarshal(data, &tests); err != nil {
				t.Fatal(err)
			}
			cases := 0
			for i, ft := range tests {
				rs, err := mode.parse(strings.NewReader(ft.Rules), ft.Test)
				if err != nil {
					t.Fatal(err)
				}
				cases += ft.run(t, i, rs)
			}
			if cases != mode.cases {
				t.Errorf("%d cases, want %d", cases, mode.cases)
			}
		})
	}
}

// run compares the answer to each case with the recorded one, and returns how
// many there were.
func (ft flowTest) run(t *testing.T, i int, rs *netfilter.Ruleset) int {
	node := chain.Node{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
	for _, ip := range ft.NodeIPs {
		node.Local = append(node.Local, netip.MustParseAddr(ip))
	}
	v := chain.NewView(rs, node)
	for _, c := range ft.Cases {
		t.Run(fmt.Sprintf("%d %s/%s", i, ft.Test, c.Name), func(t *testing.T) {
			protocol, err := netfilter.ParseProtocol(cmp.Or(c.Protocol, "TCP"))
			if err != nil {
				t.Fatal(err)
			}
			to := netip.AddrPortFrom(netip.MustParseAddr(c.DestIP), c.DestPort)
			trace, ok := v.Trace(v.PacketFrom(netip.MustParseAddr(c.SourceIP), to, protocol))
			if !ok {
				t.Fatal("no table of the packet's family")
			}
			got, masq := summary(trace)
			if got != c.Output || masq != c.Masq {
				t.Errorf("%s → %s: got %q masquerade %v, kube-proxy's authors expect %q masquerade %v", c.SourceIP, to, got, masq, c.Output, c.Masq)
			}
		})
	}
	return len(ft.Cases)
}

// summary puts a trace in the form of the recorded answers.
func summary(trace *chain.Trace) (output string, masquerade bool) {
	var targets []string
	for _, o := range trace.Outcomes {
		switch o.Verdict {
		case chain.DNAT:
			targets = append(targets, o.To.String())
			masquerade = masquerade || o.Masquerade
		case chain.None:
		default:
			targets = append(targets, strings.ToUpper(string(o.Verdict)))
		}
	}
	slices.Sort(targets)
	return strings.Join(targets, ", "), masquerade
}
