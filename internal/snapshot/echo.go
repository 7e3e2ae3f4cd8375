package snapshot

import (
	"time"

	"github.com/natlens/natlens/internal/monitor"
	"github.com/natlens/natlens/pkg/chain"
)

// Echo is the echo monitor.
type Echo interface {
	// See is told what each good reading of the rules found, and when it began.
	See(p *chain.Programmed, began time.Time)
	State() *monitor.State
	// Changed gets a value after the state has changed.
	Changed() <-chan struct{}
}

// probed brings what the echo monitor has found up to date.
func (k *Keeper) probed(s *Snapshot) {
	if k.Echo == nil {
		return
	}
	if !s.Stale && !s.Rules.Torn && !s.Rules.Partly {
		k.Echo.See(s.Programmed, s.Time)
	}
	k.takeEcho(s)
}

func (k *Keeper) takeEcho(s *Snapshot) {
	now := k.Echo.State()
	if s.Echo != nil && s.Echo.News != now.News {
		s.Version++
	}
	s.Echo = now
}

// echoed publishes what the last probe told.
func (k *Keeper) echoed() {
	last := k.current.Load()
	if last == nil {
		return
	}
	next := *last
	if began := time.Now(); k.unmoved(last) {
		k.Echo.See(last.Programmed, began)
	}
	k.takeEcho(&next)
	k.publish(&next, next.Version != last.Version)
}

// unmoved reports whether the rules are known to be those of the snapshot still:
// what was read of nf_tables holds while nothing moves.
func (k *Keeper) unmoved(s *Snapshot) bool {
	return k.Moved != nil && !s.Stale && !s.Rules.Torn && !s.hasLegacy() && !k.Moved()
}

// echoes gets a value after each probe; nil without a monitor.
func (k *Keeper) echoes() <-chan struct{} {
	if k.Echo == nil {
		return nil
	}
	return k.Echo.Changed()
}
