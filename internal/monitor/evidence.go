package monitor

import "math"

// Alpha bounds the probability that a window calls shares skewed which are as
// programmed, however often it is looked at.
const Alpha = 1e-6

// Samples of a window, by the number of ways that connections can take.
const (
	leastWindow   = 1000
	windowPerWay  = 40
	leastSamples  = 100 // before a window says anything but skewed
	samplesPerWay = 5
	mostEvidence  = 1e300 // where it would be more than a JSON reader takes
)

// WindowOf returns how many samples a window has, and how many of them are enough
// to call the shares consistent.
func WindowOf(ways int) (size, enough int) {
	return max(leastWindow, windowPerWay*ways), max(leastSamples, samplesPerWay*ways)
}

// Test is a sequential test of whether samples come from known shares: an
// e-process. It is the likelihood of the samples under alternatives, mixed, over
// that under the shares. Under the shares it is a nonnegative martingale from 1,
// so that by Ville's inequality it ever reaches 1/a with a probability of at most
// a: it may be looked at after each sample, and ended at any.
//
// Half of the mixture are all shares at once (Dirichlet, centred on the programmed
// ones), which finds what is wrong as a whole. The other half is one way alone that
// is wrong (Beta(½, ½) for each), which finds one of many.
type Test struct {
	shares []float64
	counts []int
	n      int
	all    float64   // logarithm of the Dirichlet mixture's ratio
	single []float64 // ratio of each way's Beta mixture
	sum    float64   // of single
}

// NewTest returns a test of shares, which are positive and add up to 1.
func NewTest(shares []float64) *Test {
	t := &Test{shares: shares, counts: make([]int, len(shares)), single: make([]float64, len(shares)), sum: float64(len(shares))}
	for i := range t.single {
		t.single[i] = 1
	}
	return t
}

// Add takes in a sample: the number of the way that it took.
func (t *Test) Add(way int) {
	ways, n := float64(len(t.shares)), float64(t.n)
	if len(t.shares) > 1 {
		p := t.shares[way]
		t.all += math.Log((ways*p + float64(t.counts[way])) / ((ways + n) * p))
		t.sum = 0
		for j, q := range t.shares {
			if j == way {
				t.single[j] *= (float64(t.counts[j]) + .5) / ((n + 1) * p)
			} else {
				t.single[j] *= (n - float64(t.counts[j]) + .5) / ((n + 1) * (1 - q))
			}
			t.sum += t.single[j]
		}
	}
	t.counts[way]++
	t.n++
}

// Evidence returns the e-value: 1 for nothing, 1/a for what happens under the
// shares with a probability of at most a.
func (t *Test) Evidence() float64 {
	return min(mostEvidence, math.Exp(t.all)/2+t.sum/float64(2*len(t.shares)))
}

// Without returns the evidence if so many samples more, of which the way is not
// known, had taken the ways that are behind: what is then left does not hang on
// them.
func (t *Test) Without(unknown int) float64 {
	if unknown == 0 {
		return t.Evidence()
	}
	u := &Test{shares: t.shares, counts: append([]int(nil), t.counts...), n: t.n, all: t.all, single: append([]float64(nil), t.single...), sum: t.sum}
	total := float64(t.n + unknown)
	for range unknown {
		behind := 0
		for i, p := range u.shares {
			if p*total-float64(u.counts[i]) > u.shares[behind]*total-float64(u.counts[behind]) {
				behind = i
			}
		}
		u.Add(behind)
	}
	return u.Evidence()
}
