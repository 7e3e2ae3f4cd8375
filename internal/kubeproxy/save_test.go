package kubeproxy

import (
	"bufio"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// tables is a rule file with the lines of each table, without counters and
// without comment lines (iptables-save writes the date into those).
type tables map[string][]string

var counters = regexp.MustCompile(`^\[\d+:\d+\] | \[\d+:\d+\]$`)

// parse splits a rule file by table. It changes no line beyond its counters.
func parse(t *testing.T, file string) tables {
	t.Helper()
	out, table := tables{}, ""
	sc := bufio.NewScanner(strings.NewReader(file))
	for sc.Scan() {
		line := sc.Text()
		switch {
		case line == "" || strings.HasPrefix(line, "#"):
		case strings.HasPrefix(line, "*"):
			table = line[1:]
			if _, ok := out[table]; ok {
				t.Fatalf("table %s twice", table)
			}
			out[table] = []string{}
		case line == "COMMIT":
			table = ""
		case table == "":
			t.Fatalf("line outside of a table: %s", line)
		default:
			out[table] = append(out[table], counters.ReplaceAllString(line, ""))
		}
	}
	if err := sc.Err(); err != nil {
		t.Fatal(err)
	}
	if table != "" {
		t.Fatalf("table %s has no COMMIT", table)
	}
	return out
}

// chain returns the rules of a chain, without "-A" and its name.
func (ts tables) chain(table, name string) []string {
	out := []string{}
	for _, line := range ts[table] {
		if rule, ok := strings.CutPrefix(line, "-A "+name+" "); ok {
			out = append(out, rule)
		}
	}
	return out
}

// sorted sorts the rules within the chains that kube-proxy fills in the order
// of a Go map, each run of a node giving another order. The node port jump,
// which must stay last, is left in its place.
func (ts tables) sorted() tables {
	unordered := map[string][]string{
		"filter": {"KUBE-EXTERNAL-SERVICES", "KUBE-NODEPORTS", "KUBE-PROXY-FIREWALL", "KUBE-SERVICES"},
		"nat":    {"KUBE-NODEPORTS", "KUBE-SERVICES"},
	}
	for table, chains := range unordered {
		for _, chain := range chains {
			of := func(line string) bool {
				return strings.HasPrefix(line, "-A "+chain+" ") && !strings.Contains(line, nodePorts)
			}
			lines := ts[table]
			from := slices.IndexFunc(lines, of)
			if from < 0 {
				continue
			}
			to := from
			for to < len(lines) && of(lines[to]) {
				to++
			}
			slices.Sort(lines[from:to])
		}
	}
	return ts
}

// write returns what Write writes.
func write(t testing.TB, cfg Config, services ...Service) string {
	t.Helper()
	var b strings.Builder
	if err := Write(&b, cfg, services); err != nil {
		t.Fatal(err)
	}
	return b.String()
}
