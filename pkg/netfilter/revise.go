package netfilter

import (
	"bytes"
	"encoding/binary"
	"maps"
	"slices"
	"sync/atomic"
)

// This file makes the next reading of a table out of the last one. What has not
// changed is shared, and can be told by its version:
//
//	last ──Revise──▶ next ──Draft, Adopt, Remove──▶ published
//
// One goroutine reads and revises; any number may use what was published.

// versions counts the chains that were made in this process.
var versions atomic.Uint64

// Version tells chains apart: two chains with the same version have the same
// rules. Their counters may differ, and so may those of a base chain's policy.
func (c *Chain) Version() uint64 { return c.version }

// Revise returns a table with the name, chains, sets and numbers of t, in which
// chains can be replaced while t, which must be complete, stays as it is. It
// costs next to nothing until something is. Only the latest table of a line may
// be revised.
func (t *Table) Revise() *Table {
	next := *t
	next.shares = sharesAll
	return &next
}

// What a revised table shares with the one before, which others may be reading.
const (
	sharesChains uint8 = 1 << iota // chains and order
	sharesSets
	sharesIDs
	sharesAll = sharesChains | sharesSets | sharesIDs
)

// Touched reports whether the table differs from the one that it revises, be it
// in counters.
func (t *Table) Touched() bool { return t.shares != sharesAll }

func (t *Table) ownChains() {
	if t.shares&sharesChains != 0 {
		t.chains, t.order = slices.Clone(t.chains), slices.Clone(t.order)
		t.shares &^= sharesChains
	}
}

func (t *Table) ownSets() {
	if t.shares&sharesSets != 0 {
		t.sets = slices.Clone(t.sets)
		t.shares &^= sharesSets
	}
}

// ownIDs makes room for new names, now and then in one map again.
func (t *Table) ownIDs() {
	const few = 64
	switch {
	case t.shares&sharesIDs == 0:
		return
	case len(t.newIDs) > few+len(t.ids)/8:
		ids := make(map[string]ChainID, len(t.names))
		maps.Copy(ids, t.ids)
		maps.Copy(ids, t.newIDs)
		t.ids, t.newIDs = ids, map[string]ChainID{}
	case t.newIDs == nil:
		t.newIDs = map[string]ChainID{}
	default:
		t.newIDs = maps.Clone(t.newIDs)
	}
	t.shares &^= sharesIDs
	t.revised = true
}

// Worn reports whether so much was replaced since the table was read anew that
// what is left of it holds too much memory: read it anew then.
func (t *Table) Worn() bool {
	const least = 10_000 // rules, of which the memory is no matter
	return t.replaced > least && t.replaced > least+t.RuleCount() || len(t.names) > least+2*len(t.order) ||
		t.goneSets > least+len(t.sets)/2
}

// Draft makes c an empty chain of that name that is not in the table. It keeps
// the memory of c for the rules to come; they are c's own until Adopt.
func (t *Table) Draft(c *Chain, name string) { t.DraftByID(c, t.ID(name)) }

// DraftByID is Draft for the number of a name. It changes nothing but c.
func (t *Table) DraftByID(c *Chain, id ChainID) {
	*c = Chain{
		Name: t.names[id], ID: id, family: t.Family,
		starts: c.starts[:0], exprs: c.exprs[:0], text: c.text[:0], wide: c.wide[:0], counts: c.counts[:0],
	}
}

// Adopt puts the rules of a draft into the table, as the chain of its name. When
// that has the same rules already, only its counters are taken over. The draft
// may be used again. It reports whether the rules were others.
func (t *Table) Adopt(draft *Chain) (changed bool) {
	have := t.chains[draft.ID]
	c := t.adopted(draft, t.arena)
	t.set(c)
	return have == nil || have.version != c.version
}

// adopted returns the chain that a draft makes of the one of its name.
func (t *Table) adopted(draft *Chain, a *arena) *Chain {
	have := t.chains[draft.ID]
	if have == nil || !have.sameRules(draft) {
		return a.keep(draft)
	}
	var policy Counter
	if draft.Base != nil {
		policy = draft.Base.Counter
	}
	return have.recounted(draft.counts, policy)
}

// set puts a chain in the place of the one of its name.
func (t *Table) set(c *Chain) {
	have := t.chains[c.ID]
	if c == have {
		return
	}
	t.ownChains()
	t.chains[c.ID] = c
	switch {
	case have == nil:
		t.order = append(t.order, c.ID)
	case have.version != c.version:
		t.replaced += have.Len()
	}
}

// Part adopts some chains of a table while other goroutines do so with others.
// Until Join, the table is as it was.
type Part struct {
	table *Table
	arena arena
	moved []*Chain // what they are now, where that differs
}

// Part returns a part of the table.
func (t *Table) Part() *Part { return &Part{table: t} }

// Adopt is [Table.Adopt] for chains that no other part adopts.
func (p *Part) Adopt(draft *Chain) {
	if c := p.table.adopted(draft, &p.arena); c != p.table.chains[c.ID] {
		p.moved = append(p.moved, c)
	}
}

// Join puts into the table what the part has adopted.
func (p *Part) Join() {
	for _, c := range p.moved {
		p.table.set(c)
	}
}

// Recount takes over what the rules of a chain have counted, one by one, and
// what met its policy, if it hangs on a hook. The counts stay the caller's.
func (t *Table) Recount(id ChainID, counts []Counter, policy Counter) {
	t.set(t.chains[id].recounted(counts, policy))
}

// recounted returns the chain with other counters; c itself when they are the same.
func (c *Chain) recounted(counts []Counter, policy Counter) *Chain {
	if slices.Equal(c.counts, counts) && (c.Base == nil || c.Base.Counter == policy) {
		return c
	}
	next := *c
	if c.Base != nil {
		base := *c.Base
		base.Counter = policy
		next.Base = &base
	}
	// Not in the arena: these are replaced often.
	next.counts = slices.Clone(counts)
	return &next
}

// Remove takes chains out of the table. Their names keep their numbers.
func (t *Table) Remove(ids ...ChainID) {
	if len(ids) == 0 {
		return
	}
	t.ownChains()
	for _, id := range ids {
		if c := t.chains[id]; c != nil {
			t.replaced += c.Len()
			t.chains[id] = nil
		}
	}
	t.order = slices.DeleteFunc(t.order, func(id ChainID) bool { return t.chains[id] == nil })
}

// Arrange has the chains stand in that order, which names each of them once.
func (t *Table) Arrange(order []ChainID) {
	if !slices.Equal(t.order, order) {
		t.ownChains()
		t.order = slices.Clone(order)
	}
}

// ReplaceSet puts another set in the place of the one with that number.
func (t *Table) ReplaceSet(n uint32, s *Set) {
	t.ownSets()
	t.sets[n] = s
}

// RemoveSet leaves an anonymous set without elements in the place of one that no
// rule uses any more. Its number is not given to another: chains with the same
// version mean the same sets.
func (t *Table) RemoveSet(n uint32) {
	t.ReplaceSet(n, noSet)
	t.goneSets++
}

var noSet = &Set{}

// Revises reports whether t was made from the other table, or from one that was,
// with Revise: chains and sets then have the same numbers in both.
func (t *Table) Revises(o *Table) bool { return t.arena == o.arena }

// SameRules reports whether two rulesets differ in counters at most.
func (rs *Ruleset) SameRules(o *Ruleset) bool {
	if rs.Torn != o.Torn || !slices.Equal(rs.Unreadable, o.Unreadable) || len(rs.Tables) != len(o.Tables) {
		return false
	}
	for i, t := range rs.Tables {
		if !t.sameRules(o.Tables[i]) {
			return false
		}
	}
	return true
}

func (t *Table) sameRules(o *Table) bool {
	if t == o {
		return true
	}
	if !t.Same(o) {
		return false
	}
	if !t.Revises(o) {
		return t.Digest() == o.Digest()
	}
	if len(t.order) != len(o.order) || len(t.sets) != len(o.sets) {
		return false
	}
	for i, id := range t.order {
		if o.order[i] != id || t.chains[id].version != o.chains[id].version {
			return false
		}
	}
	return slices.Equal(t.sets, o.sets)
}

// sameRules compares chains of one line of tables.
func (c *Chain) sameRules(o *Chain) bool {
	return slices.Equal(c.starts, o.starts) && slices.Equal(c.exprs, o.exprs) && bytes.Equal(c.text, o.text) &&
		slices.Equal(c.wide, o.wide) && slices.EqualFunc(c.choices, o.choices, slices.Equal[[]Choice]) && c.Base.same(o.Base)
}

func (b *Base) same(o *Base) bool {
	if b == nil || o == nil {
		return b == o
	}
	return b.Hook == o.Hook && b.Priority == o.Priority && b.Type == o.Type && b.Policy == o.Policy
}

// AppendContent appends what the i-th rule says to b: the same bytes for the same
// rules in chains of one line of tables. Counters are left out.
func (c *Chain) AppendContent(b []byte, i int) []byte {
	for _, e := range c.Rule(i) {
		b = append(b, byte(e.Kind), e.Flags, byte(e.N>>8), byte(e.N))
		switch {
		case hasText(e.Kind):
			b = binary.BigEndian.AppendUint32(b, e.B)
			b = append(b, c.Text(e)...)
		case c.family == IPv6 && (e.Kind == Source || e.Kind == Destination || e.Kind == DNAT && e.B != 0):
			w := c.wide[e.A]
			addr, mask := w.addr.As16(), [16]byte{}
			if w.mask.IsValid() {
				mask = w.mask.As16()
			}
			b = append(append(b, addr[:]...), mask[:]...)
		case e.Kind == Choose:
			b = binary.BigEndian.AppendUint32(b, e.B)
			for _, choice := range c.choices[e.A] {
				v := choice.Verdict
				b = binary.BigEndian.AppendUint32(b, choice.Count)
				b = append(b, byte(v.Kind), v.Flags, byte(v.N>>8), byte(v.N))
				if v.Kind == DNAT {
					addr := c.Target(v).Addr().AsSlice()
					b = append(b, addr...)
					continue
				}
				b = binary.BigEndian.AppendUint32(b, v.A)
			}
		default:
			b = binary.BigEndian.AppendUint32(b, e.A)
			b = binary.BigEndian.AppendUint32(b, e.B)
		}
	}
	return b
}

// Equal reports whether two sets of tables of one line hold the same.
func (s *Set) Equal(o *Set) bool {
	return s.Name == o.Name && s.Map == o.Map && s.Dynamic == o.Dynamic && s.Timeout == o.Timeout && s.Opaque == o.Opaque &&
		slices.Equal(s.Keys, o.Keys) && slices.Equal(s.Ranges, o.Ranges) && maps.Equal(s.elements, o.elements)
}

// arena holds the rules of the chains of a line of tables, in blocks that live
// as long as any chain in them. A hundred thousand small chains otherwise hold
// twice the memory, in pieces that the garbage collector visits one by one.
type arena struct {
	chains []Chain
	starts []uint32
	exprs  []Expr
	text   []byte
	wide   []address
	counts []Counter
}

// keep returns a chain with the rules of the draft.
func (a *arena) keep(draft *Chain) *Chain {
	const chains = 64 // in a block
	if len(a.chains) == cap(a.chains) {
		a.chains = make([]Chain, 0, chains)
	}
	a.chains = append(a.chains, *draft)
	c := &a.chains[len(a.chains)-1]
	c.version = versions.Add(1)
	c.starts, a.starts = put(a.starts, draft.starts)
	c.exprs, a.exprs = put(a.exprs, draft.exprs)
	c.text, a.text = put(a.text, draft.text)
	c.wide, a.wide = put(a.wide, draft.wide)
	c.counts, a.counts = put(a.counts, draft.counts)
	return c
}

// put copies a list into the block, or into a new one when that is full.
func put[T any](block, list []T) (kept, rest []T) {
	const length = 4096
	if len(list) == 0 {
		return nil, block
	}
	if cap(block)-len(block) < len(list) {
		block = make([]T, 0, max(length, len(list)))
	}
	at := len(block)
	block = append(block, list...)
	return block[at:len(block):len(block)], block
}
