//go:build linux

package iptables

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/internal/nodebox"
	"github.com/natlens/natlens/internal/nodebox/boxtest"
	"github.com/natlens/natlens/pkg/netfilter"
)

var nftPrograms = []string{"nft", "iptables-nft-save", "iptables-nft-restore", "ip6tables-nft-save", "ip6tables-nft-restore"}

// nfacctObjects are those that kube-proxy's rules count in.
var nfacctObjects = []string{"ct_state_invalid_dropped_pkts", "localhost_nps_accepted_pkts"}

// readNFT reads the rules of the node directly.
func readNFT(t testing.TB, b *nodebox.Box) *netfilter.Ruleset {
	t.Helper()
	var rs *netfilter.Ruleset
	err := b.Node.Do(func() (err error) {
		rs, err = new(NFT).Read(context.Background())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

// saveNFT returns what iptables-nft-save and ip6tables-nft-save print in the node.
func saveNFT(t testing.TB, b *nodebox.Box) string {
	t.Helper()
	var out bytes.Buffer
	for _, program := range []string{"iptables-nft-save", "ip6tables-nft-save"} {
		var errs bytes.Buffer
		cmd := exec.Command(program, "-c")
		cmd.Stdout, cmd.Stderr = &out, &errs
		if err := b.Node.Run(cmd); err != nil {
			t.Fatalf("%s: %v: %s", program, err, &errs)
		}
	}
	return out.String()
}

// loadNFT replaces the node's rules by these, and its counters, too.
func loadNFT(t testing.TB, b *nodebox.Box, ipv6 bool, rules string) {
	t.Helper()
	program := "iptables-nft-restore"
	if ipv6 {
		program = "ip6tables-nft-restore"
	}
	feed(t, b, rules, program, "--counters")
}

// feed runs a program in the node with an input.
func feed(t testing.TB, b *nodebox.Box, input, name string, args ...string) {
	t.Helper()
	var errs bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdin, cmd.Stderr = strings.NewReader(input), &errs
	if err := b.Node.Run(cmd); err != nil {
		t.Fatalf("%v: %v: %s", cmd.Args, err, &errs)
	}
}

// listing is a ruleset as text that does not depend on the order of tables and
// chains: each rule as iptables-save prints it, with its counter, and with the
// kinds of its expressions, since equal texts may be understood differently.
func listing(rs *netfilter.Ruleset) map[string][]string {
	out := map[string][]string{}
	for _, t := range rs.Tables {
		table := fmt.Sprintf("%v %s %s", t.Family, t.Name, t.Backend)
		out[table] = nil
		for c := range t.Chains() {
			lines := []string{"chain"}
			if b := c.Base; b != nil {
				// iptables-nft hangs security elsewhere than the kernel says.
				lines[0] = fmt.Sprintf("%v %d %d %d %v", b.Hook, min(b.Priority, 100), b.Type, b.Policy, b.Counter)
			}
			for i := range c.Len() {
				n, counted := c.Counter(i)
				lines = append(lines, fmt.Sprintf("%v %v %s | %s", counted, n, RuleText(t, c, i), brief(c, i)))
			}
			out[table+" "+c.Name] = lines
		}
	}
	return out
}

// counted gives every rule of a dump a counter of its own.
func counted(dump string, seed uint64) string {
	r := rand.New(rand.NewPCG(seed, 1))
	var out strings.Builder
	for line := range strings.Lines(dump) {
		if _, rest, ok := strings.Cut(line, "] -A "); ok && line[0] == '[' {
			line = "-A " + rest
		}
		switch {
		case strings.HasPrefix(line, "-A "):
			line = fmt.Sprintf("[%d:%d] %s", r.Uint64N(1<<40), r.Uint64(), line)
		case line[0] == ':' && strings.Contains(line, " ACCEPT ["):
			line = fmt.Sprintf("%s ACCEPT [%d:%d]\n", strings.Fields(line)[0], r.Uint64N(1<<33), r.Uint64N(1<<50))
		}
		out.WriteString(line)
	}
	return out.String()
}

// ruleFile is a recorded dump, or a synthetic one.
type ruleFile struct {
	rules string
	ipv6  bool
}

func ruleFiles(t *testing.T) map[string]ruleFile {
	out := map[string]ruleFile{}
	files, _ := filepath.Glob("../../testdata/captures/*.save*")
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		out[filepath.Base(name)] = ruleFile{string(b), strings.HasSuffix(name, "6")}
	}
	flows, _ := filepath.Glob("../../testdata/flows/flow-iptables-*.json")
	for _, name := range flows {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var tests []struct {
			Test, Rules string
			IPv6        bool
		}
		if err := json.Unmarshal(b, &tests); err != nil {
			t.Fatal(err)
		}
		for _, f := range tests {
			out["flow "+f.Test] = ruleFile{f.Rules, f.IPv6}
		}
	}
	if len(files) == 0 || len(flows) == 0 {
		t.Fatal("no recorded rules found")
	}
	out["synthetic"] = ruleFile{rules: synthetic(t, 300, 10)}
	return out
}

func synthetic(t testing.TB, services, endpoints int) string {
	t.Helper()
	var b bytes.Buffer
	cfg := kubeproxy.Config{PodCIDR: kubeproxy.SyntheticPodCIDR, NodeIP: kubeproxy.SyntheticNodeIP, SyncOrder: true}
	if err := kubeproxy.Write(&b, cfg, kubeproxy.Synthetic(services, endpoints)); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestNFTIsWhatSavePrints loads every recorded dump into a kernel, and wants
// the direct reader and iptables-nft-save to tell the same of it.
func TestNFTIsWhatSavePrints(t *testing.T) {
	b := newNode(t, append(nftPrograms, "nfacct")...)
	for _, object := range nfacctObjects {
		run(t, b, "nfacct", "add", object)
	}
	seed := uint64(0)
	for name, f := range ruleFiles(t) {
		seed++
		t.Run(name, func(t *testing.T) {
			run(t, b, "nft", "flush", "ruleset")
			loadNFT(t, b, f.ipv6, counted(f.rules, seed))
			direct := readNFT(t, b)
			if direct.Torn || len(direct.Unreadable) > 0 || direct.RuleCount() == 0 {
				t.Errorf("%d rules, torn %v, unreadable %v", direct.RuleCount(), direct.Torn, direct.Unreadable)
			}
			if diff := cmp.Diff(listing(mustParse(t, saveNFT(t, b))), listing(direct)); diff != "" {
				t.Errorf("rules differ (-saved +direct):\n%s", diff)
			}
		})
	}
}

// TestNFTPerChain reads the same rules with one dump and with one per chain.
func TestNFTPerChain(t *testing.T) {
	b := newNode(t, append(nftPrograms, "nfacct")...)
	for _, object := range nfacctObjects {
		run(t, b, "nfacct", "add", object)
	}
	loadNFT(t, b, false, counted(synthetic(t, 60, 3), 1))
	loadNFT(t, b, true, counted(ruleFiles(t)["v1.35.4-iptables.save6"].rules, 2))
	whole := listing(readNFT(t, b))
	if diff := cmp.Diff(whole, listing(readNFT(t, b))); diff != "" {
		t.Errorf("rules differ (-whole +per chain):\n%s", diff)
	}
}

// undecodedForms are the rules of syntax_test.go whose matches or targets are
// known by their name alone.
var undecodedForms = []string{
	"bpf", "cluster", "eui64", "frag", "hashlimit", "rt", "sctp", "string", "time", "u32",
}

// TestNFTForms wants of every odd rule what Parse makes of what iptables-nft-save
// prints of it, or that it is named as undecoded.
func TestNFTForms(t *testing.T) {
	b := newNode(t, append(nftPrograms, "nfacct")...)
	run(t, b, "nfacct", "add", "abc")
	undecoded := map[string]bool{}
	for family, forms := range formsOf {
		tables := map[string]*strings.Builder{}
		for i, f := range forms {
			if f.only != "" && f.only != "nft" {
				continue
			}
			if tables[f.table] == nil {
				tables[f.table] = &strings.Builder{}
				fmt.Fprintf(tables[f.table], "*%s\n:U - [0:0]\n", f.table)
			}
			fmt.Fprintf(tables[f.table], ":F%d - [0:0]\n[%d:%d] -A F%d %s\n", i, i, 2*i, i, f.in)
		}
		var rules strings.Builder
		for _, b := range tables {
			rules.WriteString(b.String() + "COMMIT\n")
		}
		loadNFT(t, b, family == netfilter.IPv6, rules.String())
	}
	saved, direct := mustParse(t, saveNFT(t, b)), readNFT(t, b)
	want, got := listing(saved), listing(direct)
	for chain, lines := range got {
		for i, line := range lines {
			if !strings.Contains(line, ` --undecoded "revision`) || len(want[chain]) != len(lines) {
				continue
			}
			before, kinds, _ := strings.Cut(line, " | ")
			words := strings.Fields(before[:strings.Index(before, " --undecoded")])
			undecoded[words[len(words)-1]] = true
			if _, savedKinds, _ := strings.Cut(want[chain][i], " | "); kinds != savedKinds {
				t.Errorf("%s is read as %s, %s as %s", before, kinds, want[chain][i], savedKinds)
			}
			lines[i] = want[chain][i]
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("rules differ (-saved +direct):\n%s", diff)
	}
	var names []string
	for name := range undecoded {
		names = append(names, name)
	}
	slices.Sort(names)
	expected := slices.Clone(undecodedForms)
	slices.Sort(expected)
	if diff := cmp.Diff(expected, names); diff != "" {
		t.Errorf("undecoded forms (-expected +got):\n%s", diff)
	}
}

// TestNFTCounts wants the counters of rules and policies as packets move them.
func TestNFTCounts(t *testing.T) {
	b := newNode(t, nftPrograms...)
	loadNFT(t, b, false, `*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [7:11]
:OUTPUT ACCEPT [0:0]
:F - [0:0]
-A OUTPUT -p udp -m udp --dport 9 -j F
-A F -m comment --comment "counts" -j RETURN
COMMIT
`)
	conn, err := b.Node.Dial(t.Context(), "udp", "10.146.0.100:9")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	const sent, size = 5, 28 + 3 // IPv4 and UDP headers, and the payload
	for range sent {
		// The answer to a closed port may come as an error of a later write.
		if _, err := conn.Write([]byte("abc")); err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatal(err)
		}
	}
	rs := readNFT(t, b)
	filter := rs.Table(netfilter.IPv4, "filter")
	if filter == nil {
		t.Fatal("no table filter")
	}
	n, ok := filter.Lookup("F").Counter(0)
	if !ok || n.Packets == 0 || n.Packets > sent || n.Bytes != n.Packets*size {
		t.Errorf("the rule has counted %v of %d packets", n, sent)
	}
	base := filter.Lookup("FORWARD").Base
	if base == nil || base.Policy != netfilter.Drop || base.Counter != (netfilter.Counter{Packets: 7, Bytes: 11}) {
		t.Errorf("FORWARD is %+v", base)
	}
	if diff := cmp.Diff(listing(mustParse(t, saveNFT(t, b))), listing(rs)); diff != "" {
		t.Errorf("rules differ (-saved +direct):\n%s", diff)
	}
}

// TestNFTCreatesNothing wants an empty namespace to stay empty.
func TestNFTCreatesNothing(t *testing.T) {
	b := newNode(t, nftPrograms...)
	rs := readNFT(t, b)
	if len(rs.Tables) > 0 || len(rs.Unreadable) > 0 || rs.Torn {
		t.Errorf("read %+v of an empty namespace", rs)
	}
	if out, _ := run(t, b, "nft", "list", "tables"); out != "" {
		t.Errorf("after the read there are tables:\n%s", out)
	}
}

// TestNFTWhileRulesChange wants every result to be one of two rulesets that
// take turns, or to say that it is torn.
func TestNFTWhileRulesChange(t *testing.T) {
	b := newNode(t, nftPrograms...)
	// One table: iptables-nft-restore has a transaction for each.
	set := func(name string, chains int) string {
		var s strings.Builder
		s.WriteString("*nat\n")
		for i := range chains {
			fmt.Fprintf(&s, ":%s-%d - [0:0]\n", name, i)
		}
		for i := range chains {
			for j := range 5 {
				fmt.Fprintf(&s, "-A %s-%d -s 10.0.%d.%d/32 -m comment --comment \"%s of chain %d\" -j RETURN\n", name, i, i, j, name, i)
			}
		}
		s.WriteString("COMMIT\n")
		return s.String()
	}
	a, other := set("A", 60), set("B", 90)
	plain := func(rs *netfilter.Ruleset) string { return fmt.Sprint(listing(rs)) }
	loadNFT(t, b, false, other)
	wantB := plain(readNFT(t, b))
	loadNFT(t, b, false, a)
	wantA := plain(readNFT(t, b))

	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			cmd := exec.Command("iptables-nft-restore")
			if cmd.Stdin = strings.NewReader(a); i%2 == 0 {
				cmd.Stdin = strings.NewReader(other)
			}
			if err := b.Node.Run(cmd); err != nil {
				done <- err
				return
			}
		}
	}()
	seen := map[string]int{}
	for i := range 60 {
		rs := readNFT(t, b)
		switch got := plain(rs); {
		case rs.Torn:
			seen["torn"]++
		case got == wantA:
			seen["A"]++
		case got == wantB:
			seen["B"]++
		default:
			t.Fatalf("read %d: %d rules that are of neither set", i, rs.RuleCount())
		}
	}
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Log(seen)
	if seen["A"] == 0 || seen["B"] == 0 {
		t.Errorf("the two sets were not both seen: %v", seen)
	}
}

// TestNFTTorn has transactions follow each other faster than a read can be: the
// result must say so, and those tables that nobody changes are still right.
func TestNFTTorn(t *testing.T) {
	b := newNode(t, nftPrograms...)
	loadNFT(t, b, false, synthetic(t, 60, 3))
	want := listing(readNFT(t, b))
	cmd := exec.Command("iptables-nft-restore", "--noflush")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Node.Start(cmd); err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				if _, err := io.WriteString(in, "*raw\n:Z - [0:0]\n-A Z -j RETURN\nCOMMIT\n"); err != nil {
					return
				}
			}
		}
	}()
	torn := 0
	for range 20 {
		rs := readNFT(t, b)
		if rs.Torn {
			torn++
		}
		got := listing(rs)
		maps.DeleteFunc(got, func(name string, _ []string) bool { return strings.HasPrefix(name, "ipv4 raw ") })
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("tables that nobody changed differ (-before +meanwhile):\n%s", diff)
		}
	}
	close(stop)
	in.Close()
	<-done
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if torn == 0 {
		t.Error("no read was torn")
	}
	if readNFT(t, b).Torn {
		t.Error("a quiet read is torn")
	}
}

// TestNFTCancelled wants a read to end with its context.
func TestNFTCancelled(t *testing.T) {
	b := newNode(t, nftPrograms...)
	loadNFT(t, b, false, synthetic(t, 3, 3))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := b.Node.Do(func() error {
		_, err := new(NFT).Read(ctx)
		return err
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("the error is %v", err)
	}
}

// TestNFTCapability reads as a user with the capability NET_ADMIN alone, and
// as one without any.
func TestNFTCapability(t *testing.T) {
	if boxtest.IsAgain() {
		rs, err := new(NFT).Read(context.Background())
		if err != nil {
			fmt.Printf("answer: %v (%v)\n", err, errors.Is(err, os.ErrPermission))
			return
		}
		fmt.Printf("answer: %d rules, torn %v\n", rs.RuleCount(), rs.Torn)
		return
	}
	b := newNode(t, nftPrograms...)
	restore(t, b, nodebox.NFT, false, "x")
	for _, c := range []struct {
		caps []uintptr
		want string
	}{
		{[]uintptr{unix.CAP_NET_ADMIN}, "1 rules, torn false"},
		{nil, "reading the kernel's nf_tables: permission denied: it needs the capability NET_ADMIN: operation not permitted (true)"},
	} {
		if got := boxtest.Again(t, b.Node, c.caps...); got != c.want {
			t.Errorf("with capabilities %v, it said %q, want %q", c.caps, got, c.want)
		}
	}
}

// TestNFTForeignRules puts rules of nft into tables of iptables-nft, which
// iptables-nft-save then calls incompatible.
func TestNFTForeignRules(t *testing.T) {
	b := newNode(t, nftPrograms...)
	loadNFT(t, b, false, "*nat\n:OWN - [0:0]\n-A PREROUTING -j OWN\n-A POSTROUTING -j OWN\n-A OWN -p tcp -m tcp --dport 80 -j RETURN\nCOMMIT\n")
	for _, c := range []struct{ nft, text, kinds string }{
		{"ip daddr 10.0.0.1 tcp dport 80 redirect to :8080", "-d 10.0.0.1/32 -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 8080", "d p dport REDIRECT"},
		{"tcp dport 80-90 redirect to :8080-8081", "-p tcp -m tcp --dport 80:90 -j REDIRECT --to-ports 8080-8081", "p dport DNATRANGE"},
		{"tcp dport > 1023 dnat to 10.0.0.1:80", "-p tcp -m tcp --dport 1024:65535 -j DNAT --to-destination 10.0.0.1:80", "p dport DNAT"},
		{"dnat to 10.0.0.1-10.0.0.9 random", "-j DNAT --to-destination 10.0.0.1-10.0.0.9 --random", "DNATRANGE"},
		{"dnat to 10.0.0.1", "-j DNAT --to-destination 10.0.0.1", "DNAT"},
		{"masquerade", "-j MASQUERADE", "MASQUERADE"},
		{"masquerade fully-random", "-j MASQUERADE --random-fully", "MASQUERADE"},
		{"ip protocol udp accept", "-p udp -j ACCEPT", "p ACCEPT"},
		{"tcp dport { 80, 443 } accept", "", "p unknown ACCEPT"},
		{"numgen random mod 3 0 accept", "", "unknown ACCEPT"},
		{"numgen random mod 2 vmap { 0 : jump OWN, 1 : jump OWN }", "", "UNKNOWN"},
		{"meta l4proto tcp dnat to numgen random mod 2 map { 0 : 10.0.0.1, 1 : 10.0.0.2 }", "", "p unknown DNATRANGE"},
		{"ct state established,related accept", "-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "ctstate ACCEPT"},
		{"ct state != new accept", "-m conntrack ! --ctstate NEW -j ACCEPT", "!ctstate ACCEPT"},
		{"ct status dnat accept", "-m conntrack --ctstate DNAT -j ACCEPT", "ctstate ACCEPT"},
		{"fib daddr type local accept", "-m addrtype --dst-type LOCAL -j ACCEPT", "dsttype ACCEPT"},
		{"fib saddr . iif oif missing drop", "", "unknown DROP"},
		{"meta mark and 0x4000 == 0x4000 return", "-m mark --mark 0x4000/0x4000 -j RETURN", "mark RETURN"},
		{"meta mark set mark or 0x4000", "-j MARK --set-xmark 0x4000/0x4000", "MARK"},
		{"meta mark set 0x4000", "-j MARK --set-xmark 0x4000/0xffffffff", "MARK"},
		{"ct mark set mark", "-j CONNMARK --save-mark --nfmask 0xffffffff --ctmask 0xffffffff", "SAVE"},
		{"meta mark set 0x1 accept", "", "unknown ACCEPT"},
		{"meta mark set 0x1 tcp dport 80", "", "UNKNOWN"},
		{"log prefix \"x y\" tcp dport 80 accept", "-p tcp -m nft --statement \"LOG --log-prefix \\\"x y\\\"\" -m tcp --dport 80 -j ACCEPT", "p always dport ACCEPT"},
		{"log group 2", "-j NFLOG --nflog-group 2", "NOEFFECT"},
		{"limit rate 5/minute accept", "-m limit --limit 5/min -j ACCEPT", "unknown ACCEPT"},
		{"limit rate over 5/minute drop", "", "unknown DROP"},
		{"ip saddr != 10.0.0.0/9 accept", "! -s 10.0.0.0/9 -j ACCEPT", "!s ACCEPT"},
		{"ip saddr 10.0.0.1-10.0.0.9 accept", "", "unknown unknown ACCEPT"},
		{"iifname \"eth*\" oifname \"lo\" accept", "-i eth+ -o lo -j ACCEPT", "i o ACCEPT"},
		{"iif lo accept", "", "unknown ACCEPT"},
		{"meta skuid 1000 accept", "", "unknown ACCEPT"},
		{"ip ttl 3 accept", "", "unknown ACCEPT"},
		{"tcp flags & (syn|ack) == syn accept", "-p tcp -m tcp --tcp-flags SYN,ACK SYN -j ACCEPT", "p flags ACCEPT"},
		{"@th,16,16 80 accept", "", "unknown ACCEPT"},
		{"udp dport != 53 drop comment \"a b\"", "-p udp -m udp ! --dport 53 -m comment --comment \"a b\" -j DROP", "p !dport comment DROP"},
		{"goto OWN", "-g OWN", "GOTO"},
		{"quota 100 mbytes accept", "", "unknown ACCEPT"},
		{"counter accept", "-j ACCEPT", "ACCEPT"},
		{"counter", "", ""},
		{"meta nftrace set 1", "-j TRACE", "NOEFFECT"},
		{"tcp option maxseg size set 1400", "", "UNKNOWN"},
		{"ip dscp set 3", "", "unknown UNKNOWN"},
		{"continue", "-j nft --continue", "NOEFFECT"},
	} {
		name := "PREROUTING"
		if strings.HasPrefix(c.nft, "masquerade") {
			name = "POSTROUTING"
		}
		run(t, b, "nft", "flush chain ip nat PREROUTING; flush chain ip nat POSTROUTING")
		feed(t, b, "add rule ip nat "+name+" "+c.nft, "nft", "-f", "-")
		rs := readNFT(t, b)
		nat := rs.Table(netfilter.IPv4, "nat")
		if nat == nil || nat.Lookup(name).Len() != 1 || nat.Lookup("OWN").Len() != 1 {
			t.Fatalf("%s: lost: %+v", c.nft, rs)
		}
		chain := nat.Lookup(name)
		text := RuleText(nat, chain, 0)
		if want := strings.TrimSpace("-A " + name + " " + c.text); c.text != "" && text != want {
			t.Errorf("%s is read as\n%s, want\n%s", c.nft, text, want)
		}
		if got := brief(chain, 0); got != c.kinds {
			t.Errorf("%s is read as %q: %s, want %q", c.nft, got, text, c.kinds)
		}
		// Printed, it can be read again, and then it means no more than before.
		again := mustParse(t, printed(t, rs, true)).Table(netfilter.IPv4, "nat").Lookup(name)
		if got := brief(again, 0); got != c.kinds && !strings.Contains(c.kinds, "always") && !strings.Contains(text, "-j nft --continue") {
			t.Errorf("%s is parsed as %q: %s", c.nft, got, text)
		}
	}
}

// TestNFTForeignTables wants tables that merely have the name of one of
// iptables' to be reported.
func TestNFTForeignTables(t *testing.T) {
	b := newNode(t, nftPrograms...)
	for _, c := range []struct{ nft, want string }{
		{"table ip nat { chain prerouting { type nat hook prerouting priority -100; }; }", `its chain "prerouting" is at hook PREROUTING with priority -100`},
		{"table ip filter { chain INPUT { type filter hook input priority 10; }; }", `"INPUT"`},
		{"table ip filter { chain INPUT { type filter hook forward priority 0; }; }", `"INPUT"`},
		{"table ip mangle { flags dormant; chain INPUT { type filter hook input priority -150; }; }", "dormant"},
		{"table ip6 raw { chain OUTPUT { type route hook output priority -300; }; }", ""},
		{"table inet nat { chain x { type nat hook prerouting priority -100; }; }", ""},
		{"table ip kube-proxy { chain x { type nat hook prerouting priority -100; }; }", ""},
	} {
		run(t, b, "nft", "flush", "ruleset")
		feed(t, b, c.nft, "nft", "-f", "-")
		rs := readNFT(t, b)
		if c.want == "" {
			if len(rs.Unreadable) > 0 {
				t.Errorf("%s: %v", c.nft, rs.Unreadable)
			}
			continue
		}
		if len(rs.Tables) > 0 || len(rs.Unreadable) != 1 || !strings.Contains(rs.Unreadable[0].Reason, c.want) {
			t.Errorf("%s: %d tables, unreadable %v, want %s", c.nft, len(rs.Tables), rs.Unreadable, c.want)
		}
	}
}

// BenchmarkReadNFT compares the direct reader with iptables-nft-save and Parse.
func BenchmarkReadNFT(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("loading rules needs root")
	}
	for _, p := range nftPrograms {
		if _, err := exec.LookPath(p); err != nil {
			b.Skip(err)
		}
	}
	box, err := nodebox.New(nodebox.Config{
		NodeAddrs:    []netip.Prefix{netip.MustParsePrefix("10.146.0.2/24")},
		OutsideAddrs: []netip.Prefix{netip.MustParsePrefix("10.146.0.100/24")},
	})
	if err != nil {
		b.Skip(err)
	}
	defer box.Close()
	loadNFT(b, box, false, synthetic(b, 1000, 10))
	measure := func(name string, read func() *netfilter.Ruleset) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			rules := 0
			for range b.N {
				rules = read().RuleCount()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(rules), "ns/rule")
			b.ReportMetric(float64(rules), "rules")
		})
	}
	measure("direct", func() *netfilter.Ruleset { return readNFT(b, box) })
	measure("save", func() *netfilter.Ruleset { return mustParse(b, saveNFT(b, box)) })
}
