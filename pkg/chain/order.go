package chain

import (
	"cmp"
	"slices"

	"github.com/natlens/natlens/pkg/netfilter"
)

// This file tells which of several base chains at one hook are asked, and in
// which order.

// abreast returns how many chains, from the first on, are asked in an order that
// nobody knows: nat chains that decide on the destination, with one priority.
func abreast(h netfilter.Hook, bases []netfilter.BaseChain) int {
	n := 1
	if !directsAt(h) || bases[0].Base.Type != netfilter.TypeNAT {
		return n
	}
	for n < len(bases) && bases[n].Base.Type == netfilter.TypeNAT && bases[n].Base.Priority == bases[0].Base.Priority {
		n++
	}
	return n
}

// directsAt reports whether nat decides on the destination at a hook.
func directsAt(h netfilter.Hook) bool { return h == netfilter.Prerouting || h == netfilter.Output }

// isForeign reports whether a table is another program's own: neither kube-proxy's
// nor iptables'.
func isForeign(t *netfilter.Table) bool {
	return t.Backend == netfilter.BackendNFTables && !isNFTables(t)
}

// order returns the chains abreast in the order in which they are asked, without
// foreign ones that make no difference.
//
// Of nat chains with the same priority, the one that was registered last is asked
// first (nf_hook_entries_grow in net/netfilter/core.c), and the first that decides
// on an address wins. The kernel does not tell the order to anybody, so it is
// tried several ways: with each chain ahead of all others, once. No more is
// needed to have each chain win over any others.
func (r *run) order(h netfilter.Hook, bases []netfilter.BaseChain, live []state) []netfilter.BaseChain {
	if len(bases) == 1 && !isForeign(bases[0].Table) || r.undecided != nil || len(live) == 0 {
		return bases
	}
	if len(bases) > 1 && !slices.ContainsFunc(live, func(s state) bool { return !s.has(rewritten | notTracked) }) {
		return bases // none of them is asked
	}
	asked := slices.DeleteFunc(slices.Clone(bases), func(b netfilter.BaseChain) bool {
		return b.Len() == 0 && b.Base.Policy == netfilter.Accept || directsAt(h) && isForeign(b.Table) && r.idle(h, b, live)
	})
	if r.packet.FromHost && h == netfilter.Prerouting {
		return asked // nat has decided in OUTPUT
	}
	slices.SortStableFunc(asked, func(a, b netfilter.BaseChain) int { return cmp.Compare(rank(a.Table), rank(b.Table)) })
	for i := 1; i < len(asked); i++ {
		b := asked[i]
		ref := RuleRef{b.Table, b.Chain, b.Len()}
		ahead, ok := r.assume[ref]
		switch {
		case !ok && len(r.assume) >= maxUnknown:
			r.ignored = appendNew(r.ignored, ref)
		case !ok:
			r.undecided = &ref
			return asked
		case ahead:
			copy(asked[1:i+1], asked[:i])
			asked[0] = b
		}
	}
	return asked
}

// rank sorts foreign tables last, so that it is they that are named when the order
// matters.
func rank(t *netfilter.Table) int {
	if isForeign(t) {
		return 1
	}
	return 0
}

// perhaps is the chance of a rule that may match, or may not.
var perhaps = chance{}

// mayMatch is matches for a run that takes every way: sources are not told apart.
func (r *run) mayMatch(ref RuleRef, rule []netfilter.Expr, s *state) (p chance, ok bool) {
	p = always
	for _, e := range rule {
		switch {
		case !e.IsMatch():
		case e.Kind == netfilter.Random || e.Kind == netfilter.Nth, e.Kind == netfilter.Source, e.Kind == netfilter.InSet && netfilter.Field(e.N)&netfilter.FieldSource != 0 && !ref.Table.Set(e.A).Dynamic:
			p = perhaps
		default:
			switch r.decide(ref.Table, ref.Chain, e, s) {
			case no:
				return p, false
			case unknown:
				p = perhaps
			}
		}
	}
	return p, true
}

// idle reports whether a base chain makes no difference to any of the states,
// whatever is true of the matches that cannot be decided. Most programs have such
// chains for addresses of their own: that one is there tells nothing about
// Services. Of a filter ahead of conntrack, only the way out of nat matters here.
func (r *run) idle(h netfilter.Hook, b netfilter.BaseChain, live []state) bool {
	isNAT := b.Base.Type == netfilter.TypeNAT
	if isNAT && r.packet.FromHost && h == netfilter.Prerouting {
		return true
	}
	states := r.take()
	for _, s := range live {
		if !isNAT || !s.has(rewritten|notTracked) {
			states = append(states, s)
		}
	}
	if len(states) == 0 {
		r.give(states)
		return true
	}
	ends, ignored, unresolved, broken, exit := len(r.ends), len(r.ignored), len(r.unresolved), len(r.broken), r.exit
	r.probing = true
	out := r.base(b, states)
	r.probing = false
	idle := true
	for i := range out {
		idle = idle && slices.ContainsFunc(live, func(s state) bool { return sameWay(&s, &out[i], isNAT) })
	}
	if isNAT {
		idle = idle && len(r.ends) == ends && len(r.ignored) == ignored && len(r.unresolved) == unresolved && len(r.broken) == broken
	}
	r.ends, r.ignored, r.unresolved, r.broken, r.exit = r.ends[:ends], r.ignored[:ignored], r.unresolved[:unresolved], r.broken[:broken], exit
	r.give(out)
	return idle
}

// sameWay reports whether a chain has left a state as it was, as far as it
// matters.
func sameWay(before, after *state, isNAT bool) bool {
	if !isNAT {
		return before.has(notTracked) == after.has(notTracked)
	}
	return before.to == after.to && before.has(rewritten) == after.has(rewritten) && before.mark == after.mark && before.connMark == after.connMark
}
