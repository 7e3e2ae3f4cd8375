package monitor

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/natlens/natlens/pkg/conntrack"
	"github.com/natlens/natlens/pkg/netfilter"
)

// dialed is what came of connecting.
type dialed struct {
	net.Conn                // nil when it failed
	local    netip.AddrPort // known also then: it is bound before
	chosen   netip.AddrPort // where nat sent it, where a listener heard of that
}

// dial connects to an address. With listen, it listens to conntrack meanwhile.
func dial(ctx context.Context, to netip.AddrPort, listen bool) (dialed, error) {
	if !listen {
		return connect(ctx, to)
	}
	l, err := conntrack.Listen()
	if err != nil {
		return connect(ctx, to)
	}
	timer := time.AfterFunc(listenFor, func() { l.Close() })
	d, failed := connect(ctx, to)
	if !timer.Stop() {
		return d, failed // what lasts so long, conntrack remembers
	}
	defer l.Close()
	if failed != nil {
		if f, err := l.Find(netfilter.TCP, d.local, to); err == nil {
			d.chosen = f.To
		}
	}
	return d, failed
}

// listenFor bounds how long the kernel has to tell of each new connection.
const listenFor = 250 * time.Millisecond

func connect(ctx context.Context, to netip.AddrPort) (out dialed, err error) {
	source, err := sourceTo(to)
	if err != nil {
		return out, err
	}
	d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		var failed error
		err := raw.Control(func(fd uintptr) { out.local, failed = bind(int(fd), source) })
		return errors.Join(err, failed)
	}}
	out.Conn, err = d.DialContext(ctx, "tcp", to.String())
	return out, err
}

// sourceTo returns the address that the kernel connects from to another. A UDP
// socket finds it without sending anything.
func sourceTo(to netip.AddrPort) (netip.Addr, error) {
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		return netip.Addr{}, err
	}
	defer c.Close()
	return netip.MustParseAddrPort(c.LocalAddr().String()).Addr().Unmap(), nil
}

// bind binds a socket to an address and any free port.
func bind(fd int, source netip.Addr) (netip.AddrPort, error) {
	var at unix.Sockaddr = &unix.SockaddrInet6{Addr: source.As16()}
	if source.Is4() {
		at = &unix.SockaddrInet4{Addr: source.As4()}
	}
	if err := unix.Bind(fd, at); err != nil {
		return netip.AddrPort{}, os.NewSyscallError("bind", err)
	}
	got, err := unix.Getsockname(fd)
	if err != nil {
		return netip.AddrPort{}, os.NewSyscallError("getsockname", err)
	}
	switch got := got.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(source, uint16(got.Port)), nil
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(source, uint16(got.Port)), nil
	}
	return netip.AddrPort{}, os.NewSyscallError("getsockname", unix.EAFNOSUPPORT)
}

// chosen asks conntrack where nat sent a connection.
func chosen(from, to netip.AddrPort) (netip.AddrPort, error) {
	f, err := conntrack.Get(netfilter.TCP, from, to)
	return f.To, err
}
