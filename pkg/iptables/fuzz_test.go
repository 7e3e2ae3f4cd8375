package iptables

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/natlens/natlens/pkg/netfilter"
)

// FuzzParse wants of any input: no panic; an error of type *SyntaxError, or
// rules which, printed, are read as the same rules again.
func FuzzParse(f *testing.F) {
	for _, text := range dumps(f) {
		f.Add([]byte(trimmed(text)))
	}
	for family, forms := range formsOf {
		for _, form := range forms {
			f.Add([]byte(form.dump(saveProgram(family))))
		}
	}
	for _, text := range []string{
		"-P INPUT ACCEPT -c 1 2\n-N F\n-A F -s 10.0.0.0/8 -c 3 4 -j DROP\n",
		"# Table `nat' is incompatible, use 'nft' tool.\n",
		"*nat\r\n:F - [0:0]\r\n[1:2] -A F -j RETURN\r\nCOMMIT\r\n",
		"*filter\n:F - [0:0]\n-A F -m comment --comment \"a \\\"b\\\" c\\\\\" -g F\nCOMMIT",
		within("-A F ! -j ACCEPT", `-A F -m string --string "-j" -j U`),
		// What this fuzzer found.
		within("-A F -m  --comment ! -j ACCEPT"),
		within("-A F -p tcp -m -j ACCEPT"),
		within("-A F -p 000 -j ACCEPT"),
		within(`-A F -i "a b" -j ACCEPT`),
		within(`-A F -j "U V"`),
		within("-A F -j \"-j\""),
		within("-A F -o eth0\u0085"),
		"*nat\n:F\u0085 - [0:0]\n-A F\u0085 -j ACCEPT\nCOMMIT\n",
		"-A F -m comment --comment \"x\" -j U\u2003\n",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		rs, err := Parse(bytes.NewReader(data), "fuzz")
		if err != nil {
			var se *SyntaxError
			if !errors.As(err, &se) {
				t.Fatalf("error of type %T: %v", err, err)
			}
			return
		}
		for _, u := range rs.Unreadable {
			if u.Reason == "" {
				t.Error("a table is unreadable for no reason")
			}
		}
		if len(rs.Tables) == 0 || declaredLate(rs) {
			return
		}
		for _, counters := range []bool{false, true} {
			once := printed(t, rs, counters)
			again, err := Parse(strings.NewReader(once), "printed")
			if err != nil {
				t.Fatalf("what is printed cannot be read: %v\n%s", err, once)
			}
			if twice := printed(t, again, counters); twice != once {
				t.Fatalf("parse, print, parse is not the identity (-first +second):\n%s", cmp.Diff(once, twice))
			}
			// Equal texts may still be understood differently.
			if len(rs.Tables) != len(again.Tables) {
				t.Fatalf("%d tables, then %d", len(rs.Tables), len(again.Tables))
			}
			for i, table := range rs.Tables {
				others := slices.Collect(again.Tables[i].Chains())
				for j, c := range slices.Collect(table.Chains()) {
					for k := range c.Len() {
						if a, b := brief(c, k), brief(others[j], k); a != b {
							t.Fatalf("%s means %s, then %s", RuleText(table, c, k), a, b)
						}
					}
				}
			}
		}
	})
}

// declaredLate reports whether a chain was declared behind a rule that took its
// name for a target. No program prints that; printed, the chain comes first.
func declaredLate(rs *netfilter.Ruleset) bool {
	for _, t := range rs.Tables {
		for c := range t.Chains() {
			for i := range c.Len() {
				text := RuleText(t, c, i)
				at := strings.LastIndex(text, " -j ")
				if rule := c.Rule(i); at < 0 || len(rule) == 0 || rule[len(rule)-1].IsMatch() || rule[len(rule)-1].Kind == netfilter.Jump {
					continue
				}
				name, _, _ := strings.Cut(text[at+len(" -j "):], " ")
				if t.Lookup(name) != nil {
					return true
				}
			}
		}
	}
	return false
}

// trimmed keeps one rule of each chain of a dump, and few of chains of the same
// kind: the fuzzer is faster with short seeds, and the rest only repeats them.
func trimmed(text string) string {
	const most = 1
	var out strings.Builder
	seen := map[string]int{}
	for line := range strings.Lines(text) {
		if _, rule, ok := strings.Cut(line, "-A "); ok {
			chain, _, _ := strings.Cut(rule, " ")
			kind := strings.TrimRight(chain, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567")
			if seen[chain]++; seen[chain] > most {
				continue
			}
			if seen[kind]++; seen[kind] > 3*most {
				continue
			}
		}
		out.WriteString(line)
	}
	return out.String()
}
