package snapshot

import (
	"context"
	"slices"
	"sync/atomic"
	"time"

	"github.com/natlens/natlens/internal/observed"
	"github.com/natlens/natlens/internal/signal"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/conntrack"
)

// Observed is what traffic was seen to do. Its parts are nil where nobody looks.
type Observed struct {
	Connections *observed.Connections
	Flows       *observed.Flows
	Pins        *observed.Pins
}

// FlowReader reads the tracked connections of the node. It is called by one
// goroutine at a time.
type FlowReader interface {
	// Dump calls each with every connection whose destination nat has rewritten.
	Dump(ctx context.Context, each func(*conntrack.Flow)) error
}

// Count takes what stands in the rules for what was observed: for a snapshot that
// is read once.
func (s *Snapshot) Count() { s.Observed.Connections = observed.Count(s.Rules, s.Programmed) }

// Look adds one look at conntrack, and at whom session affinity binds, to a
// snapshot that is read once. Either may be nil.
func (s *Snapshot) Look(ctx context.Context, flows FlowReader, pins observed.PinReader) {
	if flows != nil {
		watch := observed.Watch{}
		pass := watch.Begin(s.moment(true))
		if err := flows.Dump(ctx, pass.Add); err != nil {
			s.Observed.Flows = pass.Fail(nil, err)
		} else {
			s.Observed.Flows = pass.End(0)
		}
	}
	if pins != nil {
		s.Observed.Pins = (&observed.Pinner{Reader: pins}).Look(ctx, s.Rules, s.Programmed)
	}
}

// moment is what flows are held against now.
func (s *Snapshot) moment(blind bool) observed.Moment {
	return observed.Moment{Time: time.Now(), Programmed: s.Programmed, Local: s.View.Node().Local, Desired: s.API.Desired, Blind: blind}
}

// observer is what the Keeper keeps for observing.
type observer struct {
	asked   signal.Signal // somebody reads snapshots
	counter observed.Counter
	flows   atomic.Pointer[observed.Flows] // of the last look at conntrack
	pins    atomic.Pointer[observed.Pins]
}

// observed brings up to date what a snapshot says of traffic.
func (k *Keeper) observed(s *Snapshot) {
	if !s.Stale {
		s.Observed.Connections = k.counter.Update(s.Rules, s.Programmed, s.Time)
	}
	last := s.Observed.Flows
	s.Observed.Flows, s.Observed.Pins = k.flows.Load(), k.pins.Load()
	if !sameFindings(last, s.Observed.Flows) {
		s.Version++
	}
}

func sameFindings(a, b *observed.Flows) bool {
	if a == nil || b == nil {
		return (a == nil || len(a.Findings) == 0) && (b == nil || len(b.Findings) == 0)
	}
	return slices.EqualFunc(a.Findings, b.Findings, func(x, y observed.Finding) bool {
		return x.Service == y.Service && x.About == y.About && x.Message == y.Message && x.Since.Equal(y.Since)
	})
}

// flowShare bounds the part of the time that is spent reading conntrack, as
// busyShare does for the rules: the kernel walks the whole table. While nothing is
// waited for, quietShare does, as long as that is no longer than mostFlowRest.
const (
	flowShare    = 100
	quietShare   = 10_000
	mostFlowRest = 5 * time.Minute
)

// flowRests are the pauses after a look at conntrack, from the longest to the
// shortest.
type flowRests struct {
	quiet time.Duration // when nobody waits for the next
	asked time.Duration // when somebody reads what was seen
	soon  time.Duration // when endpoints may have gone, and then until it is known whether flows to them are in use
}

// flowRestsAfter returns those after a look that took so long.
func (k *Keeper) flowRestsAfter(took time.Duration) flowRests {
	const soonShare = 5
	least := flowShare * took
	asked := max(k.FlowPause, least)
	return flowRests{quiet: max(asked, min(quietShare*took, mostFlowRest)), asked: asked, soon: max(k.FlowPause/soonShare, least)}
}

// Asked says that somebody reads snapshots: conntrack, which is looked at rarely
// while nobody does, will be soon; and so will what the rules have counted.
func (k *Keeper) Asked() {
	k.asked.Wake()
	k.Counted()
}

// watchTraffic looks at conntrack, and at whom session affinity binds, again and
// again until the context ends.
func (k *Keeper) watchTraffic(ctx context.Context) {
	watch, pinner := observed.Watch{Grace: k.Grace}, observed.Pinner{Reader: k.Pins}
	news, end := k.Subscribe()
	defer end()
	for ctx.Err() == nil {
		start := time.Now()
		s := k.Snapshot()
		if s != nil {
			k.lookAtFlows(ctx, &watch, s)
			k.lookAtPins(ctx, &pinner, s)
		}
		rests := k.flowRestsAfter(time.Since(start))
		if watch.Pending() {
			rests.quiet = rests.soon
		}
		k.restOfTraffic(ctx, s, news, rests)
	}
}

// restOfTraffic waits for the quiet pause after a look; only for a shorter one once
// somebody asks, or other Services are published than the look was about.
func (k *Keeper) restOfTraffic(ctx context.Context, s *Snapshot, news <-chan struct{}, rests flowRests) {
	start, rest := time.Now(), rests.quiet
	over := time.NewTimer(rest)
	defer over.Stop()
	for {
		shorter := rest
		select {
		case <-ctx.Done():
			return
		case <-over.C:
			return
		case <-k.asked.C():
			shorter = rests.asked
		case <-news:
			if k.resolvedAnew(s) {
				shorter = rests.soon
			}
		}
		if shorter < rest {
			rest = shorter
			over.Reset(rest - time.Since(start))
		}
	}
}

// resolvedAnew reports whether other Services are published than those of a
// snapshot.
func (k *Keeper) resolvedAnew(s *Snapshot) bool {
	now := k.Snapshot()
	return now != nil && (s == nil || now.Programmed != s.Programmed)
}

func (k *Keeper) lookAtFlows(ctx context.Context, watch *observed.Watch, s *Snapshot) {
	start := time.Now()
	pass := watch.Begin(s.moment(s.Stale || k.API != nil && !s.API.Known))
	err := k.Flows.Dump(ctx, pass.Add)
	if ctx.Err() != nil {
		return
	}
	if err == nil {
		k.flows.Store(pass.End(time.Since(start)))
		return
	}
	last := k.flows.Load()
	if last == nil || last.Error == "" {
		k.Log.Error("reading the tracked connections failed", "error", err)
	}
	k.flows.Store(pass.Fail(last, err))
}

func (k *Keeper) lookAtPins(ctx context.Context, pinner *observed.Pinner, s *Snapshot) {
	if k.Pins == nil || s.Stale {
		return
	}
	next := pinner.Look(ctx, s.Rules, s.Programmed)
	if last := k.pins.Load(); next.Error != "" && (last == nil || last.Error == "") {
		k.Log.Error("reading whom session affinity binds failed", "error", next.Error)
	}
	k.pins.Store(next)
}

// observedFindings returns what traffic showed about the Service ports that fit.
func (s *Snapshot) observedFindings(fits func(chain.ServicePort) bool) []Finding {
	var out []Finding
	if s.Observed.Flows != nil {
		for i := range s.Observed.Flows.Findings {
			if f := &s.Observed.Flows.Findings[i]; fits(f.Service) {
				out = append(out, Finding{
					Finding:   chain.Finding{Code: f.Code, Severity: f.Severity, Service: &f.Service, About: f.About, Message: f.Message},
					Addresses: f.Addresses, Flows: f.Flows, Since: f.Since,
				})
			}
		}
	}
	if s.Echo != nil {
		for _, f := range s.Echo.Findings {
			if fits(*f.Service) {
				out = append(out, Finding{Finding: f.Finding, Addresses: f.Addresses, Since: f.Since})
			}
		}
	}
	return out
}
