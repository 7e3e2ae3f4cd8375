//go:build linux

package iptables

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/internal/nodebox"
	"github.com/natlens/natlens/pkg/netfilter"
)

func refreshLegacy(t testing.TB, b *nodebox.Box, l *Legacy) *netfilter.Ruleset {
	t.Helper()
	var rs *netfilter.Ruleset
	err := b.Node.Do(func() (err error) {
		rs, err = l.Refresh(context.Background())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

// TestLegacyRefreshFollows changes Services as a cluster does, many times, and
// edits rules by hand, and wants Refresh to tell what Read tells.
func TestLegacyRefreshFollows(t *testing.T) {
	const seed = 5
	r := rand.New(rand.NewPCG(seed, 1))
	b := newNode(t, append(legacyPrograms, "iptables-legacy", "ip6tables-legacy")...)
	services := kubeproxy.Synthetic(120, 10) // enough chains for two workers
	dump := written(t, services)
	if err := load(b, netfilter.IPv4, dump); err != nil {
		t.Fatal(err)
	}
	var l Legacy
	defer l.Close()
	last := refreshLegacy(t, b, &l)
	shared := 0
	for i := range 150 {
		what := "nothing"
		switch k := r.IntN(12); k {
		case 0:
		case 1:
			what = "a rule by hand"
			run(t, b, "iptables-legacy", "-w", "-t", "nat", "-I", "KUBE-SERVICES", "-d", fmt.Sprintf("192.0.2.%d", i), "-j", "ACCEPT")
		case 2:
			what = "a chain that nothing leads to, and that stands ahead of all others"
			run(t, b, "iptables-legacy", "-w", "-t", "filter", "-N", fmt.Sprintf("A-%d", 1000-i))
		case 3:
			what = "everything anew"
			if err := load(b, netfilter.IPv4, dump); err != nil {
				t.Fatal(err)
			}
		case 4:
			what = "IPv6"
			run(t, b, "ip6tables-legacy", "-w", "-t", []string{"raw", "nat"}[r.IntN(2)], "-A", "OUTPUT", "-s", fmt.Sprintf("fd00::%d", i), "-j", "ACCEPT")
		case 5:
			what = "a policy"
			run(t, b, "iptables-legacy", "-w", "-P", "FORWARD", []string{"DROP", "ACCEPT"}[i%2])
		case 6:
			what = "counters"
			run(t, b, "iptables-legacy", "-w", "-t", "nat", "-Z", "KUBE-SERVICES")
		case 7:
			what = "an address"
			run(t, b, "iptables-legacy", "-w", "-t", "nat", "-R", "KUBE-SERVICES", "1", "-d", fmt.Sprintf("192.0.2.%d", i), "-j", "ACCEPT")
		default:
			what = "Services"
			services = slices.Clone(services)
			for range 1 + r.IntN(4) {
				s := &services[r.IntN(len(services))]
				s.Endpoints = nil
				for e := range r.IntN(13) {
					addr := netip.AddrFrom4([4]byte{10, 200, byte(r.IntN(3)), byte(e)})
					s.Endpoints = append(s.Endpoints, kubeproxy.Endpoint{Addr: netip.AddrPortFrom(addr, 8080)})
				}
			}
			after := written(t, services)
			if err := load(b, netfilter.IPv4, partial(dump, after), "--noflush"); err != nil {
				t.Fatal(err)
			}
			dump = after
		}
		got := refreshLegacy(t, b, &l)
		if got.Torn {
			t.Fatalf("step %d, %s: torn", i, what)
		}
		if diff := cmp.Diff(ordered(readDirectly(t, b)), ordered(got)); diff != "" {
			t.Fatalf("step %d, %s: rules differ (-read +refreshed):\n%s", i, what, diff)
		}
		if again := refreshLegacy(t, b, &l); again != got {
			t.Fatalf("step %d, %s: nothing moved, but there is another ruleset", i, what)
		}
		if what == "nothing" && got != last {
			t.Fatalf("step %d: another ruleset though nothing was done", i)
		}
		if what == "counters" && !got.SameRules(last) {
			t.Fatalf("step %d: other rules, but only counters were set", i)
		}
		shared += sameVersions(t, last, got)
		last = got
	}
	if shared == 0 {
		t.Error("no chain was shared with the ruleset before")
	}
}

// ordered is a ruleset as text, in its order.
func ordered(rs *netfilter.Ruleset) (out []string) {
	for _, t := range rs.Tables {
		out = append(out, fmt.Sprint(t.Family, " ", t.Name))
		for c := range t.Chains() {
			out = append(out, c.Name)
			if c.Base != nil {
				out = append(out, fmt.Sprintf("%+v", *c.Base))
			}
			for i := range c.Len() {
				n, _ := c.Counter(i)
				out = append(out, fmt.Sprint(n, " ", RuleText(t, c, i)))
			}
		}
	}
	return out
}

// sameVersions wants chains with the same rules to have the same version, and
// returns how many there are.
func sameVersions(t *testing.T, last, next *netfilter.Ruleset) (shared int) {
	t.Helper()
	text := func(t *netfilter.Table, c *netfilter.Chain) (out []string) {
		if c.Base != nil {
			out = append(out, fmt.Sprint(c.Base.Policy))
		}
		for i := range c.Len() {
			out = append(out, RuleText(t, c, i))
		}
		return out
	}
	for _, now := range next.Tables {
		for _, was := range last.Tables {
			if !now.Same(was) || !now.Revises(was) {
				continue
			}
			for c := range now.Chains() {
				o := was.Lookup(c.Name)
				if o == nil {
					continue
				}
				same := slices.Equal(text(now, c), text(was, o))
				if same != (c.Version() == o.Version()) {
					t.Fatalf("chain %s: the same rules %t, the same version %t", c.Name, same, c.Version() == o.Version())
				}
				if same {
					shared++
				}
			}
		}
	}
	return shared
}

// TestLegacyRefreshCounts sends packets, and wants of the chains that they went
// through, and of no others, new counters.
func TestLegacyRefreshCounts(t *testing.T) {
	b := newNode(t, legacyPrograms...)
	if err := load(b, netfilter.IPv4, "*filter\n:OUTPUT ACCEPT [0:0]\n:A - [0:0]\n:B - [0:0]\n:C - [0:0]\n"+
		"-A OUTPUT -p udp -m udp --dport 9 -j A\n-A OUTPUT -p udp -m udp --dport 10 -j B\n-A A -j RETURN\n-A B -j RETURN\n-A C -j RETURN\nCOMMIT\n"); err != nil {
		t.Fatal(err)
	}
	var l Legacy
	defer l.Close()
	last := refreshLegacy(t, b, &l)
	for i := range 6 {
		port := 9 + i%2
		conn, err := b.Node.Dial(t.Context(), "udp", fmt.Sprintf("10.146.0.100:%d", port))
		if err != nil {
			t.Fatal(err)
		}
		// The answer to a closed port may come as an error of a later write.
		if _, err := conn.Write([]byte("abc")); err != nil && !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatal(err)
		}
		conn.Close()
		got := refreshLegacy(t, b, &l)
		if diff := cmp.Diff(ordered(readDirectly(t, b)), ordered(got)); diff != "" {
			t.Fatalf("packet %d: (-read +refreshed):\n%s", i, diff)
		}
		if got == last || !got.SameRules(last) {
			t.Fatalf("packet %d: the same ruleset: %t, the same rules: %t", i, got == last, got.SameRules(last))
		}
		now, was := got.Table(netfilter.IPv4, "filter"), last.Table(netfilter.IPv4, "filter")
		for _, name := range []string{"OUTPUT", "A", "B", "C"} {
			moved := name == "OUTPUT" || name == map[int]string{9: "A", 10: "B"}[port]
			if (now.Lookup(name) != was.Lookup(name)) != moved {
				t.Errorf("packet %d to port %d: chain %s is another: %t", i, port, name, !moved)
			}
		}
		last = got
	}
}

// TestLegacyRefreshUnchanged wants an unchanged look to leave no garbage that
// grows with the tables.
func TestLegacyRefreshUnchanged(t *testing.T) {
	b := newNode(t, legacyPrograms...)
	allocs := func(services int) float64 {
		if err := load(b, netfilter.IPv4, written(t, kubeproxy.Synthetic(services, 3))); err != nil {
			t.Fatal(err)
		}
		var l Legacy
		defer l.Close()
		refreshLegacy(t, b, &l)
		return testing.AllocsPerRun(20, func() { refreshLegacy(t, b, &l) })
	}
	few, many := allocs(10), allocs(500)
	if many > few+2 {
		t.Errorf("%.0f allocations with 10 Services, %.0f with 500", few, many)
	}
}

// TestLegacyRefreshSets has the kernel give the number of an IP set to another
// one: the same bytes mean another rule.
func TestLegacyRefreshSets(t *testing.T) {
	b := newNode(t, legacyPrograms...)
	var l Legacy
	defer l.Close()
	for _, name := range []string{"one", "two"} {
		err := b.Node.Do(func() error { return netlink.IpsetCreate(name, "hash:ip", netlink.IpsetCreateOptions{}) })
		if err != nil {
			unable(t, "making IP sets: %v", err)
		}
		if err := load(b, netfilter.IPv4, "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -m set --match-set "+name+" src -j DROP\nCOMMIT\n"); err != nil {
			t.Fatal(err)
		}
		table := refreshLegacy(t, b, &l).Table(netfilter.IPv4, "filter")
		if got, want := RuleText(table, table.Lookup("INPUT"), 0), "-A INPUT -m set --match-set "+name+" src -j DROP"; got != want {
			t.Errorf("%s, want %s", got, want)
		}
		if err := load(b, netfilter.IPv4, "*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n"); err != nil {
			t.Fatal(err)
		}
		if err := b.Node.Do(func() error { return netlink.IpsetDestroy(name) }); err != nil {
			t.Fatal(err)
		}
	}
}

// TestLegacyRefreshWhileRulesChange replaces the rules as fast as it can. Each
// table must be of one state, those of one ruleset of states side by side, unless
// it says that it is torn; memory must not grow; and the last is what Read tells.
// NATLENS_STRESS sets how long.
func TestLegacyRefreshWhileRulesChange(t *testing.T) {
	lasts := 5 * time.Second
	if s := os.Getenv("NATLENS_STRESS"); s != "" {
		d, err := time.ParseDuration(s)
		if err != nil {
			t.Fatal(err)
		}
		lasts = d
	}
	b := newNode(t, legacyPrograms...)
	if err := load(b, netfilter.IPv4, state(0)); err != nil {
		t.Fatal(err)
	}
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() {
		for n := 1; ; n++ {
			select {
			case <-stop:
				stopped <- nil
				return
			default:
			}
			if err := load(b, netfilter.IPv4, state(n)); err != nil {
				stopped <- err
				return
			}
		}
	}()
	var l Legacy
	defer l.Close()
	var early, late uint64
	seen, reads, torn := map[int]bool{}, 0, 0
	began := time.Now()
	for time.Since(began) < lasts {
		rs := refreshLegacy(t, b, &l)
		reads++
		if len(rs.Unreadable) > 0 || len(rs.Tables) != 2 {
			t.Fatalf("%d tables, unreadable: %v", len(rs.Tables), rs.Unreadable)
		}
		n := map[string]int{}
		for _, table := range rs.Tables {
			state, err := stateOf(table)
			if err != nil {
				t.Fatal(err)
			}
			n[table.Name] = state
		}
		seen[n["nat"]] = true
		// filter is committed first.
		if behind := n["filter"] - n["nat"]; rs.Torn {
			torn++
		} else if behind != 0 && behind != 1 {
			t.Fatalf("filter is of state %d, nat of %d", n["filter"], n["nat"])
		}
		if late = heapInUse(); early == 0 && time.Since(began) > lasts/4 {
			early = late
		}
	}
	close(stop)
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	t.Logf("%d states seen in %d reads, of which %d torn; heap %d then %d KB", len(seen), reads, torn, early>>10, late>>10)
	if len(seen) < 3 {
		t.Error("too few states were seen")
	}
	// Every state has chains of its own: until the table is read anew, their names
	// and rules stay.
	const most = 16 << 20
	if late > early+most {
		t.Errorf("the heap grew from %d to %d bytes", early, late)
	}
	if diff := cmp.Diff(ordered(readDirectly(t, b)), ordered(refreshLegacy(t, b, &l))); diff != "" {
		t.Errorf("at the end (-read +refreshed):\n%s", diff)
	}
}

// A table that cannot be decoded is unreadable, and readable again when it can.
func TestLegacyTakeFails(t *testing.T) {
	seed := maphash.MakeSeed()
	blob, _ := recordedBlob(t, netfilter.IPv4, "nat")
	table := &legacyTable{family: netfilter.IPv4, name: "nat"}
	good := blobOf(netfilter.IPv4, blob)
	bad := blobOf(netfilter.IPv4, blob)
	bad.count++
	take := func(b legacyBlob) error {
		_, err := table.take(b, seed, nil)
		if err != nil {
			table.fail(err, seed)
		}
		return err
	}
	if err := take(good); err != nil {
		t.Fatal(err)
	}
	first := table.table
	if err := take(good); err != nil || table.table != first {
		t.Errorf("the same block: %v, the same table: %t", err, table.table == first)
	}
	if err := take(bad); err == nil || table.table != nil || !strings.Contains(table.err.Error(), "announced") {
		t.Errorf("a block that does not fit together: %v", err)
	}
	if err := take(good); err != nil || table.table == nil || table.err != nil {
		t.Errorf("the first block again: %v", err)
	}
}
