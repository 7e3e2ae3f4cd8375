package snapshot

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

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

	current atomic.Pointer[Snapshot]
	reads   atomic.Uint64
	failed  atomic.Uint64
	changes atomic.Uint64
	movedAt time.Time // when Run last saw that rules had moved

	mu      sync.Mutex
	waiting map[chan struct{}]bool
}

// busyShare bounds the part of the time that is spent reading: the pause after
// a reading is at least so many times as long as the reading was.
const busyShare = 10

// mostRest bounds that pause where rules have moved: the first reading of a large
// table is not to keep the next small change waiting.
const mostRest = 5 * time.Second

// How often the reader is asked whether rules have moved. The question takes
// microseconds, but waking up costs a fifth of a millisecond. So it is asked
// often only for a while after rules have moved: changes come in bursts.
const (
	pollPause = 100 * time.Millisecond
	pollSoon  = 20 * time.Millisecond
	burst     = 10 * time.Second
)

// Snapshot returns the latest snapshot; nil before the first reading worked.
func (k *Keeper) Snapshot() *Snapshot { return k.current.Load() }

// Reads returns how many readings worked and failed since the start.
func (k *Keeper) Reads() (ok, failed uint64) { return k.reads.Load(), k.failed.Load() }

// Changes returns how many readings found other rules than the one before.
func (k *Keeper) Changes() uint64 { return k.changes.Load() }

// Run reads until the context ends: whenever rules have moved, and at each
// interval for what they have counted.
func (k *Keeper) Run(ctx context.Context) {
	for ctx.Err() == nil {
		start := time.Now()
		_ = k.Refresh(ctx) // logged, and shown in every output
		rest := busyShare * time.Since(start)
		k.pause(ctx, min(rest, mostRest), max(k.Interval, rest))
	}
}

// pause waits for so long, or, after a rest, until rules have moved.
func (k *Keeper) pause(ctx context.Context, rest, long time.Duration) {
	start := time.Now()
	timer := time.NewTimer(max(rest, k.step(long)))
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		left := long - time.Since(start)
		if left <= 0 {
			return
		}
		if k.Moved != nil && k.Moved() {
			k.movedAt = time.Now()
			return
		}
		timer.Reset(min(k.step(left), left))
	}
}

// step returns how long to wait before the next look, when nothing is expected
// for so long.
func (k *Keeper) step(long time.Duration) time.Duration {
	switch {
	case k.Moved == nil:
		return long
	case time.Since(k.movedAt) < burst:
		return pollSoon
	}
	return pollPause
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
		if last != nil {
			k.changes.Add(1)
		}
		k.Log.Info("the rules changed", "services", len(next.Programmed.Services), "rules", next.Rules.RuleCount(), "findings", len(next.Since), "took", next.Took)
	}
	k.publish(next, changed || last.Stale)
	return nil
}

func (k *Keeper) read(ctx context.Context, last *Snapshot, now time.Time) (*Snapshot, error) {
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
	for c := range k.waiting {
		select {
		case c <- struct{}{}:
		default: // it has not taken the last news yet
		}
	}
}

// Subscribe returns a channel that gets a value after each snapshot that says
// something new, and a function to end it.
func (k *Keeper) Subscribe() (news <-chan struct{}, end func()) {
	c := make(chan struct{}, 1)
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.waiting == nil {
		k.waiting = map[chan struct{}]bool{}
	}
	k.waiting[c] = true
	return c, func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.waiting, c)
	}
}
