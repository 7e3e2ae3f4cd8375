package iptables

import (
	"hash/maphash"
	"slices"

	"github.com/natlens/natlens/pkg/netfilter"
)

// This file keeps a legacy table from one reading to the next. A block in which
// nothing but counters differs from the last one is not decoded:
//
//	block ──sum──▶ the same ─────▶ counters of each chain
//	           └─▶ another one ──▶ decodeLegacy

// legacyTable is a table, as it was last read.
type legacyTable struct {
	family netfilter.Family
	name   string
	size   int              // of its entries
	table  *netfilter.Table // nil when it could not be read
	err    error            // why
	sum    uint64           // of the block, but for the counters in it; of err, if there is one

	chains []netfilter.ChainID
	starts []uint32          // of their rules in the block
	sets   map[uint16]string // the IP sets that the rules know by number, and their names
}

// take makes a block the table. The scratch memory for counters is returned for
// the next time.
func (t *legacyTable) take(b legacyBlob, seed maphash.Seed, scratch []netfilter.Counter) ([]netfilter.Counter, error) {
	sum := b.sum(seed)
	if t.table != nil && sum != 0 && sum == t.sum && t.sameSets(&b) {
		return t.recount(&b, scratch), nil
	}
	last := t.table
	if last == nil || last.Worn() {
		last = netfilter.NewTable(t.family, t.name, netfilter.BackendLegacy)
		t.chains = t.chains[:0]
	}
	next := last.Revise()
	d, err := decodeLegacy(b, next, t.chains)
	if err != nil {
		return scratch, err
	}
	if next.Touched() || t.table == nil {
		t.table = next
	}
	t.sum, t.err, t.sets = sum, nil, d.sets
	t.chains, t.starts = t.chains[:0], t.starts[:0]
	for _, c := range d.chains {
		t.chains, t.starts = append(t.chains, c.id), append(t.starts, uint32(c.start))
	}
	return scratch, nil
}

// fail notes why there is no table.
func (t *legacyTable) fail(err error, seed maphash.Seed) {
	*t = legacyTable{family: t.family, name: t.name, size: t.size, err: err, sum: maphash.String(seed, err.Error())}
}

// sum tells a block from others that differ in more than counters; 0 for one that
// does not fit together.
func (b *legacyBlob) sum(seed maphash.Seed) uint64 {
	const prime = 1099511628211
	lay := legacyLayoutOf(b.family)
	sum := maphash.Comparable(seed, b.legacyInfo)
	for rest := b.entries; len(rest) > 0; {
		if len(rest) < lay.size {
			return 0
		}
		next := int(xt16(rest, lay.next))
		if next < lay.size || next > len(rest) {
			return 0
		}
		// In between lie comefrom, the kernel's own, and the counters.
		sum = sum*prime ^ maphash.Bytes(seed, rest[:lay.comeFrom])
		sum = sum*prime ^ maphash.Bytes(seed, rest[lay.size:next])
		rest = rest[next:]
	}
	return max(sum, 1)
}

// sameSets reports whether the numbers of IP sets mean the sets that they did.
func (t *legacyTable) sameSets(b *legacyBlob) bool {
	for id, name := range t.sets {
		if now, _ := b.setName(id); now != name {
			return false
		}
	}
	return true
}

// recount takes over the counters of a block that is the same but for these.
func (t *legacyTable) recount(b *legacyBlob, counts []netfilter.Counter) []netfilter.Counter {
	lay := legacyLayoutOf(b.family)
	next := t.table.Revise()
	for i, id := range t.chains {
		c := next.ByID(id)
		counts = slices.Grow(counts[:0], c.Len())
		rest := b.entries[t.starts[i]:]
		for range c.Len() {
			counts = append(counts, lay.counter(rest))
			rest = rest[xt16(rest, lay.next):]
		}
		var policy netfilter.Counter
		if c.Base != nil {
			policy = lay.counter(rest)
		}
		next.Recount(id, counts, policy)
	}
	if next.Touched() {
		t.table = next
	}
	return counts
}
