//go:build linux

package kernel

import (
	"fmt"
	"math"
	"net/netip"
	"testing"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/internal/nodebox"
	"github.com/natlens/natlens/pkg/chain"
)

// TestUndecided adds rules of which natlens cannot know whether they match. It
// must name them, and what the kernel does must lie between the least and the
// greatest share that it gives.
func TestUndecided(t *testing.T) {
	w := newWorld(t, nodebox.NFT, kubeproxy.IPv4)
	app := w.plan.services()[0]
	rules := write(t, w.config(), []kubeproxy.Service{app})
	to := fmt.Sprintf("-d %s -p tcp -m tcp --dport %d ", app.ClusterIP, app.PortNumber)
	dnat := "-j DNAT --to-destination " + netip.AddrPortFrom(w.pods[1], podPort).String()
	for _, c := range []struct{ name, rules string }{
		{"by interface", first(rules, "nat", "-A PREROUTING -i eth0 "+to+dnat)},
		{"by another interface", first(rules, "nat", "-A PREROUTING ! -i eth0 "+to+dnat)},
		{"by rate", first(rules, "nat", "-A PREROUTING "+to+"-m limit --limit 100/sec --limit-burst 20 "+dnat)},
		{"by port of the client", first(rules, "nat", "-A PREROUTING "+to+"-m tcp --sport 32768:45000 "+dnat)},
		{"by the length of the packet", first(rules, "nat", "-A PREROUTING "+to+"-m length --length 0:50 "+dnat)},
	} {
		t.Run(c.name, func(t *testing.T) {
			w.load(t, c.rules)
			for _, from := range []client{w.pod(), w.outside(w.beyond)} {
				cell := w.cell(t, app.Name, chain.ClusterIP, from)
				tr, _ := w.view.Trace(w.view.PacketFrom(w.source(cell), cell.to, cell.service.Protocol))
				if r := w.route(t, cell); len(tr.Unknown) != 1 || len(r.Unknown) != 1 {
					t.Errorf("%s: undecided are %v by trace, %v by route; want one rule", cell, tr.Unknown, r.Unknown)
				}
				const n = 300
				want, least, most := expected{}, expected{}, expected{}
				for _, o := range tr.Outcomes {
					a := w.answer(cell, o.To, o.Masquerade)
					want[a], least[a], most[a] = 1, least[a]+o.Share.Float64(), most[a]+o.Max.Float64()
				}
				// Five standard deviations of a half: 1 in 2 million.
				slack := 5 * math.Sqrt(0.25/n)
				for o, k := range w.sample(t, cell, want, n, patience) {
					if share := float64(k) / n; want[o] == 0 || share < least[o]-slack || share > most[o]+slack {
						t.Errorf("%s: %.3f %s; natlens says from %v to %v", cell, share, o, least[o], most[o])
					}
				}
			}
		})
	}
}
