package chain

import (
	"bytes"
	"cmp"
	"net/netip"
	"slices"
	"strconv"

	"github.com/natlens/natlens/pkg/netfilter"
)

// Verdict is what becomes of a connection.
type Verdict string

// The verdicts of an [Outcome].
const (
	DNAT   Verdict = "dnat"   // sent to another address
	Accept Verdict = "accept" // let through by a rule that says so
	Reject Verdict = "reject" // refused with an error
	Drop   Verdict = "drop"   // lost without a word
	None   Verdict = "none"   // no rule applied: it leaves with the address it came with
)

// maxDepth bounds jumps; the kernel allows 16 (NFT_JUMP_STACK_SIZE).
const maxDepth = 64

// maxUnknown bounds the rules that are tried both ways in one walk, since each
// doubles the work. Further ones are taken as not matching, and named.
const maxUnknown = 5

// Hook priorities that part the tables: conntrack runs behind raw, and what
// mangle accepts says nothing about a filter (enum nf_ip_hook_priorities).
const (
	conntrackPriority = -200
	afterMangle       = -150
)

// flag is what has happened to a packet so far.
type flag uint16

const (
	notTracked   flag = 1 << iota // by raw NOTRACK: nat is not asked
	rewritten                     // its destination has been decided by nat
	masqueraded                   // its source has been rewritten
	explicit                      // a nat or filter rule accepted it
	shadowed                      // a nat rule let it leave before any could rewrite it
	viaDispatch                   // it entered the chain that run.watch names
	unresolvedTo                  // the target is a range of addresses
	doubted                       // an undecidable filter rule was passed over
)

// state is a part of the connections on its way through the rules: all that
// have the same fate so far.
type state struct {
	to       netip.AddrPort // the destination as rewritten so far
	share    Share
	mark     uint32
	connMark uint32
	hook     netfilter.Hook
	flags    flag
	by       RuleRef // the rule that rewrote the destination, or took the packet out of conntrack
	path     *step
	// many is set where the connections are dealt out to several destinations that
	// fare alike: to and by are those of the first then. It is so from the rule that
	// deals them out on, in nat, to an exit that holds for all of them; no base chain
	// is run with it.
	many *spread
}

func (s *state) has(f flag) bool { return s.flags&f != 0 }

// alike reports whether two states have the same future.
func (s *state) alike(o *state) bool {
	return s.to == o.to && s.mark == o.mark && s.connMark == o.connMark && s.hook == o.hook && s.flags == o.flags && s.by == o.by
}

// RuleRef is the place of a rule.
type RuleRef struct {
	Table *netfilter.Table
	Chain *netfilter.Chain
	Index int // counted from 0; the policy of a base chain when it is Chain.Len()
}

// step is one rule on a path, linked backwards.
type step struct {
	before *step
	at     RuleRef
	effect netfilter.Expr
	chance chance
	share  Share // behind the rule
}

// end is where a state came to rest.
type end struct {
	state
	verdict Verdict
	ended   RuleRef // the rule that dropped or rejected it
}

// run is one walk of one packet, under one assumption about the undecidable
// matches.
type run struct {
	view   *View
	packet netfilter.Packet
	class  Class
	family *familyView

	// assume holds how each undecidable rule met so far is taken; undecided is
	// the first one that it says nothing of, and ends the run.
	assume    map[RuleRef]bool
	undecided *RuleRef
	// natOnly takes undecidable matches outside nat and raw as not holding: a
	// view of all Services is about where they go, not about foreign policies.
	natOnly bool
	ignored []RuleRef // undecidable rules beyond maxUnknown, or without a model: the answer may be any
	// unresolved are rules that rewrite the destination to one of several.
	unresolved []RuleRef

	probing bool // every way is taken; see idle

	watch   *netfilter.Chain // entering it sets viaDispatch
	tracing bool             // keep paths
	// sensitive are the source ranges that rules on the way asked for.
	sensitive []sensitivity
	collect   bool

	affinity  int        // seconds of the first affinity rule met
	tracks    *tracks    // of this walk and those before it; nil to leave none
	table     *tableView // of the base chain being walked
	broken    []RuleRef
	ends      []end
	one       [1]world // for explore
	stack     []*netfilter.Chain
	spare     [][]state
	splits    splits
	spreads   []*spread // of this walk and those before it to the same frontend
	exits     exits     // nil to remember none
	lastKey   exitKey   // with which exits was asked last
	lastExits []*exit
	exit      *exit // being recorded
}

// detailed reports whether more is asked of the walk than where it ends, so that
// it must go through every rule.
func (r *run) detailed() bool { return r.probing || r.tracing || r.exit != nil }

// reset makes a run ready for another packet, keeping its memory.
func (r *run) reset(p netfilter.Packet) {
	*r = run{packet: p, tracks: r.tracks, ends: r.ends[:0], sensitive: r.sensitive[:0], stack: r.stack[:0], spare: r.spare, splits: r.splits, spreads: r.spreads, exits: r.exits}
}

// sensitivity is a source range that a rule of the chain asks for.
type sensitivity struct {
	chain  *netfilter.Chain
	prefix netip.Prefix
}

// outcomes walks the packet through the whole of netfilter, to r.ends.
func (r *run) outcomes() {
	enters := netfilter.Prerouting
	if r.packet.FromHost {
		enters = netfilter.Output
	}
	live := append(r.take(), state{to: netip.AddrPortFrom(r.packet.Destination, r.packet.Port), share: whole(), hook: enters})
	for rest := r.family.hooks[enters]; len(rest) > 0; {
		live, rest = r.next(enters, rest, live)
		// Of what nat has sent on, each goes on alone, by a known exit if it can.
		kept := live[:0]
		for i := range live {
			if live[i].has(rewritten) {
				r.leave(&live[i], rest)
			} else {
				kept = append(kept, live[i])
			}
		}
		live = kept
	}
	for i := range live {
		r.leave(&live[i], nil)
	}
	r.give(live)
}

// route walks what nat has decided on to its end: through the base chains left at
// the hook by which it came, and then the kernel routes it by the new destination,
// and the filter chains see that one only.
func (r *run) route(s state, rest []netfilter.BaseChain) {
	one := append(r.take(), s)
	for len(rest) > 0 {
		one, rest = r.next(s.hook, rest, one)
	}
	local := r.view.node.isLocal(s.to.Addr())
	switch {
	case r.packet.FromHost:
		if r.martian(&s) {
			for i := range one {
				r.finish(&one[i], Drop, RuleRef{})
			}
			r.give(one)
			return
		}
		one = r.hook(netfilter.Postrouting, one)
		if local { // comes back on the loopback interface
			one = r.hook(netfilter.Input, r.hook(netfilter.Prerouting, one))
		}
	case local:
		one = r.hook(netfilter.Input, one)
	default:
		one = r.hook(netfilter.Postrouting, r.hook(netfilter.Forward, one))
	}
	for i := range one {
		s := &one[i]
		switch {
		case s.has(rewritten):
			r.finish(s, DNAT, RuleRef{})
		case s.has(explicit):
			r.finish(s, Accept, RuleRef{})
		default:
			r.finish(s, None, RuleRef{})
		}
	}
	r.give(one)
}

// martian reports whether the kernel drops a packet of 127.0.0.0/8 that nat
// sends off the loopback interface: it does unless route_localnet is set, and
// for IPv6 always.
func (r *run) martian(s *state) bool {
	return s.has(rewritten) && r.packet.Source.IsLoopback() && !s.to.Addr().IsLoopback() &&
		(r.packet.Source.Is6() || r.view.node.NoRouteLocalnet)
}

// finish notes an end; by is the rule that drops or rejects.
func (r *run) finish(s *state, v Verdict, by RuleRef) {
	if r.undecided == nil {
		r.ends = append(r.ends, end{*s, v, by})
	}
}

// hook runs every base chain of the hook and returns what goes on behind it.
// It takes over the slice.
func (r *run) hook(h netfilter.Hook, live []state) []state {
	for i := range live {
		live[i].hook = h
	}
	for rest := r.family.hooks[h]; len(rest) > 0; {
		live, rest = r.next(h, rest, live)
	}
	return live
}

// next runs the first of the base chains at a hook, and those abreast of it, and
// returns what goes on, and the chains that are left. It takes over the slice.
func (r *run) next(h netfilter.Hook, bases []netfilter.BaseChain, live []state) (on []state, rest []netfilter.BaseChain) {
	n := abreast(h, bases)
	for _, base := range r.order(h, bases[:n], live) {
		var skipped []state
		if base.Base.Type == netfilter.TypeNAT {
			live, skipped = r.natAsks(h, live)
		}
		if len(live) > 0 {
			live = r.base(base, live)
		}
		live = append(live, skipped...)
		r.give(skipped)
	}
	return live, bases[n:]
}

// natAsks parts the states that nat is still asked about at the hook from the
// others. Once one nat chain has decided on an address, no other is asked.
func (r *run) natAsks(h netfilter.Hook, live []state) (asked, skipped []state) {
	done := rewritten
	if h == netfilter.Postrouting || h == netfilter.Input {
		done = masqueraded
	}
	// A connection of the node to itself was decided on in OUTPUT and POSTROUTING.
	decided := r.packet.FromHost && (h == netfilter.Prerouting || h == netfilter.Input)
	if len(live) == 1 && !live[0].has(done|notTracked) && !decided {
		return live, nil
	}
	asked, skipped = live[:0], r.take()
	for _, s := range live {
		if s.has(done|notTracked) || decided {
			skipped = append(skipped, s)
		} else {
			asked = append(asked, s)
		}
	}
	return asked, skipped
}

// base runs one base chain, and its policy for what comes back. It takes over
// the slice.
func (r *run) base(b netfilter.BaseChain, live []state) []state {
	r.table = r.family.tables[b.Table]
	passed := r.take()
	policy := RuleRef{b.Table, b.Chain, b.Len()}
	for rest := live; len(rest) > 0; {
		// The index asks for one destination; states of different ones never join.
		n := 1
		for n < len(rest) && rest[n].to == rest[0].to {
			n++
		}
		back := r.chain(b.Table, b.Chain, append(r.take(), rest[:n]...), &passed)
		rest = rest[n:]
		for i := range back {
			s := &back[i]
			if b.Base.Policy == netfilter.Drop && !r.doubtful(s) {
				r.note(s, policy, netfilter.Expr{Kind: netfilter.Drop}, always)
				r.finish(s, Drop, policy)
				continue
			}
			passed = append(passed, *s)
		}
		r.give(back)
	}
	r.give(live)
	return passed
}

// chain runs the rules of one chain. It returns what falls off its end or
// returns, and appends to passed what leaves the base chain accepted. It takes
// over the slice.
func (r *run) chain(t *netfilter.Table, c *netfilter.Chain, live []state, passed *[]state) []state {
	if c == r.watch {
		for i := range live {
			live[i].flags |= viaDispatch
		}
	}
	r.stack = append(r.stack, c)
	more, back := r.take(), r.take() // what comes back from jumps, and what returns to the caller
	x := r.table.indexes[c.ID]
	r.enters(c, x, live[0].to)
	rules := x.rules(c, live[0].to.Addr(), r.packet.Protocol, live[0].to.Port())
	deals := r.dealsFrom(c)
	for i := rules.step(); i >= 0 && len(live) > 0 && r.undecided == nil; i = rules.step() {
		if i == deals && len(live) == 1 && r.deal(t, c, i, &live[0], passed) {
			live = live[:0]
			break
		}
		ref := RuleRef{t, c, i}
		rule := c.Rule(i)
		kept := 0
		keep := func(s *state) {
			if &live[kept] != s { // they are large
				live[kept] = *s
			}
			kept++
		}
		for k := range live {
			p, ok := r.matches(ref, rule, &live[k])
			if !ok {
				keep(&live[k])
				continue
			}
			taken := live[k]
			if r.probing {
				if p == perhaps {
					keep(&live[k])
				}
			} else if p != always {
				taken.share, live[k].share = r.split(rule, taken.share)
				if !live[k].share.IsZero() {
					keep(&live[k])
				}
				if taken.share.IsZero() {
					continue
				}
			}
			if rest := r.perform(ref, rule, p, &taken, &more, &back, passed); !rest.IsZero() {
				taken.share = rest
				more = append(more, taken)
			}
		}
		live = join(live[:kept], more)
		more = more[:0]
	}
	r.stack = r.stack[:len(r.stack)-1]
	live = join(live, back)
	r.give(more)
	r.give(back)
	return live
}

// perform does what a matching rule says: its statements, and then its verdict.
// It returns the share for which the verdict turned out to be none.
func (r *run) perform(ref RuleRef, rule []netfilter.Expr, p chance, s *state, next, back, passed *[]state) Share {
	if len(rule) == 0 { // it only counts
		*next = append(*next, *s)
		return Share{}
	}
	e := rule[len(rule)-1]
	for _, st := range rule[:len(rule)-1] {
		if !st.IsMatch() { // only nf_tables has statements ahead of a verdict
			r.mark(ref, st, s)
		}
	}
	switch e.Kind {
	case netfilter.VerdictMap:
		if ref.Table.Set(e.A).Opaque || r.probing && netfilter.Field(e.N)&netfilter.FieldSource != 0 {
			r.ignore(ref)
		}
		v, ok := r.lookUp(ref.Table, e, s)
		if ok {
			r.act(ref, v.Verdict, p, s, next, back, passed)
			return Share{}
		}
		return s.share
	case netfilter.Choose:
		left := e.B
		for _, c := range ref.Chain.Choices(e) {
			taken := *s
			taken.share, s.share = r.splits.split(s.share, c.Count, left)
			left -= c.Count
			r.act(ref, c.Verdict, chance{c.Count, e.B}, &taken, next, back, passed)
			if left == 0 {
				return Share{}
			}
		}
		return s.share
	}
	r.act(ref, e, p, s, next, back, passed)
	return Share{}
}

// setKey returns what a lookup asks of the packet.
func (r *run) setKey(e netfilter.Expr, s *state) netfilter.SetKey {
	var k netfilter.SetKey
	f := netfilter.Field(e.N)
	if f&netfilter.FieldSource != 0 {
		k.Addr = r.packet.Source
	}
	if f&netfilter.FieldDestination != 0 {
		if k.Addr.IsValid() {
			k.Addr2 = s.to.Addr()
		} else {
			k.Addr = s.to.Addr()
		}
	}
	if f&netfilter.FieldProtocol != 0 {
		k.Protocol = r.packet.Protocol
	}
	if f&netfilter.FieldPort != 0 {
		k.Port = s.to.Port()
	}
	return k
}

// lookUp asks a set or map about the packet.
func (r *run) lookUp(t *netfilter.Table, e netfilter.Expr, s *state) (netfilter.SetElement, bool) {
	k := r.setKey(e, s)
	r.tracks.ask(lookup{table: r.table.number, set: e.A, key: k})
	v, ok := t.Set(e.A).Lookup(k)
	r.asked(question{table: t, number: r.table.number, expr: e}, is(ok))
	return v, ok
}

// split parts a share at the chances of a rule, of which there mostly is one.
func (r *run) split(rule []netfilter.Expr, share Share) (taken, rest Share) {
	taken = share
	for _, e := range rule {
		if e.Kind == netfilter.Random || e.Kind == netfilter.Nth {
			p := chanceOf(e)
			hit, missed := r.splits.split(taken, p.num, p.den)
			taken, rest = hit, rest.plus(missed)
		}
	}
	return taken, rest
}

// join puts states together that have the same future.
func join(a, b []state) []state {
next:
	for k := range b {
		s := &b[k]
		for i := range a {
			if a[i].alike(s) {
				a[i].share = a[i].share.plus(s.share)
				continue next
			}
		}
		a = append(a, *s)
	}
	return a
}

// matches tells whether a rule matches the packets in a state, and with which
// chance: the product of its chances, rounded, if there are several.
func (r *run) matches(ref RuleRef, rule []netfilter.Expr, s *state) (p chance, ok bool) {
	if r.probing {
		return r.mayMatch(ref, rule, s)
	}
	p = always
	open := false // an undecidable match
	bySource := -1
	for i, e := range rule {
		if !e.IsMatch() {
			continue
		}
		if e.Kind == netfilter.Random || e.Kind == netfilter.Nth {
			p = p.times(chanceOf(e))
			continue
		}
		switch r.decide(ref.Table, ref.Chain, e, s) {
		case no:
			if r.collect && bySource < 0 && asksSource(ref.Table, e) {
				bySource = i // maybe the only thing that speaks against it
				continue
			}
			r.noteAffinity(ref, rule, e, s)
			return p, false
		case unknown:
			open = true
		case yes:
			if r.collect && asksSource(ref.Table, e) {
				r.sense(ref, e)
			}
		}
	}
	if bySource >= 0 {
		r.sense(ref, rule[bySource])
		return p, false
	}
	if open && !r.suppose(ref, rule, s) {
		return p, false
	}
	return p, true
}

// noteAffinity notes the timeout of the list of known clients that a rule looks
// into, if it is one that sends those of the Service on to an endpoint. Others
// use such lists too, to limit rates.
func (r *run) noteAffinity(ref RuleRef, rule []netfilter.Expr, e netfilter.Expr, s *state) {
	last := rule[len(rule)-1].Kind
	if !s.has(viaDispatch) || s.has(rewritten) || !r.directs() || s.hook == netfilter.Postrouting || last != netfilter.Jump && last != netfilter.Goto {
		return
	}
	seconds := 0
	switch {
	case e.Kind == netfilter.Recent:
		seconds = affinitySeconds(ref.Chain.Text(e))
	case e.Kind == netfilter.InSet && ref.Table.Set(e.A).Dynamic:
		seconds = int(ref.Table.Set(e.A).Timeout.Seconds())
	default:
		return
	}
	r.spoil()
	r.affinity = cmp.Or(r.affinity, seconds)
}

// asksSource reports whether a match asks for particular source addresses.
func asksSource(t *netfilter.Table, e netfilter.Expr) bool {
	return e.Kind == netfilter.Source || e.Kind == netfilter.InSet && netfilter.Field(e.N) == netfilter.FieldSource && !t.Set(e.A).Dynamic
}

// sense remembers that a rule asks for a source range: a packet from the other
// side of its border may fare differently.
func (r *run) sense(ref RuleRef, e netfilter.Expr) {
	if e.Kind == netfilter.InSet {
		set := ref.Table.Set(e.A)
		r.spoil()
		r.tracks.ask(lookup{table: r.table.number, set: e.A, whole: true})
		for _, k := range set.Keys {
			r.sensitive = append(r.sensitive, sensitivity{ref.Chain, netip.PrefixFrom(k.Addr, k.Addr.BitLen())})
		}
		for _, span := range set.Ranges {
			for _, p := range span.Prefixes() {
				r.sensitive = append(r.sensitive, sensitivity{ref.Chain, p})
			}
		}
		return
	}
	if p, ok := ref.Chain.CIDR(e); ok && p.Bits() > 0 {
		r.sensitive = append(r.sensitive, sensitivity{ref.Chain, p.Masked()})
	}
}

// suppose says how a rule that cannot be decided is taken in this run.
func (r *run) suppose(ref RuleRef, rule []netfilter.Expr, s *state) bool {
	if last := rule[len(rule)-1]; last.IsMatch() || last.Kind == netfilter.NoEffect {
		return false // matching or not makes no difference
	}
	if r.natOnly && !r.directs() {
		s.flags |= doubted
		return false
	}
	r.spoil()
	if taken, ok := r.assume[ref]; ok {
		return taken
	}
	if len(r.assume) >= maxUnknown {
		r.ignore(ref)
		return false
	}
	r.undecided = &ref
	return false
}

// directs reports whether the base chain being walked can change where a
// connection goes: a nat chain, or one ahead of conntrack.
func (r *run) directs() bool {
	b := r.stack[0].Base
	return b != nil && (b.Type == netfilter.TypeNAT || b.Priority < conntrackPriority)
}

// ignore notes a rule that might do anything.
func (r *run) ignore(ref RuleRef) {
	if !r.natOnly || r.directs() {
		r.spoil()
		r.ignored = appendNew(r.ignored, ref)
	}
}

// doubtful reports whether it is not sure that a filter drops a connection on
// its way to an endpoint: a rule that was passed over may have accepted it.
func (r *run) doubtful(s *state) bool { return r.natOnly && s.has(doubted) && s.has(rewritten) }

// note puts a rule on the path of a state.
func (r *run) note(s *state, ref RuleRef, effect netfilter.Expr, p chance) {
	if r.tracing {
		s.path = &step{before: s.path, at: ref, effect: effect, chance: p, share: s.share}
	}
}

// act does what the target of a matching rule says. What goes on with the next
// rule is appended to next, what returns to the caller to back, and what the
// base chain lets through to passed.
func (r *run) act(ref RuleRef, e netfilter.Expr, p chance, s *state, next, back, passed *[]state) {
	if e.IsMatch() { // no target: the rule only counts
		*next = append(*next, *s)
		return
	}
	r.note(s, ref, e, p)
	switch e.Kind {
	case netfilter.Jump, netfilter.Goto:
		r.enter(ref, e, s, next, back, passed)
	case netfilter.Return:
		if len(r.stack) == 1 {
			r.shadow(ref, s)
		}
		*back = append(*back, *s)
	case netfilter.Accept:
		r.shadow(ref, s)
		if b := r.stack[0].Base; b != nil && b.Hook != netfilter.Postrouting && b.Priority > afterMangle {
			s.flags |= explicit
		}
		*passed = append(*passed, *s)
	case netfilter.Drop, netfilter.Reject:
		if r.doubtful(s) {
			*passed = append(*passed, *s)
			return
		}
		if e.Kind == netfilter.Drop {
			r.finish(s, Drop, ref)
		} else {
			r.finish(s, Reject, ref)
		}
	case netfilter.Queue: // whatever program listens there decides
		r.ignore(ref)
		*passed = append(*passed, *s)
	case netfilter.DNAT, netfilter.DNATRange, netfilter.Redirect:
		r.rewrite(ref, e, s)
		*passed = append(*passed, *s)
	case netfilter.SNAT, netfilter.Masquerade:
		s.flags |= masqueraded
		*passed = append(*passed, *s)
	default:
		r.mark(ref, e, s)
		*next = append(*next, *s)
	}
}

// shadow notes that a rule ends the walk of nat for a packet whose destination
// nobody has decided on.
func (r *run) shadow(ref RuleRef, s *state) {
	if b := r.stack[0].Base; b != nil && b.Type == netfilter.TypeNAT && b.Hook != netfilter.Postrouting && !s.has(viaDispatch) {
		s.flags |= shadowed
		s.by = ref
	}
}

// mark does what the targets that let the packet go on do.
func (r *run) mark(ref RuleRef, e netfilter.Expr, s *state) {
	switch e.Kind {
	case netfilter.SetMark:
		s.mark = s.mark&^e.B ^ e.A
	case netfilter.SetConnMark:
		s.connMark = s.connMark&^e.B ^ e.A
	case netfilter.SaveMark:
		s.connMark = s.connMark&^e.B ^ s.mark&e.A
	case netfilter.RestoreMark:
		s.mark = s.mark&^e.A ^ s.connMark&e.B
	case netfilter.NoTrack:
		s.flags |= notTracked
		s.by = ref
	case netfilter.UnknownTarget:
		r.ignore(ref)
	}
}

// rewrite gives a state its new destination.
func (r *run) rewrite(ref RuleRef, e netfilter.Expr, s *state) {
	r.spoil() // an exit leaves the destination as it is
	s.flags |= rewritten
	s.by = ref
	addr, port := s.to.Addr(), s.to.Port()
	switch e.Kind {
	case netfilter.DNATRange:
		if to, ok := singleTarget(ref.Chain.Text(e)); ok {
			if to.Addr().IsValid() {
				addr = to.Addr()
			}
			port = cmp.Or(to.Port(), port)
			break
		}
		s.flags |= unresolvedTo
		r.unresolved = appendNew(r.unresolved, ref)
		if e.N == 1 { // a redirect to one of several ports
			addr = r.view.node.address(r.family.family)
		}
	case netfilter.Redirect:
		if e.N != 0 {
			port = e.N
		}
		// To the address of the interface it came in on; on OUTPUT, to loopback.
		// That of a pod's interface is not known.
		switch {
		case r.packet.FromHost:
			addr = loopback(r.family.family)
		case r.class == Pod:
			addr = r.view.node.address(r.family.family)
			s.flags |= unresolvedTo
		default:
			addr = r.view.node.address(r.family.family)
		}
	case netfilter.DNAT:
		to := ref.Chain.Target(e)
		if to.Addr().IsValid() {
			addr = to.Addr()
		}
		if to.Port() != 0 {
			port = to.Port()
		}
	}
	s.to = netip.AddrPortFrom(addr, port)
	r.forgetHairpin(ref.Chain, addr)
}

// singleTarget returns the address of DNAT options that name only one, and
// options that do not matter to a first connection, such as --persistent.
func singleTarget(options []byte) (netip.AddrPort, bool) {
	text, ok := bytes.CutPrefix(options, []byte("--to-destination "))
	if !ok {
		return netip.AddrPort{}, false
	}
	text, _, _ = bytes.Cut(text, []byte(" "))
	if port, ok := bytes.CutPrefix(text, []byte(":")); ok {
		n, err := strconv.ParseUint(string(port), 10, 16)
		return netip.AddrPortFrom(netip.Addr{}, uint16(n)), err == nil
	}
	if to, err := netip.ParseAddrPort(string(text)); err == nil {
		return to, true
	}
	a, err := netip.ParseAddr(string(text))
	return netip.AddrPortFrom(a, 0), err == nil
}

// forgetHairpin takes back that a chain asked for the very address it sends
// to: that rule marks an endpoint that calls itself, which is no source class.
func (r *run) forgetHairpin(c *netfilter.Chain, to netip.Addr) {
	// They were noted last: the chain ends here.
	for n := len(r.sensitive) - 1; n >= 0 && r.sensitive[n].chain == c; n-- {
		if p := r.sensitive[n].prefix; p.IsSingleIP() && p.Addr() == to {
			r.sensitive = slices.Delete(r.sensitive, n, n+1)
		}
	}
}

// enter follows a jump or goto.
func (r *run) enter(ref RuleRef, e netfilter.Expr, s *state, next, back, passed *[]state) {
	rest := next
	if e.Kind == netfilter.Goto {
		rest = back
	}
	if r.pass(ref.Table, netfilter.ChainID(e.A), s, passed) {
		return
	}
	target := ref.Table.ByID(netfilter.ChainID(e.A))
	// The kernel refuses a jump to nowhere, and a loop; a file may hold both.
	if target == nil || len(r.stack) >= maxDepth || slices.Contains(r.stack, target) {
		if !slices.Contains(r.broken, ref) {
			r.broken = append(r.broken, ref)
		}
		r.spoil()
		*rest = append(*rest, *s)
		return
	}
	out := r.chain(ref.Table, target, append(r.take(), *s), passed)
	*rest = append(*rest, out...)
	r.give(out)
}

// take and give keep a stock of slices, since every jump needs one.
func (r *run) take() []state {
	if n := len(r.spare); n > 0 {
		s := r.spare[n-1]
		r.spare = r.spare[:n-1]
		return s
	}
	return make([]state, 0, 4)
}

func (r *run) give(s []state) {
	if cap(s) > 0 {
		r.spare = append(r.spare, s[:0])
	}
}
