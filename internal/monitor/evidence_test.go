package monitor

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
)

// equal returns n equal shares.
func equal(n int) []float64 {
	return slices.Repeat([]float64{1 / float64(n)}, n)
}

// draw returns a way, chosen by cumulative shares.
func draw(r *rand.Rand, cumulative []float64) int {
	i, _ := slices.BinarySearch(cumulative, r.Float64())
	return min(i, len(cumulative)-1)
}

func cumulate(shares []float64) []float64 {
	out := slices.Clone(shares)
	for i := 1; i < len(out); i++ {
		out[i] += out[i-1]
	}
	return out
}

// TestFalseAlarms simulates windows whose samples are as programmed, each looked
// at after every sample: the rate holds at every level. Without the race detector,
// there are 10,000 of each.
func TestFalseAlarms(t *testing.T) {
	const windows = 10_000 / slowdown
	for _, test := range []struct {
		name   string
		shares []float64
	}{
		{"2", equal(2)},
		{"3", equal(3)},
		{"10", equal(10)},
		{"50", equal(50)},
		{"unequal", []float64{.6, .3, .1}},
		{"undelivered", []float64{.333, .333, .324, .01}},
		{"very unequal", []float64{.9989, .001, .0001}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			r := rand.New(rand.NewPCG(1, uint64(len(test.shares))))
			cumulative := cumulate(test.shares)
			size, _ := WindowOf(len(test.shares))
			levels := []float64{.1, .05, .01, .001, Alpha}
			alarms := make([]int, len(levels))
			for range windows {
				w := NewTest(test.shares)
				most := 0.0
				for range size {
					w.Add(draw(r, cumulative))
					most = max(most, w.Evidence())
				}
				for i, a := range levels {
					if most >= 1/a {
						alarms[i]++
					}
				}
			}
			for i, a := range levels {
				expected := a * windows
				if enough := expected >= 10 || a == Alpha; enough && float64(alarms[i]) > expected {
					t.Errorf("at %v: %d alarms in %d windows", a, alarms[i], windows)
				}
			}
			t.Logf("alarms at %v: %v", levels, alarms)
		})
	}
}

// TestPower: how many samples it takes to find what docs/findings.md says it
// finds, in 99 of 100 runs.
func TestPower(t *testing.T) {
	missing := equal(50)
	for i := range missing {
		missing[i] = 1. / 49
	}
	missing[49] = 0
	for _, test := range []struct {
		name              string
		programmed, truth []float64
		within            int
	}{
		{"50/25/25 for thirds", equal(3), []float64{.5, .25, .25}, 800},
		{"nothing for one of three", equal(3), []float64{.5, .5, 0}, 60},
		{"2 to 1 for halves", equal(2), []float64{2. / 3, 1. / 3}, 700},
		{"nothing for one of ten", equal(10), []float64{1. / 9, 1. / 9, 1. / 9, 1. / 9, 1. / 9, 1. / 9, 1. / 9, 1. / 9, 1. / 9, 0}, 400},
		{"nothing for one of fifty", equal(50), missing, 2000},
	} {
		t.Run(test.name, func(t *testing.T) {
			const runs = 1000 / slowdown
			size, _ := WindowOf(len(test.programmed))
			r := rand.New(rand.NewPCG(2, 2))
			cumulative := cumulate(test.truth)
			var took []int
			for range runs {
				w := NewTest(test.programmed)
				n := 0
				for n < size && w.Evidence() < 1/Alpha {
					w.Add(draw(r, cumulative))
					n++
				}
				took = append(took, n)
			}
			slices.Sort(took)
			median, most := took[runs/2], took[runs*99/100]
			t.Logf("median %d, 99 of 100 within %d", median, most)
			if test.within > size || most > test.within {
				t.Errorf("99 of 100 within %d samples, want %d of a window of %d", most, test.within, size)
			}
		})
	}
}

// TestWithout: samples whose way is unknown are no evidence, wherever they went.
func TestWithout(t *testing.T) {
	w := NewTest(equal(3))
	for i := range 300 {
		if way := i % 3; way != 2 {
			w.Add(way)
		}
	}
	if e := w.Evidence(); e < 1/Alpha {
		t.Fatalf("evidence %g against an endpoint that nobody reached", e)
	}
	if e := w.Without(100); e >= 1 {
		t.Errorf("evidence %g although the third endpoint may have had all the others", e)
	}
	if a, b := w.Without(0), w.Evidence(); a != b {
		t.Errorf("evidence %g without nothing, want %g", a, b)
	}
	if e := w.Without(10); e < 1/Alpha {
		t.Errorf("evidence %g although ten more would not have made up for it", e)
	}
}

// TestOneWay: with one endpoint there is nothing to find.
func TestOneWay(t *testing.T) {
	w := NewTest(equal(1))
	for i := range 1000 {
		w.Add(0)
		if e := w.Evidence(); e != 1 {
			t.Fatalf("evidence %v after %d samples", e, i)
		}
	}
}

func ExampleTest() {
	w := NewTest([]float64{.5, .5})
	for range 30 {
		w.Add(0)
	}
	fmt.Println(w.Evidence() >= 1/Alpha)
	// Output: true
}
