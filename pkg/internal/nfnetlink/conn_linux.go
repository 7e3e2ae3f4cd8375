package nfnetlink

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// bufferSize is what the kernel fills at most with one part of a dump: it makes
// each of min(buffer, 32 KiB) (netlink_recvmsg in net/netlink/af_netlink.c), so
// that more is never used, and less means more system calls.
const bufferSize = 32 << 10

// receiveTimeout bounds the wait for an answer. The kernel answers at once; the
// bound is for a kernel that does not answer at all.
const receiveTimeout = 30 // seconds

// Sizes of struct nlmsghdr and struct nfgenmsg (linux/netlink.h and
// linux/netfilter/nfnetlink.h).
const (
	messageHeader   = 16
	netfilterHeader = 4
)

// ErrInterrupted says that what was dumped changed meanwhile: parts of it may
// be missing or stand there twice (NLM_F_DUMP_INTR).
var ErrInterrupted = errors.New("the rules changed during the dump")

var errAcknowledged = errors.New("netlink: an acknowledgement where an object was asked for")

// Conn is a netlink connection to one of netfilter's subsystems, mostly nf_tables,
// in one network namespace. Its errors wrap the kernel's error number. Not safe for concurrent use.
type Conn struct {
	fd      int
	subsys  uint16 // NFNL_SUBSYS_*
	seq     uint32
	request []byte // reused
	asked   int    // how many questions stand in it, for Answers
	rest    []byte // messages that were received, but not looked at
	parts   [atOnce]part
	got     int  // parts that were received last,
	used    int  // and how many of those have been looked at
	brief   bool // the question at hand is answered at once
	second  *Conn
}

// atOnce is how many parts of an answer one system call fetches: the rules of
// most chains are one, and the end of the dump is another.
const atOnce = 2

// part is a struct mmsghdr: where the kernel puts a part of an answer, and how long
// that is.
type part struct {
	header unix.Msghdr
	n      uint32
}

func newPart() part {
	room := &unix.Iovec{Base: unsafe.SliceData(make([]byte, bufferSize))}
	room.SetLen(bufferSize)
	p := part{header: unix.Msghdr{Iov: room}}
	p.header.SetIovlen(1)
	return p
}

// room is all that may be filled.
func (p *part) room() []byte { return unsafe.Slice(p.header.Iov.Base, bufferSize) }

// dial connects to the network namespace of the calling thread: the kernel ties
// a socket to the namespace of the thread that makes it. Afterwards the Conn
// may be used on any thread.
func dial(subsys uint16) (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	// Connected to port 0, the kernel, nobody else can send to the socket.
	if err := unix.Connect(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("connecting a netlink socket: %w", err)
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: receiveTimeout}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("bounding the wait on a netlink socket: %w", err)
	}
	c := &Conn{fd: fd, subsys: subsys}
	for i := range c.parts {
		c.parts[i] = newPart()
	}
	return c, nil
}

// OpenConntrack connects to the connection tracking of the calling thread's
// namespace. Whether the kernel has any, the first question tells.
func OpenConntrack() (*Conn, error) { return dial(unix.NFNL_SUBSYS_CTNETLINK) }

// Second returns another connection to the same namespace, for a second
// goroutine. It is closed with this one.
func (c *Conn) Second() *Conn { return c.second }

// Close closes the connection.
func (c *Conn) Close() error {
	err := unix.Close(c.fd)
	if c.second != nil {
		err = errors.Join(err, unix.Close(c.second.fd))
	}
	return err
}

// Dump asks for all objects of a kind (a GET of enum nf_tables_msg_types or
// ctnl_msg_types) and of a family (NFPROTO_*) that the attributes name,
// and calls each with the attributes of every one. They are valid during the
// call only. Errors of each end the calls and are returned; ErrInterrupted is
// returned behind the last call.
//
// What is not there may be an empty success: the kernel dumps no rules for a
// chain that does not exist. Only [Conn.Generation] tells whether it was there.
func (c *Conn) Dump(kind int, family uint8, attrs []byte, each func(attrs []byte) error) error {
	if err := c.send(kind, family, unix.NLM_F_DUMP, attrs); err != nil {
		return err
	}
	interrupted := false
	var failed error // a dump is read to its end: only one may run on a socket
	for {
		m, err := c.answer(1)
		if err != nil {
			return err
		}
		interrupted = interrupted || m.flags&unix.NLM_F_DUMP_INTR != 0
		switch {
		case m.typ == unix.NLMSG_ERROR || m.typ == unix.NLMSG_DONE:
			if err := m.errno(); err != nil {
				return err
			}
			if failed == nil && interrupted {
				return ErrInterrupted
			}
			return failed
		case m.typ < unix.NLMSG_MIN_TYPE || failed != nil:
		default:
			attrs, err := m.attrs()
			if err != nil {
				return err
			}
			failed = each(attrs)
		}
	}
}

// Get asks nf_tables for one object and returns its attributes, which are valid
// until the next call.
func (c *Conn) Get(kind int, family uint8, attrs []byte) ([]byte, error) {
	if err := c.send(kind, family, 0, attrs); err != nil {
		return nil, err
	}
	m, err := c.answer(1)
	if err != nil {
		return nil, err
	}
	return m.object()
}

// GetMany asks nf_tables for several objects with one message, such as elements
// of a set, and calls each with the attributes of every one of the n answers;
// they are valid during the call only. The kernel ends with the first object
// that is not there, of which the error is returned.
func (c *Conn) GetMany(kind int, family uint8, attrs []byte, n int, each func(attrs []byte)) error {
	if n > MostAtOnce {
		return fmt.Errorf("netlink: asking for %d objects at once", n)
	}
	if err := c.send(kind, family, 0, attrs); err != nil {
		return err
	}
	for range n {
		m, err := c.answer(1)
		if err != nil {
			return err
		}
		attrs, err := m.object()
		if err != nil {
			return err
		}
		each(attrs)
	}
	return nil
}

// Ask adds a question for one object to those that Answers sends: at most MostAtOnce.
func (c *Conn) Ask(kind int, family uint8, attrs []byte) {
	if c.asked == 0 {
		c.request = c.request[:0]
	}
	c.seq++
	c.asked++
	c.question(kind, family, 0, attrs)
}

// Answers sends the questions that were asked, with one message, and calls each
// with the number of each question, counted from 0, and the attributes of its
// answer, which are valid during the call only, or with the kernel's error number.
// The first error that each returns is returned, behind the last call.
func (c *Conn) Answers(each func(i int, attrs []byte, err error) error) error {
	n := c.asked
	c.asked = 0
	if n > MostAtOnce {
		return fmt.Errorf("netlink: %d questions at once", n)
	}
	if err := c.write(); err != nil {
		return err
	}
	var failed error
	for range n {
		m, err := c.answer(n)
		if err != nil {
			return err
		}
		attrs, err := m.object()
		failed = cmp.Or(failed, each(n-1-int(c.seq-m.seq), attrs, err))
	}
	return failed
}

// Generation returns the number of the namespace's ruleset, which every
// transaction on any of its tables increases. It takes some three microseconds;
// before Linux 5.13, as long as a transaction that is under way.
func (c *Conn) Generation() (uint32, error) {
	c.brief = true
	defer func() { c.brief = false }()
	b, err := c.Get(unix.NFT_MSG_GETGEN, unix.NFPROTO_UNSPEC, nil)
	if err != nil {
		return 0, err
	}
	var a [unix.NFTA_GEN_ID + 1][]byte
	Collect(b, a[:])
	id, ok := Uint32(a[unix.NFTA_GEN_ID])
	if !ok {
		return 0, errors.New("netlink: a ruleset generation without a number")
	}
	return id, nil
}

// Await waits until no transaction on any table of the namespace is under way, or
// none that was when it was called. It begins a transaction of its own for another
// generation than the current one, which it is given: the kernel waits for its
// turn, sees that it is late, and refuses it (nf_tables_valid_genid in
// net/netfilter/nf_tables_api.c; Linux 4.13). Nothing is written.
func (c *Conn) Await(generation uint32) error {
	c.seq++
	native := binary.NativeEndian
	const size = messageHeader + netfilterHeader + 8
	b := native.AppendUint32(c.request[:0], size)
	b = native.AppendUint16(b, unix.NFNL_MSG_BATCH_BEGIN)
	b = native.AppendUint16(b, unix.NLM_F_REQUEST)
	b = native.AppendUint32(b, c.seq)
	b = native.AppendUint32(b, 0)
	b = append(b, unix.AF_UNSPEC, unix.NFNETLINK_V0)
	b = binary.BigEndian.AppendUint16(b, unix.NFNL_SUBSYS_NFTABLES)
	b = native.AppendUint16(b, 8)
	b = native.AppendUint16(b, 1) // NFNL_BATCH_GENID
	never := generation - 1
	if never == 0 { // 0 is any
		never--
	}
	c.request = binary.BigEndian.AppendUint32(b, never)
	if err := c.write(); err != nil {
		return err
	}
	for {
		m, err := c.answer(1)
		if err != nil {
			return err
		}
		if m.typ != unix.NLMSG_ERROR {
			continue
		}
		if err := m.errno(); err != nil && !errors.Is(err, unix.ERESTART) {
			return err
		}
		return nil
	}
}

func (c *Conn) send(kind int, family uint8, flags uint16, attrs []byte) error {
	c.seq++
	c.request = c.request[:0]
	c.question(kind, family, flags, attrs)
	return c.write()
}

// question appends one to the request.
func (c *Conn) question(kind int, family uint8, flags uint16, attrs []byte) {
	native := binary.NativeEndian
	b := native.AppendUint32(c.request, uint32(messageHeader+netfilterHeader+len(attrs)))
	b = native.AppendUint16(b, c.subsys<<8|uint16(kind))
	b = native.AppendUint16(b, unix.NLM_F_REQUEST|flags)
	b = native.AppendUint32(b, c.seq)
	b = native.AppendUint32(b, 0)                  // from: the kernel fills it in
	b = append(b, family, unix.NFNETLINK_V0, 0, 0) // nfgenmsg
	c.request = append(b, attrs...)
}

func (c *Conn) write() error {
	c.rest = nil
	for {
		var err error
		if c.brief {
			_, err = briefly(unix.SYS_SENDTO, c.fd, c.request, 0)
		} else {
			_, err = unix.Write(c.fd, c.request)
		}
		if err == nil {
			return nil
		}
		if !errors.Is(err, syscall.EINTR) {
			return fmt.Errorf("asking over netlink: %w", err)
		}
	}
}

// answer returns the next message that answers one of the last n questions. It is valid
// until the next call.
func (c *Conn) answer(n int) (m message, err error) {
	for {
		if len(c.rest) == 0 {
			if c.rest, err = c.receive(); err != nil {
				return m, err
			}
		}
		if m, c.rest, err = cutMessage(c.rest); err != nil || c.seq-m.seq < uint32(n) {
			return m, err
		}
	}
}

// receive returns the next messages. They are valid until it has to ask the kernel
// again.
func (c *Conn) receive() ([]byte, error) {
	for c.used == c.got {
		n, err := c.read()
		switch {
		case err == nil:
			c.got, c.used = n, 0
		case errors.Is(err, syscall.EAGAIN):
			return nil, fmt.Errorf("the kernel has not answered over netlink for %d seconds", receiveTimeout)
		case !errors.Is(err, syscall.EINTR):
			return nil, fmt.Errorf("reading from netlink: %w", err)
		}
	}
	p := &c.parts[c.used]
	c.used++
	if p.header.Flags&unix.MSG_TRUNC != 0 {
		return nil, errors.New("netlink: a message longer than any of nf_tables")
	}
	return p.room()[:p.n], nil
}

// read fills parts, and returns how many.
func (c *Conn) read() (n int, err error) {
	if c.brief { // the answer is mostly there already
		if n, err := briefly(unix.SYS_RECVFROM, c.fd, c.parts[0].room(), unix.MSG_DONTWAIT); err == nil {
			c.parts[0].n, c.parts[0].header.Flags = uint32(n), 0
			return 1, nil
		}
	}
	got, _, errno := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(c.fd), uintptr(unsafe.Pointer(&c.parts[0])), atOnce, unix.MSG_WAITFORONE, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(got), nil
}

// briefly makes a system call on a socket of which the runtime is not told: after a
// rest, it would wake a thread up to watch the call, which costs more than the call.
func briefly(call uintptr, fd int, b []byte, flags uintptr) (n int, err error) {
	done, _, errno := unix.RawSyscall6(call, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), flags, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(done), nil
}

// message is one netlink message.
type message struct {
	typ, flags uint16
	seq        uint32
	body       []byte
}

func cutMessage(b []byte) (m message, rest []byte, err error) {
	native := binary.NativeEndian
	if len(b) < messageHeader {
		return m, nil, errors.New("netlink: a cut message")
	}
	n := int(native.Uint32(b))
	if n < messageHeader || n > len(b) {
		return m, nil, errors.New("netlink: a cut message")
	}
	m = message{typ: native.Uint16(b[4:]), flags: native.Uint16(b[6:]), seq: native.Uint32(b[8:]), body: b[messageHeader:n:n]}
	return m, b[min(align(n), len(b)):], nil
}

// attrs returns what stands behind the nfgenmsg.
func (m message) attrs() ([]byte, error) {
	if len(m.body) < netfilterHeader {
		return nil, errors.New("netlink: a message without a netfilter header")
	}
	return m.body[netfilterHeader:], nil
}

// object returns the attributes of the object that was asked for, or why there are
// none.
func (m message) object() ([]byte, error) {
	if m.typ == unix.NLMSG_ERROR {
		return nil, cmp.Or(m.errno(), errAcknowledged)
	}
	return m.attrs()
}

// errno returns the error of an NLMSG_ERROR or NLMSG_DONE, nil for success.
func (m message) errno() error {
	if len(m.body) < 4 {
		return nil // a DONE need not say anything
	}
	if code := int32(binary.NativeEndian.Uint32(m.body)); code < 0 {
		return syscall.Errno(-code)
	}
	return nil
}
