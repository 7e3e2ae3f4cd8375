package chain

import (
	"bytes"
	"net/netip"
	"strconv"

	"github.com/natlens/natlens/pkg/netfilter"
)

// answer is what a match says about a packet.
type answer uint8

const (
	no answer = iota
	yes
	unknown // the rules alone cannot tell
)

func is(b bool) answer {
	if b {
		return yes
	}
	return no
}

// decide answers one match for the packet as it is now. Random and Nth are not
// asked here: they split.
func (r *run) decide(t *netfilter.Table, c *netfilter.Chain, e netfilter.Expr, s *state) answer {
	a := r.ask(t, c, e, s)
	if r.exit != nil {
		r.asked(question{table: t, chain: c, expr: e}, a)
	}
	if e.Negated() && a != unknown {
		return is(a == no)
	}
	return a
}

// ask answers a match as if it were not negated.
func (r *run) ask(t *netfilter.Table, c *netfilter.Chain, e netfilter.Expr, s *state) answer {
	switch e.Kind {
	case netfilter.Source:
		return is(c.Contains(e, r.packet.Source))
	case netfilter.Destination:
		return is(c.Contains(e, s.to.Addr()))
	case netfilter.ProtocolIs:
		return is(e.A == uint32(r.packet.Protocol))
	case netfilter.DestinationPort:
		port := uint32(s.to.Port())
		return is(e.A <= port && port <= e.B)
	case netfilter.Comment:
		return yes
	case netfilter.Always:
		return yes
	case netfilter.CTState:
		return is(e.A&r.ctState(s) != 0)
	case netfilter.MarkIs:
		return is(s.mark&e.B == e.A)
	case netfilter.ConnMarkIs:
		return is(s.connMark&e.B == e.A)
	case netfilter.SourceType:
		return r.addrType(r.packet.Source, e.A)
	case netfilter.DestinationType:
		return r.addrType(s.to.Addr(), e.A)
	case netfilter.Recent:
		// A new client is in no list yet; entering one always succeeds.
		return is(e.N == netfilter.RecentSet)
	case netfilter.InInterface:
		return r.inInterface(c.Text(e), s)
	case netfilter.OutInterface:
		return r.outInterface(c.Text(e), s)
	case netfilter.Fragment:
		return no // nat sees the first packet of a connection, never a later fragment
	case netfilter.TCPFlags:
		const syn = 1 << 1 // a connection begins with a SYN alone
		return is(r.packet.Protocol == netfilter.TCP && syn&e.A == e.B)
	case netfilter.SourcePort:
		return sourcePort(e.A, e.B)
	case netfilter.Multiport:
		return r.multiport(c.Text(e), e.N, s)
	case netfilter.AddrRange:
		return r.addrRange(c.Text(e), e.N, s)
	case netfilter.InSet:
		set := t.Set(e.A)
		switch {
		case set.Dynamic:
			return no // a new client is in none
		case set.Opaque:
			return unknown
		}
		_, ok := r.lookUp(t, e, s)
		return is(ok)
	case netfilter.BridgePort:
		if r.packet.FromHost {
			return no
		}
	}
	return unknown
}

// ctState returns the states of a connection's first packet.
func (r *run) ctState(s *state) uint32 {
	if s.has(notTracked) {
		return netfilter.CTUntracked
	}
	if s.has(rewritten) {
		return netfilter.CTNew | netfilter.CTDNATed
	}
	return netfilter.CTNew
}

// addrType answers for the routing types that follow from the node's own
// addresses. Whether another address is unicast, unreachable or a broadcast is
// up to the routing table; a Service's traffic is taken for unicast.
func (r *run) addrType(a netip.Addr, types uint32) answer {
	const unicast = 1 << 1
	switch {
	case r.view.node.isLocal(a):
		return is(types&netfilter.AddrLocal != 0)
	case a.IsMulticast():
		return is(types&(1<<5) != 0)
	case types&^uint32(netfilter.AddrLocal|1<<5|1<<3) == 0: // neither local nor multicast nor broadcast
		return no
	case types&unicast != 0:
		return yes
	}
	return unknown
}

func (r *run) inInterface(name []byte, s *state) answer {
	switch {
	case s.hook == netfilter.Output || s.hook == netfilter.Postrouting:
		return no // the kernel has no input interface there
	case r.packet.FromHost: // back through the loopback interface
		return is(interfaceMatches(name, "lo"))
	case r.packet.In != "":
		return r.knownInterface(name)
	case string(name) == "lo":
		return no
	case r.class == External && r.view.node.isPodInterface(name):
		return no
	}
	return unknown
}

// knownInterface compares with the interface of the packet, of which maybe
// only the prefix is known ("veth+").
func (r *run) knownInterface(name []byte) answer {
	prefix, isPrefix := bytes.CutSuffix([]byte(r.packet.In), []byte("+"))
	if !isPrefix {
		return is(interfaceMatches(name, r.packet.In))
	}
	want, wantPrefix := bytes.CutSuffix(name, []byte("+"))
	switch {
	case wantPrefix && bytes.HasPrefix(prefix, want):
		return yes
	case bytes.HasPrefix(want, prefix):
		return unknown
	}
	return no
}

func interfaceMatches(pattern []byte, name string) bool {
	if prefix, ok := bytes.CutSuffix(pattern, []byte("+")); ok {
		return bytes.HasPrefix([]byte(name), prefix)
	}
	return string(pattern) == name
}

func (r *run) outInterface(name []byte, s *state) answer {
	switch {
	case s.hook == netfilter.Prerouting || s.hook == netfilter.Input:
		return no
	case r.view.node.isLocal(s.to.Addr()):
		return is(interfaceMatches(name, "lo"))
	case string(name) == "lo":
		return no
	}
	return unknown
}

// sourcePort answers for the port that the client's kernel chose: unknown, but
// one that is not privileged.
func sourcePort(lo, hi uint32) answer {
	switch {
	case lo <= 1024 && hi == 65535:
		return yes
	case hi < 1024:
		return no
	}
	return unknown
}

func (r *run) multiport(list []byte, which uint16, s *state) answer {
	result := no
	for part := range bytes.SplitSeq(list, []byte(",")) {
		lo, hi := portRange(part)
		if which != netfilter.MultiportSource {
			if port := uint32(s.to.Port()); lo <= port && port <= hi {
				return yes
			}
		}
		if which != netfilter.MultiportDestination {
			switch sourcePort(lo, hi) {
			case yes:
				return yes
			case unknown:
				result = unknown
			}
		}
	}
	return result
}

// portRange reads what the parser has found to be a port or a range of ports.
func portRange(b []byte) (lo, hi uint32) {
	from, to, isRange := bytes.Cut(b, []byte(":"))
	hi = 65535
	if n, err := strconv.ParseUint(string(from), 10, 16); err == nil {
		lo = uint32(n)
	}
	if !isRange {
		return lo, lo
	}
	if n, err := strconv.ParseUint(string(to), 10, 16); err == nil {
		hi = uint32(n)
	}
	return lo, hi
}

func (r *run) addrRange(text []byte, which uint16, s *state) answer {
	a := r.packet.Source
	if which == 1 {
		a = s.to.Addr()
	}
	from, to, _ := bytes.Cut(text, []byte("-"))
	lo, err1 := netip.ParseAddr(string(from))
	hi, err2 := netip.ParseAddr(string(to))
	if err1 != nil || err2 != nil {
		return unknown
	}
	return is(lo.Compare(a) <= 0 && a.Compare(hi) <= 0)
}

// chance is a fraction of the packets that reach a rule.
type chance struct{ num, den uint32 }

// times returns the chance that both hold, rounded to 2^-31 if need be.
func (p chance) times(q chance) chance {
	if p == always {
		return q
	}
	return chance{uint32(uint64(p.num) << 31 / uint64(p.den) * uint64(q.num) / uint64(q.den)), 1 << 31}
}

// always is the chance of a rule without a random match.
var always = chance{1, 1}

// chanceOf returns the fraction of packets for which a Random or Nth holds.
func chanceOf(e netfilter.Expr) chance {
	p := chance{e.A, 1 << 31}
	if e.Kind == netfilter.Nth {
		p = chance{1, e.A}
	}
	if e.Negated() {
		p.num = p.den - p.num
	}
	return p
}

// affinitySeconds returns the --seconds of a Recent match, or 0.
func affinitySeconds(text []byte) int {
	_, rest, ok := bytes.Cut(text, []byte("--seconds "))
	if !ok {
		return 0
	}
	word, _, _ := bytes.Cut(rest, []byte(" "))
	n, err := strconv.Atoi(string(word))
	if err != nil {
		return 0
	}
	return n
}
