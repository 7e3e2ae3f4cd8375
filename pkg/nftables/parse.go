package nftables

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/natlens/natlens/pkg/netfilter"
)

// Parse reads the JSON that "nft -j list ruleset", or "nft -j list table",
// prints. The name is used in errors only.
func Parse(r io.Reader, name string) (*netfilter.Ruleset, error) {
	data, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	var doc struct {
		Objects []map[string]json.RawMessage `json:"nftables"`
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("%s: not the JSON of nft -j list ruleset, or only a part of it: %w", name, err)
	}
	if doc.Objects == nil {
		return nil, fmt.Errorf("%s: JSON without \"nftables\": expected the output of nft -j list ruleset", name)
	}
	p := &parser{rules: &netfilter.Ruleset{}, tables: map[tableName][]*table{}}
	// Rules name chains and sets that may be listed behind them.
	for _, kinds := range [][]string{{"table"}, {"set", "map"}, {"chain"}, {"element"}, {"rule"}} {
		for i, o := range doc.Objects {
			for kind, raw := range o {
				if !slices.Contains(kinds, kind) {
					continue
				}
				if err := p.object(kind, raw); err != nil {
					return nil, fmt.Errorf("%s: object %d, a %s: %w", name, i+1, kind, err)
				}
			}
		}
	}
	for _, t := range p.order {
		p.finish(t)
	}
	if len(p.order) == 0 {
		return nil, fmt.Errorf("%s: holds no table of family ip, ip6 or inet", name)
	}
	return p.rules, nil
}

type tableName struct{ family, name string }

// table is a table while it is being read.
type table struct {
	*netfilter.Table
	// others says that neither kube-proxy nor iptables has it: of such a table only
	// some chains matter, and nothing in it is an error.
	others bool
	sets   map[string]uint32
	types  [][]string // of each named set's keys
	// values says of each named set that it maps keys to something else than verdicts,
	// so that only its keys are read.
	values []bool
	// foreign says that iptables-nft wrote it.
	foreign bool
}

type parser struct {
	rules  *netfilter.Ruleset
	tables map[tableName][]*table // one of family inet twice: for IPv4, and for IPv6
	order  []*table
}

// finish takes a table into the ruleset. One that nft cannot print in full is
// said to be unreadable.
func (p *parser) finish(t *table) {
	if t.others && !p.finishOthers(t) {
		return
	}
	if t.foreign {
		p.rules.Unreadable = append(p.rules.Unreadable, netfilter.Unreadable{
			Family: t.Family, Backend: netfilter.BackendNFT, Table: t.Name,
			Reason: "iptables-nft wrote it, and nft does not print what is in its rules: add what iptables-save prints with another -f",
		})
		return
	}
	t.Compact()
	p.rules.Tables = append(p.rules.Tables, t.Table)
}

// finishOthers leaves in another program's table what can decide where connections
// go. It reports whether there is anything.
func (p *parser) finishOthers(t *table) bool {
	if t.RuleCount() <= mostForeignRules {
		return directing(t.Table)
	}
	for c := range t.Chains() {
		if mayDirect(c.Base) && c.Len() > 0 {
			p.rules.Unreadable = append(p.rules.Unreadable, tooLarge(t.Family, t.Name))
			break
		}
	}
	return false
}

func (p *parser) object(kind string, raw json.RawMessage) error {
	switch kind {
	case "table":
		return p.table(raw)
	case "set", "map":
		return p.set(raw)
	case "chain":
		return p.chain(raw)
	case "element":
		return p.element(raw)
	}
	return p.rule(raw)
}

var families = map[string][]netfilter.Family{"ip": {netfilter.IPv4}, "ip6": {netfilter.IPv6}, "inet": {netfilter.IPv4, netfilter.IPv6}}

func (p *parser) table(raw json.RawMessage) error {
	var o struct{ Family, Name string }
	if err := json.Unmarshal(raw, &o); err != nil {
		return err
	}
	k := tableName{o.Family, o.Name}
	if p.tables[k] != nil {
		return fmt.Errorf("table %s %s stands here a second time", o.Family, o.Name)
	}
	for _, f := range families[o.Family] { // of others, such as bridge, no packet of a Service comes by
		p.tables[k] = append(p.tables[k], &table{
			Table:  netfilter.NewTable(f, foreignName(o.Family, o.Name), netfilter.BackendNFTables),
			others: isForeignTable(o.Family, o.Name), sets: map[string]uint32{},
		})
	}
	p.order = append(p.order, p.tables[k]...)
	return nil
}

// find returns the tables that an object belongs to, none for one of a family
// that is left out.
func (p *parser) find(family, name string) ([]*table, error) {
	if families[family] == nil {
		return nil, nil
	}
	t := p.tables[tableName{family, name}]
	if t == nil {
		return nil, fmt.Errorf("table %s %s is not listed", family, name)
	}
	return t, nil
}

// set reads a set or map with its elements.
func (p *parser) set(raw json.RawMessage) error {
	var o struct {
		Family, Table, Name string
		Type                json.RawMessage
		Map                 json.RawMessage
		Timeout             int
		Elem                []json.RawMessage
	}
	if err := json.Unmarshal(raw, &o); err != nil {
		return err
	}
	tables, err := p.find(o.Family, o.Table)
	for _, t := range tables {
		// nft 1.0.6 does not print the flag "dynamic": the rules tell which sets
		// packets add to.
		s := &netfilter.Set{Name: o.Name, Map: o.Map != nil, Timeout: time.Duration(o.Timeout) * time.Second}
		t.sets[o.Name] = t.AddSet(s)
		t.types = append(t.types, typeNames(o.Type))
		t.values = append(t.values, t.others && o.Map != nil && string(o.Map) != `"verdict"`)
		p.elements(t, s, t.sets[o.Name], o.Elem)
	}
	return err
}

// element reads elements that are listed apart from their set.
func (p *parser) element(raw json.RawMessage) error {
	var o struct {
		Family, Table, Name string
		Elem                []json.RawMessage
	}
	if err := json.Unmarshal(raw, &o); err != nil {
		return err
	}
	tables, err := p.find(o.Family, o.Table)
	for _, t := range tables {
		n, ok := t.sets[o.Name]
		if !ok {
			return fmt.Errorf("set %q is not listed", o.Name)
		}
		p.elements(t, t.Set(n), n, o.Elem)
	}
	return err
}

func typeNames(raw json.RawMessage) []string {
	var one string
	if json.Unmarshal(raw, &one) == nil {
		return []string{one}
	}
	var list []string
	if json.Unmarshal(raw, &list) == nil {
		return list
	}
	return nil
}

// keyTypes are the element types of which the fields of a key follow.
var keyTypes = map[string]bool{"ipv4_addr": true, "ipv6_addr": true, "inet_proto": true, "inet_service": true}

// elements puts elements into a set. One with elements that are not understood
// is opaque: nothing is known of what it holds.
func (p *parser) elements(t *table, s *netfilter.Set, n uint32, list []json.RawMessage) {
	types := t.types[n]
	for _, name := range types {
		if !keyTypes[name] {
			s.Opaque = true
			return
		}
	}
	for _, raw := range list {
		key, verdict, comment, err := splitElement(raw)
		e := netfilter.SetElement{Comment: comment}
		if err == nil && s.Map && !t.values[n] {
			e.Verdict, err = verdictOf(t, verdict)
		}
		if err == nil {
			err = addKey(s, types, key, e)
		}
		if err != nil {
			s.Opaque = true
			return
		}
	}
}

// splitElement takes an element apart: a key, or [key, verdict], where the key
// may have a comment: {"elem": {"val": key, "comment": "…"}}.
func splitElement(raw json.RawMessage) (key, verdict json.RawMessage, comment string, err error) {
	key = raw
	var pair []json.RawMessage
	if json.Unmarshal(raw, &pair) == nil {
		if len(pair) != 2 {
			return nil, nil, "", errors.New("expected a key and a verdict")
		}
		key, verdict = pair[0], pair[1]
	}
	var o struct {
		Elem *struct {
			Val     json.RawMessage
			Comment string
		}
	}
	if json.Unmarshal(key, &o) == nil && o.Elem != nil {
		return o.Elem.Val, verdict, o.Elem.Comment, nil
	}
	return key, verdict, "", nil
}

// addKey adds one key: a value, a concatenation, a prefix or a range. The types
// are those of its parts, as far as they are known.
func addKey(s *netfilter.Set, types []string, raw json.RawMessage, e netfilter.SetElement) error {
	if len(raw) == 0 {
		return errors.New("a key is missing")
	}
	var o struct {
		Concat []json.RawMessage
		Prefix *struct {
			Addr string
			Len  int
		}
		Range []string
	}
	if raw[0] == '{' {
		if err := json.Unmarshal(raw, &o); err != nil {
			return err
		}
	}
	switch {
	case s.Map && (o.Prefix != nil || o.Range != nil):
		return errors.New("an interval in a verdict map")
	case o.Prefix != nil:
		a, err := netip.ParseAddr(o.Prefix.Addr)
		if err != nil {
			return err
		}
		p, err := a.Prefix(o.Prefix.Len)
		if err != nil {
			return err
		}
		s.Ranges = append(s.Ranges, netfilter.SpanOf(p))
		return nil
	case len(o.Range) == 2:
		from, err1 := netip.ParseAddr(o.Range[0])
		to, err2 := netip.ParseAddr(o.Range[1])
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		s.Ranges = append(s.Ranges, netfilter.AddrSpan{From: from, To: to})
		return nil
	case o.Concat == nil:
		o.Concat = []json.RawMessage{raw}
	}
	var k netfilter.SetKey
	for i, part := range o.Concat {
		isProtocol := i < len(types) && types[i] == "inet_proto"
		if err := addField(&k, isProtocol, part); err != nil {
			return err
		}
	}
	s.Add(k, e)
	return nil
}

// addField adds one value to a key. A protocol stands there by name or, from
// an nft that was asked for numbers, as a number.
func addField(k *netfilter.SetKey, isProtocol bool, raw json.RawMessage) error {
	var n uint16
	if json.Unmarshal(raw, &n) == nil {
		if isProtocol {
			k.Protocol = netfilter.Protocol(n)
		} else {
			k.Port = n
		}
		return nil
	}
	var text string
	if err := json.Unmarshal(raw, &text); err != nil {
		return fmt.Errorf("%s is neither a number nor a text", excerpt(raw))
	}
	if a, err := netip.ParseAddr(text); err == nil {
		if k.Addr.IsValid() {
			k.Addr2 = a
		} else {
			k.Addr = a
		}
		return nil
	}
	if proto, err := netfilter.ParseProtocol(text); err == nil {
		k.Protocol = proto
		return nil
	}
	if port, err := strconv.ParseUint(text, 10, 16); err == nil {
		k.Port = uint16(port)
		return nil
	}
	return fmt.Errorf("%q is no address, protocol or port", text)
}

var hooks = map[string]netfilter.Hook{
	"prerouting": netfilter.Prerouting, "input": netfilter.Input, "forward": netfilter.Forward,
	"output": netfilter.Output, "postrouting": netfilter.Postrouting,
}

func (p *parser) chain(raw json.RawMessage) error {
	var o struct {
		Family, Table, Name, Type, Hook, Policy string
		Prio                                    int
	}
	if err := json.Unmarshal(raw, &o); err != nil {
		return err
	}
	tables, err := p.find(o.Family, o.Table)
	for _, t := range tables {
		c := t.Declare(o.Name)
		h, ok := hooks[o.Hook]
		if !ok {
			continue // no hook, or ingress and egress, which come before any nat
		}
		c.Base = &netfilter.Base{Hook: h, Priority: o.Prio, Policy: netfilter.Accept}
		if o.Type == "nat" {
			c.Base.Type = netfilter.TypeNAT
		}
		if o.Policy == "drop" {
			c.Base.Policy = netfilter.Drop
		}
	}
	return err
}

func (p *parser) rule(raw json.RawMessage) error {
	var o struct {
		Family, Table, Chain, Comment string
		Expr                          []json.RawMessage
	}
	if err := json.Unmarshal(raw, &o); err != nil {
		return err
	}
	tables, err := p.find(o.Family, o.Table)
	for _, t := range tables {
		c := t.Lookup(o.Chain)
		if c == nil {
			return fmt.Errorf("chain %q of table %s %s is not listed", o.Chain, o.Family, o.Table)
		}
		if err := t.rule(c, o.Expr, o.Comment); err != nil {
			return fmt.Errorf("chain %q: %w", o.Chain, err)
		}
	}
	return err
}

// rule adds a rule to a chain.
func (t *table) rule(c *netfilter.Chain, list []json.RawMessage, comment string) error {
	start := c.Mark()
	b := &ruleBuilder{table: t, chain: c}
	for _, e := range list {
		before := c.Mark()
		err := b.expression(e)
		if err == nil {
			continue
		}
		if !t.others {
			c.Undo(start)
			return fmt.Errorf("%s: %w", excerpt(e), err)
		}
		c.Undo(before)
		c.AddText(netfilter.UnknownTarget, 0, 0, e)
		break // what stands behind it runs or not
	}
	if comment != "" {
		b.comment(start, comment)
	}
	c.End(b.counter)
	return nil
}

func excerpt(raw []byte) string {
	const most = 160
	if len(raw) > most {
		return string(raw[:most]) + "…"
	}
	return string(raw)
}
