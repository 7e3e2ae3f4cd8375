package chain

import (
	"encoding/json"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
	"github.com/natlens/natlens/pkg/nftables"
)

// FuzzMutated looks at kube-proxy's rules after somebody has been at them: lines
// gone, doubled, in another order, with parts of others, and with what nobody
// knows. Whatever they are, all can be worked out, and alike with and without the
// walks' shortcuts.
func FuzzMutated(f *testing.F) {
	var saves []string
	var lists [][]map[string]any // of nft's objects
	for _, c := range captures(f, "*.save") {
		saves = append(saves, c.text)
	}
	for _, c := range captures(f, "*.json") {
		var list struct{ NFTables []map[string]any }
		if err := json.Unmarshal([]byte(c.text), &list); err != nil {
			f.Fatal(c.name, err)
		}
		lists = append(lists, list.NFTables)
	}
	for seed := range uint64(40) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		r := rand.New(rand.NewPCG(seed, 1))
		rs, err := iptables.Parse(strings.NewReader(mutated(r, saves[r.IntN(len(saves))])), "mutated")
		if err == nil {
			check(t, rs)
		}
		text, err := json.Marshal(map[string]any{"nftables": mutatedObjects(r, lists[r.IntN(len(lists))])})
		if err != nil {
			t.Fatal(err)
		}
		if rs, err = nftables.Parse(strings.NewReader(string(text)), "mutated"); err == nil {
			check(t, rs)
		}
	})
}

func check(t *testing.T, rs *netfilter.Ruleset) {
	t.Helper()
	v := NewView(rs, Node{})
	v.Services()
	if len(v.discover().entries) > 0 {
		shortcuts(t, rs)
	}
}

// mutatedObjects returns a list of nft's objects, some of which are gone, doubled,
// in another order, or have an expression less or of another rule.
func mutatedObjects(r *rand.Rand, list []map[string]any) []map[string]any {
	list = slices.Clone(list)
	rule := func() (n int, expressions []any) {
		for {
			n = r.IntN(len(list))
			object, ok := list[n]["rule"].(map[string]any)
			if expressions, _ = object["expr"].([]any); ok && len(expressions) > 0 {
				return n, expressions
			}
		}
	}
	for range 1 + r.IntN(30) {
		i, k := r.IntN(len(list)), r.IntN(len(list))
		n, expressions := rule()
		_, others := rule()
		at, other := r.IntN(len(expressions)), others[r.IntN(len(others))]
		change := func(e []any) {
			object := maps.Clone(list[n]["rule"].(map[string]any))
			object["expr"] = e
			list[n] = map[string]any{"rule": object}
		}
		switch r.IntN(6) {
		case 0:
			list = slices.Delete(list, i, i+1)
		case 1:
			list = append(list, list[i])
		case 2:
			list[i], list[k] = list[k], list[i]
		case 3:
			change(slices.Delete(slices.Clone(expressions), at, at+1))
		case 4:
			change(slices.Insert(slices.Clone(expressions), at, other))
		case 5:
			e := slices.Clone(expressions)
			e[at] = other
			change(e)
		}
	}
	return list
}

// mutated returns a dump with some lines of others.
func mutated(r *rand.Rand, dump string) string {
	strange := []string{"-j WHATEVER --to somewhere", "-j FULLCONENAT", "-m whatever --it is", "-m set --match-set x dst", "-j RETURN", "-j ACCEPT", "-g KUBE-SEP-X", "! -s 10.0.0.0/8", "-s 10.180.0.0/16",
		"-m statistic --mode random --probability 0.5", "-m recent --name x --rcheck --seconds 9", "-j KUBE-SERVICES", "-j REDIRECT --to-ports 99", "-j NETMAP --to 10.0.0.0/8", "-m mark --mark 0x4000/0x4000", "-d 10.0.0.0/8", "-p udp"}
	lines := strings.Split(dump, "\n")
	rules := func() int { // the number of a line with a rule
		for {
			if i := r.IntN(len(lines)); strings.Contains(lines[i], "-A ") {
				return i
			}
		}
	}
	target := func(line string) (before, target string) {
		at := max(strings.LastIndex(line, " -j "), strings.LastIndex(line, " -g "), 0)
		return line[:at], line[at:]
	}
	for range 1 + r.IntN(30) {
		i, k := rules(), rules()
		match, to := target(lines[i])
		otherMatch, otherTo := target(lines[k])
		switch r.IntN(8) {
		case 0:
			lines[i] = ""
		case 1:
			lines[i] += "\n" + lines[i]
		case 2:
			lines[i], lines[k] = lines[k], lines[i]
		case 3:
			lines[i] = match + otherTo
		case 4:
			lines[i] = match // it only counts
		case 5:
			lines[i] = match + " " + strange[r.IntN(len(strange))] + to
		case 6:
			lines[i] = match + " -m comment --comment \"" + strings.Repeat("long ", r.IntN(40)) + "\" " + strange[r.IntN(len(strange))]
		case 7: // the matches of one chain's rule in another's
			if _, rest, ok := strings.Cut(otherMatch, "-A "); ok {
				_, rest, _ = strings.Cut(rest, " ")
				head, own, _ := strings.Cut(match, "-A ")
				chain, _, _ := strings.Cut(own, " ")
				lines[i] = head + "-A " + chain + " " + rest + to
			}
		}
	}
	return strings.Join(lines, "\n")
}
