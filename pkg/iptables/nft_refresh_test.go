//go:build linux

package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/internal/nodebox"
	"github.com/natlens/natlens/pkg/internal/nfnetlink"
	"github.com/natlens/natlens/pkg/netfilter"
)

// refreshNFT reads what can have moved.
func refreshNFT(t testing.TB, b *nodebox.Box, n *NFT) *netfilter.Ruleset {
	t.Helper()
	var rs *netfilter.Ruleset
	err := b.Node.Do(func() (err error) {
		rs, err = n.Refresh(context.Background())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

// written is the whole of what kube-proxy writes for these Services.
func written(t testing.TB, services []kubeproxy.Service) string {
	t.Helper()
	var b bytes.Buffer
	cfg := kubeproxy.Config{PodCIDR: kubeproxy.SyntheticPodCIDR, NodeIP: kubeproxy.SyntheticNodeIP, SyncOrder: true}
	if err := kubeproxy.Write(&b, cfg, services); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// partial is the input for iptables-restore --noflush that makes one dump out of
// another as kube-proxy's partial sync does: chains that differ are rewritten,
// and so are those that it rewrites always; chains that are gone are deleted.
func partial(before, after string) string {
	old, now := chainLines(before), chainLines(after)
	var out strings.Builder
	for _, table := range []string{"filter", "nat"} {
		fmt.Fprintf(&out, "*%s\n", table)
		var rules, gone []string
		for _, key := range sortedKeys(now) {
			if key.table != table || !strings.HasPrefix(key.chain, "KUBE-") {
				continue
			}
			always := slices.Contains([]string{"KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ"}, key.chain)
			if have, ok := old[key]; !ok || always || !slices.Equal(have, now[key]) {
				fmt.Fprintf(&out, ":%s - [0:0]\n", key.chain)
				rules = append(rules, now[key]...)
			}
		}
		for _, key := range sortedKeys(old) {
			if _, ok := now[key]; !ok && key.table == table {
				fmt.Fprintf(&out, ":%s - [0:0]\n", key.chain)
				gone = append(gone, "-X "+key.chain+"\n")
			}
		}
		out.WriteString(strings.Join(rules, "") + strings.Join(gone, "") + "COMMIT\n")
	}
	return out.String()
}

type chainKey struct{ table, chain string }

func sortedKeys(m map[chainKey][]string) []chainKey {
	return slices.SortedFunc(maps.Keys(m), func(a, b chainKey) int { return strings.Compare(a.table+" "+a.chain, b.table+" "+b.chain) })
}

// chainLines are the rules of each chain of a dump.
func chainLines(dump string) map[chainKey][]string {
	out := map[chainKey][]string{}
	var table string
	for line := range strings.Lines(dump) {
		words := strings.Fields(line)
		switch {
		case line[0] == '*':
			table = words[0][1:]
		case line[0] == ':':
			out[chainKey{table, words[0][1:]}] = nil
		case words[0] == "-A":
			k := chainKey{table, words[1]}
			out[k] = append(out[k], line)
		}
	}
	return out
}

// TestNFTRefreshFollows changes Services as a cluster does, some of them many
// times, and edits rules by hand, and wants Refresh to tell what Read tells.
func TestNFTRefreshFollows(t *testing.T) {
	const seed = 7
	r := rand.New(rand.NewPCG(seed, 1))
	b := newNode(t, nftPrograms...)
	services := kubeproxy.Synthetic(150, 10) // above manyChains
	dump := written(t, services)
	loadNFT(t, b, false, dump)
	var n NFT
	defer n.Close()
	refreshNFT(t, b, &n)
	pinnedOnce := false
	for i := range 60 {
		var what string
		switch r.IntN(10) {
		case 0:
			what = "nothing"
		case 1:
			what = "a rule by hand"
			run(t, b, "iptables-nft", "-t", "nat", "-I", "KUBE-SERVICES", "-d", fmt.Sprintf("192.0.2.%d", i), "-j", "ACCEPT")
		case 2:
			what = "a chain that nothing leads to"
			run(t, b, "iptables-nft", "-t", "filter", "-N", fmt.Sprintf("LONER-%d", i))
		case 3:
			what = "everything anew"
			loadNFT(t, b, false, dump)
		case 4:
			what = "a table of IPv6, there or gone"
			if i%2 == 0 {
				run(t, b, "ip6tables-nft", "-t", "raw", "-A", "OUTPUT", "-j", "ACCEPT")
			} else {
				_ = b.Node.Run(exec.Command("nft", "delete", "table", "ip6", "raw"))
			}
		case 5:
			what = "policy"
			run(t, b, "iptables-nft", "-P", "FORWARD", []string{"DROP", "ACCEPT"}[i%2])
		default:
			what = "Services"
			services = slices.Clone(services)
			for range 1 + r.IntN(4) {
				s := &services[r.IntN(len(services))]
				switch r.IntN(4) {
				case 0:
					s.Endpoints = nil
				case 1:
					s.AffinitySeconds = 10800 - s.AffinitySeconds // the same chains, with other rules
				default:
					s.Endpoints = nil
					for e := range 1 + r.IntN(12) {
						addr := netip.AddrFrom4([4]byte{10, 200, byte(r.IntN(3)), byte(e)})
						s.Endpoints = append(s.Endpoints, kubeproxy.Endpoint{Addr: netip.AddrPortFrom(addr, 8080)})
					}
				}
			}
			after := written(t, services)
			feed(t, b, partial(dump, after), "iptables-nft-restore", "--noflush", "--counters")
			dump = after
		}
		got := refreshNFT(t, b, &n)
		if diff := cmp.Diff(listing(readNFT(t, b)), listing(got)); diff != "" {
			t.Fatalf("step %d, %s: rules differ (-read +refreshed):\n%s", i, what, diff)
		}
		pinnedOnce = pinnedOnce || n.stepper.pruned
		if again := refreshNFT(t, b, &n); again != got {
			t.Fatalf("step %d, %s: nothing moved, but there is another ruleset", i, what)
		}
	}
	if !pinnedOnce {
		t.Error("no step left anything out: the test is too small")
	}
}

// TestNFTConfirm edits an endpoint's chain by hand: the next look may not see
// it, but the one that reads everything does, and only that chain is another.
func TestNFTConfirm(t *testing.T) {
	b := newNode(t, nftPrograms...)
	loadNFT(t, b, false, written(t, kubeproxy.Synthetic(150, 10)))
	var n NFT
	defer n.Close()
	before := refreshNFT(t, b, &n)
	var name string
	for c := range before.Table(netfilter.IPv4, "nat").Chains() {
		if strings.HasPrefix(c.Name, "KUBE-SEP-") {
			name = c.Name
		}
	}
	run(t, b, "iptables-nft", "-t", "nat", "-I", name, "-s", "192.0.2.1", "-j", "ACCEPT")
	refreshNFT(t, b, &n)
	if !n.stepper.pruned {
		t.Fatal("nothing was left out")
	}
	var got *netfilter.Ruleset
	err := b.Node.Do(func() error {
		conn, err := nfnetlink.Open()
		if err != nil {
			return err
		}
		defer conn.Close()
		rs, interrupted, pruned, err := n.stepper.Step(t.Context(), conn, nfnetlink.Everything)
		if interrupted || pruned {
			t.Errorf("interrupted %t, pruned %t", interrupted, pruned)
		}
		got = rs
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(listing(readNFT(t, b)), listing(got)); diff != "" {
		t.Errorf("rules differ (-read +confirmed):\n%s", diff)
	}
	nat := before.Table(netfilter.IPv4, "nat")
	for c := range got.Table(netfilter.IPv4, "nat").Chains() {
		if was := nat.Lookup(c.Name); c.Name != name && was.Version() != c.Version() {
			t.Errorf("%s is another, though only %s was edited", c.Name, name)
		}
	}
}

// TestNFTFirst wants a chain that was asked for ahead of the others, with its new
// endpoints, and then the others.
func TestNFTFirst(t *testing.T) {
	b := newNode(t, nftPrograms...)
	services := kubeproxy.Synthetic(150, 10)
	dump := written(t, services)
	loadNFT(t, b, false, dump)
	var n NFT
	defer n.Close()
	before := refreshNFT(t, b, &n)
	services = slices.Clone(services)
	for _, i := range []int{1, 2} {
		services[i].Endpoints = []kubeproxy.Endpoint{{Addr: netip.MustParseAddrPort(fmt.Sprintf("10.200.0.%d:8080", i))}}
	}
	after := written(t, services)
	feed(t, b, partial(dump, after), "iptables-nft-restore", "--noflush", "--counters")
	chainOf := func(i int) string {
		s := services[i]
		for key, lines := range chainLines(after) {
			if strings.HasPrefix(key.chain, "KUBE-SVC-") && len(lines) > 0 && strings.Contains(strings.Join(lines, ""), s.Namespace+"/"+s.Name+":") {
				return key.chain
			}
		}
		t.Fatalf("no chain of %s", s.Name)
		return ""
	}
	one, two := chainOf(1), chainOf(2)
	n.First([]string{one, "KUBE-EXT-NONE", "KUBE-FW-NONE"})
	first := refreshNFT(t, b, &n)
	want := before.Table(netfilter.IPv4, "nat")
	nat := first.Table(netfilter.IPv4, "nat")
	if nat.Lookup(one).Version() == want.Lookup(one).Version() || nat.Lookup(two).Version() != want.Lookup(two).Version() {
		t.Errorf("%s that was asked for and %s that was not: changed %t and %t", one, two,
			nat.Lookup(one).Version() != want.Lookup(one).Version(), nat.Lookup(two).Version() != want.Lookup(two).Version())
	}
	for i := range nat.Lookup(one).Len() {
		rule := nat.Lookup(one).Rule(i)
		if e := rule[len(rule)-1]; e.Kind == netfilter.Jump && nat.ByID(netfilter.ChainID(e.A)) == nil {
			t.Errorf("the chain %s of a new endpoint was not read", nat.ChainName(netfilter.ChainID(e.A)))
		}
	}
	if !n.Moved() || !first.Partly {
		t.Errorf("the other changes are forgotten: moved %t, only a part %t", n.Moved(), first.Partly)
	}
	if diff := cmp.Diff(listing(readNFT(t, b)), listing(refreshNFT(t, b, &n))); diff != "" {
		t.Errorf("afterwards (-read +refreshed):\n%s", diff)
	}
	if n.Moved() {
		t.Error("rules that stand still have moved")
	}

	// Though what was asked for has changed once more, the rest is not put off.
	feed(t, b, partial(after, dump), "iptables-nft-restore", "--noflush", "--counters")
	refreshNFT(t, b, &n)
	feed(t, b, partial(dump, after), "iptables-nft-restore", "--noflush", "--counters")
	if rs := refreshNFT(t, b, &n); rs.Partly {
		t.Error("one part after the other")
	}
}

// count has the chains of the node's own packets count one.
func count(t *testing.T, b *nodebox.Box) {
	t.Helper()
	conn, err := b.Node.Dial(t.Context(), "udp", "10.146.0.100:9")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("abc")); err != nil {
		t.Fatal(err)
	}
	// The closed port answers, which counts, too.
	if err := conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Fatal(err)
	}
}

// TestNFTGlance changes large tables in ways of kube-proxy and by hand, and wants the
// next Refresh to tell them, and the one after it to tell what Read tells.
func TestNFTGlance(t *testing.T) {
	b := newNode(t, nftPrograms...)
	services := kubeproxy.Synthetic(150, 10)
	dump := written(t, services)
	loadNFT(t, b, false, dump)
	chains := slices.DeleteFunc(sortedKeys(chainLines(dump)), func(k chainKey) bool {
		return !strings.HasPrefix(k.chain, "KUBE-SVC-") || len(chainLines(dump)[k]) < 10
	})
	hand := func(args ...string) func() {
		return func() { run(t, b, "iptables-nft", append([]string{"-w", "-t", "nat"}, args...)...) }
	}
	services = slices.Clone(services)
	sync := func(change func()) func() {
		return func() {
			change()
			after := written(t, services)
			feed(t, b, partial(dump, after), "iptables-nft-restore", "--noflush", "--counters")
			dump = after
		}
	}
	to := func(addr string) []kubeproxy.Endpoint {
		return []kubeproxy.Endpoint{{Addr: netip.MustParseAddrPort(addr)}}
	}
	reply := []string{"-m", "comment", "--comment", "by hand", "-j", "RETURN"}
	var n NFT
	defer n.Close()
	n.First(nil)
	refreshNFT(t, b, &n)
	for _, tt := range []struct {
		name   string
		change func()
		whole  bool // nothing is left to the Refresh after
	}{
		{"another endpoint", sync(func() { services[1].Endpoints = to("10.200.0.1:8080") }), false},
		{"as many endpoints", sync(func() { services[2].Endpoints[0].Addr = netip.MustParseAddrPort("10.200.0.2:8080") }), false},
		{"no endpoint", sync(func() { services[3].Endpoints = nil }), false},
		{"a Service less", sync(func() { services = services[1:] }), false},
		{"a Service more", sync(func() { services = append(kubeproxy.Synthetic(1, 10), services...) }), false},
		{"session affinity", sync(func() { services[5].AffinitySeconds = 600 }), false},
		{"everything anew, as it was", func() { loadNFT(t, b, false, dump) }, true},
		{"everything anew, with another endpoint", func() {
			services[6].Endpoints = to("10.200.0.6:8080")
			dump = written(t, services)
			loadNFT(t, b, false, dump)
		}, true},
		{"a rule more at the end", hand(append([]string{"-A", chains[7].chain}, reply...)...), false},
		{"and less", hand(append([]string{"-D", chains[7].chain}, reply...)...), false},
		{"a rule more at the start", hand(append([]string{"-I", chains[8].chain}, reply...)...), false},
		{"a rule less amid others", hand("-D", chains[9].chain, "5"), false},
		{"another rule amid others, and traffic", func() {
			hand(append([]string{"-R", chains[10].chain, "5"}, reply...)...)()
			count(t, b)
		}, true},
		{"a rule in a small table", func() { run(t, b, "iptables-nft", "-A", "FORWARD", "-j", "ACCEPT") }, false},
		{"a table more", func() { run(t, b, "ip6tables-nft", "-t", "raw", "-A", "OUTPUT", "-j", "ACCEPT") }, false},
		{"a table less", func() { run(t, b, "nft", "delete", "table", "ip6", "raw") }, false},
		{"a chain that nothing leads to", hand("-N", "LONER"), true},
	} {
		tt.change()
		want, got := listing(readNFT(t, b)), listing(refreshNFT(t, b, &n))
		maps.DeleteFunc(got, func(chain string, _ []string) bool { _, exists := want[chain]; return !exists }) // left over
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-read +at a glance):\n%s", tt.name, diff)
		}
		if n.Moved() == tt.whole {
			t.Errorf("%s: the rest is left to the next Refresh: %t", tt.name, n.Moved())
		}
		if diff := cmp.Diff(want, listing(refreshNFT(t, b, &n))); diff != "" {
			t.Errorf("%s (-read +afterwards):\n%s", tt.name, diff)
		}
		if n.Moved() {
			t.Errorf("%s: rules that stand still have moved", tt.name)
		}
	}
}

// TestNFTGlanceLeavesRest changes a rule that no glance tells together with others,
// again and again, and wants every second Refresh to tell it.
func TestNFTGlanceLeavesRest(t *testing.T) {
	b := newNode(t, nftPrograms...)
	dump := written(t, kubeproxy.Synthetic(150, 10))
	loadNFT(t, b, false, dump)
	var chain string
	for _, k := range sortedKeys(chainLines(dump)) {
		if strings.HasPrefix(k.chain, "KUBE-SVC-") && len(chainLines(dump)[k]) >= 10 {
			chain = k.chain
		}
	}
	var n NFT
	defer n.Close()
	n.First(nil)
	refreshNFT(t, b, &n)
	for i := range 6 {
		address := fmt.Sprintf("192.0.2.%d", i)
		feed(t, b, fmt.Sprintf("*nat\n-R %s 5 -s %s -j RETURN\n-A KUBE-SERVICES -s %s -j RETURN\nCOMMIT\n", chain, address, address), "iptables-nft-restore", "--noflush")
		nat := listing(refreshNFT(t, b, &n))
		for _, name := range []string{"KUBE-SERVICES", chain}[:1+i%2] {
			if lines := strings.Join(nat["ipv4 nat iptables-nft "+name], "\n"); !strings.Contains(lines, address) {
				t.Errorf("change %d is not told of %s:\n%s", i, name, lines)
			}
		}
	}
}

// TestNFTGlanceUnreadable has another program spoil the table for a while, in which a
// Service comes and goes, and wants the table unreadable as long as that lasts.
func TestNFTGlanceUnreadable(t *testing.T) {
	b := newNode(t, nftPrograms...)
	services := kubeproxy.Synthetic(151, 10)
	fewer := written(t, services[1:])
	loadNFT(t, b, false, fewer)
	var n NFT
	defer n.Close()
	n.First(nil)
	refreshNFT(t, b, &n)
	unreadable := func(when string, want bool) {
		t.Helper()
		for range 3 {
			if got := len(refreshNFT(t, b, &n).Unreadable) > 0; got != want {
				t.Errorf("%s: unreadable %t", when, got)
			}
		}
	}
	more := written(t, services)
	run(t, b, "nft", "add chain ip nat FOREIGN { type nat hook prerouting priority -90; }")
	unreadable("a foreign chain", true)
	feed(t, b, partial(fewer, more), "iptables-nft-restore", "--noflush")
	unreadable("a Service more", true)
	feed(t, b, partial(more, fewer), "iptables-nft-restore", "--noflush")
	unreadable("a Service less", true)
	run(t, b, "nft", "delete chain ip nat FOREIGN")
	unreadable("no foreign chain", false)
	if diff := cmp.Diff(listing(readNFT(t, b)), listing(refreshNFT(t, b, &n))); diff != "" {
		t.Errorf("(-read +refreshed):\n%s", diff)
	}
}

// TestNFTGlanceWorn changes all Services until the memory of the tables is given up, and
// wants Refresh to tell what Read tells, again and again.
func TestNFTGlanceWorn(t *testing.T) {
	b := newNode(t, nftPrograms...)
	services := kubeproxy.Synthetic(150, 10)
	dump := written(t, services)
	loadNFT(t, b, false, dump)
	var n NFT
	defer n.Close()
	n.First(nil)
	last, anew := refreshNFT(t, b, &n), 0
	for round := range byte(8) {
		services = slices.Clone(services)
		for i := range services {
			services[i].Endpoints = slices.Clone(services[i].Endpoints)
			for e := range services[i].Endpoints {
				services[i].Endpoints[e].Addr = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 200 + round, byte(i), byte(e)}), 8080)
			}
		}
		after := written(t, services)
		feed(t, b, partial(dump, after), "iptables-nft-restore", "--noflush", "--counters")
		dump = after
		for n.Moved() {
			refreshNFT(t, b, &n)
		}
		rs := refreshNFT(t, b, &n)
		if diff := cmp.Diff(listing(readNFT(t, b)), listing(rs)); diff != "" {
			t.Fatalf("round %d (-read +refreshed):\n%s", round, diff)
		}
		if !rs.Table(netfilter.IPv4, "nat").Revises(last.Table(netfilter.IPv4, "nat")) {
			anew++
		}
		last = rs
	}
	if anew == 0 {
		t.Error("the tables were never read anew: the test is too small")
	}
}

// TestNFTRefreshCounts sends packets through chains behind chains, and wants
// Refresh to tell what each has counted.
func TestNFTRefreshCounts(t *testing.T) {
	b := newNode(t, nftPrograms...)
	loadNFT(t, b, false, `*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:A - [0:0]
:B - [0:0]
:C - [0:0]
:D - [0:0]
-A OUTPUT -p udp -m udp --dport 9 -j A
-A OUTPUT -p udp -m udp --dport 10 -g D
-A A -j B
-A A -j C
-A B -m comment --comment "counts"
-A B -m udp -p udp --dport 9 -j RETURN
-A C -j RETURN
-A D -j RETURN
COMMIT
`)
	var n NFT
	defer n.Close()
	last := refreshNFT(t, b, &n)
	for i := range 12 {
		port := 9 + i%3 // nothing asks for port 11, but the policy counts
		conn, err := b.Node.Dial(t.Context(), "udp", fmt.Sprintf("10.146.0.100:%d", port))
		if err != nil {
			t.Fatal(err)
		}
		// The answer to a closed port may come as an error of a later write.
		if _, err := conn.Write([]byte("abc")); err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatal(err)
		}
		conn.Close()
		// Once more, since the first look may come while the packet is under way.
		refreshNFT(t, b, &n)
		got := refreshNFT(t, b, &n)
		if diff := cmp.Diff(listing(readNFT(t, b)), listing(got)); diff != "" {
			t.Fatalf("packet %d: (-read +refreshed):\n%s", i, diff)
		}
		if got == last || !got.SameRules(last) {
			t.Fatalf("packet %d: the same ruleset: %t, the same rules: %t", i, got == last, got.SameRules(last))
		}
		last = got
	}
}

// TestNFTRefreshWhileRulesChange rewrites Services as fast as it can. Each
// ruleset must be one of those that were written, or say that it is torn; memory
// must not grow; and the last is what Read tells. NATLENS_STRESS sets how long.
func TestNFTRefreshWhileRulesChange(t *testing.T) {
	lasts := 6 * time.Second
	if s := os.Getenv("NATLENS_STRESS"); s != "" {
		d, err := time.ParseDuration(s)
		if err != nil {
			t.Fatal(err)
		}
		lasts = d
	}
	b := newNode(t, nftPrograms...)
	// Services of generation k have endpoints in 10.k.0.0/16, some have none, and
	// the first Services come and go.
	const generations = 7
	var dumps []string
	want := map[string]int{}
	for k := range generations {
		services := kubeproxy.Synthetic(120, 10)[k:]
		for i := range services {
			for e := range services[i].Endpoints {
				a := services[i].Endpoints[e].Addr
				ip := a.Addr().As4()
				ip[1] = byte(100 + k)
				services[i].Endpoints[e].Addr = netip.AddrPortFrom(netip.AddrFrom4(ip), a.Port())
			}
		}
		dumps = append(dumps, written(t, services))
		loadNFT(t, b, false, dumps[k])
		want[natOf(readNFT(t, b))] = k
	}
	if len(want) != generations {
		t.Fatalf("%d generations are alike", generations-len(want)+1)
	}
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		for at := generations - 1; ; {
			next := (at + 1) % generations
			cmd := exec.Command("iptables-nft-restore", "--noflush")
			cmd.Stdin = strings.NewReader(partial(dumps[at], dumps[next]))
			if err := b.Node.Run(cmd); err != nil {
				done <- err
				return
			}
			at = next
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
		}
	}()
	var n NFT
	defer n.Close()
	seen := map[string]int{}
	var early, late uint64
	began := time.Now()
	for time.Since(began) < lasts {
		rs := refreshNFT(t, b, &n)
		k, ok := want[natOf(rs)]
		switch {
		case ok:
			seen[fmt.Sprint(k)]++
		case rs.Torn:
			seen["torn"]++
		default:
			t.Fatalf("read %v: %d rules that were never written", seen, rs.RuleCount())
		}
		if late = heapInUse(); early == 0 && time.Since(began) > lasts/4 {
			early = late
		}
	}
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Logf("generations seen %v, heap %d then %d KB", seen, early>>10, late>>10)
	if len(seen) < 3 {
		t.Errorf("too few generations were seen: %v", seen)
	}
	if late > early+early/2 {
		t.Errorf("the heap grew from %d to %d bytes", early, late)
	}
	if diff := cmp.Diff(listing(readNFT(t, b)), listing(refreshNFT(t, b, &n))); diff != "" {
		t.Errorf("at the end (-read +refreshed):\n%s", diff)
	}
}

// natOf is the nat table as text, without counters. iptables-nft-restore has a
// transaction for each table.
func natOf(rs *netfilter.Ruleset) string {
	t := rs.Table(netfilter.IPv4, "nat")
	if t == nil {
		return ""
	}
	var lines []string
	for c := range t.Chains() {
		lines = append(lines, c.Name)
		for i := range c.Len() {
			lines = append(lines, fmt.Sprintf("%s %d %s", c.Name, i, RuleText(t, c, i)))
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func heapInUse() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
