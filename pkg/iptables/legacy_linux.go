package iptables

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/natlens/natlens/pkg/netfilter"
)

// Legacy reads the tables of the legacy backend from the kernel itself, by
// getsockopt(IPT_SO_GET_ENTRIES), as iptables-legacy-save does. It runs no
// program, takes no lock file and changes nothing. The zero value is ready.
//
// It needs the capability NET_ADMIN, no NET_RAW, and one of uid 0, group 0 and
// DAC_READ_SEARCH: the list of the tables that exist is a file of root's, and
// asking the kernel for a table that does not exist would create it.
//
// While it copies a table, the kernel lets nobody read or write one of the same
// family, in no network namespace: kube-proxy waits meanwhile. The time between
// two reads should be ten times what one takes, and at least some seconds.
type Legacy struct {
	buffer []byte // of mmap, kept for the next read
	seed   maphash.Seed
	last   *netfilter.Ruleset
	tables []*legacyTable // as last read, of both families
	counts []netfilter.Counter

	afterTable func(name string) // for tests: called when a table was read
}

// Numbers of linux/netfilter_ipv4/ip_tables.h, the same as in
// linux/netfilter_ipv6/ip6_tables.h, and of linux/netfilter/ipset/ip_set.h.
const (
	optGetInfo    = 64 // IPT_SO_GET_INFO
	optGetEntries = 65 // IPT_SO_GET_ENTRIES
	optIPSet      = 83 // SO_IP_SET

	sizeofGetEntries = 40 // struct ipt_get_entries, without the entries
	sizeofSetRequest = 40 // struct ip_set_req_get_set

	tableNameSize = 32 // XT_TABLE_MAXNAMELEN
)

const (
	// maxGrown bounds how often one table is asked for again because its size
	// changed between the two questions.
	maxGrown = 16
	// maxTable is beyond what the kernel itself allows (XT_MAX_TABLE_SIZE).
	maxTable = 1 << 30
	// hugePage is what the buffer grows by.
	hugePage = 2 << 20
)

// errGone says that a table is no longer there.
var errGone = errors.New("the table is gone")

// Read reads all legacy tables of both families of the network namespace that
// the calling thread is in. Where there is none, the result is empty. A table
// that cannot be read is in [netfilter.Ruleset.Unreadable]; an error means that
// nothing could be read at all. Not safe for concurrent use.
func (l *Legacy) Read(ctx context.Context) (*netfilter.Ruleset, error) {
	l.tables, l.last = nil, nil
	return l.Refresh(ctx)
}

// Refresh returns what Read would, and the very ruleset of the last time when
// nothing has moved. The kernel copies everything each time, but it is only
// decoded when it differs in more than counters. What has not changed is shared
// with the last result: chains keep their version. All calls must be of the same
// network namespace.
func (l *Legacy) Refresh(ctx context.Context) (*netfilter.Ruleset, error) {
	// All of it must be of one thread, and so of one namespace.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer l.lend()
	rs := &netfilter.Ruleset{}
	var failed []error
	for _, f := range []netfilter.Family{netfilter.IPv4, netfilter.IPv6} {
		one, err := l.readFamily(ctx, f)
		if err != nil {
			failed = append(failed, err)
			rs.Unreadable = append(rs.Unreadable, netfilter.Unreadable{Family: f, Table: "*", Reason: err.Error()})
			continue
		}
		rs.Tables = append(rs.Tables, one.Tables...)
		rs.Unreadable = append(rs.Unreadable, one.Unreadable...)
		rs.Torn = rs.Torn || one.Torn
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if len(rs.Tables) == 0 && len(failed) > 0 {
		return nil, failed[0] // the other mostly fails for the same reason
	}
	if l.last == nil || rs.Torn != l.last.Torn || !slices.Equal(rs.Tables, l.last.Tables) || !slices.Equal(rs.Unreadable, l.last.Unreadable) {
		l.last = rs
	}
	return l.last, nil
}

// Close gives the memory back that the kernel writes to, which is that of the
// greatest table. A later Read or Refresh takes some anew.
func (l *Legacy) Close() error {
	if l.buffer == nil {
		return nil
	}
	buffer := l.buffer
	l.buffer = nil
	return unix.Munmap(buffer)
}

// readFamily reads the tables of one family.
//
// Each table is of one moment, but each of another. So the greatest, which
// takes nearly all the time, is read last, and then the others again: if they
// are as before, they were so at the moment of the greatest too.
func (l *Legacy) readFamily(ctx context.Context, f netfilter.Family) (*netfilter.Ruleset, error) {
	if strconv.IntSize < 64 {
		return nil, errors.New("reading the legacy backend from the kernel needs a 64-bit program: use iptables-legacy-save")
	}
	names, err := legacyTableNames(f)
	if err != nil || len(names) == 0 {
		return &netfilter.Ruleset{}, err
	}
	s, err := openLegacySocket(f)
	if err != nil {
		return nil, err
	}
	defer s.close()
	if l.seed == (maphash.Seed{}) {
		l.seed = maphash.MakeSeed()
	}

	found := make([]*legacyTable, len(names))
	greatest := -1
	for i, name := range names {
		info, err := s.info(name)
		if errors.Is(err, unix.EPERM) {
			return nil, err
		}
		found[i] = l.known(f, name)
		if found[i].size = info.size; greatest < 0 || info.size > found[greatest].size {
			greatest = i
		}
	}
	read := func(i int) error {
		l.readTable(s, found[i])
		if l.afterTable != nil {
			l.afterTable(names[i])
		}
		return ctx.Err()
	}
	readOthers := func() (changed bool, err error) {
		for i := range found {
			if i == greatest {
				continue
			}
			before := found[i].sum
			if err := read(i); err != nil {
				return false, err
			}
			changed = changed || before != found[i].sum
		}
		return changed, nil
	}
	torn := false
	if _, err := readOthers(); err != nil {
		return nil, err
	}
	for try := 1; ; try++ {
		if err := read(greatest); err != nil {
			return nil, err
		}
		if torn, err = readOthers(); err != nil {
			return nil, err
		}
		if !torn || try == maxReads {
			break
		}
	}
	rs := &netfilter.Ruleset{Torn: torn}
	for _, r := range found {
		switch {
		case r.table != nil:
			rs.Tables = append(rs.Tables, r.table)
		case !errors.Is(r.err, errGone):
			rs.Unreadable = append(rs.Unreadable, netfilter.Unreadable{Family: f, Table: r.name, Reason: r.err.Error()})
		}
	}
	l.tables = append(slices.DeleteFunc(l.tables, func(t *legacyTable) bool { return t.family == f }), found...)
	return rs, nil
}

// known returns what is known of a table.
func (l *Legacy) known(f netfilter.Family, name string) *legacyTable {
	for _, t := range l.tables {
		if t.family == f && t.name == name {
			return t
		}
	}
	return &legacyTable{family: f, name: name}
}

// readTable reads one table.
func (l *Legacy) readTable(s *legacySocket, t *legacyTable) {
	b, err := l.copyTable(s, t.name)
	if err == nil {
		l.counts, err = t.take(b, l.seed, l.counts)
	}
	if err != nil {
		t.fail(err, l.seed)
	}
}

// copyTable has the kernel copy a table into the buffer.
func (l *Legacy) copyTable(s *legacySocket, name string) (legacyBlob, error) {
	for range maxGrown {
		info, err := s.info(name)
		if err != nil {
			return legacyBlob{}, err
		}
		if err := l.reserve(sizeofGetEntries + info.size); err != nil {
			return legacyBlob{}, err
		}
		entries, err := s.entries(name, l.buffer, info.size)
		if errors.Is(err, unix.EAGAIN) {
			continue // it was replaced by one of another size
		}
		return legacyBlob{family: s.family, table: name, legacyInfo: info, entries: entries, setName: s.setName}, err
	}
	return legacyBlob{}, fmt.Errorf("legacy table %q of %v: it changed %d times while it was read", name, s.family, maxGrown)
}

// reserve makes the buffer at least that long. The pages are there before the
// kernel needs them: it would fetch them while all others wait for the tables.
func (l *Legacy) reserve(size int) error {
	if size > maxTable {
		return fmt.Errorf("a legacy table of %d bytes", size)
	}
	if size <= len(l.buffer) {
		return nil
	}
	if err := l.Close(); err != nil {
		return err
	}
	size += size / 8 // for what comes next
	size = (size + hugePage - 1) &^ (hugePage - 1)
	buffer, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("getting %d bytes for a legacy table: %w", size, err)
	}
	l.buffer = buffer
	_ = unix.Madvise(buffer, unix.MADV_HUGEPAGE) // faster where there are some
	if unix.Madvise(buffer, unix.MADV_POPULATE_WRITE) != nil {
		// Linux before 5.14.
		for i := 0; i < len(buffer); i += 4096 {
			buffer[i] = 0
		}
	}
	return nil
}

// lend lets the kernel take the buffer's pages until the next reading, if it runs
// short: they no longer count as memory at work. It takes microseconds, where giving
// them back would add a tenth to the next reading.
func (l *Legacy) lend() {
	if l.buffer != nil {
		_ = unix.Madvise(l.buffer, unix.MADV_FREE)
	}
}

// legacyTableNames returns the legacy tables that the network namespace of this
// thread has, in the order of iptables-legacy-save.
func legacyTableNames(f netfilter.Family) ([]string, error) {
	// Not /proc/net, which is that of the process's first thread.
	const dir = "/proc/thread-self/net"
	file := dir + "/ip_tables_names"
	if f == netfilter.IPv6 {
		file = dir + "/ip6_tables_names"
	}
	b, err := os.ReadFile(file)
	switch {
	case errors.Is(err, os.ErrNotExist):
		// A kernel without the legacy backend, or a container without /proc.
		_, err = os.Stat(dir)
		return nil, err
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("reading the list of the legacy tables of %v: %w: without it, asking for a table could create it; be uid 0 or in group 0, or have the capability DAC_READ_SEARCH; besides that, NET_ADMIN is needed", f, err)
	case err != nil:
		return nil, err
	}
	return strings.Fields(string(b)), nil
}

// legacySocket is a socket that the kernel answers questions for tables on. It
// belongs to the network namespace of the thread that opened it.
type legacySocket struct {
	family netfilter.Family
	fd     int
	level  int
	sets   map[uint16]string // names asked for so far
}

func openLegacySocket(f netfilter.Family) (*legacySocket, error) {
	s := &legacySocket{family: f, level: unix.IPPROTO_IP}
	domain := unix.AF_INET
	if f == netfilter.IPv6 {
		domain, s.level = unix.AF_INET6, unix.IPPROTO_IPV6
	}
	var err error
	if s.fd, err = unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, fmt.Errorf("opening a socket of %v to read its legacy tables: %w", f, err)
	}
	return s, nil
}

func (s *legacySocket) close() { _ = unix.Close(s.fd) }

// get asks a question; the buffer holds it, and then the answer.
func (s *legacySocket) get(level, option int, buffer []byte) error {
	size := uint32(len(buffer))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(s.fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&buffer[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// info asks for the size of a table. The table must exist: the kernel would
// create it otherwise.
func (s *legacySocket) info(name string) (legacyInfo, error) {
	var b [sizeofGetInfo]byte
	copy(b[:tableNameSize-1], name)
	if err := s.get(s.level, optGetInfo, b[:]); err != nil {
		return legacyInfo{}, s.explain(name, err)
	}
	return newLegacyInfo(b[:]), nil
}

// entries asks for the entries of a table, of which info told the size; EAGAIN
// means that the size is another now.
func (s *legacySocket) entries(name string, buffer []byte, size int) ([]byte, error) {
	b := buffer[:sizeofGetEntries+size]
	// The kernel leaves holes, such as those behind the names of matches. What is
	// in them would make the same rules differ from what they were last time.
	clear(b)
	copy(b[:tableNameSize-1], name)
	binary.NativeEndian.PutUint32(b[tableNameSize:], uint32(size))
	if err := s.get(s.level, optGetEntries, b); err != nil {
		return nil, s.explain(name, err)
	}
	return b[sizeofGetEntries:], nil
}

// explain makes an error that people understand of the kernel's.
func (s *legacySocket) explain(name string, err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("reading the legacy table %q of %v: %w: it needs the capability NET_ADMIN", name, s.family, err)
	case errors.Is(err, unix.ENOENT):
		return errGone
	case errors.Is(err, unix.ENOPROTOOPT):
		return fmt.Errorf("reading the legacy table %q of %v: %w: the kernel lists the table, but has no legacy iptables", name, s.family, err)
	}
	return fmt.Errorf("reading the legacy table %q of %v: %w", name, s.family, err)
}

// setName asks for the name of the IP set that rules know by number.
func (s *legacySocket) setName(id uint16) (string, bool) {
	if name, ok := s.sets[id]; ok {
		return name, name != ""
	}
	// op, version (of IPSET_PROTOCOL), and the number, in whose place the
	// answer has the name.
	const byIndex, version = 7, 6
	var b [sizeofSetRequest]byte
	binary.NativeEndian.PutUint32(b[0:], byIndex)
	binary.NativeEndian.PutUint32(b[4:], version)
	binary.NativeEndian.PutUint16(b[8:], id)
	name := ""
	// It is an option of IPv4 whatever the family of the rules.
	if s.get(unix.IPPROTO_IP, optIPSet, b[:]) == nil {
		name = string(b[8 : 8+max(0, bytes.IndexByte(b[8:], 0))])
	}
	if s.sets == nil {
		s.sets = map[uint16]string{}
	}
	s.sets[id] = name
	return name, name != ""
}
