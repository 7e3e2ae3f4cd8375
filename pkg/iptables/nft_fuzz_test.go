package iptables

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"testing"

	"github.com/natlens/natlens/pkg/internal/nfnetlink"
	"github.com/natlens/natlens/pkg/netfilter"
)

func attr(typ uint16, parts ...[]byte) []byte { return nfnetlink.Append(nil, typ, parts...) }

func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
func be64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }
func ne32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }

func nftText(typ uint16, s string) []byte { return nfnetlink.AppendString(nil, typ, s) }

// nftExpr makes an element of a rule's list of expressions.
func nftExpr(name string, attrs ...[]byte) []byte {
	return attr(nftaListElem, nftText(nftaExprName, name), attr(nftaExprData, attrs...))
}

func loadPayloadAt(base, offset, length uint32) []byte {
	return nftExpr("payload", attr(1, be32(1)), attr(2, be32(base)), attr(3, be32(offset)), attr(4, be32(length)))
}

func loadMetaKey(key uint32) []byte { return nftExpr("meta", attr(2, be32(key)), attr(1, be32(1))) }

func cmpWith(op uint32, data ...byte) []byte {
	return nftExpr("cmp", attr(1, be32(1)), attr(2, be32(op)), attr(3, attr(nftaDataValue, data)))
}

func maskWith(mask, xor []byte) []byte {
	return nftExpr("bitwise", attr(1, be32(1)), attr(2, be32(1)), attr(3, be32(uint32(len(mask)))),
		attr(4, attr(nftaDataValue, mask)), attr(5, attr(nftaDataValue, xor)))
}

func verdictOf(code int32, chain string) []byte {
	v := attr(1, be32(uint32(code)))
	if chain != "" {
		v = append(v, nftText(2, chain)...)
	}
	return nftExpr("immediate", attr(1, be32(0)), attr(2, attr(nftaDataVerdict, v)))
}

func matchOf(name string, rev uint32, data []byte) []byte {
	return nftExpr("match", nftText(1, name), attr(2, be32(rev)), attr(3, data))
}

func countOf(packets, size uint64) []byte {
	return nftExpr("counter", attr(1, be64(size)), attr(2, be64(packets)))
}

// tcpBlob is a struct xt_tcp: a range of source ports, a destination port, and
// the rest.
func tcpBlob(slo, shi, port uint16, rest ...byte) []byte {
	var b []byte
	for _, p := range []uint16{slo, shi, port, port} {
		b = binary.NativeEndian.AppendUint16(b, p)
	}
	return append(append(b, rest...), make([]byte, 16-8-len(rest))...)
}

func decodeOne(f netfilter.Family, expressions, userData []byte) (*netfilter.Table, *netfilter.Chain) {
	t := netfilter.NewTable(f, "filter", netfilter.BackendNFT)
	c := t.Declare("F")
	t.Declare("U")
	newNFTDecoder(t).rule(c, expressions, userData)
	return t, c
}

var (
	isTCP  = slices.Concat(loadMetaKey(metaL4Proto), cmpWith(cmpEqual, 6))
	accept = verdictOf(nfAccept, "")
)

// nftForms are expressions as versions of iptables-nft other than the installed
// one write them, and those that must not be taken for more than they are.
var nftForms = []struct {
	name        string
	ipv6        bool
	expressions [][]byte
	userData    []byte
	text, kinds string
}{
	{
		name:        "protocol from the header, ports in a blob",
		expressions: [][]byte{loadPayloadAt(1, 9, 1), cmpWith(cmpEqual, 6), matchOf("tcp", 0, tcpBlob(0, 65535, 80)), countOf(3, 4), accept},
		text:        "-p tcp -m tcp --dport 80 -j ACCEPT", kinds: "p dport ACCEPT",
	},
	{
		name:        "a blob for everything",
		expressions: [][]byte{isTCP, matchOf("tcp", 0, tcpBlob(1, 2, 443, 0, 0x17, 2, 5)), accept},
		text:        "-p tcp -m tcp ! --sport 1:2 --dport 443 ! --tcp-flags FIN,SYN,RST,ACK SYN -j ACCEPT", kinds: "p !sport dport !flags ACCEPT",
	},
	{
		name:        "a tcp blob behind -p udp",
		expressions: [][]byte{loadMetaKey(metaL4Proto), cmpWith(cmpEqual, 17), matchOf("tcp", 0, tcpBlob(0, 65535, 80)), accept},
		text:        `-p udp -m tcp --undecoded "revision 0" -j ACCEPT`, kinds: "p unknown ACCEPT",
	},
	{
		name:        "a blob that is cut",
		expressions: [][]byte{isTCP, matchOf("tcp", 0, tcpBlob(0, 65535, 80)[:8]), accept},
		text:        `-p tcp -m tcp --undecoded "revision 0" -j ACCEPT`, kinds: "p unknown ACCEPT",
	},
	{
		name:        "a revision of the future",
		expressions: [][]byte{matchOf("statistic", 7, make([]byte, 24)), accept},
		text:        `-m statistic --undecoded "revision 7" -j ACCEPT`, kinds: "unknown ACCEPT",
	},
	{
		name:        "a comment in the user data",
		expressions: [][]byte{isTCP, countOf(1, 2), accept}, userData: []byte("\x05\x01x\x00\x05a \"b\x00"),
		text: `-p tcp -m comment --comment "a \"b" -j ACCEPT`, kinds: "p comment ACCEPT",
	},
	{
		name:        "user data that is cut",
		expressions: [][]byte{accept}, userData: []byte("\x00\x09ab"),
		text: `-j ACCEPT`, kinds: "ACCEPT",
	},
	{
		name:        "prefixes of whole bytes, against the order of iptables-save",
		expressions: [][]byte{loadMetaKey(metaOIFName), cmpWith(cmpEqual, 'e', 't', 'h'), loadPayloadAt(1, 16, 3), cmpWith(cmpEqual, 10, 1, 2), loadPayloadAt(1, 12, 1), cmpWith(cmpNotEqual, 10), accept},
		text:        "! -s 10.0.0.0/8 -d 10.1.2.0/24 -o eth+ -j ACCEPT", kinds: "!s d o ACCEPT",
	},
	{
		name: "a prefix of IPv6", ipv6: true,
		expressions: [][]byte{loadPayloadAt(1, 8, 7), cmpWith(cmpEqual, 0xfd, 0, 0, 0x10, 2, 0x44, 3), loadPayloadAt(1, 24, 16), maskWith(append(bytes.Repeat([]byte{255}, 7), make([]byte, 9)...), make([]byte, 16)), cmpWith(cmpEqual, append([]byte{0xfd}, make([]byte, 15)...)...), accept},
		text:        "-s fd00:10:244:300::/56 -d fd00::/56 -j ACCEPT", kinds: "s d ACCEPT",
	},
	{
		name:        "an address that its mask excludes",
		expressions: [][]byte{loadPayloadAt(1, 12, 4), maskWith([]byte{255, 0, 0, 0}, make([]byte, 4)), cmpWith(cmpEqual, 10, 1, 0, 0), accept},
		text:        `-m nft --undecoded "network header byte 12, 4 long & 0xff000000 ^ 0x00000000 == 0x0a010000" -j ACCEPT`, kinds: "unknown ACCEPT",
	},
	{
		name:        "an xor",
		expressions: [][]byte{loadMetaKey(metaMark), maskWith(ne32(1), ne32(2)), cmpWith(cmpEqual, ne32(1)...), accept}, kinds: "unknown ACCEPT",
	},
	{
		name:        "both addresses at once",
		expressions: [][]byte{loadPayloadAt(1, 12, 8), cmpWith(cmpEqual, 10, 0, 0, 1, 10, 0, 0, 2), accept}, kinds: "unknown ACCEPT",
	},
	{
		name:        "both ports at once, and flags between",
		expressions: [][]byte{isTCP, loadPayloadAt(2, 13, 1), maskWith([]byte{0x17}, []byte{0}), cmpWith(cmpEqual, 2), matchOf("comment", 0, append([]byte("x"), make([]byte, 255)...)), loadPayloadAt(2, 0, 4), cmpWith(cmpEqual, 0, 3, 0, 80), accept},
		text:        "-p tcp -m tcp --sport 3 --dport 80 --tcp-flags FIN,SYN,RST,ACK SYN -m comment --comment x -j ACCEPT", kinds: "p sport dport flags comment ACCEPT",
	},
	{
		name:        "a port twice",
		expressions: [][]byte{isTCP, loadPayloadAt(2, 2, 2), cmpWith(cmpEqual, 0, 80), loadPayloadAt(2, 2, 2), cmpWith(cmpEqual, 0, 90), accept},
		text:        "-p tcp -m tcp --dport 80 -m tcp --dport 90 -j ACCEPT", kinds: "p dport dport ACCEPT",
	},
	{
		name:        "a range as two comparisons",
		expressions: [][]byte{isTCP, loadPayloadAt(2, 2, 2), cmpWith(cmpGreaterEqual, 0, 80), cmpWith(cmpLessEqual, 0, 90), accept},
		text:        "-p tcp -m tcp --dport 80:90 -j ACCEPT", kinds: "p dport ACCEPT",
	},
	{
		name:        "ports without a protocol",
		expressions: [][]byte{loadPayloadAt(2, 2, 2), cmpWith(cmpEqual, 0, 80), accept}, kinds: "unknown ACCEPT",
	},
	{
		name:        "ports of any other protocol",
		expressions: [][]byte{loadMetaKey(metaL4Proto), cmpWith(cmpNotEqual, 6), loadPayloadAt(2, 2, 2), cmpWith(cmpEqual, 0, 80), accept}, kinds: "!p unknown ACCEPT",
	},
	{
		name:        "a native limit",
		expressions: [][]byte{nftExpr("limit", attr(1, be64(5)), attr(2, be64(60)), attr(3, be32(7)), attr(4, be32(0)), attr(5, be32(0))), accept},
		text:        "-m limit --limit 5/min --limit-burst 7 -j ACCEPT", kinds: "unknown ACCEPT",
	},
	{
		name:        "no interface at all",
		expressions: [][]byte{loadMetaKey(metaIIFName), cmpWith(cmpEqual, []byte("INVAL/D\x00")...), accept},
		text:        "! -i + -j ACCEPT", kinds: "!i ACCEPT",
	},
	{
		name:        "any interface",
		expressions: [][]byte{loadMetaKey(metaIIFName), accept},
		text:        "-j ACCEPT", kinds: "ACCEPT",
	},
	{
		name:        "another register",
		expressions: [][]byte{loadMetaKey(metaL4Proto), nftExpr("cmp", attr(1, be32(2)), attr(2, be32(0)), attr(3, attr(1, []byte{6}))), accept}, kinds: "unknown unknown ACCEPT",
	},
	{
		name:        "a register by its small name",
		expressions: [][]byte{loadMetaKey(metaL4Proto), nftExpr("cmp", attr(1, be32(8)), attr(2, be32(0)), attr(3, attr(1, []byte{6}))), accept},
		text:        "-p tcp -j ACCEPT", kinds: "p ACCEPT",
	},
	{
		name:        "a register that was written over in part",
		expressions: [][]byte{loadPayloadAt(1, 12, 16), nftExpr("meta", attr(2, be32(metaMark)), attr(1, be32(9))), cmpWith(cmpEqual, make([]byte, 16)...), accept}, kinds: "unknown ACCEPT",
	},
	{
		name:        "an attribute of the future",
		expressions: [][]byte{loadMetaKey(metaL4Proto), nftExpr("cmp", attr(1, be32(1)), attr(2, be32(0)), attr(3, attr(1, []byte{6})), attr(9, be32(1))), accept}, kinds: "unknown unknown ACCEPT",
	},
	{
		name:        "an expression of the future",
		expressions: [][]byte{isTCP, nftExpr("zzz", attr(1, be32(1)))},
		text:        "-p tcp -j nft --undecoded zzz", kinds: "p UNKNOWN",
	},
	{
		name:        "an expression of the future before a verdict",
		expressions: [][]byte{isTCP, nftExpr("zzz", attr(1, be32(1))), accept}, kinds: "p unknown ACCEPT",
	},
	{
		name:        "an expression without a name",
		expressions: [][]byte{attr(nftaListElem, attr(nftaExprData)), accept}, kinds: "unknown ACCEPT",
	},
	{
		name:        "a list that is cut",
		expressions: [][]byte{isTCP, {200, 0, 1, 0}}, kinds: "p UNKNOWN",
	},
	{name: "goto", expressions: [][]byte{verdictOf(nftGoto, "U")}, text: "-g U", kinds: "GOTO"},
	{name: "a jump to a chain that is not there", expressions: [][]byte{verdictOf(nftJump, "X")}, text: "-j X", kinds: "JUMP"},
	{name: "a jump to nowhere", expressions: [][]byte{verdictOf(nftJump, "")}, kinds: "UNKNOWN"},
	{name: "break", expressions: [][]byte{verdictOf(nftBreak, "")}, kinds: "UNKNOWN"},
	{name: "queue", expressions: [][]byte{verdictOf(nfQueue, "")}, text: "-j QUEUE", kinds: "QUEUE"},
	{name: "stolen", expressions: [][]byte{verdictOf(2, "")}, kinds: "UNKNOWN"},
	{name: "nothing", text: "", kinds: ""},
}

func TestNFTDecode(t *testing.T) {
	for _, f := range nftForms {
		t.Run(f.name, func(t *testing.T) {
			family := netfilter.IPv4
			if f.ipv6 {
				family = netfilter.IPv6
			}
			table, c := decodeOne(family, slices.Concat(f.expressions...), f.userData)
			text := RuleText(table, c, 0)
			if f.text != "" && text != rule(f.text) {
				t.Errorf("read as\n%s, want\n%s", text, rule(f.text))
			}
			if got := brief(c, 0); got != f.kinds {
				t.Errorf("read as %q: %s, want %q", got, text, f.kinds)
			}
			// What the decoder makes up for a name is text that Parse takes.
			if again := mustParse(t, fmt.Sprintf("# Generated by %s\n*filter\n:F - [0:0]\n:U - [0:0]\n:X - [0:0]\n%s\nCOMMIT\n", saveProgram(family), text)); again.Tables[0].Lookup("F").Len() != 1 {
				t.Errorf("%s is lost", text)
			} else if got := brief(again.Tables[0].Lookup("F"), 0); got != f.kinds {
				t.Errorf("%s is parsed as %q", text, got)
			}
		})
	}
}

// A counter ahead of a match counts other packets than the rule's.
func TestNFTCounterPosition(t *testing.T) {
	_, c := decodeOne(netfilter.IPv4, slices.Concat(isTCP, countOf(3, 4), accept), nil)
	if n, ok := c.Counter(0); !ok || n != (netfilter.Counter{Packets: 3, Bytes: 4}) {
		t.Errorf("the counter is %v", n)
	}
	_, c = decodeOne(netfilter.IPv4, slices.Concat(countOf(3, 4), isTCP, accept), nil)
	if n, ok := c.Counter(0); !ok || n != (netfilter.Counter{}) {
		t.Errorf("the counter is %v", n)
	}
}

// FuzzNFTDecode wants of any bytes: no panic, one rule in the shape of the
// model, memory in proportion to them, and that an expression behind them that
// nobody knows is never lost.
func FuzzNFTDecode(f *testing.F) {
	for _, form := range nftForms {
		f.Add(slices.Concat(form.expressions...), form.userData, form.ipv6)
	}
	for name, sizes := range xtSizes {
		for rev, size := range sizes {
			f.Add(matchOf(name, uint32(rev), bytes.Repeat([]byte{1}, size)), []byte(nil), rev == 0)
			f.Add(nftExpr("target", nftText(1, name), attr(2, be32(uint32(rev))), attr(3, make([]byte, size))), []byte(nil), rev == 0)
		}
	}
	for _, b := range [][]byte{
		slices.Concat(nftExpr("immediate", attr(1, be32(1)), attr(2, attr(1, []byte{10, 0, 0, 1}))), nftExpr("immediate", attr(1, be32(2)), attr(2, attr(1, []byte{0, 80}))),
			nftExpr("nat", attr(1, be32(1)), attr(2, be32(2)), attr(3, be32(1)), attr(5, be32(2)), attr(7, be32(3)))),
		nftExpr("masq", attr(1, be32(16))), nftExpr("redir", attr(3, be32(0))), nftExpr("reject", attr(1, be32(0)), attr(2, []byte{3})),
		nftExpr("log", attr(1, []byte{0, 2}), nftText(2, "x")), nftExpr("queue", attr(1, []byte{0, 3})),
		slices.Concat(loadPayloadAt(2, 2, 2), nftExpr("lookup", nftText(1, "__set0"), attr(2, be32(1)))),
		slices.Concat(nftExpr("fib", attr(1, be32(1)), attr(2, be32(3)), attr(3, be32(2))), cmpWith(cmpEqual, ne32(2)...)),
		slices.Concat(nftExpr("ct", attr(2, be32(0)), attr(1, be32(1))), maskWith(ne32(6), ne32(0)), cmpWith(cmpNotEqual, ne32(0)...)),
		slices.Concat(loadMetaKey(metaMark), maskWith(ne32(1), ne32(2)), nftExpr("meta", attr(2, be32(metaMark)), attr(3, be32(1)))),
		slices.Concat(isTCP, loadPayloadAt(2, 0, 2), nftExpr("range", attr(1, be32(1)), attr(2, be32(1)), attr(3, attr(1, []byte{0, 1})), attr(4, attr(1, []byte{0, 9})))),
	} {
		f.Add(b, []byte(nil), false)
	}
	f.Fuzz(func(t *testing.T, expressions, userData []byte, ipv6 bool) {
		if len(expressions) > 32<<10 { // longer than any message
			return
		}
		family := netfilter.IPv4
		if ipv6 {
			family = netfilter.IPv6
		}
		table, c := decodeOne(family, expressions, userData)
		text := RuleText(table, c, 0)
		if c.Len() != 1 {
			t.Fatalf("%d rules", c.Len())
		}
		exprs := c.Rule(0)
		for i, e := range exprs {
			if !e.IsMatch() && i < len(exprs)-1 {
				t.Fatalf("a target is not the last expression: %s", brief(c, 0))
			}
		}
		if n := len(expressions) + len(userData); len(text) > 16*n+1024 || len(exprs) > n+1 {
			t.Fatalf("%d bytes become %d expressions and %d bytes of text", n, len(exprs), len(text))
		}
		if _, _, _, ok := nfnetlink.Next(expressions); len(expressions) > 0 && !ok {
			return // what is appended does not begin where it seems to
		}
		more := slices.Concat(expressions, make([]byte, -len(expressions)&3), nftExpr("zzz"))
		_, c = decodeOne(family, more, userData)
		if !slices.ContainsFunc(c.Rule(0), func(e netfilter.Expr) bool {
			return e.Kind == netfilter.Unknown || e.Kind == netfilter.UnknownTarget
		}) {
			t.Fatalf("an unknown expression is lost: %s", brief(c, 0))
		}
	})
}
