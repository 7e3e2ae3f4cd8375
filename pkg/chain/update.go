package chain

import (
	"hash/maphash"
	"maps"
	"net/netip"
	"reflect"
	"slices"

	"github.com/natlens/natlens/pkg/netfilter"
)

// This file works out the Services of a ruleset from those of the one before:
//
//	walk to a frontend ──▶ trail: the chains entered, the keys asked for
//	old and new ruleset ──▶ changes: the chains and keys that differ
//	a frontend whose trail no change touches keeps its routes
//
// It needs tables of one line (see netfilter.Table.Revises). For any others, or
// when the node or a base chain is another, everything is walked again.

// trail is what the walks to one frontend depend on, besides the packet.
type trail struct {
	chains []chainAt
	// dests are destinations with which long chains were asked; those of the
	// frontend's endpoints are not repeated here.
	dests   []netip.AddrPort
	lookups []lookup
}

// chainAt is a chain: the number of its table in the ruleset, and its own.
type chainAt struct {
	table uint32
	chain netfilter.ChainID
}

// lookup is a question to a set or map.
type lookup struct {
	table uint32
	set   uint32
	key   netfilter.SetKey
	whole bool // all its keys matter
}

// tracks are those of the walks to the frontend at hand, of which its trail is
// made.
type tracks struct {
	chains  []chainAt
	dests   []netip.AddrPort
	lookups []lookup
	met     [][]uint32 // of each table, by chain: the round in which it was entered last
	round   uint32     // the number of the frontend
}

func (v *View) newTracks() *tracks {
	t := &tracks{met: make([][]uint32, len(v.rules.Tables))}
	for i, table := range v.rules.Tables {
		t.met[i] = make([]uint32, table.NameCount())
	}
	return t
}

// begin is for the next frontend.
func (t *tracks) begin() {
	t.chains, t.dests, t.lookups = t.chains[:0], t.dests[:0], t.lookups[:0]
	t.round++
}

func (t *tracks) enter(at chainAt) {
	if t == nil {
		return
	}
	if met := &t.met[at.table][at.chain]; *met != t.round {
		*met = t.round
		t.chains = append(t.chains, at)
	}
}

// reach notes a destination with which a long chain is asked.
func (t *tracks) reach(to netip.AddrPort) {
	if t != nil && (len(t.dests) == 0 || t.dests[len(t.dests)-1] != to) {
		t.dests = append(t.dests, to)
	}
}

func (t *tracks) ask(l lookup) {
	if t != nil {
		t.lookups = append(t.lookups, l)
	}
}

// trail returns a copy that takes little memory.
func (t *tracks) trail(routes []Route) trail {
	out := trail{chains: slices.Clip(slices.Clone(t.chains))}
	for _, d := range t.dests {
		known := slices.Contains(out.dests, d) || slices.ContainsFunc(routes, func(r Route) bool {
			_, found := slices.BinarySearchFunc(r.Endpoints, d, func(e Endpoint, d netip.AddrPort) int { return e.Address.Compare(d) })
			return found
		})
		if !known {
			out.dests = append(out.dests, d)
		}
	}
	for _, l := range t.lookups {
		if !slices.Contains(out.lookups, l) {
			out.lookups = append(out.lookups, l)
		}
	}
	out.dests, out.lookups = slices.Clip(out.dests), slices.Clip(out.lookups)
	return out
}

// memory is what a Programmed keeps for the one that follows it.
type memory struct {
	view    *View
	entries map[frontKey]*entry
	odd     []map[netfilter.ChainID]bool // of each table, the chains that there was a finding about
}

// changes are the differences between two rulesets, as far as walks can tell.
type changes struct {
	chains []map[netfilter.ChainID]chainChange // of each table
	sets   []map[uint32]setChange
	// endpoints says that a chain of an endpoint has lost its DNAT, or what notes
	// its clients, or got it back.
	endpoints bool
}

// chainChange is how a chain differs: wholly, or for packets of these keys.
type chainChange struct {
	whole bool
	keys  map[key]bool
}

type setChange struct {
	whole bool
	keys  map[netfilter.SetKey]bool
}

// changes returns what differs between two views; nil when everything may.
func (v *View) changes(last *View) *changes {
	differ, ok := differing(v.rules, last.rules)
	if !ok || !v.sameFrame(last) {
		return nil
	}
	c := &changes{}
	for i, t := range v.rules.Tables {
		old := last.rules.Tables[i]
		chains, sets := map[netfilter.ChainID]chainChange{}, map[uint32]setChange{}
		for _, id := range differ[i] {
			now, was := t.ByID(id), byID(old, id)
			// A chain that rules lead to cannot go, nor be new.
			if was != nil && now != nil && isEndpointChain(was.Name) && (deliversAll(was) != deliversAll(now) || remembers(was) != remembers(now)) {
				c.endpoints = true
			}
			chains[id] = changedKeys(v.index(t, id), last.index(old, id), now, was)
		}
		for n, s := range t.Sets() {
			if was := setAt(old, n); s != was {
				sets[uint32(n)] = changedElements(s, was)
			}
		}
		c.chains, c.sets = append(c.chains, chains), append(c.sets, sets)
	}
	return c
}

// differing returns the chains of each table of a ruleset that are there in the
// last one with other rules, or only in one of them; ok is false when the tables
// are not of one line.
func differing(rs, last *netfilter.Ruleset) (chains [][]netfilter.ChainID, ok bool) {
	if len(rs.Tables) != len(last.Tables) {
		return nil, false
	}
	for i, t := range rs.Tables {
		old := last.Tables[i]
		if !t.Same(old) || !t.Revises(old) {
			return nil, false
		}
		var ids []netfilter.ChainID
		if t != old {
			for id := range netfilter.ChainID(t.NameCount()) {
				now, was := t.ByID(id), byID(old, id)
				if now != was && (now == nil || was == nil || now.Version() != was.Version()) {
					ids = append(ids, id)
				}
			}
		}
		chains = append(chains, ids)
	}
	return chains, true
}

func byID(t *netfilter.Table, id netfilter.ChainID) *netfilter.Chain {
	if int(id) >= t.NameCount() {
		return nil
	}
	return t.ByID(id)
}

func setAt(t *netfilter.Table, n int) *netfilter.Set {
	if n >= len(t.Sets()) {
		return nil
	}
	return t.Sets()[n]
}

// index returns the index of a chain, nil for a short one.
func (v *View) index(t *netfilter.Table, id netfilter.ChainID) *index {
	if list := v.of(t.Family).tables[t].indexes; int(id) < len(list) {
		return list[id]
	}
	return nil
}

// sameFrame reports whether packets of each class start alike in both views and
// meet the same base chains.
func (v *View) sameFrame(o *View) bool {
	if !reflect.DeepEqual(v.node, o.node) {
		return false
	}
	for i, f := range v.family {
		g := o.family[i]
		if (f == nil) != (g == nil) {
			return false
		}
		if f == nil {
			continue
		}
		if f.masquerade != g.masquerade || f.drop != g.drop || !maps.Equal(f.sources, g.sources) {
			return false
		}
		for h := range f.hooks {
			if !slices.EqualFunc(f.hooks[h], g.hooks[h], func(a, b netfilter.BaseChain) bool {
				return a.ID == b.ID && f.tables[a.Table].number == g.tables[b.Table].number && a.Base.Type == b.Base.Type && a.Base.Priority == b.Base.Priority
			}) {
				return false
			}
		}
	}
	return true
}

// changedKeys compares two states of a chain of which the index knows what
// packets ask it for.
func changedKeys(x, y *index, now, was *netfilter.Chain) chainChange {
	if x == nil || y == nil {
		return chainChange{whole: true}
	}
	a, wideA := x.sums(now)
	b, wideB := y.sums(was)
	if wideA != wideB {
		return chainChange{whole: true}
	}
	keys := map[key]bool{}
	for k, sum := range a {
		if other, ok := b[k]; !ok || other != sum {
			keys[k] = true
		}
	}
	for k := range b {
		if _, ok := a[k]; !ok {
			keys[k] = true
		}
	}
	return chainChange{keys: keys}
}

var seed = maphash.MakeSeed()

// sums digests the rules of a chain: those under each key of one address, with
// their places among the others, and all others.
func (x *index) sums(c *netfilter.Chain) (byKey map[key]uint64, wide uint64) {
	byKey = make(map[key]uint64, len(x.first))
	var h maphash.Hash
	h.SetSeed(seed)
	var buf []byte
	rank := uint64(0) // how many wide rules stand before
	for i := range c.Len() {
		k, ok := keyOf(c, c.Rule(i))
		buf = c.AppendContent(buf[:0], i)
		if ok && k.addr.IsValid() {
			sum := maphash.Bytes(seed, buf)
			byKey[k] = (byKey[k]*1099511628211 ^ sum) + rank
			continue
		}
		rank++
		h.Write(buf)
		h.WriteByte(byte(len(buf)))
	}
	return byKey, h.Sum64()
}

func changedElements(now, was *netfilter.Set) setChange {
	if now == nil || was == nil || now.Map != was.Map || now.Dynamic != was.Dynamic || now.Timeout != was.Timeout || now.Opaque != was.Opaque || !slices.Equal(now.Ranges, was.Ranges) {
		return setChange{whole: true}
	}
	keys := map[netfilter.SetKey]bool{}
	differ := func(a, b *netfilter.Set) {
		for _, k := range a.Keys {
			x, _ := a.Lookup(k)
			if y, ok := b.Lookup(k); !ok || x.Verdict != y.Verdict {
				keys[k] = true
			}
		}
	}
	differ(now, was)
	differ(was, now)
	return setChange{keys: keys}
}

// touch reports whether any change touches what the routes of an entry depend
// on.
func (c *changes) touch(e *entry) bool {
	for _, at := range e.trail.chains {
		change, ok := c.chains[at.table][at.chain]
		if !ok {
			continue
		}
		if change.whole || len(change.keys) > 0 && change.concerns(e) {
			return true
		}
	}
	for _, l := range e.trail.lookups {
		if change, ok := c.sets[l.table][l.set]; ok && (change.whole || l.whole || change.keys[l.key]) {
			return true
		}
	}
	return false
}

// concernChain reports whether what can be found about a chain may have changed:
// with it, or with the chains of endpoints that it leads to.
func (c *changes) concernChain(table int, of *netfilter.Chain) bool {
	if len(c.chains[table]) == 0 {
		return false
	}
	if _, ok := c.chains[table][of.ID]; ok {
		return true
	}
	return c.endpoints && !isEndpointChain(of.Name)
}

// concerns reports whether the chain differs for any destination that an entry
// asked long chains for.
func (c *chainChange) concerns(e *entry) bool {
	asks := func(to netip.AddrPort) bool { return c.keys[key{to.Addr(), to.Port(), e.service.Protocol}] }
	if slices.ContainsFunc(e.trail.dests, asks) {
		return true
	}
	for _, r := range e.routes {
		for i := range r.Endpoints {
			if asks(r.Endpoints[i].Address) {
				return true
			}
		}
	}
	return false
}

// recall takes over the routes of the entry of the last view, if they must be
// the same, and reports whether it did.
func (e *entry) recall(o *entry, c *changes) bool {
	if o == nil || o.service != e.service || !sameFront(&o.front, &e.front) || !sameTarget(o.target, e.target) || o.hasRefs() || c.touch(o) {
		return false
	}
	e.routes, e.affinity, e.facts, e.trail = o.routes, o.affinity, o.facts, o.trail
	e.clean = o.clean && len(o.facts.fell) == 0 // which hooks lead to Services matters for those
	return true
}

func sameFront(a, b *Frontend) bool {
	return a.Type == b.Type && a.Family == b.Family && a.Address == b.Address && a.Port == b.Port && slices.Equal(a.Accepted, b.Accepted)
}

func sameTarget(a, b *netfilter.Chain) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.ID == b.ID
}

// hasRefs reports whether what an entry found names rules: those are of a
// ruleset that must not be kept.
func (e *entry) hasRefs() bool {
	f := &e.facts
	return len(f.bypassed)+len(f.untracked)+len(f.dropped)+len(f.broken) > 0 ||
		slices.ContainsFunc(e.routes, func(r Route) bool { return len(r.Unknown) > 0 })
}
