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

// pass takes a state through a chain that is a leaf, as r.chain would, and
// reports whether it could: not for a packet that the leaf does not say all of,
// nor when more is asked of the walk than where it ends.
func (r *run) pass(t *netfilter.Table, id netfilter.ChainID, s *state, passed *[]state) bool {
	l := &r.table.leaves[id]
	if l.port == 0 || l.protocol != 0 && l.protocol != r.packet.Protocol || r.detailed() {
		return false
	}
	c := t.ByID(id)
	to := netip.AddrFrom16(l.to).Unmap()
	if to == r.packet.Source || c == r.watch || len(r.stack) >= maxDepth {
		return false
	}
	r.tracks.enter(chainAt{r.table.number, id})
	*passed = append(*passed, *s)
	s = &(*passed)[len(*passed)-1]
	s.flags |= rewritten
	s.by = RuleRef{t, c, int(l.rule)}
	s.to = netip.AddrPortFrom(to, l.port)
	return true
}

// spread is how the last rules of a chain deal connections out to leaves. All
// source classes meet the same, so that it is worked out once for a Service.
type spread struct {
	chain *netfilter.Chain
	from  int   // the first of those rules
	share Share // that arrives there
	parts []part
}

// part is what of the share goes to a leaf.
type part struct {
	leaf  netfilter.ChainID
	share Share
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
		if e := rule[len(rule)-1]; e.Kind != netfilter.Jump || t.leaves[e.A].port == 0 {
			break
		}
		all := true
		for _, e := range rule[:len(rule)-1] {
			if e.Kind == netfilter.Random {
				all = false
			} else if e.Kind != netfilter.Comment {
				return from
			}
		}
		if !all && i == c.Len()-1 {
			break // some go on
		}
		from = i
	}
	return from
}

// spread returns which of r.spreads is that of a chain, -1 for none.
func (r *run) spread(c *netfilter.Chain) int {
	if r.detailed() {
		return -1
	}
	for n := range r.spreads {
		if r.spreads[n].chain == c {
			return n
		}
	}
	from := r.table.spreadFrom(c)
	if from == c.Len() {
		return -1
	}
	n := len(r.spreads)
	if n == cap(r.spreads) {
		r.spreads = append(r.spreads, spread{})
	}
	r.spreads = r.spreads[:n+1]
	r.spreads[n] = spread{chain: c, from: from, parts: r.spreads[n].parts[:0]}
	return n
}

// deal spreads a state over leaves, as going through the rules would, and reports
// whether it could.
func (r *run) deal(t *netfilter.Table, d *spread, s *state, passed *[]state) bool {
	if d.share != s.share {
		d.share, d.parts = s.share, d.parts[:0]
		rest := state{share: s.share}
		for i := d.from; !rest.share.IsZero(); i++ {
			rule := d.chain.Rule(i)
			taken := state{share: rest.share}
			r.split(rule, &taken, &rest)
			if !taken.share.IsZero() {
				d.parts = append(d.parts, part{netfilter.ChainID(rule[len(rule)-1].A), taken.share})
			}
		}
	}
	before := len(*passed)
	for _, p := range d.parts {
		if !r.pass(t, p.leaf, s, passed) {
			*passed = (*passed)[:before]
			return false
		}
		(*passed)[len(*passed)-1].share = p.share
	}
	return true
}
