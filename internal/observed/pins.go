package observed

import (
	"context"
	"net/netip"
	"time"

	"github.com/natlens/natlens/pkg/affinity"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
)

// Pins are the clients that session affinity bound to endpoints at one moment.
type Pins struct {
	Time  time.Time
	Took  time.Duration // to read them
	Error string        // why some could not be read

	layout *layout
	lists  []pinned // by endpoint
}

type pinned struct {
	affinity.List
	known bool
}

// EndpointPins are the clients of one endpoint.
type EndpointPins struct {
	Address netip.AddrPort
	affinity.List
}

// Of returns the clients of a Service port's endpoints, those alone that are
// known.
func (p *Pins) Of(port chain.ServicePort) []EndpointPins {
	i := p.layout.port(port)
	if i < 0 {
		return nil
	}
	var out []EndpointPins
	for k, a := range p.layout.of(i) {
		if l := p.lists[int(p.layout.starts[i])+k]; l.known {
			out = append(out, EndpointPins{a, l.List})
		}
	}
	return out
}

// PinReader tells which clients a chain binds to its endpoint; ok is false when
// it binds none.
type PinReader interface {
	Read(t *netfilter.Table, c *netfilter.Chain, timeout time.Duration) (l affinity.List, ok bool, err error)
}

// Pinner reads the clients of all Service ports with session affinity, time after
// time. It is used by one goroutine at a time.
type Pinner struct {
	Reader PinReader

	programmed *chain.Programmed
	layout     *layout // of those Service ports alone
	spots      []spot
	timeouts   []time.Duration // by port
}

// Look reads once. An error ends it: what was read by then is told.
func (r *Pinner) Look(ctx context.Context, rs *netfilter.Ruleset, p *chain.Programmed) *Pins {
	r.turn(p)
	start := time.Now()
	out := &Pins{Time: start, layout: r.layout, lists: make([]pinned, len(r.layout.endpoints))}
	port := 0
	for _, s := range r.spots {
		for s.endpoint >= r.layout.starts[port+1] {
			port++
		}
		if ctx.Err() != nil {
			break
		}
		if err := out.read(r.Reader, rs, s, r.timeouts[port]); err != nil {
			out.Error = err.Error()
			break
		}
	}
	out.Took = time.Since(start)
	return out
}

// turn finds the Service ports with session affinity.
func (r *Pinner) turn(p *chain.Programmed) {
	if r.programmed == p {
		return
	}
	n := newNumbering(0, r.layout)
	r.timeouts, r.spots = nil, nil
	for i := range p.Services {
		if s := &p.Services[i]; s.AffinitySeconds > 0 {
			r.spots = n.add(s, r.spots)
			r.timeouts = append(r.timeouts, time.Duration(s.AffinitySeconds)*time.Second)
		}
	}
	r.programmed, r.layout = p, n.layout
}

// read adds the clients that one chain binds.
func (p *Pins) read(r PinReader, rs *netfilter.Ruleset, s spot, timeout time.Duration) error {
	family := netfilter.FamilyOf(p.layout.endpoints[s.endpoint].Addr())
	for _, t := range rs.Tables {
		c := t.Lookup(s.chain)
		if c == nil || t.Family != family || !mayCount(t, s.chain) {
			continue
		}
		got, ok, err := r.Read(t, c, timeout)
		if err != nil {
			return err
		}
		if ok {
			l := &p.lists[s.endpoint]
			l.known, l.Clients, l.Full = true, l.Clients+got.Clients, l.Full || got.Full
			return nil // both backends share the list
		}
	}
	return nil
}
