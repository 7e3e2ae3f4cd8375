package netfilter

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"
)

// draft fills a draft of a chain with rules that send to these addresses.
func draft(t *testing.T, table *Table, c *Chain, name string, packets uint64, to ...string) {
	t.Helper()
	table.Draft(c, name)
	for _, text := range to {
		c.AddText(Comment, 0, 0, []byte("to "+text))
		if err := c.AddDNAT(netip.MustParseAddrPort(text)); err != nil {
			t.Fatal(err)
		}
		c.End(&Counter{Packets: packets})
	}
}

func TestRevise(t *testing.T) {
	var c Chain
	last := NewTable(IPv4, "nat", BackendNFT)
	for _, name := range []string{"A", "B", "C"} {
		draft(t, last, &c, name, 1, "10.0.0.1:80", "10.0.0.2:80")
		if !last.Adopt(&c) {
			t.Errorf("%s was not there, but is no change", name)
		}
	}
	before := last.Digest()
	a, b, gone := last.Lookup("A"), last.Lookup("B"), last.Lookup("C")

	next := last.Revise()
	draft(t, next, &c, "A", 1, "10.0.0.1:80", "10.0.0.2:80")
	if next.Adopt(&c) || next.Lookup("A") != a {
		t.Error("a chain that is as before was replaced")
	}
	draft(t, next, &c, "B", 7, "10.0.0.1:80", "10.0.0.2:80")
	if next.Adopt(&c) {
		t.Error("a chain that only counted has changed")
	}
	if n, _ := next.Lookup("B").Counter(1); n.Packets != 7 || next.Lookup("B").Version() != b.Version() {
		t.Errorf("counted %d in version %d, want 7 in %d", n.Packets, next.Lookup("B").Version(), b.Version())
	}
	if !(&Ruleset{Tables: []*Table{next}}).SameRules(&Ruleset{Tables: []*Table{last}}) {
		t.Error("other counters make other rules")
	}
	next.Remove(gone.ID)
	draft(t, next, &c, "D", 1, "10.0.0.4:80")
	if !next.Adopt(&c) {
		t.Error("a new chain is no change")
	}
	draft(t, next, &c, "A", 1, "10.0.0.1:80", "10.0.0.3:80")
	if !next.Adopt(&c) || next.Lookup("A").Version() == a.Version() {
		t.Error("other rules are no change")
	}
	if (&Ruleset{Tables: []*Table{next}}).SameRules(&Ruleset{Tables: []*Table{last}}) {
		t.Error("other rules are the same")
	}
	if got := fmt.Sprint(names(next), next.RuleCount()); got != "[A B D] 5" {
		t.Errorf("next has %s, want [A B D] 5", got)
	}
	if id := next.IDOf([]byte("C")); id != gone.ID || next.ByID(id) != nil {
		t.Error("the name of a removed chain lost its number, or still has a chain")
	}

	if got := fmt.Sprint(names(last), last.RuleCount()); got != "[A B C] 6" || last.Digest() != before || last.Lookup("D") != nil {
		t.Errorf("the published table became %s", got)
	}
	if n, _ := last.Lookup("B").Counter(1); n.Packets != 1 {
		t.Errorf("a counter of the published table became %d", n.Packets)
	}
}

// TestPart has two goroutines adopt chains of one table.
func TestPart(t *testing.T) {
	first := NewTable(IPv4, "nat", BackendLegacy)
	var chains [][]byte
	for i := range 100 {
		chains = append(chains, fmt.Appendf(nil, "KUBE-%02d", i))
	}
	if twice := first.NameAll(chains)(); twice >= 0 {
		t.Fatalf("name %d is there twice", twice)
	}
	fill := func(table *Table, packets uint64, odd string) {
		var wg sync.WaitGroup
		parts := []*Part{table.Part(), table.Part()}
		for i, part := range parts {
			wg.Go(func() {
				var c Chain
				for k := i; k < len(chains); k += len(parts) {
					to := "10.0.0.1:80"
					if k == 7 {
						to = odd
					}
					draft(t, table, &c, string(chains[k]), packets, to)
					part.Adopt(&c)
				}
			})
		}
		wg.Wait()
		for _, part := range parts {
			part.Join()
		}
	}
	fill(first, 1, "10.0.0.7:80")
	if got := fmt.Sprint(len(names(first)), first.RuleCount()); got != "100 100" {
		t.Errorf("chains and rules: %s, want 100 of each", got)
	}
	same := first.Revise()
	fill(same, 1, "10.0.0.7:80")
	if same.Touched() {
		t.Error("the same rules and counters are others")
	}
	next := first.Revise()
	fill(next, 2, "10.0.0.8:80")
	for c := range first.Chains() {
		now := next.ByID(c.ID)
		if n, _ := now.Counter(0); n.Packets != 2 {
			t.Errorf("%s counted %d, want 2", c.Name, n.Packets)
		}
		if want := c.Name != "KUBE-07"; (now.Version() == c.Version()) != want {
			t.Errorf("%s, the chain %d: the same rules are %v, want %v", c.Name, c.ID, !want, want)
		}
	}
}

// TestNameAll finds a name that is there twice.
func TestNameAll(t *testing.T) {
	table := NewTable(IPv4, "nat", BackendLegacy)
	if twice := table.NameAll([][]byte{[]byte("A"), []byte("B"), []byte("A"), []byte("C")})(); twice != 2 {
		t.Errorf("it is that with number %d, want 2", twice)
	}
}

// TestReviseBase replaces what a base chain's policy counted, and its policy.
func TestReviseBase(t *testing.T) {
	var c Chain
	table := NewTable(IPv4, "filter", BackendNFT)
	input := func(policy Kind, packets uint64) bool {
		table = table.Revise()
		table.Draft(&c, "INPUT")
		c.Base = &Base{Hook: Input, Policy: policy, Counter: Counter{Packets: packets}}
		return table.Adopt(&c)
	}
	if !input(Accept, 1) || input(Accept, 2) || !input(Drop, 2) {
		t.Error("a new chain and a new policy are changes, what a policy counted is none")
	}
	if got := table.Lookup("INPUT").Base; got.Policy != Drop || got.Counter.Packets != 2 {
		t.Errorf("the chain's policy is %+v", got)
	}
}

// TestRecount replaces counters alone.
func TestRecount(t *testing.T) {
	var c Chain
	last := NewTable(IPv4, "nat", BackendLegacy)
	draft(t, last, &c, "A", 1, "10.0.0.1:80", "10.0.0.2:80")
	last.Adopt(&c)
	last.Draft(&c, "INPUT")
	c.Base = &Base{Hook: Input}
	last.Adopt(&c)
	a, input := last.Lookup("A"), last.Lookup("INPUT")

	next := last.Revise()
	next.Recount(a.ID, []Counter{{Packets: 1}, {Packets: 1}}, Counter{})
	next.Recount(input.ID, nil, Counter{})
	if next.Touched() {
		t.Error("the same counters are others")
	}
	counts := []Counter{{Packets: 1}, {Packets: 2}}
	next.Recount(a.ID, counts, Counter{})
	next.Recount(input.ID, nil, Counter{Packets: 3})
	counts[1].Packets = 9 // stays the caller's
	if n, _ := next.Lookup("A").Counter(1); n.Packets != 2 || next.Lookup("A").Version() != a.Version() || next.Lookup("INPUT").Base.Counter.Packets != 3 {
		t.Errorf("counted %v, %v in versions %d, %d", n, next.Lookup("INPUT").Base.Counter, a.Version(), next.Lookup("A").Version())
	}
	if n, _ := last.Lookup("A").Counter(1); n.Packets != 1 || last.Lookup("INPUT").Base.Counter.Packets != 0 {
		t.Error("the published counters have changed")
	}
}

// TestReviseSets removes a set, and puts chains in another order.
func TestReviseSets(t *testing.T) {
	last := NewTable(IPv4, "kube-proxy", BackendNFTables)
	a, b := last.Declare("A"), last.Declare("B")
	n := last.AddSet(&Set{Name: "s", Map: true})
	next := last.Revise()
	next.Arrange([]ChainID{a.ID, b.ID})
	if next.Touched() {
		t.Error("the same order is another")
	}
	next.Arrange([]ChainID{b.ID, a.ID})
	next.RemoveSet(n)
	if got := fmt.Sprintf("%v %q %t", names(next), next.Set(n).Name, next.AddSet(&Set{}) != n); got != `[B A] "" true` {
		t.Errorf("next has %s", got)
	}
	if got := fmt.Sprintf("%v %q %d", names(last), last.Set(n).Name, len(last.Sets())); got != `[A B] "s" 1` {
		t.Errorf("the published table became %s", got)
	}
	if id, ok := next.Find([]byte("B")); !ok || id != b.ID {
		t.Error("B is not found")
	}
	if _, ok := next.Find([]byte("C")); ok || next.NameCount() != 2 {
		t.Error("looking for C found it, or gave it a number")
	}
	for range 30_000 {
		next.RemoveSet(next.AddSet(&Set{}))
	}
	if !next.Worn() {
		t.Error("never worn")
	}
}

// TestReviseWhileRead looks names up in published tables while later ones get
// new names, many times over; the race detector judges.
func TestReviseWhileRead(t *testing.T) {
	var c Chain
	var readers sync.WaitGroup
	table := NewTable(IPv4, "nat", BackendNFT)
	for round := range 300 {
		table = table.Revise()
		for i := range 3 {
			draft(t, table, &c, fmt.Sprintf("CHAIN-%d", round*3+i), 1, "10.0.0.1:80")
			table.Adopt(&c)
		}
		published := table
		readers.Add(1)
		go func() {
			defer readers.Done()
			for i := range 3 * (round + 1) {
				name := fmt.Sprintf("CHAIN-%d", i)
				if got := published.Lookup(name); got == nil || got.Name != name || published.ChainName(got.ID) != name {
					t.Errorf("round %d: %s is %v", round, name, got)
				}
			}
			if published.Lookup(fmt.Sprintf("CHAIN-%d", 3*(round+1))) != nil {
				t.Errorf("round %d: holds a chain of the next", round)
			}
		}()
	}
	readers.Wait()
}

// TestWorn replaces chains over and over: the table asks to be read anew before
// what it no longer uses is many times what it does.
func TestWorn(t *testing.T) {
	var c Chain
	table := NewTable(IPv4, "nat", BackendNFT)
	for round := range 100_000 {
		table = table.Revise()
		draft(t, table, &c, "A", 1, fmt.Sprintf("10.0.%d.%d:80", round>>8&0xff, round&0xff))
		table.Adopt(&c)
		if table.Worn() {
			if round < 5_000 || round > 20_000 {
				t.Errorf("worn after %d rounds", round)
			}
			return
		}
	}
	t.Error("never worn")
}

func names(t *Table) []string {
	var out []string
	for c := range t.Chains() {
		out = append(out, c.Name)
	}
	return out
}
