package doctor

import (
	"bytes"
	"cmp"
	"slices"
	"strings"

	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
	"github.com/natlens/natlens/pkg/nftables"
)

// Report is what two readers tell of the same rules.
type Report struct {
	Readers     []Reader     `json:"readers"`
	Tables      []Table      `json:"tables"`
	Differences []Difference `json:"differences"`
	// Undecoded are the kinds of matches and targets that are known by their
	// names only: what depends on them is unknown to every answer.
	Undecoded []Undecoded `json:"undecoded"`
	// Notes are what is worth knowing, though nothing is wrong.
	Notes []string `json:"notes"`
	// Problems are the reasons why no comparison could be made, or not of all.
	Problems []string `json:"problems"`
	Agree    bool     `json:"agree"`
}

// Reader is one way of reading, and how it went.
type Reader struct {
	Name    string  `json:"name"`
	Seconds float64 `json:"seconds"`
	Rules   int     `json:"rules"`
	Error   string  `json:"error,omitempty"`
}

// Table is a table that either reader found.
type Table struct {
	Family  string `json:"family"`
	Name    string `json:"name"`
	Backend string `json:"backend"`
	Chains  int    `json:"chains"`
	Rules   int    `json:"rules"`
	// Compared is what came of it: "same", "differs", or why it was not compared.
	Compared string `json:"compared"`
}

// Difference is a chain's first rule that one reader tells otherwise than the
// other: "" is no rule at all.
type Difference struct {
	Table  string `json:"table"`
	Family string `json:"family"`
	Chain  string `json:"chain"`
	Rule   int    `json:"rule"` // counted from 1; 0 for the chain itself
	Direct string `json:"direct"`
	Other  string `json:"other"`
}

// Undecoded is a kind of match or target that is known by its name only.
type Undecoded struct {
	Name    string `json:"name"`
	Count   int    `json:"count"`
	Example string `json:"example"` // one rule that has it
}

// The values of Table.Compared.
const (
	Same       = "same"
	Differs    = "differs"
	OnlyDirect = "only the direct reader tells it"
	OnlyOther  = "only the other reader tells it"
	// NotCompared is said of other programs' tables: of an expression that kube-proxy
	// does not use, each reader keeps a text of its own.
	NotCompared = "not compared: another program's own"
)

// Compare compares two rulesets rule by rule, and fills in the report. Counters
// go on while the rules are read, so they are not compared.
func (r *Report) Compare(direct, other *netfilter.Ruleset) {
	for _, t := range direct.Tables {
		row := tableOf(t)
		twin := find(other, t)
		switch {
		case isForeign(t):
			row.Compared = NotCompared
		case twin == nil && emptyTable(t):
			row.Compared = Same // iptables-nft-save prints no table without rules
		case twin == nil:
			row.Compared = OnlyDirect
		default:
			row.Compared = Same
			if diffs := compareTables(t, twin); len(diffs) > 0 {
				row.Compared = Differs
				r.Differences = append(r.Differences, diffs...)
			}
		}
		r.Tables = append(r.Tables, row)
		if row.Compared != NotCompared {
			r.undecoded(t)
		}
	}
	for _, t := range other.Tables {
		if find(direct, t) == nil && !emptyTable(t) && !isForeign(t) {
			row := tableOf(t)
			row.Compared = OnlyOther
			r.Tables = append(r.Tables, row)
		}
	}
	for name, rs := range map[string]*netfilter.Ruleset{"the direct reader": direct, "the other reader": other} {
		for _, u := range rs.Unreadable {
			r.Problems = append(r.Problems, name+" cannot read table "+u.Table+" of "+u.Family.String()+": "+u.Reason)
		}
	}
	slices.Sort(r.Problems)
	slices.SortFunc(r.Undecoded, func(a, b Undecoded) int { return cmp.Or(b.Count-a.Count, strings.Compare(a.Name, b.Name)) })
	r.Agree = len(r.Problems) == 0 && !slices.ContainsFunc(r.Tables, func(t Table) bool { return t.Compared != Same && t.Compared != NotCompared })
}

// isForeign reports whether a table is another program's own.
func isForeign(t *netfilter.Table) bool {
	return t.Backend == netfilter.BackendNFTables && t.Name != "kube-proxy"
}

func tableOf(t *netfilter.Table) Table {
	return Table{Family: t.Family.String(), Name: t.Name, Backend: string(t.Backend), Chains: t.ChainCount(), Rules: t.RuleCount()}
}

func find(rs *netfilter.Ruleset, t *netfilter.Table) *netfilter.Table {
	if i := slices.IndexFunc(rs.Tables, t.Same); i >= 0 {
		return rs.Tables[i]
	}
	return nil
}

// emptyTable reports whether a table has neither rules nor chains of its own,
// nor a policy that does anything.
func emptyTable(t *netfilter.Table) bool {
	for c := range t.Chains() {
		if c.Len() > 0 || c.Base == nil || c.Base.Policy != netfilter.Accept {
			return false
		}
	}
	return true
}

// compareTables returns the first difference of each chain.
func compareTables(direct, other *netfilter.Table) []Difference {
	var out []Difference
	differ := func(c *netfilter.Chain, i int, a, b string) {
		out = append(out, Difference{Table: direct.Name, Family: direct.Family.String(), Chain: c.Name, Rule: i, Direct: a, Other: b})
	}
	for c := range direct.Chains() {
		twin := other.Lookup(c.Name)
		switch {
		case twin == nil && (c.Base == nil || c.Len() > 0):
			differ(c, 0, "chain "+c.Name, "")
			continue
		case twin == nil:
			continue
		case policy(c) != policy(twin):
			differ(c, 0, policy(c), policy(twin))
			continue
		}
		for i := range max(c.Len(), twin.Len()) {
			if a, b := ruleText(direct, c, i), ruleText(other, twin, i); a != b {
				differ(c, i+1, a, b)
				break
			}
		}
	}
	for c := range other.Chains() {
		if direct.Lookup(c.Name) == nil && (c.Base == nil || c.Len() > 0) {
			differ(c, 0, "", "chain "+c.Name)
		}
	}
	return out
}

func policy(c *netfilter.Chain) string {
	switch {
	case c.Base == nil:
		return ""
	case c.Base.Policy == netfilter.Drop:
		return "policy DROP"
	}
	return "policy ACCEPT"
}

// ruleText is a rule in the language of its backend, "" behind the last.
func ruleText(t *netfilter.Table, c *netfilter.Chain, i int) string {
	switch {
	case i >= c.Len():
		return ""
	case t.Backend == netfilter.BackendNFTables:
		return nftables.RuleText(t, c, i)
	}
	return iptables.RuleText(t, c, i)
}

// undecoded notes the matches and targets of a table that are known by name only.
func (r *Report) undecoded(t *netfilter.Table) {
	for c := range t.Chains() {
		for i := range c.Len() {
			for _, e := range c.Rule(i) {
				if e.Kind != netfilter.Unknown && e.Kind != netfilter.UnknownTarget {
					continue
				}
				name := nameOf(c.Text(e))
				at := slices.IndexFunc(r.Undecoded, func(u Undecoded) bool { return u.Name == name })
				if at < 0 {
					at = len(r.Undecoded)
					r.Undecoded = append(r.Undecoded, Undecoded{Name: name, Example: ruleText(t, c, i)})
				}
				r.Undecoded[at].Count++
			}
		}
	}
}

// nameOf is the name in the text of an unknown match or target: -m NAME …, -j
// NAME …, or the text as it is.
func nameOf(text []byte) string {
	words := bytes.Fields(text)
	for i, w := range words {
		if (string(w) == "-m" || string(w) == "-j") && i+1 < len(words) {
			return string(w) + " " + string(words[i+1])
		}
	}
	return string(text)
}
