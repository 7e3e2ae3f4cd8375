package netfilter

import (
	"net/netip"
	"time"
)

// BackendNFTables is kube-proxy's nftables mode: tables that it writes itself,
// with sets and maps.
const BackendNFTables Backend = "nftables"

// Field is a part of a packet that a set or map of nf_tables is asked with. A
// lookup's fields are bits of Expr.N.
type Field uint16

// The fields that kube-proxy's sets and maps use.
const (
	FieldSource Field = 1 << iota
	FieldDestination
	FieldProtocol
	FieldPort
)

// SetKey is what a set is asked for: those fields of a packet that the lookup
// names, and zero values for the others. Where both addresses are asked for,
// the source is Addr and the destination Addr2.
type SetKey struct {
	Addr, Addr2 netip.Addr
	Protocol    Protocol
	Port        uint16
}

// SetElement is an element of a set or map.
type SetElement struct {
	Verdict Expr // of a verdict map; the zero Expr in a set
	Comment string
}

// Set is a set or a verdict map of nf_tables.
type Set struct {
	Name string // "" for an anonymous one, which belongs to its rule
	Map  bool   // its elements have verdicts
	// Dynamic says that packets add elements, which leave after Timeout: what
	// it holds for a new client is nothing.
	Dynamic bool
	Timeout time.Duration
	// Opaque says that its elements are not known.
	Opaque bool

	Keys     []SetKey // in the order of the source
	Ranges   []AddrSpan
	elements map[SetKey]SetElement
}

// AddrSpan is a range of addresses in an interval set, both ends included.
type AddrSpan struct{ From, To netip.Addr }

// Add puts an element into the set.
func (s *Set) Add(k SetKey, e SetElement) {
	if s.elements == nil {
		s.elements = map[SetKey]SetElement{}
	}
	if _, ok := s.elements[k]; !ok {
		s.Keys = append(s.Keys, k)
	}
	s.elements[k] = e
}

// Lookup returns the element for a key. In a set of address ranges, only the
// single address of the key counts.
func (s *Set) Lookup(k SetKey) (SetElement, bool) {
	if e, ok := s.elements[k]; ok {
		return e, true
	}
	for _, r := range s.Ranges {
		if r.From.Compare(k.Addr) <= 0 && k.Addr.Compare(r.To) <= 0 {
			return SetElement{}, true
		}
	}
	return SetElement{}, false
}

// SpanOf returns the addresses of a prefix.
func SpanOf(p netip.Prefix) AddrSpan {
	p = p.Masked()
	last := p.Addr().AsSlice()
	for i := p.Bits(); i < len(last)*8; i++ {
		last[i/8] |= 0x80 >> (i % 8)
	}
	to, _ := netip.AddrFromSlice(last)
	return AddrSpan{p.Addr(), to}
}

// Prefixes returns the fewest prefixes that make up the span.
func (s AddrSpan) Prefixes() []netip.Prefix {
	var out []netip.Prefix
	for a := s.From; a.IsValid() && a.Compare(s.To) <= 0; {
		bits := a.BitLen()
		for bits > 0 {
			p, err := a.Prefix(bits - 1)
			if err != nil || p.Addr() != a || SpanOf(p).To.Compare(s.To) > 0 {
				break
			}
			bits--
		}
		p := netip.PrefixFrom(a, bits)
		out = append(out, p)
		a = SpanOf(p).To.Next()
	}
	return out
}

// Len returns the number of elements.
func (s *Set) Len() int { return len(s.Keys) + len(s.Ranges) }

// Choice is one of the ways of a [Choose]: so many of its numbers lead there.
type Choice struct {
	Count   uint32
	Verdict Expr // a Jump, Goto or DNAT
}
