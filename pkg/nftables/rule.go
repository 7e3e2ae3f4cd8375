package nftables

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"

	"github.com/natlens/natlens/pkg/netfilter"
)

// ruleBuilder turns the statements of one rule into expressions.
type ruleBuilder struct {
	table   *table
	chain   *netfilter.Chain
	counter *netfilter.Counter
	done    bool // a verdict has been added
}

// comment puts a rule's comment in front of its expressions.
func (b *ruleBuilder) comment(start int, text string) {
	b.chain.Prepend(start, netfilter.Comment, []byte(text))
}

// expression adds one statement of a rule.
func (b *ruleBuilder) expression(raw json.RawMessage) error {
	var o map[string]json.RawMessage
	if err := json.Unmarshal(raw, &o); err != nil || len(o) != 1 {
		return errors.New("expected an object with one statement")
	}
	for name, body := range o {
		if name != "match" && b.done {
			return fmt.Errorf("a statement behind the verdict")
		}
		switch name {
		case "match":
			return b.match(body, raw)
		case "counter":
			return b.count(body)
		case "vmap":
			return b.vmap(body, raw)
		case "mangle":
			return b.mangle(body, raw)
		case "set", "log", "ct count", "notrack", "limit", "quota", "xt", "flow", "meter", "last":
			return b.other(name, raw)
		}
		return b.verdict(name, body, raw)
	}
	return nil
}

// other keeps a statement that has no verdict.
func (b *ruleBuilder) other(name string, raw json.RawMessage) error {
	switch name {
	case "set":
		b.adds(raw)
		b.chain.AddText(netfilter.NoEffect, 0, 0, raw)
	case "log", "last":
		b.chain.AddText(netfilter.NoEffect, 0, 0, raw)
	case "notrack":
		b.chain.AddText(netfilter.NoTrack, 0, 0, raw)
	case "xt":
		b.table.foreign = true
	default:
		b.unknown(raw)
	}
	return nil
}

// adds notes that packets add elements to a set.
func (b *ruleBuilder) adds(raw json.RawMessage) {
	var o struct {
		Set struct{ Op, Set string }
	}
	if json.Unmarshal(raw, &o) != nil || o.Set.Op == "delete" {
		return
	}
	if n, ok := b.table.sets[strings.TrimPrefix(o.Set.Set, "@")]; ok {
		b.table.Set(n).Dynamic = true
	}
}

func (b *ruleBuilder) unknown(raw json.RawMessage) { b.chain.AddText(netfilter.Unknown, 0, 0, raw) }

func (b *ruleBuilder) count(body json.RawMessage) error {
	var o struct{ Packets, Bytes uint64 }
	if json.Unmarshal(body, &o) == nil { // a named counter is a text
		b.counter = &netfilter.Counter{Packets: o.Packets, Bytes: o.Bytes}
	}
	return nil
}

// operand is one side of a match.
type operand struct {
	Payload *struct{ Protocol, Field string }
	Meta    *struct{ Key string }
	CT      *struct{ Key string }
	Fib     *struct {
		Result string
		Flags  []string
	}
	And    []json.RawMessage `json:"&"`
	Concat []json.RawMessage
	Numgen *struct {
		Mode   string
		Mod    uint32
		Offset uint32
	}
}

// field returns the field of a packet that an operand names, and what else
// must hold for it to have one.
func (o *operand) field() (f netfilter.Field, protocol string, ok bool) {
	switch {
	case o.Payload != nil:
		isIP := o.Payload.Protocol == "ip" || o.Payload.Protocol == "ip6"
		switch o.Payload.Field {
		case "saddr", "daddr":
			if !isIP {
				return 0, "", false
			}
		}
		switch o.Payload.Field {
		case "saddr":
			return netfilter.FieldSource, "", true
		case "daddr":
			return netfilter.FieldDestination, "", true
		case "dport":
			return netfilter.FieldPort, o.Payload.Protocol, true
		}
	case o.Meta != nil && o.Meta.Key == "l4proto":
		return netfilter.FieldProtocol, "", true
	}
	return 0, "", false
}

// fields returns the fields of an operand that may be a concatenation.
func (o *operand) fields() (netfilter.Field, bool) {
	if o.Concat == nil {
		f, protocol, ok := o.field()
		return f, ok && (protocol == "" || protocol == "th")
	}
	var all netfilter.Field
	for _, raw := range o.Concat {
		var part operand
		if json.Unmarshal(raw, &part) != nil {
			return 0, false
		}
		f, protocol, ok := part.field()
		if !ok || protocol != "" && protocol != "th" || all&f != 0 || f == netfilter.FieldSource && all&netfilter.FieldDestination != 0 {
			return 0, false
		}
		all |= f
	}
	return all, true
}

// types returns the types of an operand's parts, as far as they matter for
// reading the elements of an anonymous set.
func (o *operand) types() []string {
	if o.Meta != nil && o.Meta.Key == "l4proto" {
		return []string{"inet_proto"}
	}
	var out []string
	for _, raw := range o.Concat {
		var part operand
		name := ""
		if json.Unmarshal(raw, &part) == nil && part.Meta != nil && part.Meta.Key == "l4proto" {
			name = "inet_proto"
		}
		out = append(out, name)
	}
	return out
}

func (b *ruleBuilder) match(body, raw json.RawMessage) error {
	var o struct {
		Op          string
		Left, Right json.RawMessage
	}
	if err := json.Unmarshal(body, &o); err != nil {
		return err
	}
	var left operand
	start := b.chain.Mark()
	if json.Unmarshal(o.Left, &left) == nil && b.otherFamily(&left) {
		return nil
	}
	if json.Unmarshal(o.Left, &left) != nil || (o.Op != "==" && o.Op != "!=" && o.Op != "in") || !b.known(&left, o.Op == "!=", o.Right) {
		b.chain.Undo(start)
		b.unknown(raw)
	}
	return nil
}

// otherFamily reports whether an operand is of packets of the other family than the
// table's, as they come in a table of family inet. If so, it adds a match that never
// holds.
func (b *ruleBuilder) otherFamily(o *operand) bool {
	own, other := "ip", "ip6"
	if b.table.Family == netfilter.IPv6 {
		own, other = other, own
	}
	if o.Payload != nil && o.Payload.Protocol == other {
		addFamily(b.chain, familyNames[other], 0, false)
		return true
	}
	for _, raw := range slices.Concat(o.Concat, o.And) {
		var part operand
		if json.Unmarshal(raw, &part) == nil && part.Payload != nil && part.Payload.Protocol != own && b.otherFamily(&part) {
			return true
		}
	}
	return false
}

// familyNames are the names of the families where "meta nfproto" is compared.
var familyNames = map[string]string{"ip": "ipv4", "ip6": "ipv6"}

// nfProto adds a comparison with the family of the packet.
func (b *ruleBuilder) nfProto(flags uint8, right json.RawMessage) bool {
	name := map[string]string{`"ipv4"`: "ipv4", "2": "ipv4", `"ipv6"`: "ipv6", "10": "ipv6"}[string(right)]
	if name != "" {
		addFamily(b.chain, name, flags, name == b.table.Family.String())
	}
	return name != ""
}

// known adds a match, and reports whether it understood it.
func (b *ruleBuilder) known(left *operand, not bool, right json.RawMessage) bool {
	var flags uint8
	if not {
		flags = netfilter.Not
	}
	switch {
	case left.CT != nil:
		return b.ct(left.CT.Key, flags, right)
	case left.Fib != nil:
		return b.fib(left.Fib.Result, left.Fib.Flags, flags, right)
	case left.And != nil:
		return b.markBits(left.And, flags, right)
	case left.Meta != nil:
		switch left.Meta.Key {
		case "nfproto":
			return b.nfProto(flags, right)
		case "mark":
			var v uint32
			ok := json.Unmarshal(right, &v) == nil
			b.chain.Add(netfilter.Expr{Kind: netfilter.MarkIs, Flags: flags, A: v, B: math.MaxUint32})
			return ok
		case "iifname", "oifname":
			return b.interfaceName(left.Meta.Key, flags, right)
		}
	}
	if name, ok := setName(right); ok {
		return b.inSet(left, flags, name)
	}
	f, protocol, ok := left.field()
	if !ok {
		return false
	}
	if list, ok := anonymous(right); ok {
		return b.inAnonymousSet(left, flags, list)
	}
	switch f {
	case netfilter.FieldProtocol:
		return b.protocol(flags, right)
	case netfilter.FieldPort:
		return b.port(protocol, flags, right)
	}
	return b.address(f, flags, right)
}

func setName(right json.RawMessage) (string, bool) {
	var text string
	if json.Unmarshal(right, &text) != nil {
		return "", false
	}
	return strings.CutPrefix(text, "@")
}

func anonymous(right json.RawMessage) ([]json.RawMessage, bool) {
	var o struct{ Set []json.RawMessage }
	return o.Set, json.Unmarshal(right, &o) == nil && o.Set != nil
}

func (b *ruleBuilder) inSet(left *operand, flags uint8, name string) bool {
	n, ok := b.table.sets[name]
	f, known := left.fields()
	b.chain.Add(netfilter.Expr{Kind: netfilter.InSet, Flags: flags, N: uint16(f), A: n})
	return ok && known
}

func (b *ruleBuilder) inAnonymousSet(left *operand, flags uint8, list []json.RawMessage) bool {
	f, ok := left.fields()
	if !ok {
		return false
	}
	s := &netfilter.Set{}
	types := left.types()
	for _, raw := range list {
		if addKey(s, types, raw, netfilter.SetElement{}) != nil {
			return false
		}
	}
	b.chain.Add(netfilter.Expr{Kind: netfilter.InSet, Flags: flags, N: uint16(f), A: b.table.AddSet(s)})
	return true
}

func (b *ruleBuilder) address(f netfilter.Field, flags uint8, right json.RawMessage) bool {
	s := &netfilter.Set{}
	if addKey(s, nil, right, netfilter.SetElement{}) != nil || s.Len() != 1 {
		return false
	}
	kind := netfilter.Source
	if f == netfilter.FieldDestination {
		kind = netfilter.Destination
	}
	if len(s.Keys) == 1 {
		a := s.Keys[0].Addr
		return a.IsValid() && b.chain.AddPrefix(kind, flags, a, onesOf(a, a.BitLen())) == nil
	}
	// A prefix was read as a range; its text has the bits.
	var o struct {
		Prefix struct {
			Addr netip.Addr
			Len  int
		}
	}
	if json.Unmarshal(right, &o) != nil || !o.Prefix.Addr.IsValid() {
		return false
	}
	return b.chain.AddPrefix(kind, flags, o.Prefix.Addr, onesOf(o.Prefix.Addr, o.Prefix.Len)) == nil
}

func onesOf(a netip.Addr, bits int) netip.Addr {
	every := netfilter.SpanOf(netip.PrefixFrom(a, 0))
	p, _ := every.To.Prefix(bits)
	return p.Addr()
}

func (b *ruleBuilder) protocol(flags uint8, right json.RawMessage) bool {
	var text string
	if json.Unmarshal(right, &text) == nil {
		if p, err := netfilter.ParseProtocol(text); err == nil {
			b.chain.Add(netfilter.Expr{Kind: netfilter.ProtocolIs, Flags: flags, A: uint32(p)})
			return true
		}
		return false
	}
	var n uint8
	ok := json.Unmarshal(right, &n) == nil
	b.chain.Add(netfilter.Expr{Kind: netfilter.ProtocolIs, Flags: flags, A: uint32(n)})
	return ok
}

// port adds a match of the destination port. "tcp dport" asks for the protocol
// too, "th dport" for any.
func (b *ruleBuilder) port(protocol string, flags uint8, right json.RawMessage) bool {
	if protocol != "th" {
		p, err := netfilter.ParseProtocol(protocol)
		if err != nil {
			return false
		}
		b.chain.Add(netfilter.Expr{Kind: netfilter.ProtocolIs, A: uint32(p)})
	}
	var o struct{ Range []uint16 }
	var n uint16
	switch {
	case json.Unmarshal(right, &n) == nil:
		o.Range = []uint16{n, n}
	case json.Unmarshal(right, &o) != nil || len(o.Range) != 2:
		return false
	}
	b.chain.Add(netfilter.Expr{Kind: netfilter.DestinationPort, Flags: flags, A: uint32(o.Range[0]), B: uint32(o.Range[1])})
	return true
}

func (b *ruleBuilder) interfaceName(key string, flags uint8, right json.RawMessage) bool {
	var text string
	if json.Unmarshal(right, &text) != nil || strings.HasPrefix(text, "@") {
		return false
	}
	if prefix, ok := strings.CutSuffix(text, "*"); ok {
		text = prefix + "+"
	}
	kind := netfilter.InInterface
	if key == "oifname" {
		kind = netfilter.OutInterface
	}
	b.chain.AddText(kind, flags, 0, []byte(text))
	return true
}

var ctStates = map[string]uint32{
	"invalid": netfilter.CTInvalid, "new": netfilter.CTNew, "related": netfilter.CTRelated,
	"established": netfilter.CTEstablished, "untracked": netfilter.CTUntracked,
}

var ctStatuses = map[string]uint32{"dnat": netfilter.CTDNATed, "snat": netfilter.CTSNATed}

// ctBits are the same as numbers (NF_CT_STATE_BIT and enum ip_conntrack_status
// in linux/netfilter/nf_conntrack_common.h).
var ctBits = map[string][]struct {
	bit  uint32
	text string
}{
	"state":  {{1, "invalid"}, {2, "established"}, {4, "related"}, {8, "new"}, {64, "untracked"}},
	"status": {{16, "snat"}, {32, "dnat"}},
}

func (b *ruleBuilder) ct(key string, flags uint8, right json.RawMessage) bool {
	names := ctStates
	switch key {
	case "state":
	case "status":
		names = ctStatuses
	default:
		return false
	}
	e := netfilter.Expr{Kind: netfilter.CTState, Flags: flags}
	var number uint32
	var list []string
	var one string
	var set struct{ Set []string }
	switch {
	case json.Unmarshal(right, &set) == nil && set.Set != nil:
		list = set.Set
	case json.Unmarshal(right, &list) == nil:
	case json.Unmarshal(right, &one) == nil:
		list = []string{one}
	case json.Unmarshal(right, &number) == nil:
		for _, name := range ctBits[key] {
			if number&name.bit != 0 {
				list = append(list, name.text)
			}
			number &^= name.bit
		}
		if number != 0 {
			return false
		}
	default:
		return false
	}
	for _, name := range list {
		bit, ok := names[name]
		if !ok {
			return false
		}
		e.A |= bit
	}
	b.chain.Add(e)
	return true
}

func (b *ruleBuilder) fib(result string, of []string, flags uint8, right json.RawMessage) bool {
	var text string
	_ = json.Unmarshal(right, &text)
	if result != "type" || len(of) != 1 || text != "local" && string(right) != "2" { // RTN_LOCAL
		return false
	}
	kind := netfilter.SourceType
	switch of[0] {
	case "saddr":
	case "daddr":
		kind = netfilter.DestinationType
	default:
		return false
	}
	b.chain.Add(netfilter.Expr{Kind: kind, Flags: flags, A: netfilter.AddrLocal})
	return true
}

// markBits adds "mark & MASK == VALUE".
func (b *ruleBuilder) markBits(operands []json.RawMessage, flags uint8, right json.RawMessage) bool {
	mask, ok := ofMark(operands)
	var value uint32
	if !ok || json.Unmarshal(right, &value) != nil {
		return false
	}
	b.chain.Add(netfilter.Expr{Kind: netfilter.MarkIs, Flags: flags, A: value, B: mask})
	return true
}

// ofMark returns the number of "mark OP number".
func ofMark(operands []json.RawMessage) (uint32, bool) {
	var left operand
	var n uint32
	if len(operands) != 2 || json.Unmarshal(operands[0], &left) != nil || left.Meta == nil || left.Meta.Key != "mark" {
		return 0, false
	}
	return n, json.Unmarshal(operands[1], &n) == nil
}

// mangle adds "mark set VALUE", where the value may be made of the mark.
func (b *ruleBuilder) mangle(body, raw json.RawMessage) error {
	var o struct {
		Key   operand
		Value json.RawMessage
	}
	if err := json.Unmarshal(body, &o); err != nil {
		return err
	}
	if o.Key.Meta == nil || o.Key.Meta.Key != "mark" {
		b.chain.AddText(netfilter.NoEffect, 0, 0, raw)
		return nil
	}
	e := netfilter.Expr{Kind: netfilter.SetMark, B: math.MaxUint32}
	var v struct {
		Or  []json.RawMessage `json:"|"`
		And []json.RawMessage `json:"&"`
		Xor []json.RawMessage `json:"^"`
	}
	ok := true
	switch {
	case json.Unmarshal(o.Value, &e.A) == nil:
	case json.Unmarshal(o.Value, &v) != nil:
		ok = false
	case v.Or != nil:
		e.A, ok = ofMark(v.Or)
		e.B = e.A
	case v.Xor != nil:
		e.A, ok = ofMark(v.Xor)
		e.B = 0
	case v.And != nil:
		e.B, ok = ofMark(v.And)
		e.B = ^e.B
	default:
		ok = false
	}
	if !ok {
		b.chain.AddText(netfilter.UnknownTarget, 0, 0, raw)
		return nil
	}
	b.chain.Add(e)
	return nil
}

// vmap adds "KEY vmap @map" or "numgen … vmap { … }".
func (b *ruleBuilder) vmap(body, raw json.RawMessage) error {
	b.done = true
	var o struct {
		Key  operand
		Data json.RawMessage
	}
	if err := json.Unmarshal(body, &o); err != nil {
		return err
	}
	if b.otherFamily(&o.Key) {
		return nil
	}
	if o.Key.Numgen != nil {
		list, ok := anonymous(o.Data)
		if !ok {
			return errors.New("a random choice from a named map")
		}
		return b.choose(o.Key.Numgen.Mod, o.Key.Numgen.Offset, list, func(raw json.RawMessage) (netfilter.Expr, error) { return verdictOf(b.table, raw) })
	}
	f, ok := o.Key.fields()
	if !ok {
		b.chain.AddText(netfilter.UnknownTarget, 0, 0, raw)
		return nil
	}
	e := netfilter.Expr{Kind: netfilter.VerdictMap, N: uint16(f)}
	if name, ok := setName(o.Data); ok {
		if e.A, ok = b.table.sets[name]; !ok {
			return fmt.Errorf("map %q is not listed", name)
		}
	} else if list, ok := anonymous(o.Data); ok {
		var err error
		if e.A, err = b.anonymousMap(o.Key.types(), list); err != nil {
			b.chain.AddText(netfilter.UnknownTarget, 0, 0, raw)
			return nil
		}
	} else {
		return errors.New("a map that is neither named nor listed")
	}
	b.chain.Add(e)
	return nil
}

func (b *ruleBuilder) anonymousMap(types []string, list []json.RawMessage) (uint32, error) {
	s := &netfilter.Set{Map: true}
	for _, raw := range list {
		key, verdict, comment, err := splitElement(raw)
		if err != nil {
			return 0, err
		}
		v, err := verdictOf(b.table, verdict)
		if err != nil {
			return 0, err
		}
		if err := addKey(s, types, key, netfilter.SetElement{Verdict: v, Comment: comment}); err != nil {
			return 0, err
		}
	}
	return b.table.AddSet(s), nil
}

// choose adds a random choice. Numbers that lead to the same place count
// together, those without a place let the packet go on.
func (b *ruleBuilder) choose(mod, offset uint32, list []json.RawMessage, read func(json.RawMessage) (netfilter.Expr, error)) error {
	if mod == 0 {
		return errors.New("numgen mod 0")
	}
	var choices []netfilter.Choice
	at := map[netfilter.Expr]int{}
	seen := map[uint32]bool{}
	for _, raw := range list {
		key, value, _, err := splitElement(raw)
		if err != nil {
			return err
		}
		var n uint32
		if err := json.Unmarshal(key, &n); err != nil {
			return fmt.Errorf("key %s: %w", excerpt(key), err)
		}
		if n < offset || n-offset >= mod || seen[n] {
			continue // no number leads there
		}
		seen[n] = true
		e, err := read(value)
		if err != nil {
			return err
		}
		if i, ok := at[e]; ok {
			choices[i].Count++
			continue
		}
		at[e] = len(choices)
		choices = append(choices, netfilter.Choice{Count: 1, Verdict: e})
	}
	b.chain.AddChoose(mod, choices)
	return nil
}

// verdictOf reads {"goto": {"target": …}}, {"drop": null} and their like.
func verdictOf(t *table, raw json.RawMessage) (netfilter.Expr, error) {
	var o map[string]json.RawMessage
	if err := json.Unmarshal(raw, &o); err != nil || len(o) != 1 {
		return netfilter.Expr{}, fmt.Errorf("%s is not a verdict", excerpt(raw))
	}
	for name, body := range o {
		kind, ok := map[string]netfilter.Kind{
			"accept": netfilter.Accept, "drop": netfilter.Drop, "return": netfilter.Return,
			"jump": netfilter.Jump, "goto": netfilter.Goto,
		}[name]
		if !ok {
			break
		}
		e := netfilter.Expr{Kind: kind}
		if kind == netfilter.Jump || kind == netfilter.Goto {
			var target struct{ Target string }
			if err := json.Unmarshal(body, &target); err != nil || target.Target == "" {
				return e, fmt.Errorf("%s has no target", excerpt(raw))
			}
			e.A = uint32(t.ID(target.Target))
		}
		return e, nil
	}
	return netfilter.Expr{}, fmt.Errorf("%s is not a verdict", excerpt(raw))
}

func (b *ruleBuilder) verdict(name string, body, raw json.RawMessage) error {
	b.done = true
	switch name {
	case "accept", "drop", "return", "jump", "goto":
		e, err := verdictOf(b.table, raw)
		if err != nil {
			return err
		}
		b.chain.Add(e)
	case "continue":
		b.done = false
	case "reject":
		b.chain.AddText(netfilter.Reject, 0, 0, body)
	case "masquerade":
		b.chain.AddText(netfilter.Masquerade, 0, 0, body)
	case "snat":
		b.chain.AddText(netfilter.SNAT, 0, 0, body)
	case "redirect":
		var o struct{ Port uint16 }
		_ = json.Unmarshal(body, &o) // without a number, the port stays
		b.chain.AddText(netfilter.Redirect, 0, o.Port, body)
	case "queue":
		b.chain.AddText(netfilter.Queue, 0, 0, raw)
	case "dnat":
		return b.dnat(body)
	default: // it may be a verdict or not
		b.done = false
		b.chain.AddText(netfilter.UnknownTarget, 0, 0, raw)
	}
	return nil
}

// dnat adds "dnat to ADDRESS:PORT", or "dnat to numgen … map { … }".
func (b *ruleBuilder) dnat(body json.RawMessage) error {
	var o struct {
		Family string
		Addr   json.RawMessage
		Port   json.RawMessage
	}
	if err := json.Unmarshal(body, &o); err != nil {
		return err
	}
	if name := familyNames[o.Family]; name != "" && name != b.table.Family.String() {
		b.done = false // it leaves packets of this family alone
		b.chain.AddText(netfilter.NoEffect, 0, 0, body)
		return nil
	}
	var text string
	var port uint16
	if o.Port != nil && json.Unmarshal(o.Port, &port) != nil {
		b.chain.AddText(netfilter.DNATRange, 0, 0, body)
		return nil
	}
	if json.Unmarshal(o.Addr, &text) == nil {
		a, err := netip.ParseAddr(text)
		if err != nil {
			return err
		}
		return b.chain.AddDNAT(netip.AddrPortFrom(a, port))
	}
	var m struct {
		Map *struct {
			Key  operand
			Data json.RawMessage
		}
	}
	if json.Unmarshal(o.Addr, &m) == nil && m.Map != nil && m.Map.Key.Numgen != nil {
		if list, ok := anonymous(m.Map.Data); ok {
			n := m.Map.Key.Numgen
			return b.choose(n.Mod, n.Offset, list, b.target)
		}
	}
	if m.Map != nil && b.table.others {
		b.hasKey(&m.Map.Key, m.Map.Data)
	}
	b.chain.AddText(netfilter.DNATRange, 0, 0, body)
	return nil
}

// hasKey adds that a map has the key that it is asked for: without, a rule that
// needs its value ends. What is not understood adds nothing.
func (b *ruleBuilder) hasKey(key *operand, data json.RawMessage) {
	f, ok := key.fields()
	if !ok || b.otherFamily(key) {
		return
	}
	e := netfilter.Expr{Kind: netfilter.InSet, N: uint16(f)}
	if name, named := setName(data); named {
		e.A, ok = b.table.sets[name]
	} else {
		var list []json.RawMessage
		if list, ok = anonymous(data); ok {
			s := &netfilter.Set{Map: true}
			for _, raw := range list {
				k, _, _, err := splitElement(raw)
				ok = ok && err == nil && addKey(s, key.types(), k, netfilter.SetElement{}) == nil
			}
			if ok {
				e.A = b.table.AddSet(s)
			}
		}
	}
	if ok {
		b.chain.Add(e)
	}
}

// target reads {"concat": ["10.0.0.1", 80]}, or an address alone.
func (b *ruleBuilder) target(raw json.RawMessage) (netfilter.Expr, error) {
	s := &netfilter.Set{}
	if err := addKey(s, nil, raw, netfilter.SetElement{}); err != nil || len(s.Keys) != 1 || !s.Keys[0].Addr.IsValid() {
		return netfilter.Expr{}, fmt.Errorf("%s is not a target of a dnat", excerpt(raw))
	}
	return b.chain.DNATTo(netip.AddrPortFrom(s.Keys[0].Addr, s.Keys[0].Port))
}
