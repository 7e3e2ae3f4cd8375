package chain

import (
	"net/netip"
	"slices"

	"github.com/natlens/natlens/pkg/netfilter"
)

// This file saves most of the work behind nat. Ten endpoints of a Service meet
// the same filter chains with the same marks, and so do those of all others:
//
//	a state leaves nat ──▶ an exit holds for it? ──yes──▶ the same end
//	                                 │no
//	                                 ▼
//	              route, noting what is asked of the destination ──▶ an exit
//
// An exit holds for another destination when every question gets the answer that
// it got then: the rules cannot tell the two apart. What a chain deals out to many
// destinations (leaf.go) takes it as one state if it holds for each of them.

// exits are those that a run remembers.
type exits map[exitKey][]*exit

// exitKey is what the way out depends on, besides the destination.
type exitKey struct {
	source   netip.Addr
	in       string
	class    Class
	protocol netfilter.Protocol
	fromHost bool
	rest     int // how many base chains are left at the hook by which it came
	flags    flag
	mark     uint32
	connMark uint32
}

// Bounds of what is remembered: source ranges of single Services make keys of
// their own, and long lists take longer than walking.
const (
	mostExitKeys = 256
	mostExits    = 8 // of one key
)

// exit is one way from nat to an end.
type exit struct {
	asked   []question
	entered []entered
	sensed  []sensitivity
	end     end // its destination, share and rule of nat are those of whoever takes it
}

// question is what a rule asks of the destination.
type question struct {
	chain  *netfilter.Chain // whose match it is; nil for an index, or a set
	table  *netfilter.Table // of a set
	number uint32           // of that table
	expr   netfilter.Expr
	index  *index // that has no rule for the destination
	answer answer
}

// entered is a chain on the way.
type entered struct {
	chain *netfilter.Chain
	at    chainAt
	long  bool // it has an index
}

// leave brings a state that nat is through with to its end; rest are the base
// chains left at the hook by which it came.
func (r *run) leave(s *state, rest []netfilter.BaseChain) {
	if r.undecided != nil { // the walk is void
		return
	}
	if r.exits == nil || r.view.apart(s.to.Addr()) {
		r.route(*s, rest)
		return
	}
	p := &r.packet
	k := exitKey{p.Source, p.In, r.class, p.Protocol, p.FromHost, len(rest), s.flags, s.mark, s.connMark}
	known := r.lastExits
	if k != r.lastKey {
		known = r.exits[k]
		r.lastKey, r.lastExits = k, known
	}
	for _, x := range known {
		if x.holds(r, s) {
			r.follow(x, s)
			return
		}
	}
	if d := s.many; d != nil {
		for i := range d.parts {
			one := d.rewrite(s, i)
			r.leave(&one, rest)
		}
		return
	}
	r.exit = &exit{}
	ends, senses := len(r.ends), len(r.sensitive)
	r.route(*s, rest)
	x := r.exit
	r.exit = nil
	// It must be one end, of the whole share.
	if x == nil || r.undecided != nil || len(r.ends) != ends+1 || len(known) >= mostExits {
		return
	}
	if e := &r.ends[ends]; e.share != s.share || e.to != s.to || e.by != s.by {
		return
	}
	x.end, x.sensed = r.ends[ends], slices.Clone(r.sensitive[senses:])
	if len(r.exits) >= mostExitKeys {
		clear(r.exits)
	}
	r.lastExits = append(known, x)
	r.exits[k] = r.lastExits
}

// apart reports whether the kernel treats a destination unlike others, so that no
// exit is for it.
func (v *View) apart(to netip.Addr) bool {
	return v.node.isLocal(to) || to.IsLoopback() || to.IsMulticast()
}

// holds reports whether a state takes the exit, with all of its destinations.
func (x *exit) holds(r *run, s *state) bool {
	if slices.ContainsFunc(x.entered, func(e entered) bool { return e.chain == r.watch }) {
		return false
	}
	if s.many == nil {
		return x.holdsFor(r, s)
	}
	one := *s
	for i := range s.many.parts {
		one.to = s.many.parts[i].to
		if !x.holdsFor(r, &one) {
			return false
		}
	}
	return true
}

// holdsFor reports whether the answers to what is asked of the destination are
// those of the exit.
func (x *exit) holdsFor(r *run, s *state) bool {
	for i := range x.asked {
		if !x.asked[i].sameFor(r, s) {
			return false
		}
	}
	return true
}

func (q *question) sameFor(r *run, s *state) bool {
	switch {
	case q.index != nil:
		return !q.index.has(s.to, r.packet.Protocol)
	case q.chain == nil:
		k := r.setKey(q.expr, s)
		r.tracks.ask(lookup{table: q.number, set: q.expr.A, key: k})
		_, ok := q.table.Set(q.expr.A).Lookup(k)
		return !ok
	}
	return r.ask(q.table, q.chain, q.expr, s) == q.answer
}

// follow brings a state to the end of an exit.
func (r *run) follow(x *exit, s *state) {
	for i := range x.entered {
		r.tracks.enter(x.entered[i].at)
		if x.entered[i].long && (x.end.verdict != DNAT || s.has(unresolvedTo)) { // a trail has the endpoints anyway
			r.reachAll(s)
		}
	}
	r.sensitive = append(r.sensitive, x.sensed...)
	e := x.end
	e.to, e.share, e.by, e.many = s.to, s.share, s.by, s.many
	r.ends = append(r.ends, e)
}

// reachAll notes the destinations of a state.
func (r *run) reachAll(s *state) {
	if s.many == nil {
		r.tracks.reach(s.to)
		return
	}
	for i := range s.many.parts {
		r.tracks.reach(s.many.parts[i].to)
	}
}

// enters notes that a state with that destination enters a chain.
func (r *run) enters(c *netfilter.Chain, x *index, to netip.AddrPort) {
	at := chainAt{r.table.number, c.ID}
	r.tracks.enter(at)
	if x != nil {
		r.tracks.reach(to)
	}
	if r.exit == nil {
		return
	}
	if c == r.watch || x != nil && x.has(to, r.packet.Protocol) {
		r.spoil()
		return
	}
	r.exit.entered = append(r.exit.entered, entered{c, at, x != nil})
	if x != nil {
		r.exit.asked = append(r.exit.asked, question{index: x})
	}
}

// asked notes a question of the exit being recorded.
func (r *run) asked(q question, a answer) {
	if r.exit == nil {
		return
	}
	switch q.expr.Kind {
	case netfilter.Source, netfilter.SourceType, netfilter.SourcePort, netfilter.ProtocolIs, netfilter.Comment, netfilter.Always,
		netfilter.CTState, netfilter.MarkIs, netfilter.ConnMarkIs, netfilter.Fragment, netfilter.TCPFlags, netfilter.InInterface,
		netfilter.BridgePort, netfilter.Recent, netfilter.Unknown:
		return // of what the key has
	case netfilter.OutInterface, netfilter.DestinationType:
		return // the same for all that is not local
	case netfilter.InSet, netfilter.VerdictMap:
		if q.chain != nil {
			return // the set was asked, or may not be
		}
		if a == no {
			q.answer = a
			r.exit.asked = append(r.exit.asked, q)
			return
		}
	case netfilter.Destination, netfilter.DestinationPort:
		q.answer = a
		r.exit.asked = append(r.exit.asked, q)
		return
	}
	r.spoil()
}

// spoil gives up the exit being recorded: it depends on more than it can tell.
func (r *run) spoil() { r.exit = nil }
