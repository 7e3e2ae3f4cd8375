package conntrack

import (
	"errors"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/natlens/natlens/pkg/internal/nfnetlink"
	"github.com/natlens/natlens/pkg/netfilter"
)

// ErrUntracked says that the kernel tracks no such connection: its first packet
// never left, or the entry is gone already.
var ErrUntracked = errors.New("no such connection is tracked")

// Get returns the connection whose first packet went from source to destination,
// two addresses of one family. It asks in the network namespace of the calling
// thread. Its errors are those of [Reader.Dump], or ErrUntracked.
func Get(protocol netfilter.Protocol, source, destination netip.AddrPort) (f Flow, err error) {
	conn, err := nfnetlink.OpenConntrack()
	if err != nil {
		return f, explain(err)
	}
	defer conn.Close()
	family := uint8(unix.NFPROTO_IPV4)
	if source.Addr().Is6() {
		family = unix.NFPROTO_IPV6
	}
	b, err := conn.Get(messageGet, family, tuple(attrOriginal, protocol, source, destination))
	switch {
	case errors.Is(err, unix.ENOENT):
		return f, ErrUntracked
	case err != nil:
		return f, explain(err)
	}
	return f, decode(b, &f)
}

// Listener hears of new connections. While one is open the kernel tells it of
// every connection of the node, so that it is for moments only, where [Get] comes
// too late: a connection whose first answer is a reset is forgotten at once
// (nf_conntrack_tcp_packet in net/netfilter/nf_conntrack_proto_tcp.c).
type Listener struct{ events *nfnetlink.Listener }

// mostHeard bounds how many connections are looked at.
const mostHeard = 10_000

// Listen listens in the network namespace of the calling thread.
func Listen() (*Listener, error) {
	l, err := nfnetlink.Listen(unix.NFNLGRP_CONNTRACK_NEW)
	if err != nil {
		return nil, explain(err)
	}
	return &Listener{l}, nil
}

// Find is [Get] for a connection that was new since Listen.
func (l *Listener) Find(protocol netfilter.Protocol, source, destination netip.AddrPort) (f Flow, err error) {
	for range mostHeard {
		b, ok, err := l.events.Receive()
		if err != nil {
			return Flow{}, explain(err)
		}
		if !ok {
			break
		}
		if decode(b, &f) == nil && f.Protocol == protocol && f.Source == source && f.Destination == destination {
			return f, nil
		}
	}
	return Flow{}, ErrUntracked
}

// Close ends the listening.
func (l *Listener) Close() error { return l.events.Close() }
