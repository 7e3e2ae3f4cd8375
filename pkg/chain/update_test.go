package chain_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
	"github.com/natlens/natlens/pkg/nftables"
)

// edit says what becomes of a rule, or of a key of a set, on its way to the next
// ruleset: how many times it is there.
type edit func(chain string, i int) int

func unedited(string, int) int { return 1 }

// revise puts rules into the next ruleset of a line, as a reader does.
func revise(t testing.TB, last, rules *netfilter.Ruleset, count edit) *netfilter.Ruleset {
	t.Helper()
	out := &netfilter.Ruleset{}
	for _, from := range rules.Tables {
		to := netfilter.NewTable(from.Family, from.Name, from.Backend)
		if i := slices.IndexFunc(last.Tables, from.Same); i >= 0 {
			to = last.Tables[i].Revise()
		}
		reviseTable(t, to, from, count)
		if i := slices.IndexFunc(last.Tables, from.Same); i >= 0 && !to.Touched() {
			to = last.Tables[i]
		}
		out.Tables = append(out.Tables, to)
	}
	return out
}

func reviseTable(t testing.TB, to, from *netfilter.Table, count edit) {
	sets := map[uint32]uint32{}
	for n, s := range from.Sets() {
		c := &netfilter.Set{Name: s.Name, Map: s.Map, Dynamic: s.Dynamic, Timeout: s.Timeout, Opaque: s.Opaque, Ranges: s.Ranges}
		for i, k := range s.Keys {
			if count(s.Name, i) > 0 {
				e, _ := s.Lookup(k)
				c.Add(k, netfilter.SetElement{Verdict: moved(to, from, e.Verdict, nil), Comment: e.Comment})
			}
		}
		at := slices.IndexFunc(to.Sets(), func(o *netfilter.Set) bool { return o.Name == s.Name && s.Name != "" || s.Name == "" && o.Equal(c) })
		switch {
		case at < 0:
			sets[uint32(n)] = to.AddSet(c)
		case !to.Sets()[at].Equal(c):
			to.ReplaceSet(uint32(at), c)
			sets[uint32(n)] = uint32(at)
		default:
			sets[uint32(n)] = uint32(at)
		}
	}
	var draft netfilter.Chain
	there := map[netfilter.ChainID]bool{}
	for c := range from.Chains() {
		to.Draft(&draft, c.Name)
		there[draft.ID] = true
		draft.Base = c.Base
		for i := range c.Len() {
			for range count(c.Name, i) {
				for _, e := range c.Rule(i) {
					add(t, &draft, to, from, c, e, sets)
				}
				n, ok := c.Counter(i)
				if !ok {
					draft.End(nil)
					continue
				}
				draft.End(&n)
			}
		}
		to.Adopt(&draft)
	}
	var gone []netfilter.ChainID
	for c := range to.Chains() {
		if !there[c.ID] {
			gone = append(gone, c.ID)
		}
	}
	to.Remove(gone...)
}

// moved is an expression of one table in another.
func moved(to, from *netfilter.Table, e netfilter.Expr, sets map[uint32]uint32) netfilter.Expr {
	switch e.Kind {
	case netfilter.Jump, netfilter.Goto:
		e.A = uint32(to.ID(from.ChainName(netfilter.ChainID(e.A))))
	case netfilter.InSet, netfilter.VerdictMap:
		e.A = sets[e.A]
	}
	return e
}

func add(t testing.TB, draft *netfilter.Chain, to, from *netfilter.Table, c *netfilter.Chain, e netfilter.Expr, sets map[uint32]uint32) {
	t.Helper()
	switch e.Kind {
	case netfilter.Source, netfilter.Destination:
		a, mask := c.Prefix(e)
		if err := draft.AddPrefix(e.Kind, e.Flags, a, mask); err != nil {
			t.Fatal(err)
		}
	case netfilter.DNAT:
		if err := draft.AddDNAT(c.Target(e)); err != nil {
			t.Fatal(err)
		}
	case netfilter.Choose:
		var choices []netfilter.Choice
		for _, choice := range c.Choices(e) {
			if choice.Verdict.Kind == netfilter.DNAT {
				v, err := draft.DNATTo(c.Target(choice.Verdict))
				if err != nil {
					t.Fatal(err)
				}
				choices = append(choices, netfilter.Choice{Count: choice.Count, Verdict: v})
				continue
			}
			choices = append(choices, netfilter.Choice{Count: choice.Count, Verdict: moved(to, from, choice.Verdict, sets)})
		}
		draft.AddChoose(e.B, choices)
	default:
		if e.HasText() {
			draft.AddText(e.Kind, e.Flags, e.N, c.Text(e))
			return
		}
		draft.Add(moved(to, from, e, sets))
	}
}

// told is everything that was worked out, a line each.
func told(p *chain.Programmed) []string {
	var out []string
	rules := func(list []chain.RuleRef) (text string) {
		for _, r := range list {
			text += fmt.Sprintf(" [%v %s %s %d %p]", r.Table.Family, r.Table.Name, r.Chain.Name, r.Index, r.Chain)
		}
		return text
	}
	findings := func(list []chain.Finding) {
		for _, f := range list {
			out = append(out, fmt.Sprint(f.Code, f.Severity, f.Service, f.About, f.Message, rules(f.Rules)))
		}
	}
	findings(p.Findings)
	for _, s := range p.Services {
		out = append(out, fmt.Sprint(s.ServicePort, s.Protocol, s.AffinitySeconds))
		findings(s.Findings)
		for _, f := range s.Frontends {
			out = append(out, fmt.Sprint(f.Type, f.Family, f.Address, f.Port, f.Accepted))
			for _, r := range f.Routes {
				out = append(out, fmt.Sprint(r.From, r.Sources, r.Verdict, r.Masquerade, r.Undelivered.Exact(), r.Rejected.Exact(), r.Dropped.Exact(), rules(r.Unknown)))
				for _, e := range r.Endpoints {
					out = append(out, fmt.Sprint(e.Address, e.Share.Exact(), e.Max.Exact(), r.MasqueradesTo(e), e.Chain))
				}
			}
		}
	}
	return out
}

// TestUpdateIsServices edits rules at random, many times over, and wants Update to
// say what Services says of each ruleset.
func TestUpdateIsServices(t *testing.T) {
	files := map[string]*netfilter.Ruleset{}
	names, _ := filepath.Glob(captures + "/*.save*")
	more, _ := filepath.Glob(captures + "/*.json")
	for _, name := range slices.Concat(names, more) {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		parse := iptables.Parse
		if strings.HasSuffix(name, ".json") {
			parse = nftables.Parse
		}
		rs, err := parse(f, name)
		if err != nil {
			t.Fatal(err)
		}
		files[filepath.Base(name)] = rs
	}
	files["synthetic"] = synthetic(t, kubeproxy.Synthetic(60, 4))
	node := chain.Node{Local: []netip.Addr{netip.MustParseAddr("10.146.0.2")}}
	for name, rules := range files {
		t.Run(name, func(t *testing.T) {
			r := rand.New(rand.NewPCG(1, uint64(len(name))))
			last := revise(t, &netfilter.Ruleset{}, rules, unedited)
			view := chain.NewView(last, node)
			programmed := view.Services()
			var before []string
			changed := 0
			for step := range 150 {
				// Each chain and set has its own fate; most have none.
				seed, odds := r.Uint64(), []uint64{3, 30, 300}[step%3]
				if step%10 == 9 {
					odds = 0 // back to what was recorded
				}
				count := func(chain string, i int) int {
					h := seed
					for _, b := range []byte(chain) {
						h = (h ^ uint64(b)) * 1099511628211
					}
					h = (h ^ uint64(i)) * 1099511628211
					switch h >>= 20; {
					case odds == 0 || h%(100*odds) > 20:
						return 1
					case h%7 == 0:
						return 2
					}
					return 0
				}
				next := revise(t, last, rules, count)
				view = view.Next(next, node)
				want, got := chain.NewView(next, node).Services(), view.Update(programmed)
				text := told(want)
				if !slices.Equal(text, told(got)) {
					t.Fatalf("step %d: (-anew +updated):\n%s", step, cmp.Diff(text, told(got)))
				}
				if len(before) != len(text) || !slices.Equal(before, text) {
					changed++
				}
				last, programmed, before = next, got, text
			}
			if changed < 20 {
				t.Errorf("only %d of the edits changed anything", changed)
			}
		})
	}
}

// TestUpdateServices changes Services as a cluster does.
func TestUpdateServices(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	services := kubeproxy.Synthetic(120, 4)
	node := chain.Node{Local: []netip.Addr{kubeproxy.SyntheticNodeIP}}
	last := revise(t, &netfilter.Ruleset{}, synthetic(t, services), unedited)
	view := chain.NewView(last, node)
	programmed := view.Services()
	for step := range 200 {
		services = slices.Clone(services)
		s := &services[r.IntN(len(services))]
		switch r.IntN(5) {
		case 0:
			s.Endpoints = nil
		case 1:
			s.ExternalLocal = !s.ExternalLocal
		case 2:
			i := r.IntN(len(services))
			services = slices.Delete(services, i, i+1)
		case 3:
			n := kubeproxy.Synthetic(121+step, 2)[120+step]
			n.Name = fmt.Sprintf("new-%d", step)
			services = append(services, n)
		default:
			s.Endpoints = nil
			for i := range 1 + r.IntN(6) {
				s.Endpoints = append(s.Endpoints, kubeproxy.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 99, byte(step), byte(i)}), 80), Local: i%2 == 0})
			}
		}
		next := revise(t, last, synthetic(t, services), unedited)
		view = view.Next(next, node)
		got := view.Update(programmed)
		if want := told(chain.NewView(next, node).Services()); !slices.Equal(want, told(got)) {
			t.Fatalf("step %d: (-anew +updated):\n%s", step, cmp.Diff(want, told(got)))
		}
		last, programmed = next, got
	}
}

// TestUpdateForgets wants a ruleset to be let go once another has taken its
// place.
func TestUpdateForgets(t *testing.T) {
	services := kubeproxy.Synthetic(60, 4)
	node := chain.Node{Local: []netip.Addr{kubeproxy.SyntheticNodeIP}}
	last := revise(t, &netfilter.Ruleset{}, synthetic(t, services), unedited)
	programmed := chain.NewView(last, node).Services()
	gone := make(chan struct{}, 8)
	for step := range 3 {
		services = slices.Clone(services)
		services[7+step].Endpoints = services[7+step].Endpoints[:1]
		next := revise(t, last, synthetic(t, services), unedited)
		if step == 0 {
			runtime.AddCleanup(last, func(struct{}) { gone <- struct{}{} }, struct{}{})
			runtime.AddCleanup(last.Table(netfilter.IPv4, "nat"), func(struct{}) { gone <- struct{}{} }, struct{}{})
		}
		programmed = chain.NewView(next, node).Update(programmed)
		last = next
	}
	for range 10 { // cleanups run a little after the collection
		runtime.GC()
		if len(gone) == 2 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if len(gone) != 2 {
		t.Errorf("%d of a ruleset and its table have been let go, want both", len(gone))
	}
	runtime.KeepAlive(programmed)
}

func synthetic(t testing.TB, services []kubeproxy.Service) *netfilter.Ruleset {
	t.Helper()
	var dump bytes.Buffer
	if err := kubeproxy.Write(&dump, kubeproxy.Config{PodCIDR: kubeproxy.SyntheticPodCIDR, NodeIP: kubeproxy.SyntheticNodeIP}, services); err != nil {
		t.Fatal(err)
	}
	rs, err := iptables.Parse(&dump, "synthetic")
	if err != nil {
		t.Fatal(err)
	}
	return rs
}
