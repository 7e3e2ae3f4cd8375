package netfilter

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"iter"
	mathbits "math/bits"
	"net/netip"
	"slices"
)

// Backend is the kernel subsystem, and the layout in it, that a table stands in.
type Backend string

// The backends.
const (
	BackendLegacy Backend = "iptables-legacy" // xtables: getsockopt
	BackendNFT    Backend = "iptables-nft"    // nf_tables, written by iptables-nft
)

// Ruleset is everything that was read of a node's netfilter, or of dumps of
// it, at one moment.
type Ruleset struct {
	// Tables stand in the order in which they were read. Of two nat tables of
	// one family at the same hook priority, the first in this order is walked
	// first.
	Tables []*Table
	// Unreadable are the tables that exist but could not be read. No answer
	// about them is ever "no rules".
	Unreadable []Unreadable
	// Torn says that the rules kept changing while they were read, so that
	// parts of it may be older than others.
	Torn bool
	// Partly says that only a part of what has changed was read, so that rules may
	// lead to chains that are newer than they: the next reading tells the rest.
	Partly bool
}

// Unreadable is a table that exists but whose rules the reader cannot tell.
type Unreadable struct {
	Family  Family
	Backend Backend // "" when not known
	Table   string
	Reason  string // for people: what happened, where, and what to do
}

// Merge puts several rulesets together, such as those of several dumps of one
// node. The same table twice is an error: which one counts cannot be told.
func Merge(sets ...*Ruleset) (*Ruleset, error) {
	out := &Ruleset{}
	for _, s := range sets {
		for _, t := range s.Tables {
			for _, other := range out.Tables {
				if other.Same(t) {
					return nil, fmt.Errorf("table %q of %v is in two of the dumps", t.Name, t.Family)
				}
			}
			out.Tables = append(out.Tables, t)
		}
		out.Unreadable = append(out.Unreadable, s.Unreadable...)
		out.Torn, out.Partly = out.Torn || s.Torn, out.Partly || s.Partly
	}
	// What one dump could not show, another may.
	out.Unreadable = slices.DeleteFunc(out.Unreadable, func(u Unreadable) bool {
		return slices.ContainsFunc(out.Tables, func(t *Table) bool {
			return t.Family == u.Family && t.Name == u.Table && t.Backend == u.Backend
		})
	})
	return out, nil
}

// Table returns the first table of that family and name, or nil.
func (rs *Ruleset) Table(f Family, name string) *Table {
	for _, t := range rs.Tables {
		if t.Family == f && t.Name == name {
			return t
		}
	}
	return nil
}

// RuleCount returns the number of rules of all tables.
func (rs *Ruleset) RuleCount() int {
	n := 0
	for _, t := range rs.Tables {
		n += t.RuleCount()
	}
	return n
}

// BaseChain is a chain that hangs on a hook.
type BaseChain struct {
	*Chain
	Table *Table
}

// BaseChains returns the chains of the family that hang on each hook, in the
// order in which a packet meets them: by priority, then as the tables stand. All
// nat chains run where the kernel's nat does, whatever their priority, which only
// orders them among themselves (nf_nat_inet_fn in net/netfilter/nf_nat_core.c).
func (rs *Ruleset) BaseChains(f Family) [Postrouting + 1][]BaseChain {
	var out [Postrouting + 1][]BaseChain
	for _, t := range rs.Tables {
		if t.Family != f {
			continue
		}
		for _, id := range t.order {
			if c := t.chains[id]; c.Base != nil && int(c.Base.Hook) < len(out) { // ingress is none of these
				out[c.Base.Hook] = append(out[c.Base.Hook], BaseChain{c, t})
			}
		}
	}
	for _, chains := range out {
		slices.SortStableFunc(chains, func(a, b BaseChain) int {
			return cmp.Or(cmp.Compare(a.Base.at(), b.Base.at()), cmp.Compare(a.Base.Type, b.Base.Type), cmp.Compare(a.Base.Priority, b.Base.Priority))
		})
	}
	return out
}

// at returns the priority at which the kernel runs the chain (enum
// nf_ip_hook_priorities).
func (b *Base) at() int {
	const destination, source = -100, 100
	switch {
	case b.Type != TypeNAT:
		return b.Priority
	case b.Hook == Prerouting || b.Hook == Output:
		return destination
	}
	return source
}

// ChainID is the number of a chain's name within its table. A name has one as
// soon as a rule jumps to it, whether the chain exists or not.
type ChainID uint32

// Table is one table of one family: its chains, by name and number.
type Table struct {
	Family  Family
	Name    string
	Backend Backend

	ids    map[string]ChainID
	newIDs map[string]ChainID // since the table was revised
	names  []string
	chains []*Chain  // by id; nil when only jumps name it
	order  []ChainID // as the chains were declared
	sets   []*Set

	shares   uint8  // what is still that of the table that this one revises
	revised  bool   // new names go to newIDs
	arena    *arena // of the line of tables
	replaced int    // rules of the line that are there no more
	goneSets int    // and sets
}

// NewTable returns an empty table.
func NewTable(f Family, name string, b Backend) *Table {
	return &Table{Family: f, Name: name, Backend: b, ids: make(map[string]ChainID), arena: &arena{}}
}

// Same reports whether another table is this one: of the same family, name and
// backend.
func (t *Table) Same(o *Table) bool {
	return t.Family == o.Family && t.Name == o.Name && t.Backend == o.Backend
}

// ID returns the number of a chain's name, giving it one if need be.
func (t *Table) ID(name string) ChainID {
	if id, ok := t.lookupID(name); ok {
		return id
	}
	return t.number(name)
}

// number gives a new name its number.
func (t *Table) number(name string) ChainID {
	id := ChainID(len(t.names))
	t.ownIDs()
	t.ownChains()
	if t.revised {
		t.newIDs[name] = id
	} else {
		t.ids[name] = id
	}
	t.names = append(t.names, name)
	t.chains = append(t.chains, nil)
	return id
}

// IDOf is ID for a name in a buffer, of which it makes a string only when the
// name is new.
func (t *Table) IDOf(name []byte) ChainID {
	if id, ok := t.Find(name); ok {
		return id
	}
	return t.ID(string(name))
}

// NameAll gives the chains of an empty table their numbers, in the order of their
// names. To find them by name takes longer: wait returns when that can be done, and
// tells the number of a name that is there twice, -1 for none.
func (t *Table) NameAll(names [][]byte) (wait func() (twice int)) {
	all := string(bytes.Join(names, nil)) // one copy of them
	t.names, t.chains, t.order = make([]string, len(names)), make([]*Chain, len(names)), make([]ChainID, 0, len(names))
	for i, name := range names {
		t.names[i], all = all[:len(name)], all[len(name):]
	}
	found := make(chan int, 1)
	go func() {
		twice := -1
		t.ids = make(map[string]ChainID, len(names))
		for i, name := range t.names {
			if _, known := t.ids[name]; known {
				twice = i
			}
			t.ids[name] = ChainID(i)
		}
		found <- twice
	}()
	return func() int { return <-found }
}

// Find returns the number of the name in a buffer, if it has one already. It
// changes nothing, so that several goroutines may look at the same time.
func (t *Table) Find(name []byte) (ChainID, bool) {
	if id, ok := t.newIDs[string(name)]; ok {
		return id, true
	}
	id, ok := t.ids[string(name)]
	return id, ok
}

func (t *Table) lookupID(name string) (ChainID, bool) {
	if id, ok := t.newIDs[name]; ok {
		return id, true
	}
	id, ok := t.ids[name]
	return id, ok
}

// ChainName returns the name that has the number.
func (t *Table) ChainName(id ChainID) string { return t.names[id] }

// ByID returns the chain of that number; nil means that rules jump to it but
// that it is not there.
func (t *Table) ByID(id ChainID) *Chain { return t.chains[id] }

// Lookup returns the chain of that name, or nil.
func (t *Table) Lookup(name string) *Chain {
	if id, ok := t.lookupID(name); ok {
		return t.chains[id]
	}
	return nil
}

// Declare returns the chain of that name, making it if need be.
func (t *Table) Declare(name string) *Chain {
	id := t.ID(name)
	if t.chains[id] == nil {
		t.ownChains()
		t.chains[id] = &Chain{Name: t.names[id], ID: id, family: t.Family, version: versions.Add(1)}
		t.order = append(t.order, id)
	}
	return t.chains[id]
}

// Chains goes through the chains in the order of their declaration.
func (t *Table) Chains() iter.Seq[*Chain] {
	return func(yield func(*Chain) bool) {
		for _, id := range t.order {
			if !yield(t.chains[id]) {
				return
			}
		}
	}
}

// ChainCount returns how many chains there are.
func (t *Table) ChainCount() int { return len(t.order) }

// AddSet adds a set or map, and returns its number.
func (t *Table) AddSet(s *Set) uint32 {
	t.ownSets()
	t.sets = append(t.sets, s)
	return uint32(len(t.sets) - 1)
}

// Set returns the set or map with a number.
func (t *Table) Set(n uint32) *Set { return t.sets[n] }

// Sets returns all sets and maps, by number.
func (t *Table) Sets() []*Set { return t.sets }

// NameCount returns how many chain names have a number: a slice of this length
// can be indexed by any [ChainID] of the table.
func (t *Table) NameCount() int { return len(t.names) }

// RuleCount returns the number of rules of the table.
func (t *Table) RuleCount() int {
	n := 0
	for _, id := range t.order {
		n += t.chains[id].Len()
	}
	return n
}

// Compact moves the rules of all chains into a few blocks without spare room.
// Readers call it once, when the table is complete: a hundred thousand small
// chains otherwise hold twice the memory, in pieces that the garbage collector
// has to visit one by one. Chains that were adopted are in blocks already.
func (t *Table) Compact() {
	var rules, exprs, text, wide, counts int
	for _, id := range t.order {
		c := t.chains[id]
		rules, exprs, text = rules+len(c.starts), exprs+len(c.exprs), text+len(c.text)
		wide, counts = wide+len(c.wide), counts+len(c.counts)
	}
	starts, allExprs, allText := make([]uint32, 0, rules), make([]Expr, 0, exprs), make([]byte, 0, text)
	allWide, allCounts := make([]address, 0, wide), make([]Counter, 0, counts)
	for _, id := range t.order {
		c := t.chains[id]
		c.starts, starts = move(starts, c.starts)
		c.exprs, allExprs = move(allExprs, c.exprs)
		c.text, allText = move(allText, c.text)
		c.wide, allWide = move(allWide, c.wide)
		c.counts, allCounts = move(allCounts, c.counts)
	}
}

// Digest returns a number that is the same for the same rules, whatever they
// have counted, and almost surely another for others.
func (t *Table) Digest() uint64 {
	h := digest(14695981039346656037) // FNV-1a, by words
	h.text(t.Name)
	h.word(uint64(t.Family))
	for _, id := range t.order {
		c := t.chains[id]
		h.text(c.Name)
		if c.Base != nil {
			h.word(uint64(c.Base.Type)<<40 | uint64(c.Base.Policy)<<32 | uint64(c.Base.Hook)<<16 | uint64(uint16(c.Base.Priority)))
		}
		for _, at := range c.starts {
			h.word(uint64(at))
		}
		for _, e := range c.exprs {
			h.word(uint64(e.Kind)<<56 | uint64(e.Flags)<<48 | uint64(e.N)<<32 | uint64(e.A))
			h.word(uint64(e.B))
			if e.Kind == Jump || e.Kind == Goto {
				h.text(t.names[e.A])
			}
		}
		h.text(string(c.text))
		for _, w := range c.wide {
			h.text(w.addr.String() + "/" + w.mask.String())
		}
		for _, list := range c.choices {
			for _, choice := range list {
				h.word(uint64(choice.Count)<<32 | uint64(choice.Verdict.A))
				h.word(uint64(choice.Verdict.Kind)<<32 | uint64(choice.Verdict.N))
			}
		}
	}
	for _, s := range t.sets {
		h.text(s.Name)
		for _, k := range s.Keys {
			h.text(fmt.Sprint(k, s.elements[k]))
		}
		h.text(fmt.Sprint(s.Ranges))
	}
	return uint64(h)
}

type digest uint64

func (h *digest) word(w uint64) {
	const prime = 1099511628211
	*h = (*h ^ digest(w&0xffffffff)) * prime
	*h = (*h ^ digest(w>>32)) * prime
}

func (h *digest) text(s string) {
	const prime = 1099511628211
	for i := range len(s) {
		*h = (*h ^ digest(s[i])) * prime
	}
	h.word(uint64(len(s)))
}

// move appends list to block, and returns the copy and the longer block. An
// empty list stays what it was: nil counters mean that there are none.
func move[T any](block, list []T) (moved, longer []T) {
	if len(list) == 0 {
		return list, block
	}
	at := len(block)
	block = append(block, list...)
	return block[at:len(block):len(block)], block
}

// ChainType is what a base chain may do (struct nft_chain_type).
type ChainType uint8

// The chain types. A nat chain is asked once per connection.
const (
	TypeFilter ChainType = iota
	TypeNAT
)

// Base is what ties a chain to a hook.
type Base struct {
	Hook     Hook
	Priority int // lower runs first (enum nf_ip_hook_priorities)
	Type     ChainType
	Policy   Kind // Accept or Drop: what happens to a packet at the chain's end
	// Counter counts the packets that met the policy.
	Counter Counter
}

// Counter counts what matched a rule since it was written.
type Counter struct {
	Packets, Bytes uint64
}

// Chain is a list of rules. Readers build it with [Chain.Add] and [Chain.End];
// after its table is published it does not change.
type Chain struct {
	// What walks need of a hundred thousand chains stands together.
	ID     ChainID
	family Family
	starts []uint32 // start of each rule in exprs
	exprs  []Expr

	Name string
	Base *Base // nil for a chain that only jumps enter

	version uint64
	text    []byte    // pool of the texts that exprs point to
	wide    []address // pool of IPv6 addresses and masks
	counts  []Counter // one per rule, or nil when the source has none
	open    uint32    // start of the rule that Add is building
	// choices are those of the chain's Choose expressions.
	choices [][]Choice
}

type address struct{ addr, mask netip.Addr }

// Len returns the number of rules.
func (c *Chain) Len() int { return len(c.starts) }

// Rule returns the expressions of the i-th rule, counted from 0. The slice
// belongs to the chain.
func (c *Chain) Rule(i int) []Expr {
	end := len(c.exprs)
	if i+1 < len(c.starts) {
		end = int(c.starts[i+1])
	}
	return c.exprs[c.starts[i]:end]
}

// Counter returns the counter of the i-th rule, and false when the source has
// no counters.
func (c *Chain) Counter(i int) (Counter, bool) {
	if len(c.counts) == 0 {
		return Counter{}, false
	}
	return c.counts[i], true
}

// Text returns the text of an expression of this chain. The bytes belong to
// the chain.
func (c *Chain) Text(e Expr) []byte { return c.text[e.A : e.A+e.B] }

// Comment returns the text of the first comment of the i-th rule, or "".
func (c *Chain) Comment(i int) string {
	for _, e := range c.Rule(i) {
		if e.Kind == Comment {
			return string(c.Text(e))
		}
	}
	return ""
}

// Prefix returns address and mask of a Source or Destination. The mask may
// have holes.
func (c *Chain) Prefix(e Expr) (addr, mask netip.Addr) {
	if c.family == IPv6 {
		w := c.wide[e.A]
		return w.addr, w.mask
	}
	return from4(e.A), from4(e.B)
}

// CIDR returns the prefix of a Source or Destination; ok is false when the
// mask has holes.
func (c *Chain) CIDR(e Expr) (p netip.Prefix, ok bool) {
	addr, mask := c.Prefix(e)
	bits := 0
	for _, b := range mask.AsSlice() {
		bits += mathbits.LeadingZeros8(^b)
		if b != 0xff {
			break
		}
	}
	if solid, err := allOnes(mask.Is4()).Prefix(bits); err != nil || solid.Addr() != mask {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(addr, bits), true
}

// Contains reports whether an address lies in the range of a Source or
// Destination, without regard to Not. An address of the other family does not.
func (c *Chain) Contains(e Expr, a netip.Addr) bool {
	if c.family == IPv4 {
		return a.Is4() && to4(a)&e.B == e.A&e.B
	}
	if !a.Is6() {
		return false
	}
	w := c.wide[e.A]
	want, mask, got := w.addr.As16(), w.mask.As16(), a.As16()
	for i := range got {
		if (got[i]^want[i])&mask[i] != 0 {
			return false
		}
	}
	return true
}

// Target returns the address of a DNAT. Port 0 means that the port stays, an
// invalid address that the address stays.
func (c *Chain) Target(e Expr) netip.AddrPort {
	if e.B == 0 {
		return netip.AddrPortFrom(netip.Addr{}, e.N)
	}
	if c.family == IPv6 {
		return netip.AddrPortFrom(c.wide[e.A].addr, e.N)
	}
	return netip.AddrPortFrom(from4(e.A), e.N)
}

// Add appends an expression to the rule under construction.
func (c *Chain) Add(e Expr) { c.exprs = append(c.exprs, e) }

// Mark returns a position in the rule under construction for [Chain.Undo].
func (c *Chain) Mark() int { return len(c.exprs) }

// Undo takes back the expressions added since the mark.
func (c *Chain) Undo(mark int) { c.exprs = c.exprs[:mark] }

// Prepend puts an expression with a text before those added since the mark.
func (c *Chain) Prepend(mark int, k Kind, text []byte) {
	c.AddText(k, 0, 0, text)
	last := c.exprs[len(c.exprs)-1]
	copy(c.exprs[mark+1:], c.exprs[mark:len(c.exprs)-1])
	c.exprs[mark] = last
}

// AddText appends an expression that carries a text.
func (c *Chain) AddText(k Kind, flags uint8, n uint16, text []byte) {
	// Rules of one chain mostly repeat their comment: store it once.
	for i := len(c.exprs) - 1; i >= 0 && i >= len(c.exprs)-8; i-- {
		if e := c.exprs[i]; hasText(e.Kind) && string(c.Text(e)) == string(text) {
			c.Add(Expr{Kind: k, Flags: flags, N: n, A: e.A, B: e.B})
			return
		}
	}
	at := uint32(len(c.text))
	c.text = append(c.text, text...)
	c.Add(Expr{Kind: k, Flags: flags, N: n, A: at, B: uint32(len(text))})
}

// AddPrefix appends a Source or Destination. Both addresses must be of the
// chain's family.
func (c *Chain) AddPrefix(k Kind, flags uint8, addr, mask netip.Addr) error {
	if FamilyOf(addr) != c.family || FamilyOf(mask) != c.family {
		return fmt.Errorf("address %v is not %v", addr, c.family)
	}
	if c.family == IPv4 {
		c.Add(Expr{Kind: k, Flags: flags, A: to4(addr), B: to4(mask)})
		return nil
	}
	c.wide = append(c.wide, address{addr, mask})
	c.Add(Expr{Kind: k, Flags: flags, A: uint32(len(c.wide) - 1)})
	return nil
}

// AddDNAT appends a DNAT to one address (of the chain's family, or invalid
// when only the port changes) and port (0 when only the address changes).
func (c *Chain) AddDNAT(to netip.AddrPort) error {
	e := Expr{Kind: DNAT, N: to.Port()}
	if to.Addr().IsValid() {
		if FamilyOf(to.Addr()) != c.family {
			return fmt.Errorf("address %v is not %v", to.Addr(), c.family)
		}
		e.B = 1
		if c.family == IPv4 {
			e.A = to4(to.Addr())
		} else {
			c.wide = append(c.wide, address{addr: to.Addr()})
			e.A = uint32(len(c.wide) - 1)
		}
	}
	c.Add(e)
	return nil
}

// AddChoose appends a [Choose] among the numbers from 0 to mod-1.
func (c *Chain) AddChoose(mod uint32, choices []Choice) {
	c.choices = append(c.choices, choices)
	c.Add(Expr{Kind: Choose, A: uint32(len(c.choices) - 1), B: mod})
}

// Choices returns the ways of a Choose.
func (c *Chain) Choices(e Expr) []Choice { return c.choices[e.A] }

// DNATTo returns the expression of a DNAT for a [Choice]; AddDNAT does it for a
// rule.
func (c *Chain) DNATTo(to netip.AddrPort) (Expr, error) {
	mark := c.Mark()
	if err := c.AddDNAT(to); err != nil {
		return Expr{}, err
	}
	e := c.exprs[mark]
	c.Undo(mark)
	return e, nil
}

// End closes the rule under construction; counter is nil when the source has
// no counters.
func (c *Chain) End(counter *Counter) {
	if counter != nil {
		for len(c.counts) < len(c.starts) {
			c.counts = append(c.counts, Counter{})
		}
		c.counts = append(c.counts, *counter)
	} else if len(c.counts) > 0 {
		c.counts = append(c.counts, Counter{})
	}
	c.starts = append(c.starts, c.open)
	c.open = uint32(len(c.exprs))
}

func hasText(k Kind) bool {
	switch k {
	case InInterface, OutInterface, Multiport, AddrRange, Recent, Comment, Always, Unknown,
		NoTrack, NoEffect, Queue, Reject, DNATRange, Redirect, SNAT, Masquerade, UnknownTarget:
		return true
	}
	return false
}

func allOnes(is4 bool) netip.Addr {
	if is4 {
		return netip.AddrFrom4([4]byte{0xff, 0xff, 0xff, 0xff})
	}
	var b [16]byte
	for i := range b {
		b[i] = 0xff
	}
	return netip.AddrFrom16(b)
}

func to4(a netip.Addr) uint32 {
	b := a.Unmap().As4()
	return binary.BigEndian.Uint32(b[:])
}

func from4(v uint32) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], v)
	return netip.AddrFrom4(b)
}
