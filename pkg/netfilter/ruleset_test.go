package netfilter

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
)

func TestFamilyOf(t *testing.T) {
	for text, want := range map[string]Family{"10.0.0.1": IPv4, "::ffff:10.0.0.1": IPv6, "fd00::1": IPv6, "::1": IPv6, "::": IPv6, "0.0.0.0": IPv4} {
		if got := FamilyOf(netip.MustParseAddr(text)); got != want {
			t.Errorf("%s is %v, want %v", text, got, want)
		}
	}
	if IPv4.String() != "ipv4" || IPv6.String() != "ipv6" {
		t.Errorf("the families are called %v and %v", IPv4, IPv6)
	}
}

func TestProtocol(t *testing.T) {
	for text, want := range map[string]Protocol{"tcp": TCP, "TCP": TCP, "Udp": UDP, "sctp": SCTP} {
		if got, err := ParseProtocol(text); err != nil || got != want {
			t.Errorf("%s: %v %v", text, got, err)
		}
	}
	for _, text := range []string{"", "6", "icmp", "tcp "} {
		if got, err := ParseProtocol(text); err == nil {
			t.Errorf("%q is read as %v", text, got)
		}
	}
	for p, want := range map[Protocol]string{TCP: "TCP", UDP: "UDP", SCTP: "SCTP", 47: "47"} {
		if p.String() != want {
			t.Errorf("%d is called %v", uint8(p), p)
		}
	}
}

func TestHookNames(t *testing.T) {
	for h, want := range map[Hook]string{Prerouting: "PREROUTING", Input: "INPUT", Forward: "FORWARD", Output: "OUTPUT", Postrouting: "POSTROUTING"} {
		if h.String() != want {
			t.Errorf("hook %d is called %v", uint8(h), h)
		}
	}
}

// A kind is a match or a target, which is told by its number alone.
func TestMatchesAndTargets(t *testing.T) {
	for k := Source; k <= Unknown; k++ {
		if !(Expr{Kind: k}).IsMatch() {
			t.Errorf("kind %d is no match", k)
		}
	}
	for _, k := range []Kind{SetMark, SetConnMark, SaveMark, RestoreMark, NoTrack, NoEffect, Jump, Goto, Return, Accept, Drop, Queue, Reject, DNAT, DNATRange, Redirect, SNAT, Masquerade, UnknownTarget} {
		if (Expr{Kind: k}).IsMatch() {
			t.Errorf("kind %d is a match", k)
		}
	}
	if (Expr{Flags: Joined}).Negated() || !(Expr{Flags: Not | Joined}).Negated() {
		t.Error("the flag Not is misread")
	}
}

// mask returns a mask of so many bits.
func mask(t *testing.T, f Family, bits int) netip.Addr {
	t.Helper()
	p, err := allOnes(f == IPv4).Prefix(bits)
	if err != nil {
		t.Fatal(err)
	}
	return p.Addr()
}

func TestPrefixes(t *testing.T) {
	addr := netip.MustParseAddr
	for _, c := range []struct {
		family     Family
		addr, mask netip.Addr
		cidr       string // "" for none
		in, out    []string
	}{
		{IPv4, addr("10.0.0.0"), mask(t, IPv4, 8), "10.0.0.0/8", []string{"10.0.0.0", "10.255.255.255"}, []string{"9.255.255.255", "11.0.0.0", "fd00::1", "::ffff:10.0.0.1"}},
		{IPv4, addr("10.0.0.1"), mask(t, IPv4, 32), "10.0.0.1/32", []string{"10.0.0.1"}, []string{"10.0.0.0", "10.0.0.2"}},
		{IPv4, addr("0.0.0.0"), mask(t, IPv4, 0), "0.0.0.0/0", []string{"0.0.0.0", "255.255.255.255"}, []string{"::"}},
		{IPv4, addr("128.0.0.0"), mask(t, IPv4, 1), "128.0.0.0/1", []string{"128.0.0.0"}, []string{"127.255.255.255"}},
		{IPv4, addr("10.0.7.0"), addr("255.0.255.0"), "", []string{"10.99.7.3"}, []string{"10.99.8.3", "11.0.7.0"}},
		{IPv4, addr("10.0.0.5"), addr("255.255.255.253"), "", []string{"10.0.0.5", "10.0.0.7"}, []string{"10.0.0.4", "10.0.0.6"}},
		{IPv4, addr("0.0.0.1"), addr("0.0.0.255"), "", []string{"9.9.9.1"}, []string{"9.9.9.2"}},
		{IPv6, addr("fd00::"), mask(t, IPv6, 8), "fd00::/8", []string{"fd00::1", "fdff::1"}, []string{"fc00::1", "10.0.0.1"}},
		{IPv6, addr("fd00::1"), mask(t, IPv6, 128), "fd00::1/128", []string{"fd00::1"}, []string{"fd00::", "fd00::2"}},
		{IPv6, addr("::"), mask(t, IPv6, 0), "::/0", []string{"::", "ffff::"}, []string{"0.0.0.0"}},
		{IPv6, addr("fd00:10:244::"), mask(t, IPv6, 61), "fd00:10:244::/61", []string{"fd00:10:244:7::1"}, []string{"fd00:10:244:8::1"}},
		{IPv6, addr("fd00::1"), addr("ffff::ffff"), "", []string{"fd00:1:2:3:4:5:6:1"}, []string{"fd00::2", "fd01::1"}},
		{IPv6, addr("::1:0:0:0"), mask(t, IPv6, 80), "::1:0:0:0/80", []string{"::1:0:0:9"}, []string{"::2:0:0:9"}},
		// Addresses that firewalls refuse to hear from.
		{IPv6, addr("::ffff:0.0.0.0"), mask(t, IPv6, 96), "::ffff:0.0.0.0/96", []string{"::ffff:1.2.3.4"}, []string{"::fffe:0:1", "1.2.3.4"}},
	} {
		name := fmt.Sprintf("%v/%v", c.addr, c.mask)
		chain := NewTable(c.family, "nat", BackendNFT).Declare("F")
		if err := chain.AddPrefix(Source, Not, c.addr, c.mask); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		chain.End(nil)
		e := chain.Rule(0)[0]
		if a, m := chain.Prefix(e); a != c.addr || m != c.mask || e.Kind != Source || !e.Negated() {
			t.Errorf("%s comes back as %v/%v", name, a, m)
		}
		got := ""
		if p, ok := chain.CIDR(e); ok {
			got = p.String()
		}
		if got != c.cidr {
			t.Errorf("%s: prefix %q, want %q", name, got, c.cidr)
		}
		for _, a := range c.in {
			if !chain.Contains(e, addr(a)) {
				t.Errorf("%s does not hold %s", name, a)
			}
		}
		for _, a := range c.out {
			if chain.Contains(e, addr(a)) {
				t.Errorf("%s holds %s", name, a)
			}
		}
	}
}

func TestWrongFamily(t *testing.T) {
	v4, v6 := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")
	for _, f := range []Family{IPv4, IPv6} {
		own, other := v4, v6
		if f == IPv6 {
			own, other = v6, v4
		}
		c := NewTable(f, "nat", BackendLegacy).Declare("F")
		if c.AddPrefix(Source, 0, other, other) == nil || c.AddPrefix(Source, 0, own, other) == nil || c.AddPrefix(Source, 0, other, own) == nil {
			t.Errorf("%v: a prefix of the other family is taken", f)
		}
		if c.AddDNAT(netip.AddrPortFrom(other, 80)) == nil {
			t.Errorf("%v: a DNAT to the other family is taken", f)
		}
		if c.End(nil); len(c.Rule(0)) != 0 {
			t.Errorf("%v: what was refused stays behind: %v", f, c.Rule(0))
		}
	}
}

func TestTargets(t *testing.T) {
	for family, list := range map[Family][]netip.AddrPort{
		IPv4: {
			netip.MustParseAddrPort("10.0.0.1:80"), netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), 0),
			netip.AddrPortFrom(netip.Addr{}, 80), netip.MustParseAddrPort("0.0.0.0:65535"), netip.MustParseAddrPort("255.255.255.255:1"),
		},
		IPv6: {
			netip.MustParseAddrPort("[fd00::1]:80"), netip.AddrPortFrom(netip.MustParseAddr("fd00::1"), 0),
			netip.AddrPortFrom(netip.Addr{}, 80), netip.MustParseAddrPort("[::]:65535"), netip.MustParseAddrPort("[fd00::2]:80"),
		},
	} {
		c := NewTable(family, "nat", BackendNFT).Declare("F")
		for _, to := range list {
			if err := c.AddDNAT(to); err != nil {
				t.Errorf("%v: %v", to, err)
			}
			c.End(nil)
		}
		for i, to := range list {
			if got := c.Target(c.Rule(i)[0]); got != to {
				t.Errorf("%v comes back as %v", to, got)
			}
		}
	}
}

// Equal texts are stored once, and none is confused with another, also behind
// expressions whose numbers look like a place in the text.
func TestTexts(t *testing.T) {
	c := NewTable(IPv4, "nat", BackendNFT).Declare("F")
	var want []string
	for i := range 200 {
		text := fmt.Sprintf("text %d", i%7)
		switch i % 5 {
		case 0:
			text = ""
		case 1:
			text = fmt.Sprintf("unique %d", i)
		}
		c.AddText(Comment, 0, 0, []byte(text))
		c.Add(Expr{Kind: ProtocolIs, A: uint32(i), B: 4})
		c.Add(Expr{Kind: MarkIs, A: 0xffffffff, B: 0xffffffff})
		if err := c.AddPrefix(Source, 0, netip.MustParseAddr("0.0.0.3"), netip.MustParseAddr("0.0.0.4")); err != nil {
			t.Fatal(err)
		}
		c.End(nil)
		want = append(want, text)
	}
	for i := range want {
		if got := c.Comment(i); got != want[i] {
			t.Errorf("rule %d says %q, want %q", i, got, want[i])
		}
	}
	size := 0
	repeat := NewTable(IPv4, "nat", BackendNFT).Declare("F")
	for range 1000 {
		repeat.AddText(Comment, 0, 0, []byte("shop/a:http"))
		repeat.Add(Expr{Kind: Jump})
		repeat.End(nil)
		size = max(size, len(repeat.text))
	}
	if size != len("shop/a:http") {
		t.Errorf("one text repeated takes %d bytes", size)
	}
	if repeat.Comment(999) != "shop/a:http" {
		t.Errorf("the last rule says %q", repeat.Comment(999))
	}
	none := NewTable(IPv4, "nat", BackendNFT).Declare("F")
	none.Add(Expr{Kind: Accept})
	none.End(nil)
	if none.Comment(0) != "" {
		t.Errorf("a rule without a comment says %q", none.Comment(0))
	}
}

func TestRulesAndCounters(t *testing.T) {
	c := NewTable(IPv4, "nat", BackendNFT).Declare("F")
	c.Add(Expr{Kind: Accept})
	c.End(nil)
	if _, ok := c.Counter(0); ok || c.Len() != 1 {
		t.Errorf("a rule without a counter has one")
	}
	c.End(nil) // a rule without expressions: -A F
	c.Add(Expr{Kind: ProtocolIs, A: 6})
	at := c.Mark()
	c.Add(Expr{Kind: Drop})
	c.Undo(at)
	c.Add(Expr{Kind: Return})
	c.End(&Counter{1, 2})
	c.Add(Expr{Kind: Drop})
	c.End(nil)
	c.End(&Counter{3, 4})
	want := [][]Expr{{{Kind: Accept}}, {}, {{Kind: ProtocolIs, A: 6}, {Kind: Return}}, {{Kind: Drop}}, {}}
	counters := []Counter{{}, {}, {1, 2}, {}, {3, 4}}
	if c.Len() != len(want) {
		t.Fatalf("%d rules, want %d", c.Len(), len(want))
	}
	for i := range want {
		if got := c.Rule(i); !slices.Equal(got, want[i]) {
			t.Errorf("rule %d is %v, want %v", i, got, want[i])
		}
		if got, ok := c.Counter(i); !ok || got != counters[i] {
			t.Errorf("rule %d has counted %v, want %v", i, got, counters[i])
		}
	}
	// A rule under construction is not one yet.
	c.Add(Expr{Kind: Accept})
	if c.Len() != len(want) {
		t.Errorf("%d rules, want %d", c.Len(), len(want))
	}
}

func TestTable(t *testing.T) {
	table := NewTable(IPv4, "nat", BackendLegacy)
	// A jump can name a chain before it is declared, or without that.
	later, never := table.ID("LATER"), table.ID("NEVER")
	first := table.Declare("FIRST")
	table.Declare("LATER")
	if table.ID("LATER") != later || table.ByID(later) == nil || table.ByID(later).ID != later || table.ByID(later).Name != "LATER" {
		t.Error("a chain declared after a jump to it is another")
	}
	if table.ByID(never) != nil || table.Lookup("NEVER") != nil || table.ChainName(never) != "NEVER" {
		t.Error("a chain that jumps alone name is there")
	}
	if table.Lookup("UNHEARD") != nil || table.NameCount() != 3 {
		t.Errorf("%d names, want 3", table.NameCount())
	}
	if table.Declare("FIRST") != first || table.Lookup("FIRST") != first || table.ByID(first.ID) != first {
		t.Error("a chain declared again is another")
	}
	var names []string
	for c := range table.Chains() {
		names = append(names, c.Name)
	}
	if !slices.Equal(names, []string{"FIRST", "LATER"}) {
		t.Errorf("the chains are %v", names)
	}
	first.End(nil)
	first.End(nil)
	table.Lookup("LATER").End(nil)
	rs := &Ruleset{Tables: []*Table{table, NewTable(IPv6, "nat", BackendLegacy)}}
	if table.RuleCount() != 3 || rs.RuleCount() != 3 {
		t.Errorf("%d rules of %d, want 3", table.RuleCount(), rs.RuleCount())
	}
	if rs.Table(IPv4, "nat") != table || rs.Table(IPv6, "nat") != rs.Tables[1] || rs.Table(IPv4, "filter") != nil {
		t.Error("a table is found that was not asked for")
	}
}

// Chains of a hook run by priority; at the same one, as their tables stand.
func TestBaseChains(t *testing.T) {
	rs := &Ruleset{}
	add := func(f Family, table string, b Backend, bases ...Base) {
		tb := NewTable(f, table, b)
		for i := range bases {
			tb.Declare(fmt.Sprintf("%s%d", table, i)).Base = &bases[i]
		}
		tb.Declare("OWN")
		rs.Tables = append(rs.Tables, tb)
	}
	add(IPv4, "filter", BackendNFT, Base{Hook: Output})
	add(IPv4, "nat", BackendNFT, Base{Hook: Output, Priority: -100, Type: TypeNAT}, Base{Hook: Prerouting, Priority: -100, Type: TypeNAT})
	add(IPv6, "nat", BackendNFT, Base{Hook: Output, Priority: -100, Type: TypeNAT})
	add(IPv4, "raw", BackendNFT, Base{Hook: Output, Priority: -300})
	add(IPv4, "nat", BackendLegacy, Base{Hook: Output, Priority: -100, Type: TypeNAT})
	var got []string
	for _, b := range rs.BaseChains(IPv4)[Output] {
		got = append(got, fmt.Sprintf("%s %s", b.Table.Backend, b.Name))
	}
	if want := []string{"iptables-nft raw0", "iptables-nft nat0", "iptables-legacy nat0", "iptables-nft filter0"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := rs.BaseChains(IPv4)[Forward]; len(got) != 0 {
		t.Errorf("%d chains in FORWARD", len(got))
	}
	if got := rs.BaseChains(IPv6)[Output]; len(got) != 1 {
		t.Errorf("%d chains of IPv6", len(got))
	}
}
