package chain

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/natlens/natlens/pkg/iptables"
)

// FuzzMutated looks at kube-proxy's rules after somebody has been at them: lines
// gone, doubled, in another order, with parts of others, and with what nobody
// knows. Whatever they are, all can be worked out, and alike with and without the
// walks' shortcuts.
func FuzzMutated(f *testing.F) {
	files, err := filepath.Glob("../../testdata/captures/*.save")
	if err != nil || len(files) == 0 {
		f.Fatal(files, err)
	}
	var dumps []string
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		dumps = append(dumps, string(text))
	}
	for seed := range uint64(40) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		text := mutated(rand.New(rand.NewPCG(seed, 1)), dumps[seed%uint64(len(dumps))])
		rs, err := iptables.Parse(strings.NewReader(text), "mutated")
		if err != nil {
			return
		}
		v := NewView(rs, Node{})
		v.Services()
		if len(v.discover().entries) > 0 {
			shortcuts(t, rs)
		}
	})
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
