package nftables

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/natlens/natlens/pkg/internal/nfnetlink"
	"github.com/natlens/natlens/pkg/netfilter"
)

// This file decodes chains, sets and rules of nf_tables, as netlink carries them
// (linux/netfilter/nf_tables.h), into the model that Parse makes of nft's JSON
// of the same table.
//
// nft compiles a rule to a list of expressions: loads into registers, which
// later ones compare, look up in a set, or hand to nat. A concatenated key
// stands in consecutive registers of 32 bits. So the decoder tracks what each
// register holds.
//
// Nothing is guessed: an expression, an attribute or a value that the decoder
// does not know becomes Unknown or UnknownTarget. No length is trusted, and what
// a message takes in memory is bounded by its length.

// kubeProxyTable is the table that kube-proxy's nftables mode has in either
// family (kubeProxyTable in pkg/proxy/nftables/proxier.go).
const kubeProxyTable = "kube-proxy"

// Attribute types of nf_tables.h. They are part of the kernel's interface.
const (
	nftaTableName, nftaTableFlags, nftaTableHandle = 1, 2, 4 // enum nft_table_attributes
	nftaChainTable, nftaChainName, nftaChainHook   = 1, 3, 4 // enum nft_chain_attributes
	nftaChainPolicy, nftaChainUse, nftaChainType   = 5, 6, 7
	nftaHookNumber, nftaHookPriority               = 1, 2
	nftaRuleTable, nftaRuleChain                   = 1, 2
	nftaRuleExpressions, nftaRuleUserData          = 4, 7
	nftaSetTable, nftaSetName, nftaSetFlags        = 1, 2, 3 // enum nft_set_attributes
	nftaSetKeyType, nftaSetKeyLen, nftaSetDataType = 4, 5, 6
	nftaSetDataLen, nftaSetTimeout                 = 7, 11
	nftaElemKey, nftaElemData, nftaElemFlags       = 1, 2, 3 // enum nft_set_elem_attributes
	nftaElemUserData, nftaElemKeyEnd               = 6, 10
	nftaListElem                                   = 1
	nftaExprName, nftaExprData                     = 1, 2
	nftaDataValue, nftaDataVerdict                 = 1, 2
	nftaVerdictCode, nftaVerdictChain              = 1, 2
)

// Flags of sets and elements (enum nft_set_flags, nft_set_elem_flags), and the
// data type of a verdict map (NFT_DATA_VERDICT).
const (
	setAnonymous, setInterval, setMap        = 0x1, 0x4, 0x8
	setTimeout, setEval, setObject           = 0x10, 0x20, 0x40
	elemIntervalEnd, elemCatchAll            = 1, 2
	dataVerdict                       uint32 = 0xffffff00
)

// Payload bases, meta and ct keys, fib results and flags, comparisons.
const (
	payloadNetwork, payloadTransport                                                    = 1, 2
	metaMark, metaIIFName, metaOIFName, metaNFProto, metaL4Proto                        = 3, 6, 7, 15, 16
	ctState, ctStatus                                                                   = 0, 2
	fibSource, fibDestination, fibAddrType                                              = 1, 2, 3
	cmpEqual, cmpNotEqual, cmpLess, cmpLessOrEqual, cmpGreater, cmpGreaterOrEqual       = 0, 1, 2, 3, 4, 5
	verdictDrop, verdictAccept                                                    int32 = 0, 1
	verdictContinue, verdictJump, verdictGoto, verdictReturn                      int32 = -1, -3, -4, -5
)

// Families (NFPROTO_* in linux/netfilter.h).
const nfprotoInet, nfprotoIPv4, nfprotoIPv6 = 1, 2, 10

const (
	rtnLocal = 2  // RTN_LOCAL in linux/rtnetlink.h
	nameSize = 16 // IFNAMSIZ
)

// keyType is the type of a part of a set's key. nft numbers its types (enum
// datatypes in its include/datatype.h) and the kernel hands the numbers back: 6
// bits for each part of a concatenation, the last one lowest.
type keyType uint8

const (
	typeIPv4     keyType = 7
	typeIPv6     keyType = 8
	typeProtocol keyType = 12
	typePort     keyType = 13
)

func (k keyType) size() int {
	return map[keyType]int{typeIPv4: 4, typeIPv6: 16, typeProtocol: 1, typePort: 2}[k]
}

// keyTypesOf takes a concatenated type apart; nil for one of which the fields of
// a key do not follow.
func keyTypesOf(number uint32, size int) []keyType {
	var out []keyType
	sum := 0
	for ; number != 0; number >>= 6 {
		k := keyType(number & 0x3f)
		if k.size() == 0 {
			return nil
		}
		out = append(out, k)
		sum += aligned(k.size())
	}
	if len(out) == 1 {
		sum = out[0].size()
	}
	if sum != size {
		return nil
	}
	slices.Reverse(out)
	return out
}

func aligned(n int) int { return (n + 3) &^ 3 }

// liveSet is a set or map, as the kernel describes it.
type liveSet struct {
	name     string
	flags    uint32
	keyType  uint32
	keySize  int
	types    []keyType
	dataType uint32
	verdicts bool // a map to verdicts
	dataSize int
	timeout  time.Duration
	// broken says that its elements are not understood: nobody may ask it.
	broken bool
	number uint32 // in the table, of a named one

	raw []byte // the elements of an anonymous one: its rule knows what they are
	// numbers, if not 0, says that raw is of the numbers from first on only, and
	// of each of so many.
	first, numbers uint32
	bounds         []bound
}

// bound is where an interval of an interval set begins or ends.
type bound struct {
	addr    netip.Addr
	end     bool
	element netfilter.SetElement
}

func (s *liveSet) anonymous() bool { return s.flags&setAnonymous != 0 }

// mayBeFilled reports whether a set has the flags of one that packets add to.
func (s *liveSet) mayBeFilled() bool { return s.flags&(setTimeout|setEval) != 0 }

// withoutElements returns a named set as others see it.
func (s *liveSet) withoutElements() *netfilter.Set {
	return &netfilter.Set{Name: s.name, Map: s.flags&(setMap|setObject) != 0, Timeout: s.timeout, Opaque: s.broken}
}

// liveElement is an element as it comes.
type liveElement struct {
	key, data, comment []byte
	flags              uint32
	// hasEnd says that it is a range of concatenations, from key to an end;
	// single that both are the same.
	hasEnd, single bool
}

// eachElement calls f with the elements of a list until it returns false. It
// returns false then, and for a list that holds anything else.
func eachElement(list []byte, f func(*liveElement) bool) bool {
	var a [nftaElemKeyEnd + 1][]byte
	var data [nftaDataVerdict + 1][]byte
	var e liveElement
	for len(list) > 0 {
		typ, b, rest, ok := nfnetlink.Next(list)
		if !ok || typ != nftaListElem {
			return false
		}
		list = rest
		nfnetlink.Collect(b, a[:])
		e = liveElement{data: a[nftaElemData], hasEnd: a[nftaElemKeyEnd] != nil}
		if a[nftaElemFlags] != nil {
			if e.flags, ok = nfnetlink.Uint32(a[nftaElemFlags]); !ok {
				return false
			}
		}
		nfnetlink.Collect(a[nftaElemKey], data[:])
		e.key = data[nftaDataValue]
		if e.hasEnd {
			nfnetlink.Collect(a[nftaElemKeyEnd], data[:])
			e.single = bytes.Equal(e.key, data[nftaDataValue])
		}
		e.comment = userComment(a[nftaElemUserData])
		if !f(&e) {
			return false
		}
	}
	return true
}

// userComment reads the comment in the user data of a rule or an element.
func userComment(b []byte) []byte {
	for {
		typ, data, rest, ok := nfnetlink.NextUserData(b)
		if !ok {
			return nil
		}
		if typ == 0 {
			return nfnetlink.String(data)
		}
		b = rest
	}
}

// liveDecoder decodes rules and elements of one table. Its memory is reused from
// rule to rule.
type liveDecoder struct {
	table   *netfilter.Table
	sets    map[string]*liveSet
	missing bool // something names what was not there: the table has changed

	chain *netfilter.Chain // that rules are added to
	// The numbers of the chain's anonymous sets: those that it had before, and
	// those that it has now. An equal set keeps its number.
	before, numbers []uint32
	fills           []string // the sets that its rules add to

	// foreign says that the table is another program's: what its rules have counted
	// is left out, and of a map to addresses it is known which keys it has.
	foreign bool
	counter *netfilter.Counter
	done    bool // a verdict has been added: what is behind it never runs
	values  []liveValue
	regs    [nfnetlink.Registers]int // index into values, plus 1; 0 when not known
	low     int                      // the value whose lower end was compared, plus 1
	attrs   [16][]byte
	inner   [3][]byte
}

// begin has the rules to come added to a chain.
func (d *liveDecoder) begin(c *netfilter.Chain, before []uint32) {
	d.chain, d.before, d.numbers, d.fills, d.missing = c, before, nil, nil, false
}

func (d *liveDecoder) addrSize() int {
	if d.table.Family == netfilter.IPv6 {
		return 16
	}
	return 4
}

// proto returns the family of the table, as the kernel numbers it.
func (d *liveDecoder) proto() uint32 {
	if d.table.Family == netfilter.IPv6 {
		return nfprotoIPv6
	}
	return nfprotoIPv4
}

// addrOffsets returns where source and destination stand in the network header.
func (d *liveDecoder) addrOffsets() (source, destination uint32) {
	if d.table.Family == netfilter.IPv6 {
		return 8, 24
	}
	return 12, 16
}

// baseOf reads what ties a chain to its hook; nil for one that only jumps enter.
func baseOf(hook, kind, policy []byte) *netfilter.Base {
	if hook == nil {
		return nil
	}
	var h [nftaHookPriority + 1][]byte
	nfnetlink.Collect(hook, h[:])
	number, ok1 := nfnetlink.Uint32(h[nftaHookNumber])
	priority, ok2 := nfnetlink.Uint32(h[nftaHookPriority])
	if !ok1 || !ok2 || number > uint32(netfilter.Postrouting) {
		return nil // ingress and egress come before any nat
	}
	b := &netfilter.Base{Hook: netfilter.Hook(number), Priority: int(int32(priority)), Policy: netfilter.Accept}
	if string(nfnetlink.String(kind)) == "nat" {
		b.Type = netfilter.TypeNAT
	}
	if p, ok := nfnetlink.Uint32(policy); ok && int32(p) == verdictDrop {
		b.Policy = netfilter.Drop
	}
	return b
}

// setAttrs are the attributes of a set.
type setAttrs [nftaSetTimeout + 1][]byte

// newLiveSet reads the set or map of a message.
func newLiveSet(a *setAttrs) *liveSet {
	s := &liveSet{name: string(nfnetlink.String(a[nftaSetName]))}
	flags, ok := nfnetlink.Uint32(a[nftaSetFlags])
	s.flags, s.broken = flags, a[nftaSetFlags] != nil && !ok
	s.keyType, _ = nfnetlink.Uint32(a[nftaSetKeyType])
	s.dataType, _ = nfnetlink.Uint32(a[nftaSetDataType])
	keySize, _ := nfnetlink.Uint32(a[nftaSetKeyLen])
	dataSize, _ := nfnetlink.Uint32(a[nftaSetDataLen])
	const most = 4 * nfnetlink.Registers
	s.keySize, s.dataSize = int(min(keySize, most+1)), int(min(dataSize, most+1))
	s.types = keyTypesOf(s.keyType, s.keySize)
	s.verdicts = flags&setMap != 0 && s.dataType == dataVerdict
	if !s.anonymous() {
		if ms, ok := nfnetlink.Uint64(a[nftaSetTimeout]); ok {
			// nft's JSON has seconds.
			s.timeout = time.Duration(min(ms/1000, math.MaxInt32)) * time.Second
		}
		s.broken = s.broken || s.types == nil || flags&(setMap|setObject) != 0 && !s.verdicts
	}
	return s
}

// fill adds the elements of a list to a set without any. It returns false when it
// does not understand all of them.
func (d *liveDecoder) fill(out *netfilter.Set, s *liveSet, list []byte) bool {
	s.bounds = nil
	if !eachElement(list, func(e *liveElement) bool { return d.addElement(s, out, e) }) || !s.closeIntervals(out) {
		return false
	}
	sortKeys(out)
	return true
}

// addElement adds one element of a set to out.
func (d *liveDecoder) addElement(s *liveSet, out *netfilter.Set, e *liveElement) bool {
	k, ok := keyOf(s.types, e.key)
	if !ok || e.hasEnd && !e.single || e.flags&elemCatchAll != 0 {
		return false
	}
	var element netfilter.SetElement
	if len(e.comment) > 0 {
		element.Comment = string(e.comment)
	}
	if s.verdicts && e.flags&elemIntervalEnd == 0 {
		v, ok := d.verdictOf(e.data)
		if !ok {
			return false
		}
		element.Verdict = v
	}
	if s.flags&setInterval == 0 || e.single {
		if e.flags != 0 {
			return false
		}
		out.Add(k, element)
		return true
	}
	if len(s.types) != 1 || !k.Addr.IsValid() {
		return false // only of addresses can ranges be kept
	}
	s.bounds = append(s.bounds, bound{k.Addr, e.flags&elemIntervalEnd != 0, element})
	return true
}

// sortKeys brings the keys of a set in the order of nft, as far as it matters:
// the kernel hashes them, with another seed for each set.
func sortKeys(s *netfilter.Set) {
	slices.SortFunc(s.Keys, func(a, b netfilter.SetKey) int {
		return cmp.Or(a.Addr.Compare(b.Addr), a.Addr2.Compare(b.Addr2), cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Port, b.Port))
	})
}

// closeIntervals makes ranges of the bounds: each reaches up to before the next
// one, whether that begins the next interval or ends this one. The order in
// which they come is not that of the addresses.
func (s *liveSet) closeIntervals(out *netfilter.Set) bool {
	slices.SortStableFunc(s.bounds, func(a, b bound) int {
		if c := a.addr.Compare(b.addr); c != 0 || a.end == b.end {
			return c
		}
		if a.end {
			return -1
		}
		return 1
	})
	for i, b := range s.bounds {
		if b.end {
			continue
		}
		to := netfilter.SpanOf(netip.PrefixFrom(b.addr, 0)).To
		if i+1 < len(s.bounds) {
			to = s.bounds[i+1].addr.Prev()
		}
		switch {
		case !to.IsValid() || to.Less(b.addr): // twice the same
			return false
		case to == b.addr:
			out.Add(netfilter.SetKey{Addr: b.addr}, b.element)
		case s.flags&setMap != 0:
			return false // a range cannot keep a verdict
		default:
			out.Ranges = append(out.Ranges, netfilter.AddrSpan{From: b.addr, To: to})
		}
	}
	s.bounds = nil
	return true
}

// keyOf reads a key. Each part of a concatenation is padded to 4 bytes.
func keyOf(types []keyType, b []byte) (k netfilter.SetKey, ok bool) {
	if len(types) == 0 {
		return k, false
	}
	for _, typ := range types {
		n := typ.size()
		if len(b) < n {
			return k, false
		}
		part := b[:n]
		b = b[min(aligned(n), len(b)):]
		switch typ {
		case typeProtocol:
			k.Protocol = netfilter.Protocol(part[0])
		case typePort:
			k.Port = binary.BigEndian.Uint16(part)
		default:
			a, _ := netip.AddrFromSlice(part)
			if k.Addr.IsValid() {
				k.Addr2 = a
			} else {
				k.Addr = a
			}
		}
	}
	return k, len(b) == 0
}

// verdictOf reads a verdict (NFTA_DATA_VERDICT).
func (d *liveDecoder) verdictOf(data []byte) (e netfilter.Expr, ok bool) {
	var a [nftaDataVerdict + 1][]byte
	nfnetlink.Collect(data, a[:])
	nfnetlink.Collect(a[nftaDataVerdict], a[:]) // has the same size
	code, ok := nfnetlink.Uint32(a[nftaVerdictCode])
	if !ok {
		return e, false
	}
	switch int32(code) {
	case verdictDrop:
		return netfilter.Expr{Kind: netfilter.Drop}, true
	case verdictAccept:
		return netfilter.Expr{Kind: netfilter.Accept}, true
	case verdictReturn:
		return netfilter.Expr{Kind: netfilter.Return}, true
	case verdictJump:
		e.Kind = netfilter.Jump
	case verdictGoto:
		e.Kind = netfilter.Goto
	default:
		return e, false
	}
	name := nfnetlink.String(a[nftaVerdictChain])
	if len(name) == 0 {
		return e, false
	}
	id := d.table.IDOf(name)
	d.missing = d.missing || d.table.ByID(id) == nil
	e.A = uint32(id)
	return e, true
}

// addRule adds the rule of a message to the chain.
func (d *liveDecoder) addRule(b []byte) {
	var a [nftaRuleUserData + 1][]byte
	nfnetlink.Collect(b, a[:]) // newer kernels may say more
	d.rule(a[nftaRuleExpressions], userComment(a[nftaRuleUserData]))
}

// rule adds a rule to d.chain.
func (d *liveDecoder) rule(expressions, comment []byte) {
	d.counter, d.done, d.values, d.regs, d.low = nil, false, d.values[:0], [nfnetlink.Registers]int{}, 0
	start := d.chain.Mark()
	for len(expressions) > 0 && !d.done {
		typ, elem, rest, ok := nfnetlink.Next(expressions)
		if !ok {
			d.unclear("list")
			break
		}
		expressions = rest
		if typ != nftaListElem || !nfnetlink.Collect(elem, d.inner[:]) || d.inner[nftaExprName] == nil {
			d.unclear("expression")
			continue
		}
		d.expression(string(nfnetlink.String(d.inner[nftaExprName])), d.inner[nftaExprData])
	}
	d.closeLow()
	// A load itself may end the rule, as that of a field behind the end of the
	// packet does.
	for i := range d.values {
		if v := &d.values[i]; !v.used && v.load != loadImmediate {
			d.chain.Prepend(start, netfilter.Unknown, undecoded(v.String()))
		}
	}
	if len(comment) > 0 {
		d.chain.Prepend(start, netfilter.Comment, comment)
	}
	d.chain.End(d.counter)
}

// expression adds one expression. What it does not decode in full is unclear.
func (d *liveDecoder) expression(name string, b []byte) {
	if name != "cmp" {
		d.closeLow()
	}
	ok := true
	switch name {
	case "payload":
		ok = d.payload(b)
	case "meta":
		ok = d.meta(b)
	case "ct":
		ok = d.ct(b)
	case "fib":
		ok = d.fib(b)
	case "numgen":
		ok = d.numgen(b)
	case "bitwise":
		ok = d.bitwise(b)
	case "immediate":
		ok = d.immediate(b)
	case "cmp":
		ok = d.cmp(b)
	case "range":
		ok = d.rangeOf(b)
	case "lookup":
		ok = d.lookup(b)
	case "dynset":
		ok = d.dynset(b)
	case "nat":
		ok = d.nat(b)
	case "masq", "redir":
		ok = d.natLocal(name, b)
	case "reject":
		ok = d.reject(b)
	case "counter":
		ok = d.count(b)
	case "objref":
		ok = d.objref(b)
	case "notrack":
		d.chain.AddText(netfilter.NoTrack, 0, 0, []byte(`{"notrack": null}`))
	case "log":
		d.log(b)
	case "last":
		d.chain.AddText(netfilter.NoEffect, 0, 0, undecoded("last"))
	case "limit", "quota", "connlimit":
		d.chain.AddText(netfilter.Unknown, 0, 0, undecoded(name))
	case "queue":
		d.end(netfilter.Queue, 0, undecoded("queue"))
	// Loads whose value is not understood, by the number of the attribute that
	// is the destination register. Without it, exthdr writes.
	case "rt", "xfrm", "osf", "exthdr":
		ok = d.otherLoad(name, b, 1)
	case "socket", "hash", "tunnel":
		ok = d.otherLoad(name, b, 2)
	case "byteorder":
		ok = d.byteorder(b)
	default:
		ok = false
	}
	if !ok {
		d.unclear(name)
	}
}

// undecoded is the text of what is not understood.
func undecoded(what string) []byte {
	const most = 256
	return fmt.Appendf(nil, `{"undecoded": %s}`, quoted(what[:min(len(what), most)]))
}

// quoted is a text in JSON, as nft prints it.
func quoted(s string) string {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	_ = e.Encode(s) // a text always can be
	return strings.TrimSuffix(b.String(), "\n")
}

// unclear adds an expression that may be a match, a statement or a verdict, and
// may write any register.
func (d *liveDecoder) unclear(name string) {
	d.regs = [nfnetlink.Registers]int{}
	d.chain.AddText(netfilter.UnknownTarget, 0, 0, undecoded(name))
}

// end adds a verdict with a text.
func (d *liveDecoder) end(k netfilter.Kind, n uint16, text []byte) {
	d.chain.AddText(k, 0, n, text)
	d.done = true
}

// liveValue is what a register holds.
type liveValue struct {
	load loadKind
	// payload: base, offset. meta, ct: key. fib: result, flags. numgen, and what
	// a map gave for one: modulus, offset.
	a, b       uint32
	name       string // of any other load
	size       int    // in bytes
	slot, wide int    // registers, in words of 32 bits
	used       bool
	masked     bool // by a bitwise with this mask and xor
	mask, xor  [16]byte
	data       []byte   // immediate
	low        []byte   // compared: at least this
	set        *liveSet // the map that it was looked up in
}

type loadKind uint8

const (
	loadOther loadKind = iota
	loadPayload
	loadMeta
	loadCT
	loadFIB
	loadNumgen
	loadChoice
	loadImmediate
)

// String names a value for the text of an Unknown.
func (v *liveValue) String() string {
	if v == nil {
		return "register"
	}
	var s string
	switch v.load {
	case loadPayload:
		s = fmt.Sprintf("payload of %d bytes at %d of header %d", v.size, v.b, v.a)
	case loadMeta:
		s = fmt.Sprintf("meta key %d", v.a)
	case loadCT:
		s = fmt.Sprintf("ct key %d", v.a)
	case loadFIB:
		s = fmt.Sprintf("fib result %d of %d", v.a, v.b)
	case loadNumgen:
		s = "numgen"
	case loadChoice:
		s = "numgen map"
	case loadImmediate:
		s = "immediate"
	default:
		s = v.name
	}
	if v.masked {
		n := min(v.size, len(v.mask))
		s += fmt.Sprintf(" & 0x%x ^ 0x%x", v.mask[:n], v.xor[:n])
	}
	return s
}

// collect reads the attributes of an expression into d.attrs, up to type last.
// What a kernel says beyond may change what the expression means.
func (d *liveDecoder) collect(b []byte, last int) bool {
	return nfnetlink.Collect(b, d.attrs[:last+1])
}

// number returns a number attribute; absent ones are 0.
func (d *liveDecoder) number(typ int) (v uint32, ok bool) {
	if d.attrs[typ] == nil {
		return 0, true
	}
	return nfnetlink.Uint32(d.attrs[typ])
}

// data returns the value in an attribute that nests one.
func (d *liveDecoder) data(typ int) []byte {
	nfnetlink.Collect(d.attrs[typ], d.inner[:])
	return d.inner[nftaDataValue]
}

// store puts a value into a register.
func (d *liveDecoder) store(register uint32, v liveValue) bool {
	first, ok := nfnetlink.Slot(register)
	if !ok {
		return false
	}
	v.slot, v.wide = first, nfnetlink.Words(v.size, first)
	d.values = append(d.values, v)
	for i := range v.wide {
		d.regs[first+i] = len(d.values)
	}
	return true
}

// value returns what a register holds, nil when that is not one value of at
// least that many bytes. What it finds counts as used.
func (d *liveDecoder) value(register uint32, size int) *liveValue {
	first, ok := nfnetlink.Slot(register)
	if !ok {
		return nil
	}
	return d.valueAt(first, size)
}

func (d *liveDecoder) valueAt(first, size int) *liveValue {
	if first >= nfnetlink.Registers || size > 4*(nfnetlink.Registers-first) || d.regs[first] == 0 {
		return nil
	}
	v := &d.values[d.regs[first]-1]
	v.used = true
	for i := range nfnetlink.Words(size, first) {
		if d.regs[first+i] != d.regs[first] {
			return nil // partly overwritten, or shorter
		}
	}
	if v.slot != first {
		return nil
	}
	return v
}

func (d *liveDecoder) payload(b []byte) bool {
	const dreg, base, offset, length = 1, 2, 3, 4
	if !d.collect(b, length) { // with more, it writes
		return false
	}
	register, ok1 := d.number(dreg)
	kind, ok2 := d.number(base)
	at, ok3 := d.number(offset)
	n, ok4 := d.number(length)
	if !ok1 || !ok2 || !ok3 || !ok4 || n == 0 || n > 4*nfnetlink.Registers {
		return false
	}
	return d.store(register, liveValue{load: loadPayload, a: kind, b: at, size: int(n)})
}

func (d *liveDecoder) meta(b []byte) bool {
	const dreg, key, sreg = 1, 2, 3
	if !d.collect(b, sreg) {
		return false
	}
	k, ok1 := d.number(key)
	from, ok2 := d.number(sreg)
	to, ok3 := d.number(dreg)
	if !ok1 || !ok2 || !ok3 {
		return false
	}
	if d.attrs[sreg] != nil {
		return d.setMeta(k, from)
	}
	size := 4 * nfnetlink.Registers // some are longer than a word
	switch k {
	case metaMark:
		size = 4
	case metaL4Proto, metaNFProto:
		size = 1
	case metaIIFName, metaOIFName:
		size = nameSize
	}
	return d.store(to, liveValue{load: loadMeta, a: k, size: size})
}

// setMeta writes the mark, mark = mark & mask ^ xor, or something else.
func (d *liveDecoder) setMeta(key, register uint32) bool {
	v := d.value(register, 4)
	native := binary.NativeEndian
	switch {
	case key != metaMark:
		d.chain.AddText(netfilter.NoEffect, 0, 0, undecoded(fmt.Sprintf("meta set key %d", key)))
	case v != nil && v.load == loadImmediate && !v.masked && len(v.data) == 4:
		d.chain.Add(netfilter.Expr{Kind: netfilter.SetMark, A: native.Uint32(v.data), B: math.MaxUint32})
	case v != nil && v.load == loadMeta && v.a == metaMark && v.masked:
		d.chain.Add(netfilter.Expr{Kind: netfilter.SetMark, A: native.Uint32(v.xor[:]), B: ^native.Uint32(v.mask[:])})
	default:
		d.chain.AddText(netfilter.UnknownTarget, 0, 0, undecoded("meta mark set "+v.String()))
	}
	return true
}

func (d *liveDecoder) ct(b []byte) bool {
	const dreg, key, direction, sreg = 1, 2, 3, 4
	if !d.collect(b, sreg) {
		return false
	}
	k, ok1 := d.number(key)
	to, ok2 := d.number(dreg)
	from, ok3 := d.number(sreg)
	if !ok1 || !ok2 || !ok3 {
		return false
	}
	if d.attrs[sreg] != nil {
		d.value(from, 4)
		d.chain.AddText(netfilter.NoEffect, 0, 0, undecoded(fmt.Sprintf("ct set key %d", k)))
		return true
	}
	if d.attrs[direction] != nil || k != ctState && k != ctStatus {
		return d.store(to, liveValue{load: loadOther, name: fmt.Sprintf("ct key %d", k), size: 4 * nfnetlink.Registers})
	}
	return d.store(to, liveValue{load: loadCT, a: k, size: 4})
}

func (d *liveDecoder) fib(b []byte) bool {
	const dreg, result, flags = 1, 2, 3
	if !d.collect(b, flags) {
		return false
	}
	to, ok1 := d.number(dreg)
	r, ok2 := d.number(result)
	f, ok3 := d.number(flags)
	if !ok1 || !ok2 || !ok3 {
		return false
	}
	size := 4
	if r != fibAddrType {
		size = nameSize
	}
	return d.store(to, liveValue{load: loadFIB, a: r, b: f, size: size})
}

func (d *liveDecoder) numgen(b []byte) bool {
	const dreg, modulus, kind, offset = 1, 2, 3, 4
	if !d.collect(b, offset) {
		return false
	}
	to, ok1 := d.number(dreg)
	mod, ok2 := d.number(modulus)
	k, ok3 := d.number(kind) // taking turns, or random: the shares are the same
	from, ok4 := d.number(offset)
	if !ok1 || !ok2 || !ok3 || !ok4 || mod == 0 || k > 1 {
		return false
	}
	return d.store(to, liveValue{load: loadNumgen, a: mod, b: from, size: 4})
}

// otherLoad reads a load whose value is not understood: it may be of any size.
func (d *liveDecoder) otherLoad(name string, b []byte, dreg int) bool {
	nfnetlink.Collect(b, d.attrs[:])
	to, ok := d.number(dreg)
	return ok && d.attrs[dreg] != nil && d.store(to, liveValue{load: loadOther, name: name, size: 4 * nfnetlink.Registers})
}

func (d *liveDecoder) byteorder(b []byte) bool {
	const sreg, dreg = 1, 2
	nfnetlink.Collect(b, d.attrs[:])
	from, ok1 := d.number(sreg)
	to, ok2 := d.number(dreg)
	if !ok1 || !ok2 {
		return false
	}
	v := d.value(from, 1)
	return d.store(to, liveValue{load: loadOther, name: "byteorder of " + v.String(), size: 4 * nfnetlink.Registers})
}

func (d *liveDecoder) bitwise(b []byte) bool {
	const sreg, dreg, length, mask, xor, op = 1, 2, 3, 4, 5, 6
	if !d.collect(b, op) {
		return false
	}
	from, ok1 := d.number(sreg)
	to, ok2 := d.number(dreg)
	n, ok3 := d.number(length)
	kind, ok4 := d.number(op)
	if !ok1 || !ok2 || !ok3 || !ok4 {
		return false
	}
	m, x := d.data(mask), d.data(xor)
	v := d.value(from, int(min(n, 4*nfnetlink.Registers)))
	const maskAndXor = 0 // NFT_BITWISE_BOOL
	if v == nil || kind != maskAndXor || int(n) != v.size || v.size > len(v.mask) || len(m) != v.size || len(x) != v.size || v.load == loadImmediate {
		return d.store(to, liveValue{load: loadOther, name: "bitwise of " + v.String(), size: 4 * nfnetlink.Registers})
	}
	out := *v
	out.used, out.masked, out.low = false, true, nil
	for i := range v.size {
		before, flip := byte(0xff), byte(0)
		if v.masked {
			before, flip = v.mask[i], v.xor[i]
		}
		out.mask[i], out.xor[i] = before&m[i], flip&m[i]^x[i]
	}
	return d.store(to, out)
}

func (d *liveDecoder) immediate(b []byte) bool {
	const dreg, value = 1, 2
	if !d.collect(b, value) {
		return false
	}
	to, ok := d.number(dreg)
	if !ok {
		return false
	}
	if data := d.data(value); data != nil {
		return to != 0 && len(data) <= 4*nfnetlink.Registers && d.store(to, liveValue{load: loadImmediate, data: data, size: len(data)})
	}
	e, ok := d.verdictOf(d.attrs[value])
	if ok && to == 0 {
		d.chain.Add(e)
		d.done = true
		return true
	}
	code, isCode := nfnetlink.Uint32(d.verdictCode(d.attrs[value]))
	return isCode && to == 0 && int32(code) == verdictContinue
}

func (d *liveDecoder) verdictCode(data []byte) []byte {
	nfnetlink.Collect(data, d.inner[:])
	nfnetlink.Collect(d.inner[nftaDataVerdict], d.inner[:])
	return d.inner[nftaVerdictCode]
}

// closeLow gives up on a comparison with a lower end that no upper one follows.
func (d *liveDecoder) closeLow() {
	if d.low == 0 {
		return
	}
	v := &d.values[d.low-1]
	d.low = 0
	d.unknown(v, "at least", v.low)
}

func (d *liveDecoder) unknown(v *liveValue, op string, data []byte) {
	d.chain.AddText(netfilter.Unknown, 0, 0, undecoded(fmt.Sprintf("%v %s 0x%x", v, op, data)))
}

func (d *liveDecoder) cmp(b []byte) bool {
	const sreg, op, value = 1, 2, 3
	if !d.collect(b, value) {
		d.closeLow()
		return false
	}
	from, ok1 := d.number(sreg)
	kind, ok2 := d.number(op)
	data := d.data(value)
	if !ok1 || !ok2 || len(data) == 0 {
		d.closeLow()
		return false
	}
	v := d.value(from, len(data))
	if d.low != 0 && v == &d.values[d.low-1] && kind == cmpLessOrEqual && len(v.low) == len(data) {
		d.low = 0
		d.between(v, 0, v.low, data)
		return true
	}
	d.closeLow()
	switch {
	case v == nil || kind > cmpGreaterOrEqual:
		d.unknown(nil, "cmp", data)
	case kind == cmpGreaterOrEqual:
		v.low = data
		d.low = d.regs[v.slot]
	case kind > cmpNotEqual:
		d.unknown(v, []string{cmpLess: "<", cmpLessOrEqual: "<=", cmpGreater: ">"}[kind], data)
	default:
		var flags uint8
		if kind == cmpNotEqual {
			flags = netfilter.Not
		}
		if !d.equal(v, flags, data) {
			d.unknown(v, []string{cmpEqual: "==", cmpNotEqual: "!="}[kind], data)
		}
	}
	return true
}

// equal adds a comparison, and reports whether it understood it.
func (d *liveDecoder) equal(v *liveValue, flags uint8, data []byte) bool {
	native := binary.NativeEndian
	switch v.load {
	case loadPayload:
		return d.equalPayload(v, flags, data)
	case loadMeta:
		switch v.a {
		case metaNFProto:
			return d.nfProto(v, flags, data)
		case metaL4Proto:
			if v.masked || len(data) != 1 {
				return false
			}
			d.chain.Add(netfilter.Expr{Kind: netfilter.ProtocolIs, Flags: flags, A: uint32(data[0])})
			return true
		case metaMark:
			if len(data) != 4 {
				return false
			}
			e := netfilter.Expr{Kind: netfilter.MarkIs, Flags: flags, A: native.Uint32(data), B: math.MaxUint32}
			if v.masked {
				e.B = native.Uint32(v.mask[:])
				e.A ^= native.Uint32(v.xor[:])
			}
			d.chain.Add(e)
			return true
		case metaIIFName, metaOIFName:
			return d.interfaceName(v, flags, data)
		}
	case loadCT:
		return d.ctBits(v, flags, data)
	case loadFIB:
		kind := netfilter.SourceType
		if v.b == fibDestination {
			kind = netfilter.DestinationType
		} else if v.b != fibSource {
			return false
		}
		if v.a != fibAddrType || v.masked || len(data) != 4 || native.Uint32(data) != rtnLocal {
			return false
		}
		d.chain.Add(netfilter.Expr{Kind: kind, Flags: flags, A: netfilter.AddrLocal})
		return true
	}
	return false
}

// nfProto adds a comparison with the family of the packet, which is that of the
// table: one of family inet is decoded for each.
func (d *liveDecoder) nfProto(v *liveValue, flags uint8, data []byte) bool {
	if v.masked || len(data) != 1 {
		return false
	}
	name, same := "", false
	switch data[0] {
	case nfprotoIPv4:
		name, same = "ipv4", d.table.Family == netfilter.IPv4
	case nfprotoIPv6:
		name, same = "ipv6", d.table.Family == netfilter.IPv6
	default:
		return false
	}
	addFamily(d.chain, name, flags, same)
	return true
}

func (d *liveDecoder) interfaceName(v *liveValue, flags uint8, data []byte) bool {
	if v.masked || len(data) > nameSize {
		return false
	}
	name := nfnetlink.String(data)
	if len(name) == 0 || bytes.HasSuffix(name, []byte("+")) || bytes.HasSuffix(name, []byte("*")) {
		return false // a name that looks like a prefix
	}
	text := slices.Clone(name)
	if len(name) == len(data) { // without its zero byte, it is a prefix
		text = append(text, '+')
	}
	kind := netfilter.InInterface
	if v.a == metaOIFName {
		kind = netfilter.OutInterface
	}
	d.chain.AddText(kind, flags, 0, text)
	return true
}

// ctBits adds a comparison of conntrack's state or status, which are bits: with
// a mask, "not 0" asks whether any of them is set. A state is one bit alone, a
// status many.
func (d *liveDecoder) ctBits(v *liveValue, flags uint8, data []byte) bool {
	if len(data) != 4 {
		return false
	}
	key, number := "state", binary.NativeEndian.Uint32(data)
	if v.a == ctStatus {
		key = "status"
	}
	if v.masked {
		if number != binary.NativeEndian.Uint32(v.xor[:]) {
			return false
		}
		number = binary.NativeEndian.Uint32(v.mask[:])
		flags ^= netfilter.Not
	} else if key == "status" || number&(number-1) != 0 {
		return false
	}
	e := netfilter.Expr{Kind: netfilter.CTState, Flags: flags}
	for _, name := range ctBits[key] {
		if number&name.bit != 0 {
			e.A |= ctStates[name.text] | ctStatuses[name.text]
		}
		number &^= name.bit
	}
	if number != 0 || e.A == 0 {
		return false
	}
	d.chain.Add(e)
	return true
}

// isPort reports whether a value is the destination port.
func (v *liveValue) isPort() bool {
	return v.load == loadPayload && v.a == payloadTransport && v.b == 2 && v.size == 2 && !v.masked
}

func (d *liveDecoder) equalPayload(v *liveValue, flags uint8, data []byte) bool {
	if len(data) != v.size {
		return false
	}
	if v.isPort() {
		p := uint32(binary.BigEndian.Uint16(data))
		d.chain.Add(netfilter.Expr{Kind: netfilter.DestinationPort, Flags: flags, A: p, B: p})
		return true
	}
	source, destination := d.addrOffsets()
	n := d.addrSize()
	// nft may compare neighbours in one go.
	if v.a == payloadNetwork && v.b == source && v.size == 2*n && !v.masked && flags == 0 {
		return d.address(netfilter.Source, 0, data[:n], nil) && d.address(netfilter.Destination, 0, data[n:], nil)
	}
	if v.a != payloadNetwork || v.size > n {
		return false
	}
	var mask []byte
	if v.masked {
		if mask = v.mask[:v.size]; !allZero(v.xor[:v.size]) {
			return false
		}
	}
	switch v.b {
	case source:
		return d.address(netfilter.Source, flags, data, mask)
	case destination:
		return d.address(netfilter.Destination, flags, data, mask)
	}
	return false
}

// address adds a match of the first bytes of an address, with a mask that must
// be one of a prefix.
func (d *liveDecoder) address(kind netfilter.Kind, flags uint8, data, mask []byte) bool {
	var value, ones [16]byte
	copy(value[:], data)
	for i := range data {
		ones[i] = 0xff
		if mask != nil {
			ones[i] = mask[i]
		}
		if data[i]&^ones[i] != 0 {
			return false // holds for no packet
		}
	}
	n := d.addrSize()
	a, _ := netip.AddrFromSlice(value[:n])
	m, _ := netip.AddrFromSlice(ones[:n])
	if mask != nil {
		bits := 0
		for ; bits < 8*n && ones[bits/8]&(0x80>>(bits%8)) != 0; bits++ {
		}
		if onesOf(a, bits) != m {
			return false
		}
	}
	return d.chain.AddPrefix(kind, flags, a, m) == nil
}

func allZero(b []byte) bool { return len(bytes.TrimLeft(b, "\x00")) == 0 }

func (d *liveDecoder) rangeOf(b []byte) bool {
	const sreg, op, low, high = 1, 2, 3, 4
	if !d.collect(b, high) {
		return false
	}
	from, ok1 := d.number(sreg)
	kind, ok2 := d.number(op)
	lo := d.data(low)
	hi := d.data(high)
	if !ok1 || !ok2 || kind > 1 || len(lo) == 0 || len(lo) != len(hi) {
		return false
	}
	var flags uint8
	if kind == 1 { // NFT_RANGE_NEQ
		flags = netfilter.Not
	}
	d.between(d.value(from, len(lo)), flags, lo, hi)
	return true
}

// between adds a comparison with a range.
func (d *liveDecoder) between(v *liveValue, flags uint8, low, high []byte) {
	if v != nil && v.isPort() && len(low) == 2 {
		from, to := binary.BigEndian.Uint16(low), binary.BigEndian.Uint16(high)
		d.chain.Add(netfilter.Expr{Kind: netfilter.DestinationPort, Flags: flags, A: uint32(from), B: uint32(to)})
		return
	}
	op := "from"
	if flags != 0 {
		op = "not from"
	}
	d.unknown(v, op, fmt.Appendf(slices.Clone(low), "%s", high))
}

// fieldsAt returns the fields of the packet in the registers of a key, which is
// one of these types.
func (d *liveDecoder) fieldsAt(first int, types []keyType) (all netfilter.Field, ok bool) {
	source, destination := d.addrOffsets()
	ok = len(types) > 0
	for _, typ := range types {
		v := d.valueAt(first, typ.size())
		first += aligned(typ.size()) / 4
		if v == nil || v.masked || v.size != typ.size() {
			ok = false
			continue
		}
		var f netfilter.Field
		switch {
		case v.load == loadMeta && v.a == metaL4Proto && typ == typeProtocol:
			f = netfilter.FieldProtocol
		case v.isPort() && typ == typePort:
			f = netfilter.FieldPort
		case v.load != loadPayload || v.a != payloadNetwork || v.size != d.addrSize():
		case v.b == source && (typ == typeIPv4 || typ == typeIPv6):
			f = netfilter.FieldSource
		case v.b == destination && (typ == typeIPv4 || typ == typeIPv6):
			f = netfilter.FieldDestination
		}
		// A SetKey has the source ahead of the destination.
		if f == 0 || all&f != 0 || f == netfilter.FieldSource && all&netfilter.FieldDestination != 0 {
			ok = false
		}
		all |= f
	}
	return all, ok
}

func (d *liveDecoder) lookup(b []byte) bool {
	const set, sreg, dreg, setID, flags = 1, 2, 3, 4, 5
	if !d.collect(b, flags) {
		return false
	}
	name := nfnetlink.String(d.attrs[set])
	from, ok1 := d.number(sreg)
	to, ok2 := d.number(dreg)
	f, ok3 := d.number(flags)
	first, ok4 := nfnetlink.Slot(from)
	if !ok1 || !ok2 || !ok3 || !ok4 {
		return false
	}
	isMap := d.attrs[dreg] != nil
	s := d.sets[string(name)]
	var fields netfilter.Field
	known, hasKeys := false, false
	if s == nil {
		d.missing = true
	} else {
		if v := d.valueAt(first, s.keySize); v != nil && v.load == loadNumgen && !v.masked && isMap {
			return d.choice(s, v, to)
		}
		fields, known = d.fieldsAt(first, s.types)
		hasKeys = known && d.foreign && f == 0
		known = known && (!s.broken || !s.anonymous()) // a named one is Opaque then
	}
	const inverted = 1 // NFT_LOOKUP_F_INV
	e := netfilter.Expr{Kind: netfilter.InSet, N: uint16(fields)}
	if f&inverted != 0 {
		e.Flags = netfilter.Not
	}
	if known && isMap {
		e.Kind = netfilter.VerdictMap
		known = s.verdicts && to == 0
	}
	if known = known && f&^inverted == 0 && !(isMap && f != 0); known {
		e.A, known = d.numberOf(s)
	}
	what := "lookup in @" + string(name[:min(len(name), 128)])
	switch {
	case known:
		d.chain.Add(e)
		d.done = isMap
	case !isMap:
		d.chain.AddText(netfilter.Unknown, 0, 0, undecoded(what))
	case to == 0:
		d.chain.AddText(netfilter.UnknownTarget, 0, 0, undecoded("vmap: "+what))
	default:
		// The lookup may end the rule: only a statement that uses the value says so.
		if hasKeys {
			if e.A, known = d.numberOf(s); known {
				d.chain.Add(netfilter.Expr{Kind: netfilter.InSet, N: uint16(fields), A: e.A})
			}
		}
		return d.store(to, liveValue{load: loadOther, name: "map: " + what, size: 4 * nfnetlink.Registers})
	}
	return true
}

// numberOf returns the number of a set in the table. An anonymous one gets it
// now, with its elements in the order of nft.
func (d *liveDecoder) numberOf(s *liveSet) (uint32, bool) {
	if !s.anonymous() {
		return s.number, true
	}
	out := &netfilter.Set{Map: s.flags&setMap != 0}
	if s.numbers != 0 || s.flags&(setTimeout|setEval|setObject) != 0 || out.Map && !s.verdicts && !d.foreign || !d.fill(out, s, s.raw) {
		return 0, false
	}
	if i := len(d.numbers); i < len(d.before) && d.table.Set(d.before[i]).Equal(out) {
		d.numbers = append(d.numbers, d.before[i])
	} else {
		d.numbers = append(d.numbers, d.table.AddSet(out))
	}
	return d.numbers[len(d.numbers)-1], true
}

// choice reads a lookup of a random number.
func (d *liveDecoder) choice(s *liveSet, v *liveValue, to uint32) bool {
	if to != 0 {
		return d.store(to, liveValue{load: loadChoice, a: v.a, b: v.b, set: s, size: max(s.dataSize, 1)})
	}
	ok := s.verdicts && d.choose(s, v.a, v.b, func(e *liveElement) (netfilter.Expr, bool) { return d.verdictOf(e.data) })
	if !ok {
		d.chain.AddText(netfilter.UnknownTarget, 0, 0, undecoded("vmap: numgen in @"+s.name[:min(len(s.name), 128)]))
	}
	return true
}

// choose adds a random choice. Numbers that lead to the same place count
// together, those without a place let the packet go on. It reports whether it
// understood all of the map.
func (d *liveDecoder) choose(s *liveSet, mod, offset uint32, read func(*liveElement) (netfilter.Expr, bool)) bool {
	type way struct {
		number  uint32
		verdict netfilter.Expr
	}
	var ways []way
	if s.numbers != 0 && (s.numbers != mod || s.first != offset) {
		return false
	}
	// A named map may be changed by others, and its elements are not kept.
	if !s.anonymous() || s.flags&(setInterval|setTimeout|setEval|setObject) != 0 || s.keySize != 4 || mod == 0 {
		return false
	}
	ok := eachElement(s.raw, func(e *liveElement) bool {
		if len(e.key) != 4 || e.flags != 0 || e.hasEnd {
			return false
		}
		n := binary.NativeEndian.Uint32(e.key)
		if n < offset || n-offset >= mod {
			return true // no number leads there
		}
		x, ok := read(e)
		ways = append(ways, way{n, x})
		return ok
	})
	if !ok {
		return false
	}
	slices.SortStableFunc(ways, func(a, b way) int {
		switch {
		case a.number < b.number:
			return -1
		case a.number > b.number:
			return 1
		}
		return 0
	})
	var choices []netfilter.Choice
	at := map[netfilter.Expr]int{}
	for i, w := range ways {
		if i > 0 && ways[i-1].number == w.number {
			continue
		}
		if j, ok := at[w.verdict]; ok {
			choices[j].Count++
			continue
		}
		at[w.verdict] = len(choices)
		choices = append(choices, netfilter.Choice{Count: 1, Verdict: w.verdict})
	}
	d.chain.AddChoose(mod, choices)
	d.done = true
	return true
}

// dynset reads the entry of a packet in a set. It changes nothing for this one.
func (d *liveDecoder) dynset(b []byte) bool {
	const set, op, sreg, timeout, last = 1, 3, 4, 6, 10
	nfnetlink.Collect(b, d.attrs[:last+1])
	name := nfnetlink.String(d.attrs[set])
	kind, ok1 := d.number(op)
	from, ok2 := d.number(sreg)
	first, ok3 := nfnetlink.Slot(from)
	if !ok1 || !ok2 || !ok3 || kind > 2 {
		return false
	}
	seconds := uint64(0)
	if ms, ok := nfnetlink.Uint64(d.attrs[timeout]); ok {
		seconds = ms / 1000
	}
	var fields netfilter.Field
	known := false
	if s := d.sets[string(name)]; s != nil {
		fields, known = d.fieldsAt(first, s.types)
		const deletes = 2 // NFT_DYNSET_OP_DELETE
		if !s.anonymous() && kind != deletes {
			d.fills = append(d.fills, s.name)
		}
	} else {
		d.missing = true
	}
	text := undecoded("dynset @" + string(name[:min(len(name), 128)]))
	if known {
		key := d.keyJSON(fields)
		if seconds != 0 {
			key = fmt.Sprintf(`{"elem": {"val": %s, "timeout": %d}}`, key, seconds)
		}
		text = fmt.Appendf(nil, `{"set": {"op": "%s", "elem": %s, "set": %s}}`, [...]string{"add", "update", "delete"}[kind], key, quoted("@"+string(name)))
	}
	d.chain.AddText(netfilter.NoEffect, 0, 0, text)
	return true
}

// keyJSON returns fields as nft prints them.
func (d *liveDecoder) keyJSON(f netfilter.Field) string {
	ip := "ip"
	if d.table.Family == netfilter.IPv6 {
		ip = "ip6"
	}
	var out []string
	for _, part := range []struct {
		field netfilter.Field
		text  string
	}{
		{netfilter.FieldSource, `{"payload": {"protocol": "` + ip + `", "field": "saddr"}}`},
		{netfilter.FieldDestination, `{"payload": {"protocol": "` + ip + `", "field": "daddr"}}`},
		{netfilter.FieldProtocol, `{"meta": {"key": "l4proto"}}`},
		{netfilter.FieldPort, `{"payload": {"protocol": "th", "field": "dport"}}`},
	} {
		if f&part.field != 0 {
			out = append(out, part.text)
		}
	}
	if len(out) == 1 {
		return out[0]
	}
	return `{"concat": [` + strings.Join(out, ", ") + `]}`
}

// natRange is what a statement rewrites to; what is invalid or 0 stays.
type natRange struct {
	minAddr, maxAddr netip.Addr
	minPort, maxPort uint16
	hasPort          bool
	flags            uint32
}

// Flags of nat (NF_NAT_RANGE_* in linux/netfilter/nf_nat.h). The first two say
// what is given, which the registers say, too.
const (
	natGiven                           = 0x1 | 0x2
	natRandom, natPersistent, natFully = 0x4, 0x8, 0x10
)

// json returns the body of a statement as nft prints it.
func (r natRange) json() []byte {
	var parts []string
	add := func(name, from, to string) {
		if from != to {
			from = `{"range": [` + from + `, ` + to + `]}`
		}
		parts = append(parts, `"`+name+`": `+from)
	}
	if r.minAddr.IsValid() {
		add("addr", `"`+r.minAddr.String()+`"`, `"`+r.maxAddr.String()+`"`)
	}
	if r.hasPort {
		add("port", fmt.Sprint(r.minPort), fmt.Sprint(r.maxPort))
	}
	var flags []string
	for _, f := range []struct {
		bit  uint32
		text string
	}{{natRandom, "random"}, {natFully, "fully-random"}, {natPersistent, "persistent"}} {
		if r.flags&f.bit != 0 {
			flags = append(flags, `"`+f.text+`"`)
		}
	}
	switch len(flags) {
	case 0:
	case 1:
		parts = append(parts, `"flags": `+flags[0])
	default:
		parts = append(parts, `"flags": [`+strings.Join(flags, ", ")+`]`)
	}
	if parts == nil {
		return []byte("null")
	}
	return []byte("{" + strings.Join(parts, ", ") + "}")
}

// constant returns what a register was given, nil when that is no constant of
// that size.
func (d *liveDecoder) constant(typ, size int) []byte {
	register, ok := d.number(typ)
	if !ok {
		return nil
	}
	v := d.value(register, size)
	if v == nil {
		return d.part(register, size)
	}
	if v.load != loadImmediate || len(v.data) < size {
		return nil
	}
	return v.data[:size]
}

// part is constant for a register within a longer value, such as the port behind
// an address.
func (d *liveDecoder) part(register uint32, size int) []byte {
	first, ok := nfnetlink.Slot(register)
	if !ok || d.regs[first] == 0 {
		return nil
	}
	v := &d.values[d.regs[first]-1]
	at := 4 * (first - v.slot)
	if v.load != loadImmediate || at < 0 || at+size > len(v.data) || !d.whole(v) {
		return nil
	}
	return v.data[at : at+size]
}

// whole reports whether no register of a value has been overwritten.
func (d *liveDecoder) whole(v *liveValue) bool {
	for i := range v.wide {
		if n := d.regs[v.slot+i]; n == 0 || &d.values[n-1] != v {
			return false
		}
	}
	return true
}

// ports reads the registers of ports into r. It returns false when they hold no
// constants.
func (d *liveDecoder) ports(r *natRange, from, to int) bool {
	if d.attrs[from] == nil {
		return d.attrs[to] == nil
	}
	low := d.constant(from, 2)
	high := low
	if d.attrs[to] != nil {
		high = d.constant(to, 2)
	}
	if low == nil || high == nil {
		return false
	}
	r.minPort, r.maxPort, r.hasPort = binary.BigEndian.Uint16(low), binary.BigEndian.Uint16(high), true
	return true
}

// nat reads dnat and snat.
func (d *liveDecoder) nat(b []byte) bool {
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
	// In a table of family inet it only acts on packets of its own (nft_nat_inet_eval
	// in net/netfilter/nft_nat.c).
	if of, _ := d.number(family); d.attrs[family] != nil && of != nfprotoInet && of != d.proto() {
		d.names(minAddr, maxAddr, minPort, maxPort) // are used
		d.chain.AddText(netfilter.NoEffect, 0, 0, undecoded("nat of the other family"))
		return true
	}
	rewrite := netfilter.SNAT
	if k == dnat {
		rewrite = netfilter.DNATRange
	}
	r := natRange{flags: f &^ natGiven}
	known := r.flags&^(natRandom|natPersistent|natFully) == 0
	if known && k == dnat && d.natChoice(minAddr, maxAddr, minPort, maxPort) {
		return true
	}
	if d.attrs[minAddr] != nil {
		low := d.constant(minAddr, d.addrSize())
		high := low
		if d.attrs[maxAddr] != nil {
			high = d.constant(maxAddr, d.addrSize())
		}
		if low == nil || high == nil {
			known = false
		} else {
			r.minAddr, _ = netip.AddrFromSlice(low)
			r.maxAddr, _ = netip.AddrFromSlice(high)
		}
	} else {
		known = known && d.attrs[maxAddr] == nil
	}
	known = d.ports(&r, minPort, maxPort) && known
	switch {
	case !known:
		// It does rewrite the address, but any may be the one.
		d.end(rewrite, 0, undecoded("nat: "+d.names(minAddr, minPort)))
		return true
	case k == dnat && r.minAddr.IsValid() && r.minAddr == r.maxAddr && r.minPort == r.maxPort:
		if d.chain.AddDNAT(netip.AddrPortFrom(r.minAddr, r.minPort)) == nil {
			d.done = true
			return true
		}
		return false
	}
	d.end(rewrite, 0, r.json())
	return true
}

// names tells what registers of d.attrs hold.
func (d *liveDecoder) names(types ...int) string {
	var out []string
	for _, typ := range types {
		if d.attrs[typ] != nil {
			register, _ := d.number(typ)
			out = append(out, d.value(register, 1).String())
		}
	}
	return strings.Join(out, ", ")
}

// natChoice reads a dnat to what a map gave for a random number: an address, or
// one with a port in the registers behind it. It returns false when the
// statement is anything else.
func (d *liveDecoder) natChoice(minAddr, maxAddr, minPort, maxPort int) bool {
	size := d.addrSize()
	from, ok := d.number(minAddr)
	if !ok || d.attrs[minAddr] == nil {
		return false
	}
	v := d.value(from, size)
	if v == nil || v.load != loadChoice || !d.same(maxAddr, v.slot) {
		return false
	}
	hasPort := d.attrs[minPort] != nil
	if hasPort {
		// The port is a part of the same value, behind the padded address.
		size += 4
		at := v.slot + d.addrSize()/4
		if !d.same(minPort, at) || !d.same(maxPort, at) || d.valueAt(v.slot, size) != v {
			return false
		}
	} else if d.attrs[maxPort] != nil {
		return false
	}
	if v.set.verdicts || v.size != size {
		return false
	}
	return d.choose(v.set, v.a, v.b, func(e *liveElement) (netfilter.Expr, bool) {
		var data [nftaDataVerdict + 1][]byte
		nfnetlink.Collect(e.data, data[:])
		to := data[nftaDataValue]
		if len(to) != size {
			return netfilter.Expr{}, false
		}
		a, _ := netip.AddrFromSlice(to[:d.addrSize()])
		var port uint16
		if hasPort {
			port = binary.BigEndian.Uint16(to[d.addrSize():])
		}
		x, err := d.chain.DNATTo(netip.AddrPortFrom(a, port))
		return x, err == nil
	})
}

// same reports whether a register attribute is missing, or names that word.
func (d *liveDecoder) same(typ, slot int) bool {
	if d.attrs[typ] == nil {
		return true
	}
	register, ok1 := d.number(typ)
	at, ok2 := nfnetlink.Slot(register)
	return ok1 && ok2 && at == slot
}

// natLocal reads masq and redir, which rewrite to an address of the node.
func (d *liveDecoder) natLocal(name string, b []byte) bool {
	flags, from, to := 1, 2, 3 // NFTA_MASQ_*
	kind := netfilter.Masquerade
	if name == "redir" {
		from, to, flags = 1, 2, 3 // NFTA_REDIR_*
		kind = netfilter.Redirect
	}
	if !d.collect(b, 3) {
		return false
	}
	f, ok := d.number(flags)
	r := natRange{flags: f &^ natGiven}
	ok = ok && r.flags&^(natRandom|natPersistent|natFully) == 0
	known := d.ports(&r, from, to)
	switch {
	case !ok:
		return false
	case kind == netfilter.Masquerade && known:
		d.end(kind, 0, r.json())
	case kind == netfilter.Masquerade:
		d.end(kind, 0, undecoded("masq: "+d.names(from)))
	case known && r.minPort == r.maxPort:
		d.end(kind, r.minPort, r.json())
	default: // to the node itself, but which port is not known
		d.end(netfilter.DNATRange, 0, undecoded("redir to several ports"))
	}
	return true
}

// rejectNames are the names that nft gives to the codes of enum
// nft_reject_inet_code, and to those of ICMP.
var rejectNames = map[bool][]string{
	true: {"net-unreachable", "host-unreachable", "prot-unreachable", "port-unreachable"},
	// ICMPv6
	false: {"no-route", "admin-prohibited", "", "addr-unreachable", "port-unreachable"},
}

func (d *liveDecoder) reject(b []byte) bool {
	const kind, code = 1, 2
	const icmp, reset, either = 0, 1, 2
	if !d.collect(b, code) {
		return false
	}
	k, ok := d.number(kind)
	if !ok || k > either {
		return false
	}
	text := `{"type": "tcp reset"}`
	if k != reset {
		n := 0
		if c := d.attrs[code]; len(c) == 1 {
			n = int(c[0])
		}
		is4 := d.table.Family == netfilter.IPv4
		names := rejectNames[is4]
		name := ""
		if k == icmp && n < len(names) {
			name = names[n]
		}
		how := "icmp"
		switch {
		case k == either:
			how = "icmpx"
		case !is4:
			how = "icmpv6"
		}
		text = fmt.Sprintf(`{"type": "%s", "expr": %d}`, how, n)
		if name != "" {
			text = fmt.Sprintf(`{"type": "%s", "expr": "%s"}`, how, name)
		}
	}
	d.end(netfilter.Reject, 0, []byte(text))
	return true
}

func (d *liveDecoder) count(b []byte) bool {
	const size, packets = 1, 2
	nfnetlink.Collect(b, d.attrs[:packets+1])
	n, ok1 := nfnetlink.Uint64(d.attrs[packets])
	m, ok2 := nfnetlink.Uint64(d.attrs[size])
	if ok1 && ok2 && !d.foreign {
		d.counter = &netfilter.Counter{Packets: n, Bytes: m}
	}
	return ok1 && ok2
}

// objref reads the use of a named object.
func (d *liveDecoder) objref(b []byte) bool {
	const kind, name = 1, 2
	const counter, quota, limit, connlimit = 1, 2, 4, 5 // NFT_OBJECT_*
	nfnetlink.Collect(b, d.attrs[:])
	k, ok := d.number(kind)
	if !ok || d.attrs[kind] == nil {
		return false // looked up in a map
	}
	switch k {
	case counter:
		return true // lets all packets pass
	case quota, limit, connlimit:
		text := string(nfnetlink.String(d.attrs[name]))
		d.chain.AddText(netfilter.Unknown, 0, 0, undecoded("object "+text[:min(len(text), 128)]))
		return true
	}
	return false
}

func (d *liveDecoder) log(b []byte) {
	const group, prefix, level = 1, 2, 5
	nfnetlink.Collect(b, d.attrs[:])
	var parts []string
	if p := d.attrs[prefix]; p != nil {
		parts = append(parts, `"prefix": `+quoted(string(nfnetlink.String(p))))
	}
	if g := d.attrs[group]; len(g) == 2 {
		parts = append(parts, fmt.Sprintf(`"group": %d`, binary.BigEndian.Uint16(g)))
	}
	levels := [...]string{"emerg", "alert", "crit", "err", "", "notice", "info", "debug", "audit"} // 4, warn, is usual
	if l, ok := nfnetlink.Uint32(d.attrs[level]); ok && l < uint32(len(levels)) && levels[l] != "" {
		parts = append(parts, `"level": "`+levels[l]+`"`)
	}
	text := "null"
	if parts != nil {
		text = "{" + strings.Join(parts, ", ") + "}"
	}
	d.chain.AddText(netfilter.NoEffect, 0, 0, []byte(`{"log": `+text+`}`))
}
