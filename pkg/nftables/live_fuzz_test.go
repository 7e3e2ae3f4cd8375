package nftables

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/natlens/natlens/pkg/internal/nfnetlink"
	"github.com/natlens/natlens/pkg/netfilter"
)

func attr(typ uint16, parts ...[]byte) []byte { return nfnetlink.Append(nil, typ, parts...) }

func attr32(typ uint16, v uint32) []byte { return attr(typ, binary.BigEndian.AppendUint32(nil, v)) }

func attrText(typ uint16, s string) []byte { return nfnetlink.AppendString(nil, typ, s) }

// expr makes an expression of a rule.
func expr(name string, attrs ...[]byte) []byte {
	return attr(nftaListElem, attrText(nftaExprName, name), attr(nftaExprData, attrs...))
}

// elements makes the elements of a map from random numbers to addresses.
func elements(n int, data func(i int) []byte) (list []byte) {
	for i := range n {
		key := attr(nftaDataValue, binary.NativeEndian.AppendUint32(nil, uint32(i)))
		list = append(list, attr(nftaListElem, attr(nftaElemKey, key), attr(nftaElemData, data(i)))...)
	}
	return list
}

// decodeAll decodes a table of two chains, some sets and one rule, in a step.
func decodeAll(t *liveTable, set, named, expressions, userData []byte) *netfilter.Table {
	f := t.last.Family
	t.renew()
	t.begin()
	table := attrText(nftaChainTable, kubeProxyTable)
	for _, name := range []string{"c", "d"} {
		t.addChain(append(append([]byte{}, table...), attrText(nftaChainName, name)...))
	}
	addr := uint32(typeIPv4)
	size := uint32(4)
	if f == netfilter.IPv6 {
		addr, size = uint32(typeIPv6), 16
	}
	anonymous := map[string]*liveSet{}
	for _, s := range []struct {
		name              string
		flags, key, n     uint32
		dataType, dataLen uint32
	}{
		{"ips", setInterval, addr, size, 0, 0},
		{"clients", setTimeout | setEval, addr, size, 0, 0},
		{"m", setMap, addr<<12 | uint32(typeProtocol)<<6 | uint32(typePort), size + 8, dataVerdict, 16},
		{"__map0", setAnonymous | setMap, 4, 4, addr<<6 | uint32(typePort), size + 4},
		{"__map1", setAnonymous | setMap, 4, 4, dataVerdict, 16},
		{"__set0", setAnonymous | setInterval, addr, size, 0, 0},
	} {
		var b []byte
		for _, a := range [][]byte{
			attrText(nftaSetTable, kubeProxyTable), attrText(nftaSetName, s.name), attr32(nftaSetFlags, s.flags), attr32(nftaSetKeyType, s.key),
			attr32(nftaSetKeyLen, s.n), attr32(nftaSetDataType, s.dataType), attr32(nftaSetDataLen, s.dataLen),
		} {
			b = append(b, a...)
		}
		t.addSet(b)
		if s.flags&setAnonymous != 0 {
			var a setAttrs
			nfnetlink.Collect(b, a[:])
			anonymous[s.name] = newLiveSet(&a)
			anonymous[s.name].raw = set
		}
	}
	read := func(k *known) {
		t.beginElements(k)
		t.addElements(named)
		t.endElements(k)
	}
	for _, k := range t.listed {
		if !k.mayBeFilled() && !k.broken {
			read(k)
		}
	}
	rule := append(append([]byte{}, table...), attrText(nftaRuleChain, "c")...)
	rule = append(rule, attr(nftaRuleExpressions, expressions)...)
	t.addRule(append(rule, attr(nftaRuleUserData, userData)...))
	t.endRules()
	t.declare()
	for _, w := range t.wantedSets() {
		if w.set = anonymous[w.name]; w.set != nil {
			w.countable()
			t.decode.sets[w.name] = w.set
		}
	}
	t.decodeRules()
	t.decodeOthers()
	filled := t.filled()
	for _, k := range t.listed {
		if k.mayBeFilled() && !filled[k.name] {
			read(k)
		}
	}
	t.decodeSets(filled)
	t.end()
	return t.last
}

// fuzzRules are expressions as nft writes them.
func fuzzRules() map[string][]byte {
	join := func(parts ...[]byte) (out []byte) {
		for _, p := range parts {
			out = append(out, p...)
		}
		return out
	}
	verdict := func(code int32, chain string) []byte {
		parts := [][]byte{attr32(nftaVerdictCode, uint32(code))}
		if chain != "" {
			parts = append(parts, attrText(nftaVerdictChain, chain))
		}
		return expr("immediate", attr32(1, 0), attr(2, attr(nftaDataVerdict, parts...)))
	}
	load := func(base, offset, n, register uint32) []byte {
		return expr("payload", attr32(1, register), attr32(2, base), attr32(3, offset), attr32(4, n))
	}
	cmp := func(op uint32, data ...byte) []byte {
		return expr("cmp", attr32(1, 1), attr32(2, op), attr(3, attr(nftaDataValue, data)))
	}
	numgen := expr("numgen", attr32(1, 1), attr32(2, 3), attr32(3, 1), attr32(4, 0))
	return map[string][]byte{
		"ip saddr 10.0.0.0/8 jump d":                                   join(load(1, 12, 1, 1), cmp(0, 10), verdict(verdictJump, "d")),
		"th dport 1-1024 drop":                                         join(load(2, 2, 2, 1), cmp(5, 0, 1), cmp(3, 4, 0), verdict(verdictDrop, "")),
		"ip daddr . meta l4proto . th dport vmap @m":                   join(load(1, 16, 4, 1), expr("meta", attr32(1, 9), attr32(2, metaL4Proto)), load(2, 2, 2, 10), expr("lookup", attrText(1, "m"), attr32(2, 1), attr32(3, 0))),
		"dnat ip to numgen random mod 3 map { 3× 10.0.0.1:80 }":        join(numgen, expr("lookup", attrText(1, "__map0"), attr32(2, 1), attr32(3, 1)), expr("nat", attr32(1, 1), attr32(2, 2), attr32(3, 1), attr32(4, 1), attr32(5, 9), attr32(6, 9), attr32(7, 3))),
		"ip saddr @clients drop":                                       join(load(1, 12, 4, 1), expr("lookup", attrText(1, "clients"), attr32(2, 1)), verdict(verdictDrop, "")),
		"meta mark set meta mark | 0x00004000":                         join(expr("meta", attr32(1, 1), attr32(2, metaMark)), expr("bitwise", attr32(1, 1), attr32(2, 1), attr32(3, 4), attr(4, attr(1, binary.NativeEndian.AppendUint32(nil, ^uint32(0x4000)))), attr(5, attr(1, binary.NativeEndian.AppendUint32(nil, 0x4000)))), expr("meta", attr32(2, metaMark), attr32(3, 1))),
		`{"undecoded": "payload of 4 bytes at 12 of header 1"} accept`: join(load(1, 12, 4, 1), verdict(verdictAccept, "")),
		// A port behind what a shorter load left.
		`{"undecoded": "payload of 4 bytes at 16 of header 1"} {"undecoded": "vmap: lookup in @m"}`: join(load(1, 16, 4, 1), load(1, 12, 8, 8), expr("meta", attr32(1, 9), attr32(2, metaL4Proto)), load(2, 2, 2, 10), expr("lookup", attrText(1, "m"), attr32(2, 1), attr32(3, 0))),
		`{"undecoded": "new"}`:  expr("new"),
		`{"undecoded": "list"}`: {1},
	}
}

func dnatData(int) []byte { return attr(nftaDataValue, []byte{10, 0, 0, 1, 0, 80, 0, 0}) }

func TestLiveDecode(t *testing.T) {
	for want, b := range fuzzRules() {
		table := decodeAll(newLiveTable(netfilter.IPv4, 0), elements(3, dnatData), nil, b, []byte("\x00\x03no\x00"))
		got := RuleText(table, table.Lookup("c"), 0)
		if want := "c: " + want + ` comment "no"`; got != want {
			t.Errorf(" got %s\nwant %s", got, want)
		}
	}
}

// TestLiveWithoutRules wants chains without rules to be believed only when the
// kernel counts none either.
func TestLiveWithoutRules(t *testing.T) {
	for use, want := range []bool{false, true} {
		lt := newLiveTable(netfilter.IPv4, 0)
		lt.begin()
		b := append(attrText(nftaChainTable, kubeProxyTable), attrText(nftaChainName, "nat-output")...)
		b = append(b, attr(nftaChainHook, attr32(nftaHookNumber, 3), attr32(nftaHookPriority, 0))...)
		lt.addChain(append(b, attr32(nftaChainUse, uint32(use))...))
		lt.endRules()
		lt.declare()
		if lt.changed != want {
			t.Errorf("with %d rules counted and none found: changed %t", use, lt.changed)
		}
	}
}

// normal is a table as text, without numbers of sets and chains.
func normal(t *netfilter.Table) string {
	var out []string
	for _, s := range t.Sets() {
		if s.Name == "" {
			continue // in the text of its rule
		}
		lines := []string{fmt.Sprintf("set %s map %v dynamic %v opaque %v timeout %v", s.Name, s.Map, s.Dynamic, s.Opaque, s.Timeout)}
		for _, k := range s.Keys {
			e, _ := s.Lookup(k)
			target := ""
			if e.Verdict.Kind == netfilter.Jump || e.Verdict.Kind == netfilter.Goto {
				target = t.ChainName(netfilter.ChainID(e.Verdict.A))
				e.Verdict.A = 0
			}
			lines = append(lines, fmt.Sprint(k, e, target))
		}
		slices.Sort(lines[1:])
		out = append(out, strings.Join(append(lines, fmt.Sprint(s.Ranges)), "\n"))
	}
	slices.Sort(out)
	for c := range t.Chains() {
		out = append(out, "chain "+c.Name)
		if c.Base != nil {
			out = append(out, fmt.Sprintf("%+v", *c.Base))
		}
		for i := range c.Len() {
			var kinds []string
			for _, e := range c.Rule(i) {
				kinds = append(kinds, fmt.Sprint(e.Kind, e.Flags, e.N))
				if e.Kind == netfilter.Choose {
					p := printer{table: t, chain: c}
					for _, choice := range c.Choices(e) {
						kinds = append(kinds, fmt.Sprint(choice.Count, p.verdict(choice.Verdict)))
					}
				}
			}
			n, counted := c.Counter(i)
			out = append(out, fmt.Sprint(RuleText(t, c, i), " | ", kinds, n, counted))
		}
	}
	return strings.Join(out, "\n")
}

// FuzzLiveDecode wants the decoder to hold whatever a message says.
func FuzzLiveDecode(f *testing.F) {
	for _, b := range fuzzRules() {
		f.Add(false, elements(3, dnatData), elements(1, dnatData), b, []byte("\x00\x03no\x00"))
		f.Add(true, []byte{}, elements(2, dnatData), b, []byte{0, 9})
	}
	f.Fuzz(func(t *testing.T, ipv6 bool, set, named, expressions, userData []byte) {
		if len(set)+len(named)+len(expressions)+len(userData) > 1<<15 {
			return
		}
		family := netfilter.IPv4
		if ipv6 {
			family = netfilter.IPv6
		}
		// A step upon the last one must make the table that a first step makes.
		lt := newLiveTable(family, 0)
		decodeAll(lt, elements(2, dnatData), set, fuzzRules()[`{"undecoded": "new"}`], nil)
		table := decodeAll(lt, set, named, expressions, userData)
		if again := decodeAll(lt, set, named, expressions, userData); again != table && !lt.changed {
			t.Error("the same messages made another table")
		}
		table = lt.last
		if fresh := decodeAll(newLiveTable(family, 0), set, named, expressions, userData); normal(table) != normal(fresh) {
			t.Errorf("in a second step:\n%s\nin a first one:\n%s", normal(table), normal(fresh))
		}
		table.Digest()
		c := table.Lookup("c")
		if c.Len() != 1 {
			t.Fatalf("%d rules", c.Len())
		}
		RuleText(table, c, 0)
		rule := c.Rule(0)
		for i, e := range rule {
			switch {
			case e.Kind >= netfilter.Jump && e.Kind != netfilter.UnknownTarget && i != len(rule)-1:
				t.Errorf("a verdict ahead of the end: %s", RuleText(table, c, 0))
			case e.Kind == netfilter.Choose:
				n := uint32(0)
				for _, choice := range c.Choices(e) {
					n += choice.Count
				}
				if n > e.B {
					t.Errorf("%d of %d numbers", n, e.B)
				}
			}
		}
		if len(expressions) > 0 && len(rule) == 0 {
			for b := expressions; len(b) > 0; {
				typ, _, rest, ok := nfnetlink.Next(b)
				if !ok || typ != nftaListElem {
					t.Fatal("bytes that are no list are no part of the rule")
				}
				b = rest
			}
		}
	})
}

// FuzzForeign wants another program's table to be read as one that may hold
// anything, for both families.
func FuzzForeign(f *testing.F) {
	for _, b := range fuzzRules() {
		f.Add(elements(3, dnatData), b)
	}
	f.Fuzz(func(t *testing.T, set, expressions []byte) {
		if len(set)+len(expressions) > 1<<15 {
			return
		}
		ft := newForeignTable("inet", nfprotoInet, "other", 1)
		read := func() {
			ft.begin()
			for _, name := range []string{"o", "c"} {
				rule := append(attrText(nftaRuleTable, "other"), attrText(nftaRuleChain, name)...)
				ft.addRule(append(rule, attr(nftaRuleExpressions, expressions)...))
			}
			ft.bases = map[string]*netfilter.Base{"o": {Hook: netfilter.Output, Priority: -100, Type: netfilter.TypeNAT, Policy: netfilter.Accept}}
			err := ft.follow(func(name string) error {
				s := &liveSet{name: name, flags: setMap, keySize: 4, types: []keyType{typeIPv4}, verdicts: len(name)%2 == 0, dataSize: 8, raw: set}
				if strings.HasPrefix(name, "__") {
					s.flags |= setAnonymous
				}
				ft.sets[name] = s
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			ft.decode()
			ft.end()
		}
		read()
		if len(ft.tables) != 2 {
			t.Fatalf("%d tables", len(ft.tables))
		}
		before := ft.tables
		for _, table := range before {
			for c := range table.Chains() {
				for i := range c.Len() {
					RuleText(table, c, i)
				}
			}
		}
		if read(); before[0] != ft.tables[0] || before[1] != ft.tables[1] {
			t.Error("the same messages made other tables")
		}
	})
}
