package chain

import (
	"cmp"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
	"github.com/natlens/natlens/pkg/nftables"
)

// foreign are filter rules that ask all kinds of things of what nat has sent on.
const foreign = `
-A FORWARD -d 10.0.0.0/9 -p tcp -m tcp --dport 8080:8090 -j FOREIGN
-A FORWARD -d 10.52.0.6/32 -j DROP
-A FORWARD -m statistic --mode random --probability 0.25000000000 -j RETURN
-A FORWARD -o eth9 -m conntrack --ctstate NEW -j FOREIGN
-A FORWARD -m mark --mark 0x4000/0x4000 -j FOREIGN
-A FORWARD -p tcp -m multiport --dports 80,9376 -j FOREIGN
-A FORWARD -m set --match-set nobody dst -j DROP
-A FORWARD -m addrtype --dst-type LOCAL -j DROP
-A FORWARD -m iprange --dst-range 10.52.0.1-10.52.0.9 -j REJECT
-A FOREIGN -s 10.52.0.0/16 -j ACCEPT
-A FOREIGN -d 10.52.0.4/31 -j MARK --set-xmark 0x1/0x1
-A FOREIGN -m mark --mark 0x1/0x1 -j DROP
`

// Walks that take known exits must come to what walks to the end do.
func TestExits(t *testing.T) {
	tested, remembered := 0, 0
	for _, c := range slices.Concat(captures(t, "*.save"), captures(t, "*.json")) {
		dumps := map[string]string{c.name: c.text}
		if strings.HasSuffix(c.name, ".save") {
			// Each rule alone, and all of them.
			rules := strings.Split(strings.TrimSpace(foreign), "\n")
			for i, rule := range rules {
				dumps[fmt.Sprintf("%s with %d", c.name, i)] = ahead(c.text, rule)
			}
			dumps[c.name+" with all"] = ahead(c.text, strings.Join(rules, "\n"))
		}
		for name, text := range dumps {
			t.Run(name, func(t *testing.T) {
				read := iptables.Parse
				if strings.HasSuffix(c.name, ".json") {
					read = nftables.Parse
				}
				rs, err := read(strings.NewReader(text), name)
				if err != nil {
					t.Fatal(err)
				}
				known, _ := shortcuts(t, rs)
				for _, list := range known.run.exits {
					remembered += len(list)
				}
			})
			tested++
		}
	}
	if tested < 20 || remembered < tested {
		t.Errorf("%d exits in %d rulesets", remembered, tested)
	}
}

// capture is a recorded dump of kube-proxy's rules.
type capture struct{ name, text string }

// captures returns those whose file names match, by name.
func captures(t testing.TB, pattern string) []capture {
	t.Helper()
	files, err := filepath.Glob("../../testdata/captures/" + pattern)
	if err != nil || len(files) == 0 {
		t.Fatal(pattern, files, err)
	}
	var out []capture
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, capture{filepath.Base(file), string(text)})
	}
	return out
}

// ahead puts rules ahead of those of table filter.
func ahead(text, rules string) string {
	at := strings.Index(text, "*filter\n")
	at += strings.Index(text[at:], "\n[") + 1 // the first rule, with its counters
	return text[:at] + ":FOREIGN - [0:0]\n" + rules + "\n" + text[at:]
}

// shortcuts resolves all frontends three times: as Services does, without
// remembering exits, and without leaves, too.
func shortcuts(t *testing.T, rs *netfilter.Ruleset) (known, whole *resolver) {
	t.Helper()
	view := func() *View { return NewView(rs, Node{Local: []netip.Addr{netip.MustParseAddr("10.146.0.2")}}) }
	v, bare := view(), view()
	for _, fv := range bare.family {
		if fv != nil {
			for _, tv := range fv.tables {
				clear(tv.leaves)
			}
		}
	}
	known = &resolver{view: v, run: run{splits: splits{}, exits: exits{}, tracks: v.newTracks()}}
	whole = &resolver{view: v, run: run{splits: splits{}, tracks: v.newTracks()}}
	plain := &resolver{view: bare, run: run{splits: splits{}, tracks: bare.newTracks()}}
	a, b, c := v.discover().entries, v.discover().entries, bare.discover().entries
	if len(a) == 0 {
		t.Fatal("no frontends")
	}
	for i := range a {
		known.resolve(a[i])
		whole.resolve(b[i])
		plain.resolve(c[i])
		want := result(c[i])
		for name, e := range map[string]*entry{"exits": a[i], "leaves": b[i]} {
			if got := result(e); got != want {
				t.Fatalf("%v by known %s:\n%s\nrule by rule:\n%s", e.front, name, got, want)
			}
			if !reflect.DeepEqual(e.facts, c[i].facts) {
				t.Fatalf("%v by known %s: %+v\nrule by rule: %+v", e.front, name, e.facts, c[i].facts)
			}
		}
	}
	return known, whole
}

// result tells all of an entry that a walk makes, but for facts.
func result(e *entry) string {
	var b strings.Builder
	for _, r := range e.routes {
		fmt.Fprintln(&b, r.From, r.Sources, r.Verdict, r.Masquerade, r.Undelivered.parts(), r.Rejected.parts(), r.Dropped.parts(), len(r.Unknown))
		for _, ref := range r.Unknown {
			fmt.Fprintln(&b, " unknown", ref.Chain.Name, ref.Index)
		}
		for _, ep := range r.Endpoints {
			fmt.Fprintln(&b, " ", ep.Address, ep.Share.parts(), ep.Share.Exact(), ep.Max.parts(), r.MasqueradesTo(ep), ep.Chain)
		}
	}
	chains := slices.SortedFunc(slices.Values(e.trail.chains), func(a, b chainAt) int {
		return cmp.Or(cmp.Compare(a.table, b.table), cmp.Compare(a.chain, b.chain))
	})
	var rest []string
	for _, d := range e.trail.dests {
		rest = append(rest, fmt.Sprint(d))
	}
	for _, l := range e.trail.lookups {
		rest = append(rest, fmt.Sprint(l))
	}
	slices.Sort(rest)
	fmt.Fprintln(&b, chains, rest, e.affinity)
	return b.String()
}
