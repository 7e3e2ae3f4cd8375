package iptables

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/natlens/natlens/pkg/internal/nfnetlink"
	"github.com/natlens/natlens/pkg/netfilter"
)

// This file decodes rules of nf_tables, as NFT_MSG_GETRULE returns them, into
// the model that Parse makes of iptables-nft-save's text of the same rule.
//
// iptables-nft writes a rule as a list of expressions (linux/netfilter/nf_tables.h):
// loads into registers, comparisons of registers, "match" and "target", which
// wrap a blob of xtables, a counter, and a verdict. Which matches are native
// differs between versions; every form is accepted.
//
// The rule under construction is a list of items, since iptables-save prints -s,
// -d, -i, -o, -p and -f first, and all ports of a rule behind one "-m tcp",
// wherever their expressions stand.
//
// Nothing is guessed: an expression, an attribute or a value that the decoder
// does not know becomes Unknown or UnknownTarget. No length is trusted, and what
// a rule takes in memory is bounded by its length.

// nftItem is a part of the rule under construction.
type nftItem struct {
	what itemKind
	// expr is what will be added, without its text, address or port.
	expr       netfilter.Expr
	from, to   int        // the text, in nftDecoder.text
	addr, mask netip.Addr // of a prefix
	ports      nftPorts
	nat        natRange
	// What xtDecoder decodes: a match or a target.
	name    string
	rawName []byte
	rev     int
	data    []byte
}

type itemKind uint8

const (
	itemExpr     itemKind = iota // expr as it is
	itemText                     // expr with a text
	itemPrefix                   // expr with addr and mask
	itemPorts                    // what stands behind one "-m tcp"
	itemXTMatch                  // a blob
	itemXTTarget                 // a blob
	itemNAT                      // expr is DNAT or SNAT, to nat
	itemPortsNAT                 // expr is Masquerade or Redirect, to nat
	itemQueue                    // to nat.minPort and so on
)

// nftPorts is a match of the transport header.
type nftPorts struct {
	source, dest, flags bool
	not                 [3]uint8 // flags of the Exprs, in that order
	sports, dports      [2]uint16
	mask, comp          uint8
}

// nftValue is what a register holds.
type nftValue struct {
	load nftLoad
	// payload: base, offset, length. meta, ct: key. fib: flags, result.
	a, b, size uint32
	name       string // of any other load
	slot, wide int    // registers, in words of 32 bits
	used       bool
	masked     bool // by a bitwise with this mask and xor
	mask, xor  [16]byte
	data       []byte // immediate
}

type nftLoad uint8

const (
	loadOther nftLoad = iota
	loadPayload
	loadMeta
	loadCT
	loadFIB
	loadImmediate
)

// Attribute types of nf_tables.h, where golang.org/x/sys/unix or this file's
// readers need a number. They are part of the kernel's interface.
const (
	nftaRuleTable, nftaRuleChain, nftaRuleHandle, nftaRuleExpressions, nftaRuleUserData = 1, 2, 3, 4, 7

	nftaExprName, nftaExprData = 1, 2

	nftaListElem = 1

	nftaDataValue, nftaDataVerdict = 1, 2
)

// Payload bases, meta keys, ct keys, fib results and flags, comparisons.
const (
	payloadNetwork, payloadTransport = 1, 2

	metaPriority, metaMark, metaIIFName, metaOIFName = 2, 3, 6, 7
	metaNFTrace, metaSecMark, metaL4Proto            = 12, 14, 16

	ctState, ctStatus, ctMark = 0, 2, 3

	fibSource, fibDest, fibAddrType = 1, 2, 3

	cmpEqual, cmpNotEqual, cmpLess, cmpLessEqual, cmpGreater, cmpGreaterEqual = 0, 1, 2, 3, 4, 5
)

// Verdict codes: those of linux/netfilter.h from 0, of enum nft_verdicts below.
const (
	nfDrop, nfAccept, nfQueue                                = 0, 1, 3
	nftContinue, nftBreak, nftJump, nftGoto, nftReturn int32 = -1, -2, -3, -4, -5
)

// nftDecoder decodes the rules of one table. Its memory is reused from rule to
// rule.
type nftDecoder struct {
	table *netfilter.Table
	xt    xtDecoder
	more  legacyDecoder     // has the text of more matches and targets
	names map[string]string // names of matches and targets, to make each once

	values  []nftValue
	regs    [nfnetlink.Registers]int // index into values, plus 1; 0 when not known
	items   []nftItem
	text    []byte // of the items
	desc    []byte // scratch
	counter netfilter.Counter
	counted int // number of items ahead of the counter
	attrs   [16][]byte
	inner   [8][]byte
}

// newNFTDecoder returns a decoder for the rules of a table.
func newNFTDecoder(t *netfilter.Table) *nftDecoder {
	d := &nftDecoder{
		table: t, xt: xtDecoder{family: t.Family},
		names: map[string]string{},
	}
	d.more = legacyDecoder{legacyBlob: legacyBlob{family: t.Family}, lay: &legacyLayout4, xt: xtDecoder{family: t.Family}}
	if t.Family == netfilter.IPv6 {
		d.more.lay = &legacyLayout6
	}
	return d
}

// rule adds the rule of these expressions (NFTA_RULE_EXPRESSIONS) and user data
// to a chain.
func (d *nftDecoder) rule(c *netfilter.Chain, expressions, userData []byte) {
	d.xt.chain = c
	d.values, d.items, d.text = d.values[:0], d.items[:0], d.text[:0]
	d.regs, d.counter, d.counted = [nfnetlink.Registers]int{}, netfilter.Counter{}, 0
	for len(expressions) > 0 {
		typ, elem, rest, ok := nfnetlink.Next(expressions)
		if !ok {
			d.unclear("list")
			break
		}
		expressions = rest
		if typ != nftaListElem || !nfnetlink.Collect(elem, d.inner[:nftaExprData+1]) || d.inner[nftaExprName] == nil {
			d.unclear("expression")
			continue
		}
		d.expression(nfnetlink.String(d.inner[nftaExprName]), d.inner[nftaExprData])
	}
	for i := d.counted; i < len(d.items); i++ {
		if !d.items[i].isTarget() { // what was counted is not what the rule matches
			d.counter = netfilter.Counter{}
		}
	}
	d.comment(userData)
	d.leftOver()
	d.settle()
	d.emit()
	c.End(&d.counter)
}

// comment reads the comment that iptables up to 1.8.2, and nft, keep in the
// rule's user data. iptables-save prints it behind the other matches.
func (d *nftDecoder) comment(userData []byte) {
	const comment = 0 // NFTNL_UDATA_RULE_COMMENT
	for {
		typ, data, rest, ok := nfnetlink.NextUserData(userData)
		if !ok {
			return
		}
		userData = rest
		if typ == comment && len(data) > 0 {
			d.addText(netfilter.Expr{Kind: netfilter.Comment}, nfnetlink.String(data))
			d.beforeTargets()
		}
	}
}

// collect reads the attributes of an expression into d.attrs, up to type last.
func (d *nftDecoder) collect(b []byte, last int) bool {
	return nfnetlink.Collect(b, d.attrs[:last+1])
}

// number returns a number attribute; absent ones are 0.
func (d *nftDecoder) number(typ int) (v uint32, ok bool) {
	if d.attrs[typ] == nil {
		return 0, true
	}
	return nfnetlink.Uint32(d.attrs[typ])
}

// expression adds one expression. What it does not decode in full is unclear.
func (d *nftDecoder) expression(name, b []byte) {
	ok := true
	switch string(name) {
	case "payload":
		ok = d.payload(b)
	case "meta":
		ok = d.meta(b)
	case "cmp":
		ok = d.cmp(b)
	case "counter":
		ok = d.count(b)
	case "immediate":
		ok = d.immediate(b)
	case "match", "target":
		ok = d.extension(string(name) == "match", b)
	case "bitwise":
		ok = d.bitwise(b)
	case "range":
		ok = d.rangeOf(b)
	case "limit":
		ok = d.limit(b)
	case "log":
		d.log(b)
	case "ct":
		ok = d.ct(b)
	case "fib":
		ok = d.fib(b)
	case "lookup":
		ok = d.lookup(b)
	case "masq", "redir":
		ok = d.masquerade(string(name) == "redir", b)
	case "nat":
		ok = d.nat(b)
	case "reject":
		ok = d.reject(b)
	case "notrack":
		d.addText(netfilter.Expr{Kind: netfilter.NoTrack}, []byte("NOTRACK"))
	case "queue":
		ok = d.queue(b)
	case "last":
		d.addText(netfilter.Expr{Kind: netfilter.NoEffect}, []byte("nft --last"))
	// Loads whose value is not understood, by the number of the attribute that
	// is the destination register.
	case "numgen", "rt", "xfrm", "osf", "exthdr":
		ok = d.other(name, b, 1) // an exthdr without a destination writes
	case "socket", "hash", "tunnel":
		ok = d.other(name, b, 2)
	case "byteorder":
		ok = d.byteOrder(name, b)
	case "quota", "connlimit", "dynset":
		d.unknown(name)
	default:
		ok = false
	}
	if !ok {
		d.unclear(d.intern(name))
	}
}

// unclear adds an expression that may be a match, a statement or a verdict, and
// may write any register.
func (d *nftDecoder) unclear(name string) {
	d.regs = [nfnetlink.Registers]int{}
	d.desc = append(d.desc[:0], name...)
	d.addUndecoded(netfilter.UnknownTarget)
}

// unknown adds a match that is not understood, named by what d.describe and its
// like wrote, or by the arguments.
func (d *nftDecoder) unknown(name []byte) {
	d.desc = append(d.desc[:0], name...)
	d.addUndecoded(netfilter.Unknown)
}

// addUndecoded adds the expression that d.desc names.
func (d *nftDecoder) addUndecoded(kind netfilter.Kind) {
	from := len(d.text)
	if kind == netfilter.Unknown {
		d.text = append(d.text, "-m "...)
	}
	d.text = appendQuoted(append(d.text, "nft --undecoded "...), d.desc)
	d.items = append(d.items, nftItem{what: itemText, expr: netfilter.Expr{Kind: kind}, from: from, to: len(d.text)})
}

func (d *nftDecoder) addText(e netfilter.Expr, text []byte) {
	from := len(d.text)
	d.text = append(d.text, text...)
	d.items = append(d.items, nftItem{what: itemText, expr: e, from: from, to: len(d.text)})
}

func (d *nftDecoder) add(e netfilter.Expr) {
	d.items = append(d.items, nftItem{what: itemExpr, expr: e})
}

// intern returns a name as a string, made once per decoder. There are a few
// dozen; a kernel that sends more is not believed.
func (d *nftDecoder) intern(name []byte) string {
	const most = 256
	if s, ok := d.names[string(name)]; ok {
		return s
	}
	s := string(name)
	if len(d.names) < most {
		d.names[s] = s
	}
	return s
}

// store puts a value of so many bytes into a register.
func (d *nftDecoder) store(register uint32, size int, v nftValue) bool {
	first, ok := nfnetlink.Slot(register)
	if !ok {
		return false
	}
	v.slot, v.wide = first, nfnetlink.Words(size, first)
	d.values = append(d.values, v)
	for i := range v.wide {
		d.regs[first+i] = len(d.values)
	}
	return true
}

// value returns what a register holds, nil when that is not one value of at
// least that many bytes. What it finds counts as used.
func (d *nftDecoder) value(register uint32, size int) *nftValue {
	first, ok := nfnetlink.Slot(register)
	if !ok {
		return nil
	}
	var found *nftValue
	for i := range nfnetlink.Words(size, first) {
		n := d.regs[first+i]
		if n == 0 {
			found = nil
			break
		}
		v := &d.values[n-1]
		v.used = true
		switch {
		case i == 0 && v.slot == first:
			found = v
		case v != found:
			found = nil
		}
	}
	if found == nil || size > 4*found.wide {
		return nil
	}
	return found
}

// leftOver names the loads that nobody used: a load itself may end the rule,
// as that of a field behind the end of the packet does. Loading the name of an
// interface does not; iptables writes that alone for "-i +".
func (d *nftDecoder) leftOver() {
	for i := range d.values {
		v := &d.values[i]
		if v.used || v.load == loadImmediate || v.load == loadMeta && (v.a == metaIIFName || v.a == metaOIFName) {
			continue
		}
		d.desc = v.appendName(d.desc[:0])
		d.addUndecoded(netfilter.Unknown)
		d.beforeTargets()
	}
}

// beforeTargets moves the last item before the targets at the end of the rule:
// it stands in no order to them.
func (d *nftDecoder) beforeTargets() {
	last := len(d.items) - 1
	at := last
	for at > 0 && d.items[at-1].isTarget() {
		at--
	}
	it := d.items[last]
	copy(d.items[at+1:], d.items[at:last])
	d.items[at] = it
}

// payload reads a load from the packet, or a write to it, which is unclear.
func (d *nftDecoder) payload(b []byte) bool {
	const dreg, base, offset, length = 1, 2, 3, 4
	if !d.collect(b, length) {
		return false
	}
	register, ok1 := d.number(dreg)
	v := nftValue{load: loadPayload}
	var ok2, ok3, ok4 bool
	v.a, ok2 = d.number(base)
	v.b, ok3 = d.number(offset)
	v.size, ok4 = d.number(length)
	if !ok1 || !ok2 || !ok3 || !ok4 || v.size == 0 || v.size > 4*nfnetlink.Registers {
		return false
	}
	return d.store(register, int(v.size), v)
}

func (d *nftDecoder) meta(b []byte) bool {
	const dreg, key, sreg = 1, 2, 3
	if !d.collect(b, sreg) {
		return false
	}
	from, ok1 := d.number(sreg)
	register, ok2 := d.number(dreg)
	k, ok3 := d.number(key)
	if !ok1 || !ok2 || !ok3 || d.attrs[key] == nil {
		return false
	}
	if d.attrs[sreg] != nil {
		return d.attrs[dreg] == nil && d.setMeta(k, from)
	}
	v := nftValue{load: loadMeta, a: k}
	switch k {
	case metaL4Proto:
		v.size = 1
	case metaMark:
		v.size = 4
	default: // interface names, and an upper bound for the rest
		v.size = ifNameLength
	}
	return d.store(register, int(v.size), v)
}

// ifNameLength is IFNAMSIZ.
const ifNameLength = 16

// setMeta reads a statement that writes what belongs to the packet.
func (d *nftDecoder) setMeta(key, register uint32) bool {
	switch key {
	case metaNFTrace:
		d.value(register, 1)
		d.addText(netfilter.Expr{Kind: netfilter.NoEffect}, []byte("TRACE"))
		return true
	case metaPriority, metaSecMark:
		d.value(register, 4)
		d.addText(netfilter.Expr{Kind: netfilter.NoEffect}, []byte("nft --set "+metaName(key)))
		return true
	case metaMark:
		return d.setMark(netfilter.SetMark, d.value(register, 4))
	}
	return false
}

// setMark reads "mark set VALUE" and "mark set mark and X xor Y", for the mark
// of the packet or of the connection, and the copy of one to the other.
func (d *nftDecoder) setMark(kind netfilter.Kind, v *nftValue) bool {
	own, other, copies := loadMeta, loadCT, netfilter.RestoreMark
	ownKey, otherKey := uint32(metaMark), uint32(ctMark)
	if kind == netfilter.SetConnMark {
		own, other, copies = loadCT, loadMeta, netfilter.SaveMark
		ownKey, otherKey = ctMark, metaMark
	}
	const all = 0xffffffff
	switch {
	case v == nil:
		return false
	case v.load == loadImmediate && len(v.data) == 4 && !v.masked:
		d.add(netfilter.Expr{Kind: kind, A: binary.NativeEndian.Uint32(v.data), B: all})
	case v.load == own && v.a == ownKey && v.masked:
		d.add(netfilter.Expr{Kind: kind, A: binary.NativeEndian.Uint32(v.xor[:]), B: ^binary.NativeEndian.Uint32(v.mask[:])})
	case v.load == other && v.a == otherKey && !v.masked:
		d.add(netfilter.Expr{Kind: copies, A: all, B: all})
	default:
		return false
	}
	return true
}

func (d *nftDecoder) ct(b []byte) bool {
	const dreg, key, direction, sreg = 1, 2, 3, 4
	if !d.collect(b, sreg) {
		return false
	}
	from, ok1 := d.number(sreg)
	register, ok2 := d.number(dreg)
	k, ok3 := d.number(key)
	if !ok1 || !ok2 || !ok3 || d.attrs[key] == nil {
		return false
	}
	if d.attrs[sreg] != nil {
		return k == ctMark && d.attrs[dreg] == nil && d.setMark(netfilter.SetConnMark, d.value(from, 4))
	}
	v := nftValue{load: loadCT, a: k, size: ifNameLength}
	switch {
	case d.attrs[direction] != nil:
		v.load, v.name = loadOther, "ct of one direction"
	case k == ctState || k == ctStatus || k == ctMark:
		v.size = 4
	}
	return d.store(register, int(v.size), v)
}

func (d *nftDecoder) fib(b []byte) bool {
	const dreg, result, flags = 1, 2, 3
	if !d.collect(b, flags) {
		return false
	}
	v := nftValue{load: loadFIB, size: ifNameLength}
	register, ok1 := d.number(dreg)
	var ok2, ok3 bool
	v.a, ok2 = d.number(flags)
	v.b, ok3 = d.number(result)
	if v.b == fibAddrType {
		v.size = 4
	}
	return ok1 && ok2 && ok3 && d.store(register, int(v.size), v)
}

// other reads a load whose value is not understood.
func (d *nftDecoder) other(name, b []byte, dreg int) bool {
	nfnetlink.Collect(b, d.attrs[:])
	register, ok := d.number(dreg)
	return ok && d.attrs[dreg] != nil && d.store(register, ifNameLength, nftValue{load: loadOther, name: d.intern(name)})
}

func (d *nftDecoder) byteOrder(name, b []byte) bool {
	const sreg = 1
	nfnetlink.Collect(b, d.attrs[:])
	if register, ok := d.number(sreg); ok {
		d.value(register, 4)
	}
	return d.other(name, b, 2)
}

// immediate reads a constant for a register, or a verdict.
func (d *nftDecoder) immediate(b []byte) bool {
	const dreg, data = 1, 2
	if !d.collect(b, data) {
		return false
	}
	register, ok := d.number(dreg)
	if !ok || !nfnetlink.Collect(d.attrs[data], d.inner[:nftaDataVerdict+1]) {
		return false
	}
	value, verdict := d.inner[nftaDataValue], d.inner[nftaDataVerdict]
	switch {
	case register == 0 && verdict != nil && value == nil:
		return d.verdict(verdict)
	case register != 0 && value != nil && verdict == nil:
		return d.store(register, len(value), nftValue{load: loadImmediate, data: value, size: uint32(len(value))})
	}
	return false
}

func (d *nftDecoder) verdict(b []byte) bool {
	const code, chain = 1, 2
	if !nfnetlink.Collect(b, d.inner[:chain+1]) {
		return false
	}
	v, ok := nfnetlink.Uint32(d.inner[code])
	name := nfnetlink.String(d.inner[chain])
	if !ok {
		return false
	}
	switch int32(v) {
	case nftJump, nftGoto:
		if len(name) == 0 {
			return false
		}
		kind := netfilter.Jump
		if int32(v) == nftGoto {
			kind = netfilter.Goto
		}
		d.add(netfilter.Expr{Kind: kind, A: uint32(d.table.IDOf(name))})
	case nftReturn:
		d.add(netfilter.Expr{Kind: netfilter.Return})
	case nfAccept:
		d.add(netfilter.Expr{Kind: netfilter.Accept})
	case nfDrop:
		d.add(netfilter.Expr{Kind: netfilter.Drop})
	case nfQueue:
		d.addText(netfilter.Expr{Kind: netfilter.Queue}, []byte("QUEUE"))
	case nftContinue:
		d.addText(netfilter.Expr{Kind: netfilter.NoEffect}, []byte("nft --continue"))
	default: // NFT_BREAK, or a queue number or an error number in the upper half
		return false
	}
	return true
}

func (d *nftDecoder) count(b []byte) bool {
	const size, packets, pad = 1, 2, 3
	if !d.collect(b, pad) {
		return false
	}
	var ok1, ok2 bool
	d.counter.Bytes, ok1 = nfnetlink.Uint64(d.attrs[size])
	d.counter.Packets, ok2 = nfnetlink.Uint64(d.attrs[packets])
	d.counted = len(d.items)
	return ok1 && ok2
}

// extension reads a match or a target of xtables.
func (d *nftDecoder) extension(isMatch bool, b []byte) bool {
	const name, rev, info = 1, 2, 3 // of NFTA_MATCH_* and NFTA_TARGET_* alike
	if !d.collect(b, info) {
		return false
	}
	r, ok := d.number(rev)
	if !ok || d.attrs[name] == nil || r > 255 {
		return false
	}
	it := nftItem{what: itemXTTarget, rawName: nfnetlink.String(d.attrs[name]), rev: int(r), data: d.attrs[info]}
	it.name = d.intern(it.rawName)
	if isMatch {
		it.what = itemXTMatch
	}
	d.items = append(d.items, it)
	return true
}

// bitwise reads "register = register & mask ^ xor" of a value that had none.
func (d *nftDecoder) bitwise(b []byte) bool {
	const sreg, dreg, length, mask, xor, op = 1, 2, 3, 4, 5, 6
	const maskXor = 0
	if !d.collect(b, op) {
		return false
	}
	from, ok1 := d.number(sreg)
	to, ok2 := d.number(dreg)
	n, ok3 := d.number(length)
	o, ok4 := d.number(op)
	if !ok1 || !ok2 || !ok3 || !ok4 || n == 0 || n > 4*nfnetlink.Registers {
		return false
	}
	v := d.value(from, int(n))
	out := nftValue{load: loadOther, name: "bitwise"}
	m, isMask := dataValue(d.attrs[mask])
	x, isXor := dataValue(d.attrs[xor])
	if v != nil && !v.masked && v.size == n && o == maskXor && isMask && isXor && len(m) == int(n) && len(x) == int(n) && int(n) <= len(out.mask) {
		out = *v
		out.used, out.masked = false, true
		copy(out.mask[:], m)
		copy(out.xor[:], x)
	}
	return d.store(to, int(n), out)
}

// dataValue returns the bytes of an NFTA_DATA_VALUE.
func dataValue(b []byte) ([]byte, bool) {
	typ, data, rest, ok := nfnetlink.Next(b)
	return data, ok && typ == nftaDataValue && len(rest) == 0 && len(data) > 0
}

func (d *nftDecoder) cmp(b []byte) bool {
	const sreg, op, data = 1, 2, 3
	if !d.collect(b, data) {
		return false
	}
	register, ok1 := d.number(sreg)
	o, ok2 := d.number(op)
	with, ok3 := dataValue(d.attrs[data])
	if !ok1 || !ok2 || !ok3 || o > cmpGreaterEqual {
		return false
	}
	v := d.value(register, len(with))
	if v == nil || !d.compare(v, o, with) {
		d.desc = fmt.Appendf(v.appendName(d.desc[:0]), " %s 0x%x", cmpNames[o], with)
		d.addUndecoded(netfilter.Unknown)
	}
	return true
}

var cmpNames = [...]string{"==", "!=", "<", "<=", ">", ">="}

// rangeOf reads a comparison with two bounds.
func (d *nftDecoder) rangeOf(b []byte) bool {
	const sreg, op, from, to = 1, 2, 3, 4
	if !d.collect(b, to) {
		return false
	}
	register, ok1 := d.number(sreg)
	o, ok2 := d.number(op)
	lo, ok3 := dataValue(d.attrs[from])
	hi, ok4 := dataValue(d.attrs[to])
	if !ok1 || !ok2 || !ok3 || !ok4 || o > cmpNotEqual || len(lo) != len(hi) {
		return false
	}
	var flags uint8
	if o == cmpNotEqual {
		flags = netfilter.Not
	}
	v := d.value(register, len(lo))
	if v == nil || !d.within(v, flags, lo, hi) {
		d.desc = fmt.Appendf(v.appendName(d.desc[:0]), " %s 0x%x-0x%x", cmpNames[o], lo, hi)
		d.addUndecoded(netfilter.Unknown)
	}
	return true
}

// within adds the match of a range, if there is one for the value.
func (d *nftDecoder) within(v *nftValue, flags uint8, lo, hi []byte) bool {
	if v.load != loadPayload || v.masked || len(lo) != int(v.size) {
		return false
	}
	if v.a == payloadTransport && v.size == 2 {
		return d.addPorts(v.b, flags, binary.BigEndian.Uint16(lo), binary.BigEndian.Uint16(hi))
	}
	which, kind := d.addressAt(v)
	if kind == 0 || len(lo) != d.addressLength() {
		return false
	}
	from := len(d.text)
	d.text = append(appendAddr(d.text, d.xt.address(lo)), '-')
	d.text = appendAddr(d.text, d.xt.address(hi))
	d.items = append(d.items, nftItem{
		what: itemText, expr: netfilter.Expr{Kind: netfilter.AddrRange, Flags: flags, N: which}, from: from, to: len(d.text),
	})
	return true
}

func (d *nftDecoder) addressLength() int {
	if d.table.Family == netfilter.IPv4 {
		return 4
	}
	return 16
}

// addressAt tells which address of the network header a load begins at; kind is
// 0 for none.
func (d *nftDecoder) addressAt(v *nftValue) (which uint16, kind netfilter.Kind) {
	source, dest := uint32(12), uint32(16) // struct iphdr
	if d.table.Family == netfilter.IPv6 {
		source, dest = 8, 24 // struct ipv6hdr
	}
	switch {
	case v.load != loadPayload || v.a != payloadNetwork:
	case v.b == source:
		return 0, netfilter.Source
	case v.b == dest:
		return 1, netfilter.Destination
	}
	return 0, 0
}

// compare adds the match that a comparison is, if there is one.
func (d *nftDecoder) compare(v *nftValue, op uint32, with []byte) bool {
	var flags uint8
	if op == cmpNotEqual {
		flags = netfilter.Not
	}
	if op > cmpNotEqual {
		return d.comparePort(v, op, with)
	}
	switch v.load {
	case loadPayload:
		return len(with) == int(v.size) && d.comparePayload(v, flags, with)
	case loadMeta:
		return d.compareMeta(v, flags, with)
	case loadCT:
		return d.compareCT(v, flags, with)
	case loadFIB:
		return d.compareFIB(v, flags, with)
	}
	return false
}

func (d *nftDecoder) compareMeta(v *nftValue, flags uint8, with []byte) bool {
	switch {
	case v.a == metaL4Proto && len(with) == 1 && !v.masked:
		d.add(netfilter.Expr{Kind: netfilter.ProtocolIs, Flags: flags, A: uint32(with[0])})
	case v.a == metaMark && len(with) == 4:
		return d.compareMark(netfilter.MarkIs, v, flags, with)
	case v.a == metaIIFName && !v.masked:
		return d.compareInterface(netfilter.InInterface, flags, with)
	case v.a == metaOIFName && !v.masked:
		return d.compareInterface(netfilter.OutInterface, flags, with)
	default:
		return false
	}
	return true
}

// compareMark reads "mark & mask == value", in the machine's byte order.
func (d *nftDecoder) compareMark(kind netfilter.Kind, v *nftValue, flags uint8, with []byte) bool {
	e := netfilter.Expr{Kind: kind, Flags: flags, A: binary.NativeEndian.Uint32(with), B: 0xffffffff}
	if v.masked {
		if v.xor != [16]byte{} {
			return false
		}
		e.B = binary.NativeEndian.Uint32(v.mask[:])
	}
	d.add(e)
	return true
}

// compareInterface reads a name: with a zero byte at its end all of it, without
// one the beginning of it ("eth+").
func (d *nftDecoder) compareInterface(kind netfilter.Kind, flags uint8, with []byte) bool {
	// What iptables compares with when no interface may match: "! -i +".
	const never = "INVAL/D"
	name := nfnetlink.String(with)
	rest := with[len(name):]
	from := len(d.text)
	switch {
	case len(name) == 0 || len(with) > ifNameLength || len(bytes.Trim(rest, "\x00")) > 0:
		return false
	case string(name) == never && len(rest) > 0 && flags == 0:
		d.text, flags = append(d.text, '+'), netfilter.Not
	case len(rest) > 0:
		d.text = append(d.text, name...)
	default:
		d.text = append(append(d.text, name...), '+')
	}
	d.items = append(d.items, nftItem{what: itemText, expr: netfilter.Expr{Kind: kind, Flags: flags}, from: from, to: len(d.text)})
	return true
}

func (d *nftDecoder) compareCT(v *nftValue, flags uint8, with []byte) bool {
	if len(with) != 4 || v.masked && v.xor != [16]byte{} {
		return false
	}
	value := binary.NativeEndian.Uint32(with)
	mask := binary.NativeEndian.Uint32(v.mask[:])
	switch v.a {
	case ctMark:
		return d.compareMark(netfilter.ConnMarkIs, v, flags, with)
	case ctState, ctStatus:
	default:
		return false
	}
	switch {
	case v.masked && value == 0: // "state & mask != 0" is one of them
		flags ^= netfilter.Not
	case !v.masked && v.a == ctState && value&(value-1) == 0: // there is one bit at a time
		mask = value
	default:
		return false
	}
	states, ok := uint32(0), false
	if v.a == ctState {
		states, ok = nftStates(mask)
	} else {
		states, ok = nftStatuses(mask)
	}
	if !ok || states == 0 {
		return false
	}
	d.add(netfilter.Expr{Kind: netfilter.CTState, Flags: flags, A: states})
	return true
}

// nftStates turns bits of NF_CT_STATE_BIT into netfilter.CT bits. Up to NEW
// they are those of xt_conntrack.
func nftStates(mask uint32) (states uint32, ok bool) {
	const untracked, common = 1 << 6, 1<<4 - 1
	states, ok = xtCTState(mask & common)
	if mask&untracked != 0 {
		states |= netfilter.CTUntracked
	}
	return states, ok && mask&^(common|untracked) == 0
}

// nftStatuses turns those bits of enum ip_conntrack_status that iptables calls
// states into netfilter.CT bits.
func nftStatuses(mask uint32) (states uint32, ok bool) {
	const srcNAT, dstNAT = 1 << 4, 1 << 5
	if mask&srcNAT != 0 {
		states |= netfilter.CTSNATed
	}
	if mask&dstNAT != 0 {
		states |= netfilter.CTDNATed
	}
	return states, mask&^(srcNAT|dstNAT) == 0
}

// compareFIB reads the routing type of an address.
func (d *nftDecoder) compareFIB(v *nftValue, flags uint8, with []byte) bool {
	if v.b != fibAddrType || v.masked || len(with) != 4 {
		return false
	}
	rtn := binary.NativeEndian.Uint32(with)
	if rtn >= uint32(len(addrTypes)) {
		return false
	}
	kind := netfilter.SourceType
	switch v.a {
	case fibSource:
	case fibDest:
		kind = netfilter.DestinationType
	default:
		return false
	}
	d.add(netfilter.Expr{Kind: kind, Flags: flags, A: 1 << rtn})
	return true
}

func (d *nftDecoder) comparePayload(v *nftValue, flags uint8, with []byte) bool {
	if v.masked && v.xor != [16]byte{} {
		return false
	}
	if v.a == payloadTransport {
		return d.compareTransport(v, flags, with)
	}
	if _, kind := d.addressAt(v); kind != 0 {
		return d.comparePrefix(kind, v, flags, with)
	}
	if d.table.Family != netfilter.IPv4 || v.a != payloadNetwork {
		return false
	}
	const fragment, protocol = 6, 9 // struct iphdr
	switch {
	case v.b == protocol && v.size == 1 && !v.masked:
		d.add(netfilter.Expr{Kind: netfilter.ProtocolIs, Flags: flags, A: uint32(with[0])})
	case v.b == fragment && v.size == 2 && v.masked && v.mask[0] == 0x1f && v.mask[1] == 0xff && with[0]|with[1] == 0: // an offset of 0
		d.add(netfilter.Expr{Kind: netfilter.Fragment, Flags: flags ^ netfilter.Not})
	default:
		return false
	}
	return true
}

// comparePrefix reads an address and its mask. A prefix of whole bytes is a
// shorter load.
func (d *nftDecoder) comparePrefix(kind netfilter.Kind, v *nftValue, flags uint8, with []byte) bool {
	if int(v.size) > d.addressLength() {
		return false // both addresses at once
	}
	var addr, mask [16]byte
	copy(addr[:], with)
	for i := range v.size {
		mask[i] = 0xff
		if v.masked {
			mask[i] = v.mask[i]
		}
		if addr[i]&^mask[i] != 0 {
			return false // never equal
		}
	}
	d.items = append(d.items, nftItem{
		what: itemPrefix, expr: netfilter.Expr{Kind: kind, Flags: flags}, addr: d.xt.address(addr[:]), mask: d.xt.address(mask[:]),
	})
	return true
}

// compareTransport reads ports and the flags of TCP.
func (d *nftDecoder) compareTransport(v *nftValue, flags uint8, with []byte) bool {
	const tcpFlagsAt = 13 // struct tcphdr
	switch {
	case v.b == tcpFlagsAt && v.size == 1:
		mask := uint8(0xff)
		if v.masked {
			mask = v.mask[0]
		}
		return d.addTCPFlags(flags, mask, with[0])
	case v.masked:
	case v.size == 2:
		port := binary.BigEndian.Uint16(with)
		return d.addPorts(v.b, flags, port, port)
	case v.size == 4 && v.b == 0 && flags == 0: // both ports at once
		source, dest := binary.BigEndian.Uint16(with), binary.BigEndian.Uint16(with[2:])
		return d.addPorts(0, 0, source, source) && d.addPorts(2, 0, dest, dest)
	}
	return false
}

// comparePort reads an order of ports: what is big endian compares as bytes.
func (d *nftDecoder) comparePort(v *nftValue, op uint32, with []byte) bool {
	if v.load != loadPayload || v.a != payloadTransport || v.size != 2 || v.masked || len(with) != 2 {
		return false
	}
	port := binary.BigEndian.Uint16(with)
	lo, hi := uint16(0), uint16(0xffff)
	switch {
	case op == cmpLess && port > 0:
		hi = port - 1
	case op == cmpLessEqual:
		hi = port
	case op == cmpGreater && port < 0xffff:
		lo = port + 1
	case op == cmpGreaterEqual:
		lo = port
	default:
		return false
	}
	// A range may be written as two comparisons.
	for i := range d.items {
		p := &d.items[i].ports
		has, not, old := p.source, p.not[0], &p.sports
		if v.b == 2 {
			has, not, old = p.dest, p.not[1], &p.dports
		}
		if d.items[i].what == itemPorts && has && not == 0 && (v.b == 0 || v.b == 2) && max(lo, old[0]) <= min(hi, old[1]) {
			*old = [2]uint16{max(lo, old[0]), min(hi, old[1])}
			return true
		}
	}
	return d.addPorts(v.b, 0, lo, hi)
}

// protocol returns the protocol that the rule has asked for so far; ok is false
// when it is not settled.
func (d *nftDecoder) protocol() (p uint32, ok bool) {
	for i := range d.items {
		if e := d.items[i].expr; d.items[i].what == itemExpr && e.Kind == netfilter.ProtocolIs && !e.Negated() {
			return e.A, true
		}
	}
	return 0, false
}

// addPorts adds a match of the source port (offset 0) or the destination port
// (2) to those behind one "-m tcp".
func (d *nftDecoder) addPorts(offset uint32, flags uint8, lo, hi uint16) bool {
	switch p, ok := d.protocol(); {
	case !ok || offset != 0 && offset != 2 || lo > hi:
		return false
	default:
		switch p {
		case 6, 17, 33, 132, 136: // tcp, udp, dccp, sctp and udplite begin with the ports
		default:
			return false
		}
	}
	p := d.ports(func(p *nftPorts) bool { return offset == 0 && p.source || offset == 2 && p.dest })
	if offset == 0 {
		p.source, p.not[0], p.sports = true, flags, [2]uint16{lo, hi}
	} else {
		p.dest, p.not[1], p.dports = true, flags, [2]uint16{lo, hi}
	}
	return true
}

func (d *nftDecoder) addTCPFlags(flags, mask, comp uint8) bool {
	if p, ok := d.protocol(); !ok || p != uint32(netfilter.TCP) || mask|comp >= 1<<len(tcpFlags) {
		return false
	}
	p := d.ports(func(p *nftPorts) bool { return p.flags })
	p.flags, p.not[2], p.mask, p.comp = true, flags, mask, comp
	return true
}

// ports returns the rule's match of the transport header, a new one when the
// first that iptables-save would print it with is taken: both must hold then.
func (d *nftDecoder) ports(taken func(*nftPorts) bool) *nftPorts {
	for i := range d.items {
		if it := &d.items[i]; it.what == itemPorts && !taken(&it.ports) {
			return &it.ports
		}
	}
	d.items = append(d.items, nftItem{what: itemPorts, expr: netfilter.Expr{Kind: netfilter.DestinationPort}})
	return &d.items[len(d.items)-1].ports
}

// limit reads the native form of "-m limit".
func (d *nftDecoder) limit(b []byte) bool {
	const rate, unit, burst, kind, flags, pad = 1, 2, 3, 4, 5, 6
	if !d.collect(b, pad) {
		return false
	}
	r, ok1 := nfnetlink.Uint64(d.attrs[rate])
	u, ok2 := nfnetlink.Uint64(d.attrs[unit])
	n, ok3 := d.number(burst)
	k, ok4 := d.number(kind)
	f, ok5 := d.number(flags)
	const scale, longest = 10000, 7 * 24 * 60 * 60
	if !ok1 || !ok2 || !ok3 || !ok4 || !ok5 || k != 0 || f != 0 || r == 0 || u > longest {
		d.unknown([]byte("limit"))
		return true
	}
	d.xt.text = append(d.xt.text[:0], "-m limit"...)
	if !d.xt.limit(scale*u/r, n) {
		d.unknown([]byte("limit"))
		return true
	}
	d.addText(netfilter.Expr{Kind: netfilter.Unknown}, d.xt.text)
	return true
}

// log reads the native form of LOG, and of NFLOG, which has a group.
func (d *nftDecoder) log(b []byte) {
	const group, prefix, size, threshold, level, flags = 1, 2, 3, 4, 5, 6
	effect := netfilter.Expr{Kind: netfilter.NoEffect}
	if !d.collect(b, flags) {
		d.addText(effect, []byte("LOG --undecoded")) // whatever it writes
		return
	}
	text := nfnetlink.String(d.attrs[prefix])
	if len(d.attrs[group]) == 2 {
		copied, _ := d.number(size)
		var queued uint16
		if q := d.attrs[threshold]; len(q) == 2 {
			queued = binary.BigEndian.Uint16(q)
		}
		d.xt.text = append(d.xt.text[:0], "NFLOG"...)
		d.xt.addNFLOG(text, binary.BigEndian.Uint16(d.attrs[group]), copied, copied != 0, queued)
	} else {
		var blob [32]byte // struct xt_log_info
		l, _ := d.number(level)
		f, _ := d.number(flags)
		if d.attrs[level] == nil {
			l = 4 // NFT_LOGLEVEL_WARNING
		}
		blob[0], blob[1] = uint8(l), uint8(f)
		copy(blob[2:], text)
		d.xt.text = append(d.xt.text[:0], "LOG"...)
		d.xt.log(blob[:])
	}
	d.addText(effect, d.xt.text)
}

// lookup reads a search in a set. Sets are not read: it is a match that cannot
// be decided, a load, or a verdict.
func (d *nftDecoder) lookup(b []byte) bool {
	const set, sreg, dreg = 1, 2, 3
	nfnetlink.Collect(b, d.attrs[:])
	name := nfnetlink.String(d.attrs[set])
	from, ok1 := d.number(sreg)
	to, ok2 := d.number(dreg)
	hasDreg := d.attrs[dreg] != nil
	if !ok1 || !ok2 {
		return false
	}
	d.desc = append(d.desc[:0], "lookup"...)
	if first, ok := nfnetlink.Slot(from); ok {
		// How many registers the key takes, only the set tells.
		var last *nftValue
		for i := first; i < nfnetlink.Registers && d.regs[i] != 0; i++ {
			if v := &d.values[d.regs[i]-1]; v != last && !v.used {
				d.desc = v.appendName(append(d.desc, ' '))
				v.used, last = true, v
			}
		}
	}
	d.desc = append(append(d.desc, " in @"...), name[:min(len(name), 256)]...)
	if hasDreg && to == 0 {
		d.addUndecoded(netfilter.UnknownTarget)
		return true
	}
	d.addUndecoded(netfilter.Unknown)
	return !hasDreg || d.store(to, 4*nfnetlink.Registers, nftValue{load: loadOther, name: "lookup", used: true})
}

// port returns the port that a register was given; ok is false when it was not
// given a constant.
func (d *nftDecoder) port(register uint32) (p uint16, ok bool) {
	v := d.value(register, 2)
	if v == nil || v.load != loadImmediate || v.masked || len(v.data) < 2 {
		return 0, false
	}
	return binary.BigEndian.Uint16(v.data), true
}

// portRange reads the registers of a range of ports into a natRange. It returns
// false when they hold no constants.
func (d *nftDecoder) portRange(r *natRange, from, to int) bool {
	if d.attrs[from] == nil {
		return d.attrs[to] == nil
	}
	var ok bool
	r.minPort, r.maxPort, ok = ends(d, from, to, d.port)
	r.flags |= natPorts
	return ok
}

// addrRange is portRange for addresses.
func (d *nftDecoder) addrRange(r *natRange, from, to int) bool {
	if d.attrs[from] == nil {
		return d.attrs[to] == nil
	}
	var ok bool
	r.minAddr, r.maxAddr, ok = ends(d, from, to, d.address)
	r.flags |= natIPs
	return ok
}

// ends reads the registers that two attributes name; without the second, both
// ends are the same.
func ends[T any](d *nftDecoder, from, to int, constant func(register uint32) (T, bool)) (low, high T, ok bool) {
	first, ok1 := d.number(from)
	last, ok2 := first, true
	if d.attrs[to] != nil {
		last, ok2 = d.number(to)
	}
	if !ok1 || !ok2 {
		return low, high, false
	}
	low, ok1 = constant(first)
	high, ok2 = constant(last)
	return low, high, ok1 && ok2
}

// masquerade reads masq or redir.
func (d *nftDecoder) masquerade(redirect bool, b []byte) bool {
	flags, from, to := 1, 2, 3 // NFTA_MASQ_*
	it := nftItem{what: itemPortsNAT, expr: netfilter.Expr{Kind: netfilter.Masquerade}}
	if redirect {
		flags, from, to = 3, 1, 2 // NFTA_REDIR_*
		it.expr.Kind = netfilter.Redirect
	}
	if !d.collect(b, 3) {
		return false
	}
	f, ok := d.number(flags)
	it.nat.flags = f &^ (natIPs | natPorts)
	switch {
	case !ok || it.nat.flags&^(natRandom|natFully|natPersistent) != 0:
		return false
	case d.portRange(&it.nat, from, to):
	case redirect: // to the node itself, but to which port is not known
		d.addText(netfilter.Expr{Kind: netfilter.DNATRange, N: 1}, []byte("--to-ports 1-65535 --undecoded"))
		return true
	default:
		d.addText(it.expr, []byte("--to-ports 1-65535 --undecoded"))
		return true
	}
	d.items = append(d.items, it)
	return true
}

// nat reads dnat and snat.
func (d *nftDecoder) nat(b []byte) bool {
	const kind, family, minAddr, maxAddr, minPort, maxPort, flags = 1, 2, 3, 4, 5, 6, 7
	const snat, dnat = 0, 1
	if !d.collect(b, flags) {
		return false
	}
	k, ok1 := d.number(kind)
	f, ok2 := d.number(flags)
	if !ok1 || !ok2 || k > dnat {
		return false
	}
	it := nftItem{what: itemNAT, expr: netfilter.Expr{Kind: netfilter.SNAT}}
	option := "--to-source"
	if k == dnat {
		it.expr.Kind, option = netfilter.DNATRange, "--to-destination"
	}
	it.nat.flags = f &^ (natIPs | natPorts)
	addrs := d.addrRange(&it.nat, minAddr, maxAddr)
	ports := d.portRange(&it.nat, minPort, maxPort)
	if addrs && ports && it.nat.flags&(natIPs|natPorts) != 0 && it.nat.flags&^0x3f == 0 {
		d.items = append(d.items, it)
		return true
	}
	// It does rewrite the address, but any may be the one.
	all := "0.0.0.0-255.255.255.255"
	if d.table.Family == netfilter.IPv6 {
		all = "::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
	}
	d.addText(it.expr, []byte(option+" "+all+" --undecoded"))
	return true
}

// address returns the address that a register was given.
func (d *nftDecoder) address(register uint32) (netip.Addr, bool) {
	n := d.addressLength()
	v := d.value(register, n)
	if v == nil || v.load != loadImmediate || v.masked || len(v.data) != n {
		return netip.Addr{}, false
	}
	return d.xt.address(v.data), true
}

// nftRejects are the names of the ICMP codes of native rejects, by family and
// code, and of the codes that both families have (enum nft_reject_inet_code).
var nftRejects = map[netfilter.Family]struct{ own, common []string }{
	netfilter.IPv4: {
		own: []string{
			"icmp-net-unreachable", "icmp-host-unreachable", "icmp-proto-unreachable", "icmp-port-unreachable", "", "", "", "", "",
			"icmp-net-prohibited", "icmp-host-prohibited", "", "", "icmp-admin-prohibited",
		},
		common: []string{"icmp-net-unreachable", "icmp-port-unreachable", "icmp-host-unreachable", "icmp-admin-prohibited"},
	},
	netfilter.IPv6: {
		own: []string{
			"icmp6-no-route", "icmp6-adm-prohibited", "", "icmp6-addr-unreachable", "icmp6-port-unreachable",
			"icmp6-policy-fail", "icmp6-reject-route",
		},
		common: []string{"icmp6-no-route", "icmp6-port-unreachable", "icmp6-addr-unreachable", "icmp6-adm-prohibited"},
	},
}

func (d *nftDecoder) reject(b []byte) bool {
	const kind, code = 1, 2
	const icmp, reset, common = 0, 1, 2
	if !d.collect(b, code) {
		return false
	}
	k, ok := d.number(kind)
	if !ok || k > common {
		return false
	}
	var names []string
	switch k {
	case icmp:
		names = nftRejects[d.table.Family].own
	case common:
		names = nftRejects[d.table.Family].common
	case reset:
		d.addText(netfilter.Expr{Kind: netfilter.Reject}, []byte("--reject-with tcp-reset"))
		return true
	}
	n := 0
	if c := d.attrs[code]; len(c) == 1 {
		n = int(c[0])
	}
	if n < len(names) && names[n] != "" {
		d.addText(netfilter.Expr{Kind: netfilter.Reject}, []byte("--reject-with "+names[n]))
	} else {
		d.addText(netfilter.Expr{Kind: netfilter.Reject}, fmt.Appendf(nil, "--reject-with %d", n))
	}
	return true
}

func (d *nftDecoder) queue(b []byte) bool {
	const num, total, flags = 1, 2, 3
	if !d.collect(b, flags) {
		return false
	}
	it := nftItem{what: itemQueue, expr: netfilter.Expr{Kind: netfilter.Queue}}
	for typ, to := range map[int]*uint16{num: &it.nat.minPort, total: &it.nat.maxPort, flags: &it.nat.base} {
		if a := d.attrs[typ]; len(a) == 2 {
			*to = binary.BigEndian.Uint16(a)
		} else if a != nil {
			return false
		}
	}
	d.items = append(d.items, it)
	return true
}

// metaNames are the names of enum nft_meta_keys that nft uses.
var metaNames = [...]string{
	"length", "protocol", "priority", "mark", "iif", "oif", "iifname", "oifname", "iiftype", "oiftype", "skuid", "skgid",
	"nftrace", "rtclassid", "secmark", "nfproto", "l4proto", "ibrname", "obrname", "pkttype", "cpu", "iifgroup", "oifgroup", "cgroup",
}

func metaName(key uint32) string {
	if key < uint32(len(metaNames)) {
		return metaNames[key]
	}
	return fmt.Sprint(key)
}

// appendName names a value for the text of an Unknown. A nil one is what a
// register holds that nobody understood.
func (v *nftValue) appendName(b []byte) []byte {
	if v == nil {
		return append(b, "cmp"...)
	}
	switch v.load {
	case loadPayload:
		bases := [...]string{"link", "network", "transport"}
		base := "payload"
		if v.a < uint32(len(bases)) {
			base = bases[v.a]
		}
		b = fmt.Appendf(b, "%s header byte %d, %d long", base, v.b, v.size)
	case loadMeta:
		b = append(append(b, "meta "...), metaName(v.a)...)
	case loadCT:
		b = fmt.Appendf(b, "ct key %d", v.a)
	case loadFIB:
		b = append(b, "fib"...)
	case loadImmediate:
		b = append(b, "immediate"...)
	default:
		b = append(b, v.name...)
	}
	if v.masked {
		n := min(int(v.size), len(v.mask))
		b = fmt.Appendf(b, " & 0x%x ^ 0x%x", v.mask[:n], v.xor[:n])
	}
	return b
}

// isTarget reports whether an item acts on the packet.
func (it *nftItem) isTarget() bool {
	switch it.what {
	case itemXTTarget, itemNAT, itemPortsNAT, itemQueue:
		return true
	case itemXTMatch:
		return false
	}
	return !it.expr.IsMatch()
}

// harmless reports whether a target changes nothing for a Service's traffic.
func (it *nftItem) harmless() bool {
	if it.what == itemXTTarget {
		return noEffect[it.name] && it.name != "CT"
	}
	return it.expr.Kind == netfilter.NoEffect
}

// ends reports whether nothing of the rule runs behind this target, as far as
// it is known.
func (it *nftItem) ends() bool {
	if it.what == itemXTTarget {
		switch it.name {
		case "MARK", "CONNMARK", "CT", "NOTRACK":
			return false
		}
		return true
	}
	return it.expr.Kind >= netfilter.Jump
}

// settle brings the items into the order of the model: matches, then at most
// one target. iptables writes no other rule; nft may, with several statements,
// and matches between them.
func (d *nftDecoder) settle() {
	first, last, log, matchBehind, targets := -1, -1, -1, false, 0
	for i := range d.items {
		it := &d.items[i]
		switch {
		case !it.isTarget():
			matchBehind = true
		case it.harmless():
			log = i
			targets++
		default:
			if last = i; first < 0 {
				first = i
			}
			matchBehind = false
			targets++
		}
	}
	n := len(d.items)
	switch {
	case targets == 0 || targets == 1 && d.items[n-1].isTarget():
		return
	case first < 0: // only such as LOG: the last of them is the target
		d.moveToEnd(log)
		last = n - 1
	case matchBehind || first < last && !d.items[last].ends():
		d.collapse(first)
		last = len(d.items) - 1
	default:
		d.moveToEnd(last)
		last = n - 1
	}
	for i := range d.items[:last] {
		it := &d.items[i]
		if !it.isTarget() {
			continue
		}
		kind := netfilter.Unknown
		if it.harmless() {
			kind = netfilter.Always
		}
		d.desc = it.appendName(d.desc[:0], d.text)
		from := len(d.text)
		d.text = appendQuoted(append(d.text, "-m nft --statement "...), d.desc)
		*it = nftItem{what: itemText, expr: netfilter.Expr{Kind: kind}, from: from, to: len(d.text)}
	}
}

func (d *nftDecoder) moveToEnd(i int) {
	it := d.items[i]
	copy(d.items[i:], d.items[i+1:])
	d.items[len(d.items)-1] = it
}

// collapse replaces all items from the first target on by one UnknownTarget: it
// acts on packets that the rest of the rule may not match.
func (d *nftDecoder) collapse(first int) {
	d.desc = d.desc[:0]
	for i := first; i < len(d.items); i++ {
		if i > first {
			d.desc = append(d.desc, "; "...)
		}
		d.desc = d.items[i].appendName(d.desc, d.text)
	}
	d.items = d.items[:first]
	d.addUndecoded(netfilter.UnknownTarget)
}

// itemNames name the items without a text of their own.
var itemNames = map[netfilter.Kind]string{
	netfilter.Source: "-s", netfilter.Destination: "-d", netfilter.ProtocolIs: "-p", netfilter.Fragment: "-f",
	netfilter.DestinationPort: "ports", netfilter.MarkIs: "-m mark", netfilter.ConnMarkIs: "-m connmark",
	netfilter.CTState: "-m conntrack", netfilter.SourceType: "-m addrtype", netfilter.DestinationType: "-m addrtype",
	netfilter.SetMark: "MARK", netfilter.SetConnMark: "CONNMARK", netfilter.SaveMark: "CONNMARK", netfilter.RestoreMark: "CONNMARK",
	netfilter.Jump: "jump", netfilter.Goto: "goto", netfilter.Return: "RETURN", netfilter.Accept: "ACCEPT", netfilter.Drop: "DROP",
	netfilter.Queue: "NFQUEUE", netfilter.DNATRange: "DNAT", netfilter.SNAT: "SNAT", netfilter.Redirect: "REDIRECT", netfilter.Masquerade: "MASQUERADE",
}

// appendName names an item for the text of an Unknown.
func (it *nftItem) appendName(b, text []byte) []byte {
	switch it.what {
	case itemText:
		return append(b, text[it.from:it.to]...)
	case itemXTMatch, itemXTTarget:
		return append(b, it.name...)
	}
	if name := itemNames[it.expr.Kind]; name != "" {
		return append(b, name...)
	}
	return fmt.Appendf(b, "kind %d", it.expr.Kind)
}

// emit adds the items to the chain: first what stands before any "-m", in the
// order of its Kinds, which is that of iptables-save.
func (d *nftDecoder) emit() {
	d.xt.protocol, d.more.chain = "", d.xt.chain
	var general uint
	for i := range d.items {
		it := &d.items[i]
		if it.general() {
			general |= 1 << it.expr.Kind
		}
		if it.what == itemExpr && it.expr.Kind == netfilter.ProtocolIs {
			d.xt.protocol = protocolNames[it.expr.A]
		}
	}
	for kind := netfilter.Source; kind <= netfilter.Fragment; kind++ {
		if general&(1<<kind) == 0 {
			continue
		}
		for i := range d.items {
			if it := &d.items[i]; it.general() && it.expr.Kind == kind {
				d.emitItem(it)
			}
		}
	}
	for i := range d.items {
		if it := &d.items[i]; !it.general() {
			d.emitItem(it)
		}
	}
}

func (it *nftItem) extension() legacyExtension {
	return legacyExtension{name: it.rawName, revision: uint8(it.rev), data: it.data}
}

// general reports whether an item belongs to no module.
func (it *nftItem) general() bool {
	switch it.what {
	case itemExpr, itemText, itemPrefix:
		return it.expr.Kind <= netfilter.Fragment
	}
	return false
}

func (d *nftDecoder) emitItem(it *nftItem) {
	c := d.xt.chain
	switch it.what {
	case itemExpr:
		c.Add(it.expr)
	case itemText:
		c.AddText(it.expr.Kind, it.expr.Flags, it.expr.N, d.text[it.from:it.to])
	case itemPrefix:
		if err := c.AddPrefix(it.expr.Kind, it.expr.Flags, it.addr, it.mask); err != nil {
			c.AddText(netfilter.Unknown, 0, 0, []byte("-m nft --undecoded address"))
		}
	case itemPorts:
		start := c.Mark()
		p := &it.ports
		if p.source {
			d.xt.add(start, netfilter.Expr{Kind: netfilter.SourcePort, Flags: p.not[0], A: uint32(p.sports[0]), B: uint32(p.sports[1])})
		}
		if p.dest {
			d.xt.add(start, netfilter.Expr{Kind: netfilter.DestinationPort, Flags: p.not[1], A: uint32(p.dports[0]), B: uint32(p.dports[1])})
		}
		if p.flags {
			d.xt.add(start, netfilter.Expr{Kind: netfilter.TCPFlags, Flags: p.not[2], A: uint32(p.mask), B: uint32(p.comp)})
		}
	case itemXTMatch:
		if text, ok := d.more.moreMatches(it.extension()); ok {
			c.AddText(netfilter.Unknown, 0, 0, text)
			return
		}
		d.xt.match(it.name, it.rev, it.data)
	case itemXTTarget:
		if !d.more.moreTargets(it.extension()) {
			d.xt.target(it.name, it.rev, it.data)
		}
	case itemNAT:
		if !d.xt.nat(it.expr.Kind == netfilter.DNATRange, it.nat) {
			c.AddText(netfilter.UnknownTarget, 0, 0, []byte("nft --undecoded nat"))
		}
	case itemPortsNAT:
		d.xt.portsOnly(it.expr.Kind == netfilter.Redirect, it.nat)
	case itemQueue:
		d.xt.addQueue(it.nat.minPort, it.nat.maxPort, it.nat.base)
	}
}
