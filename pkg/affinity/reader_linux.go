package affinity

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/natlens/natlens/pkg/internal/nfnetlink"
	"github.com/natlens/natlens/pkg/netfilter"
)

// Reader reads the lists of one network namespace, which has to be that of the
// calling thread. The zero value is ready; not safe for concurrent use.
type Reader struct {
	conn  *nfnetlink.Conn // to the kernel's sets; nil until they are asked for
	buf   []byte          // reused
	size  int             // of xt_recent's lists; 0 until known
	clock ticks
	asked time.Time // the clock
}

// Read tells how many clients are bound to the endpoint that a chain sends to.
// ok is false when the chain binds none, or its list is not there.
func (r *Reader) Read(t *netfilter.Table, c *netfilter.Chain, timeout time.Duration) (l List, ok bool, err error) {
	if t.Backend == netfilter.BackendNFTables {
		// kube-proxy names both alike (newEndpointInfo in pkg/proxy/nftables/proxier.go).
		name, ok := strings.CutPrefix(c.Name, "endpoint-")
		if !ok {
			return l, false, nil
		}
		return r.set(t, "affinity-"+name)
	}
	for i := range c.Len() {
		for _, e := range c.Rule(i) {
			if e.Kind == netfilter.Recent && e.N&netfilter.RecentSet != 0 {
				return r.recent(listName(c.Text(e)), timeout)
			}
		}
	}
	return l, false, nil
}

// Close gives back what is kept for the next Read.
func (r *Reader) Close() error {
	if r.conn == nil {
		return nil
	}
	err := r.conn.Close()
	r.conn = nil
	return err
}

// mostList bounds what is read of a list: with its usual size, the kernel writes
// 30 KB at most.
const mostList = 1 << 20

func (r *Reader) recent(name string, timeout time.Duration) (l List, ok bool, err error) {
	if filepath.Base(name) != name {
		return l, false, nil
	}
	f, err := os.Open("/proc/thread-self/net/xt_recent/" + name)
	if errors.Is(err, fs.ErrNotExist) {
		return l, false, nil
	}
	if err != nil {
		return l, false, fmt.Errorf("reading whom session affinity binds: %w", err)
	}
	defer f.Close()
	if err := r.time(); err != nil {
		return l, false, err
	}
	b := bytes.NewBuffer(r.buf[:0])
	_, err = b.ReadFrom(io.LimitReader(f, mostList))
	r.buf = b.Bytes()
	if err != nil {
		return l, false, fmt.Errorf("reading whom session affinity binds: %w", err)
	}
	return parseRecent(r.buf, r.size, timeout, r.clock), true, nil
}

// time asks for the kernel's clock, and the first time for the size of its lists.
func (r *Reader) time() error {
	const good = 100 * time.Millisecond
	if time.Since(r.asked) < good {
		return nil
	}
	var now, step unix.Timespec
	if err := errors.Join(unix.ClockGettime(unix.CLOCK_MONOTONIC, &now), unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &step)); err != nil {
		return fmt.Errorf("asking for the kernel's clock: %w", err)
	}
	if step.Nano() <= 0 {
		return errors.New("asking for the kernel's clock: it has no resolution")
	}
	r.clock, r.asked = ticksAt(time.Duration(now.Nano()), time.Duration(step.Nano())), time.Now()
	if r.size == 0 {
		r.size = listSize
		text, err := os.ReadFile("/sys/module/xt_recent/parameters/ip_list_tot")
		if n, bad := strconv.Atoi(strings.TrimSpace(string(text))); err == nil && bad == nil && n > 0 {
			r.size = n
		}
	}
	return nil
}

// set counts the elements of a set. The kernel leaves out those whose time has
// passed.
func (r *Reader) set(t *netfilter.Table, name string) (l List, ok bool, err error) {
	if r.conn == nil {
		if r.conn, err = nfnetlink.Open(); err != nil || r.conn == nil {
			return l, false, err
		}
	}
	attrs := nfnetlink.AppendString(nil, unix.NFTA_SET_ELEM_LIST_TABLE, t.Name)
	attrs = nfnetlink.AppendString(attrs, unix.NFTA_SET_ELEM_LIST_SET, name)
	proto := uint8(unix.NFPROTO_IPV4)
	if t.Family == netfilter.IPv6 {
		proto = unix.NFPROTO_IPV6
	}
	err = r.conn.Dump(unix.NFT_MSG_GETSETELEM, proto, attrs, func(b []byte) error {
		l.Clients += count(b)
		return nil
	})
	switch {
	case errors.Is(err, unix.ENOENT):
		return List{}, false, nil
	case err != nil && !errors.Is(err, nfnetlink.ErrInterrupted): // clients come and go
		return List{}, false, errors.Join(fmt.Errorf("reading whom session affinity binds: %w", err), r.Close())
	}
	return l, true, nil
}

// count returns the number of elements in a message of a set's dump.
func count(b []byte) int {
	var a [unix.NFTA_SET_ELEM_LIST_ELEMENTS + 1][]byte
	nfnetlink.Collect(b, a[:])
	n, list := 0, a[unix.NFTA_SET_ELEM_LIST_ELEMENTS]
	for {
		_, _, rest, ok := nfnetlink.Next(list)
		if !ok {
			return n
		}
		n, list = n+1, rest
	}
}
