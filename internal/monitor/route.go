package monitor

import (
	"net/netip"
	"slices"

	"github.com/natlens/natlens/pkg/chain"
)

// route is what the rules make of this node's connections to a frontend.
type route struct {
	chain.Route
	affinity int
	ways     []Way  // with positive shares
	open     string // why shares cannot be tested; "" when they can
}

// routeOf finds the route of a process on this node, which connects from source;
// nil when there is none.
func routeOf(sv *chain.Service, f *chain.Frontend, source netip.Addr) *route {
	var found *chain.Route
	most := -1 // the length of the range that names the source
	for i := range f.Routes {
		r := &f.Routes[i]
		if !slices.Contains(r.From, chain.Host) {
			continue
		}
		if len(r.Sources) == 0 && most < 0 {
			found = r
		}
		for _, p := range r.Sources {
			if p.Contains(source) && p.Bits() > most {
				found, most = r, p.Bits()
			}
		}
	}
	if found == nil {
		return nil
	}
	out := &route{Route: *found, affinity: sv.AffinitySeconds}
	out.complete()
	return out
}

func (r *route) complete() {
	for _, e := range r.Endpoints {
		share := e.Share.Float64()
		switch {
		case e.Share.Cmp(e.Max) != 0 || len(r.Unknown) > 0:
			r.open = "the rules leave the shares open: the findings tell which rule cannot be decided"
		case !e.Address.IsValid():
			r.open = "a rule sends to one of several addresses"
		case share == 0:
			continue
		}
		if i := slices.IndexFunc(r.ways, func(w Way) bool { return w.Address == e.Address }); i >= 0 {
			r.ways[i].Share += share
			continue
		}
		r.ways = append(r.ways, Way{Address: e.Address, Share: share})
	}
	if len(r.ways) > 0 && !r.Undelivered.IsZero() {
		r.ways = append(r.ways, Way{Share: r.Undelivered.Float64()})
	}
	if !r.Rejected.IsZero() || !r.Dropped.IsZero() {
		// The first packet is sent again, and the rules choose again.
		r.open = "a rule refuses a part of the connections, which leaves no trace of the choice"
	}
}

// same reports whether samples of the two routes may be counted together.
func (r *route) same(o *route) bool {
	if r == nil || o == nil {
		return r == o
	}
	return r.affinity == o.affinity && r.Verdict == o.Verdict && r.open == o.open &&
		r.Undelivered.Cmp(o.Undelivered) == 0 && r.Rejected.Cmp(o.Rejected) == 0 && r.Dropped.Cmp(o.Dropped) == 0 &&
		slices.EqualFunc(r.Endpoints, o.Endpoints, func(a, b chain.Endpoint) bool {
			return a.Address == b.Address && a.Share.Cmp(b.Share) == 0 && a.Max.Cmp(b.Max) == 0
		})
}

// way returns the number of the way to an endpoint, or, for the zero value, of the
// connections that reach none; -1 when there is none.
func (r *route) way(a netip.AddrPort) int {
	return slices.IndexFunc(r.ways, func(w Way) bool { return w.Address == a })
}

// delivers reports whether the rules send any connection to an endpoint.
func (r *route) delivers() bool { return r != nil && len(r.ways) > 0 }

func (r *route) shares() []float64 {
	out := make([]float64, len(r.ways))
	for i, w := range r.ways {
		out[i] = w.Share
	}
	return out
}
