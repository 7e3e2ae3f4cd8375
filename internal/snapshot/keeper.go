package snapshot

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/natlens/natlens/internal/observed"
	"github.com/natlens/natlens/internal/signal"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
)

// Reader reads all rules of the node. It is called by one goroutine at a time.
type Reader interface {
	// Read returns the rules as of now. It may return the very ruleset of the
	// last time when nothing has moved, nor any counter.
	Read(ctx context.Context) (*netfilter.Ruleset, error)
}

// Keeper reads the node again and again, and keeps the latest snapshot.
type Keeper struct {
	Reader   Reader
	Node     func() (chain.Node, error) // asked before each reading: addresses come and go
	Name     string                     // of the node
	Backend  string                     // for Build
	Interval time.Duration              // from the end of one reading to the start of the next, unless rules move
	Log      *slog.Logger
	// Moved reports whether rules have changed since the last reading, as far as
	// can be told at next to no cost; nil for never.
	Moved func() bool
	// First is told, ahead of each reading, the chains of the Services that the API
	// has changed of late: a reader that takes long looks at those first. Nil where
	// all is read at once.
	First func(chains []string)
	// Sleep waits for so long, at less cost than a timer, since seven times a second;
	// nil for a timer. Wake ends it, for news of the API; others wait until it is over.
	Sleep func(time.Duration)
	Wake  func()
	// API is what the rules are compared with; nil for nothing. A difference is a
	// finding after Grace; what the rules alone show, after a few seconds at most.
	API   API
	Grace time.Duration
	// Followed is told how long the rules took to follow a change of the API.
	Followed func(time.Duration)
	// Flows tells which connections are tracked, and Pins whom session affinity
	// binds; nil for nobody. FlowPause is the time from the end of one look at them
	// to the start of the next, at least; after endpoints have gone, a part of it is.
	Flows     FlowReader
	Pins      observed.PinReader
	FlowPause time.Duration
	// Echo connects to Services and tells who answers; nil for nothing.
	Echo Echo

	comparer
	observer
	current atomic.Pointer[Snapshot]
	reads   atomic.Uint64
	failed  atomic.Uint64
	changes atomic.Uint64
	movedAt time.Time     // when Run last saw that rules had moved
	newsAt  time.Time     // when it last saw that the API wants something else
	wanted  signal.Signal // the API wants something else
	counted signal.Signal // somebody reads what the rules have counted
	foundAt time.Time     // when a reading last found others than the one before

	mu      sync.Mutex
	waiting map[*signal.Signal]bool
}

// busyShare bounds the part of the time that is spent reading rules that have moved,
// and that for reading all others: the pause between two of a kind is at least so
// many times as long as the reading was.
const busyShare = 10

// countShare does so for readings that find nothing but counters, while no rule
// has moved for a while; mostCountRest bounds that pause. While nobody reads what
// was counted, it is longer.
const (
	countShare    = 5000
	mostCountRest = time.Minute
	unreadCounts  = 4 // times
)

// mostRest bounds that pause where rules have moved: a reading of nearly all of a
// large table is not to keep the next small change waiting.
const mostRest = 5 * time.Second

// How often the reader is asked whether rules have moved. The question takes
// microseconds, but waking up costs up to a fifth of a millisecond. So it is asked
// often only for a while after rules have moved, since changes come in bursts, and
// after the API has changed, since rules follow it. While that tells what is to come,
// it is asked the more rarely otherwise.
const (
	pollPause = 140 * time.Millisecond
	pollSoon  = 20 * time.Millisecond
	pollTold  = 200 * time.Millisecond
	burst     = 10 * time.Second
)

// Snapshot returns the latest snapshot; nil before the first reading worked.
func (k *Keeper) Snapshot() *Snapshot { return k.current.Load() }

// Reads returns how many readings worked and failed since the start.
func (k *Keeper) Reads() (ok, failed uint64) { return k.reads.Load(), k.failed.Load() }

// Changes returns how many readings found other rules than the one before.
func (k *Keeper) Changes() uint64 { return k.changes.Load() }

// Run reads until the context ends: whenever rules have moved, when a difference
// may count, and at each interval for what the rules have counted.
func (k *Keeper) Run(ctx context.Context) {
	k.tracker.Grace = k.Grace
	var wg sync.WaitGroup
	defer wg.Wait()
	if k.API != nil {
		wg.Go(func() { k.keepConfirmed(ctx) })
		wg.Go(func() { k.heedAPI(ctx) })
	}
	if k.Flows != nil {
		wg.Go(func() { k.watchTraffic(ctx) })
	}
	for moved := false; ctx.Err() == nil; {
		start := time.Now()
		_ = k.Refresh(ctx) // logged, and shown in every output
		if s := k.current.Load(); s != nil && !s.Stale && s.Rules.Partly {
			continue // findings about rules of different age are not to last
		}
		moved = k.pause(ctx, k.restsAfter(time.Since(start), moved))
	}
}

// rests are the pauses after a reading, from the shortest to the longest.
type rests struct {
	moved time.Duration // when rules have moved
	due   time.Duration // when a difference may count
	read  time.Duration // when somebody reads what they have counted
	quiet time.Duration // when nothing happens
}

// restsAfter returns those after a reading that took so long. Unless rules had moved
// ahead of that, too, they are read at once when they do.
func (k *Keeper) restsAfter(took time.Duration, moved bool) rests {
	least := busyShare * took
	counts := k.countRest(took)
	read := max(k.Interval, least, counts)
	told := max(k.untilTold(unreadCounts*read), least)
	out := rests{due: min(least, mostRest), read: min(read, told), quiet: min(max(read, unreadCounts*counts), told)}
	if moved {
		out.moved = out.due
	}
	return out
}

// Counted says that somebody reads what the rules have counted, which is read more
// rarely while nobody does.
func (k *Keeper) Counted() { k.counted.Wake() }

// holds is how long a new finding about the rules alone is kept back.
func (k *Keeper) holds() time.Duration { return min(k.Grace, settled) }

// untilTold is the time until a finding is told that is kept back; otherwise, if
// there is none.
func (k *Keeper) untilTold(otherwise time.Duration) time.Duration {
	if s := k.current.Load(); s != nil && !s.Stale {
		if since := s.heldSince(); !since.IsZero() {
			return time.Until(since.Add(k.holds()))
		}
	}
	return otherwise
}

// countRest returns how long counters may rest after a reading that took so long;
// 0 for no longer than other rules.
func (k *Keeper) countRest(took time.Duration) time.Duration {
	s := k.current.Load()
	// What has moved is confirmed within a minute, by a reading too.
	if k.Moved == nil || s == nil || s.Stale || s.hasLegacy() || time.Since(k.foundAt) < mostCountRest || time.Since(k.movedAt) < mostCountRest {
		return 0
	}
	return min(countShare*took, mostCountRest)
}

// pause waits for a quiet rest, or for a shorter one until rules have moved, a
// difference may count or somebody reads what was counted. Meanwhile it takes in
// what the API and the probes tell. It reports whether rules have moved.
func (k *Keeper) pause(ctx context.Context, rests rests) (moved bool) {
	start, long := time.Now(), rests.quiet
	look := start.Add(max(rests.moved, k.step(long))) // when to ask whether rules have moved
	var recheck time.Time                             // when to compare with the API; zero for not at all
	changed := k.changed()
	for {
		next := look
		if !recheck.IsZero() && recheck.Before(look) {
			next = recheck
		}
		switch k.nap(ctx, time.Until(next), changed) {
		case newsOfAPI:
			k.newsAt = time.Now()
			changed, recheck = nil, k.recheckAt(k.newsAt)
			if soon := k.newsAt.Add(pollSoon); k.Moved != nil && soon.Before(look) && soon.After(start.Add(rests.moved)) {
				look = soon
			}
		case newsOfEcho:
			k.echoed()
		case newsOfDue:
			long, look = rests.due, start.Add(rests.due)
		case newsOfReader:
			long = min(long, rests.read)
		}
		if ctx.Err() != nil {
			return false
		}
		now := time.Now()
		if !recheck.IsZero() && !now.Before(recheck) {
			k.recheck()
			k.rechecked = time.Now()
			changed, recheck = k.changed(), time.Time{}
		}
		if now.Before(look) {
			continue
		}
		left := long - now.Sub(start)
		if left <= 0 {
			return false
		}
		if k.Moved != nil && k.Moved() {
			k.movedAt = now
			return true
		}
		look = now.Add(min(k.step(left), left))
	}
}

// news is what ends a nap early.
type news int

const (
	noNews       news = iota
	newsOfAPI         // the API wants something else
	newsOfEcho        // a probe has told something
	newsOfDue         // a difference may count, if it is still there
	newsOfReader      // somebody reads what was counted
)

// nap waits for so long, or until there is news; see Sleep.
func (k *Keeper) nap(ctx context.Context, d time.Duration, changed <-chan struct{}) news {
	if k.Sleep != nil && d <= pollTold {
		if n := k.news(changed); n != noNews {
			return n
		}
		k.Sleep(d)
		return k.news(changed)
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-changed:
		return newsOfAPI
	case <-k.echoes():
		return newsOfEcho
	case <-k.ripe.C():
		return newsOfDue
	case <-k.counted.C():
		return newsOfReader
	case <-ctx.Done():
	case <-timer.C:
	}
	return noNews
}

// news tells what there is, without waiting.
func (k *Keeper) news(changed <-chan struct{}) news {
	select {
	case <-changed:
		return newsOfAPI
	case <-k.echoes():
		return newsOfEcho
	case <-k.ripe.C():
		return newsOfDue
	case <-k.counted.C():
		return newsOfReader
	default:
		return noNews
	}
}

// changed gets a value when the API wants something else.
func (k *Keeper) changed() <-chan struct{} { return k.wanted.C() }

// heedAPI has pause take in each change of the API, or several together, at once.
func (k *Keeper) heedAPI(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.API.Changed():
		}
		k.wanted.Wake()
		if k.Wake != nil {
			k.Wake()
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pollSoon):
		}
	}
}

// step returns how long to wait before the next look, when nothing is expected
// for so long.
func (k *Keeper) step(long time.Duration) time.Duration {
	switch {
	case k.Moved == nil:
		return long
	case time.Since(k.movedAt) < burst || time.Since(k.newsAt) < burst:
		return pollSoon
	case k.told():
		return pollTold
	}
	return pollPause
}

// told reports whether the API tells of what kube-proxy is to write.
func (k *Keeper) told() bool {
	if k.API == nil {
		return false
	}
	s := k.API.Status()
	return s.Synced && s.Error == ""
}

// Refresh reads once. When that fails, the last good snapshot stays, marked
// stale.
func (k *Keeper) Refresh(ctx context.Context) error {
	start := time.Now()
	last := k.current.Load()
	next, err := k.read(ctx, last, start)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		k.failed.Add(1)
		k.Log.Error("reading the rules failed", "error", err, "kept", last != nil)
		if last != nil {
			old := *last
			old.Stale, old.Error, old.Checked = true, err.Error(), start
			k.publish(&old, !last.Stale)
		}
		return err
	}
	k.reads.Add(1)
	next.Took = time.Since(start)
	changed := last == nil || last.Version != next.Version
	if changed {
		k.foundAt = next.Time
	}
	if last != nil {
		next.hold(last, k.holds())
	}
	k.compared(next)
	k.observed(next)
	k.probed(next)
	if changed {
		if last != nil {
			k.changes.Add(1)
		}
		k.Log.Info("the rules changed", "services", len(next.Programmed.Services), "rules", next.Rules.RuleCount(), "findings", len(next.Findings()), "took", next.Took)
	}
	k.publish(next, last == nil || last.Version != next.Version || last.Stale)
	return nil
}

func (k *Keeper) read(ctx context.Context, last *Snapshot, now time.Time) (*Snapshot, error) {
	if k.First != nil {
		if k.API != nil && last != nil {
			k.ahead.note(k.API.Objects().Waiting(), last.Programmed, now)
		}
		k.First(k.ahead.chains(now))
	}
	rs, err := k.Reader.Read(ctx)
	if err != nil {
		return nil, err
	}
	node, err := k.Node()
	if err != nil {
		return nil, err
	}
	if last == nil {
		return Build(rs, node, k.Name, k.Backend, now), nil
	}
	return last.next(rs, node, now), nil
}

// publish makes a snapshot the current one, and wakes who waits for news.
func (k *Keeper) publish(s *Snapshot, news bool) {
	k.current.Store(s)
	if !news {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for who := range k.waiting {
		who.Wake()
	}
}

// Subscribe returns a channel that gets a value after each snapshot that says
// something new, and a function to end it.
func (k *Keeper) Subscribe() (news <-chan struct{}, end func()) {
	who := &signal.Signal{}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.waiting == nil {
		k.waiting = map[*signal.Signal]bool{}
	}
	k.waiting[who] = true
	return who.C(), func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.waiting, who)
	}
}
