package reconcile_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/natlens/natlens/internal/desired"
	"github.com/natlens/natlens/internal/reconcile"
	"github.com/natlens/natlens/pkg/chain"
)

// timeline drives a Tracker with a clock of its own, in seconds.
type timeline struct {
	objects *desired.Objects
	tracker reconcile.Tracker
	start   time.Time
	ports   int32
}

func newTimeline() *timeline {
	tl := &timeline{objects: desired.NewObjects("n1"), tracker: reconcile.Tracker{Grace: 30 * time.Second}, start: time.Now()}
	tl.change()
	return tl
}

// change changes what the API wants of Service d/s.
func (tl *timeline) change() {
	tl.ports++
	tl.objects.SetService(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "d", Name: "s"}, Spec: corev1.ServiceSpec{
		ClusterIP: "10.96.0.1", Ports: []corev1.ServicePort{{Port: tl.ports}}}})
}

func (tl *timeline) at(seconds float64) time.Time {
	return tl.start.Add(time.Duration(seconds * float64(time.Second)))
}

// update tells what is seen at a second, of differences about endpoints so named.
func (tl *timeline) update(seconds, confirmed float64, about ...string) reconcile.Outcome {
	var list []reconcile.Difference
	for _, a := range about {
		list = append(list, reconcile.Difference{Code: reconcile.EndpointMissing, Service: chain.ServicePort{Namespace: "d", Name: "s"}, About: a})
	}
	return tl.tracker.Update(tl.objects.View(37), list, reconcile.Moment{Rules: tl.at(seconds), Confirmed: tl.at(confirmed)})
}

func found(o reconcile.Outcome) []string {
	var out []string
	for _, f := range o.Findings {
		out = append(out, f.About)
	}
	return out
}

func TestGrace(t *testing.T) {
	tl := newTimeline()
	for _, step := range []struct {
		seconds, confirmed float64
		there, want        []string
		pending            int
	}{
		{0, 0, nil, nil, 0},
		{1, 1, []string{"a"}, nil, 1},
		{20, 20, []string{"a", "b"}, nil, 2},
		{31, 31, []string{"a", "b"}, []string{"a"}, 1},
		{40, 40, []string{"b"}, nil, 1}, // a is healed
		{45, 45, []string{"a", "b"}, nil, 2},
		{51, 48, []string{"a", "b"}, nil, 2}, // nobody has asked the API since b's grace was over
		{70, 70, []string{"a", "b"}, []string{"b"}, 1},
		{90, 70, []string{"a", "b"}, []string{"b"}, 1}, // the API is gone: b stays, a has to wait
		{200, 70, []string{"a", "b", "c"}, []string{"b"}, 2},
		{201, 201, []string{"a", "b", "c"}, []string{"a", "b"}, 1},
		{202, 202, nil, nil, 0},
	} {
		o := tl.update(step.seconds, step.confirmed, step.there...)
		if !slices.Equal(found(o), step.want) || o.Pending != step.pending {
			t.Errorf("second %v: found %q, %d pending; want %q, %d", step.seconds, found(o), o.Pending, step.want, step.pending)
		}
	}
}

// After the API was gone, kube-proxy hears of what changed later than this agent
// may: what is not a finding yet has its grace period from then on.
func TestSettled(t *testing.T) {
	tl := newTimeline()
	update := func(seconds, settled float64, about ...string) reconcile.Outcome {
		var list []reconcile.Difference
		for _, a := range about {
			list = append(list, reconcile.Difference{Code: reconcile.EndpointMissing, Service: chain.ServicePort{Namespace: "d", Name: "s"}, About: a})
		}
		return tl.tracker.Update(tl.objects.View(37), list, reconcile.Moment{Rules: tl.at(seconds), Confirmed: tl.at(seconds), Settled: tl.at(settled)})
	}
	for _, step := range []struct {
		seconds, settled float64
		there, want      []string
		due              float64
	}{
		{0, -100, []string{"a"}, nil, 30},
		{31, -100, []string{"a", "b"}, []string{"a"}, 61},
		{50, 110, []string{"a", "b"}, []string{"a"}, 140}, // it was gone, and is back: a stays
		{139, 110, []string{"a", "b", "c"}, []string{"a"}, 140},
		{141, 110, []string{"a", "b", "c"}, []string{"a", "b"}, 169},
	} {
		o := update(step.seconds, step.settled, step.there...)
		if !slices.Equal(found(o), step.want) || !o.Due.Equal(tl.at(step.due)) {
			t.Errorf("second %v: found %q, due %v; want %q, %v s", step.seconds, found(o), o.Due.Sub(tl.start), step.want, step.due)
		}
	}
}

func TestSince(t *testing.T) {
	tl := newTimeline()
	tl.update(0, 0)
	tl.update(5, 5, "a")
	o := tl.update(100, 100, "a")
	if len(o.Findings) != 1 || o.Findings[0].Since != tl.at(5) {
		t.Errorf("%+v, want one since %v", o.Findings, tl.at(5))
	}
}

// What stands when the agent starts began when it started, as far as it knows.
func TestFirstUpdate(t *testing.T) {
	tl := newTimeline()
	if o := tl.update(0, 0, "a"); len(o.Findings) != 0 || o.Pending != 1 || len(o.Latencies) != 0 {
		t.Errorf("%+v, want a pending one", o)
	}
	tl.tracker.Grace = 0
	if o := tl.update(1, 1, "a"); len(o.Findings) != 1 {
		t.Errorf("%+v, want one at once without a grace period", o)
	}
}

func TestLatencies(t *testing.T) {
	tl := newTimeline()
	tl.update(0, 0, "old")
	want := func(step string, o reconcile.Outcome, seconds ...float64) {
		t.Helper()
		var got []string
		for _, l := range o.Latencies {
			got = append(got, fmt.Sprintf("%.0f", l.Seconds()))
		}
		var wanted []string
		for _, s := range seconds {
			wanted = append(wanted, fmt.Sprintf("%.0f", s))
		}
		if !slices.Equal(got, wanted) {
			t.Errorf("%s: latencies %v, want %v", step, got, wanted)
		}
	}
	want("what was there at the start is gone", tl.update(1, 1))
	tl.change() // now, which is second 0
	want("two differences by one change", tl.update(2, 2, "a", "b"))
	want("still", tl.update(3, 3, "a", "b"))
	want("one gone", tl.update(4, 4, "b"), 4)
	want("the other gone later: the change was counted once for each time it took", tl.update(6, 6), 6)
	want("a difference by a hand on the rules", tl.update(7, 7, "c"))
	want("and gone", tl.update(8, 8))
	tl.change()
	want("rules as quick as the API", tl.update(0, 9), 0)
	tl.change()
	want("another change", tl.update(9, 9, "d"))
	tl.change()
	want("taken back by the API", tl.update(10, 10), 10)
}
