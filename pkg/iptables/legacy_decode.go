package iptables

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/natlens/natlens/pkg/netfilter"
)

// This file decodes what getsockopt(IPT_SO_GET_ENTRIES) returns: all rules of a
// legacy table in one block, as the kernel walks them (struct ipt_entry in
// linux/netfilter_ipv4/ip_tables.h, struct ip6t_entry in
// linux/netfilter_ipv6/ip6_tables.h, the extensions in linux/netfilter/xt_*.h).
//
//	hook_entry[h] ─▶ rule … rule policy     a built-in chain
//	ERROR "KUBE-A"   rule … rule RETURN     a chain of the user
//	ERROR "KUBE-B"   rule … rule RETURN
//	ERROR "ERROR"                           the end
//
// A jump is the offset of the first entry behind the ERROR of its chain. The
// result is the model that Parse makes of what iptables-legacy-save -c prints
// of the same table, text for text.
//
// The matches and targets themselves are decoded by xtDecoder. What follows here
// adds those that only the legacy backend needs, and the text of some more.

// sizeofGetInfo is the length of struct ipt_getinfo, which struct ip6t_getinfo
// equals.
const sizeofGetInfo = 84

// legacyInfo is what struct ipt_getinfo tells about a table.
type legacyInfo struct {
	hooks     uint32    // valid_hooks: bit h is netfilter.Hook h
	entry     [5]uint32 // hook_entry: where the chain of each hook begins
	underflow [5]uint32 // the policy at its end
	count     uint32    // num_entries
	size      int       // of the entries
}

// newLegacyInfo reads sizeofGetInfo bytes.
func newLegacyInfo(b []byte) legacyInfo {
	i := legacyInfo{hooks: xt32(b, 32), count: xt32(b, 76), size: int(xt32(b, 80))}
	for h := range i.entry {
		i.entry[h], i.underflow[h] = xt32(b, 36+4*h), xt32(b, 56+4*h)
	}
	return i
}

// legacyBlob is one table as the kernel returns it.
type legacyBlob struct {
	family netfilter.Family
	table  string
	legacyInfo
	entries []byte
	// setName returns the name of the IP set that the rules know by number
	// only; nil when nobody can be asked.
	setName func(id uint16) (string, bool)
}

// legacyLayout has the offsets of an entry's fields.
type legacyLayout struct {
	address                    int // length of one
	src, dst, srcMask, dstMask int
	in, out, inMask, outMask   int
	protocol, flags, inverted  int
	target, next               int
	comeFrom, packets, bytes   int
	size                       int // the matches follow

	// Bits of flags.
	fragment, goTo, hasProtocol byte
}

func legacyLayoutOf(f netfilter.Family) *legacyLayout {
	if f == netfilter.IPv6 {
		return &legacyLayout6
	}
	return &legacyLayout4
}

// struct ipt_entry, and the flags of struct ipt_ip.
var legacyLayout4 = legacyLayout{
	address: 4, src: 0, dst: 4, srcMask: 8, dstMask: 12,
	in: 16, out: 32, inMask: 48, outMask: 64,
	protocol: 80, flags: 82, inverted: 83,
	target: 88, next: 90, comeFrom: 92, packets: 96, bytes: 104, size: 112,
	fragment: 0x01, goTo: 0x02,
}

// struct ip6t_entry, and the flags of struct ip6t_ip6.
var legacyLayout6 = legacyLayout{
	address: 16, src: 0, dst: 16, srcMask: 32, dstMask: 48,
	in: 64, out: 80, inMask: 96, outMask: 112,
	protocol: 128, flags: 131, inverted: 132,
	target: 140, next: 142, comeFrom: 144, packets: 152, bytes: 160, size: 168,
	goTo: 0x04, hasProtocol: 0x01,
}

// What an entry inverts: IPT_INV_*; IP6T_INV_* are the same.
const (
	legacyNotIn       = 0x01
	legacyNotOut      = 0x02
	legacyNotSrc      = 0x08
	legacyNotDst      = 0x10
	legacyNotFragment = 0x20
	legacyNotProtocol = 0x40
)

// Lengths of linux/netfilter/x_tables.h (struct xt_entry_match, which
// struct xt_entry_target equals) and linux/if.h.
const (
	legacyExtensionSize = 32 // without data
	legacyNameAt        = 2
	legacyRevisionAt    = 31
	ifNameSize          = 16
)

// Verdicts of struct xt_standard_target: -NF_DROP-1 and so on, and XT_RETURN.
// Those from 0 on are jumps.
const (
	legacyDrop   = -1
	legacyAccept = -2
	legacyQueue  = -4
	legacyReturn = -5
)

// legacyErrorTarget (XT_ERROR_TARGET) begins a chain of the user, or ends the
// table.
const legacyErrorTarget = "ERROR"

// legacyExtension is a match or a target of an entry.
type legacyExtension struct {
	name     []byte
	revision uint8
	data     []byte
}

// legacyEntry is one entry, checked to lie within the block.
type legacyEntry struct {
	offset, next int
	head         []byte
	matches      []byte
	target       legacyExtension
}

// legacyChain is where a chain lies: its rules begin at start; the entry at
// last is its policy, or the RETURN at its end.
type legacyChain struct {
	id          netfilter.ChainID
	name        string
	start, last int
	hook        int // -1 for a chain of the user
}

type legacyDecoder struct {
	legacyBlob
	lay    *legacyLayout
	result *netfilter.Table
	chains []legacyChain
	// users finds the chain of the user that begins at an offset, by that divided
	// by slotSize: the chain's ID plus 1, times slotSize, plus what is left of the
	// offset. Jumps are many, and the chains are far apart in memory.
	users []uint32
	named func() int       // waits until all names can be found; see [netfilter.Table.NameAll]
	chain *netfilter.Chain // that the rules at hand go to
	xt    xtDecoder        // of their matches and targets
	text  []byte           // reused
}

// slotSize is less than the shortest entry has.
const slotSize = 128

// legacyDecoded is what decodeLegacy tells besides the rules.
type legacyDecoded struct {
	chains []legacyChain
	sets   map[uint16]string // the IP sets that the rules know by number, and their names
}

// decodeLegacy puts the rules that a block holds into a table, in the place of
// those that it has. It trusts nothing in the block: what does not fit together
// is an error that names the offset.
//
// The chains expected are those of the last time, in their order.
func decodeLegacy(b legacyBlob, into *netfilter.Table, expected []netfilter.ChainID) (*legacyDecoded, error) {
	out := &legacyDecoded{sets: map[uint16]string{}}
	var mu sync.Mutex // guards out and setName
	if ask := b.setName; ask != nil {
		b.setName = func(id uint16) (string, bool) {
			mu.Lock()
			defer mu.Unlock()
			name, ok := ask(id)
			out.sets[id] = name
			return name, ok
		}
	}
	d := legacyDecoder{legacyBlob: b, lay: legacyLayoutOf(b.family), result: into}
	if builtin[b.table] == nil {
		return nil, fmt.Errorf("unknown legacy table %q of %v", b.table, b.family)
	}
	if err := d.findChains(expected); err != nil {
		return nil, err
	}
	bases, err := d.checkChains()
	if err != nil {
		return nil, err
	}
	// Two workers take half of the block each, which is mostly in this order.
	const many = 1000 // chains, for which a second worker is worth its start
	parts := [][]legacyChain{d.chains}
	if len(d.chains) >= many {
		half := max(0, slices.IndexFunc(d.chains, func(c legacyChain) bool { return c.start > len(b.entries)/2 }))
		parts = [][]legacyChain{d.chains[:half], d.chains[half:]}
	}
	errs, done := make([]error, len(parts)), make([]*netfilter.Part, len(parts))
	var workers sync.WaitGroup
	for i, part := range parts {
		done[i] = into.Part()
		workers.Go(func() {
			w := d
			w.chain = &netfilter.Chain{}
			w.xt = xtDecoder{family: b.family, chain: w.chain}
			for _, c := range part {
				if errs[i] = w.rules(&c, bases); errs[i] != nil {
					return
				}
				done[i].Adopt(w.chain)
			}
		})
	}
	workers.Wait()
	if id := d.named(); id >= 0 {
		return nil, d.twice(&d.chains[slices.IndexFunc(d.chains, func(c legacyChain) bool { return int(c.id) == id })])
	}
	for _, err := range errs {
		if err != nil {
			return nil, err // that of the lower offset
		}
	}
	for _, part := range done {
		part.Join()
	}
	out.chains = d.chains
	d.keepOnly()
	return out, nil
}

// rules decodes the rules of a chain into d.chain.
func (d *legacyDecoder) rules(c *legacyChain, bases [5]*netfilter.Base) error {
	d.result.DraftByID(d.chain, c.id)
	if c.hook >= 0 {
		d.chain.Base = bases[c.hook]
	}
	for at := c.start; at < c.last; {
		e, err := d.at(at)
		if err != nil {
			return err
		}
		if err := d.rule(&e); err != nil {
			return err
		}
		at = e.next
	}
	return nil
}

// keepOnly removes the chains that are not in the block, and puts the others in
// order.
func (d *legacyDecoder) keepOnly() {
	there := make([]bool, d.result.NameCount())
	order := make([]netfilter.ChainID, len(d.chains))
	for i, c := range d.chains {
		there[c.id], order[i] = true, c.id
	}
	var gone []netfilter.ChainID
	for i := range there {
		if id := netfilter.ChainID(i); !there[i] && d.result.ByID(id) != nil {
			gone = append(gone, id)
		}
	}
	d.result.Remove(gone...)
	d.result.Arrange(order)
}

func (d *legacyDecoder) corrupt(offset int, format string, args ...any) error {
	return fmt.Errorf("legacy table %q of %v, offset %d of %d: %s", d.table, d.family, offset, len(d.entries), fmt.Sprintf(format, args...))
}

// span returns where the entry at an offset has its target, and where the next
// entry begins, both counted from the offset.
func (d *legacyDecoder) span(offset int) (target, next int, err error) {
	rest := d.entries[offset:]
	if len(rest) < d.lay.size {
		return 0, 0, d.corrupt(offset, "%d bytes are no entry", len(rest))
	}
	target, next = int(xt16(rest, d.lay.target)), int(xt16(rest, d.lay.next))
	if next > len(rest) || target < d.lay.size || target+legacyExtensionSize > next {
		return 0, 0, d.corrupt(offset, "an entry of %d bytes with its target at %d", next, target)
	}
	return target, next, nil
}

// at returns the entry at an offset.
func (d *legacyDecoder) at(offset int) (e legacyEntry, err error) {
	target, next, err := d.span(offset)
	if err != nil {
		return e, err
	}
	rest := d.entries[offset:]
	size := int(xt16(rest, target))
	if size < legacyExtensionSize || target+size > next {
		return e, d.corrupt(offset, "a target of %d bytes at %d in an entry of %d", size, target, next)
	}
	return legacyEntry{
		offset: offset, next: offset + next, head: rest[:d.lay.size],
		matches: rest[d.lay.size:target], target: newLegacyExtension(rest[target : target+size]),
	}, nil
}

func newLegacyExtension(b []byte) legacyExtension {
	return legacyExtension{name: xtString(b[legacyNameAt:legacyRevisionAt]), revision: b[legacyRevisionAt], data: b[legacyExtensionSize:]}
}

// standard returns the verdict of an entry's standard target, the one without
// a name.
func (e *legacyEntry) standard() (verdict int, ok bool) {
	if len(e.target.name) != 0 || len(e.target.data) < 4 {
		return 0, false
	}
	return int(int32(xt32(e.target.data, 0))), true
}

// nextID returns the number of a chain's name, mostly without looking for it: the
// chains stand in the order of the last time, but for a few.
func (d *legacyDecoder) nextID(name []byte, expected *[]netfilter.ChainID) netfilter.ChainID {
	const few = 4
	for i, id := range (*expected)[:min(few, len(*expected))] {
		if d.result.ChainName(id) == string(name) {
			*expected = (*expected)[i+1:]
			return id
		}
	}
	return d.result.IDOf(name)
}

// findChains finds where the chains lie.
func (d *legacyDecoder) findChains(expected []netfilter.ChainID) error {
	hooks := d.hookEntries()
	const large = 1 << 20
	var parts []legacyPart
	if len(d.entries) >= large {
		parts = d.scanHalves(hooks)
	}
	if parts == nil {
		parts = make([]legacyPart, 1)
		if err := d.scan(&parts[0], 0, len(d.entries), hooks); err != nil {
			return err
		}
	}
	count := parts[0].count
	names := parts[0].names
	d.chains = parts[0].chains
	if len(parts) > 1 { // the first has room
		count += parts[1].count
		names, d.chains = append(names, parts[1].names...), append(d.chains, parts[1].chains...)
	}
	switch end := &parts[len(parts)-1]; {
	case !end.ended:
		return d.corrupt(len(d.entries), "the ERROR target at the end is missing")
	case len(end.hooks) > 0:
		return d.corrupt(end.hooks[0].offset, "hook %v enters where no entry begins, or another hook", netfilter.Hook(end.hooks[0].hook))
	case count != d.count:
		return d.corrupt(len(d.entries), "%d entries, and %d were announced", count, d.count)
	}
	d.named = func() int { return -1 }
	if expected == nil {
		d.named = d.result.NameAll(names)
	}
	for i := range d.chains {
		c := &d.chains[i]
		if c.id = netfilter.ChainID(i); expected != nil {
			c.id = d.nextID(names[i], &expected)
		}
		c.name = d.result.ChainName(c.id)
	}
	return nil
}

// hookEntry is where the chain of a hook begins.
type hookEntry struct{ offset, hook int }

// hookEntries returns those of the table, in the order of the block.
func (d *legacyDecoder) hookEntries() []hookEntry {
	var hooks []hookEntry
	for h := range len(d.entry) {
		if d.hooks&(1<<h) != 0 {
			hooks = append(hooks, hookEntry{int(d.entry[h]), h})
		}
	}
	slices.SortFunc(hooks, func(a, b hookEntry) int { return a.offset - b.offset })
	return hooks
}

// legacyPart is what was found in a part of the block.
type legacyPart struct {
	chains []legacyChain // without numbers and names
	names  [][]byte      // of these, in the block
	hooks  []hookEntry   // that were not met
	count  uint32        // of entries
	ended  bool          // the table does
}

// scanHalves scans both halves of a large block at the same time: going from entry
// to entry takes a quarter of all the time. It returns nil where that cannot be.
func (d *legacyDecoder) scanHalves(hooks []hookEntry) []legacyPart {
	middle := d.middle()
	if middle == 0 {
		return nil
	}
	parts := make([]legacyPart, 2)
	upper := slices.IndexFunc(hooks, func(h hookEntry) bool { return h.offset >= middle })
	if upper < 0 {
		upper = len(hooks)
	}
	var errs [2]error
	var both sync.WaitGroup
	both.Go(func() { errs[0] = d.scan(&parts[0], 0, middle, hooks[:upper]) })
	both.Go(func() { errs[1] = d.scan(&parts[1], middle, len(d.entries), hooks[upper:]) })
	both.Wait()
	if errs[0] != nil || errs[1] != nil || len(parts[0].hooks) > 0 {
		return nil
	}
	return parts
}

// middle returns where, behind half of the block, something looks as if a chain
// began; 0 for nowhere. It does if the entries before it end there.
func (d *legacyDecoder) middle() int {
	half := len(d.entries) / 2
	i := bytes.Index(d.entries[half:], []byte(legacyErrorTarget+"\x00"))
	at := half + i - legacyNameAt - d.lay.size
	if i < 0 || at < 0 {
		return 0
	}
	return at
}

// scan walks the entries of a part of the block, which must end with one.
func (d *legacyDecoder) scan(p *legacyPart, from, to int, hooks []hookEntry) error {
	const entriesOfChain = 4 // kube-proxy's chains have some five
	most := min(int(d.count), (len(d.entries)-from)/d.lay.size) / entriesOfChain
	if from > 0 {
		most /= 2
	}
	p.chains, p.names = make([]legacyChain, 0, most), make([][]byte, 0, most)
	open := false // the last of the chains has no end yet
	last := -1
	closeAt := func(at int) error {
		c := &p.chains[len(p.chains)-1]
		if c.last = last; last < c.start {
			return d.corrupt(at, "chain %q ends before it begins", p.names[len(p.names)-1])
		}
		open = false
		return nil
	}
	at := from
	for ; at < to; p.count++ {
		target, size, err := d.span(at)
		if err != nil {
			return err
		}
		next := at + size
		isHook := len(hooks) > 0 && hooks[0].offset == at
		isError := string(d.entries[at+target+legacyNameAt:][:len(legacyErrorTarget)+1]) == legacyErrorTarget+"\x00"
		if open && (isHook || isError) {
			if err := closeAt(at); err != nil {
				return err
			}
		}
		switch {
		case isHook && isError:
			return d.corrupt(at, "a hook enters an ERROR target")
		case isHook:
			p.add(legacyChain{start: at, hook: hooks[0].hook}, []byte(netfilter.Hook(hooks[0].hook).String()))
			hooks, open = hooks[1:], true
		case isError && next == len(d.entries):
			p.ended = true
		case isError:
			e, err := d.at(at)
			if err != nil {
				return err
			}
			p.add(legacyChain{start: next, hook: -1}, xtString(e.target.data))
			open = true
		case !open:
			return d.corrupt(at, "an entry outside of the chains")
		}
		last, at = at, next
	}
	p.hooks = hooks
	switch {
	case at != to:
		return d.corrupt(to, "no entry begins here")
	case open && to < len(d.entries):
		return closeAt(at)
	}
	return nil
}

func (p *legacyPart) add(c legacyChain, name []byte) {
	p.chains, p.names = append(p.chains, c), append(p.names, name)
}

// checkChains brings the chains in the order in which iptables-save prints them:
// the built-in ones, then the user's by name. They mostly stand like that, since
// iptables itself writes them so. It returns what ties those to their hooks.
func (d *legacyDecoder) checkChains() (bases [5]*netfilter.Base, err error) {
	order := func(a, b legacyChain) int {
		switch {
		case a.hook < 0 && b.hook < 0:
			return strings.Compare(a.name, b.name)
		case a.hook < 0:
			return 1
		case b.hook < 0:
			return -1
		}
		return 0
	}
	if !slices.IsSortedFunc(d.chains, order) {
		slices.SortStableFunc(d.chains, order)
	}
	d.users = make([]uint32, len(d.entries)/slotSize+1)
	seen := make([]bool, d.result.NameCount())
	for _, c := range d.chains {
		if c.name == "" || seen[c.id] {
			return bases, d.twice(&c)
		}
		seen[c.id] = true
		e, err := d.at(c.last)
		if err != nil {
			return bases, err
		}
		verdict, ok := e.standard()
		if len(e.matches) > 0 {
			ok = false
		}
		if c.hook < 0 {
			if !ok || verdict != legacyReturn {
				return bases, d.corrupt(c.last, "chain %q does not end with RETURN", c.name)
			}
			d.users[c.start/slotSize] = uint32(c.id+1)*slotSize + uint32(c.start%slotSize)
		} else if bases[c.hook], err = d.base(c, &e, verdict, ok); err != nil {
			return bases, err
		}
	}
	return bases, nil
}

func (d *legacyDecoder) twice(c *legacyChain) error {
	return d.corrupt(c.start, "a second chain %q, or one without a name", c.name)
}

// base returns what ties a chain to its hook; e is its policy.
func (d *legacyDecoder) base(c legacyChain, e *legacyEntry, verdict int, ok bool) (*netfilter.Base, error) {
	base, known := builtin[d.table][c.name]
	if !known {
		return nil, d.corrupt(c.start, "a chain %q, which is not known in this table", c.name)
	}
	if int(d.underflow[c.hook]) != c.last {
		return nil, d.corrupt(c.last, "chain %q does not end with its policy, which stands at %d", c.name, d.underflow[c.hook])
	}
	switch {
	case ok && verdict == legacyAccept:
		base.Policy = netfilter.Accept
	case ok && verdict == legacyDrop:
		base.Policy = netfilter.Drop
	default:
		return nil, d.corrupt(c.last, "the policy of chain %q is neither ACCEPT nor DROP", c.name)
	}
	base.Counter = d.lay.counter(e.head)
	return &base, nil
}

func (l *legacyLayout) counter(entry []byte) netfilter.Counter {
	return netfilter.Counter{
		Packets: binary.NativeEndian.Uint64(entry[l.packets:]),
		Bytes:   binary.NativeEndian.Uint64(entry[l.bytes:]),
	}
}

// rule adds one rule to the chain at hand.
func (d *legacyDecoder) rule(e *legacyEntry) error {
	d.header(e)
	for rest := e.matches; len(rest) > 0; {
		size := 0
		if len(rest) >= legacyExtensionSize {
			size = int(xt16(rest, 0))
		}
		if size < legacyExtensionSize || size > len(rest) {
			return d.corrupt(e.offset, "a match of %d bytes where %d are left", size, len(rest))
		}
		m := newLegacyExtension(rest[:size])
		rest = rest[size:]
		if text, ok := d.moreMatches(m); ok {
			d.text = text
			d.chain.AddText(netfilter.Unknown, 0, 0, text)
		} else if !d.dccp(m) {
			d.xt.match(legacyName(m.name), int(m.revision), m.data)
		}
	}
	if err := d.target(e); err != nil {
		return err
	}
	counter := d.lay.counter(e.head)
	d.chain.End(&counter)
	return nil
}

// add appends an expression with a text.
func (d *legacyDecoder) add(kind netfilter.Kind, format string, args ...any) {
	d.text = fmt.Appendf(d.text[:0], format, args...)
	d.chain.AddText(kind, 0, 0, d.text)
}

// header adds what an entry itself compares (ip_packet_match and
// ip6_packet_match).
func (d *legacyDecoder) header(e *legacyEntry) {
	h := e.head
	inverted, flags := h[d.lay.inverted], h[d.lay.flags]
	not := func(bit byte) uint8 {
		if inverted&bit != 0 {
			return netfilter.Not
		}
		return 0
	}
	d.prefix(netfilter.Source, not(legacyNotSrc), h, d.lay.src, d.lay.srcMask)
	d.prefix(netfilter.Destination, not(legacyNotDst), h, d.lay.dst, d.lay.dstMask)
	d.device(netfilter.InInterface, not(legacyNotIn), h[d.lay.in:][:ifNameSize], h[d.lay.inMask:][:ifNameSize])
	d.device(netfilter.OutInterface, not(legacyNotOut), h[d.lay.out:][:ifNameSize], h[d.lay.outMask:][:ifNameSize])
	d.xt.protocol = ""
	protocol := uint32(xt16(h, d.lay.protocol))
	if protocol != 0 {
		d.xt.protocol = protocolNames[protocol]
		d.chain.Add(netfilter.Expr{Kind: netfilter.ProtocolIs, Flags: not(legacyNotProtocol), A: protocol})
	}
	if flags&d.lay.fragment != 0 {
		d.chain.Add(netfilter.Expr{Kind: netfilter.Fragment, Flags: not(legacyNotFragment)})
	}
	// No program writes these, but the kernel has a meaning for them.
	odd := flags&^(d.lay.fragment|d.lay.goTo|d.lay.hasProtocol) != 0 ||
		inverted&^(legacyNotIn|legacyNotOut|legacyNotSrc|legacyNotDst|legacyNotFragment|legacyNotProtocol) != 0 ||
		inverted&legacyNotFragment != 0 && flags&d.lay.fragment == 0 ||
		d.lay.hasProtocol != 0 && (flags&d.lay.hasProtocol != 0) != (protocol != 0)
	if odd {
		d.add(netfilter.Unknown, "-m ip --undecoded \"flags 0x%02x, inverted 0x%02x\"", flags, inverted)
	}
}

func (d *legacyDecoder) prefix(kind netfilter.Kind, flags uint8, head []byte, at, maskAt int) {
	address, mask := head[at:at+d.lay.address], head[maskAt:maskAt+d.lay.address]
	if flags == 0 && isZero(mask) && isZero(address) {
		return // any
	}
	outside := byte(0)
	for i, b := range address {
		outside |= b &^ mask[i]
	}
	switch {
	case outside != 0: // the kernel compares the whole address, so it never holds
		d.add(netfilter.Unknown, "-m ip --undecoded \"address %x, mask %x\"", address, mask)
	default:
		// It cannot fail: both are of the family.
		_ = d.chain.AddPrefix(kind, flags, d.xt.address(address), d.xt.address(mask))
	}
}

func (d *legacyDecoder) device(kind netfilter.Kind, flags uint8, name, mask []byte) {
	if flags == 0 && isZero(mask) {
		return // any
	}
	text, ok := appendDevice(d.text[:0], name, mask)
	d.text = text
	switch {
	case !ok:
		d.add(netfilter.Unknown, "-m ip --undecoded \"interface %x, mask %x\"", name, mask)
	case len(text) > 0:
		d.chain.AddText(kind, flags, 0, text)
	case flags != 0:
		// No interface is none. It is what "! -i +" makes, which iptables-save
		// leaves out, so that it prints another rule.
		d.chain.AddText(kind, flags, 0, []byte("+"))
	}
}

// appendDevice writes the name of an interface, or nothing for any. The mask
// says which bytes count: the NUL behind a whole name does, that behind a
// prefix does not.
func appendDevice(dst, name, mask []byte) (text []byte, ok bool) {
	n := 0
	for n < len(mask) && mask[n] == 0xff {
		n++
	}
	end := bytes.IndexByte(name[:n], 0)
	switch {
	case !isZero(mask[n:]) || end == 0 || end < 0 && n == len(mask):
		return dst, false
	case n == 0:
		return dst, true
	case end < 0:
		return append(append(dst, name[:n]...), '+'), true
	}
	return append(dst, name[:end]...), isZero(name[end:n]) && name[end-1] != '+'
}

// target adds what a rule does.
func (d *legacyDecoder) target(e *legacyEntry) error {
	if t := e.target; len(t.name) > 0 {
		if !d.moreTargets(t) {
			d.xt.target(legacyName(t.name), int(t.revision), t.data)
		}
		return nil
	}
	verdict, ok := e.standard()
	kind := netfilter.Jump
	switch {
	case !ok:
		return d.corrupt(e.offset, "a standard target of %d bytes", len(e.target.data)+legacyExtensionSize)
	case verdict == e.next: // no target: on to the next rule
		return nil
	case verdict == legacyAccept:
		kind = netfilter.Accept
	case verdict == legacyDrop:
		kind = netfilter.Drop
	case verdict == legacyReturn:
		kind = netfilter.Return
	case verdict == legacyQueue:
		d.add(netfilter.Queue, "QUEUE")
		return nil
	case verdict < 0:
		d.add(netfilter.UnknownTarget, "STANDARD --undecoded \"verdict %d\"", verdict)
		return nil
	}
	if kind != netfilter.Jump {
		d.chain.Add(netfilter.Expr{Kind: kind})
		return nil
	}
	if verdict >= len(d.entries) {
		return d.corrupt(e.offset, "a jump to %d, which is outside of the table", verdict)
	}
	chain := d.users[verdict/slotSize]
	if chain < slotSize || chain%slotSize != uint32(verdict%slotSize) {
		return d.corrupt(e.offset, "a jump to %d, where no chain begins", verdict)
	}
	if e.head[d.lay.flags]&d.lay.goTo != 0 {
		kind = netfilter.Goto
	}
	d.chain.Add(netfilter.Expr{Kind: kind, A: chain/slotSize - 1})
	return nil
}

// legacyName returns the name of an extension, without making a string of the
// usual ones.
func legacyName(b []byte) string {
	for _, name := range legacyUsual {
		if string(b) == name {
			return name
		}
	}
	return string(b)
}

// The extensions of kube-proxy's rules, the most frequent ones first.
var legacyUsual = [...]string{"comment", "tcp", "statistic", "udp", "DNAT", "MARK", "recent", "mark", "addrtype", "conntrack", "MASQUERADE"}

// moreMatches returns the text of a match that xtDecoder does not know, or not
// with such options. None of them can be decided.
func (d *legacyDecoder) moreMatches(m legacyExtension) (text []byte, ok bool) {
	switch string(m.name) {
	case "conntrack":
		return d.conntrack(m)
	case "addrtype":
		return d.addrTypeOfInterface(m)
	case "physdev":
		return d.physdev(m)
	case "set":
		return d.set(m)
	case "owner", "dscp", "tos", "helper", "socket", "esp", "icmp6", "tcpmss", "connbytes", "connlimit":
		return d.simpleMatch(m)
	}
	return nil, false
}

// dccp adds a match of struct xt_dccp_info, and reports whether it was one: the
// range of destination ports, that of source ports, flags, invflags.
func (d *legacyDecoder) dccp(m legacyExtension) bool {
	const source, dest = 0x01, 0x02 // the others are kinds of packets
	if string(m.name) != "dccp" || m.revision != 0 || len(m.data) < 15 || d.xt.protocol != "dccp" {
		return false
	}
	flags, inverted := xt16(m.data, 8), xt16(m.data, 10)
	if flags&^(source|dest) != 0 || inverted&^flags != 0 {
		return false
	}
	start := d.chain.Mark()
	add := func(kind netfilter.Kind, flag uint16, at int) {
		if flags&flag != 0 {
			d.xt.add(start, netfilter.Expr{Kind: kind, Flags: xtNot32(uint32(inverted & flag)), A: uint32(xt16(m.data, at)), B: uint32(xt16(m.data, at+2))})
		}
	}
	add(netfilter.SourcePort, source, 4)
	add(netfilter.DestinationPort, dest, 0)
	return d.xt.ofProtocol(start, "dccp")
}

// conntrack decodes struct xt_conntrack_mtinfo1 to 3: eight addresses and
// masks, expires_min and _max, l4proto, four ports, match_flags, invert_flags;
// then state and status, of one byte each in revision 1; then, in revision 3,
// the ends of the ranges of ports.
func (d *legacyDecoder) conntrack(m legacyExtension) (text []byte, ok bool) {
	// XT_CONNTRACK_*; there are four addresses, and four ports.
	const state, protocol, address, status, expires, port, direction, alias = 1 << 0, 1 << 1, 1 << 2, 1 << 6, 1 << 7, 1 << 8, 1 << 12, 1 << 13
	const expiresAt, protocolAt, portsAt, flagsAt, invertedAt, stateAt, highPortsAt = 128, 136, 138, 146, 148, 150, 154
	sizes := xtSizes["conntrack"]
	if int(m.revision) >= len(sizes) || sizes[m.revision] == 0 || len(m.data) < sizes[m.revision] || m.revision == 3 && len(m.data) < 162 {
		return nil, false
	}
	flags, inverted := xt16(m.data, flagsAt), xt16(m.data, invertedAt)
	if flags&^(state|alias) == 0 {
		return nil, false // it is decided, not only printed
	}
	stateBits, statusBits := uint32(m.data[stateAt]), uint32(m.data[stateAt+1])
	if m.revision > 1 {
		stateBits, statusBits = uint32(xt16(m.data, stateAt)), uint32(xt16(m.data, stateAt+2))
	}
	states, ok := xtCTState(stateBits)
	if !ok || flags&^alias >= 1<<13 || statusBits >= 1<<len(ctStatuses) {
		return nil, false
	}
	dst := append(d.text[:0], "-m conntrack"...)
	has := func(bit uint16, option string) bool {
		if flags&bit == 0 {
			return false
		}
		dst = append(append(append(append(dst, ' '), inversion(inverted&bit != 0)...), option...), ' ')
		return true
	}
	if has(state, "--ctstate") {
		dst = appendNames(dst, states, ctStates)
	}
	if has(protocol, "--ctproto") {
		dst = fmt.Append(dst, xt16(m.data, protocolAt))
	}
	for i, option := range [...]string{"--ctorigsrc", "--ctorigdst", "--ctreplsrc", "--ctrepldst"} {
		if has(address<<i, option) {
			dst = appendAddr(dst, d.xt.address(m.data[32*i:]))
			dst = appendMask(dst, d.xt.address(m.data[32*i+16:]))
		}
	}
	for i, option := range [...]string{"--ctorigsrcport", "--ctorigdstport", "--ctreplsrcport", "--ctrepldstport"} {
		if !has(port<<i, option) {
			continue
		}
		low := binary.BigEndian.Uint16(m.data[portsAt+2*i:])
		high := low
		if m.revision == 3 {
			low, high = xt16(m.data, portsAt+2*i), xt16(m.data, highPortsAt+2*i)
		}
		dst = appendRange(dst, uint64(low), uint64(high))
	}
	if has(status, "--ctstatus") {
		dst = appendNames(dst, statusBits, ctStatuses)
	}
	if has(expires, "--ctexpire") {
		dst = appendRange(dst, uint64(xt32(m.data, expiresAt)), uint64(xt32(m.data, expiresAt+4)))
	}
	switch {
	case flags&direction == 0:
	case inverted&direction == 0:
		dst = append(dst, " --ctdir ORIGINAL"...)
	default:
		dst = append(dst, " --ctdir REPLY"...)
	}
	return dst, true
}

// ctStatuses are the names of conntrack --ctstatus, at their bit (IPS_* in
// linux/netfilter/nf_conntrack_common.h).
var ctStatuses = []string{"EXPECTED", "SEEN_REPLY", "ASSURED", "CONFIRMED"}

// addrTypeOfInterface decodes struct xt_addrtype_info_v1 where it asks for the
// type as seen from one interface.
func (d *legacyDecoder) addrTypeOfInterface(m legacyExtension) (text []byte, ok bool) {
	const notSource, notDest, in, out = 0x01, 0x02, 0x04, 0x08
	if m.revision != 1 || len(m.data) < 8 {
		return nil, false
	}
	source, dest, flags := uint32(xt16(m.data, 0)), uint32(xt16(m.data, 2)), xt32(m.data, 4)
	if flags&(in|out) == 0 || flags >= 1<<4 || source|dest >= 1<<len(addrTypes) {
		return nil, false
	}
	dst := append(d.text[:0], "-m addrtype"...)
	if source != 0 {
		dst = appendNames(append(append(append(dst, ' '), inversion(flags&notSource != 0)...), "--src-type "...), source, addrTypes)
	}
	if dest != 0 {
		dst = appendNames(append(append(append(dst, ' '), inversion(flags&notDest != 0)...), "--dst-type "...), dest, addrTypes)
	}
	if flags&in != 0 {
		dst = append(dst, " --limit-iface-in"...)
	}
	if flags&out != 0 {
		dst = append(dst, " --limit-iface-out"...)
	}
	return dst, true
}

// physdev decodes struct xt_physdev_info where it asks for more than
// --physdev-is-in: two names with their masks, invert, bitmask.
func (d *legacyDecoder) physdev(m legacyExtension) (text []byte, ok bool) {
	const in, out, bridged, isIn, isOut = 0x01, 0x02, 0x04, 0x08, 0x10
	if m.revision != 0 || len(m.data) < 66 {
		return nil, false
	}
	inverted, flags := m.data[64], m.data[65]
	if flags == isIn || flags == 0 || flags > 0x1f {
		return nil, false
	}
	dst := append(d.text[:0], "-m physdev"...)
	for _, o := range [...]struct {
		bit  byte
		name string
		at   int // of the name and the mask of the device; -1 for none
	}{{isIn, "--physdev-is-in", -1}, {in, "--physdev-in", 0}, {isOut, "--physdev-is-out", -1}, {out, "--physdev-out", 32}, {bridged, "--physdev-is-bridged", -1}} {
		if flags&o.bit == 0 {
			continue
		}
		dst = append(append(append(dst, ' '), inversion(inverted&o.bit != 0)...), o.name...)
		if o.at >= 0 {
			name, ok := appendDevice(nil, m.data[o.at:][:ifNameSize], m.data[o.at+ifNameSize:][:ifNameSize])
			if !ok || len(name) == 0 {
				return nil, false
			}
			dst = append(append(dst, ' '), name...)
		}
	}
	return dst, true
}

// set decodes struct xt_set_info_match_v1 to v4, which begin with the number of
// the set, that of its dimensions, and a bit for each that says "src". The name
// of the set is known to the kernel's ipset only.
func (d *legacyDecoder) set(m legacyExtension) (text []byte, ok bool) {
	const inverted, returnNoMatch, mostDimensions = 0x01, 0x80, 6 // IPSET_INV_MATCH, IPSET_FLAG_RETURN_NOMATCH, IPSET_DIM_MAX
	flags := uint32(0)
	switch {
	case m.revision == 0 || m.revision > 4 || len(m.data) < 4:
		return nil, false
	case m.revision == 2:
		flags = uint32(m.data[3]) & returnNoMatch
	case m.revision >= 3:
		// Counters may be compared too: struct ip_set_counter_match0 has its
		// operation first, struct ip_set_counter_match last.
		operations := [...]int{8, 24}
		if m.revision == 4 {
			operations = [...]int{16, 32}
		}
		if len(m.data) < 44 || m.data[operations[0]]|m.data[operations[1]] != 0 {
			return nil, false
		}
		flags = xt32(m.data, 40)
	}
	dimensions, sources := int(m.data[2]), m.data[3]
	if flags&^returnNoMatch != 0 || dimensions == 0 || dimensions > mostDimensions {
		return nil, false
	}
	id := xt16(m.data, 0)
	option, name := "--match-set", ""
	if d.setName != nil {
		name, ok = d.setName(id)
	}
	if !ok {
		option, name = "--undecoded", fmt.Sprintf("\"set number %d\"", id)
	}
	dst := fmt.Appendf(d.text[:0], "-m set %s%s %s ", inversion(sources&inverted != 0), option, name)
	for i := 1; i <= dimensions; i++ {
		if i > 1 {
			dst = append(dst, ',')
		}
		if sources&(1<<i) != 0 {
			dst = append(dst, "src"...)
		} else {
			dst = append(dst, "dst"...)
		}
	}
	if flags&returnNoMatch != 0 {
		dst = append(dst, " --return-nomatch"...)
	}
	return dst, true
}

// simpleMatch returns the text of matches with a single option or two.
func (d *legacyDecoder) simpleMatch(m legacyExtension) (text []byte, ok bool) {
	data := m.data
	dst := append(append(d.text[:0], "-m "...), m.name...)
	// is tells whether this is the match, in a revision and with a length that
	// are known.
	is := func(name string, from, to uint8, size int) bool {
		return string(m.name) == name && m.revision >= from && m.revision <= to && len(data) >= size
	}
	option := func(not bool, format string, args ...any) ([]byte, bool) {
		dst = fmt.Appendf(append(append(dst, ' '), inversion(not)...), format, args...)
		return dst, true
	}
	switch {
	case is("owner", 1, 1, 18) && data[16] > 0x07: // struct xt_owner_match_info: uid, gid, match, invert
		const uid, gid, socket, groups = 0x01, 0x02, 0x04, 0x08
		match, inverted := data[16], data[17]
		if match > 0x0f {
			return nil, false
		}
		if match&socket != 0 {
			option(inverted&socket != 0, "--socket-exists")
		}
		for i, name := range [...]string{"--uid-owner", "--gid-owner"} {
			if match&(uid<<i) == 0 {
				continue
			}
			from, to := xt32(data, 8*i), xt32(data, 8*i+4)
			if option(inverted&(uid<<i) != 0, "%s %d", name, from); from != to {
				dst = fmt.Appendf(dst, "-%d", to)
			}
		}
		return option(inverted&groups != 0, "--suppl-groups")
	case is("dscp", 0, 0, 2): // struct xt_dscp_info
		return option(data[1] != 0, "--dscp 0x%02x", data[0])
	case is("tos", 1, 1, 3): // struct xt_tos_match_info: tos_mask, tos_value, invert
		return option(data[2] != 0, "--tos 0x%02x/0x%02x", data[1], data[0])
	case is("helper", 0, 0, 34): // struct xt_helper_info
		return option(xt32(data, 0) != 0, "--helper %s", appendQuoted(nil, xtString(data[4:34])))
	case is("socket", 0, 0, 0):
		return dst, true
	case is("socket", 1, 3, 1) && data[0] <= 0x07: // struct xt_socket_mtinfo1 to 3
		for i, name := range [...]string{"--transparent", "--nowildcard", "--restore-skmark"} {
			if data[0]&(1<<i) != 0 {
				option(false, "%s", name)
			}
		}
		return dst, true
	case is("esp", 0, 0, 9): // struct xt_esp
		if low, high := xt32(data, 0), xt32(data, 4); low != 0 || high != 0xffffffff || data[8] != 0 {
			option(data[8] != 0, "--espspi %s", appendRange(nil, uint64(low), uint64(high)))
		}
		return dst, true
	case is("icmp6", 0, 0, 4) && data[0] == 0xff && data[1] == 0 && data[2] == 0xff: // struct ip6t_icmp, which has no "any"
		return option(data[3] != 0, "--icmpv6-type 255")
	case is("tcpmss", 0, 0, 5): // struct xt_tcpmss_match_info
		return option(data[4] != 0, "--mss %s", appendRange(nil, uint64(xt16(data, 0)), uint64(xt16(data, 2))))
	case is("connbytes", 0, 0, 18): // struct xt_connbytes_info: from, to, what, direction
		what, direction := [...]string{"packets", "bytes", "avgpkt"}, [...]string{"original", "reply", "both"}
		if int(data[16]) >= len(what) || int(data[17]) >= len(direction) {
			return nil, false
		}
		from, to := binary.NativeEndian.Uint64(data), binary.NativeEndian.Uint64(data[8:])
		inverted := from > to // the kernel swaps the two
		if option(inverted, "--connbytes %d", min(from, to)); max(from, to) != math.MaxUint64 {
			dst = fmt.Appendf(dst, ":%d", max(from, to))
		}
		return option(false, "--connbytes-mode %s --connbytes-dir %s", what[data[16]], direction[data[17]])
	case is("connlimit", 1, 1, 24): // struct xt_connlimit_info: mask, limit, flags
		n, ok := maskBits(d.xt.address(data))
		if !ok || xt32(data, 20) > 0x03 {
			return nil, false
		}
		name, side := "--connlimit-above", "--connlimit-saddr"
		if xt32(data, 20)&0x01 != 0 {
			name = "--connlimit-upto"
		}
		if xt32(data, 20)&0x02 != 0 {
			side = "--connlimit-daddr"
		}
		return option(false, "%s %d --connlimit-mask %d %s", name, xt32(data, 16), n, side)
	}
	return nil, false
}

// moreTargets adds a target that xtDecoder does not know, or not with such
// options, and reports whether it did.
func (d *legacyDecoder) moreTargets(t legacyExtension) bool {
	switch string(t.name) {
	case "CT":
		return d.ct(t)
	case "CONNMARK": // struct xt_connmark_tginfo2: ctmark, ctmask, nfmask, shift_dir, shift_bits, mode
		if t.revision != 2 || len(t.data) < 15 || t.data[13] == 0 || t.data[14] > 2 {
			return false
		}
		mark, ctMask, nfMask := xt32(t.data, 0), xt32(t.data, 4), xt32(t.data, 8)
		options := fmt.Sprintf("--set-xmark 0x%x/0x%x", mark, ctMask)
		if mode := t.data[14]; mode != 0 {
			options = fmt.Sprintf("--%s-mark --nfmask 0x%x --ctmask 0x%x", [...]string{1: "save", 2: "restore"}[mode], nfMask, ctMask)
		}
		direction := "left"
		if t.data[12] != 0 {
			direction = "right"
		}
		d.add(netfilter.UnknownTarget, "CONNMARK %s --%s-shift-mark %d", options, direction, t.data[13])
		return true
	case "AUDIT": // struct xt_audit_info
		names := [...]string{"accept", "drop", "reject"}
		if t.revision != 0 || len(t.data) < 1 || int(t.data[0]) >= len(names) {
			return false
		}
		d.add(netfilter.NoEffect, "AUDIT --type %s", names[t.data[0]])
		return true
	case "TPROXY": // struct xt_tproxy_target_info_v1: mark_mask, mark_value, laddr, lport
		if t.revision != 1 || len(t.data) < 26 {
			return false
		}
		d.add(netfilter.UnknownTarget, "TPROXY --on-port %d --on-ip %s --tproxy-mark 0x%x/0x%x",
			binary.BigEndian.Uint16(t.data[24:]), appendAddr(nil, d.xt.address(t.data[8:])), xt32(t.data, 4), xt32(t.data, 0))
		return true
	case "NETMAP": // struct nf_nat_ipv4_multi_range_compat, struct nf_nat_range
		from, to, flags := 8, 12, 4
		if d.family == netfilter.IPv6 {
			from, to, flags = 4, 20, 0
		}
		if t.revision != 0 || len(t.data) < to+d.lay.address || xt32(t.data, flags)&^natNetmap != natIPs {
			return false
		}
		// The two ends of a prefix agree where its mask is.
		mask := make([]byte, d.lay.address)
		for i := range mask {
			mask[i] = ^(t.data[from+i] ^ t.data[to+i])
		}
		n, ok := maskBits(d.xt.address(mask))
		if !ok {
			return false
		}
		d.add(netfilter.UnknownTarget, "NETMAP --to %s/%d", appendAddr(nil, d.xt.address(t.data[from:])), n)
		return true
	}
	return false
}

// natNetmap is a flag of struct nf_nat_range that NETMAP sets (NF_NAT_RANGE_NETMAP).
const natNetmap = 1 << 6

// ct decodes struct xt_ct_target_info, and _v1 of revisions 1 and 2: flags,
// zone, ct_events, exp_events, helper, timeout.
func (d *legacyDecoder) ct(t legacyExtension) bool {
	const noTrack, alias, original, reply, mark = 0x01, 0x02, 0x04, 0x08, 0x10
	if t.revision > 2 || len(t.data) < 28 || t.revision > 0 && len(t.data) < 60 {
		d.add(netfilter.UnknownTarget, "CT --undecoded \"revision %d\"", t.revision)
		return true
	}
	flags, zone := xt16(t.data, 0), xt16(t.data, 2)
	events := [...]uint32{xt32(t.data, 4), xt32(t.data, 8)}
	kind := netfilter.NoEffect
	switch {
	case flags > 0x1f || events[0] >= 1<<len(ctEvents) || events[1] >= 1<<len(ctEvents):
		d.add(netfilter.UnknownTarget, "CT --undecoded \"flags 0x%x, events 0x%x and 0x%x\"", flags, events[0], events[1])
		return true
	case flags == noTrack|alias:
		d.add(netfilter.NoTrack, "NOTRACK")
		return true
	case flags&noTrack != 0:
		kind = netfilter.NoTrack
	}
	dst := append(d.text[:0], "CT"...)
	if flags&noTrack != 0 {
		dst = append(dst, " --notrack"...)
	}
	if helper := xtString(t.data[12:28]); len(helper) > 0 {
		dst = append(append(dst, " --helper "...), helper...)
	}
	if t.revision > 0 {
		if timeout := xtString(t.data[28:60]); len(timeout) > 0 {
			dst = append(append(dst, " --timeout "...), timeout...)
		}
	}
	for i, option := range [...]string{" --ctevents ", " --expevents "} {
		if events[i] != 0 {
			dst = appendNames(append(dst, option...), events[i], ctEvents)
		}
	}
	if zone != 0 || flags&mark != 0 {
		switch flags & (original | reply) {
		case original:
			dst = append(dst, " --zone-orig "...)
		case reply:
			dst = append(dst, " --zone-reply "...)
		default:
			dst = append(dst, " --zone "...)
		}
		if flags&mark != 0 {
			dst = append(dst, "mark"...)
		} else {
			dst = fmt.Append(dst, zone)
		}
	}
	d.text = dst
	d.chain.AddText(kind, 0, 0, dst)
	return true
}

// ctEvents are the names of CT --ctevents, at their bit (enum ip_conntrack_events
// in linux/netfilter/nf_conntrack_common.h).
var ctEvents = []string{"new", "related", "destroy", "reply", "assured", "protoinfo", "helper", "mark", "natseqinfo", "secmark"}

// maskBits returns the length of a mask; ok is false when it has holes.
func maskBits(mask netip.Addr) (n int, ok bool) {
	for _, b := range mask.AsSlice() {
		n += bits.LeadingZeros8(^b)
		if b != 0xff {
			break
		}
	}
	solid := netip.IPv6Unspecified()
	if mask.Is4() {
		solid = netip.IPv4Unspecified()
	}
	ones := solid.AsSlice()
	for i := range n {
		ones[i/8] |= 0x80 >> (i % 8)
	}
	return n, bytes.Equal(ones, mask.AsSlice())
}

// appendMask writes a mask behind an address, unless it is that of one address.
func appendMask(dst []byte, mask netip.Addr) []byte {
	n, ok := maskBits(mask)
	switch {
	case !ok:
		return appendAddr(append(dst, '/'), mask)
	case n == mask.BitLen():
		return dst
	}
	return fmt.Append(append(dst, '/'), n)
}

// appendRange writes FROM, or FROM:TO.
func appendRange(dst []byte, from, to uint64) []byte {
	if dst = strconv.AppendUint(dst, from, 10); from != to {
		dst = strconv.AppendUint(append(dst, ':'), to, 10)
	}
	return dst
}

func inversion(not bool) string {
	if not {
		return "! "
	}
	return ""
}

func isZero(b []byte) bool {
	for ; len(b) >= 8; b = b[8:] {
		if binary.NativeEndian.Uint64(b) != 0 {
			return false
		}
	}
	for _, x := range b {
		if x != 0 {
			return false
		}
	}
	return true
}
