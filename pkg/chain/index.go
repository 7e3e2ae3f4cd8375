package chain

import (
	"net/netip"

	"github.com/natlens/natlens/pkg/netfilter"
)

// indexFrom is the length from which a chain is indexed: shorter ones are
// walked rule by rule.
const indexFrom = 24

// index finds the rules of a long chain that a packet can match at all. A
// chain such as KUBE-SERVICES has a rule or two per Service; without an index
// the work for all Services would be quadratic.
//
// A rule that asks for one protocol and port, and maybe one address, hangs in
// a list under that key; the others hang in the list wild. All lists are in
// rule order, so that merging them gives the order of the chain.
type index struct {
	first map[key]int32 // first rule under the key
	next  []int32       // next rule in the same list, -1 at its end
	wild  int32
	wide  bool // some rule asks for a port and no address
	// ports has a bit for every port that a rule asks for: most that behind nat
	// are none of a Service's, which it tells without a look into first.
	ports *[1 << 16 / 64]uint64
}

// key is what a rule asks for: zero address for any.
type key struct {
	addr     netip.Addr
	port     uint16
	protocol netfilter.Protocol
}

func newIndex(c *netfilter.Chain) *index {
	if c.Len() < indexFrom {
		return nil
	}
	x := &index{next: make([]int32, c.Len()), wild: -1}
	for i := c.Len() - 1; i >= 0; i-- {
		k, ok := keyOf(c, c.Rule(i))
		if !ok {
			x.next[i], x.wild = x.wild, int32(i)
			continue
		}
		if x.first == nil {
			x.first, x.ports = make(map[key]int32, i+1), new([1 << 16 / 64]uint64)
		}
		x.ports[k.port/64] |= 1 << (k.port % 64)
		x.next[i] = -1
		if n, ok := x.first[k]; ok {
			x.next[i] = n
		}
		x.first[k] = int32(i)
		x.wide = x.wide || !k.addr.IsValid()
	}
	return x
}

// keyOf returns the key of a rule; ok is false for a rule that can match more
// than one protocol or port.
func keyOf(c *netfilter.Chain, rule []netfilter.Expr) (k key, ok bool) {
	for _, e := range rule {
		if e.Negated() {
			continue
		}
		switch e.Kind {
		case netfilter.ProtocolIs:
			k.protocol = netfilter.Protocol(e.A)
		case netfilter.DestinationPort:
			if e.A == e.B {
				k.port, ok = uint16(e.A), true
			}
		case netfilter.Destination:
			if p, isCIDR := c.CIDR(e); isCIDR && p.IsSingleIP() {
				k.addr = p.Addr()
			}
		}
	}
	return k, ok && k.protocol != 0
}

// cursor goes through the rules of a chain that a packet can match, in order.
type cursor struct {
	next    []int32
	a, b, c int32 // heads of the lists still to go through, -1 for none
	i, n    int32 // for a chain without an index
}

func (x *index) rules(c *netfilter.Chain, dst netip.Addr, p netfilter.Protocol, port uint16) cursor {
	if x == nil {
		return cursor{n: int32(c.Len())}
	}
	u := cursor{next: x.next, a: -1, b: -1, c: x.wild}
	if x.asks(port) {
		u.a = x.head(key{dst, port, p})
		if x.wide {
			u.b = x.head(key{port: port, protocol: p})
		}
	}
	return u
}

// asks reports whether any rule asks for a port.
func (x *index) asks(port uint16) bool {
	return x.ports != nil && x.ports[port/64]&(1<<(port%64)) != 0
}

// has reports whether any rule asks for the destination.
func (x *index) has(to netip.AddrPort, p netfilter.Protocol) bool {
	return x.asks(to.Port()) && (x.head(key{to.Addr(), to.Port(), p}) >= 0 || x.wide && x.head(key{port: to.Port(), protocol: p}) >= 0)
}

func (x *index) head(k key) int32 {
	if i, ok := x.first[k]; ok {
		return i
	}
	return -1
}

// step returns the next rule, -1 behind the last.
func (u *cursor) step() int {
	if u.next == nil {
		if u.i >= u.n {
			return -1
		}
		u.i++
		return int(u.i - 1)
	}
	list := &u.a
	if before(u.b, *list) {
		list = &u.b
	}
	if before(u.c, *list) {
		list = &u.c
	}
	i := *list
	if i >= 0 {
		*list = u.next[i]
	}
	return int(i)
}

// before compares two rule numbers, of which -1 is behind all.
func before(i, j int32) bool { return i >= 0 && (j < 0 || i < j) }
