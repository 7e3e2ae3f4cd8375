package iptables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/natlens/natlens/pkg/netfilter"
)

var families = []netfilter.Family{netfilter.IPv4, netfilter.IPv6}

// undecoded are the matches and targets whose options Legacy does not decode.
// It says so in their text, but takes them for what they are.
var undecoded = []string{
	"bpf", "cgroup", "cluster", "connlabel", "devgroup", "dst", "ecn", "eui64", "frag", "hashlimit", "ipv6header", "mh",
	"osf", "policy", "quota", "rateest", "realm", "rt", "sctp", "string", "time", "u32", "ah",
	"CONNSECMARK", "ECN", "HMARK", "RATEEST", "SYNPROXY", "TCPOPTSTRIP",
}

// compareRules wants of two rulesets the same tables, chains, counters, rules
// and expressions.
func compareRules(t *testing.T, want, got *netfilter.Ruleset) {
	t.Helper()
	describe := func(rs *netfilter.Ruleset) (out []string) {
		for _, table := range rs.Tables {
			out = append(out, fmt.Sprintf("*%s %v %s %d names", table.Name, table.Family, table.Backend, table.NameCount()))
			for c := range table.Chains() {
				out = append(out, fmt.Sprintf(":%s %d", c.Name, c.ID))
				if c.Base != nil {
					out = append(out, fmt.Sprintf("%+v", *c.Base))
				}
				for i := range c.Len() {
					counter, counted := c.Counter(i)
					line := fmt.Sprintf("%v %v %s =", counter, counted, RuleText(table, c, i))
					for _, e := range c.Rule(i) {
						line += fmt.Sprintf(" %d/%d/%d", e.Kind, e.Flags, e.N)
					}
					out = append(out, line)
				}
			}
		}
		return out
	}
	a, b := describe(want), describe(got)
	if len(a) == len(b) {
		for i := range b {
			if name := undecodedName(b[i]); slices.Contains(undecoded, name) && sameBut(a[i], b[i], name) {
				b[i] = a[i]
			}
		}
	}
	if diff := cmp.Diff(a, b); diff != "" {
		t.Errorf("the rules read directly differ (-program +direct):\n%s", diff)
	}
}

var undecodedText = regexp.MustCompile(` (-m|-j) (\S+) --undecoded "[^"]*"`)

// undecodedName returns the name of the extension that a rule says is not
// decoded.
func undecodedName(line string) string {
	if m := undecodedText.FindStringSubmatch(line); m != nil {
		return m[2]
	}
	return ""
}

// sameBut reports whether two rules differ in the options of one extension only.
func sameBut(program, direct, name string) bool {
	at := undecodedText.FindStringIndex(direct)
	before, behind := direct[:at[0]], direct[at[1]:]
	return strings.HasPrefix(program, before+direct[at[0]:at[0]+3]+" "+name) && strings.HasSuffix(program, behind)
}

// recordedBlob returns what a kernel answered, and what iptables-legacy-save -c
// printed of it. TestLegacyReadsEveryForm -update-blobs records them.
func recordedBlob(t testing.TB, f netfilter.Family, table string) (blob []byte, saved string) {
	t.Helper()
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the blobs are those of a little-endian machine")
	}
	name := filepath.Join("testdata", "legacy", fmt.Sprintf("%v-%s", f, table))
	blob, err1 := os.ReadFile(name + ".blob")
	text, err2 := os.ReadFile(name + ".save")
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	return blob, string(text)
}

var recordedTables = []string{"filter", "nat", "mangle", "raw"}

// decode decodes struct ipt_getinfo and the entries behind it.
func decode(f netfilter.Family, blob []byte) (*netfilter.Table, error) {
	if len(blob) < sizeofGetInfo {
		return nil, errors.New("too short")
	}
	b := blobOf(f, blob)
	table := netfilter.NewTable(f, b.table, netfilter.BackendLegacy)
	if _, err := decodeLegacy(b, table, nil); err != nil {
		return nil, err
	}
	return table, nil
}

// blobOf reads struct ipt_getinfo and the entries behind it.
func blobOf(f netfilter.Family, blob []byte) legacyBlob {
	return legacyBlob{
		family: f, table: string(xtString(blob[:32])), legacyInfo: newLegacyInfo(blob),
		entries: slices.Clone(blob[sizeofGetInfo:]),
	}
}

// A blob is decoded to the model that Parse makes of the program's output.
func TestLegacyBlobs(t *testing.T) {
	for _, f := range families {
		for _, name := range recordedTables {
			t.Run(fmt.Sprintf("%v-%s", f, name), func(t *testing.T) {
				blob, saved := recordedBlob(t, f, name)
				table, err := decode(f, blob)
				if err != nil {
					t.Fatal(err)
				}
				compareRules(t, mustParse(t, saved), &netfilter.Ruleset{Tables: []*netfilter.Table{table}})
				if !compareHalves(t, f, blob) {
					t.Error("it cannot be scanned by halves")
				}
			})
		}
	}
}

// compareHalves wants two halves to be scanned to what the whole is, and reports
// whether they can be.
func compareHalves(t *testing.T, f netfilter.Family, blob []byte) bool {
	t.Helper()
	d := legacyDecoder{legacyBlob: blobOf(f, blob), lay: legacyLayoutOf(f)}
	hooks := d.hookEntries()
	parts := d.scanHalves(hooks)
	if parts == nil {
		return false
	}
	var whole legacyPart
	if err := d.scan(&whole, 0, len(d.entries), hooks); err != nil {
		t.Errorf("the whole fails where its halves do not: %v", err)
	}
	a, b := parts[0], parts[1]
	a.chains, a.names, a.hooks, a.count, a.ended = append(a.chains, b.chains...), append(a.names, b.names...), b.hooks, a.count+b.count, b.ended
	if !reflect.DeepEqual(a, whole) {
		t.Errorf("halves make %+v\nthe whole makes %+v", a, whole)
	}
	return true
}

// blobBuilder makes a table of its own, as iptables would.
type blobBuilder struct {
	lay       *legacyLayout
	table     string
	hooks     uint32
	entry     [5]uint32
	underflow [5]uint32
	count     uint32
	entries   []byte
}

func newBlob(f netfilter.Family) *blobBuilder {
	if f == netfilter.IPv6 {
		return &blobBuilder{lay: &legacyLayout6, table: "filter"}
	}
	return &blobBuilder{lay: &legacyLayout4, table: "filter"}
}

// xt makes a match or a target; in data, numbers are as the machine has them.
func xt(name string, revision uint8, data ...any) []byte {
	b := make([]byte, legacyExtensionSize)
	copy(b[legacyNameAt:], name)
	b[legacyRevisionAt] = revision
	for _, d := range data {
		switch d := d.(type) {
		case int: // a byte
			b = append(b, byte(d))
		case uint16:
			b = binary.NativeEndian.AppendUint16(b, d)
		case uint32:
			b = binary.NativeEndian.AppendUint32(b, d)
		case string:
			b = append(b, d...)
		case []byte:
			b = append(b, d...)
		}
	}
	for len(b)%8 != 0 {
		b = append(b, 0)
	}
	binary.NativeEndian.PutUint16(b, uint16(len(b)))
	return b
}

func verdict(v int32) []byte { return xt("", 0, uint32(v)) }

// add adds an entry, and returns its offset and its head.
func (b *blobBuilder) add(target []byte, matches ...[]byte) (at int, head []byte) {
	at = len(b.entries)
	head = make([]byte, b.lay.size)
	n := b.lay.size
	for _, m := range matches {
		n += len(m)
	}
	binary.NativeEndian.PutUint16(head[b.lay.target:], uint16(n))
	binary.NativeEndian.PutUint16(head[b.lay.next:], uint16(n+len(target)))
	b.entries = append(b.entries, head...)
	b.entries = append(b.entries, slices.Concat(matches...)...)
	b.entries = append(b.entries, target...)
	b.count++
	return at, b.entries[at:][:b.lay.size]
}

// hook begins the chain of a hook, and ends it.
func (b *blobBuilder) hook(h netfilter.Hook, policy int32, rules ...[]byte) {
	b.hooks |= 1 << h
	b.entry[h] = uint32(len(b.entries))
	for _, r := range rules {
		b.add(r)
	}
	at, _ := b.add(verdict(policy))
	b.underflow[h] = uint32(at)
}

// base adds the built-in chains of table filter.
func (b *blobBuilder) base() *blobBuilder {
	for _, h := range []netfilter.Hook{netfilter.Input, netfilter.Forward, netfilter.Output} {
		b.hook(h, legacyAccept)
	}
	return b
}

// begin begins a chain of the user, and returns where jumps lead.
func (b *blobBuilder) begin(name string) int {
	b.add(xt(legacyErrorTarget, 0, fmt.Sprintf("%-30s", name+"\x00")))
	return len(b.entries)
}

func (b *blobBuilder) end() { b.add(verdict(legacyReturn)) }

// blob ends the table.
func (b *blobBuilder) blob() []byte {
	b.add(xt(legacyErrorTarget, 0, fmt.Sprintf("%-30s", legacyErrorTarget+"\x00")))
	info := make([]byte, sizeofGetInfo)
	copy(info, b.table)
	put := func(at int, v uint32) { binary.NativeEndian.PutUint32(info[at:], v) }
	put(32, b.hooks)
	for h := range b.entry {
		put(36+4*h, b.entry[h])
		put(56+4*h, b.underflow[h])
	}
	put(76, b.count)
	put(80, uint32(len(b.entries)))
	return append(info, b.entries...)
}

// ofOneRule makes a table whose chain F has one rule. edit changes its head.
func ofOneRule(f netfilter.Family, edit func(head []byte, lay *legacyLayout), target []byte, matches ...[]byte) []byte {
	b := newBlob(f).base()
	b.begin("F")
	_, head := b.add(target, matches...)
	if edit != nil {
		edit(head, b.lay)
	}
	b.end()
	return b.blob()
}

// What no iptables of today writes, but the kernel accepts, or did.
func TestLegacyOddEntries(t *testing.T) {
	whole := slices.Repeat([]byte{0xff}, 16)
	name := func(s string) []byte { return append([]byte(s), make([]byte, 16-len(s))...) }
	device := func(s string, mask []byte) func([]byte, *legacyLayout) {
		return func(head []byte, lay *legacyLayout) {
			copy(head[lay.in:], name(s))
			copy(head[lay.inMask:], mask)
		}
	}
	protocol := func(n uint16, inverted, flags byte) func([]byte, *legacyLayout) {
		return func(head []byte, lay *legacyLayout) {
			binary.NativeEndian.PutUint16(head[lay.protocol:], n)
			head[lay.inverted], head[lay.flags] = inverted, flags
		}
	}
	tcp, udp := protocol(6, 0, 0), protocol(17, 0, 0)
	accept := verdict(legacyAccept)
	conntrack := func(revision uint8, flags uint16, rest ...any) []byte {
		ports := []byte{0, 80, 0, 0, 0, 0, 0, 0} // big endian
		return xt("conntrack", revision, append([]any{make([]byte, 136), uint16(6), ports, flags, uint16(0)}, rest...)...)
	}
	for _, c := range []struct {
		family  netfilter.Family
		edit    func([]byte, *legacyLayout)
		target  []byte
		matches [][]byte
		want    string
	}{
		{4, device("eth0", append(slices.Clone(whole[:2]), make([]byte, 14)...)), accept, nil, `-i et+ -j ACCEPT`},
		{4, device("eth0", whole), accept, nil, `-i eth0 -j ACCEPT`},
		{4, device("eth0", []byte{0xff, 0, 0xff}), accept, nil, `-m ip --undecoded "interface 65746830000000000000000000000000, mask ff00ff00000000000000000000000000" -j ACCEPT`},
		{4, device("", whole[:1]), accept, nil, `-m ip --undecoded "interface 00000000000000000000000000000000, mask ff000000000000000000000000000000" -j ACCEPT`},
		{4, device("eth+", whole[:5]), accept, nil, `-m ip --undecoded "interface 6574682b000000000000000000000000, mask ffffffffff0000000000000000000000" -j ACCEPT`},
		{4, func(head []byte, lay *legacyLayout) { copy(head[lay.src:], []byte{10, 0, 0, 1}) }, accept, nil, `-m ip --undecoded "address 0a000001, mask 00000000" -j ACCEPT`},
		{4, func(head []byte, lay *legacyLayout) { head[lay.inverted] = legacyNotSrc }, accept, nil, `! -s 0.0.0.0/0 -j ACCEPT`},
		{4, protocol(0, legacyNotFragment, 0), accept, nil, `-m ip --undecoded "flags 0x00, inverted 0x20" -j ACCEPT`},
		{4, protocol(6, 0, 0x80), accept, nil, `-p tcp -m ip --undecoded "flags 0x80, inverted 0x00" -j ACCEPT`},
		{4, protocol(300, 0, 0), accept, nil, `-p 300 -j ACCEPT`},
		{6, protocol(6, 0, 0), accept, nil, `-p tcp -m ip --undecoded "flags 0x00, inverted 0x00" -j ACCEPT`},
		{6, protocol(6, legacyNotProtocol, 0x01), accept, nil, `! -p tcp -j ACCEPT`},
		{4, nil, verdict(-3), nil, `-j STANDARD --undecoded "verdict -3"`},
		{4, nil, verdict(legacyQueue), nil, `-j QUEUE`},
		{4, nil, xt("NEW", 7, "what"), nil, `-j NEW --undecoded "revision 7"`},
		{4, nil, xt("LOG", 9, "what"), nil, `-j LOG --undecoded "revision 9"`},
		{4, nil, xt("CT", 9, "what"), nil, `-j CT --undecoded "revision 9"`},
		{4, nil, xt("CT", 0, uint16(1), uint16(0), make([]byte, 32)), nil, `-j CT --notrack`},
		{4, nil, xt("CT", 0, uint16(0x80), uint16(0), make([]byte, 32)), nil, `-j CT --undecoded "flags 0x80, events 0x0 and 0x0"`},
		{4, nil, xt("NOTRACK", 0), nil, `-j NOTRACK`},
		{4, nil, xt("DNAT", 0, uint32(1), uint32(3), 10, 0, 0, 1, 10, 0, 0, 1, 0, 80, 0, 80), nil, `-j DNAT --to-destination 10.0.0.1:80`},
		{4, nil, xt("DNAT", 0, uint32(2), uint32(3), 10, 0, 0, 1, 10, 0, 0, 1, 0, 80, 0, 80), nil, `-j DNAT --undecoded "revision 0"`},
		{4, nil, xt("DNAT", 1, uint32(3), 10, 0, 0, 1, make([]byte, 12), 10, 0, 0, 1, make([]byte, 12), 0, 80, 0, 80), nil, `-j DNAT --to-destination 10.0.0.1:80`},
		{4, nil, xt("DNAT", 2, uint32(0x83), 10, 0, 0, 1, make([]byte, 12), 10, 0, 0, 1, make([]byte, 12), 0, 80, 0, 80, 0, 0), nil, `-j DNAT --undecoded "revision 2"`},
		{4, nil, accept, [][]byte{xt("news", 3, "what")}, `-m news --undecoded "revision 3" -j ACCEPT`},
		{4, nil, accept, [][]byte{xt("mark", 1)}, `-m mark --undecoded "revision 1" -j ACCEPT`},
		{4, nil, accept, [][]byte{xt("mark", 0, uint32(1), uint32(1), uint32(0))}, `-m mark --undecoded "revision 0" -j ACCEPT`},
		{4, udp, accept, [][]byte{xt("tcp", 0, uint16(0), uint16(65535), uint16(80), uint16(80), 0, 0, 0, 0)}, `-p udp -m tcp --undecoded "revision 0" -j ACCEPT`},
		{4, tcp, accept, [][]byte{xt("tcp", 0, uint16(0), uint16(65535), uint16(80), uint16(80), 0, 0, 0, 2)}, `-p tcp -m tcp ! --dport 80 -j ACCEPT`},
		{4, nil, accept, [][]byte{xt("addrtype", 0, uint16(4), uint16(2), uint32(1), uint32(0))}, `-m addrtype ! --src-type LOCAL --dst-type UNICAST -j ACCEPT`},
		{4, nil, accept, [][]byte{conntrack(1, 1, 0x0a, 0)}, `-m conntrack --ctstate NEW,ESTABLISHED -j ACCEPT`},
		{4, nil, accept, [][]byte{conntrack(2, 1, uint16(0x102), uint16(0))}, `-m conntrack --ctstate ESTABLISHED,UNTRACKED -j ACCEPT`},
		{4, nil, accept, [][]byte{conntrack(1, 0x103, 0x08, 0)}, `-m conntrack --ctstate NEW --ctproto 6 --ctorigsrcport 80 -j ACCEPT`},
		{4, nil, accept, [][]byte{conntrack(2, 0x101, uint16(0x200), uint16(0))}, `-m conntrack --undecoded "revision 2" -j ACCEPT`},
		{4, nil, accept, [][]byte{xt("set", 1, uint16(7), 2, 3)}, `-m set ! --undecoded "set number 7" src,dst -j ACCEPT`},
		{4, nil, accept, [][]byte{xt("set", 0, make([]byte, 32))}, `-m set --undecoded "revision 0" -j ACCEPT`},
		{4, nil, accept, [][]byte{xt("physdev", 0, name("veth1"), whole[:6], make([]byte, 10), make([]byte, 32), 0, 1)}, `-m physdev --physdev-in veth1 -j ACCEPT`},
	} {
		table, err := decode(c.family, ofOneRule(c.family, c.edit, c.target, c.matches...))
		if err != nil {
			t.Errorf("%s: %v", c.want, err)
			continue
		}
		if got, want := RuleText(table, table.Lookup("F"), 0), "-A F "+c.want; got != want {
			t.Errorf("got %s\nwant %s", got, want)
		}
	}
}

// Chains are declared by name, whatever their order in the blob; jumps, also
// back and forth, lead where they should.
func TestLegacyChains(t *testing.T) {
	for _, f := range families {
		b := newBlob(f)
		b.hook(netfilter.Input, legacyDrop, verdict(0), verdict(legacyAccept))
		b.hook(netfilter.Forward, legacyAccept)
		b.hook(netfilter.Output, legacyAccept)
		last := b.begin("Z")
		jump, _ := b.add(verdict(0))
		_, head := b.add(verdict(int32(last)))
		head[b.lay.goTo] = 0
		head[b.lay.flags] = b.lay.goTo
		b.end()
		first := b.begin("A")
		b.add(verdict(int32(last)))
		fall, _ := b.add(verdict(0))
		b.end()
		b.begin("M")
		b.end()
		set := func(entry, verdict int) {
			binary.NativeEndian.PutUint32(b.entries[entry+b.lay.size+legacyExtensionSize:], uint32(verdict))
		}
		set(0, first)
		set(jump, first)
		set(fall, fall+b.lay.size+len(verdict(0)))
		table, err := decode(f, b.blob())
		if err != nil {
			t.Fatal(err)
		}
		want := `*filter
:INPUT DROP [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:A - [0:0]
:M - [0:0]
:Z - [0:0]
[0:0] -A INPUT -j A
[0:0] -A INPUT -j ACCEPT
[0:0] -A A -j Z
[0:0] -A A
[0:0] -A Z -j A
[0:0] -A Z -g Z
COMMIT`
		if diff := cmp.Diff(want, withoutRemarks(printed(t, &netfilter.Ruleset{Tables: []*netfilter.Table{table}}, true))); diff != "" {
			t.Errorf("%v (-want +got):\n%s", f, diff)
		}
	}
}

// What does not fit together is an error that says where.
func TestLegacyCorrupt(t *testing.T) {
	f := netfilter.IPv4
	lay := &legacyLayout4
	// Offsets in the table of ofOneRule: three policies, the head of F, the
	// rule, RETURN, the end.
	policy := lay.size + len(verdict(0))
	head := 3 * policy
	rule := head + lay.size + 64
	u16 := func(at int, v uint16) func([]byte) []byte {
		return func(b []byte) []byte { binary.NativeEndian.PutUint16(b[sizeofGetInfo+at:], v); return b }
	}
	u32 := func(at int, v int32) func([]byte) []byte {
		return func(b []byte) []byte { binary.NativeEndian.PutUint32(b[sizeofGetInfo+at:], uint32(v)); return b }
	}
	match := xt("comment", 0, fmt.Sprintf("%-256s", "x\x00"))
	ruleVerdict := rule + lay.size + len(match) + legacyExtensionSize
	for want, edit := range map[string]func([]byte) []byte{
		"100 bytes are no entry":                   func(b []byte) []byte { return b[:sizeofGetInfo+100] },
		"offset 0 of 0: the ERROR target":          func(b []byte) []byte { return b[:sizeofGetInfo] },
		"the ERROR target at the end is missing":   func(b []byte) []byte { return b[:len(b)-lay.size-64] },
		"an entry of 0 bytes with":                 u16(rule+lay.next, 0),
		"an entry of 65535 bytes with":             u16(rule+lay.next, 65535),
		"with its target at 8":                     u16(rule+lay.target, 8),
		"with its target at 65535":                 u16(rule+lay.target, 65535),
		"a target of 0 bytes":                      u16(rule+lay.size+len(match), 0),
		"a target of 48 bytes":                     u16(rule+lay.size+len(match), 48),
		"a match of 16 bytes where 288":            u16(rule+lay.size, 16),
		"a match of 296 bytes where 288":           u16(rule+lay.size, 296),
		"a match of 0 bytes where 8":               u16(rule+lay.size, 280),
		"a standard target of 32 bytes":            u16(rule+lay.size+len(match), 32),
		"a jump to 99999":                          u32(ruleVerdict, 99999),
		"a jump to 2147483647":                     u32(ruleVerdict, 1<<31-1),
		"a jump to 3, where no chain begins":       u32(ruleVerdict, 3),
		"a jump to 0, where no chain begins":       u32(ruleVerdict, 0),
		"the policy of chain \"INPUT\" is neither": u32(lay.size+legacyExtensionSize, legacyReturn),
		"chain \"F\" does not end with RETURN":     u32(rule+lay.size+len(match)+40+lay.size+legacyExtensionSize, legacyAccept),
		"an entry outside of the chains":           func(b []byte) []byte { b[32] = 1 << netfilter.Forward; return b },
		"hook FORWARD enters where":                u32(36-sizeofGetInfo+4*int(netfilter.Forward), 8),
		"hook OUTPUT enters where":                 u32(36-sizeofGetInfo+4*int(netfilter.Output), 0),
		"a hook enters an ERROR target":            u32(36-sizeofGetInfo+4*int(netfilter.Output), int32(head)),
		"does not end with its policy":             u32(56-sizeofGetInfo+4*int(netfilter.Input), 8),
		"a chain \"PREROUTING\", which is not": func(b []byte) []byte {
			b[32] = 1<<netfilter.Prerouting | 1<<netfilter.Forward | 1<<netfilter.Output
			return b
		},
		"and 3 were announced": func(b []byte) []byte { binary.NativeEndian.PutUint32(b[76:], 3); return b },
		"a second chain \"INPUT\"": func(b []byte) []byte {
			copy(b[sizeofGetInfo+head+lay.size+legacyExtensionSize:], "INPUT\x00")
			return b
		},
		"one without a name":              func(b []byte) []byte { b[sizeofGetInfo+head+lay.size+legacyExtensionSize] = 0; return b },
		"unknown legacy table \"broute\"": func(b []byte) []byte { copy(b, "broute\x00"); return b },
	} {
		blob := ofOneRule(f, nil, verdict(legacyAccept), match)
		if _, err := decode(f, blob); err != nil {
			t.Fatal(err)
		}
		_, err := decode(f, edit(blob))
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "offset") && !strings.Contains(want, "unknown") {
			t.Errorf("%v, want %q and an offset", err, want)
		}
	}
}

// FuzzLegacyDecode wants of any blob: no panic, and an error, or rules that can
// be printed, and are not many more than there is room for.
func FuzzLegacyDecode(f *testing.F) {
	for _, family := range families {
		v6 := family == netfilter.IPv6
		for _, name := range recordedTables {
			blob, _ := recordedBlob(f, family, name)
			if len(blob) < 8<<10 {
				f.Add(v6, blob)
			}
			// Every rule alone, in a small table.
			d := legacyDecoder{legacyBlob: legacyBlob{family: family, entries: blob[sizeofGetInfo:]}, lay: newBlob(family).lay}
			for at := 0; at < len(d.entries); {
				e, err := d.at(at)
				if err != nil {
					f.Fatal(err)
				}
				if string(e.target.name) != legacyErrorTarget {
					b := newBlob(family).base()
					b.begin("F")
					b.entries = append(b.entries, d.entries[at:e.next]...)
					b.count++
					if v, ok := e.standard(); ok && v >= 0 {
						binary.NativeEndian.PutUint32(b.entries[len(b.entries)-8:], ^uint32(1)) // ACCEPT
					}
					b.end()
					small := b.blob()
					if _, err := decode(family, small); err != nil {
						f.Fatal(err)
					}
					f.Add(v6, small)
				}
				at = e.next
			}
		}
	}
	f.Fuzz(func(t *testing.T, v6 bool, blob []byte) {
		family := netfilter.IPv4
		if v6 {
			family = netfilter.IPv6
		}
		table, err := decode(family, blob)
		if err != nil {
			if table != nil || err.Error() == "" {
				t.Fatalf("a table and an error: %v", err)
			}
			return
		}
		if n, most := table.RuleCount(), len(blob)/(legacyLayout4.size+legacyExtensionSize); n > most {
			t.Errorf("%d rules in %d bytes", n, len(blob))
		}
		text := printed(t, &netfilter.Ruleset{Tables: []*netfilter.Table{table}}, true)
		if most := 16*len(blob) + 4096; len(text) > most {
			t.Errorf("%d bytes printed of %d", len(text), len(blob))
		}
		refuzz(t, family, blob, table)
		compareHalves(t, family, blob)
		for c := range table.Chains() {
			for i := range c.Len() {
				brief(c, i)
				for _, e := range c.Rule(i) {
					if (e.Kind == netfilter.Jump || e.Kind == netfilter.Goto) && table.ByID(netfilter.ChainID(e.A)) == nil {
						t.Errorf("a jump to a chain that is not there")
					}
				}
			}
		}
	})
}

// refuzz wants a blob to make the same table upon another one, and again with
// other counters.
func refuzz(t *testing.T, f netfilter.Family, blob []byte, want *netfilter.Table) {
	seed := maphash.MakeSeed()
	lt := &legacyTable{family: f, name: want.Name}
	take := func(b legacyBlob) {
		if _, err := lt.take(b, seed, nil); err != nil {
			t.Fatal(err)
		}
	}
	same := func(want *netfilter.Table) {
		t.Helper()
		a, b := printed(t, &netfilter.Ruleset{Tables: []*netfilter.Table{want}}, true), printed(t, &netfilter.Ruleset{Tables: []*netfilter.Table{lt.table}}, true)
		if a != b {
			t.Errorf("decoded at once:\n%s\nupon another table:\n%s", a, b)
		}
	}
	other, _ := recordedBlob(t, f, "filter")
	if want.Name == "filter" { // the built-in chains of another would be unknown
		take(blobOf(f, other))
	}
	take(blobOf(f, blob))
	same(want)
	before := lt.table
	take(blobOf(f, blob))
	if lt.table != before {
		t.Error("the same block made another table")
	}
	counted := blobOf(f, blob)
	lay := legacyLayoutOf(f)
	for at := 0; at < len(counted.entries); at += int(xt16(counted.entries[at:], lay.next)) {
		binary.NativeEndian.PutUint64(counted.entries[at+lay.packets:], uint64(at)+1)
	}
	again := legacyBlob{family: f, table: counted.table, legacyInfo: counted.legacyInfo, entries: slices.Clone(counted.entries)}
	take(counted)
	fresh := netfilter.NewTable(f, want.Name, netfilter.BackendLegacy)
	if _, err := decodeLegacy(again, fresh, nil); err != nil {
		t.Fatal(err)
	}
	same(fresh)
}
