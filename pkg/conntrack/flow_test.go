package conntrack

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/natlens/natlens/pkg/netfilter"
)

func at(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

var entry4 = slices.Concat(
	tuple(attrOriginal, netfilter.TCP, at("10.52.1.9:40000"), at("10.96.0.10:53")), tuple(attrReply, netfilter.TCP, at("10.52.1.4:5353"), at("10.146.0.2:40001")),
	attr(attrStatus, number32(0x1ae)...), nest(attrProto, nest(attrTCP, attr(attrState, 3), attr(2, 7))), attr(attrTimeout, number32(86399)...), attr(8, 0, 0, 0, 0),
	attr(attrID, number32(77)...), attr(attrZone, 0, 9), attr(11, 0, 0, 0, 1), nest(99, attr(1, 1)))

var entry6 = slices.Concat(
	tuple(attrOriginal, netfilter.UDP, at("[fd00:52::9]:40000"), at("[fd00:96::10]:53")), tuple(attrReply, netfilter.UDP, at("[fd00:52::4]:53"), at("[fd00:52::9]:40000")),
	attr(attrStatus, number32(0x1a8)...), attr(attrTimeout, number32(30)...), attr(attrID, number32(5)...))

func TestDecode(t *testing.T) {
	for _, c := range []struct {
		entry []byte
		want  Flow
	}{
		{entry4, Flow{77, netfilter.TCP, at("10.52.1.9:40000"), at("10.96.0.10:53"), at("10.52.1.4:5353"), at("10.146.0.2:40001"), 0x1ae, 86399, 3, 9}},
		{entry6, Flow{5, netfilter.UDP, at("[fd00:52::9]:40000"), at("[fd00:96::10]:53"), at("[fd00:52::4]:53"), at("[fd00:52::9]:40000"), 0x1a8, 30, 0, 0}},
	} {
		got := Flow{State: 99, Zone: 99}
		if err := decode(c.entry, &got); err != nil || got != c.want {
			t.Errorf("%+v (%v), want %+v", got, err, c.want)
		}
		if n := testing.AllocsPerRun(100, func() { _ = decode(c.entry, &got) }); n != 0 {
			t.Errorf("%v allocations for a flow", n)
		}
	}
}

// A part of an entry is an error, never another flow.
func TestDecodeCut(t *testing.T) {
	var f Flow
	const numbers = 3 * 8 // status, timeout and ID, without which it is a flow as well
	for n := range len(entry6) - 1 {
		whole := n >= len(entry6)-numbers && (len(entry6)-n)%8 == 0
		if err := decode(entry6[:n], &f); err == nil && !whole {
			t.Errorf("the first %d bytes were taken for a flow: %+v", n, f)
		}
	}
	for name, b := range map[string][]byte{
		"no answer":           tuple(attrOriginal, netfilter.UDP, at("10.0.0.1:1"), at("10.0.0.2:2")),
		"no address":          slices.Concat(nest(attrOriginal, nest(attrAddresses)), tuple(attrReply, netfilter.UDP, at("10.0.0.1:1"), at("10.0.0.2:2"))),
		"short address":       nest(attrOriginal, nest(attrAddresses, attr(attrSource4, 1, 2))),
		"short port":          nest(attrOriginal, nest(attrTransport, attr(attrSourcePort, 1))),
		"long protocol":       nest(attrOriginal, nest(attrTransport, attr(attrNumber, 1, 2))),
		"short status":        attr(attrStatus, 1),
		"a length beyond all": {0xff, 0xff, attrStatus, 0},
		"a length of nothing": {0, 0, attrStatus, 0},
	} {
		if err := decode(b, &f); err == nil {
			t.Errorf("%s: %+v, want an error", name, f)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(entry4)
	f.Add(entry6)
	f.Add(entry4[:40])
	f.Add(nest(attrOriginal, nest(attrOriginal, nest(attrOriginal, []byte{3, 0, 0}))))
	f.Fuzz(func(t *testing.T, b []byte) {
		var flow Flow
		if decode(b, &flow) != nil {
			return
		}
		for _, a := range []netip.AddrPort{flow.Source, flow.Destination, flow.To, flow.From} {
			if !a.Addr().IsValid() {
				t.Errorf("%+v: a flow without all addresses", flow)
			}
		}
	})
}
