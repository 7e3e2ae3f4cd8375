package nftables

import (
	"fmt"
	"math"
	"net/netip"
	"strings"

	"github.com/natlens/natlens/pkg/netfilter"
)

// mostChoices bounds how many ways of a random choice are printed.
const mostChoices = 8

// RuleText returns the i-th rule of a chain in nft's language, behind the name
// of its chain, such as "services: ip daddr . meta l4proto . th dport vmap
// @service-ips".
func RuleText(t *netfilter.Table, c *netfilter.Chain, i int) string {
	p := printer{table: t, chain: c, ip: "ip"}
	if t.Family == netfilter.IPv6 {
		p.ip = "ip6"
	}
	words := []string{c.Name + ":"}
	var comment string
	for _, e := range c.Rule(i) {
		if e.Kind == netfilter.Comment {
			comment = fmt.Sprintf("comment %q", c.Text(e))
			continue
		}
		if w := p.expr(e); w != "" {
			words = append(words, w)
		}
	}
	if comment != "" {
		words = append(words, comment)
	}
	return strings.Join(words, " ")
}

type printer struct {
	table *netfilter.Table
	chain *netfilter.Chain
	ip    string // "ip" or "ip6"
}

func (p *printer) expr(e netfilter.Expr) string {
	op := ""
	if e.Negated() {
		op = "!= "
	}
	switch e.Kind {
	case netfilter.Source:
		return fmt.Sprintf("%s saddr %s%s", p.ip, op, p.prefix(e))
	case netfilter.Destination:
		return fmt.Sprintf("%s daddr %s%s", p.ip, op, p.prefix(e))
	case netfilter.InInterface:
		return fmt.Sprintf("iifname %s%q", op, interfaceText(p.chain.Text(e)))
	case netfilter.OutInterface:
		return fmt.Sprintf("oifname %s%q", op, interfaceText(p.chain.Text(e)))
	case netfilter.ProtocolIs:
		return "meta l4proto " + op + strings.ToLower(netfilter.Protocol(e.A).String())
	case netfilter.DestinationPort:
		if e.A == e.B {
			return fmt.Sprintf("th dport %s%d", op, e.A)
		}
		return fmt.Sprintf("th dport %s%d-%d", op, e.A, e.B)
	case netfilter.SourceType:
		return "fib saddr type " + op + "local"
	case netfilter.DestinationType:
		return "fib daddr type " + op + "local"
	case netfilter.CTState:
		return ctText(e, op)
	case netfilter.MarkIs:
		if e.B == math.MaxUint32 {
			return fmt.Sprintf("meta mark %s0x%08x", op, e.A)
		}
		if op == "" {
			op = "== "
		}
		return fmt.Sprintf("meta mark & 0x%08x %s0x%08x", e.B, op, e.A)
	case netfilter.InSet:
		return fmt.Sprintf("%s %s%s", p.fields(e), op, p.setText(e.A))
	case netfilter.SetMark:
		return markText(e)
	case netfilter.VerdictMap:
		return fmt.Sprintf("%s vmap %s", p.fields(e), p.setText(e.A))
	case netfilter.Choose:
		return p.choose(e)
	case netfilter.Accept:
		return "accept"
	case netfilter.Drop:
		return "drop"
	case netfilter.Return:
		return "return"
	case netfilter.Jump, netfilter.Goto, netfilter.DNAT:
		return p.verdict(e)
	case netfilter.Reject:
		return "reject"
	case netfilter.Masquerade:
		return strings.TrimSpace("masquerade " + flagsText(p.chain.Text(e)))
	}
	return string(p.chain.Text(e)) // kept as nft's JSON
}

func (p *printer) prefix(e netfilter.Expr) string {
	c, ok := p.chain.CIDR(e)
	if ok && c.IsSingleIP() {
		return c.Addr().String()
	}
	return c.String()
}

func interfaceText(name []byte) string {
	if prefix, ok := strings.CutSuffix(string(name), "+"); ok {
		return prefix + "*"
	}
	return string(name)
}

func ctText(e netfilter.Expr, op string) string {
	if e.A&(netfilter.CTDNATed|netfilter.CTSNATed) != 0 {
		return "ct status " + op + namesOf(e.A, map[uint32]string{netfilter.CTDNATed: "dnat", netfilter.CTSNATed: "snat"})
	}
	names := map[uint32]string{}
	for name, bit := range ctStates {
		names[bit] = name
	}
	return "ct state " + op + namesOf(e.A, names)
}

func namesOf(bits uint32, names map[uint32]string) string {
	var out []string
	for bit := uint32(1); bit != 0; bit <<= 1 {
		if bits&bit != 0 {
			out = append(out, names[bit])
		}
	}
	return strings.Join(out, ",")
}

func markText(e netfilter.Expr) string {
	switch {
	case e.B == math.MaxUint32:
		return fmt.Sprintf("meta mark set 0x%08x", e.A)
	case e.A == e.B:
		return fmt.Sprintf("meta mark set meta mark | 0x%08x", e.A)
	case e.B == 0:
		return fmt.Sprintf("meta mark set meta mark ^ 0x%08x", e.A)
	}
	return fmt.Sprintf("meta mark set meta mark & 0x%08x ^ 0x%08x", ^e.B, e.A)
}

// flagsText prints {"flags": "fully-random"} as nft does.
func flagsText(json []byte) string {
	for _, flag := range []string{"fully-random", "random", "persistent"} {
		if strings.Contains(string(json), `"`+flag+`"`) {
			return flag
		}
	}
	return ""
}

func (p *printer) fields(e netfilter.Expr) string {
	f := netfilter.Field(e.N)
	var out []string
	if f&netfilter.FieldSource != 0 {
		out = append(out, p.ip+" saddr")
	}
	if f&netfilter.FieldDestination != 0 {
		out = append(out, p.ip+" daddr")
	}
	if f&netfilter.FieldProtocol != 0 {
		out = append(out, "meta l4proto")
	}
	if f&netfilter.FieldPort != 0 {
		out = append(out, "th dport")
	}
	return strings.Join(out, " . ")
}

func (p *printer) setText(n uint32) string {
	s := p.table.Set(n)
	if s.Name != "" {
		return "@" + s.Name
	}
	var out []string
	for _, k := range s.Keys {
		text := keyText(k)
		if s.Map {
			e, _ := s.Lookup(k)
			text += " : " + p.verdict(e.Verdict)
		}
		out = append(out, text)
	}
	for _, r := range s.Ranges {
		for _, c := range r.Prefixes() {
			out = append(out, c.String())
		}
	}
	return "{ " + strings.Join(out, ", ") + " }"
}

func keyText(k netfilter.SetKey) string {
	var out []string
	for _, a := range []netip.Addr{k.Addr, k.Addr2} {
		if a.IsValid() {
			out = append(out, a.String())
		}
	}
	if k.Protocol != 0 {
		out = append(out, strings.ToLower(k.Protocol.String()))
	}
	if k.Port != 0 {
		out = append(out, fmt.Sprint(k.Port))
	}
	return strings.Join(out, " . ")
}

// verdict prints a verdict of a rule or of a map.
func (p *printer) verdict(e netfilter.Expr) string {
	switch e.Kind {
	case netfilter.Jump:
		return "jump " + p.table.ChainName(netfilter.ChainID(e.A))
	case netfilter.Goto:
		return "goto " + p.table.ChainName(netfilter.ChainID(e.A))
	case netfilter.DNAT:
		return "dnat to " + p.chain.Target(e).String()
	case netfilter.Accept:
		return "accept"
	case netfilter.Drop:
		return "drop"
	}
	return "return"
}

// choose prints a random choice. Which number stands for which way is not kept:
// it makes no difference.
func (p *printer) choose(e netfilter.Expr) string {
	choices := p.chain.Choices(e)
	var out []string
	isDNAT := false
	for i, c := range choices {
		if i == mostChoices && len(choices) > mostChoices+1 {
			out = append(out, fmt.Sprintf("… %d more", len(choices)-i))
			break
		}
		text := p.verdict(c.Verdict)
		if to, ok := strings.CutPrefix(text, "dnat to "); ok {
			text, isDNAT = to, true
		}
		if c.Count > 1 {
			text = fmt.Sprintf("%d× %s", c.Count, text)
		}
		out = append(out, text)
	}
	word := "vmap"
	head := ""
	if isDNAT {
		word, head = "map", "dnat "+p.ip+" to "
	}
	return fmt.Sprintf("%snumgen random mod %d %s { %s }", head, e.B, word, strings.Join(out, ", "))
}
