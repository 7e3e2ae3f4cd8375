package conntrack

import (
	"encoding/binary"
	"net/netip"

	"github.com/natlens/natlens/pkg/internal/nfnetlink"
	"github.com/natlens/natlens/pkg/netfilter"
)

// tuple encodes one direction of a connection, as decodeTuple reads it.
func tuple(typ uint16, protocol netfilter.Protocol, source, destination netip.AddrPort) []byte {
	kind := uint16(attrSource4)
	if source.Addr().Is6() {
		kind = attrSource6
	}
	addresses := nest(attrAddresses, attr(kind, source.Addr().AsSlice()...), attr(kind+1, destination.Addr().AsSlice()...))
	transport := nest(attrTransport, attr(attrNumber, byte(protocol)), attr(attrSourcePort, number16(source.Port())...), attr(attrDestinationPort, number16(destination.Port())...))
	return nest(typ, addresses, transport)
}

func attr(typ uint16, data ...byte) []byte { return nfnetlink.Append(nil, typ, data) }

func nest(typ uint16, parts ...[]byte) []byte {
	const nested = 1 << 15 // NLA_F_NESTED
	return nfnetlink.Append(nil, typ|nested, parts...)
}

func number16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }
func number32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
