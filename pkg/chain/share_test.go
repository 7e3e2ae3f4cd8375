package chain

import (
	"math"
	"math/big"
	"math/rand/v2"
	"testing"
)

func (a uint128) big() *big.Int {
	n := new(big.Int).SetUint64(a.hi)
	return n.Lsh(n, 64).Or(n, new(big.Int).SetUint64(a.lo))
}

func fromBig(n *big.Int) uint128 {
	mask := new(big.Int).SetUint64(math.MaxUint64)
	return uint128{hi: new(big.Int).Rsh(n, 64).Uint64(), lo: new(big.Int).And(n, mask).Uint64()}
}

// split is splits.split, with nothing remembered.
func (s Share) split(num, den uint32) (taken, rest Share) { return splits(nil).split(s, num, den) }

// exactly is what Exact prints, as a number.
func exactly(t *testing.T, s Share) *big.Rat {
	t.Helper()
	r, ok := new(big.Rat).SetString(s.Exact())
	if !ok {
		t.Fatalf("Exact is %q", s.Exact())
	}
	return r
}

func TestShareOfAllAndNothing(t *testing.T) {
	var none Share
	if !none.IsZero() || none.IsWhole() || none.Float64() != 0 || none.Exact() != "0/1" {
		t.Errorf("nothing: %v %v %v %q", none.IsZero(), none.IsWhole(), none.Float64(), none.Exact())
	}
	all := whole()
	if all.IsZero() || !all.IsWhole() || all.Float64() != 1 || all.Exact() != "1/1" {
		t.Errorf("all: %v %v %v %q", all.IsZero(), all.IsWhole(), all.Float64(), all.Exact())
	}
	if none.Cmp(all) != -1 || all.Cmp(none) != 1 || all.Cmp(whole()) != 0 || none.Cmp(Share{}) != 0 {
		t.Error("nothing is not less than all")
	}
	if s := none.plus(none); !s.IsZero() {
		t.Errorf("nothing and nothing is %v", s.Float64())
	}
	if s := none.plus(all); !s.IsWhole() || s.Exact() != "1/1" {
		t.Errorf("nothing and all is %v", s.Exact())
	}
	for _, p := range []chance{{0, 1}, {0, 1 << 31}, {0, 7}} {
		if taken, rest := splits(nil).split(all, p.num, p.den); !taken.IsZero() || !rest.IsWhole() || rest.Exact() != "1/1" {
			t.Errorf("%v of all: %v and %v", p, taken.Exact(), rest.Exact())
		}
	}
	for _, p := range []chance{{1, 1}, {1 << 31, 1 << 31}, {7, 7}} {
		if taken, rest := splits(nil).split(all, p.num, p.den); !rest.IsZero() || !taken.IsWhole() || taken.Exact() != "1/1" {
			t.Errorf("%v of all: %v and %v", p, taken.Exact(), rest.Exact())
		}
	}
}

// Whatever a share is split into, the parts are the whole: an endpoint may get
// 2^-126 too little, but no connection is lost in the sum.
func TestSplitLosesNothing(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for range 200 {
		parts := []Share{whole()}
		for range 300 {
			i := r.IntN(len(parts))
			den := uint32(1 << 31)
			if r.IntN(3) == 0 {
				den = 1 + r.Uint32N(math.MaxUint32)
			}
			taken, rest := parts[i].split(uint32(r.Uint64N(uint64(den)+1)), den)
			parts[i] = taken
			parts = append(parts, rest)
		}
		sum := new(big.Int)
		var joined Share
		for _, s := range parts {
			sum.Add(sum, s.parts().big())
			joined = joined.plus(s)
		}
		if sum.Cmp(unit.big()) != 0 {
			t.Fatalf("the parts add up to %v of %v", sum, unit.big())
		}
		if !joined.IsWhole() {
			t.Fatalf("put together again they are %v", joined.Float64())
		}
	}
}

// A chain of 1/n, 1/(n-1), … 1/2, as kube-proxy writes it.
func TestSplitEvenly(t *testing.T) {
	for _, n := range []int{1, 2, 3, 7, 10, 100, 1000, 5000} {
		rest := whole()
		sum := new(big.Int)
		for i := range n {
			taken := rest
			if i < n-1 {
				stored := uint32(math.Round(math.Round(1e10/float64(n-i)) / 1e10 * (1 << 31)))
				taken, rest = splits(nil).split(rest, stored, 1<<31)
			}
			if d := taken.Float64() - 1/float64(n); math.Abs(d) >= tolerance {
				t.Errorf("endpoint %d of %d gets %v", i, n, taken.Float64())
			}
			if told := taken.Exact() != ""; told != (i < maxExact || n <= maxExact) {
				t.Errorf("endpoint %d of %d: Exact is %q", i, n, taken.Exact())
			}
			sum.Add(sum, taken.parts().big())
		}
		if sum.Cmp(unit.big()) != 0 {
			t.Errorf("%d endpoints get %v of %v", n, sum, unit.big())
		}
	}
}

// Exact is the product and sum of the rules' own fractions, in lowest terms.
func TestExactIsExact(t *testing.T) {
	a, rest := whole().split(715827883, 1<<31)
	b, c := splits(nil).split(rest, 1, 2)
	for _, x := range []struct {
		share Share
		want  string
	}{
		{a, "715827883/2147483648"},
		{rest, "1431655765/2147483648"},
		{b, "1431655765/4294967296"},
		{b.plus(c), "1431655765/2147483648"},
		{a.plus(b), "2863311531/4294967296"},
		{c.plus(a).plus(b), "1/1"},
		{a.plus(rest), "1/1"},
		{a.plus(Share{}), "715827883/2147483648"},
		{Share{}.plus(b), "1431655765/4294967296"},
	} {
		if got := x.share.Exact(); got != x.want {
			t.Errorf("got %s, want %s", got, x.want)
		}
	}

	// Split again what two ways brought together.
	third, more := a.plus(b).split(1, 3)
	if got := exactly(t, third); got.Cmp(big.NewRat(2863311531, 3*4294967296)) != 0 {
		t.Errorf("a third of both is %v", got)
	}
	if got := third.plus(more).plus(c).Exact(); got != "1/1" {
		t.Errorf("all of it is %s", got)
	}
}

// The integer and the fraction tell the same share, however it came about.
func TestBothFormsAgree(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	scale := new(big.Rat).SetInt(unit.big())
	for range 300 {
		parts := []Share{whole()}
		for range 40 {
			i := r.IntN(len(parts))
			if r.IntN(3) == 0 && len(parts) > 1 {
				j := r.IntN(len(parts) - 1)
				if j >= i {
					j++
				}
				parts[i] = parts[i].plus(parts[j])
				parts[j] = parts[len(parts)-1]
				parts = parts[:len(parts)-1]
				continue
			}
			taken, rest := parts[i].split(1+r.Uint32N(1<<31-1), 1<<31)
			parts[i] = taken
			parts = append(parts, rest)
		}
		sum := new(big.Rat)
		told := true
		for _, s := range parts {
			if s.Exact() == "" {
				told = false
				continue
			}
			exact := exactly(t, s)
			sum.Add(sum, exact)
			// 40 splits are off by less than 40 units in 2^126.
			d := new(big.Rat).Sub(new(big.Rat).Mul(exact, scale), new(big.Rat).SetInt(s.parts().big()))
			if d.Abs(d).Cmp(big.NewRat(40, 1)) > 0 {
				t.Fatalf("%v is kept as %v of 2^126: off by %v", exact, s.parts().big(), d.FloatString(1))
			}
			if f, _ := exact.Float64(); math.Abs(f-s.Float64()) > 1e-15*f+1e-36 {
				t.Fatalf("%v is told as %v", exact, s.Float64())
			}
		}
		if told && sum.Cmp(big.NewRat(1, 1)) != 0 {
			t.Fatalf("the fractions add up to %v", sum)
		}
	}
}

func TestCmp(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 10))
	word := func() uint128 {
		a := uint128{r.Uint64() >> 2, r.Uint64()}
		if r.IntN(4) == 0 {
			a.hi = uint64(r.IntN(2))
		}
		if r.IntN(4) == 0 {
			a.lo = uint64(r.IntN(2))
		}
		return a
	}
	for range 10000 {
		a, b := Share{&factor{parts: word()}}, Share{&factor{parts: word()}}
		if got, want := a.Cmp(b), a.parts().big().Cmp(b.parts().big()); got != want {
			t.Fatalf("%v and %v: %d, want %d", a.parts(), b.parts(), got, want)
		}
	}
}

func TestFloat64(t *testing.T) {
	for _, c := range []struct {
		num, den uint32
		want     float64
	}{{1, 2, 0.5}, {1, 3, 1. / 3}, {1, 1 << 31, 1. / (1 << 31)}, {1<<31 - 1, 1 << 31, 1 - 1./(1<<31)}, {1, math.MaxUint32, 1. / math.MaxUint32}} {
		s, _ := whole().split(c.num, c.den)
		if got := s.Float64(); math.Abs(got-c.want) > 1e-16 {
			t.Errorf("%d/%d is %v, want %v", c.num, c.den, got, c.want)
		}
	}
}

// The arithmetic of 128 bits against that of package big.
func TestUint128(t *testing.T) {
	r := rand.New(rand.NewPCG(11, 12))
	for range 20000 {
		a := uint128{r.Uint64() >> (1 + r.IntN(63)), r.Uint64()}
		b := uint128{r.Uint64() >> (1 + r.IntN(63)), r.Uint64()}
		if a.big().Cmp(b.big()) < 0 {
			a, b = b, a
		}
		if got := a.add(b).big(); got.Cmp(new(big.Int).Add(a.big(), b.big())) != 0 {
			t.Fatalf("%v + %v = %v", a, b, got)
		}
		if got := a.sub(b).big(); got.Cmp(new(big.Int).Sub(a.big(), b.big())) != 0 {
			t.Fatalf("%v - %v = %v", a, b, got)
		}
		den := 1 + r.Uint32N(math.MaxUint32)
		num := uint32(r.Uint64N(uint64(den) + 1))
		want := new(big.Int).Mul(a.big(), big.NewInt(int64(num)))
		want.Div(want, big.NewInt(int64(den)))
		if got := a.mulDiv(num, den); got != fromBig(want) {
			t.Fatalf("%v * %d / %d = %v, want %v", a, num, den, got.big(), want)
		}
	}
	for _, den := range []uint32{1, 2, 1 << 31, math.MaxUint32} {
		if got := unit.mulDiv(den, den); got != unit {
			t.Errorf("all of %d parts are %v", den, got)
		}
		if got := unit.mulDiv(0, den); got != (uint128{}) {
			t.Errorf("none of %d parts are %v", den, got)
		}
	}
}

// States share their history: what one makes of a share is not seen by another.
func TestShareIsImmutable(t *testing.T) {
	s, _ := whole().split(1, 3)
	before := s.Exact()
	splits(nil).split(s, 1, 7)
	s.plus(s)
	if s.Exact() != before {
		t.Errorf("the share became %s", s.Exact())
	}
}
