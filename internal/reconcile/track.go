package reconcile

import (
	"cmp"
	"slices"
	"time"

	"github.com/natlens/natlens/internal/desired"
	"github.com/natlens/natlens/pkg/chain"
)

// Finding is a difference that has outlived the grace period.
type Finding struct {
	Difference
	Since time.Time // when it began
}

// Tracker follows differences over time. It is used by one goroutine at a time.
type Tracker struct {
	// Grace is how long a difference is to last before it counts: longer than
	// kube-proxy needs to follow the API.
	Grace time.Duration

	standing map[key]*standing
	desired  *desired.View // of the last Update
}

// key tells a difference from others for as long as it lasts.
type key struct {
	code    chain.Code
	service chain.ServicePort
	about   string
}

func (d *Difference) key() key { return key{d.Code, d.Service, d.About} }

// standing is a difference that is there.
type standing struct {
	since   time.Time
	byAPI   bool // it began with a change of the API
	counted bool // it has outlived the grace period
}

// Moment is when differences were seen.
type Moment struct {
	Rules time.Time // when the rules were read
	// Confirmed is when the API was last known to be what the desired view says.
	// Nothing new counts on the word of an API that cannot be reached: kube-proxy
	// may know more.
	Confirmed time.Time
	// Settled is until when kube-proxy may not know what the API wants, because the
	// API was gone. The grace period of what is not a finding yet begins then.
	Settled time.Time
}

// Outcome is what an Update tells.
type Outcome struct {
	Findings []Finding
	// Latencies are of the changes of the API that the rules have followed since
	// the last Update: from the moment that the API told to that when the rules
	// were seen to be so, 0 where they were so before.
	Latencies []time.Duration
	Pending   int       // differences that have not outlived the grace period
	Due       time.Time // when the first of them will have; zero for none
}

// Update takes the differences in that are there now.
func (t *Tracker) Update(view *desired.View, list []Difference, at Moment) Outcome {
	var out Outcome
	first := t.desired == nil || view.All
	changed := map[desired.Key]time.Time{}
	if view != t.desired { // else its changes have been seen
		changed = view.Changed
	}
	t.desired = view

	now := make(map[key]*standing, len(list))
	fresh := map[desired.Key]bool{} // Services whose change made a difference
	for i := range list {
		d := &list[i]
		k := d.key()
		if now[k] != nil {
			continue
		}
		s := t.standing[k]
		if s == nil {
			s = &standing{since: at.Rules}
			if told, ok := changed[serviceOf(k)]; ok && !first {
				s.since, s.byAPI = told, true
				fresh[serviceOf(k)] = true
			}
		}
		now[k] = s
		due := s.since.Add(t.Grace)
		if at.Settled.After(s.since) {
			due = at.Settled.Add(t.Grace)
		}
		s.counted = s.counted || !at.Rules.Before(due) && !at.Confirmed.Before(due)
		if s.counted {
			out.Findings = append(out.Findings, Finding{*d, s.since})
			continue
		}
		if out.Pending++; out.Due.IsZero() || due.Before(out.Due) {
			out.Due = due
		}
	}
	out.Latencies = t.latencies(now, changed, fresh, first, at)
	t.standing = now
	slices.SortStableFunc(out.Findings, func(a, b Finding) int {
		return cmp.Or(a.Service.Compare(b.Service), cmp.Compare(a.Code, b.Code), cmp.Compare(a.About, b.About))
	})
	return out
}

// latencies looks which differences are gone that a change of the API had made:
// one latency for those that began and ended together.
func (t *Tracker) latencies(now map[key]*standing, changed map[desired.Key]time.Time, fresh map[desired.Key]bool, first bool, at Moment) []time.Duration {
	if first {
		return nil
	}
	var out []time.Duration
	type change struct {
		service desired.Key
		since   time.Time
	}
	seen := map[change]bool{}
	for k, s := range t.standing {
		c := change{serviceOf(k), s.since}
		_, again := changed[c.service] // then the API may have ended it, not the rules
		if now[k] != nil || !s.byAPI || again || seen[c] {
			continue
		}
		seen[c] = true
		out = append(out, max(0, at.Rules.Sub(s.since)))
	}
	for service, told := range changed {
		if !fresh[service] { // the rules were as quick as the API
			out = append(out, max(0, at.Rules.Sub(told)))
		}
	}
	return out
}

func serviceOf(k key) desired.Key {
	return desired.Key{Namespace: k.service.Namespace, Name: k.service.Name}
}
