package nftables

import (
	"bytes"
	"encoding/binary"
	"hash/maphash"
	"slices"

	"github.com/natlens/natlens/pkg/internal/nfnetlink"
	"github.com/natlens/natlens/pkg/netfilter"
)

// This file makes the next reading of a table out of the last one:
//
//	chains, sets and elements ─┐
//	rules of each chain ───────┴─▶ what differs ─decode─▶ next table
//
// The kernel has to be asked for all rules, since nothing tells which of them a
// transaction replaced. But a rule never changes: another one has another
// handle, which the table gives to no other rule. So a chain of which the
// messages are the same bytes as last time is the same, and so are the anonymous
// sets of its rules, which are constant and live as long as their rule.

// liveTable is one table, as of the last step, and while it is read.
type liveTable struct {
	last   *netfilter.Table // complete, and maybe published
	next   *netfilter.Table // revises last, during a step
	proto  uint8
	handle uint64 // of the table in the kernel: one that was made anew has another
	seed   maphash.Seed
	step   uint32

	chains []liveChain       // by ChainID
	named  map[string]*known // the named sets of the last step

	// Of the step at hand. Chains and sets are gathered by one goroutine, rules by
	// another.
	declared []declared
	listed   []*known
	elements []byte // of the listed sets that have others than before
	rules    rulesDump

	decode liveDecoder
	draft  netfilter.Chain
	order  []netfilter.ChainID
	// ruled says that there are rules: the kernel counts those of a chain at a hook.
	ruled bool
	// changed says that something did not fit together, so that the rules have
	// changed meanwhile.
	changed bool
}

// liveChain is what is known of a chain.
type liveChain struct {
	sum    uint64 // of the messages of its rules; 0 when they are to be decoded in any case
	base   *netfilter.Base
	more   *moreOfChain
	dumped uint32 // the step that found rules of it last
	there  uint32 // the step that found itself last
}

// moreOfChain is what few chains have.
type moreOfChain struct {
	numbers []uint32 // of the anonymous sets of its rules
	fills   []string // the sets that its rules add to
	counts  bool     // its rules have counters
}

// declared is a chain of a dump of chains.
type declared struct {
	id   netfilter.ChainID
	name string // of one without a number
	base *netfilter.Base
}

// known is a named set: as the kernel describes it, and which elements it has.
type known struct {
	liveSet
	sum      uint64 // of type and elements; 0 when these are to be decoded in any case
	before   uint64 // the sum of the last step
	read     bool   // its elements were
	same     bool   // and have the sum of the last step
	from, to int    // where they are in liveTable.elements, if not
}

// rulesDump gathers the rules of chains that are not as they were.
type rulesDump struct {
	bodies []chainBody
	raw    []byte // of the bodies: messages, each behind its length
	open   []byte // name of the chain at hand
	start  int    // of its rules, in raw
	any    bool   // there were rules at all
	twice  bool   // a chain's rules came in two places
}

type chainBody struct {
	name     string
	from, to int
	sum      uint64
}

func newLiveTable(f netfilter.Family, proto uint8) *liveTable {
	return &liveTable{last: netfilter.NewTable(f, kubeProxyTable, netfilter.BackendNFTables), proto: proto, seed: maphash.MakeSeed()}
}

// renew forgets a table of which too much was replaced.
func (t *liveTable) renew() {
	if t.last.Worn() {
		t.last = netfilter.NewTable(t.last.Family, t.last.Name, t.last.Backend)
		t.chains, t.named = nil, nil
	}
}

// begin prepares a table for a step.
func (t *liveTable) begin() {
	t.next = t.last.Revise()
	t.step++
	t.declared, t.listed, t.elements, t.rules, t.changed = t.declared[:0], t.listed[:0], nil, rulesDump{}, false
	t.ruled = false
	t.decode.table, t.decode.sets = t.next, map[string]*liveSet{}
	for name, s := range t.named {
		t.decode.sets[name] = &s.liveSet
	}
}

// madeAnew says that the table is not that of the last step, but another one of
// its name, which may give the same handles to other rules.
func (t *liveTable) madeAnew(handle uint64) {
	t.handle = handle
	for i := range t.chains {
		t.chains[i].sum = 0
	}
	for _, s := range t.named {
		s.sum = 0
	}
}

// sum tells bytes from others.
func (t *liveTable) sum(b []byte) uint64 { return max(maphash.Bytes(t.seed, b), 1) }

// addChain notes the chain of a message, if it is one of the table.
func (t *liveTable) addChain(b []byte) {
	var a [nftaChainType + 1][]byte
	nfnetlink.Collect(b, a[:])
	name := nfnetlink.String(a[nftaChainName])
	if string(nfnetlink.String(a[nftaChainTable])) != t.last.Name || len(name) == 0 {
		return
	}
	d := declared{base: baseOf(a[nftaChainHook], a[nftaChainType], a[nftaChainPolicy])}
	if n, _ := nfnetlink.Uint32(a[nftaChainUse]); n > 0 && a[nftaChainHook] != nil {
		t.ruled = true // no jump can lead to it
	}
	var ok bool
	if d.id, ok = t.next.Find(name); !ok {
		d.name = string(name)
	}
	t.declared = append(t.declared, d)
}

// addSet notes the set of a message, if it is a named one of the table.
func (t *liveTable) addSet(b []byte) {
	var a setAttrs
	nfnetlink.Collect(b, a[:])
	flags, _ := nfnetlink.Uint32(a[nftaSetFlags])
	name := nfnetlink.String(a[nftaSetName])
	if string(nfnetlink.String(a[nftaSetTable])) != t.last.Name || len(name) == 0 || flags&setAnonymous != 0 {
		return
	}
	if slices.ContainsFunc(t.listed, func(s *known) bool { return s.name == string(name) }) {
		return // twice in a dump that was interrupted
	}
	s := &known{liveSet: *newLiveSet(&a)}
	if last := t.named[s.name]; last != nil {
		s.before = last.sum
	}
	t.listed = append(t.listed, s)
}

// beginElements has the elements to come added to a named set.
func (t *liveTable) beginElements(s *known) {
	s.read, s.from = true, len(t.elements)
	for _, n := range [...]uint32{s.flags, s.keyType, uint32(s.keySize), s.dataType} {
		t.elements = binary.NativeEndian.AppendUint32(t.elements, n)
	}
}

// addElements adds a list of elements to that set.
func (t *liveTable) addElements(list []byte) { t.elements = append(t.elements, list...) }

// endElements drops the elements again if the set has them already.
func (t *liveTable) endElements(s *known) {
	const head = 4 * 4 // the numbers of beginElements
	s.sum = t.sum(t.elements[s.from:])
	if s.sum == s.before {
		s.same, t.elements = true, t.elements[:s.from]
		return
	}
	s.from, s.to = s.from+head, len(t.elements)
}

// addRule notes the rule of a message, if it is one of the table.
func (t *liveTable) addRule(b []byte) {
	var a [nftaRuleChain + 1][]byte
	nfnetlink.Collect(b, a[:])
	name := nfnetlink.String(a[nftaRuleChain])
	if string(nfnetlink.String(a[nftaRuleTable])) != t.last.Name || len(name) == 0 {
		return // a kernel that does not filter
	}
	r := &t.rules
	r.any = true
	if !bytes.Equal(r.open, name) {
		t.endRules()
		r.open = append(r.open[:0], name...)
	}
	r.raw = binary.NativeEndian.AppendUint32(r.raw, uint32(len(b)))
	r.raw = append(r.raw, b...)
}

// endRules drops the rules of the chain at hand again if it has them already.
func (t *liveTable) endRules() {
	r := &t.rules
	if len(r.open) == 0 {
		return
	}
	sum := t.sum(r.raw[r.start:])
	same := false
	if id, ok := t.next.Find(r.open); ok && int(id) < len(t.chains) {
		c := &t.chains[id]
		r.twice = r.twice || c.dumped == t.step
		c.dumped, same = t.step, c.sum == sum && t.next.ByID(id) != nil
	}
	if same {
		r.raw = r.raw[:r.start]
	} else {
		r.bodies = append(r.bodies, chainBody{string(r.open), r.start, len(r.raw), sum})
	}
	r.open, r.start = r.open[:0], len(r.raw)
}

// eachRule calls f with the messages of the rules of a body.
func (t *liveTable) eachRule(b *chainBody, f func([]byte)) {
	for raw := t.rules.raw[b.from:b.to]; len(raw) > 0; {
		n := 4 + binary.NativeEndian.Uint32(raw)
		f(raw[4:n])
		raw = raw[n:]
	}
}

// declare makes the table have the chains and named sets that were found, without
// what is in them.
func (t *liveTable) declare() {
	// While a transaction puts a new table in the place of one of the same name, a
	// dump of rules may find the old one, whose rules are gone already, and nothing
	// else tells (nf_tables_dump_rules in net/netfilter/nf_tables_api.c).
	t.changed = t.changed || t.ruled && !t.rules.any
	t.order = t.order[:0]
	for i := range t.declared {
		d := &t.declared[i]
		if d.name != "" {
			d.id = t.next.ID(d.name)
		}
		t.grow()
		if c := &t.chains[d.id]; c.there == t.step {
			t.changed = true // twice
			continue
		}
		t.chains[d.id].there, t.chains[d.id].base = t.step, d.base
		t.order = append(t.order, d.id)
		if t.next.ByID(d.id) == nil {
			t.next.Declare(t.next.ChainName(d.id))
		}
	}
	var gone []netfilter.ChainID
	for id := range t.chains {
		c := &t.chains[id]
		if c.there == t.step || t.next.ByID(netfilter.ChainID(id)) == nil {
			continue
		}
		gone = append(gone, netfilter.ChainID(id))
		t.dropSets(c, nil)
		*c = liveChain{}
	}
	t.next.Remove(gone...)
	t.next.Arrange(t.order)

	before := t.named
	t.named = make(map[string]*known, len(t.listed))
	clear(t.decode.sets)
	for _, s := range t.listed {
		if old := before[s.name]; old != nil {
			s.number = old.number
		} else {
			s.number = t.next.AddSet(s.withoutElements())
		}
		t.named[s.name], t.decode.sets[s.name] = s, &s.liveSet
	}
	for name, s := range before {
		if t.named[name] == nil {
			t.next.RemoveSet(s.number)
		}
	}
}

// grow gives every name of the table a place in chains.
func (t *liveTable) grow() {
	if n := t.next.NameCount(); n > len(t.chains) {
		t.chains = append(t.chains, make([]liveChain, n-len(t.chains))...)
	}
}

// dropSets removes the anonymous sets of a chain, but those that it keeps.
func (t *liveTable) dropSets(c *liveChain, keep []uint32) {
	if c.more == nil {
		return
	}
	for _, n := range c.more.numbers {
		if !slices.Contains(keep, n) {
			t.next.RemoveSet(n)
		}
	}
}

// wanted is an anonymous set that the rules at hand ask.
type wanted struct {
	name string
	set  *liveSet // when it is known
	// numbers, if not 0, says that a rule asks it with one of so many, from first
	// on.
	first, numbers uint32
}

// wantedSets returns the anonymous sets of the rules at hand.
func (t *liveTable) wantedSets() []*wanted {
	const lookup, numgen = "lookup", "numgen"
	const set, sreg, dreg = 1, 2, 3 // of lookup
	const to, modulus, offset = 1, 2, 4
	var out []*wanted
	seen := map[string]bool{}
	for i := range t.rules.bodies {
		t.eachRule(&t.rules.bodies[i], func(b []byte) {
			var a [nftaRuleExpressions + 1][]byte
			nfnetlink.Collect(b, a[:])
			var register, first, numbers uint32 // of a numgen right ahead
			for list := a[nftaRuleExpressions]; len(list) > 0; {
				_, elem, rest, ok := nfnetlink.Next(list)
				if !ok {
					return
				}
				list = rest
				var e [nftaExprData + 1][]byte
				var v [offset + 1][]byte
				nfnetlink.Collect(elem, e[:])
				name := string(nfnetlink.String(e[nftaExprName]))
				if name == numgen || name == lookup {
					nfnetlink.Collect(e[nftaExprData], v[:])
				}
				if name == lookup {
					key := string(nfnetlink.String(v[set]))
					if t.decode.sets[key] == nil && !seen[key] {
						seen[key] = true
						w := &wanted{name: key}
						if from, _ := nfnetlink.Uint32(v[sreg]); numbers != 0 && from == register && v[dreg] != nil {
							w.first, w.numbers = first, numbers
						}
						out = append(out, w)
					}
				}
				numbers = 0
				if name == numgen {
					register, _ = nfnetlink.Uint32(v[to])
					numbers, _ = nfnetlink.Uint32(v[modulus])
					first, _ = nfnetlink.Uint32(v[offset])
				}
			}
		})
	}
	return out
}

// countable reports whether the wanted set is a map that can be asked for each of
// the numbers, and whether that is less work than reading all of it: the kernel
// looks a set up by walking all sets, once for each question, three times for a
// dump.
func (w *wanted) countable() bool {
	s := w.set
	return s.flags&setMap != 0 && s.anonymous() && s.flags&(setInterval|setTimeout|setEval|setObject) == 0 && s.keySize == 4 &&
		w.numbers > 0 && w.numbers <= 2*nfnetlink.MostAtOnce && w.first+w.numbers > w.first
}

// decodeRules decodes the chains with other rules than before. It reports whether
// any rule differs.
func (t *liveTable) decodeRules() (differ bool) {
	t.changed = t.changed || t.rules.twice
	for i := range t.rules.bodies {
		b := &t.rules.bodies[i]
		id, ok := t.next.Find([]byte(b.name))
		if !ok || t.next.ByID(id) == nil {
			t.changed = true
			continue
		}
		t.chains[id].dumped = t.step
		differ = t.decodeChain(id, b) || differ
	}
	return differ
}

// decodeOthers deals with the chains of which no other rules were found: they may
// have none left, or another policy.
func (t *liveTable) decodeOthers() {
	for _, id := range t.order {
		c, have := &t.chains[id], t.next.ByID(id)
		same := have.Base == c.base || have.Base != nil && c.base != nil && *have.Base == *c.base
		switch {
		case c.dumped == t.step && same:
		case c.dumped == t.step:
			c.sum, t.changed = 0, true // its rules are needed once more
		case have.Len() > 0 || !same:
			t.decodeChain(id, &chainBody{})
		}
	}
}

// decodeChain decodes the rules of a chain, and reports whether they are others.
func (t *liveTable) decodeChain(id netfilter.ChainID, b *chainBody) (differ bool) {
	var more moreOfChain
	if m := t.chains[id].more; m != nil {
		more = *m
	}
	t.next.Draft(&t.draft, t.next.ChainName(id))
	t.draft.Base = t.chains[id].base
	t.decode.begin(&t.draft, more.numbers)
	t.eachRule(b, t.decode.addRule)
	differ = t.next.Adopt(&t.draft)
	t.grow() // rules may have named chains
	c := &t.chains[id]
	t.dropSets(c, t.decode.numbers)
	more = moreOfChain{numbers: t.decode.numbers, fills: t.decode.fills}
	if t.draft.Len() > 0 {
		_, more.counts = t.draft.Counter(0)
	}
	c.more = nil
	if more.numbers != nil || more.fills != nil || more.counts {
		c.more = &more
	}
	if c.sum = b.sum; t.decode.missing {
		c.sum, t.changed = 0, true
	}
	return differ
}

// filled returns the names of the sets that rules add to.
func (t *liveTable) filled() map[string]bool {
	out := map[string]bool{}
	for i := range t.chains {
		if m := t.chains[i].more; m != nil {
			for _, name := range m.fills {
				out[name] = true
			}
		}
	}
	return out
}

// counting returns the names of the chains with counters, which kube-proxy itself
// does not write.
func (t *liveTable) counting() (out []string) {
	for i := range t.chains {
		if m := t.chains[i].more; m != nil && m.counts {
			out = append(out, t.next.ChainName(netfilter.ChainID(i)))
		}
	}
	return out
}

// decodeSets gives the named sets their elements.
func (t *liveTable) decodeSets(filled map[string]bool) {
	for _, s := range t.listed {
		old := t.next.Set(s.number)
		set := s.withoutElements()
		set.Dynamic = filled[s.name]
		switch {
		case s.same && set.Dynamic == old.Dynamic && set.Timeout == old.Timeout:
			continue
		case s.same:
			with := *old
			with.Dynamic, with.Timeout = set.Dynamic, set.Timeout
			set = &with
		case s.read:
			t.decode.missing = false
			if !t.decode.fill(set, &s.liveSet, t.elements[s.from:s.to]) {
				set = s.withoutElements()
				set.Dynamic, set.Opaque = filled[s.name], true
			}
			if t.decode.missing {
				s.sum, t.changed = 0, true
			}
		}
		if !set.Equal(old) {
			t.next.ReplaceSet(s.number, set)
		}
	}
}

// end ends a step. It reports whether the table differs from that of the last.
func (t *liveTable) end() bool {
	t.elements, t.rules, t.decode.sets = nil, rulesDump{}, nil
	if !t.next.Touched() {
		return false
	}
	t.last = t.next
	return true
}
