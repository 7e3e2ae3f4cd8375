package conntrack

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/natlens/natlens/pkg/internal/nfnetlink"
)

const messageGet = 1 // IPCTNL_MSG_CT_GET

// Reader reads the connections of one network namespace, that of the thread which
// calls Dump first. The zero value is ready; not safe for concurrent use.
type Reader struct {
	conn *nfnetlink.Conn
	all  bool // the kernel refuses to leave anything out
}

// Dump calls each with every connection of both families whose destination nat has
// rewritten. The flow is valid during the call only. It is no picture of one
// moment: what comes and goes meanwhile may be missing, or be told of twice. An error wraps the
// kernel's error number, and names the capability that is missing.
func (r *Reader) Dump(ctx context.Context, each func(*Flow)) error {
	err := r.dump(ctx, each)
	if err == nil || ctx.Err() != nil {
		return ctx.Err()
	}
	r.Close()
	return explain(err)
}

// explain names what is missing.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("reading the kernel's conntrack: permission denied: it needs the capability NET_ADMIN: %w", err)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EPROTONOSUPPORT):
		return fmt.Errorf("reading the kernel's conntrack: this kernel tells nothing of it over netlink (module nf_conntrack_netlink): %w", err)
	}
	return fmt.Errorf("reading the kernel's conntrack: %w", err)
}

// Close gives back what is kept for the next Dump, which starts anew.
func (r *Reader) Close() error {
	if r.conn == nil {
		return nil
	}
	err := r.conn.Close()
	r.conn = nil
	return err
}

func (r *Reader) dump(ctx context.Context, each func(*Flow)) error {
	if r.conn == nil {
		var err error
		if r.conn, err = nfnetlink.OpenConntrack(); err != nil {
			return err
		}
	}
	if !r.all {
		began := false
		err := r.ask(ctx, filter(), func(f *Flow) { began = true; each(f) })
		if began || !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
	}
	err := r.ask(ctx, nil, each)
	r.all = r.all || err == nil
	return err
}

// filter asks for connections with a rewritten destination. Kernels that do not
// know it tell of all.
func filter() []byte {
	return append(attr(attrStatus, number32(Redirected)...), attr(attrMask, number32(Redirected)...)...)
}

func (r *Reader) ask(ctx context.Context, attrs []byte, each func(*Flow)) error {
	var f Flow
	return r.conn.Dump(messageGet, unix.AF_UNSPEC, attrs, func(b []byte) error {
		if err := decode(b, &f); err != nil {
			return err
		}
		if f.Status&Redirected != 0 && f.Status&Dying == 0 {
			each(&f)
		}
		return ctx.Err()
	})
}
