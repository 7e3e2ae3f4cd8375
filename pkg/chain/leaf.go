package chain

import (
	"net/netip"

	"github.com/natlens/natlens/pkg/netfilter"
)

// leaf is what a chain comes to that sends to one address whoever does not come
// from there, as kube-proxy's chains of endpoints do. Walks enter those ten
// times for a Service and source class, and each lies somewhere else in memory:
// they are looked at once, in the order in which they lie there.
type leaf struct {
	to       [16]byte
	port     uint16             // 0 for any other chain
	rule     uint8              // of the DNAT
	protocol netfilter.Protocol // that it asks for, 0 for none
	sep      bool               // its name is one of an endpoint's chain in iptables mode, leaf or not
}

// leafOf returns what a chain comes to.
func leafOf(c *netfilter.Chain) leaf {
	const most = 4 // an endpoint's chain has two rules or three
	if c.Len() > most {
		return leaf{}
	}
	var sources [most]netfilter.Expr
	hairpins := 0
	for i := range c.Len() {
		rule := c.Rule(i)
		if len(rule) == 0 {
			return leaf{}
		}
		last := rule[len(rule)-1]
		if last.Kind == netfilter.NoEffect && len(rule) == 1 {
			continue
		}
		source, protocol, ok := leafMatches(rule[:len(rule)-1])
		switch {
		case !ok || last.IsMatch():
			return leaf{}
		case source.Kind != 0:
			sources[hairpins] = source
			hairpins++
		case last.Kind != netfilter.DNAT:
			return leaf{}
		default:
			to := c.Target(last)
			if !to.Addr().IsValid() || to.Addr().Is4In6() {
				return leaf{}
			}
			for _, e := range sources[:hairpins] {
				if p, ok := c.CIDR(e); !ok || !p.IsSingleIP() || p.Addr() != to.Addr() {
					return leaf{}
				}
			}
			return leaf{to: to.Addr().As16(), port: to.Port(), rule: uint8(i), protocol: protocol}
		}
	}
	return leaf{}
}

// leafMatches goes through the matches of a rule that may be a leaf's: those that
// leave no trace of having been asked. It returns the one for a source, and the
// protocol asked for, if any.
func leafMatches(matches []netfilter.Expr) (source netfilter.Expr, protocol netfilter.Protocol, ok bool) {
	for _, e := range matches {
		if e.Negated() {
			return source, protocol, false
		}
		switch e.Kind {
		case netfilter.Comment, netfilter.Always:
		case netfilter.Source:
			if source.Kind != 0 {
				return source, protocol, false
			}
			source = e
		case netfilter.ProtocolIs:
			if protocol != 0 {
				return source, protocol, false
			}
			protocol = netfilter.Protocol(e.A)
		case netfilter.Recent:
			if e.N != netfilter.RecentSet {
				return source, protocol, false
			}
		default:
			return source, protocol, false
		}
	}
	return source, protocol, true
}

// passes reports whether a leaf says all of what becomes of the packet in its
// chain: where it sends to, and nothing that more is asked of.
func (r *run) passes(l *leaf, t *netfilter.Table, id netfilter.ChainID) bool {
	return l.port != 0 && (l.protocol == 0 || l.protocol == r.packet.Protocol) && l.to != r.packet.Source.As16() &&
		(r.watch == nil || id != r.watch.ID || t.ByID(id) != r.watch) && len(r.stack) < maxDepth
}

// pass takes a state through a chain that is a leaf, as r.chain would, and
// reports whether it could.
func (r *run) pass(t *netfilter.Table, id netfilter.ChainID, s *state, passed *[]state) bool {
	l := &r.table.leaves[id]
	if r.detailed() || !r.passes(l, t, id) {
		return false
	}
	r.tracks.enter(chainAt{r.table.number, id})
	*passed = append(*passed, *s)
	l.rewrite(t, id, &(*passed)[len(*passed)-1])
	return true
}

// rewrite gives a state the destination of the leaf.
func (l *leaf) rewrite(t *netfilter.Table, id netfilter.ChainID, s *state) {
	s.flags |= rewritten
	s.by = RuleRef{t, t.ByID(id), int(l.rule)}
	s.to = l.dest()
}

func (l *leaf) dest() netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(l.to).Unmap(), l.port)
}

// spread is how the last rules of a chain deal a share of the connections out to
// leaves. All source classes meet the same, so that it is worked out once for a
// frontend, and walks take it as one state where they can (see state.many).
type spread struct {
	table     *netfilter.Table
	leaves    []leaf // of the table
	chain     *netfilter.Chain
	from      int // the first of those rules
	share     Share
	parts     []part
	met       bool       // the tracks have the leaves
	apart     bool       // some part has a destination that is treated apart
	endpoints []Endpoint // made when first asked for
}

// part is what of the share goes to a leaf.
type part struct {
	leaf  netfilter.ChainID
	to    netip.AddrPort
	share Share
}

// rewrite returns what of a state goes to a part.
func (d *spread) rewrite(s *state, n int) state {
	one, p := *s, &d.parts[n]
	d.leaves[p.leaf].rewrite(d.table, p.leaf, &one)
	one.many, one.share = nil, p.share
	return one
}

// list returns the parts by address.
func (d *spread) list() []Endpoint {
	if d.endpoints == nil {
		list := make([]Endpoint, len(d.parts))
		for i := range d.parts {
			p := &d.parts[i]
			list[i] = Endpoint{Address: p.to, Share: p.share, Max: p.share, Chain: d.table.ChainName(p.leaf)}
		}
		d.endpoints = merge(list)
	}
	return d.endpoints
}

// spreadFrom returns from which rule on a chain does nothing but deal out
// connections to leaves, all that there are; the number of its rules when there
// is none.
func (t *tableView) spreadFrom(c *netfilter.Chain) int {
	from := c.Len()
	for i := c.Len() - 1; i >= 0; i-- {
		rule := c.Rule(i)
		if len(rule) == 0 {
			break
		}
		all, ok := t.dealsOut(c, rule)
		if !ok || !all && i == c.Len()-1 { // some go on
			break
		}
		from = i
	}
	return from
}

// dealsOut reports whether a rule sends connections to leaves by chance alone, and
// whether it does all that reach it.
func (t *tableView) dealsOut(c *netfilter.Chain, rule []netfilter.Expr) (all, ok bool) {
	last := rule[len(rule)-1]
	switch last.Kind {
	case netfilter.Jump:
		if t.leaves[last.A].port == 0 {
			return false, false
		}
	case netfilter.Choose:
		left := last.B
		for _, choice := range c.Choices(last) {
			if v := choice.Verdict; v.Kind != netfilter.Jump && v.Kind != netfilter.Goto || t.leaves[v.A].port == 0 {
				return false, false
			}
			left -= choice.Count
		}
		if left != 0 {
			return false, false
		}
	default:
		return false, false
	}
	all = true
	for _, e := range rule[:len(rule)-1] {
		if e.Kind == netfilter.Random {
			all = false
		} else if e.Kind != netfilter.Comment {
			return false, false
		}
	}
	return all, true
}

// dealsFrom returns from which rule on a chain deals out connections to leaves; the
// number of its rules when it does not, or when more is asked of the walk than
// where it ends.
func (r *run) dealsFrom(c *netfilter.Chain) int {
	if r.detailed() {
		return c.Len()
	}
	for _, d := range r.spreads {
		if d.chain == c {
			return d.from
		}
	}
	return r.table.spreadFrom(c)
}

// mostSpreads bounds those of one frontend, which are gone through one by one.
const mostSpreads = 32

// spread returns how a chain deals out a share from a rule on; nil beyond
// mostSpreads.
func (r *run) spread(t *netfilter.Table, c *netfilter.Chain, from int, share Share) *spread {
	for _, d := range r.spreads {
		if d.chain == c && d.share == share {
			return d
		}
	}
	n := len(r.spreads)
	switch {
	case n >= mostSpreads:
		return nil
	case n == cap(r.spreads) || r.spreads[:n+1][n] == nil:
		r.spreads = append(r.spreads, &spread{})
	default: // that of an earlier frontend lends its memory
		r.spreads = r.spreads[:n+1]
	}
	d := r.spreads[n]
	*d = spread{table: t, leaves: r.table.leaves, chain: c, from: from, share: share, parts: d.parts[:0]}
	for i, rest := from, share; !rest.IsZero(); i++ {
		rule := c.Rule(i)
		var taken, one Share
		taken, rest = r.split(rule, rest)
		last := rule[len(rule)-1]
		if last.Kind != netfilter.Choose {
			r.add(d, last, taken)
			continue
		}
		left := last.B
		for _, choice := range c.Choices(last) {
			one, taken = r.splits.split(taken, choice.Count, left)
			left -= choice.Count
			r.add(d, choice.Verdict, one)
		}
	}
	return d
}

// add adds what of a share goes to a leaf.
func (r *run) add(d *spread, jump netfilter.Expr, share Share) {
	if share.IsZero() {
		return
	}
	l := &d.leaves[jump.A]
	d.parts = append(d.parts, part{netfilter.ChainID(jump.A), l.dest(), share})
	d.apart = d.apart || r.view.apart(l.dest().Addr())
}

// deal spreads a state over leaves, as going through the rules would, and reports
// whether it could. Of many states it makes one if all may take the same exit.
func (r *run) deal(t *netfilter.Table, c *netfilter.Chain, from int, s *state, passed *[]state) bool {
	d := r.spread(t, c, from, s.share)
	if d == nil {
		return false
	}
	for i := range d.parts {
		if id := d.parts[i].leaf; !r.passes(&d.leaves[id], t, id) {
			return false
		}
	}
	if !d.met {
		d.met = true
		for i := range d.parts {
			r.tracks.enter(chainAt{r.table.number, d.parts[i].leaf})
		}
	}
	s.flags |= rewritten
	if r.exits != nil && r.assume == nil && !d.apart && s.has(viaDispatch) {
		one := d.rewrite(s, 0)
		one.many, one.share = d, s.share
		*passed = append(*passed, one)
		return true
	}
	for i := range d.parts {
		*passed = append(*passed, d.rewrite(s, i))
	}
	return true
}
