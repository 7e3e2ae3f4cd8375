package nftables

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/natlens/natlens/pkg/internal/nfnetlink"
	"github.com/natlens/natlens/pkg/netfilter"
)

// Live reads the tables "ip kube-proxy" and "ip6 kube-proxy", which kube-proxy's
// nftables mode writes, straight from the kernel's nf_tables over netlink. It
// runs no program, takes no lock, creates nothing and zeroes no counter. It
// needs the capability NET_ADMIN, and nothing else.
//
// Of other programs' tables it reads the chains by which they can decide where
// connections go, ahead of kube-proxy's or beside them: nat chains at prerouting and
// output, and notrack. One of family inet is "inet NAME", once for each family.
//
// It returns what [Parse] makes of "nft -nn -j list table" of the same tables.
// What it does not understand is netfilter.Unknown or netfilter.UnknownTarget,
// with a text {"undecoded": …} that names the expression.
//
// The zero value is ready for use; not safe for concurrent use.
type Live struct {
	follower nfnetlink.Follower
	stepper  liveStepper
}

// Read reads the tables in the network namespace of the calling thread. A table
// that is not there is no error. Read starts again when something changed
// meanwhile; if the rules keep changing, the result is Torn. An error means that
// nothing could be read, and wraps the kernel's error number.
func (l *Live) Read(ctx context.Context) (*netfilter.Ruleset, error) {
	var once Live
	defer once.Close()
	return once.Refresh(ctx)
}

// Refresh returns what Read would, but reads only what can have changed since the
// last Refresh, and returns the very ruleset of the last time when nothing has.
// What has not changed is shared with it: chains keep their version, and sets are
// the same. The first call ties it to the network namespace of the calling
// thread.
//
// kube-proxy's rules have no counters, but those of a rule that has are read, too.
func (l *Live) Refresh(ctx context.Context) (*netfilter.Ruleset, error) {
	l.follower.Stepper = &l.stepper
	return l.follower.Refresh(ctx)
}

// Moved reports whether the rules have changed since the last Refresh, or could
// not be asked for. It takes some three microseconds.
func (l *Live) Moved() bool { return l.follower.Moved() }

// AsOf returns the generation of nf_tables that the last Refresh returned as a whole,
// which is the same for all its tables; ok is false when there was none.
func (l *Live) AsOf() (generation uint32, ok bool) { return l.follower.AsOf() }

// Close gives back what Refresh keeps for the next time.
func (l *Live) Close() error {
	l.follower.Stepper = &l.stepper
	return l.follower.Close()
}

// liveStepper reads the tables of kube-proxy of one namespace, and keeps them for
// the next step. It implements nfnetlink.Stepper. It leaves out nothing that
// could have changed, so that Changes is as good as Everything.
type liveStepper struct {
	rules  *netfilter.Ruleset // of the last step; its tables are those of tables, then of others
	tables []*liveTable
	others []*foreignTable

	ctx  context.Context // of the step at hand
	conn *nfnetlink.Conn
	// interrupted says that something changed during a dump, or was gone.
	interrupted atomic.Bool
}

// Forget implements nfnetlink.Stepper.
func (s *liveStepper) Forget() { s.rules, s.tables, s.others = nil, nil, nil }

// Step implements nfnetlink.Stepper.
func (s *liveStepper) Step(ctx context.Context, conn *nfnetlink.Conn, step nfnetlink.Step) (rs *netfilter.Ruleset, interrupted, pruned bool, err error) {
	s.ctx, s.conn = ctx, conn
	s.interrupted.Store(false)
	switch step {
	case nfnetlink.First, nfnetlink.Glance:
		return s.rules, false, false, nil // nobody can ask for any, and all changes are quick to read
	case nfnetlink.Counters:
		rs, err = s.recount()
	default:
		rs, err = s.read()
	}
	if err != nil {
		s.Forget() // half a step is none
		return nil, false, false, err
	}
	return rs, s.interrupted.Load(), false, nil
}

// read reads both tables.
func (s *liveStepper) read() (*netfilter.Ruleset, error) {
	next := &netfilter.Ruleset{}
	before := s.tables
	s.tables = nil
	for _, f := range []struct {
		proto  uint8
		family netfilter.Family
	}{{unix.NFPROTO_IPV4, netfilter.IPv4}, {unix.NFPROTO_IPV6, netfilter.IPv6}} {
		b, err := s.conn.Get(unix.NFT_MSG_GETTABLE, f.proto, nfnetlink.AppendString(nil, nftaTableName, kubeProxyTable))
		if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.EAFNOSUPPORT) {
			continue
		}
		if err != nil {
			return nil, err
		}
		const dormant = 1 // NFT_TABLE_F_DORMANT
		var a [nftaTableHandle + 1][]byte
		nfnetlink.Collect(b, a[:])
		if flags, _ := nfnetlink.Uint32(a[nftaTableFlags]); flags&dormant != 0 {
			next.Unreadable = append(next.Unreadable, netfilter.Unreadable{Family: f.family, Table: kubeProxyTable, Reason: fmt.Sprintf(
				"the nf_tables table %q of %v is dormant: its rules are switched off, which kube-proxy does not do: another program did it, see nft list table", kubeProxyTable, f.family)})
			continue
		}
		handle, _ := nfnetlink.Uint64(a[nftaTableHandle])
		t := newLiveTable(f.family, f.proto)
		if i := slices.IndexFunc(before, func(t *liveTable) bool { return t.proto == f.proto }); i >= 0 {
			t = before[i]
		}
		if handle != t.handle {
			t.madeAnew(handle)
		}
		if err := s.table(t); err != nil {
			return nil, err
		}
		s.tables = append(s.tables, t)
		next.Tables = append(next.Tables, t.last)
	}
	if err := s.foreign(next); err != nil {
		return nil, err
	}
	if s.rules == nil || !slices.Equal(next.Tables, s.rules.Tables) || !slices.Equal(next.Unreadable, s.rules.Unreadable) {
		s.rules = next
	}
	return s.rules, nil
}

// table reads one table.
func (s *liveStepper) table(t *liveTable) error {
	t.renew()
	t.begin()
	var setsErr error
	var both sync.WaitGroup
	both.Go(func() { setsErr = s.sets(s.conn.Second(), t) })
	// The kernel walks a table's rules from the first for each 32 KiB of a dump
	// (__nf_tables_dump_rules in net/netfilter/nf_tables_api.c). With two rules
	// for a Service, it does not yet matter at 10,000 of them.
	err := s.dump(s.conn, unix.NFT_MSG_GETRULE, t.proto, nfnetlink.AppendString(nil, nftaRuleTable, kubeProxyTable), t.addRule)
	both.Wait()
	if err := errors.Join(err, setsErr); err != nil {
		return err
	}
	t.endRules()
	t.declare()
	if err := s.anonymous(t); err != nil {
		return err
	}
	t.decodeRules()
	t.decodeOthers()
	filled := t.filled()
	for _, k := range t.listed {
		// What packets added is nothing for a new client.
		if k.mayBeFilled() && !k.broken && !filled[k.name] {
			if err := s.elements(s.conn, t, k); err != nil {
				return err
			}
		}
	}
	t.decodeSets(filled)
	s.end(t)
	return nil
}

// end ends a step of a table.
func (s *liveStepper) end(t *liveTable) (differs bool) {
	if t.changed {
		s.interrupted.Store(true)
	}
	return t.end()
}

// recount reads the chains that have counters, which are those of another
// program.
func (s *liveStepper) recount() (*netfilter.Ruleset, error) {
	for i, t := range s.tables {
		counting := t.counting()
		if counting == nil {
			continue
		}
		t.begin()
		for _, name := range counting {
			request := nfnetlink.AppendString(nil, nftaRuleTable, kubeProxyTable)
			if err := s.dump(s.conn, unix.NFT_MSG_GETRULE, t.proto, nfnetlink.AppendString(request, nftaRuleChain, name), t.addRule); err != nil {
				return nil, err
			}
		}
		t.endRules()
		if err := s.anonymous(t); err != nil {
			return nil, err
		}
		if t.decodeRules() {
			s.interrupted.Store(true)
		}
		if s.end(t) {
			next := *s.rules
			next.Tables = slices.Clone(next.Tables)
			next.Tables[i] = t.last
			s.rules = &next
		}
	}
	return s.rules, nil
}

// dump is Conn.Dump, but neither an interrupted dump nor an object that is gone
// is an error yet.
func (s *liveStepper) dump(conn *nfnetlink.Conn, kind int, proto uint8, attrs []byte, each func([]byte)) error {
	if err := s.ctx.Err(); err != nil {
		return err
	}
	err := conn.Dump(kind, proto, attrs, func(b []byte) error {
		each(b)
		return nil
	})
	if errors.Is(err, nfnetlink.ErrInterrupted) || errors.Is(err, syscall.ENOENT) {
		s.interrupted.Store(true)
		return nil
	}
	return err
}

// sets reads which chains and named sets there are, and the elements of sets that
// packets cannot add to.
func (s *liveStepper) sets(conn *nfnetlink.Conn, t *liveTable) error {
	// A dump of chains is one of all tables of the family.
	if err := s.dump(conn, unix.NFT_MSG_GETCHAIN, t.proto, nil, t.addChain); err != nil {
		return err
	}
	if err := s.dump(conn, unix.NFT_MSG_GETSET, t.proto, nfnetlink.AppendString(nil, nftaSetTable, kubeProxyTable), t.addSet); err != nil {
		return err
	}
	for _, k := range t.listed {
		if !k.mayBeFilled() && !k.broken {
			if err := s.elements(conn, t, k); err != nil {
				return err
			}
		}
	}
	return nil
}

// elements reads the elements of a named set.
func (s *liveStepper) elements(conn *nfnetlink.Conn, t *liveTable, k *known) error {
	t.beginElements(k)
	err := s.elementsOf(conn, t.proto, kubeProxyTable, k.name, t.addElements)
	t.endElements(k)
	return err
}

// elementsOf reads the elements of a set.
func (s *liveStepper) elementsOf(conn *nfnetlink.Conn, proto uint8, table, name string, each func(list []byte)) error {
	return s.dump(conn, unix.NFT_MSG_GETSETELEM, proto, ofSet(table, name), func(b []byte) { each(listOf(b)) })
}

// ofSet are attributes that name a set, to ask for its elements.
func ofSet(table, name string) []byte {
	b := nfnetlink.AppendString(nil, unix.NFTA_SET_ELEM_LIST_TABLE, table)
	return nfnetlink.AppendString(b, unix.NFTA_SET_ELEM_LIST_SET, name)
}

// listOf returns the elements of a message.
func listOf(b []byte) []byte {
	var a [unix.NFTA_SET_ELEM_LIST_ELEMENTS + 1][]byte
	nfnetlink.Collect(b, a[:])
	return a[unix.NFTA_SET_ELEM_LIST_ELEMENTS]
}

// anonymous reads the anonymous sets that the rules at hand ask.
func (s *liveStepper) anonymous(t *liveTable) error {
	all := t.wantedSets()
	if err := s.describe(t, all); err != nil {
		return err
	}
	// Nearly all the time is the kernel's, which answers two at the same time.
	const many = 50 // sets, for which a second worker is worth its start
	conns := []*nfnetlink.Conn{s.conn, s.conn.Second()}
	if len(all) < many || runtime.GOMAXPROCS(0) == 1 {
		conns = conns[:1]
	}
	var next atomic.Int64
	var workers sync.WaitGroup
	errs := make([]error, len(conns))
	for i, conn := range conns {
		workers.Go(func() {
			for n := next.Add(1) - 1; int(n) < len(all) && errs[i] == nil; n = next.Add(1) - 1 {
				if all[n].set != nil {
					errs[i] = s.fill(conn, t.proto, all[n])
				}
			}
		})
	}
	workers.Wait()
	for _, w := range all {
		if w.set != nil {
			t.decode.sets[w.name] = w.set
		}
	}
	return errors.Join(errs...)
}

// describe asks for what the anonymous sets are, one by one when they are few.
func (s *liveStepper) describe(t *liveTable, all []*wanted) error {
	const few = 100
	if len(all) > few {
		byName := make(map[string]*wanted, len(all))
		for _, w := range all {
			byName[w.name] = w
		}
		return s.dump(s.conn, unix.NFT_MSG_GETSET, t.proto, nfnetlink.AppendString(nil, nftaSetTable, kubeProxyTable), func(b []byte) {
			var a setAttrs
			nfnetlink.Collect(b, a[:])
			if w := byName[string(nfnetlink.String(a[nftaSetName]))]; w != nil && string(nfnetlink.String(a[nftaSetTable])) == kubeProxyTable {
				w.set = newLiveSet(&a)
			}
		})
	}
	for _, w := range all {
		request := nfnetlink.AppendString(nil, nftaSetTable, kubeProxyTable)
		b, err := s.conn.Get(unix.NFT_MSG_GETSET, t.proto, nfnetlink.AppendString(request, nftaSetName, w.name))
		if errors.Is(err, syscall.ENOENT) {
			s.interrupted.Store(true)
			continue
		}
		if err != nil {
			return err
		}
		var a setAttrs
		nfnetlink.Collect(b, a[:])
		w.set = newLiveSet(&a)
	}
	return nil
}

// fill reads the elements of an anonymous set, or only those that its rule asks
// for.
func (s *liveStepper) fill(conn *nfnetlink.Conn, proto uint8, w *wanted) error {
	if w.countable() {
		ok, err := s.numbers(conn, proto, w)
		if ok || err != nil {
			return err
		}
	}
	w.set.raw, w.set.first, w.set.numbers = nil, 0, 0
	return s.elementsOf(conn, proto, kubeProxyTable, w.name, func(list []byte) { w.set.raw = append(w.set.raw, list...) })
}

// numbers asks a map for each of its numbers. It returns false when it does not
// have all of them.
func (s *liveStepper) numbers(conn *nfnetlink.Conn, proto uint8, w *wanted) (ok bool, err error) {
	if err := s.ctx.Err(); err != nil {
		return false, err
	}
	const size = 80 // of an element, about
	w.set.raw = make([]byte, 0, size*w.numbers)
	w.set.first, w.set.numbers = w.first, w.numbers
	head := ofSet(kubeProxyTable, w.name)
	for at := uint32(0); at < w.numbers; at += nfnetlink.MostAtOnce {
		n := min(w.numbers-at, nfnetlink.MostAtOnce)
		request := appendKeys(slices.Clone(head), w.first+at, n)
		err := conn.GetMany(unix.NFT_MSG_GETSETELEM, proto, request, int(n), func(b []byte) {
			w.set.raw = append(w.set.raw, listOf(b)...)
		})
		// The kernel is short of memory for answers, or does not have the question.
		if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.EOPNOTSUPP) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
	}
	return true, nil
}

// appendKeys appends n elements with the numbers from first on as keys, to ask a
// map for them.
func appendKeys(b []byte, first, n uint32) []byte {
	const header, word = 4, 4 // of an attribute; a number
	const nested = 1 << 15    // NLA_F_NESTED
	native := binary.NativeEndian
	open := func(size, typ uint32) {
		b = native.AppendUint16(native.AppendUint16(b, uint16(size)), uint16(typ))
	}
	const value = header + word
	const key, elem = header + value, 2*header + value
	open(header+n*elem, unix.NFTA_SET_ELEM_LIST_ELEMENTS|nested)
	for i := range n {
		open(elem, nftaListElem|nested)
		open(key, nftaElemKey|nested)
		open(value, nftaDataValue)
		b = native.AppendUint32(b, first+i)
	}
	return b
}
