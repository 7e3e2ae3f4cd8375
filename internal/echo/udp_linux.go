package echo

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// controlSpace holds, in bytes, the larger of the two packet-info messages with
// its header (16 + 20, rounded up), and room for one more message that someone
// else may have switched on.
const controlSpace = 128

// receiveDestination makes the kernel tell the destination of each datagram. A
// socket bound to a wildcard cannot know it otherwise.
func receiveDestination(conn *net.UDPConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var optErr error
	err = raw.Control(func(fd uintptr) {
		optErr = setPacketInfo(int(fd))
	})
	if err != nil {
		return err
	}
	return optErr
}

// setPacketInfo goes by the family of the socket: an IPv6 socket reports its
// IPv4 datagrams too, as mapped addresses, and wants them back that way.
func setPacketInfo(fd int) error {
	family, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		return err
	}
	switch family {
	case unix.AF_INET:
		return unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
	case unix.AF_INET6:
		return unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
	default:
		return fmt.Errorf("socket family %d is neither IPv4 nor IPv6", family)
	}
}

// destination reads the address that a datagram was sent to from its control
// messages, and returns with it the control message that makes the answer leave
// from there. Without a usable message it returns bound and nil, which leaves
// the choice to the kernel.
func destination(oob []byte, bound netip.AddrPort) (netip.AddrPort, []byte) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return bound, nil
	}
	for _, msg := range msgs {
		var local netip.Addr
		var source []byte
		switch level, kind, d := msg.Header.Level, msg.Header.Type, msg.Data; {
		case level == unix.IPPROTO_IP && kind == unix.IP_PKTINFO && len(d) >= unix.SizeofInet4Pktinfo:
			// struct in_pktinfo: interface, local address, header address.
			// The local one is legal as a source even after a broadcast, but
			// it is zero for a datagram that was queued before the option.
			ip := [4]byte(d[4:8])
			if ip == [4]byte{} {
				ip = [4]byte(d[8:12])
			}
			local = netip.AddrFrom4(ip)
			source = unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: ip})
		case level == unix.IPPROTO_IPV6 && kind == unix.IPV6_PKTINFO && len(d) >= unix.SizeofInet6Pktinfo:
			// struct in6_pktinfo: header address, interface.
			ip := [16]byte(d[:16])
			local = netip.AddrFrom16(ip)
			info := unix.Inet6Pktinfo{Addr: ip}
			if local.IsLinkLocalUnicast() {
				// Other addresses leave the interface to the routes, as the
				// way back need not be the way in.
				info.Ifindex = binary.NativeEndian.Uint32(d[16:20])
			}
			source = unix.PktInfo6(&info)
		default:
			continue
		}
		if local.IsMulticast() {
			source = nil // not legal as a source
		}
		return netip.AddrPortFrom(local, bound.Port()), source
	}
	return bound, nil
}
