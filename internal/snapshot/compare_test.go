package snapshot

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/natlens/natlens/internal/desired"
	"github.com/natlens/natlens/internal/reconcile"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
)

// api is an API whose objects and connection are set by the test.
type api struct {
	objects *desired.Objects
	changed chan struct{}

	mu     sync.Mutex
	down   bool
	status desired.Status
	asked  int
}

// newAPI wants Service default/app with these endpoints.
func newAPI(endpoints ...string) *api {
	a := &api{objects: desired.NewObjects("node1"), changed: make(chan struct{}, 1), status: desired.Status{Synced: true, Confirmed: time.Now()}}
	a.objects.SetNode(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node1"}})
	a.objects.SetService(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "app"}, Spec: corev1.ServiceSpec{ClusterIP: "10.96.0.1", Ports: []corev1.ServicePort{{Port: 80}}}})
	a.want(endpoints...)
	return a
}

func (a *api) want(endpoints ...string) {
	port, name := int32(80), ""
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "app-1", Labels: map[string]string{discoveryv1.LabelServiceName: "app"}},
		Ports:      []discoveryv1.EndpointPort{{Name: &name, Port: &port}},
	}
	for _, e := range endpoints {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{e}})
	}
	a.objects.SetSlice(s)
	select {
	case a.changed <- struct{}{}:
	default:
	}
}

func (a *api) disconnect(now bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.down = now; now {
		a.status.Error = "connection refused"
	} else {
		a.status.Error = ""
	}
}

func (a *api) Objects() *desired.Objects { return a.objects }
func (a *api) Changed() <-chan struct{}  { return a.changed }
func (a *api) Confirm(context.Context) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.asked++; !a.down {
		a.status.Confirmed = time.Now()
	}
}

func (a *api) Status() desired.Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.status
}

// differences are the codes and subjects of what was found against the API.
func differences(s *Snapshot) []string {
	var out []string
	for _, f := range s.API.Findings {
		out = append(out, string(f.Code)+" "+f.About)
	}
	return out
}

// running runs a keeper with an API, in a bubble with a clock of its own.
func running(t *testing.T, a *api, do func(*Keeper, *script)) {
	t.Helper()
	runningEvery(t, a, 0, do)
}

// runningEvery does so with another interval.
func runningEvery(t *testing.T, a *api, interval time.Duration, do func(*Keeper, *script)) {
	t.Helper()
	k, r := newKeeper(dump)
	k.API, k.Grace, k.Interval = a, 30*time.Second, cmp.Or(interval, k.Interval)
	during(t, k, func() { do(k, r) })
}

// during runs a keeper while something is done.
func during(t *testing.T, k *Keeper, do func()) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		k.Run(ctx)
		close(done)
	}()
	synctest.Wait()
	do()
	stop()
	<-done
}

func wantDifferences(t *testing.T, k *Keeper, when string, want ...string) {
	t.Helper()
	synctest.Wait()
	if got := differences(k.Snapshot()); !slices.Equal(got, want) {
		t.Errorf("%s: differences %q, want %q", when, got, want)
	}
}

const missing = string(reconcile.EndpointMissing) + " 10.0.0.3:80"

// A change of the API counts when kube-proxy has not followed within the grace
// period and a reading, and no longer when it has.
func TestDifferenceCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAPI("10.0.0.1", "10.0.0.2")
		running(t, a, func(k *Keeper, r *script) {
			var followed []time.Duration
			k.Followed = func(d time.Duration) { followed = append(followed, d) }
			wantDifferences(t, k, "at first")
			news, end := k.Subscribe()
			defer end()
			changed := time.Now()
			a.want("10.0.0.1", "10.0.0.2", "10.0.0.3")
			time.Sleep(time.Second)
			if n := k.Snapshot().API.Pending; n != 1 {
				t.Errorf("%d pending a second after the change, want 1", n)
			}
			time.Sleep(28 * time.Second)
			wantDifferences(t, k, "within the grace period")
			time.Sleep(2*time.Second + confirmPause + 2*k.Interval)
			wantDifferences(t, k, "after it", missing)
			if f := k.Snapshot().API.Findings; len(f) == 1 && !f[0].Since.Equal(changed) {
				t.Errorf("since %v after the change, want 0", f[0].Since.Sub(changed))
			}
			select {
			case <-news:
			default:
				t.Error("nobody was told")
			}
			version := k.Snapshot().Version
			a.want("10.0.0.1", "10.0.0.2")
			time.Sleep(time.Second) // less than an interval: the API's word is enough
			wantDifferences(t, k, "withdrawn")
			if k.Snapshot().Version == version {
				t.Error("the version is that of before")
			}
			if k.Changes() != 0 {
				t.Errorf("%d changes of the rules, want none", k.Changes())
			}
			if len(followed) > 1 {
				t.Errorf("followed %v, want at most the last change, which was none of the rules'", followed)
			}
			_ = r
		})
	})
}

// However long readings are apart, a difference counts when its time is over.
func TestDifferenceCountsWhenDue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAPI("10.0.0.1", "10.0.0.2")
		runningEvery(t, a, time.Hour, func(k *Keeper, _ *script) {
			time.Sleep(time.Second)
			a.want("10.0.0.1", "10.0.0.2", "10.0.0.3")
			time.Sleep(k.Grace - time.Second)
			wantDifferences(t, k, "within the grace period")
			time.Sleep(dueStep + time.Second)
			wantDifferences(t, k, "a moment after it", missing)
			if n := a.asked; n != 1 {
				t.Errorf("asked for a sign of life %d times, want once", n)
			}
		})
	})
}

// Nothing new is found on the word of an API that is gone, or with rules that
// cannot be read.
func TestNothingNewFromOldKnowledge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAPI("10.0.0.1", "10.0.0.2", "10.0.0.3")
		a.disconnect(true)
		running(t, a, func(k *Keeper, r *script) {
			time.Sleep(10 * time.Minute)
			wantDifferences(t, k, "with the API gone")
			if s := k.Snapshot(); !s.API.Known || s.API.Error != "connection refused" {
				t.Errorf("%+v, want it to be marked", s.API)
			}
			if a.asked < 100 {
				t.Errorf("asked for a sign of life %d times in ten minutes", a.asked)
			}
			a.disconnect(false)
			r.set("", errors.New("no"))
			time.Sleep(time.Minute)
			wantDifferences(t, k, "with the rules unreadable")
			r.set(dump, nil)
			time.Sleep(2 * k.Interval)
			wantDifferences(t, k, "with both back", missing)
		})
	})
}

// The latency is that of the rules, from when the API told.
func TestFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAPI("10.0.0.1", "10.0.0.2")
		running(t, a, func(k *Keeper, r *script) {
			var followed []time.Duration
			k.Followed = func(d time.Duration) { followed = append(followed, d) }
			time.Sleep(time.Second)
			a.want("10.0.0.1", "10.0.0.3")
			time.Sleep(6 * time.Second) // readings are at 0, 5 and 10 s, and so on
			r.set(moved, nil)
			time.Sleep(10 * time.Second)
			synctest.Wait()
			if len(followed) != 1 || followed[0].Round(100*time.Millisecond) != 9*time.Second {
				t.Errorf("followed after %v, want 9 s: from 1 s to the reading at 10 s", followed)
			}
		})
	})
}

func TestNotSynced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAPI()
		a.status = desired.Status{}
		running(t, a, func(k *Keeper, _ *script) {
			time.Sleep(time.Hour)
			wantDifferences(t, k, "without a list")
			if s := k.Snapshot(); s.API.Known || s.API.Error == "" {
				t.Errorf("%+v, want an error that says so", s.API)
			}
		})
	})
}

// The chains of a Service that the API has changed are looked at first, as long as
// kube-proxy may be expected to follow.
func TestChangedServiceFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAPI("10.0.0.1", "10.0.0.2")
		k, _ := newKeeper(dump)
		var told atomic.Value
		k.API, k.First = a, func(chains []string) { told.Store(chains) }
		go k.Run(t.Context())
		wait := func(d time.Duration) []string {
			time.Sleep(d)
			synctest.Wait()
			return told.Load().([]string)
		}
		a.want("10.0.0.1", "10.0.0.2") // nothing else
		if told := wait(2 * k.Interval); len(told) > 0 {
			t.Errorf("told of %q before anything changed", told)
		}
		a.want("10.0.0.1", "10.0.0.2", "10.0.0.3")
		want := chain.ServiceChain("KUBE-SVC-", chain.ServicePort{Namespace: "default", Name: "app", Protocol: netfilter.TCP})
		if told := wait(2 * k.Interval); !slices.Contains(told, want) {
			t.Errorf("told of %q, want %s with them", told, want)
		}
		if told := wait(aheadFor); len(told) > 0 {
			t.Errorf("told of %q half a minute later", told)
		}
	})
}

// A change of the API is looked at together with that of the rules, ahead of others,
// and by itself only when they do not follow: kube-proxy needs the processor then.
func TestChangedWaitsForRules(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAPI("10.0.0.1", "10.0.0.2")
		k, r := newKeeper(dump)
		var changed atomic.Bool
		var told atomic.Value
		k.API, k.Grace, k.Interval = a, 30*time.Second, time.Hour
		k.First = func(chains []string) { told.Store(chains) }
		k.Moved = func() bool { return changed.Swap(false) }
		during(t, k, func() {
			pending := func(wait time.Duration) int {
				time.Sleep(wait)
				synctest.Wait()
				return k.Snapshot().API.Pending
			}
			a.want("10.0.0.1", "10.0.0.3")
			if got := pending(900 * time.Millisecond); got != 0 {
				t.Errorf("%d differences while kube-proxy is at work", got)
			}
			if got := pending(200 * time.Millisecond); got == 0 {
				t.Error("no difference though the rules have not followed")
			}
			r.set(moved, nil)
			changed.Store(true)
			if got := pending(200 * time.Millisecond); got != 0 {
				t.Errorf("%d differences after the rules have followed", got)
			}

			told.Store([]string{})
			time.Sleep(aheadFor)
			a.want("10.0.0.1", "10.0.0.2")
			time.Sleep(300 * time.Millisecond)
			r.set(dump, nil)
			changed.Store(true)
			if got := pending(200 * time.Millisecond); got != 0 {
				t.Errorf("%d differences after the rules have followed at once", got)
			}
			want := chain.ServiceChain("KUBE-SVC-", chain.ServicePort{Namespace: "default", Name: "app", Protocol: netfilter.TCP})
			if told := told.Load().([]string); !slices.Contains(told, want) {
				t.Errorf("told of %q, want %s with them", told, want)
			}
		})
	})
}

// Rules that follow a change of the API are seen to move sooner than others: its news
// ends a wait.
func TestRulesFollowAPI(t *testing.T) {
	for name, thread := range map[string]bool{"timer": false, "thread": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAPI("10.0.0.1", "10.0.0.2")
				k, r := newKeeper(dump)
				if thread {
					woken := make(chan struct{}, 1)
					k.Wake = func() { woken <- struct{}{} }
					k.Sleep = func(d time.Duration) {
						select {
						case <-woken:
						case <-time.After(d):
						}
					}
				}
				var changed atomic.Bool
				k.API, k.Interval = a, time.Hour
				k.Moved = func() bool { return changed.Swap(false) }
				during(t, k, func() {
					time.Sleep(time.Minute + 10*time.Millisecond) // between two looks of any pace
					before := r.readings()
					a.want("10.0.0.1", "10.0.0.3")
					synctest.Wait()
					changed.Store(true)
					time.Sleep(pollSoon)
					synctest.Wait()
					if got := r.readings(); got != before+1 {
						t.Errorf("%d readings %v after the rules have moved, want 1", got-before, pollSoon)
					}
				})
			})
		})
	}
}

// While the API tells of what is to come, the reader is asked half as often whether
// rules have moved.
func TestPolls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAPI("10.0.0.1", "10.0.0.2")
		k, _ := newKeeper(dump)
		var asked atomic.Int64
		k.API, k.Interval = a, time.Hour
		k.Moved = func() bool {
			asked.Add(1)
			return false
		}
		during(t, k, func() {
			in := func(d time.Duration) int64 {
				before := asked.Load()
				time.Sleep(d)
				synctest.Wait()
				return asked.Load() - before
			}
			time.Sleep(time.Minute)
			if got, want := in(time.Minute), int64(time.Minute/pollTold); got < want-1 || got > want+1 {
				t.Errorf("asked %d times a minute, want %d", got, want)
			}
			a.disconnect(true)
			if got, least := in(time.Minute), int64(time.Minute/pollPause); got < least-1 {
				t.Errorf("asked %d times a minute without the API, want %d", got, least)
			}
		})
	})
}
