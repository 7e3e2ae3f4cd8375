package snapshot

import (
	"context"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/natlens/natlens/internal/desired"
	"github.com/natlens/natlens/internal/reconcile"
	"github.com/natlens/natlens/internal/signal"
	"github.com/natlens/natlens/pkg/chain"
)

// API tells what the Kubernetes API wants.
type API interface {
	Objects() *desired.Objects
	Status() desired.Status
	// Changed gets a value after the objects have changed.
	Changed() <-chan struct{}
	// Confirm asks whether the objects are as they are wanted now; the answer is
	// in the Status.
	Confirm(context.Context)
}

// Compare holds a snapshot against what the objects want, all at once: what
// differs is a finding.
func (s *Snapshot) Compare(o *desired.Objects) {
	status := desired.Status{Synced: true, Confirmed: s.Time}
	s.API, _ = s.compare(&reconcile.Tracker{}, o, status)
}

// compare holds the snapshot against what the objects want.
func (s *Snapshot) compare(t *reconcile.Tracker, o *desired.Objects, status desired.Status) (Comparison, []time.Duration) {
	c := Comparison{Confirmed: status.Confirmed, Error: status.Error}
	if !status.Synced {
		if c.Error == "" {
			c.Error = "not everything has been listed yet"
		}
		return c, nil
	}
	node, ok := o.Node()
	if !ok {
		c.Error = "the API has no Node of this name"
		return c, nil
	}
	oldest, newest := s.View.Releases()
	releases := desired.Candidates(node.Release, desired.Release(oldest), desired.Release(newest))
	sides := reconcile.Sides{Desired: o.View(releases[0]), Rules: s.Rules, View: s.View, Programmed: s.Programmed, Others: releases[1:]}
	c.Release = releases[0]
	if why := reconcile.Incomparable(sides); why != "" {
		c.Error = why
		return c, nil
	}
	out := t.Update(sides.Desired, reconcile.Compare(sides), reconcile.Moment{Rules: s.Time, Confirmed: status.Confirmed, Settled: status.Settled})
	c.Known, c.Desired, c.Findings, c.Pending, c.due = true, sides.Desired, out.Findings, out.Pending, out.Due
	return c, out.Latencies
}

// says reports whether two comparisons say the same to readers.
func (c *Comparison) says(o *Comparison) bool {
	return c.Known == o.Known && c.Error == o.Error && c.Release == o.Release && slices.EqualFunc(c.Findings, o.Findings, func(a, b reconcile.Finding) bool {
		return a.Code == b.Code && a.Service == b.Service && a.About == b.About && a.Message == b.Message && a.Since.Equal(b.Since)
	})
}

// compared brings a snapshot's comparison up to date. Rules that could not be
// read again are not held against a newer API.
func (k *Keeper) compared(s *Snapshot) {
	if k.API == nil || s.Stale {
		return
	}
	start := time.Now()
	last := s.API
	k.ahead.note(k.API.Objects().Waiting(), s.Programmed, start)
	var latencies []time.Duration
	s.API, latencies = s.compare(&k.tracker, k.API.Objects(), k.API.Status())
	if !last.says(&s.API) {
		s.Version++
	}
	k.due.Store(&s.API.due)
	if !s.API.due.IsZero() {
		k.differs.Wake()
	}
	for _, l := range latencies {
		if k.Followed != nil {
			k.Followed(l)
		}
	}
	k.comparing = time.Since(start)
}

// recheck compares the rules as they were last read with an API that has changed.
func (k *Keeper) recheck() {
	last := k.current.Load()
	if last == nil {
		return
	}
	next := *last
	k.compared(&next)
	k.publish(&next, next.Version != last.Version)
}

// recheckAt returns when to compare with an API that has just changed, unless the
// rules move before: after kube-proxy has had its time to follow, which needs the
// processor itself then. Comparing takes at most a tenth of the time.
func (k *Keeper) recheckAt(now time.Time) time.Time {
	const follow, least = time.Second, 100 * time.Millisecond
	at := k.rechecked.Add(max(least, busyShare*k.comparing))
	if k.Moved != nil && at.Before(now.Add(follow)) {
		return now.Add(follow)
	}
	return at
}

// Differences are looked at again when they are due, to the second, and while the
// API cannot be reached, it is asked with a pause.
const (
	dueStep      = time.Second
	confirmPause = 5 * time.Second
)

// keepConfirmed asks the API for a sign of life when a difference has lasted so
// long that it may count, and then has the rules read, which may not have moved.
func (k *Keeper) keepConfirmed(ctx context.Context) {
	var asked, about time.Time
	for {
		// A ticker would wake up for nothing most of the time.
		if k.dueAt().IsZero() {
			select {
			case <-ctx.Done():
				return
			case <-k.differs.C():
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(dueStep):
		}
		due := k.dueAt()
		if due.IsZero() || time.Now().Before(due) || due.Equal(about) && time.Since(asked) < confirmPause {
			continue
		}
		about, asked = due, time.Now()
		k.API.Confirm(ctx)
		if !k.API.Status().Confirmed.Before(due) {
			k.ripe.Wake()
		}
	}
}

// comparer is what the Keeper keeps for comparing.
type comparer struct {
	tracker   reconcile.Tracker
	due       atomic.Pointer[time.Time] // when the next difference may count; zero for none
	differs   signal.Signal             // there is such a time
	ripe      signal.Signal             // one does, if it is still there
	comparing time.Duration             // what the last comparison took
	rechecked time.Time                 // when the API was last looked at because it changed
	ahead     ahead
}

// dueAt returns when the next difference may count; zero for none.
func (c *comparer) dueAt() time.Time {
	if due := c.due.Load(); due != nil {
		return *due
	}
	return time.Time{}
}

// ahead are the chains whose rules should change soon, since the API has changed
// their Services.
type ahead struct {
	until map[string]time.Time // by chain: when it is no longer looked at first
}

const (
	aheadFor  = 30 * time.Second // kube-proxy writes at most so long after, as a rule
	mostAhead = 256              // chains; to look at more first is to look at all
)

// note takes in which Services the API has changed. A Service without chains is none
// that could be looked at first.
func (a *ahead) note(changed []desired.Key, p *chain.Programmed, now time.Time) {
	if len(changed) == 0 || len(changed) > mostAhead {
		return
	}
	if a.until == nil {
		a.until = map[string]time.Time{}
	}
	these := map[desired.Key]bool{}
	for _, key := range changed {
		these[key] = true
	}
	for i := range p.Services {
		s := p.Services[i].ServicePort
		if !these[desired.Key{Namespace: s.Namespace, Name: s.Name}] {
			continue
		}
		for _, prefix := range []string{"KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-XLB-", "KUBE-FW-"} {
			a.until[chain.ServiceChain(prefix, s)] = now.Add(aheadFor)
		}
	}
}

// chains returns the chains to look at first.
func (a *ahead) chains(now time.Time) []string {
	maps.DeleteFunc(a.until, func(_ string, until time.Time) bool { return !now.Before(until) })
	if len(a.until) > mostAhead {
		return nil
	}
	return slices.Sorted(maps.Keys(a.until))
}
