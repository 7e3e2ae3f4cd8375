package iptables

import (
	"hash/maphash"
	"slices"
	"sync"

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
	if t.table == nil || t.table.Worn() {
		sum := make(chan uint64, 1)
		go func() { sum <- b.sum(seed) }()
		next := netfilter.NewTable(t.family, t.name, netfilter.BackendLegacy)
		err := t.decode(b, next, nil)
		t.sum = <-sum // in any case: the block is not ours for longer
		return scratch, err
	}
	now := b.sum(seed)
	if now != 0 && now == t.sum && t.sameSets(&b) {
		return t.recount(&b, scratch), nil
	}
	t.sum = now
	return scratch, t.decode(b, t.table.Revise(), t.chains)
}

// decode makes next, with the rules of a block, the table.
func (t *legacyTable) decode(b legacyBlob, next *netfilter.Table, expected []netfilter.ChainID) error {
	d, err := decodeLegacy(b, next, expected)
	if err != nil {
		return err
	}
	if next.Touched() {
		t.table = next
	}
	t.err, t.sets = nil, d.sets
	t.chains, t.starts = slices.Grow(t.chains[:0], len(d.chains)), slices.Grow(t.starts[:0], len(d.chains))
	for _, c := range d.chains {
		t.chains, t.starts = append(t.chains, c.id), append(t.starts, uint32(c.start))
	}
	return nil
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
	// Nearly all chains are as before, which two workers find out. Each waits for
	// memory most of the time.
	var moved [2][]int
	var both sync.WaitGroup
	half := len(t.chains) / 2
	for w, part := range [2][2]int{{0, half}, {half, len(t.chains)}} {
		both.Go(func() {
			for i := part[0]; i < part[1]; i++ {
				if t.moved(b, i) {
					moved[w] = append(moved[w], i)
				}
			}
		})
	}
	both.Wait()
	if moved[0] == nil && moved[1] == nil {
		return counts
	}
	lay := legacyLayoutOf(b.family)
	next := t.table.Revise()
	for _, part := range moved {
		for _, i := range part {
			c := next.ByID(t.chains[i])
			rest := b.entries[t.starts[i]:]
			counts = counts[:0]
			for range c.Len() {
				counts = append(counts, lay.counter(rest))
				rest = rest[xt16(rest, lay.next):]
			}
			next.Recount(c.ID, counts, lay.counter(rest))
		}
	}
	t.table = next
	return counts
}

// moved reports whether a rule of the i-th chain has counted, or its policy.
func (t *legacyTable) moved(b *legacyBlob, i int) bool {
	lay := legacyLayoutOf(b.family)
	c := t.table.ByID(t.chains[i])
	rest := b.entries[t.starts[i]:]
	for k := range c.Len() {
		if n, _ := c.Counter(k); n != lay.counter(rest) {
			return true
		}
		rest = rest[xt16(rest, lay.next):]
	}
	return c.Base != nil && c.Base.Counter != lay.counter(rest)
}
