package chain

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/natlens/natlens/pkg/netfilter"
)

// Trace is where the first packet of a connection goes.
type Trace struct {
	Packet   netfilter.Packet
	Class    Class
	Outcomes []Outcome // most likely first
	// Unknown are the rules that could not be decided and on which the answer
	// depends, in no order.
	Unknown []RuleRef
	// Broken are jumps that the kernel would refuse: to a chain that does not
	// exist, or in a loop. They are taken as if they did nothing.
	Broken []RuleRef
}

// Outcome is one of the ends that a connection can come to.
type Outcome struct {
	Verdict Verdict
	// To is the address that a DNAT sends to; invalid for the other verdicts,
	// and for a DNAT to a range of addresses.
	To netip.AddrPort
	// Masquerade says that the source becomes an address of the node.
	Masquerade bool
	// Share is the part of the connections that end so at least, Max at most.
	// They differ only where Trace.Unknown is not empty.
	Share, Max Share
	// Path are the rules that decided, in order; of rules that do not end a
	// walk, those that matched. Where several ways lead to the same end, it is
	// one of them, and its last step has a smaller share than the outcome.
	// Beyond the first 256 outcomes there is none.
	Path []Step
}

// Step is one rule on a path.
type Step struct {
	RuleRef
	// Effect is what the rule did.
	Effect netfilter.Expr
	// Chance is the fraction of the packets that reached the rule for which it
	// matches: 1 but for statistic rules.
	Chance float64
	// Share is the part of all connections that took this step on this path.
	Share Share
}

// Trace walks one packet of a source class. It returns false when the ruleset
// has no table of the packet's family.
func (v *View) Trace(p netfilter.Packet, class Class) (*Trace, bool) {
	if v.of(netfilter.FamilyOf(p.Destination)) == nil {
		return nil, false
	}
	r := &run{packet: p, class: class, tracing: true}
	worlds := v.explore(r)
	t := &Trace{Packet: p, Class: r.class, Broken: r.broken}
	t.Outcomes = combine(worlds)
	t.Unknown = slices.Concat(influential(worlds, true), r.ignored, r.unresolved)
	if len(r.ignored) > 0 { // they might do anything
		for i := range t.Outcomes {
			t.Outcomes[i].Share, t.Outcomes[i].Max = Share{}, whole()
		}
	}
	return t, true
}

// maxPaths bounds the paths of a trace: each has all the rules on its way.
const maxPaths = 256

// fate is what tells outcomes apart.
type fate struct {
	verdict    Verdict
	to         netip.AddrPort
	masquerade bool
}

func (e *end) fate() fate {
	f := fate{verdict: e.verdict}
	if e.verdict == DNAT {
		f.masquerade = e.has(masqueraded)
		if !e.has(unresolvedTo) {
			f.to = e.to
		}
	}
	return f
}

// combine makes outcomes of the ends of all worlds: the share of one is what
// it gets in the worst world for it, and at most in the best.
func combine(worlds []world) []Outcome {
	var out []Outcome
	at := map[fate]int{}
	sums := make([]map[fate]Share, len(worlds))
	for w := range worlds {
		sums[w] = map[fate]Share{}
		for i := range worlds[w].ends {
			e := &worlds[w].ends[i]
			f := e.fate()
			sums[w][f] = sums[w][f].plus(e.share)
			if _, ok := at[f]; !ok {
				at[f] = len(out)
				o := Outcome{Verdict: f.verdict, To: f.to, Masquerade: f.masquerade}
				if len(out) < maxPaths {
					o.Path = e.path.list()
				}
				out = append(out, o)
			}
		}
	}
	for f, i := range at {
		out[i].Share, out[i].Max = sums[0][f], sums[0][f]
		for _, s := range sums[1:] {
			if s[f].Cmp(out[i].Share) < 0 {
				out[i].Share = s[f]
			}
			if s[f].Cmp(out[i].Max) > 0 {
				out[i].Max = s[f]
			}
		}
	}
	slices.SortStableFunc(out, func(a, b Outcome) int {
		// Endpoints of equal share differ by the kernel's rounding only.
		if d := a.Max.Float64() - b.Max.Float64(); d > tolerance || d < -tolerance {
			return -cmp.Compare(a.Max.Float64(), b.Max.Float64())
		}
		return a.To.Compare(b.To)
	})
	return out
}

// influential returns the assumed rules on which the outcome depends, with
// masquerading or without regard to it: those
// for which the worlds where they match differ from those where they do not.
func influential(worlds []world, masquerading bool) []RuleRef {
	if len(worlds) < 2 {
		return nil
	}
	print := make([]string, len(worlds))
	rules := map[RuleRef]bool{}
	for i, w := range worlds {
		print[i] = fingerprint(w, masquerading)
		for ref := range w.assume {
			rules[ref] = true
		}
	}
	var out []RuleRef
	for ref := range rules {
		var sides [2]map[string]bool
		for i, w := range worlds {
			taken, ok := w.assume[ref]
			if !ok {
				continue
			}
			side := 0
			if taken {
				side = 1
			}
			if sides[side] == nil {
				sides[side] = map[string]bool{}
			}
			sides[side][print[i]] = true
		}
		same := len(sides[0]) == len(sides[1])
		for p := range sides[0] {
			same = same && sides[1][p]
		}
		if !same {
			out = append(out, ref)
		}
	}
	slices.SortFunc(out, func(a, b RuleRef) int {
		return cmp.Or(cmp.Compare(a.Chain.Name, b.Chain.Name), cmp.Compare(a.Index, b.Index))
	})
	return out
}

// fingerprint is equal for two worlds with the same outcomes.
func fingerprint(w world, masquerading bool) string {
	one := combine([]world{w})
	var b []byte
	for _, o := range one {
		b = append(b, o.Verdict...)
		b, _ = o.To.AppendText(b)
		if o.Masquerade && masquerading {
			b = append(b, 'm')
		}
		b = fmt.Appendf(b, " %x.%x;", o.Share.parts().hi, o.Share.parts().lo)
	}
	return string(b)
}

func (s *step) list() []Step {
	var out []Step
	for ; s != nil; s = s.before {
		out = append(out, Step{RuleRef: s.at, Effect: s.effect, Chance: float64(s.chance.num) / float64(s.chance.den), Share: s.share})
	}
	slices.Reverse(out)
	return out
}
