package chain_test

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
	"github.com/natlens/natlens/pkg/nftables"
)

// One kube-proxy wrote the same Services in both modes. What the two rulesets
// mean must be the same, though they have hardly a rule in common.
func TestModesAgree(t *testing.T) {
	node := chain.Node{Local: []netip.Addr{netip.MustParseAddr("10.146.0.2")}}
	iptablesMode := answers(chain.NewView(parse(t, recorded(t, "v1.35.4-iptables.save")), node).Services())
	nftMode := answers(chain.NewView(parseNFT(t, "v1.35.4-nftables.nft.json"), node).Services())
	if diff := cmp.Diff(iptablesMode, nftMode); diff != "" {
		t.Errorf("(-iptables mode +nftables mode):\n%s", diff)
	}
	if len(nftMode) < 80 {
		t.Errorf("only %d answers", len(nftMode))
	}
}

// The layout of v1.36 and later has no chain per endpoint. Its recording is of
// a part of the same Services.
func TestLayoutsOfNFTablesAgree(t *testing.T) {
	node := chain.Node{Local: []netip.Addr{netip.MustParseAddr("10.146.0.2")}}
	older := chain.NewView(parseNFT(t, "v1.35.4-nftables.nft.json"), node).Services()
	newer := chain.NewView(parseNFT(t, "v1.37.2-nftables.nft.json"), node).Services()
	want, got := map[string]bool{}, answers(newer)
	for _, a := range answers(older) {
		want[a] = true
	}
	for _, a := range got {
		if !want[a] && !strings.Contains(a, "default/go-app") { // has other pods in this recording
			t.Errorf("only v1.37 says: %s", a)
		}
	}
	if len(newer.Services) < 20 {
		t.Errorf("only %d Services", len(newer.Services))
	}
	for _, f := range findings(newer) {
		t.Errorf("false alarm: %s: %s", f.Code, f.Message)
	}
}

func parseNFT(t *testing.T, name string) *netfilter.Ruleset {
	t.Helper()
	f, err := os.Open("../../testdata/captures/" + name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rs, err := nftables.Parse(f, name)
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

// answers puts what is programmed into lines without what differs between the
// modes: chains, and the kernel's rounding of a share.
func answers(p *chain.Programmed) []string {
	var out []string
	for _, s := range p.Services {
		for _, f := range s.Frontends {
			for _, r := range f.Routes {
				line := fmt.Sprintf("%s %s %s %v:%d affinity %d from %v %v: %s", s.ServicePort, s.Protocol, f.Type, f.Address, f.Port, s.AffinitySeconds, r.From, len(r.Sources), r.Verdict)
				for _, e := range r.Endpoints {
					line += fmt.Sprintf(" %v=%.8f %v", e.Address, e.Share.Float64(), r.MasqueradesTo(e))
				}
				out = append(out, line)
			}
		}
		for _, f := range s.Findings {
			out = append(out, fmt.Sprintf("%s: %s", f.Code, f.Message))
		}
	}
	return out
}
