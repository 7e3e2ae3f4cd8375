package nodebox

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A socket belongs to the namespace of the thread that made it, so only the
// system calls up to connect or bind run on a worker, and none of them waits.
// They are made here and not by package net, which looks once per process
// whether IPv6 works, perhaps where it does not, and whose dial would keep its
// thread until the answer comes.

// listenBacklog is a number of connections; the kernel lowers it to somaxconn.
const listenBacklog = 4096

// Dial connects to addr, a literal IP address and a port, from inside the
// namespace. Networks are tcp and udp, each also with 4 or 6. The connection
// is a [net.TCPConn] or a [net.UDPConn]; the caller closes it. Dial waits as
// long as ctx allows: a packet that is dropped is not answered.
//
// A client that makes many connections to one address runs out of ports when
// each stays in TIME_WAIT after its close: SetLinger(0) before Close avoids
// that.
func (ns *Namespace) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	return ns.DialFrom(ctx, network, netip.AddrPort{}, addr)
}

// DialFrom is [Namespace.Dial] with a local address. Port 0 leaves the port to
// the kernel, and the zero AddrPort leaves it both.
func (ns *Namespace) DialFrom(ctx context.Context, network string, local netip.AddrPort, addr string) (net.Conn, error) {
	conn, err := ns.dial(ctx, network, local, addr)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Addr: literal(addr), Err: err}
	}
	return conn, nil
}

func (ns *Namespace) dial(ctx context.Context, network string, local netip.AddrPort, addr string) (net.Conn, error) {
	spec, err := parseEndpoint(network, addr)
	if err != nil {
		return nil, err
	}
	if !spec.addr.Addr().IsValid() {
		return nil, errors.New("missing address")
	}
	if local.IsValid() && local.Addr().Is4() != (spec.family == unix.AF_INET) {
		return nil, fmt.Errorf("local address %s is of the other family", local)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var file *os.File
	pending := false
	err = ns.onWorker(func() error {
		fd, err := spec.open()
		if err != nil {
			return err
		}
		pending, err = connect(fd, local, spec.addr)
		if err != nil {
			unix.Close(fd)
			return err
		}
		file = os.NewFile(uintptr(fd), "socket")
		return nil
	})
	if err != nil {
		return nil, err
	}
	defer file.Close() // FileConn makes a copy
	if pending {
		if err := waitConnected(ctx, file); err != nil {
			return nil, err
		}
	}
	return net.FileConn(file)
}

// connect binds a socket, if local is valid, and starts to connect it. pending
// means that the answer is yet to come.
func connect(fd int, local, remote netip.AddrPort) (pending bool, err error) {
	if local.IsValid() {
		if local.Port() == 0 {
			// Choose the port when the destination is known: one port then
			// serves several destinations.
			if err := unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1); err != nil {
				return false, os.NewSyscallError("setsockopt", err)
			}
		}
		if err := unix.Bind(fd, sockaddr(local)); err != nil {
			return false, os.NewSyscallError("bind", err)
		}
	}
	switch err := unix.Connect(fd, sockaddr(remote)); {
	case err == nil:
		return false, nil
	case errors.Is(err, unix.EINPROGRESS):
		return true, nil
	default:
		return false, os.NewSyscallError("connect", err)
	}
}

// waitConnected waits for the answer to a pending connect, on the runtime's
// poller: no thread is held.
func waitConnected(ctx context.Context, file *os.File) error {
	conn, err := file.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() {
		_ = file.SetWriteDeadline(time.Unix(1, 0)) // in the past: wakes the Write below
	})
	defer stop()
	var answer error
	err = conn.Write(func(fd uintptr) bool {
		code, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil {
			answer = os.NewSyscallError("getsockopt", err)
			return true
		}
		if code != 0 {
			answer = os.NewSyscallError("connect", unix.Errno(code))
			return true
		}
		_, err = unix.Getpeername(int(fd))
		return err == nil // otherwise there is no answer yet
	})
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return err
	}
	return answer
}

// Listen listens for TCP connections in the namespace. addr is a literal IP
// address and a port; without an address, it is all of them, and for network
// tcp, those of both families. [Box.Close] closes the listener if the caller
// has not.
func (ns *Namespace) Listen(network, addr string) (net.Listener, error) {
	file, err := ns.listen(network, addr, unix.SOCK_STREAM)
	if err == nil {
		defer file.Close() // FileListener makes a copy
		var l net.Listener
		if l, err = net.FileListener(file); err == nil {
			if err = ns.box.own(l); err == nil {
				return l, nil
			}
			l.Close()
		}
	}
	return nil, &net.OpError{Op: "listen", Net: network, Addr: literal(addr), Err: err}
}

// ListenPacket is [Namespace.Listen] for UDP.
func (ns *Namespace) ListenPacket(network, addr string) (net.PacketConn, error) {
	file, err := ns.listen(network, addr, unix.SOCK_DGRAM)
	if err == nil {
		defer file.Close() // FilePacketConn makes a copy
		var c net.PacketConn
		if c, err = net.FilePacketConn(file); err == nil {
			if err = ns.box.own(c); err == nil {
				return c, nil
			}
			c.Close()
		}
	}
	return nil, &net.OpError{Op: "listen", Net: network, Addr: literal(addr), Err: err}
}

// listen returns a bound socket, which listens if it is of TCP.
func (ns *Namespace) listen(network, addr string, sotype int) (*os.File, error) {
	spec, err := parseEndpoint(network, addr)
	if err != nil {
		return nil, err
	}
	if spec.sotype != sotype {
		return nil, net.UnknownNetworkError(network)
	}
	var file *os.File
	err = ns.onWorker(func() error {
		fd, err := spec.open()
		if err != nil {
			return err
		}
		if err := spec.bind(fd); err != nil {
			unix.Close(fd)
			return err
		}
		file = os.NewFile(uintptr(fd), "socket")
		return nil
	})
	return file, err
}

// endpoint is a parsed network and address.
type endpoint struct {
	family int            // AF_INET or AF_INET6
	sotype int            // SOCK_STREAM or SOCK_DGRAM
	addr   netip.AddrPort // an invalid Addr is the wildcard
	both   bool           // the wildcard of both families
}

func parseEndpoint(network, addr string) (endpoint, error) {
	var e endpoint
	switch strings.TrimRight(network, "46") {
	case "tcp":
		e.sotype = unix.SOCK_STREAM
	case "udp":
		e.sotype = unix.SOCK_DGRAM
	default:
		return e, net.UnknownNetworkError(network)
	}
	suffix := network[len("tcp"):] // "udp" is as long
	if len(suffix) > 1 {
		return e, net.UnknownNetworkError(network)
	}
	host, portText, err := net.SplitHostPort(addr)
	if err != nil {
		return e, err
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return e, fmt.Errorf("parsing the port: %w", err)
	}
	if host == "" {
		e.addr = netip.AddrPortFrom(netip.Addr{}, uint16(port))
		e.family, e.both = unix.AF_INET6, suffix == ""
		if suffix == "4" {
			e.family = unix.AF_INET
		}
		return e, nil
	}
	ip, err := netip.ParseAddr(host)
	if err != nil {
		return e, fmt.Errorf("parsing the address, which must be literal: %w", err)
	}
	ip = ip.Unmap()
	e.addr = netip.AddrPortFrom(ip, uint16(port))
	e.family = unix.AF_INET
	if ip.Is6() {
		e.family = unix.AF_INET6
	}
	if ip.Zone() != "" || suffix == "4" && ip.Is6() || suffix == "6" && ip.Is4() {
		return e, fmt.Errorf("not an address of network %s", network)
	}
	return e, nil
}

// open makes the socket, on the calling thread's namespace.
func (e *endpoint) open() (int, error) {
	const flags = unix.SOCK_NONBLOCK | unix.SOCK_CLOEXEC
	fd, err := unix.Socket(e.family, e.sotype|flags, 0)
	if e.both && errors.Is(err, unix.EAFNOSUPPORT) {
		e.family, e.both = unix.AF_INET, false // a kernel without IPv6
		fd, err = unix.Socket(e.family, e.sotype|flags, 0)
	}
	return fd, os.NewSyscallError("socket", err)
}

// bind binds the socket and listens if it is of TCP.
func (e *endpoint) bind(fd int) error {
	only := 1
	if e.both {
		only = 0
	}
	if e.family == unix.AF_INET6 {
		if err := unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, only); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	if e.sotype == unix.SOCK_STREAM {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	addr := e.addr
	if !addr.Addr().IsValid() {
		wildcard := netip.IPv6Unspecified()
		if e.family == unix.AF_INET {
			wildcard = netip.IPv4Unspecified()
		}
		addr = netip.AddrPortFrom(wildcard, addr.Port())
	}
	if err := unix.Bind(fd, sockaddr(addr)); err != nil {
		return os.NewSyscallError("bind", err)
	}
	if e.sotype == unix.SOCK_STREAM {
		return os.NewSyscallError("listen", unix.Listen(fd, listenBacklog))
	}
	return nil
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// literal is an address as the caller wrote it, for errors.
type literal string

func (literal) Network() string  { return "" }
func (l literal) String() string { return string(l) }
