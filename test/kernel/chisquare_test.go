//go:build linux

package kernel

import (
	"math"
	"testing"
)

// unlikely is the probability below which a sample is drawn again.
const unlikely = 0.0005

// pValue returns how likely a sample is to be as far from the shares as this
// one, or farther, by chance (Pearson's chi-square test). Each share expects at
// least a few draws, or the approximation is poor.
func pValue(counts []int, shares []float64) float64 {
	n := 0
	for _, c := range counts {
		n += c
	}
	x := 0.0
	for i, c := range counts {
		want := float64(n) * shares[i]
		x += (float64(c) - want) * (float64(c) - want) / want
	}
	return chiSquareTail(x, len(counts)-1)
}

// chiSquareTail returns the probability that a chi-square variable of k degrees
// of freedom is greater than x. That is the regularized gamma function
// Q(k/2, x/2), which for whole and half first arguments is a finite sum.
func chiSquareTail(x float64, k int) float64 {
	if k < 1 {
		return 1
	}
	x /= 2
	q, a := math.Exp(-x), 1.0 // Q(1, x)
	if k%2 == 1 {
		q, a = math.Erfc(math.Sqrt(x)), 0.5
	}
	for ; a < float64(k)/2; a++ { // Q(a+1, x) = Q(a, x) + x^a e^-x / Γ(a+1)
		lg, _ := math.Lgamma(a + 1)
		q += math.Exp(a*math.Log(x) - x - lg)
	}
	return q
}

// TestChiSquareTail compares with a printed table of critical values.
func TestChiSquareTail(t *testing.T) {
	for _, c := range []struct {
		k    int
		x, p float64
	}{
		{1, 3.841, 0.05}, {2, 5.991, 0.05}, {5, 11.070, 0.05}, {1, 10.828, 0.001},
		{2, 13.816, 0.001}, {3, 16.266, 0.001}, {4, 18.467, 0.001}, {10, 29.588, 0.001},
	} {
		if got := chiSquareTail(c.x, c.k); math.Abs(got-c.p) > c.p/1000 {
			t.Errorf("chi-square, %d degrees of freedom, above %v: %v, want %v", c.k, c.x, got, c.p)
		}
	}
	if p := pValue([]int{333, 334, 333}, []float64{1. / 3, 1. / 3, 1. / 3}); p < 0.99 {
		t.Errorf("a sample that could not be more even has p = %v", p)
	}
	if p := pValue([]int{400, 300, 300}, []float64{1. / 3, 1. / 3, 1. / 3}); p > unlikely {
		t.Errorf("400 of 1000 for a third has p = %v", p)
	}
}
