package nfnetlink

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/natlens/natlens/pkg/netfilter"
)

// confirmAfter is how long after a change at most a follower reads everything
// once more: shortcuts are not the last word.
const confirmAfter = 40 * time.Second

// Step is how much a [Follower] wants to be read.
type Step int

// The steps, from the dearest to the cheapest.
const (
	// Everything: all that there is.
	Everything Step = iota
	// Changes: what a transaction can have changed since the last step, as far as
	// can be told without reading everything. What was left out makes the reader
	// say so.
	Changes
	// First: those changes that the reader was asked to look at before the others.
	First
	// Counters: what can have counted since; the rules are those of the last step.
	Counters
)

// Stepper reads the rules of one namespace, over and over. It keeps what it
// read in the last step.
type Stepper interface {
	// Step reads as much. Interrupted says that something did not fit together
	// with the last step or within this one, so that the rules have changed
	// meanwhile; pruned, that something was taken to be as before without a look.
	// The result is the very ruleset of the last step where nothing differs.
	Step(ctx context.Context, conn *Conn, s Step) (rs *netfilter.Ruleset, interrupted, pruned bool, err error)
	// Forget makes the next step Everything.
	Forget()
}

// Follower reads the nf_tables of one namespace again and again, and reads only
// what can have moved. The zero value with a Stepper is ready; not safe for
// concurrent use.
type Follower struct {
	Stepper Stepper

	conn       *Conn
	absent     bool // the kernel has no nf_tables
	last       *netfilter.Ruleset
	stepped    *netfilter.Ruleset // of the last step, whether it was believed or not
	generation uint32             // of last
	seen       uint32             // the generation seen last, and when first
	since      time.Time
	confirm    time.Time // when everything has to be read again; zero for not at all
}

// Moved reports whether the rules have changed since the last Refresh. It takes
// some three microseconds, and is false before the first.
func (f *Follower) Moved() bool {
	if f.conn == nil {
		return f.last == nil && !f.absent
	}
	g, err := f.look()
	return err != nil || f.last == nil || g != f.generation
}

// look asks for the generation, and notes when it was first seen.
func (f *Follower) look() (uint32, error) {
	g, err := f.conn.Generation()
	if err == nil && (g != f.seen || f.since.IsZero()) {
		f.seen, f.since = g, time.Now()
	}
	return g, err
}

// Refresh returns the rules as of now. What it returned last time is returned
// again when nothing has moved. If the rules keep changing, the result is Torn.
// The first call ties the follower to the namespace of the calling thread. An
// error wraps the kernel's error number, and names the capability that is
// missing; the next call starts anew.
func (f *Follower) Refresh(ctx context.Context) (*netfilter.Ruleset, error) {
	rs, err := f.refresh(ctx)
	if err == nil {
		return rs, nil
	}
	if ctx.Err() == nil {
		f.forget()
	}
	return nil, explain(err)
}

// Close gives the connection back. A later Refresh starts anew.
func (f *Follower) Close() error {
	err := error(nil)
	if f.conn != nil {
		err = f.conn.Close()
	}
	f.conn = nil
	f.forget()
	return err
}

func (f *Follower) forget() {
	f.last, f.confirm = nil, time.Time{}
	f.Stepper.Forget()
}

func (f *Follower) refresh(ctx context.Context) (*netfilter.Ruleset, error) {
	if f.absent {
		return f.last, nil
	}
	if f.conn == nil {
		conn, err := Open()
		if err != nil {
			return nil, err
		}
		if f.conn = conn; conn == nil {
			f.absent, f.last = true, &netfilter.Ruleset{}
			return f.last, nil
		}
	}
	before, err := f.look()
	if err != nil {
		return nil, err
	}
	due := !f.confirm.IsZero() && time.Now().After(f.confirm)
	if f.last != nil && before == f.generation && !due {
		rs, moved, err := f.step(ctx, Counters)
		if err != nil || !moved {
			f.last = rs
			return rs, err
		}
	}
	if f.last == nil || due {
		// Once: a large table takes longer than a busy cluster stands still. What
		// changes meanwhile, the next step finds.
		if err := f.wait(ctx); err != nil {
			return nil, err
		}
		before, err := f.look()
		if err != nil {
			return nil, err
		}
		began := f.quiet()
		f.confirm = time.Time{}
		rs, moved, err := f.step(ctx, Everything)
		if err != nil {
			return nil, err
		}
		if !moved && began {
			return f.accept(rs, before), nil
		}
	}
	if f.last != nil && f.last == f.stepped && !due {
		if rs, err := f.first(ctx); rs != nil || err != nil {
			return rs, err
		}
	}
	return f.settle(ctx)
}

// first reads what the reader was asked to look at first, and returns nil when
// that has not changed. The other changes are left to the next Refresh: the
// generation stays that of the last complete reading.
func (f *Follower) first(ctx context.Context) (*netfilter.Ruleset, error) {
	if err := f.wait(ctx); err != nil {
		return nil, err
	}
	rs, moved, err := f.step(ctx, First)
	if err != nil || moved || rs == f.last {
		return nil, err
	}
	f.last = rs
	return rs, nil
}

// step takes one step, and reports whether the rules moved meanwhile.
func (f *Follower) step(ctx context.Context, s Step) (*netfilter.Ruleset, bool, error) {
	before, err := f.look()
	if err != nil {
		return nil, false, err
	}
	rs, interrupted, pruned, err := f.Stepper.Step(ctx, f.conn, s)
	if err != nil {
		return nil, false, err
	}
	f.stepped = rs
	after, err := f.look()
	if err != nil {
		return nil, false, err
	}
	if pruned && f.confirm.IsZero() {
		f.confirm = time.Now().Add(confirmAfter)
	}
	return rs, interrupted || before != after, nil
}

// settle reads the changes until what was read is the rules of one moment, as
// readSettled does.
func (f *Follower) settle(ctx context.Context) (*netfilter.Ruleset, error) {
	var last *netfilter.Ruleset // of a reading without a visible change
	for try := 1; ; try++ {
		if err := f.wait(ctx); err != nil {
			return nil, err
		}
		generation, err := f.look()
		if err != nil {
			return nil, err
		}
		began := f.quiet()
		rs, moved, err := f.step(ctx, Changes)
		if err != nil {
			return nil, err
		}
		if !moved && (began || last != nil && rs.SameRules(last)) {
			return f.accept(rs, generation), nil
		}
		if last = nil; !moved {
			last = rs
		}
		if try == mostReadings {
			torn := *rs
			torn.Torn = true
			f.accept(rs, 0) // so that the next Refresh reads the changes again
			return &torn, nil
		}
	}
}

// accept makes a ruleset the last one.
func (f *Follower) accept(rs *netfilter.Ruleset, generation uint32) *netfilter.Ruleset {
	f.last, f.generation = rs, generation
	return rs
}

// quiet reports whether the generation has stood still long enough; see quiet.
func (f *Follower) quiet() bool { return time.Since(f.since) >= quiet }

// wait waits until the generation may have stood still long enough.
func (f *Follower) wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(quiet - time.Since(f.since)):
		return nil
	}
}

// explain names the capability that is missing.
func explain(err error) error {
	if errors.Is(err, syscall.EPERM) {
		return fmt.Errorf("reading the kernel's nf_tables: permission denied: it needs the capability NET_ADMIN: %w", err)
	}
	return fmt.Errorf("reading the kernel's nf_tables: %w", err)
}

// Open connects to the calling thread's namespace; nil means that the kernel has
// no nf_tables.
func Open() (*Conn, error) {
	conn, err := dial()
	if errors.Is(err, syscall.EPROTONOSUPPORT) { // a kernel without netfilter's netlink
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if ok, err := conn.supported(); err != nil || !ok {
		return nil, errors.Join(err, conn.Close())
	}
	if conn.second, err = dial(); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}
