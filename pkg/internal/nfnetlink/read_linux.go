package nfnetlink

import (
	"context"
	"errors"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/natlens/natlens/pkg/netfilter"
)

// quiet is how long the generation must have stood still for a single reading
// to be believed.
//
// The kernel counts a new generation a moment before it shows the new rules
// (nf_tables_commit in net/netfilter/nf_tables_api.c), and may be held up in
// between. A reading that begins in that moment sees the new number before and
// after, but some old rules and some new ones.
const quiet = 25 * time.Millisecond

// mostReadings bounds the readings while the rules keep changing.
const mostReadings = 8

// Read returns the rules of one moment that read finds in the nf_tables of the
// calling thread's network namespace; read says, too, whether something changed
// meanwhile, and is then called again. If the rules keep changing, the result
// is Torn. A kernel without nf_tables has none. An error wraps the kernel's
// error number, and names the capability that is missing.
func Read(ctx context.Context, read func(*Conn) (rs *netfilter.Ruleset, interrupted bool, err error)) (*netfilter.Ruleset, error) {
	rs, err := readSettled(ctx, read)
	if err != nil {
		return nil, explain(err)
	}
	return rs, nil
}

func readSettled(ctx context.Context, read func(*Conn) (*netfilter.Ruleset, bool, error)) (*netfilter.Ruleset, error) {
	conn, err := Open()
	if err != nil || conn == nil {
		return &netfilter.Ruleset{}, err
	}
	defer conn.Close()
	var rs *netfilter.Ruleset
	settled, err := conn.settle(ctx, func() (digest uint64, interrupted bool, err error) {
		if rs, interrupted, err = read(conn); err != nil {
			return 0, false, err
		}
		for _, t := range rs.Tables {
			digest = digest*31 + t.Digest()
		}
		return digest, interrupted, nil
	})
	if err != nil {
		return nil, err
	}
	rs.Torn = !settled
	return rs, nil
}

// settle calls read until what it read was the rules of one moment, and returns
// false when they kept changing. A reading is believed when the generation was
// the same before and behind it, no dump was interrupted, and it either began
// in a quiet time or agrees with the reading before. The digest that read
// returns must be the same for the same rules.
func (c *Conn) settle(ctx context.Context, read func() (digest uint64, interrupted bool, err error)) (settled bool, err error) {
	var last uint64
	agreeable := false // last is that of a reading without a visible change
	earlier, err := c.Generation()
	if err != nil {
		return false, err
	}
	for range mostReadings {
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-time.After(quiet):
		}
		before, err := c.Generation()
		if err != nil {
			return false, err
		}
		digest, interrupted, err := read()
		if err != nil {
			return false, err
		}
		after, err := c.Generation()
		if err != nil {
			return false, err
		}
		whole := before == after && !interrupted
		if whole && (earlier == before || agreeable && last == digest) {
			return true, nil
		}
		last, agreeable, earlier = digest, whole, after
	}
	return false, nil
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
