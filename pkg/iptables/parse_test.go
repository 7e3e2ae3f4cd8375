package iptables

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/natlens/natlens/pkg/netfilter"
)

// dumps returns every recorded iptables-save output: the captures of real
// kube-proxies, and the rules of kube-proxy's own flow tests.
func dumps(t testing.TB) map[string]string {
	t.Helper()
	out := map[string]string{}
	files, _ := filepath.Glob("../../testdata/captures/*.save*")
	if len(files) == 0 {
		t.Fatal("no captures found")
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		out[filepath.Base(f)] = string(b)
	}
	b, err := os.ReadFile("../../testdata/flows/flow-iptables-v1.35.4.json")
	if err != nil {
		t.Fatal(err)
	}
	var flows []struct{ Test, Rules string }
	if err := json.Unmarshal(b, &flows); err != nil {
		t.Fatal(err)
	}
	for _, f := range flows {
		out["flow "+f.Test] = f.Rules
	}
	return out
}

func mustParse(t testing.TB, text string) *netfilter.Ruleset {
	t.Helper()
	rs, err := Parse(strings.NewReader(text), "test")
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

func printed(t testing.TB, rs *netfilter.Ruleset, counters bool) string {
	t.Helper()
	var b bytes.Buffer
	if err := Write(&b, rs, counters); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// withoutRemarks drops what iptables-save says about itself, with its dates.
func withoutRemarks(text string) string {
	var out []string
	for _, l := range strings.Split(text, "\n") {
		if l != "" && l[0] != '#' {
			out = append(out, strings.TrimRight(l, " "))
		}
	}
	return strings.Join(out, "\n")
}

// Every recorded dump must come back letter by letter: whatever the parser
// lost or misread would show.
func TestPrintIsWhatIptablesSavePrinted(t *testing.T) {
	for name, text := range dumps(t) {
		t.Run(name, func(t *testing.T) {
			got := printed(t, mustParse(t, text), true)
			if diff := cmp.Diff(withoutRemarks(text), withoutRemarks(got)); diff != "" {
				t.Errorf("printed differs from the dump (-dump +printed):\n%s", diff)
			}
			if again := printed(t, mustParse(t, got), true); again != got {
				t.Errorf("parse, print, parse is not the identity (-first +second):\n%s", cmp.Diff(got, again))
			}
		})
	}
}
