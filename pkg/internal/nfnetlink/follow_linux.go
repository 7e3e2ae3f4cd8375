package nfnetlink

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

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
	// Glance: those changes that a glance shows, which a reader need not take.
	Glance
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
	generation uint32             // of the last that was read as a whole
	partly     bool               // last is what First or Glance returned
	torn       bool               // last is no ruleset that was ever there
	confirm    time.Time          // when everything has to be read again; zero for not at all
}

// Moved reports whether the rules have changed since the last Refresh. It takes
// some three microseconds, and is false before the first.
func (f *Follower) Moved() bool {
	if f.conn == nil {
		return f.last == nil && !f.absent
	}
	g, err := f.conn.Generation()
	return err != nil || f.last == nil || g != f.generation
}

// AsOf returns the generation of nf_tables that the last Refresh returned as a whole;
// ok is false when there was none.
func (f *Follower) AsOf() (generation uint32, ok bool) {
	return f.generation, f.last != nil && !f.absent
}

// Refresh returns the rules as of now. What it returned last time is returned
// again when nothing has moved. If the rules keep changing, the result is Torn. A
// part of what has changed, which is told early, is Partly.
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
	generation, err := f.conn.Generation()
	if err != nil {
		return nil, err
	}
	due := !f.confirm.IsZero() && time.Now().After(f.confirm)
	switch {
	case f.last == nil, due:
		// Once: a large table takes longer than a busy cluster stands still. What
		// changes meanwhile, the next step finds.
		f.confirm = time.Time{}
		if rs, err := f.step(ctx, Everything); rs != nil || err != nil {
			return rs, err
		}
	case generation == f.generation:
		if rs, err := f.step(ctx, Counters); rs != nil || err != nil {
			return rs, err
		}
	case f.last == f.stepped && !f.torn && !f.partly: // parts in a row would leave the rest out for long
		if rs, err := f.early(ctx); rs != nil || err != nil {
			return rs, err
		}
	}
	for range mostSteps {
		if rs, err := f.step(ctx, Changes); rs != nil || err != nil {
			return rs, err
		}
	}
	// The next Refresh reads the changes again.
	f.last, f.generation, f.torn = f.stepped, f.generation-1, true
	torn := *f.stepped
	torn.Torn = true
	return &torn, nil
}

// early returns a part of what has changed, if that is quick to tell; nil for none.
// The rest is left to the next Refresh, which is to come at once.
func (f *Follower) early(ctx context.Context) (*netfilter.Ruleset, error) {
	before := f.last
	for _, s := range []Step{First, Glance} {
		rs, err := f.step(ctx, s)
		if rs == nil || err != nil {
			return nil, err
		}
		if rs != before {
			f.partly = true
			part := *rs
			part.Partly = true
			return &part, nil
		}
	}
	return nil, nil
}

// mostSteps bounds the readings while the rules keep changing.
const mostSteps = 8

// step takes one step. It returns nil when the rules changed meanwhile.
//
// The kernel counts a new generation before it has taken all of the old rules out of
// its lists (nf_tables_commit in net/netfilter/nf_tables_api.c), and a dump that
// goes on in between may miss rules or show them twice. So the generation is
// asked for, then the transaction that may have brought it is waited for, and
// only then the dumps begin.
func (f *Follower) step(ctx context.Context, s Step) (*netfilter.Ruleset, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	before, err := f.conn.Generation()
	if err != nil {
		return nil, err
	}
	if s != Counters {
		if err := f.conn.Await(before); err != nil {
			return nil, err
		}
	}
	rs, interrupted, pruned, err := f.Stepper.Step(ctx, f.conn, s)
	if err != nil {
		return nil, err
	}
	f.stepped = rs
	if pruned && f.confirm.IsZero() {
		f.confirm = time.Now().Add(confirmAfter)
	}
	after, err := f.conn.Generation()
	if err != nil || interrupted || before != after {
		return nil, err
	}
	f.last = rs
	if s != First && s != Glance { // those leave the rest of the generation to others
		f.generation, f.partly, f.torn = after, false, false
	}
	return rs, nil
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
	conn, err := dial(unix.NFNL_SUBSYS_NFTABLES)
	if errors.Is(err, syscall.EPROTONOSUPPORT) { // a kernel without netfilter's netlink
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if ok, err := conn.supported(); err != nil || !ok {
		return nil, errors.Join(err, conn.Close())
	}
	if conn.second, err = dial(unix.NFNL_SUBSYS_NFTABLES); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

// supported reports whether the kernel has nf_tables at all. nfnetlink answers
// EINVAL for a subsystem that it does not have, but an old kernel, too, for a
// question that it does not know.
func (c *Conn) supported() (bool, error) {
	_, err := c.Generation()
	if !errors.Is(err, syscall.EINVAL) {
		return err == nil, err
	}
	err = c.Dump(unix.NFT_MSG_GETTABLE, unix.NFPROTO_IPV4, nil, func([]byte) error { return nil })
	if errors.Is(err, syscall.EINVAL) {
		return false, nil
	}
	if err == nil {
		err = errors.New("the kernel has no ruleset generations (Linux 3.18)")
	}
	return false, err
}
