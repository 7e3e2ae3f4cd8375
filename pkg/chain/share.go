package chain

import (
	"cmp"
	"math/big"
	"math/bits"
)

// Share is the part of new connections that takes one way through the rules:
// a probability, exact.
//
// It is kept twice. As an integer number of 2^-126 it is cheap to split, add
// and compare, and the parts of a split always add up to the whole. As the
// product of the rules' own fractions it can be told without any rounding. A
// share below 2^-126 counts as none.
type Share struct{ how *factor } // nil stands for none

// unit is the share of every connection.
var unit = uint128{hi: 1 << 62}

var all = &factor{parts: unit, num: 1, den: 1}

// whole is the share of every connection.
func whole() Share { return Share{all} }

// factor is a share, and the last step of how it came about: the share before,
// times num/den; or, where two ways met again, the sum of two shares.
type factor struct {
	parts    uint128 // of 2^-126; never none
	before   *factor // nil for the share of every connection
	other    *factor // the second way; num and den mean nothing then
	num, den uint32
	size     int // steps of the whole expression, to bound Exact
}

// maxExact is the largest expression that Exact multiplies out: the numbers of
// a Service with more endpoints have thousands of digits.
const maxExact = 128

// splits remembers those of a run: Services with as many endpoints part their
// connections alike. Nil remembers nothing.
type splits map[splitKey][2]Share // taken, rest

type splitKey struct {
	before   *factor
	num, den uint32
}

// mostSplits bounds what is remembered.
const mostSplits = 1 << 16

// split parts a share into num/den of it and the rest.
func (m splits) split(s Share, num, den uint32) (taken, rest Share) {
	k := splitKey{s.how, num, den}
	if known, ok := m[k]; ok {
		return known[0], known[1]
	}
	parts := s.parts().mulDiv(num, den)
	taken, rest = s.step(parts, num, den), s.step(s.parts().sub(parts), den-num, den)
	if m != nil {
		if len(m) == mostSplits {
			clear(m)
		}
		m[k] = [2]Share{taken, rest}
	}
	return taken, rest
}

// step returns num/den of a share, which are those parts.
func (s Share) step(parts uint128, num, den uint32) Share {
	if parts == (uint128{}) {
		return Share{}
	}
	return Share{&factor{parts: parts, before: s.how, num: num, den: den, size: min(1+s.how.size, maxExact+1)}}
}

// plus adds the share of another way to the same place.
func (s Share) plus(t Share) Share {
	if s.IsZero() {
		return t
	}
	if t.IsZero() {
		return s
	}
	return Share{&factor{parts: s.how.parts.add(t.how.parts), before: s.how, other: t.how, size: min(s.how.size+t.how.size, maxExact+1)}}
}

// parts returns the share as a number of 2^-126.
func (s Share) parts() uint128 {
	if s.how == nil {
		return uint128{}
	}
	return s.how.parts
}

// IsZero reports whether no connection goes this way.
func (s Share) IsZero() bool { return s.how == nil }

// IsWhole reports whether every connection goes this way.
func (s Share) IsWhole() bool { return s.parts() == unit }

// Cmp compares two shares: -1, 0 or +1.
func (s Share) Cmp(t Share) int {
	if s.how == t.how {
		return 0
	}
	a, b := s.parts(), t.parts()
	return cmp.Or(cmp.Compare(a.hi, b.hi), cmp.Compare(a.lo, b.lo))
}

// Float64 returns the share as a number from 0 to 1.
func (s Share) Float64() float64 {
	parts := s.parts()
	return float64(parts.hi)/(1<<62) + float64(parts.lo)/(1<<63)/(1<<63)
}

// Exact returns the share as a reduced fraction such as
// "715827883/2147483648", or "" when its numbers would be unreasonably long
// (the last endpoints of a Service with more than 128 of them).
func (s Share) Exact() string {
	switch {
	case s.IsZero():
		return "0/1"
	case s.how.size > maxExact:
		return ""
	}
	return s.how.rat().String()
}

func (f *factor) rat() *big.Rat {
	num, den := big.NewInt(1), big.NewInt(1)
	for ; f != nil; f = f.before {
		if f.other != nil {
			sum := new(big.Rat).Add(f.before.rat(), f.other.rat())
			return sum.Mul(sum, new(big.Rat).SetFrac(num, den))
		}
		num.Mul(num, big.NewInt(int64(f.num)))
		den.Mul(den, big.NewInt(int64(f.den)))
	}
	return new(big.Rat).SetFrac(num, den)
}

// uint128 is an unsigned integer of 128 bits.
type uint128 struct{ hi, lo uint64 }

func (a uint128) add(b uint128) uint128 {
	lo, carry := bits.Add64(a.lo, b.lo, 0)
	hi, _ := bits.Add64(a.hi, b.hi, carry)
	return uint128{hi, lo}
}

func (a uint128) sub(b uint128) uint128 {
	lo, borrow := bits.Sub64(a.lo, b.lo, 0)
	hi, _ := bits.Sub64(a.hi, b.hi, borrow)
	return uint128{hi, lo}
}

// mulDiv returns a*num/den, rounded down; num must not exceed den.
func (a uint128) mulDiv(num, den uint32) uint128 {
	// The product has up to 158 bits: three words, divided from the top.
	h1, h0 := bits.Mul64(a.hi, uint64(num))
	l1, l0 := bits.Mul64(a.lo, uint64(num))
	mid, carry := bits.Add64(h0, l1, 0)
	top := h1 + carry
	hi, rem := bits.Div64(top, mid, uint64(den))
	lo, _ := bits.Div64(rem, l0, uint64(den))
	return uint128{hi, lo}
}
