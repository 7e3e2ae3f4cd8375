package iptables

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"strconv"
	"strings"

	"github.com/natlens/natlens/pkg/netfilter"
)

// ruleParser reads the words of one rule behind "-A CHAIN".
type ruleParser struct {
	table    *netfilter.Table
	chain    *netfilter.Chain
	line     []byte
	tokens   []token
	counter  *netfilter.Counter
	protocol string // the value of -p
	target   int    // index of -j or -g in tokens; -1 for none
	opts     []option
	orphans  int // index of options without "-m" that have been read already; 0 for none
}

func (p *ruleParser) parse() error {
	start := p.chain.Mark()
	err := p.general()
	if err == nil {
		err = p.modules()
	}
	if err == nil && p.target >= 0 {
		err = p.verdict()
	}
	if err != nil {
		p.chain.Undo(start)
		return err
	}
	p.chain.End(p.counter)
	return nil
}

// The options that belong to no module. The first of them are matches, in the
// order in which iptables-save prints them.
type generalOption int

const (
	optSource generalOption = iota
	optDestination
	optInInterface
	optOutInterface
	optProtocol
	optFragment
	optMatch
	optTarget
	optCounters
	notGeneral
)

var generalKinds = [...]netfilter.Kind{
	netfilter.Source, netfilter.Destination, netfilter.InInterface, netfilter.OutInterface, netfilter.ProtocolIs, netfilter.Fragment,
}

// general tells which option of the rule itself a word is. These end the
// options of a module. A quoted word is never an option.
func (t token) general() generalOption {
	if t.quoted || len(t.text) < 2 || t.text[0] != '-' {
		return notGeneral
	}
	switch string(t.text) {
	case "-s", "--source", "--src":
		return optSource
	case "-d", "--destination", "--dst":
		return optDestination
	case "-i", "--in-interface":
		return optInInterface
	case "-o", "--out-interface":
		return optOutInterface
	case "-p", "--protocol", "--proto":
		return optProtocol
	case "-f", "--fragment":
		return optFragment
	case "-m", "--match":
		return optMatch
	case "-j", "--jump", "-g", "--goto":
		return optTarget
	case "-c", "--set-counters":
		return optCounters
	}
	return notGeneral
}

// isNot reports whether a word is the "!" that negates the option behind it.
func (t token) isNot() bool { return !t.quoted && string(t.text) == "!" }

// takesAnything reports whether the word behind this one is its value even if
// it looks like an option: iptables-save quotes a text only if it has to.
func (t token) takesAnything() bool {
	if t.quoted {
		return false
	}
	switch string(t.text) {
	case "--comment", "--log-prefix", "--nflog-prefix", "--string":
		return true
	}
	return false
}

// general reads the options of the rule itself wherever they stand, and finds
// the target.
func (p *ruleParser) general() error {
	p.target = -1
	var at [len(generalKinds)]int // index of each option, plus 1
	negated := false
	for i := 0; i < len(p.tokens); i++ {
		not := negated
		negated = p.tokens[i].isNot()
		if p.tokens[i].takesAnything() {
			i++
			continue
		}
		switch opt := p.tokens[i].general(); {
		case opt == notGeneral:
		case opt > optFragment && not:
			return fmt.Errorf("\"!\" before %s", p.tokens[i].text)
		case opt == optMatch:
		case opt == optTarget && p.target >= 0:
			return errors.New("two targets")
		case opt == optTarget:
			p.target = i
		case opt == optCounters:
			if err := p.listedCounter(i); err != nil {
				return err
			}
		case at[opt] != 0:
			return fmt.Errorf("option %s stands twice", p.tokens[i].text)
		default:
			at[opt] = i + 1
		}
	}
	for opt, i := range at {
		if i == 0 {
			continue
		}
		if err := p.generalOption(generalKinds[opt], i-1); err != nil {
			return fmt.Errorf("option %s: %w", p.tokens[i-1].text, err)
		}
	}
	return nil
}

// listedCounter reads the "-c packets bytes" that iptables -v -S puts into a rule.
func (p *ruleParser) listedCounter(i int) error {
	if i+2 < len(p.tokens) {
		packets, ok1 := parseUint(p.tokens[i+1].text)
		size, ok2 := parseUint(p.tokens[i+2].text)
		if ok1 && ok2 {
			p.counter = &netfilter.Counter{Packets: packets, Bytes: size}
			return nil
		}
	}
	return errors.New("-c needs two numbers")
}

func (p *ruleParser) generalOption(kind netfilter.Kind, i int) error {
	var flags uint8
	if i > 0 && p.tokens[i-1].isNot() {
		flags = netfilter.Not
	}
	if kind == netfilter.Fragment {
		p.chain.Add(netfilter.Expr{Kind: kind, Flags: flags})
		return nil
	}
	if i+1 >= len(p.tokens) {
		return errors.New("its value is missing")
	}
	value := p.tokens[i+1].text
	switch kind {
	case netfilter.Source, netfilter.Destination:
		addr, mask, err := parsePrefix(value, p.table.Family)
		if err != nil {
			return err
		}
		if mask.IsUnspecified() && flags == 0 {
			return nil // every address: iptables-save does not print it either
		}
		return p.chain.AddPrefix(kind, flags, addr, mask)
	case netfilter.InInterface, netfilter.OutInterface:
		if !isName(value) {
			return fmt.Errorf("%q is not a name for an interface", value)
		}
		p.chain.AddText(kind, flags, 0, value)
	case netfilter.ProtocolIs:
		if string(value) == "all" || string(value) == "0" {
			return nil
		}
		n, ok := protocols[string(value)]
		if !ok {
			n, ok = protocols[strings.ToLower(string(value))]
		}
		if !ok {
			v, isNumber := parseUint(value)
			if !isNumber || v > 255 {
				return fmt.Errorf("unknown protocol %q", value)
			}
			if n = uint8(v); n == 0 {
				return nil
			}
		}
		p.protocol = protocolNames[uint32(n)]
		p.chain.Add(netfilter.Expr{Kind: kind, Flags: flags, A: uint32(n)})
	}
	return nil
}

// parsePrefix reads ADDRESS, ADDRESS/BITS or ADDRESS/MASK.
func parsePrefix(value []byte, f netfilter.Family) (addr, mask netip.Addr, err error) {
	host, bits, hasMask := bytes.Cut(value, []byte("/"))
	if addr, err = netip.ParseAddr(string(host)); err != nil || addr.Zone() != "" {
		return addr, mask, fmt.Errorf("%q is not an address", value)
	}
	if netfilter.FamilyOf(addr) != f {
		return addr, mask, fmt.Errorf("address %s in a table of %v", value, f)
	}
	ones := addr.BitLen()
	if hasMask {
		if mask, err = netip.ParseAddr(string(bits)); err == nil && mask.BitLen() == addr.BitLen() {
			return addr, mask, nil
		}
		n, ok := parseUint(bits)
		if !ok || n > uint64(addr.BitLen()) {
			return addr, mask, fmt.Errorf("%q is not a prefix", value)
		}
		ones = int(n)
	}
	full := netip.AddrFrom4([4]byte{255, 255, 255, 255})
	if f == netfilter.IPv6 {
		full = netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")
	}
	m, err := full.Prefix(ones)
	return addr, m.Addr(), err
}

// modules reads every "-m NAME options…", and the options of the protocol's
// own module where "-p NAME" alone stands for it.
func (p *ruleParser) modules() error {
	p.orphans = 0
	for i := 0; i < len(p.tokens); {
		t := p.tokens[i]
		switch t.general() {
		case optMatch:
			if i+1 >= len(p.tokens) {
				return errors.New("-m needs a name")
			}
			if name := p.tokens[i+1].text; !isName(name) {
				return fmt.Errorf("%q is not a name for a match", name)
			}
			end := p.extent(i + 2)
			p.module(string(p.tokens[i+1].text), i, end)
			i = end
		case optTarget:
			i = p.extent(i + 2)
		case optFragment:
			i++
		case optCounters:
			i += 3
		case notGeneral:
			if t.isNot() && i+1 < len(p.tokens) && p.tokens[i+1].general() != notGeneral {
				i++
				continue
			}
			end := p.extent(i)
			if i == p.orphans && i > 0 {
				i = end // read with the "-m" of the protocol, before
				continue
			}
			if p.protocol == "" || !p.ports(p.protocol, p.options(i, end)) {
				return fmt.Errorf("unknown option %q", t.text)
			}
			i = end
		default:
			i += 2
		}
	}
	return nil
}

// findOrphans returns the first options behind i that stand behind no "-m" of
// their own, as in "-m tcp -p tcp --dport 80": they belong to the protocol.
func (p *ruleParser) findOrphans(i int) (start, end int) {
	for i < len(p.tokens) {
		switch opt := p.tokens[i].general(); {
		case opt == optMatch || opt == optTarget:
			i = p.extent(i + 2)
		case opt == optFragment:
			i++
		case opt == optCounters:
			i += 3
		case opt != notGeneral:
			i += 2
		case p.tokens[i].isNot() && i+1 < len(p.tokens) && p.tokens[i+1].general() != notGeneral:
			i++
		default:
			return i, p.extent(i)
		}
	}
	return 0, 0
}

// extent returns the index behind the options of a module that begin at i.
func (p *ruleParser) extent(i int) int {
	for ; i < len(p.tokens); i++ {
		t := p.tokens[i]
		if t.takesAnything() {
			i++
			continue
		}
		if t.general() != notGeneral || t.isNot() && i+1 < len(p.tokens) && p.tokens[i+1].general() != notGeneral {
			return i
		}
	}
	return len(p.tokens)
}

// option is "[!] --name value…".
type option struct {
	not    bool
	name   string
	values []token
}

func (o option) flags() uint8 {
	if o.not {
		return netfilter.Not
	}
	return 0
}

// value returns the only value of the option, nil when there is not just one.
func (o option) value() []byte {
	if len(o.values) != 1 {
		return nil
	}
	return o.values[0].text
}

// options groups the words from i to end. The result is valid until the next
// call.
func (p *ruleParser) options(i, end int) []option {
	out := p.opts[:0]
	not := false
	for ; i < end; i++ {
		t := p.tokens[i]
		switch {
		case t.isNot() && !not:
			not = true
			continue
		case !t.quoted && bytes.HasPrefix(t.text, []byte("--")):
			out = append(out, option{not: not, name: optionName(t.text), values: p.tokens[i+1 : i+1]})
			if t.takesAnything() && i+1 < end {
				i++
				out[len(out)-1].values = p.tokens[i : i+1]
			}
		case len(out) > 0 && !not:
			o := &out[len(out)-1]
			o.values = o.values[:len(o.values)+1] // the words of one option stand side by side
		default:
			out = append(out, option{name: string(t.text), values: p.tokens[i+1 : i+1]})
		}
		not = false
	}
	if not {
		out = append(out, option{name: "!"})
	}
	p.opts = out
	return out
}

// optionName returns the name of an option, without making a string of the
// usual ones.
func optionName(b []byte) string {
	for _, name := range usual {
		if string(b) == name {
			return name
		}
	}
	return string(b)
}

var usual = [...]string{"--comment", "--dport", "--mode", "--probability", "--to-destination", "--set-xmark", "--mark", "--ctstate", "--src-type", "--dst-type"}

// module reads one module. What it does not fully understand becomes one
// Unknown expression: half a match is worse than none.
func (p *ruleParser) module(name string, first, end int) {
	start := p.chain.Mark()
	raw := p.line[p.tokens[first].start:p.tokens[end-1].end]
	if end == first+2 && name == p.protocol {
		if from, to := p.findOrphans(end); from > 0 && p.ports(name, p.options(from, to)) {
			p.orphans = from
			return
		}
		p.chain.Undo(start)
	}
	if !p.known(name, p.options(first+2, end), raw) {
		p.chain.Undo(start)
		p.chain.AddText(netfilter.Unknown, 0, 0, raw)
	}
}

// known adds the expressions of a module, and reports whether it understood
// each of its options.
func (p *ruleParser) known(name string, opts []option, raw []byte) bool {
	switch name {
	case "tcp", "udp", "sctp", "udplite", "dccp":
		if len(opts) == 0 && name == p.protocol {
			p.chain.AddText(netfilter.Always, 0, 0, raw)
			return true
		}
		return p.ports(name, opts)
	case "comment":
		if len(opts) != 1 || opts[0].name != "--comment" || len(opts[0].values) != 1 {
			return false
		}
		p.chain.AddText(netfilter.Comment, 0, 0, opts[0].value())
		return true
	case "nfacct":
		p.chain.AddText(netfilter.Always, 0, 0, raw)
		return true
	case "rpfilter":
		var flags uint8
		for _, o := range opts {
			if o.name == "--invert" {
				flags = netfilter.Not
			}
		}
		p.chain.AddText(netfilter.Always, flags, 0, raw)
		return true
	case "statistic":
		return p.statistic(opts)
	case "addrtype":
		return p.each(opts, p.addrType)
	case "mark", "connmark":
		return p.each(opts, func(o option, flags uint8) bool { return p.mark(name, o, flags) })
	case "conntrack", "state":
		return p.each(opts, func(o option, flags uint8) bool { return p.ctState(name, o, flags) })
	case "multiport":
		return p.each(opts, p.multiport)
	case "iprange":
		return p.each(opts, p.addrRange)
	case "physdev":
		if len(opts) != 1 || opts[0].name != "--physdev-is-in" {
			return false
		}
		p.chain.Add(netfilter.Expr{Kind: netfilter.BridgePort, Flags: opts[0].flags()})
		return true
	case "recent":
		return p.recent(opts, raw)
	}
	return false
}

// each adds one expression per option; all but the first are joined to the
// one before.
func (p *ruleParser) each(opts []option, add func(o option, flags uint8) bool) bool {
	for i, o := range opts {
		flags := o.flags()
		if i > 0 {
			flags |= netfilter.Joined
		}
		if !add(o, flags) {
			return false
		}
	}
	return len(opts) > 0
}

// ports reads the options of tcp, udp and their like.
func (p *ruleParser) ports(protocol string, opts []option) bool {
	if p.protocol != protocol {
		return false
	}
	return p.each(opts, func(o option, flags uint8) bool {
		kind := netfilter.DestinationPort
		switch o.name {
		case "--sport", "--source-port":
			kind = netfilter.SourcePort
		case "--dport", "--destination-port":
		case "--tcp-flags":
			return protocol == "tcp" && p.tcpFlags(o, flags)
		case "--syn":
			if protocol != "tcp" || len(o.values) != 0 {
				return false
			}
			p.chain.Add(netfilter.Expr{Kind: netfilter.TCPFlags, Flags: flags, A: synMask, B: synFlag})
			return true
		default:
			return false
		}
		lo, hi, ok := parsePorts(o.value())
		p.chain.Add(netfilter.Expr{Kind: kind, Flags: flags, A: lo, B: hi})
		return ok
	})
}

// What --syn stands for: of FIN, SYN, RST and ACK, only SYN.
const (
	synFlag = 1 << 1
	synMask = 1<<0 | 1<<1 | 1<<2 | 1<<4
)

func (p *ruleParser) tcpFlags(o option, flags uint8) bool {
	if len(o.values) != 2 {
		return false
	}
	mask, ok1 := parseNames(o.values[0].text, tcpFlags)
	comp, ok2 := parseNames(o.values[1].text, tcpFlags)
	p.chain.Add(netfilter.Expr{Kind: netfilter.TCPFlags, Flags: flags, A: mask, B: comp})
	return ok1 && ok2
}

// parsePorts reads PORT, FROM:TO, FROM: or :TO.
func parsePorts(b []byte) (lo, hi uint32, ok bool) {
	if len(b) == 0 {
		return 0, 0, false
	}
	from, to, isRange := bytes.Cut(b, []byte(":"))
	hi = 65535
	if len(from) > 0 {
		n, ok := parseUint(from)
		if !ok || n > 65535 {
			return 0, 0, false
		}
		lo = uint32(n)
	}
	if !isRange {
		return lo, lo, true
	}
	if len(to) > 0 {
		n, ok := parseUint(to)
		if !ok || n > 65535 {
			return 0, 0, false
		}
		hi = uint32(n)
	}
	return lo, hi, true
}

// parseNames reads a comma list of names as bits; "ALL" and "NONE" are all and
// none of them.
func parseNames(list []byte, names []string) (bits uint32, ok bool) {
	for name := range bytes.SplitSeq(list, []byte(",")) {
		switch string(name) {
		case "ALL":
			bits |= 1<<len(names) - 1
			continue
		case "NONE":
			continue
		}
		found := false
		for i, n := range names {
			if n == string(name) {
				bits |= 1 << i
				found = true
			}
		}
		if !found {
			return 0, false
		}
	}
	return bits, true
}

func (p *ruleParser) statistic(opts []option) bool {
	if len(opts) < 2 || opts[0].name != "--mode" || opts[0].not {
		return false
	}
	o := opts[1]
	switch string(opts[0].value()) {
	case "random":
		if len(opts) != 2 || o.name != "--probability" {
			return false
		}
		parts, ok := parseProbability(o.value())
		p.chain.Add(netfilter.Expr{Kind: netfilter.Random, Flags: o.flags(), A: parts})
		return ok
	case "nth":
		if o.name != "--every" {
			return false
		}
		every, ok := parseUint(o.value())
		var packet uint64
		for _, more := range opts[2:] {
			if more.name != "--packet" || !ok {
				return false
			}
			packet, ok = parseUint(more.value())
		}
		if !ok || every == 0 || every > math.MaxUint32 || packet >= every {
			return false
		}
		p.chain.Add(netfilter.Expr{Kind: netfilter.Nth, Flags: o.flags(), A: uint32(every), B: uint32(packet)})
		return true
	}
	return false
}

// parseProbability returns what the kernel stores for a printed probability:
// the nearest multiple of 2^-31, counted in that unit (libxt_statistic.c). The
// eleven digits that iptables-save prints give back the stored number exactly.
func parseProbability(b []byte) (parts uint32, ok bool) {
	if len(b) == 0 || len(bytes.Trim(b, "0123456789.")) > 0 {
		return 0, false // ParseFloat takes more forms than iptables does
	}
	f, err := strconv.ParseFloat(string(b), 64)
	if err != nil || f < 0 || f > 1 {
		return 0, false
	}
	return uint32(math.Round(f * (1 << 31))), true
}

func (p *ruleParser) addrType(o option, flags uint8) bool {
	kind := netfilter.SourceType
	if o.name == "--dst-type" {
		kind = netfilter.DestinationType
	} else if o.name != "--src-type" {
		return false
	}
	bits, ok := parseNames(o.value(), addrTypes)
	p.chain.Add(netfilter.Expr{Kind: kind, Flags: flags, A: bits})
	return ok
}

func (p *ruleParser) mark(module string, o option, flags uint8) bool {
	if o.name != "--mark" {
		return false
	}
	kind := netfilter.MarkIs
	if module == "connmark" {
		kind = netfilter.ConnMarkIs
	}
	value, mask, ok := parseMark(o.value())
	p.chain.Add(netfilter.Expr{Kind: kind, Flags: flags, A: value, B: mask})
	return ok
}

// parseMark reads VALUE or VALUE/MASK in C's number forms.
func parseMark(b []byte) (value, mask uint32, ok bool) {
	first, second, hasMask := strings.Cut(string(b), "/")
	v, err := strconv.ParseUint(first, 0, 32)
	if err != nil {
		return 0, 0, false
	}
	m := uint64(math.MaxUint32)
	if hasMask {
		if m, err = strconv.ParseUint(second, 0, 32); err != nil {
			return 0, 0, false
		}
	}
	return uint32(v), uint32(m), true
}

func (p *ruleParser) ctState(module string, o option, flags uint8) bool {
	e := netfilter.Expr{Kind: netfilter.CTState, Flags: flags}
	switch {
	case module == "conntrack" && o.name == "--ctstate":
	case module == "state" && o.name == "--state":
		e.N = 1
	default:
		return false
	}
	var ok bool
	e.A, ok = parseNames(o.value(), ctStates)
	p.chain.Add(e)
	return ok
}

func (p *ruleParser) multiport(o option, flags uint8) bool {
	var which uint16
	switch o.name {
	case "--sports", "--source-ports":
		which = netfilter.MultiportSource
	case "--dports", "--destination-ports":
		which = netfilter.MultiportDestination
	case "--ports":
		which = netfilter.MultiportEither
	default:
		return false
	}
	for part := range bytes.SplitSeq(o.value(), []byte(",")) {
		if _, _, ok := parsePorts(part); !ok {
			return false
		}
	}
	p.chain.AddText(netfilter.Multiport, flags, which, o.value())
	return true
}

func (p *ruleParser) addrRange(o option, flags uint8) bool {
	var which uint16
	switch o.name {
	case "--src-range":
	case "--dst-range":
		which = 1
	default:
		return false
	}
	from, to, ok := strings.Cut(string(o.value()), "-")
	if !ok {
		to = from
	}
	a, err1 := netip.ParseAddr(from)
	b, err2 := netip.ParseAddr(to)
	if err1 != nil || err2 != nil || netfilter.FamilyOf(a) != p.table.Family || netfilter.FamilyOf(b) != p.table.Family {
		return false
	}
	p.chain.AddText(netfilter.AddrRange, flags, which, []byte(from+"-"+to))
	return true
}

func (p *ruleParser) recent(opts []option, raw []byte) bool {
	var does uint16
	var flags uint8
	for _, o := range opts {
		switch o.name {
		case "--set":
			does |= netfilter.RecentSet
		case "--rcheck":
			does |= netfilter.RecentCheck
		case "--update":
			does |= netfilter.RecentUpdate
		case "--remove":
			does |= netfilter.RecentRemove
		case "--seconds", "--reap", "--name", "--mask", "--rsource", "--rdest", "--hitcount", "--rttl":
			continue
		default:
			return false
		}
		flags = o.flags()
	}
	if does == 0 || does&(does-1) != 0 {
		return false
	}
	p.chain.AddText(netfilter.Recent, flags, does, raw)
	return true
}

// verdict reads the target.
func (p *ruleParser) verdict() error {
	if p.target+1 >= len(p.tokens) {
		return errors.New("-j needs a target")
	}
	name := string(p.tokens[p.target+1].text)
	if !isName(p.tokens[p.target+1].text) {
		return fmt.Errorf("%q is not a name for a target", name)
	}
	end := p.extent(p.target + 2)
	words := p.tokens[p.target+2 : end]
	if w := string(p.tokens[p.target].text); w == "-g" || w == "--goto" {
		p.chain.Add(netfilter.Expr{Kind: netfilter.Goto, A: uint32(p.table.ID(name))})
		return nil
	}
	// raw is "NAME options", rest the options alone.
	raw := p.line[p.tokens[p.target+1].start:p.tokens[end-1].end]
	rest := bytes.TrimLeft(raw[p.tokens[p.target+1].end-p.tokens[p.target+1].start:], " ")
	if p.table.Lookup(name) == nil {
		switch name {
		case "ACCEPT", "DROP", "RETURN":
			if len(words) > 0 {
				return fmt.Errorf("unknown option %q behind %s", words[0].text, name)
			}
		}
		switch name {
		case "ACCEPT":
			p.chain.Add(netfilter.Expr{Kind: netfilter.Accept})
			return nil
		case "DROP":
			p.chain.Add(netfilter.Expr{Kind: netfilter.Drop})
			return nil
		case "RETURN":
			p.chain.Add(netfilter.Expr{Kind: netfilter.Return})
			return nil
		case "QUEUE", "NFQUEUE":
			p.chain.AddText(netfilter.Queue, 0, 0, raw)
			return nil
		case "REJECT":
			p.chain.AddText(netfilter.Reject, 0, 0, rest)
			return nil
		case "SNAT":
			p.chain.AddText(netfilter.SNAT, 0, 0, rest)
			return nil
		case "MASQUERADE":
			p.chain.AddText(netfilter.Masquerade, 0, 0, rest)
			return nil
		case "DNAT":
			return p.dnat(p.options(p.target+2, end), rest)
		case "REDIRECT":
			return p.redirect(p.options(p.target+2, end), rest)
		case "MARK", "CONNMARK":
			if !p.setMark(name, p.options(p.target+2, end)) {
				p.chain.AddText(netfilter.UnknownTarget, 0, 0, raw)
			}
			return nil
		case "NOTRACK":
			p.chain.AddText(netfilter.NoTrack, 0, 0, raw)
			return nil
		case "CT":
			if bytes.Contains(rest, []byte("--notrack")) {
				p.chain.AddText(netfilter.NoTrack, 0, 0, raw)
				return nil
			}
		}
		if noEffect[name] {
			p.chain.AddText(netfilter.NoEffect, 0, 0, raw)
			return nil
		}
		if unknownTargets[name] || len(words) > 0 || isExtensionName(name) {
			p.chain.AddText(netfilter.UnknownTarget, 0, 0, raw)
			return nil
		}
	}
	if len(words) > 0 {
		return fmt.Errorf("unknown option %q behind the jump to %q", words[0].text, name)
	}
	p.chain.Add(netfilter.Expr{Kind: netfilter.Jump, A: uint32(p.table.ID(name))})
	return nil
}

// isExtensionName reports whether an undeclared target looks like one of the
// kernel's modules, which a chain of kube-proxy never does.
func isExtensionName(name string) bool {
	for _, r := range name {
		if (r < 'A' || r > 'Z') && (r < '0' || r > '9') {
			return false
		}
	}
	return name != ""
}

func (p *ruleParser) dnat(opts []option, rest []byte) error {
	if len(opts) == 0 || opts[0].name != "--to-destination" {
		return errors.New("DNAT needs --to-destination")
	}
	value := string(opts[0].value())
	to, ok := parseTarget(value)
	if !ok && !isTargetRange(value) {
		return fmt.Errorf("DNAT to %q, which is neither ADDRESS[:PORT] nor a range of them", value)
	}
	if !ok || len(opts) > 1 {
		p.chain.AddText(netfilter.DNATRange, 0, 0, rest)
		return nil
	}
	if err := p.chain.AddDNAT(to); err != nil {
		return fmt.Errorf("DNAT: %w", err)
	}
	return nil
}

// parseTarget reads ADDRESS, ADDRESS:PORT, [ADDRESS]:PORT or :PORT; it refuses
// ranges.
func parseTarget(s string) (netip.AddrPort, bool) {
	if ap, err := netip.ParseAddrPort(s); err == nil && ap.Addr().Zone() == "" {
		return ap, ap.Port() != 0
	}
	if a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]")); err == nil && a.Zone() == "" {
		return netip.AddrPortFrom(a, 0), true
	}
	if port, ok := strings.CutPrefix(s, ":"); ok {
		n, err := strconv.ParseUint(port, 10, 16)
		return netip.AddrPortFrom(netip.Addr{}, uint16(n)), err == nil && n != 0
	}
	return netip.AddrPort{}, false
}

// isTargetRange reports whether s is ADDRESS[-ADDRESS][:PORT[-PORT[/BASE]]],
// IPv6 addresses in brackets where a port follows.
func isTargetRange(s string) bool {
	addrs, ports := s, ""
	if i := strings.LastIndexByte(s, ':'); i >= 0 && (s[0] == '[' && i > strings.LastIndexByte(s, ']') || strings.Count(s, ":") == 1) {
		addrs, ports = s[:i], s[i+1:]
		if !isPortRange(ports) {
			return false
		}
	}
	if addrs == "" {
		return ports != ""
	}
	addrs = strings.TrimSuffix(strings.TrimPrefix(addrs, "["), "]")
	from, to, isRange := strings.Cut(addrs, "-")
	a, err := netip.ParseAddr(from)
	if err != nil || a.Zone() != "" || !isRange {
		return err == nil && a.Zone() == ""
	}
	b, err := netip.ParseAddr(to)
	return err == nil && b.Zone() == "" && a.BitLen() == b.BitLen()
}

// isPortRange reports whether s is PORT[-PORT[/BASE]].
func isPortRange(s string) bool {
	for part := range strings.FieldsFuncSeq(s, func(r rune) bool { return r == '-' || r == '/' }) {
		if n, err := strconv.ParseUint(part, 10, 16); err != nil || n == 0 {
			return false
		}
	}
	return s != "" && s[0] != '-' && s[0] != '/'
}

func (p *ruleParser) redirect(opts []option, rest []byte) error {
	var port uint64
	for _, o := range opts {
		if o.name != "--to-ports" {
			continue
		}
		var ok bool
		if port, ok = parseUint(o.value()); !ok || port == 0 || port > 65535 {
			if !isPortRange(string(o.value())) {
				return fmt.Errorf("REDIRECT to port %q", o.value())
			}
			// A range: which port it will be cannot be told.
			p.chain.AddText(netfilter.DNATRange, 0, 1, rest)
			return nil
		}
	}
	p.chain.AddText(netfilter.Redirect, 0, uint16(port), rest)
	return nil
}

// setMark reads the options of MARK and CONNMARK.
func (p *ruleParser) setMark(target string, opts []option) bool {
	if len(opts) == 0 {
		return false
	}
	set := netfilter.SetMark
	if target == "CONNMARK" {
		set = netfilter.SetConnMark
	}
	first := opts[0]
	if first.name == "--save-mark" || first.name == "--restore-mark" {
		return target == "CONNMARK" && p.copyMark(opts)
	}
	value, mask, ok := parseMark(first.value())
	if !ok || len(opts) > 1 {
		return false
	}
	switch first.name {
	case "--set-xmark":
	case "--set-mark":
		mask |= value
	case "--or-mark":
		mask = value
	case "--and-mark":
		value, mask = 0, ^value
	case "--xor-mark":
		mask = 0
	default:
		return false
	}
	p.chain.Add(netfilter.Expr{Kind: set, A: value, B: mask})
	return true
}

func (p *ruleParser) copyMark(opts []option) bool {
	e := netfilter.Expr{Kind: netfilter.SaveMark, A: math.MaxUint32, B: math.MaxUint32}
	if opts[0].name == "--restore-mark" {
		e.Kind = netfilter.RestoreMark
	}
	for _, o := range opts[1:] {
		mask, _, ok := parseMark(o.value())
		switch o.name {
		case "--nfmask":
			e.A = mask
		case "--ctmask":
			e.B = mask
		case "--mask":
			e.A, e.B = mask, mask
		default:
			return false
		}
		if !ok {
			return false
		}
	}
	p.chain.Add(e)
	return true
}
