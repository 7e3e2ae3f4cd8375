//go:build linux

package nftables

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/internal/nfnetlink"
	"github.com/natlens/natlens/pkg/netfilter"
)

// normalRules are the tables of a ruleset as text.
func normalRules(rs *netfilter.Ruleset) map[string][]string {
	out := map[string][]string{}
	for _, t := range rs.Tables {
		out[fmt.Sprint(t.Family, " ", t.Name)] = strings.Split(normal(t), "\n")
	}
	for _, u := range rs.Unreadable {
		out[fmt.Sprint(u.Family, " ", u.Table)] = []string{u.Reason}
	}
	return out
}

// table37 is what kube-proxy v1.37 begins with, in a family.
func table37(ip string) string {
	addr := map[string]string{"ip": "ipv4_addr", "ip6": "ipv6_addr"}[ip]
	return strings.NewReplacer("IP", ip, "ADDR", addr).Replace(`add table IP kube-proxy
add set IP kube-proxy cluster-ips { type ADDR ; }
add set IP kube-proxy nodeport-ips { type ADDR ; flags interval ; }
add map IP kube-proxy service-ips { type ADDR . inet_proto . inet_service : verdict ; }
add map IP kube-proxy service-nodeports { type inet_proto . inet_service : verdict ; }
add map IP kube-proxy no-endpoint-services { type ADDR . inet_proto . inet_service : verdict ; }
add chain IP kube-proxy nat-output { type nat hook output priority -100 ; }
add chain IP kube-proxy filter-input { type filter hook input priority -110 ; }
add chain IP kube-proxy services
add chain IP kube-proxy mark-for-masquerade
add rule IP kube-proxy mark-for-masquerade mark set mark or 0x4000
add rule IP kube-proxy nat-output jump services
add rule IP kube-proxy services IP daddr . meta l4proto . th dport vmap @service-ips
add rule IP kube-proxy services IP daddr . meta l4proto . th dport vmap @no-endpoint-services
add rule IP kube-proxy services fib daddr type local meta l4proto . th dport vmap @service-nodeports
`)
}

// changer writes Services as kube-proxy does, one transaction a change.
type changer struct {
	r        *rand.Rand
	ip       string         // family
	services map[int]string // what has to be deleted, in order
	endpoint int            // counted, so that every change differs
}

func (c *changer) addr(a, b, d int) string {
	if c.ip == "ip6" {
		return fmt.Sprintf("fd00:%x::%x:%x", a, b, d)
	}
	return fmt.Sprintf("10.%d.%d.%d", a, b, d)
}

func (c *changer) target() string {
	c.endpoint++
	a := c.addr(100+c.r.IntN(3), c.endpoint>>8&0xff, c.endpoint&0xff)
	if c.ip == "ip6" {
		return "[" + a + "]"
	}
	return a
}

// rules are those of a Service's chain, and what they need: anew, random.
func (c *changer) rules(n int) (before, rules, after string) {
	chain := fmt.Sprintf("service-%08X-ns/svc%d/tcp/p80", n, n)
	add := func(format string, args ...any) {
		rules += fmt.Sprintf("add rule "+c.ip+" kube-proxy "+chain+" "+format+"\n", args...)
	}
	if c.r.IntN(4) == 0 {
		add("%s saddr != { %s, %s } jump mark-for-masquerade", c.ip, c.addr(7, 7, c.r.IntN(3)), c.addr(7, 8, c.r.IntN(3)))
	}
	switch endpoints := c.r.IntN(6); {
	case endpoints == 0:
	case endpoints == 1:
		add("meta l4proto tcp dnat to %s:8080", c.target())
	case endpoints == 2: // session affinity
		var ways []string
		for i := range 2 + c.r.IntN(2) {
			e := fmt.Sprintf("endpoint-%08X-%d", n, i)
			set := fmt.Sprintf("affinity-%08X-%d", n, i)
			before += fmt.Sprintf("add set %s kube-proxy %s { type %s ; flags dynamic,timeout ; timeout %ds ; }\nadd chain %s kube-proxy %s\nflush chain %s kube-proxy %s\n",
				c.ip, set, map[string]string{"ip": "ipv4_addr", "ip6": "ipv6_addr"}[c.ip], 10800, c.ip, e, c.ip, e)
			rules += fmt.Sprintf("add rule %s kube-proxy %s update @%s { %s saddr }\nadd rule %s kube-proxy %s meta l4proto tcp dnat to %s:8080\n", c.ip, e, set, c.ip, c.ip, e, c.target())
			add("%s saddr @%s goto %s", c.ip, set, e)
			ways = append(ways, fmt.Sprintf("%d : goto %s", i, e))
			after += fmt.Sprintf("delete chain %s kube-proxy %s\ndelete set %s kube-proxy %s\n", c.ip, e, c.ip, set)
		}
		add("numgen random mod %d vmap { %s }", len(ways), strings.Join(ways, ", "))
	default:
		count := []int{3, 3, 10, 40, 70}[c.r.IntN(5)]
		var ways []string
		for i := range count {
			ways = append(ways, fmt.Sprintf("%d : %s . 8080", i, strings.Trim(c.target(), "[]")))
		}
		add("meta l4proto tcp dnat %s addr . port to numgen random mod %d map { %s }", c.ip, count, strings.Join(ways, ", "))
	}
	return before, rules, after
}

// change returns a transaction.
func (c *changer) change(n int) string {
	chain := fmt.Sprintf("service-%08X-ns/svc%d/tcp/p80", n, n)
	element := fmt.Sprintf("%s . tcp . 80", c.addr(172, n>>8, n&0xff))
	old, exists := c.services[n]
	var s strings.Builder
	if exists {
		fmt.Fprintf(&s, "flush chain %s kube-proxy %s\n", c.ip, chain)
		for line := range strings.Lines(old) { // endpoints' chains use the sets
			if name, ok := strings.CutPrefix(line, "delete chain "); ok {
				s.WriteString("flush chain " + name)
			}
		}
		s.WriteString(old)
		if c.r.IntN(4) == 0 {
			fmt.Fprintf(&s, "delete element %s kube-proxy service-ips { %s }\ndelete element %s kube-proxy cluster-ips { %s }\ndelete chain %s kube-proxy %s\n", c.ip, element, c.ip, c.addr(172, n>>8, n&0xff), c.ip, chain)
			delete(c.services, n)
			return s.String()
		}
	} else {
		fmt.Fprintf(&s, "add chain %s kube-proxy %s\n", c.ip, chain)
	}
	before, rules, after := c.rules(n)
	s.WriteString(before + rules)
	if !exists {
		fmt.Fprintf(&s, "add element %s kube-proxy service-ips { %s comment \"ns/svc%d:p80\" : goto %s }\nadd element %s kube-proxy cluster-ips { %s }\n", c.ip, element, n, chain, c.ip, c.addr(172, n>>8, n&0xff))
	}
	c.services[n] = after
	return s.String()
}

// TestLiveRefreshFollows changes Services as kube-proxy does, many times, and
// sometimes something else, and wants Refresh to tell what Read and nft tell; and
// chain.View.Update, which trusts in what is shared, the same Services. With
// NATLENS_STRESS it takes minutes.
func TestLiveRefreshFollows(t *testing.T) {
	const seed = 11
	steps := 300
	switch {
	case os.Getenv("NATLENS_STRESS") != "":
		steps = 3000
	case testing.Short():
		steps = 50
	}
	b := newNode(t)
	r := rand.New(rand.NewPCG(seed, 1))
	families := []*changer{{r: r, ip: "ip"}, {r: r, ip: "ip6"}}
	anew := func(c *changer) string {
		c.services = map[int]string{}
		return table37(c.ip)
	}
	load(t, b, anew(families[0])+anew(families[1]))
	var l Live
	defer l.Close()
	last := refreshLive(t, b, &l)
	node := chain.Node{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, Local: []netip.Addr{netip.MustParseAddr("10.146.0.2")}}
	found := chain.NewView(last, node).Services()
	counted := 0
	for i := range steps {
		c := families[r.IntN(2)]
		what, batch := "Services", ""
		switch k := r.IntN(100); k {
		case 0:
			what, batch = "the table made anew", "delete table "+c.ip+" kube-proxy\n"+anew(c)
			for n := range 5 { // the same handles for other rules
				batch += c.change(n)
			}
		case 1:
			what, batch = "the table flushed", "flush table "+c.ip+" kube-proxy\n"
			for n := range c.services {
				c.services[n] = ""
			}
			batch += "delete table " + c.ip + " kube-proxy\n" + anew(c)
		case 2:
			what, batch = "a policy", fmt.Sprintf("add chain %s kube-proxy filter-input { policy %s ; }\n", c.ip, []string{"drop", "accept"}[r.IntN(2)])
		case 3:
			what, batch = "a rule by hand", fmt.Sprintf("add rule %s kube-proxy services %s daddr { %s, %s } counter accept\n", c.ip, c.ip, c.addr(9, 9, i&0xff), c.addr(9, 8, r.IntN(2)))
		case 4:
			what, batch = "ranges", fmt.Sprintf("flush set %s kube-proxy nodeport-ips\nadd element %s kube-proxy nodeport-ips { %s-%s }\n", c.ip, c.ip, c.addr(1, 1, 1), c.addr(1, 1, 2+r.IntN(3)))
		case 5:
			what, batch = "another table", fmt.Sprintf("add table inet other%d\n", i)
		case 6:
			what = "nothing"
		default:
			for range 1 + r.IntN(4) {
				batch += c.change(r.IntN(60))
			}
		}
		if _, err := nft(b, batch, "-f", "-"); err != nil {
			t.Fatalf("step %d, %s: %v\n%s", i, what, err, batch)
		}
		got := refreshLive(t, b, &l)
		if got.Torn {
			t.Fatalf("step %d, %s: torn", i, what)
		}
		fresh := readLive(t, b)
		found = chain.NewView(got, node).Update(found)
		if diff := gocmp.Diff(services(t, fresh, node), told(t, found)); diff != "" {
			t.Fatalf("step %d, %s: the Services differ: (-read +refreshed)\n%s\n%s", i, what, diff, batch)
		}
		if diff := gocmp.Diff(normalRules(fresh), normalRules(got)); diff != "" {
			t.Fatalf("step %d, %s: (-read +refreshed)\n%s\n%s", i, what, diff, batch)
		}
		if i%50 == 0 {
			if diff := gocmp.Diff(normalRules(readListing(t, b)), normalRules(got)); diff != "" {
				// nft lists what Live does not ask for: the clients of a moment.
				t.Fatalf("step %d, %s: (-nft +refreshed)\n%s", i, what, diff)
			}
		}
		if again := refreshLive(t, b, &l); again != got {
			t.Fatalf("step %d, %s: nothing moved, but there is another ruleset", i, what)
		}
		if what == "nothing" || what == "another table" {
			if got != last {
				t.Fatalf("step %d, %s: there is another ruleset", i, what)
			}
		}
		sharesVersions(t, last, got, &counted)
		last = got
	}
	if counted == 0 {
		t.Error("no chain was shared with the ruleset before")
	}
}

// sharesVersions wants chains with equal texts to have one version, and those
// with one version to have equal texts.
func sharesVersions(t *testing.T, last, next *netfilter.Ruleset, shared *int) {
	t.Helper()
	text := func(t *netfilter.Table, c *netfilter.Chain) (out []string) {
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
				same := gocmp.Equal(text(now, c), text(was, o)) && gocmp.Equal(c.Base, o.Base)
				if same != (c.Version() == o.Version()) {
					t.Fatalf("chain %s: the same rules %t, the same version %t", c.Name, same, c.Version() == o.Version())
				}
				if same {
					*shared++
				}
			}
		}
	}
}

// TestLiveRefreshUnchanged wants an unchanged look to leave no garbage that grows
// with the table.
func TestLiveRefreshUnchanged(t *testing.T) {
	b := newNode(t)
	allocs := func(services int) float64 {
		load(t, b, layout37(services, 3, "a"))
		var l Live
		defer l.Close()
		refreshLive(t, b, &l)
		return testing.AllocsPerRun(20, func() { refreshLive(t, b, &l) })
	}
	few, many := allocs(10), allocs(1000)
	if many > few+2 {
		t.Errorf("%.0f allocations with 10 Services, %.0f with 1000", few, many)
	}
}

// TestLiveCounts follows the counters of a rule that somebody added.
func TestLiveCounts(t *testing.T) {
	b := newNode(t)
	load(t, b, table37("ip")+"add chain ip kube-proxy filter-output { type filter hook output priority 0 ; }\n"+
		"add rule ip kube-proxy filter-output jump services\nadd rule ip kube-proxy services ip daddr { 10.146.0.100, 10.146.0.101 } counter return\n")
	var l Live
	defer l.Close()
	last := refreshLive(t, b, &l)
	for n := uint64(1); n < 5; n++ {
		conn, err := b.Node.Dial(t.Context(), "udp", fmt.Sprintf("10.146.0.100:%d", 9000+n))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write([]byte("abc")); err != nil {
			t.Fatal(err)
		}
		conn.Close()
		rs := refreshLive(t, b, &l)
		c := rs.Table(netfilter.IPv4, kubeProxyTable).Lookup("services")
		if got, ok := c.Counter(c.Len() - 1); !ok || got.Packets != n || got.Bytes != 31*n {
			t.Errorf("after %d packets the rule counted %+v", n, got)
		}
		if rs == last || !rs.SameRules(last) {
			t.Errorf("the same ruleset %t, the same rules %t", rs == last, rs.SameRules(last))
		}
		last = rs
	}
}

// TestLiveVanish deletes what a dump has just told of: what is read afterwards
// must be torn or complete.
func TestLiveVanish(t *testing.T) {
	b := newNode(t)
	load(t, b, layout37(30, 3, "a"))
	err := b.Node.Do(func() error {
		conn, err := nfnetlink.Open()
		if err != nil {
			return err
		}
		defer conn.Close()
		s := liveStepper{ctx: t.Context(), conn: conn}
		lt := newLiveTable(netfilter.IPv4, 2)
		s.tables = []*liveTable{lt}
		lt.begin()
		if err := s.sets(conn.Second(), lt); err != nil {
			return err
		}
		if err := s.dump(conn, 7 /* NFT_MSG_GETRULE */, 2, nfnetlink.AppendString(nil, nftaRuleTable, kubeProxyTable), lt.addRule); err != nil {
			return err
		}
		lt.endRules()
		lt.declare()
		cmd := exec.Command("nft", "delete", "table", "ip", kubeProxyTable)
		if err := cmd.Run(); err != nil {
			return err
		}
		if err := s.anonymous(lt); err != nil {
			return err
		}
		lt.decodeRules()
		if !s.interrupted.Load() || !lt.changed {
			t.Error("sets that are gone did not interrupt the step")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestLiveRefreshWhileRulesChange rewrites Services as fast as it can. Each
// ruleset must be one of those that were written, or say that it is torn; memory
// must not grow; and the last is what Read tells. NATLENS_STRESS sets how long.
func TestLiveRefreshWhileRulesChange(t *testing.T) {
	lasts := 5 * time.Second
	if s := os.Getenv("NATLENS_STRESS"); s != "" {
		d, err := time.ParseDuration(s)
		if err != nil {
			t.Fatal(err)
		}
		lasts = d
	}
	b := newNode(t)
	const services, generations = 60, 7
	// All that generation k has is in 10.100+k.0.0/16, and its first Services are
	// not there.
	write := func(k int) string {
		var s strings.Builder
		for n := range services {
			chain := fmt.Sprintf("service-%08X-ns/svc%d/tcp/p80", n, n)
			fmt.Fprintf(&s, "add chain ip kube-proxy %[1]s\nflush chain ip kube-proxy %[1]s\nadd element ip kube-proxy service-ips { 172.30.0.%[2]d . tcp . 80 : goto %[1]s }\n", chain, n)
			if n < k {
				fmt.Fprintf(&s, "delete element ip kube-proxy service-ips { 172.30.0.%d . tcp . 80 }\ndelete chain ip kube-proxy %s\n", n, chain)
				continue
			}
			count := 2 + (n+k)%4
			var ways []string
			for i := range count {
				ways = append(ways, fmt.Sprintf("%d : 10.%d.%d.%d . 80", i, 100+k, n, i))
			}
			fmt.Fprintf(&s, "add rule ip kube-proxy %s meta l4proto tcp dnat ip addr . port to numgen random mod %d map { %s }\n", chain, count, strings.Join(ways, ", "))
		}
		return s.String()
	}
	text := func(rs *netfilter.Ruleset) string {
		tables := map[string][]string{}
		for name, lines := range normalRules(rs) {
			// Chains that were deleted stand elsewhere when they come again.
			var chains []string
			for _, line := range lines {
				if strings.Contains(line, "dnat") {
					chains = append(chains, line)
				}
			}
			slices.Sort(chains)
			tables[name] = chains
		}
		return fmt.Sprint(tables)
	}
	load(t, b, table37("ip"))
	want := map[string]int{}
	for k := range generations {
		if _, err := nft(b, write(k), "-f", "-"); err != nil {
			t.Fatal(err)
		}
		want[text(readLive(t, b))] = k
	}
	if len(want) != generations {
		t.Fatalf("%d generations are alike", generations-len(want)+1)
	}
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		for k := 0; ; k++ {
			if _, err := nft(b, write(k%generations), "-f", "-"); err != nil {
				done <- err
				return
			}
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
		}
	}()
	var l Live
	defer l.Close()
	seen := map[string]int{}
	var early, late uint64
	began := time.Now()
	for time.Since(began) < lasts {
		rs := refreshLive(t, b, &l)
		k, ok := want[text(rs)]
		switch {
		case ok:
			seen[fmt.Sprint(k)]++
		case rs.Torn:
			seen["torn"]++
		default:
			t.Fatalf("read %v: %d rules that were never written:\n%s", seen, rs.RuleCount(), text(rs))
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
	if diff := gocmp.Diff(normalRules(readLive(t, b)), normalRules(refreshLive(t, b, &l))); diff != "" {
		t.Errorf("at the end (-read +refreshed):\n%s", diff)
	}
}

func heapInUse() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// TestLiveRefreshCancelled wants a step that was not finished to leave nothing
// behind.
func TestLiveRefreshCancelled(t *testing.T) {
	b := newNode(t)
	load(t, b, layout37(20, 3, "a"))
	var l Live
	defer l.Close()
	refreshLive(t, b, &l)
	load(t, b, layout37(20, 2, "b"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.Node.Do(func() error { _, err := l.Refresh(ctx); return err }); err == nil {
		t.Error("no error")
	}
	if diff := gocmp.Diff(normalRules(readLive(t, b)), normalRules(refreshLive(t, b, &l))); diff != "" {
		t.Errorf("(-read +refreshed):\n%s", diff)
	}
}
