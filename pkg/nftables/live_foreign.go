package nftables

import (
	"encoding/binary"
	"hash/maphash"
	"slices"

	"github.com/natlens/natlens/pkg/internal/nfnetlink"
	"github.com/natlens/natlens/pkg/netfilter"
)

// This file makes tables of the model out of what the kernel tells about a foreign
// table:
//
//	rules of all chains ──▶ base chains that may direct ──▶ the chains and sets
//	                                                        that they lead to ──▶ tables
//
// They are small and seldom change, so they are decoded as a whole; what comes out
// equal to the last time is what was there the last time.

// foreignTable is a foreign table as of the last step, and while it is read.
type foreignTable struct {
	family string // ip, ip6, inet
	proto  uint8
	name   string
	handle uint64 // of the table in the kernel

	sum        uint64                     // of the rules
	bases      map[string]*netfilter.Base // those that may direct, as long as sum is the same
	settled    bool                       // no set is asked, so that the same rules mean the same
	tables     []*netfilter.Table         // what came of it; may be shared with rulesets
	unreadable []netfilter.Unreadable

	// Of the step at hand.
	hash   maphash.Hash
	rules  map[string][]byte // messages by chain, each behind its length
	order  []string          // the chains with rules
	count  int
	sets   map[string]*liveSet
	chains []string // that the bases lead to, as found
}

func newForeignTable(family string, proto uint8, name string, handle uint64) *foreignTable {
	t := &foreignTable{family: family, proto: proto, name: name, handle: handle}
	t.hash.SetSeed(maphash.MakeSeed())
	return t
}

// begin prepares the table for a step.
func (t *foreignTable) begin() {
	t.hash.Reset()
	t.rules, t.order, t.count, t.sets, t.chains = map[string][]byte{}, nil, 0, map[string]*liveSet{}, nil
}

// end drops what only the step needs.
func (t *foreignTable) end() { t.rules, t.order, t.sets, t.chains = nil, nil, nil, nil }

func (t *foreignTable) large() bool { return t.count > mostForeignRules }

// addRule notes the rule of a message.
func (t *foreignTable) addRule(b []byte) {
	var a [nftaRuleChain + 1][]byte
	nfnetlink.Collect(b, a[:])
	name := nfnetlink.String(a[nftaRuleChain])
	if string(nfnetlink.String(a[nftaRuleTable])) != t.name || len(name) == 0 {
		return // a kernel that does not filter
	}
	if t.count++; t.large() {
		b = nil // only which chains there are still matters
	}
	raw, ok := t.rules[string(name)]
	if !ok {
		t.order = append(t.order, string(name))
		_, _ = t.hash.Write(name)
	}
	raw = binary.NativeEndian.AppendUint32(raw, uint32(len(b)))
	_, _ = t.hash.Write(b)
	t.rules[string(name)] = append(raw, b...)
}

// eachRule calls f with the messages of the rules of a chain.
func (t *foreignTable) eachRule(chain string, f func([]byte)) {
	for raw := t.rules[chain]; len(raw) > 0; {
		n := 4 + binary.NativeEndian.Uint32(raw)
		f(raw[4:n])
		raw = raw[n:]
	}
}

// follow finds the chains that the bases lead to. It has every set that a rule on
// the way asks read by the function, which may leave it out of sets.
func (t *foreignTable) follow(read func(set string) error) error {
	seen := map[string]bool{}
	find := func(name string) {
		if name != "" && !seen[name] {
			seen[name] = true
			t.chains = append(t.chains, name)
		}
	}
	for _, name := range t.order {
		if t.bases[name] != nil {
			find(name)
		}
	}
	asked := map[string]bool{}
	for i := 0; i < len(t.chains); i++ {
		var names []string
		t.eachRule(t.chains[i], func(b []byte) { names = append(names, namedIn(b, find)...) })
		for _, name := range names {
			if asked[name] {
				continue
			}
			asked[name] = true
			if err := read(name); err != nil {
				return err
			}
			if s := t.sets[name]; s != nil && s.verdicts {
				eachElement(s.raw, func(e *liveElement) bool {
					find(targetOf(e.data))
					return true
				})
			}
		}
	}
	return nil
}

// namedIn returns the sets that a rule asks or adds to, and has jump called with the chains
// that its verdicts name.
func namedIn(rule []byte, jump func(chain string)) (sets []string) {
	const set = 1                 // of lookup and dynset
	const dreg, value = 1, 2      // of immediate
	const most = nftaExprData + 1 // of an expression
	var a [nftaRuleExpressions + 1][]byte
	nfnetlink.Collect(rule, a[:])
	for list := a[nftaRuleExpressions]; len(list) > 0; {
		_, elem, rest, ok := nfnetlink.Next(list)
		if !ok {
			return sets
		}
		list = rest
		var e [most][]byte
		var v [value + 1][]byte
		nfnetlink.Collect(elem, e[:])
		nfnetlink.Collect(e[nftaExprData], v[:])
		switch string(nfnetlink.String(e[nftaExprName])) {
		case "lookup", "dynset":
			sets = append(sets, string(nfnetlink.String(v[set])))
		case "immediate":
			jump(targetOf(v[value]))
		}
	}
	return sets
}

// targetOf returns the chain that a verdict names, "" for none.
func targetOf(data []byte) string {
	var a [nftaDataVerdict + 1][]byte
	nfnetlink.Collect(data, a[:])
	nfnetlink.Collect(a[nftaDataVerdict], a[:]) // has the same size
	return string(nfnetlink.String(a[nftaVerdictChain]))
}

// decode makes the tables of the model. It keeps those of the last step that have
// the same rules.
func (t *foreignTable) decode() {
	before := t.tables
	t.tables, t.unreadable = nil, nil
	for _, f := range [...]netfilter.Family{netfilter.IPv4, netfilter.IPv6} {
		if t.proto == nfprotoIPv4 && f != netfilter.IPv4 || t.proto == nfprotoIPv6 && f != netfilter.IPv6 {
			continue
		}
		name := foreignName(t.family, t.name)
		switch {
		case len(t.bases) == 0:
			continue
		case t.large():
			t.unreadable = append(t.unreadable, tooLarge(f, name))
			continue
		}
		table := t.decodeFor(f, name)
		if !directing(table) {
			continue
		}
		table.Compact()
		if i := slices.IndexFunc(before, func(o *netfilter.Table) bool { return sameTable(o, table) }); i >= 0 {
			table = before[i]
		}
		t.tables = append(t.tables, table)
	}
}

// decodeFor makes the table that packets of a family meet.
func (t *foreignTable) decodeFor(f netfilter.Family, name string) *netfilter.Table {
	table := netfilter.NewTable(f, name, netfilter.BackendNFTables)
	for _, c := range t.chains {
		table.Declare(c).Base = t.bases[c]
	}
	d := &liveDecoder{table: table, sets: map[string]*liveSet{}, foreign: true}
	for name, s := range t.sets {
		one := *s
		d.sets[name] = &one
		if s.anonymous() {
			continue
		}
		set := s.withoutElements()
		if set.Opaque = s.opaque(); !set.Opaque && !d.fill(set, &one, s.raw) {
			set = s.withoutElements()
			set.Opaque = true
		}
		one.number = table.AddSet(set)
	}
	for _, c := range t.chains {
		d.begin(table.Lookup(c), nil)
		t.eachRule(c, d.addRule)
		for _, name := range d.fills { // what packets added is nothing for a new client
			set := table.Set(d.sets[name].number)
			set.Dynamic, set.Opaque = true, false
		}
	}
	return table
}

// opaque reports whether nothing can be known of what a set holds: its keys are of
// a kind that is not understood, or packets add to it, and not only what was read.
func (s *liveSet) opaque() bool { return s.types == nil || !s.anonymous() && s.flags&setEval != 0 }

// sameTable compares two decodings of a table.
func sameTable(a, b *netfilter.Table) bool {
	return a.Same(b) && a.Digest() == b.Digest() && slices.EqualFunc(a.Sets(), b.Sets(), (*netfilter.Set).Equal)
}
