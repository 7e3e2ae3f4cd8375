package conntrack

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"github.com/natlens/natlens/pkg/internal/nfnetlink"
	"github.com/natlens/natlens/pkg/netfilter"
)

// Flow is one tracked connection.
type Flow struct {
	ID       uint32 // of the kernel's entry
	Protocol netfilter.Protocol
	// Source and Destination are those of the first packet as it came, To and
	// From those of the answers: To is what nat sends to, From whom that sees.
	Source, Destination netip.AddrPort
	To, From            netip.AddrPort
	Status              uint32 // IPS_* of linux/netfilter/nf_conntrack_common.h
	// Timeout is after how many seconds without a packet the kernel forgets it.
	Timeout uint32
	State   uint8  // of TCP, TCP_CONNTRACK_*; 0 for others
	Zone    uint16 // conntrack zone; kube-proxy uses 0
}

// Bits of Flow.Status (enum ip_conntrack_status).
const (
	SeenReply  = 1 << 1 // packets went both ways
	Redirected = 1 << 5 // nat has rewritten the destination (IPS_DST_NAT)
	Dying      = 1 << 9 // it is being removed
)

// Open reports whether a connection may still carry data: not one of TCP that
// both sides have ended, or one side has reset (enum tcp_conntrack).
func (f *Flow) Open() bool {
	const timeWait, closed = 7, 8
	return f.State != timeWait && f.State != closed
}

// Attributes (linux/netfilter/nfnetlink_conntrack.h).
const (
	attrOriginal = 1
	attrReply    = 2
	attrStatus   = 3
	attrProto    = 4 // CTA_PROTOINFO
	attrTimeout  = 7
	attrID       = 12
	attrZone     = 18
	attrMask     = 26 // CTA_STATUS_MASK

	attrAddresses = 1 // CTA_TUPLE_IP
	attrTransport = 2 // CTA_TUPLE_PROTO

	attrSource4, attrDestination4 = 1, 2
	attrSource6, attrDestination6 = 3, 4

	attrNumber                          = 1
	attrSourcePort, attrDestinationPort = 2, 3

	attrTCP   = 1 // CTA_PROTOINFO_TCP
	attrState = 1
)

var errShape = errors.New("conntrack: an entry that is not of the shape that the kernel documents")

// decode reads one entry. What it does not know it passes over; what it knows must
// be whole.
func decode(b []byte, f *Flow) error {
	*f = Flow{}
	var protocol uint8
	var tuples int
	for len(b) > 0 {
		typ, data, rest, ok := nfnetlink.Next(b)
		if !ok {
			return errShape
		}
		b = rest
		switch typ {
		case attrOriginal:
			ok = decodeTuple(data, &f.Source, &f.Destination, &protocol)
			tuples |= 1
		case attrReply:
			ok = decodeTuple(data, &f.To, &f.From, &protocol)
			tuples |= 2
		case attrStatus:
			f.Status, ok = nfnetlink.Uint32(data)
		case attrTimeout:
			f.Timeout, ok = nfnetlink.Uint32(data)
		case attrID:
			f.ID, ok = nfnetlink.Uint32(data)
		case attrZone:
			if ok = len(data) == 2; ok {
				f.Zone = binary.BigEndian.Uint16(data)
			}
		case attrProto:
			f.State = tcpState(data)
		}
		if !ok {
			return errShape
		}
	}
	if f.Protocol = netfilter.Protocol(protocol); tuples != 3 {
		return errShape
	}
	return nil
}

// decodeTuple reads where packets of one direction come from and go to. Protocols
// without ports have the port 0.
func decodeTuple(b []byte, source, destination *netip.AddrPort, protocol *uint8) bool {
	var from, to netip.Addr
	var ports [2]uint16
	for len(b) > 0 {
		typ, data, rest, ok := nfnetlink.Next(b)
		if !ok {
			return false
		}
		b = rest
		switch typ {
		case attrAddresses:
			from, to, ok = decodeAddresses(data)
		case attrTransport:
			ok = decodeTransport(data, &ports, protocol)
		}
		if !ok {
			return false
		}
	}
	*source, *destination = netip.AddrPortFrom(from, ports[0]), netip.AddrPortFrom(to, ports[1])
	return from.IsValid() && to.IsValid()
}

func decodeAddresses(b []byte) (from, to netip.Addr, ok bool) {
	for len(b) > 0 {
		typ, data, rest, ok := nfnetlink.Next(b)
		if !ok {
			return from, to, false
		}
		b = rest
		switch typ {
		case attrSource4, attrDestination4:
			ok = len(data) == 4
		case attrSource6, attrDestination6:
			ok = len(data) == 16
		default:
			continue
		}
		if !ok {
			return from, to, false
		}
		a, _ := netip.AddrFromSlice(data)
		if typ == attrSource4 || typ == attrSource6 {
			from = a
		} else {
			to = a
		}
	}
	return from, to, true
}

func decodeTransport(b []byte, ports *[2]uint16, protocol *uint8) bool {
	for len(b) > 0 {
		typ, data, rest, ok := nfnetlink.Next(b)
		if !ok {
			return false
		}
		b = rest
		switch typ {
		case attrNumber:
			if len(data) != 1 {
				return false
			}
			*protocol = data[0]
		case attrSourcePort, attrDestinationPort:
			if len(data) != 2 {
				return false
			}
			ports[typ-attrSourcePort] = binary.BigEndian.Uint16(data)
		}
	}
	return true
}

// tcpState reads the state of a TCP connection; 0 where there is none.
func tcpState(b []byte) uint8 {
	for len(b) > 0 {
		typ, data, rest, ok := nfnetlink.Next(b)
		if !ok {
			return 0
		}
		b = rest
		if typ != attrTCP {
			continue
		}
		for len(data) > 0 {
			typ, value, rest, ok := nfnetlink.Next(data)
			if !ok {
				return 0
			}
			if data = rest; typ == attrState && len(value) == 1 {
				return value[0]
			}
		}
	}
	return 0
}
