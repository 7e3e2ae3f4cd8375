package echo

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"
)

const (
	// maxDatagram bounds both directions, in bytes. 1232 is what fits the
	// smallest IPv6 link (1280) without fragments: fragments of an answer are
	// lost on many paths, and a lost answer looks like a broken Service.
	maxDatagram = 1232

	// answerPrefix starts every answer; see ServeUDP on why it matters.
	answerPrefix = `{"hostname":`
)

// ServeUDP answers each datagram that arrives on conn with one datagram that
// holds the JSON of an [Answer], sent from the address that the request was
// sent to. On systems other than Linux that holds only if conn is bound to one
// address.
//
// What the request contains does not matter, with one exception: an answer is
// not answered. Otherwise one datagram with a forged source would keep two
// servers, or a server and an RFC 862 echo service, talking for ever.
//
// The address list is cut short where the answer would exceed 1232 bytes, as it
// can on a node that carries many Service addresses.
//
// ServeUDP owns conn and has closed it when it returns. It returns nil once ctx
// is done, after the answer in progress, and an error if conn cannot be set up
// or read. An answer that cannot be sent is counted in m and nothing more:
// one unreachable client must not stop the others.
func ServeUDP(ctx context.Context, conn *net.UDPConn, id Identity, m *Metrics) error {
	defer conn.Close()
	if err := receiveDestination(conn); err != nil {
		return fmt.Errorf("asking for the destination of datagrams: %w", err)
	}
	// A deadline wakes the reader as closing would, but leaves the socket
	// usable for the answer in progress.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()

	bound := boundAddr(conn)
	buf := make([]byte, maxDatagram)
	oob := make([]byte, controlSpace)
	for {
		n, oobn, _, remote, err := conn.ReadMsgUDPAddrPort(buf, oob)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("reading a datagram: %w", err)
		}
		if bytes.HasPrefix(buf[:n], []byte(answerPrefix)) {
			continue
		}
		m.udpRequests.Inc()
		local, source := destination(oob[:oobn], bound)
		b, err := datagram(id.answer(local, remote))
		if err == nil {
			_, _, err = conn.WriteMsgUDPAddrPort(b, source, remote)
		}
		if err != nil {
			m.udpSendErrors.Inc()
		}
	}
}

// datagram prints a so that it fits one datagram.
func datagram(a Answer) ([]byte, error) {
	for {
		b, err := a.json()
		if err != nil || len(b) <= maxDatagram || len(a.Addresses) == 0 {
			return b, err
		}
		a.Addresses = a.Addresses[:len(a.Addresses)/2]
	}
}

// boundAddr returns the address that conn is bound to, which may be a wildcard.
func boundAddr(conn *net.UDPConn) netip.AddrPort {
	addr, ok := conn.LocalAddr().(*net.UDPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	return addr.AddrPort()
}
