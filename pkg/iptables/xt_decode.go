package iptables

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"

	"github.com/natlens/natlens/pkg/netfilter"
)

// xtDecoder decodes the matches and targets of xtables, whose blobs are the
// same in both backends: struct xt_*_info and the like of linux/netfilter/xt_*.h,
// linux/netfilter_ipv4/ipt_*.h and linux/netfilter_ipv6/ip6t_*.h, in the byte
// order of the machine. A blob may be longer than its struct (XT_ALIGN).
//
// It adds to the chain's rule under construction what Parse makes of the text
// that iptables-save prints. What it cannot decode it adds as Unknown or
// UnknownTarget, with the name and the revision: a rule never loses a match.
type xtDecoder struct {
	chain    *netfilter.Chain
	family   netfilter.Family
	protocol string // of the rule's -p, as Parse names it; empty for none
	text     []byte // reused
}

func xt16(b []byte, at int) uint16 { return binary.NativeEndian.Uint16(b[at:]) }
func xt32(b []byte, at int) uint32 { return binary.NativeEndian.Uint32(b[at:]) }

// xtString returns the text of a char array.
func xtString(b []byte) []byte {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		return b[:i]
	}
	return b
}

// xtSizes are the lengths of the structs that are decoded, by revision; 0 for a
// revision that is not. A blob of another length is another struct, and is not
// decoded either.
var xtSizes = map[string][]int{
	"addrtype":  {12, 8},
	"comment":   {256},
	"connmark":  {0, 12},
	"conntrack": {0, 152, 156, 164},
	"cpu":       {8},
	"hl":        {2},
	"icmp":      {4},
	"icmp6":     {4},
	"iprange":   {0, 68},
	"length":    {6},
	"limit":     {40},
	"mac":       {12},
	"mark":      {0, 12},
	"multiport": {0, 48},
	"nfacct":    {40, 40},
	"owner":     {0, 20},
	"physdev":   {66},
	"pkttype":   {8},
	"recent":    {212, 228},
	"rpfilter":  {1},
	"sctp":      {292},
	"statistic": {24},
	"tcp":       {12},
	"ttl":       {2},
	"udp":       {10},

	"CHECKSUM":   {1},
	"CLASSIFY":   {4},
	"CONNMARK":   {0, 16, 16},
	"CT":         {40, 72, 72},
	"DNAT":       {20, 40, 44},
	"DSCP":       {1},
	"HL":         {2},
	"LOG":        {32},
	"MARK":       {0, 0, 8},
	"MASQUERADE": {20},
	"NFLOG":      {76},
	"NFQUEUE":    {2, 4, 6, 6},
	"REDIRECT":   {20},
	"REJECT":     {4},
	"SNAT":       {20, 40, 44},
	"TCPMSS":     {2},
	"TEE":        {0, 40},
	"TOS":        {0, 2},
	"TTL":        {2},
}

// XT_ALIGN of linux/netfilter/x_tables.h fills a blob up to a multiple of 8.
const xtAlign = 8

// fits reports whether a blob is one that is decoded.
func (d *xtDecoder) fits(name string, rev int, data []byte) bool {
	sizes := xtSizes[name]
	if name == "NOTRACK" || name == "TRACE" { // they have no blob
		return rev == 0
	}
	if rev < 0 || rev >= len(sizes) || sizes[rev] == 0 {
		return false
	}
	size := sizes[rev]
	switch {
	case d.family == netfilter.IPv6 && (name == "MASQUERADE" || name == "REDIRECT"):
		size = 40 // struct nf_nat_range, not the struct of IPv4
	case name == "limit" || name == "nfacct":
		// With pointers, and nothing decoded behind them: shorter on 32 bits.
		return len(data) >= size-12 && len(data) < size+xtAlign
	}
	return len(data) >= size && len(data) < size+xtAlign
}

// match adds a match.
func (d *xtDecoder) match(name string, rev int, data []byte) {
	start := d.chain.Mark()
	if d.fits(name, rev, data) && d.known(start, name, rev, data) {
		return
	}
	d.chain.Undo(start)
	d.text = append(d.text[:0], "-m "...)
	d.chain.AddText(netfilter.Unknown, 0, 0, d.undecoded(name, rev))
}

// undecoded appends a name and what stands for its options to the text, and
// returns it.
func (d *xtDecoder) undecoded(name string, rev int) []byte {
	d.text = appendQuoted(d.text, []byte(name))
	d.text = fmt.Appendf(d.text, " --undecoded \"revision %d\"", rev)
	return d.text
}

// known adds a match that fits, and reports whether it could.
func (d *xtDecoder) known(start int, name string, rev int, b []byte) bool {
	switch name {
	case "comment":
		d.chain.AddText(netfilter.Comment, 0, 0, xtString(b[:min(len(b), 256)]))
		return true
	case "tcp":
		return d.tcp(start, b)
	case "udp":
		d.port(start, netfilter.SourcePort, xt16(b, 0), xt16(b, 2), b[8]&1 != 0)
		d.port(start, netfilter.DestinationPort, xt16(b, 4), xt16(b, 6), b[8]&2 != 0)
		return b[8]&^3 == 0 && d.ofProtocol(start, name)
	case "sctp":
		return d.sctp(start, b)
	case "statistic":
		return d.statistic(b)
	case "mark", "connmark":
		kind := netfilter.MarkIs
		if name == "connmark" {
			kind = netfilter.ConnMarkIs
		}
		d.chain.Add(netfilter.Expr{Kind: kind, Flags: xtNot(b[8]), A: xt32(b, 0), B: xt32(b, 4)})
		return true
	case "addrtype":
		return d.addrType(start, rev, b)
	case "conntrack":
		return d.ctState(rev, b)
	case "multiport":
		return d.multiport(b)
	case "iprange":
		return d.addrRange(start, b)
	case "physdev":
		// Only --physdev-is-in alone has a Kind.
		const isIn = 0x08 // XT_PHYSDEV_OP_ISIN, in both bitmask and invert
		d.chain.Add(netfilter.Expr{Kind: netfilter.BridgePort, Flags: xtNot(b[64] & isIn)})
		return b[65] == isIn
	case "recent":
		return d.recent(rev, b)
	case "nfacct":
		d.text = append(append(d.text[:0], "-m nfacct --nfacct-name  "...), xtString(b[:32])...)
		d.chain.AddText(netfilter.Always, 0, 0, d.text)
		return true
	case "rpfilter":
		return d.rpfilter(b[0])
	}
	return d.textOnly(name, b)
}

func xtNot(b byte) uint8 {
	if b != 0 {
		return netfilter.Not
	}
	return 0
}

func xtNot32(v uint32) uint8 {
	if v != 0 {
		return netfilter.Not
	}
	return 0
}

// add appends an expression, joined to those of the same match before it.
func (d *xtDecoder) add(start int, e netfilter.Expr) {
	if d.chain.Mark() > start {
		e.Flags |= netfilter.Joined
	}
	d.chain.Add(e)
}

func (d *xtDecoder) port(start int, kind netfilter.Kind, lo, hi uint16, not bool) {
	if lo == 0 && hi == 0xffff && !not {
		return // not asked for
	}
	e := netfilter.Expr{Kind: kind, A: uint32(lo), B: uint32(hi)}
	if not {
		e.Flags = netfilter.Not
	}
	d.add(start, e)
}

// ofProtocol ends a match of ports: one that asks for nothing always holds, and
// one behind another protocol's -p is none that iptables writes.
func (d *xtDecoder) ofProtocol(start int, name string) bool {
	if d.protocol != name {
		return false
	}
	if d.chain.Mark() == start {
		d.text = append(append(d.text[:0], "-m "...), name...)
		d.chain.AddText(netfilter.Always, 0, 0, d.text)
	}
	return true
}

// tcp decodes struct xt_tcp: two port ranges, option, flags and mask, inverse.
func (d *xtDecoder) tcp(start int, b []byte) bool {
	const notSource, notDest, notFlags, notOption = 1, 2, 4, 8
	option, mask, comp, not := b[8], b[9], b[10], b[11]
	d.port(start, netfilter.SourcePort, xt16(b, 0), xt16(b, 2), not&notSource != 0)
	d.port(start, netfilter.DestinationPort, xt16(b, 4), xt16(b, 6), not&notDest != 0)
	if mask != 0 || not&notFlags != 0 {
		d.add(start, netfilter.Expr{Kind: netfilter.TCPFlags, Flags: xtNot(not & notFlags), A: uint32(mask), B: uint32(comp)})
	}
	if mask|comp >= 1<<len(tcpFlags) || not > 15 || d.protocol != "tcp" {
		return false
	}
	if option == 0 && not&notOption == 0 {
		return d.ofProtocol(start, "tcp")
	}
	// There is no Kind for an option: the whole match is Unknown.
	d.chain.Undo(start)
	d.text = append(d.text[:0], "-m tcp"...)
	d.textPorts("--sport", xt16(b, 0), xt16(b, 2), not&notSource != 0)
	d.textPorts("--dport", xt16(b, 4), xt16(b, 6), not&notDest != 0)
	d.option(not&notOption != 0, "--tcp-option %d", option)
	if mask != 0 || not&notFlags != 0 {
		d.option(not&notFlags != 0, "--tcp-flags ")
		d.text = append(appendNames(d.text, uint32(mask), tcpFlags), ' ')
		d.text = appendNames(d.text, uint32(comp), tcpFlags)
	}
	d.chain.AddText(netfilter.Unknown, 0, 0, d.text)
	return true
}

func (d *xtDecoder) textPorts(name string, lo, hi uint16, not bool) {
	switch {
	case lo == 0 && hi == 0xffff && !not:
	case lo == hi:
		d.option(not, "%s %d", name, lo)
	default:
		d.option(not, "%s %d:%d", name, lo, hi)
	}
}

// option appends an option to the text.
func (d *xtDecoder) option(not bool, format string, args ...any) {
	d.text = append(d.text, ' ')
	if not {
		d.text = append(d.text, "! "...)
	}
	d.text = fmt.Appendf(d.text, format, args...)
}

// sctp decodes struct xt_sctp_info, where it does not ask for chunks.
func (d *xtDecoder) sctp(start int, b []byte) bool {
	const source, dest = 1, 2
	flags, not := xt32(b, 284), xt32(b, 288)
	if flags&source != 0 {
		d.port(start, netfilter.SourcePort, xt16(b, 4), xt16(b, 6), not&source != 0)
	}
	if flags&dest != 0 {
		d.port(start, netfilter.DestinationPort, xt16(b, 0), xt16(b, 2), not&dest != 0)
	}
	return flags&^(source|dest) == 0 && d.ofProtocol(start, "sctp")
}

// statistic decodes struct xt_statistic_info.
func (d *xtDecoder) statistic(b []byte) bool {
	const random, nth = 0, 1
	e := netfilter.Expr{Flags: xtNot(b[2] | b[3])}
	switch xt16(b, 0) {
	case random:
		e.Kind, e.A = netfilter.Random, xt32(b, 4)
		if e.A > 1<<31 {
			return false
		}
	case nth:
		e.Kind, e.A, e.B = netfilter.Nth, xt32(b, 4)+1, xt32(b, 8) // the kernel keeps "every" less one
		if e.B >= e.A {
			return false
		}
	default:
		return false
	}
	d.chain.Add(e)
	return true
}

// addrType decodes struct xt_addrtype_info of revision 0 and _v1 of revision 1.
func (d *xtDecoder) addrType(start, rev int, b []byte) bool {
	source, dest := xt16(b, 0), xt16(b, 2)
	var notSource, notDest uint8
	if rev == 0 {
		notSource, notDest = xtNot32(xt32(b, 4)), xtNot32(xt32(b, 8))
	} else {
		flags := xt32(b, 4)
		notSource, notDest = xtNot32(flags&1), xtNot32(flags&2)
		if flags&^3 != 0 { // --limit-iface-in and -out
			return false
		}
	}
	if source == 0 && dest == 0 || source|dest >= 1<<len(addrTypes) {
		return false
	}
	if source != 0 {
		d.add(start, netfilter.Expr{Kind: netfilter.SourceType, Flags: notSource, A: uint32(source)})
	}
	if dest != 0 {
		d.add(start, netfilter.Expr{Kind: netfilter.DestinationType, Flags: notDest, A: uint32(dest)})
	}
	return true
}

// xtStates are the bits of xt_conntrack's state mask (XT_CONNTRACK_STATE_*), in
// the order of the netfilter.CT bits. nf_tables numbers the states alike up to
// RELATED and NEW.
var xtStates = [...]uint32{1 << 0, 1 << 3, 1 << 2, 1 << 1, 1 << 8, 1 << 6, 1 << 7}

// xtCTState turns a mask of xtStates into netfilter.CT bits.
func xtCTState(mask uint32) (states uint32, ok bool) {
	for i, bit := range xtStates {
		if mask&bit != 0 {
			states |= 1 << i
			mask &^= bit
		}
	}
	return states, mask == 0
}

// ctState decodes struct xt_conntrack_mtinfo1 to 3 when they ask for the state
// alone.
func (d *xtDecoder) ctState(rev int, b []byte) bool {
	const state, alias = 1 << 0, 1 << 13
	match, not := xt16(b, 146), xt16(b, 148)
	if match != state && match != state|alias {
		return false
	}
	mask := uint32(b[150])
	if rev > 1 {
		mask = uint32(xt16(b, 150))
	}
	states, ok := xtCTState(mask)
	e := netfilter.Expr{Kind: netfilter.CTState, Flags: xtNot32(uint32(not & state)), A: states}
	if match&alias != 0 {
		e.N = 1
	}
	d.chain.Add(e)
	return ok && states != 0
}

// multiport decodes struct xt_multiport_v1.
func (d *xtDecoder) multiport(b []byte) bool {
	which, count := b[0], int(b[1])
	if count == 0 || count > 15 || which > netfilter.MultiportEither {
		return false
	}
	d.text = d.text[:0]
	for i := 0; i < count; i++ {
		if i > 0 {
			d.text = append(d.text, ',')
		}
		d.text = strconv.AppendUint(d.text, uint64(xt16(b, 2+2*i)), 10)
		if b[32+i] != 0 { // the first of a range
			if i++; i == count {
				return false
			}
			d.text = strconv.AppendUint(append(d.text, ':'), uint64(xt16(b, 2+2*i)), 10)
		}
	}
	d.chain.AddText(netfilter.Multiport, xtNot(b[47]), uint16(which), d.text)
	return true
}

// address reads a union nf_inet_addr.
func (d *xtDecoder) address(b []byte) netip.Addr {
	if d.family == netfilter.IPv4 {
		return netip.AddrFrom4([4]byte(b[:4]))
	}
	return netip.AddrFrom16([16]byte(b[:16]))
}

// addrRange decodes struct xt_iprange_mtinfo.
func (d *xtDecoder) addrRange(start int, b []byte) bool {
	flags := b[64]
	if flags&3 == 0 || flags&^0x33 != 0 {
		return false
	}
	for which := range 2 {
		if flags&(1<<which) == 0 {
			continue
		}
		d.text = append(appendAddr(d.text[:0], d.address(b[32*which:])), '-')
		d.text = appendAddr(d.text, d.address(b[32*which+16:]))
		joined := uint8(0)
		if d.chain.Mark() > start {
			joined = netfilter.Joined
		}
		d.chain.AddText(netfilter.AddrRange, joined|xtNot(flags&(1<<(4+which))), uint16(which), d.text)
	}
	return true
}

// recent decodes struct xt_recent_mtinfo, and _v1 with a mask behind it.
func (d *xtDecoder) recent(rev int, b []byte) bool {
	const check, set, update, remove, ttl, reap = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
	how := b[8]
	d.text = append(d.text[:0], "-m recent"...)
	not := b[9] != 0
	var does uint16
	switch how &^ (ttl | reap) {
	case set:
		does = netfilter.RecentSet
		d.option(not, "--set")
	case check:
		does = netfilter.RecentCheck
		d.option(not, "--rcheck")
	case update:
		does = netfilter.RecentUpdate
		d.option(not, "--update")
	case remove:
		does = netfilter.RecentRemove
		d.option(not, "--remove")
	default:
		return false
	}
	if seconds := xt32(b, 0); seconds != 0 {
		d.option(false, "--seconds %d", seconds)
	}
	if how&reap != 0 {
		d.option(false, "--reap")
	}
	if hits := xt32(b, 4); hits != 0 {
		d.option(false, "--hitcount %d", hits)
	}
	if how&ttl != 0 {
		d.option(false, "--rttl")
	}
	d.option(false, "--name %s", xtString(b[10:210]))
	if rev == 1 {
		d.text = appendAddr(append(d.text, " --mask "...), d.address(b[212:]))
	}
	if b[210] == 1 {
		d.option(false, "--rdest")
	} else {
		d.option(false, "--rsource")
	}
	d.chain.AddText(netfilter.Recent, xtNot(b[9]), does, d.text)
	return true
}

func (d *xtDecoder) rpfilter(flags uint8) bool {
	d.text = append(d.text[:0], "-m rpfilter"...)
	for i, name := range [...]string{"--loose", "--validmark", "--accept-local", "--invert"} {
		if flags&(1<<i) != 0 {
			d.option(false, "%s", name)
		}
	}
	const invert = 0x08
	d.chain.AddText(netfilter.Always, xtNot(flags&invert), 0, d.text)
	return flags < 1<<4
}

// textOnly adds the common matches that have no Kind of their own as Unknown,
// with their text.
func (d *xtDecoder) textOnly(name string, b []byte) bool {
	d.text = append(append(d.text[:0], "-m "...), name...)
	switch name {
	case "limit": // struct xt_rateinfo
		if !d.limit(uint64(xt32(b, 0)), xt32(b, 4)) {
			return false
		}
	case "length":
		if lo, hi := xt16(b, 0), xt16(b, 2); lo == hi {
			d.option(b[4] != 0, "--length %d", lo)
		} else {
			d.option(b[4] != 0, "--length %d:%d", lo, hi)
		}
	case "mac":
		d.option(xt32(b, 8) != 0, "--mac-source %02x:%02x:%02x:%02x:%02x:%02x", b[0], b[1], b[2], b[3], b[4], b[5])
	case "pkttype":
		types := [...]string{"unicast", "broadcast", "multicast"}
		n := xt32(b, 0)
		if n >= uint32(len(types)) {
			return false
		}
		d.option(xt32(b, 4) != 0, "--pkt-type %s", types[n])
	case "ttl", "hl":
		modes := [...]string{"eq", "eq", "lt", "gt"}
		const notEqual = 1
		if b[0] >= uint8(len(modes)) {
			return false
		}
		d.option(b[0] == notEqual, "--%s-%s %d", name, modes[b[0]], b[1])
	case "cpu":
		d.option(xt32(b, 4) != 0, "--cpu %d", xt32(b, 0))
	case "owner":
		return d.owner(b)
	case "icmp", "icmp6":
		return d.icmp(name, b)
	default:
		return false
	}
	d.chain.AddText(netfilter.Unknown, 0, 0, d.text)
	return true
}

// limitUnits are the names that --limit takes, and the time between two packets
// of one per unit, in XT_LIMIT_SCALE parts of a second.
var limitUnits = [...]struct {
	name  string
	parts uint64
}{{"day", 24 * 60 * 60 * 10000}, {"hour", 60 * 60 * 10000}, {"min", 60 * 10000}, {"sec", 10000}}

// limit appends the options of a limit: the time between two packets, in the
// greatest unit that loses least, and the burst where it is not the usual one.
func (d *xtDecoder) limit(between uint64, burst uint32) bool {
	if between == 0 {
		return false
	}
	unit := limitUnits[0]
	for _, u := range limitUnits[1:] {
		if between > u.parts || u.parts/between < u.parts%between {
			break
		}
		unit = u
	}
	d.option(false, "--limit %d/%s", unit.parts/between, unit.name)
	const usual = 5 // XT_LIMIT_BURST of libxt_limit
	if burst != usual {
		d.option(false, "--limit-burst %d", burst)
	}
	return true
}

// owner decodes struct xt_owner_match_info.
func (d *xtDecoder) owner(b []byte) bool {
	const socket = 4
	match, not := b[16], b[17]
	if match == 0 || match > 7 {
		return false
	}
	if match&socket != 0 {
		d.option(not&socket != 0, "--socket-exists")
	}
	for i, name := range [...]string{"--uid-owner", "--gid-owner"} {
		if match&(1<<i) == 0 {
			continue
		}
		if lo, hi := xt32(b, 8*i), xt32(b, 8*i+4); lo == hi {
			d.option(not&(1<<i) != 0, "%s %d", name, lo)
		} else {
			d.option(not&(1<<i) != 0, "%s %d-%d", name, lo, hi)
		}
	}
	d.chain.AddText(netfilter.Unknown, 0, 0, d.text)
	return true
}

// icmp decodes struct ipt_icmp and struct ip6t_icmp: type, range of codes, inverse.
func (d *xtDecoder) icmp(name string, b []byte) bool {
	option := "--icmp-type"
	if name == "icmp6" {
		option = "--icmpv6-type"
	}
	switch {
	case b[1] == 0 && b[2] == 0xff && b[0] == 0xff:
		d.option(b[3] != 0, "%s any", option)
	case b[1] == 0 && b[2] == 0xff:
		d.option(b[3] != 0, "%s %d", option, b[0])
	case b[1] == b[2]:
		d.option(b[3] != 0, "%s %d/%d", option, b[0], b[1])
	default:
		return false
	}
	d.chain.AddText(netfilter.Unknown, 0, 0, d.text)
	return true
}

// target adds a target, other than the standard one.
func (d *xtDecoder) target(name string, rev int, data []byte) {
	start := d.chain.Mark()
	if d.fits(name, rev, data) && d.knownTarget(name, rev, data) {
		return
	}
	d.chain.Undo(start)
	kind := netfilter.UnknownTarget
	if noEffect[name] && name != "CT" { // CT may take a packet out of conntrack
		kind = netfilter.NoEffect
	}
	d.text = d.text[:0]
	d.chain.AddText(kind, 0, 0, d.undecoded(name, rev))
}

// knownTarget adds a target that fits, and reports whether it could.
func (d *xtDecoder) knownTarget(name string, rev int, b []byte) bool {
	d.text = d.text[:0]
	switch name {
	case "DNAT", "SNAT":
		r, ok := d.natRange(rev, b)
		return ok && d.nat(name == "DNAT", r)
	case "MASQUERADE", "REDIRECT":
		if d.family == netfilter.IPv6 {
			rev = 1 // revision 0 for IPv6 is what is revision 1 for IPv4
		}
		r, ok := d.natRange(rev, b)
		if !ok || r.flags&^(natPorts|natRandom|natFully|natIPs) != 0 {
			return false
		}
		r.flags &^= natIPs // both targets refuse addresses
		d.portsOnly(name == "REDIRECT", r)
		return true
	case "MARK": // struct xt_mark_tginfo2
		d.chain.Add(netfilter.Expr{Kind: netfilter.SetMark, A: xt32(b, 0), B: xt32(b, 4)})
		return true
	case "CONNMARK":
		return d.connMark(rev, b)
	case "REJECT":
		return d.reject(xt32(b, 0))
	case "NFQUEUE":
		return d.queue(rev, b)
	case "CT":
		return d.ct(b)
	case "NOTRACK":
		d.chain.AddText(netfilter.NoTrack, 0, 0, []byte(name))
		return true
	}
	d.text = append(d.text, name...)
	if !d.harmless(name, b) {
		return false
	}
	d.chain.AddText(netfilter.NoEffect, 0, 0, d.text)
	return true
}

// Flags of struct nf_nat_range2 (NF_NAT_RANGE_*).
const (
	natIPs        = 1 << 0
	natPorts      = 1 << 1
	natRandom     = 1 << 2
	natPersistent = 1 << 3
	natFully      = 1 << 4
	natOffset     = 1 << 5
)

// natRange is what a nat target sends to.
type natRange struct {
	flags                  uint32
	minAddr, maxAddr       netip.Addr
	minPort, maxPort, base uint16
}

// natRange decodes struct nf_nat_ipv4_multi_range_compat (revision 0, IPv4),
// nf_nat_range (1) or nf_nat_range2 (2). Ports are big endian.
func (d *xtDecoder) natRange(rev int, b []byte) (r natRange, ok bool) {
	port := func(at int) uint16 { return binary.BigEndian.Uint16(b[at:]) }
	if rev == 0 {
		if d.family == netfilter.IPv6 || xt32(b, 0) != 1 { // rangesize
			return r, false
		}
		return natRange{
			flags: xt32(b, 4), minAddr: d.address(b[8:]), maxAddr: d.address(b[12:]),
			minPort: port(16), maxPort: port(18),
		}, true
	}
	r = natRange{flags: xt32(b, 0), minAddr: d.address(b[4:]), maxAddr: d.address(b[20:]), minPort: port(36), maxPort: port(38)}
	if rev == 2 {
		r.base = port(40)
	}
	return r, true
}

// nat adds a DNAT or SNAT.
func (d *xtDecoder) nat(isDNAT bool, r natRange) bool {
	const known = natIPs | natPorts | natRandom | natPersistent | natFully | natOffset
	if r.flags&^known != 0 || r.flags&(natIPs|natPorts) == 0 {
		return false
	}
	to := netip.AddrPort{}
	if r.flags&natIPs != 0 {
		to = netip.AddrPortFrom(r.minAddr, 0)
	}
	if r.flags&natPorts != 0 {
		to = netip.AddrPortFrom(to.Addr(), r.minPort)
	}
	one := (r.flags&natIPs == 0 || r.minAddr == r.maxAddr) && (r.flags&natPorts == 0 || r.minPort == r.maxPort && r.minPort != 0)
	if isDNAT && one && r.flags&^(natIPs|natPorts) == 0 {
		return d.chain.AddDNAT(to) == nil
	}
	kind, option := netfilter.SNAT, "--to-source "
	if isDNAT {
		kind, option = netfilter.DNATRange, "--to-destination "
	}
	d.text = append(d.text[:0], option...)
	d.appendNATRange(r)
	d.natFlags(r.flags)
	d.chain.AddText(kind, 0, 0, d.text)
	return true
}

// appendNATRange writes ADDRESS[-ADDRESS][:PORT[-PORT[/BASE]]], IPv6 addresses
// in brackets where a port follows.
func (d *xtDecoder) appendNATRange(r natRange) {
	brackets := d.family == netfilter.IPv6 && r.flags&natPorts != 0
	if r.flags&natIPs != 0 {
		if brackets {
			d.text = append(d.text, '[')
		}
		d.text = appendAddr(d.text, r.minAddr)
		if r.maxAddr != r.minAddr {
			d.text = appendAddr(append(d.text, '-'), r.maxAddr)
		}
		if brackets {
			d.text = append(d.text, ']')
		}
	}
	if r.flags&natPorts != 0 {
		d.text = append(d.text, ':')
		d.appendPortRange(r)
	}
}

func (d *xtDecoder) appendPortRange(r natRange) {
	d.text = strconv.AppendUint(d.text, uint64(r.minPort), 10)
	if r.maxPort != r.minPort {
		d.text = strconv.AppendUint(append(d.text, '-'), uint64(r.maxPort), 10)
	}
	if r.flags&natOffset != 0 {
		d.text = strconv.AppendUint(append(d.text, '/'), uint64(r.base), 10)
	}
}

func (d *xtDecoder) natFlags(flags uint32) {
	for _, f := range [...]struct {
		flag uint32
		name string
	}{{natRandom, "--random"}, {natFully, "--random-fully"}, {natPersistent, "--persistent"}} {
		if flags&f.flag != 0 {
			if len(d.text) > 0 {
				d.text = append(d.text, ' ')
			}
			d.text = append(d.text, f.name...)
		}
	}
}

// portsOnly adds a MASQUERADE or a REDIRECT.
func (d *xtDecoder) portsOnly(redirect bool, r natRange) {
	d.text = d.text[:0]
	if r.flags&natPorts != 0 {
		d.text = append(d.text, "--to-ports "...)
		d.appendPortRange(r)
	}
	d.natFlags(r.flags)
	switch {
	case !redirect:
		d.chain.AddText(netfilter.Masquerade, 0, 0, d.text)
	case r.flags&natPorts == 0:
		d.chain.AddText(netfilter.Redirect, 0, 0, d.text)
	case r.minPort == r.maxPort && r.minPort != 0:
		d.chain.AddText(netfilter.Redirect, 0, r.minPort, d.text)
	default: // which port it will be cannot be told
		d.chain.AddText(netfilter.DNATRange, 0, 1, d.text)
	}
}

// connMark decodes struct xt_connmark_tginfo1 and 2.
func (d *xtDecoder) connMark(rev int, b []byte) bool {
	const set, save, restore = 0, 1, 2
	ctMark, ctMask, nfMask := xt32(b, 0), xt32(b, 4), xt32(b, 8)
	if rev == 2 && (b[12] != 0 || b[13] != 0) { // shifts, which have no Kind
		return false
	}
	mode := b[12]
	if rev == 2 {
		mode = b[14]
	}
	switch mode {
	case set:
		d.chain.Add(netfilter.Expr{Kind: netfilter.SetConnMark, A: ctMark, B: ctMask})
	case save:
		d.chain.Add(netfilter.Expr{Kind: netfilter.SaveMark, A: nfMask, B: ctMask})
	case restore:
		d.chain.Add(netfilter.Expr{Kind: netfilter.RestoreMark, A: nfMask, B: ctMask})
	default:
		return false
	}
	return true
}

// rejectNames are the names of enum ipt_reject_with and enum ip6t_reject_with.
var rejectNames = map[netfilter.Family][]string{
	netfilter.IPv4: {
		"icmp-net-unreachable", "icmp-host-unreachable", "icmp-proto-unreachable", "icmp-port-unreachable", "",
		"icmp-net-prohibited", "icmp-host-prohibited", "tcp-reset", "icmp-admin-prohibited",
	},
	netfilter.IPv6: {
		"icmp6-no-route", "icmp6-adm-prohibited", "", "icmp6-addr-unreachable", "icmp6-port-unreachable", "",
		"tcp-reset", "icmp6-policy-fail", "icmp6-reject-route",
	},
}

func (d *xtDecoder) reject(with uint32) bool {
	names := rejectNames[d.family]
	if with >= uint32(len(names)) || names[with] == "" {
		// It rejects, whatever it answers.
		d.chain.AddText(netfilter.Reject, 0, 0, fmt.Appendf(d.text, "--reject-with %d", with))
		return true
	}
	d.text = append(append(d.text, "--reject-with "...), names[with]...)
	d.chain.AddText(netfilter.Reject, 0, 0, d.text)
	return true
}

// queue decodes struct xt_NFQ_info and _v1 to _v3.
func (d *xtDecoder) queue(rev int, b []byte) bool {
	num, total, flags := xt16(b, 0), uint16(1), uint16(0)
	if rev > 0 {
		total = xt16(b, 2)
	}
	if rev > 1 {
		flags = xt16(b, 4)
	}
	d.addQueue(num, total, flags)
	return true
}

func (d *xtDecoder) addQueue(num, total, flags uint16) {
	const bypass, fanout = 1, 2
	d.text = append(d.text[:0], "NFQUEUE"...)
	if total > 1 {
		d.option(false, "--queue-balance %d:%d", num, uint32(num)+uint32(total)-1)
	} else {
		d.option(false, "--queue-num %d", num)
	}
	if flags&bypass != 0 {
		d.option(false, "--queue-bypass")
	}
	if flags&fanout != 0 {
		d.option(false, "--queue-cpu-fanout")
	}
	d.chain.AddText(netfilter.Queue, 0, 0, d.text)
}

// ct decodes struct xt_ct_target_info and _v1: flags, zone, two masks of
// events, the name of a helper, and since revision 1 that of a timeout.
func (d *xtDecoder) ct(b []byte) bool {
	const noTrack, alias, known = 1, 2, 0x1f
	flags, zone := xt16(b, 0), xt16(b, 2)
	if flags&^known != 0 {
		return false
	}
	kind := netfilter.NoEffect
	if flags&noTrack != 0 {
		kind = netfilter.NoTrack
	}
	if flags == noTrack|alias {
		d.chain.AddText(kind, 0, 0, []byte("NOTRACK"))
		return true
	}
	d.text = append(d.text, "CT"...)
	if flags&noTrack != 0 {
		d.option(false, "--notrack")
	}
	helper := xtString(b[12:28])
	if len(helper) > 0 {
		d.option(false, "--helper %s", helper)
	}
	const direction = 4 | 8 | 16
	if flags&direction != 0 || xt32(b, 4) != 0 || xt32(b, 8) != 0 || len(b) >= 60 && b[28] != 0 {
		d.option(false, "--undecoded \"zone of one direction, events or timeout\"")
	}
	if zone != 0 {
		d.option(false, "--zone %d", zone)
	}
	d.chain.AddText(kind, 0, 0, d.text)
	return true
}

// harmless appends the options of a target without effect on a Service's
// traffic, and reports whether it knows them.
func (d *xtDecoder) harmless(name string, b []byte) bool {
	switch name {
	case "TRACE":
	case "LOG": // struct xt_log_info
		d.log(b)
	case "NFLOG": // struct xt_nflog_info
		const size = 1 // XT_NFLOG_F_COPY_LEN: "len" counts
		copied, group, threshold, flags := xt32(b, 0), xt16(b, 4), xt16(b, 6), xt16(b, 8)
		d.addNFLOG(xtString(b[12:76]), group, copied, flags&size != 0, threshold)
	case "TCPMSS":
		if mss := xt16(b, 0); mss == 0xffff {
			d.option(false, "--clamp-mss-to-pmtu")
		} else {
			d.option(false, "--set-mss %d", mss)
		}
	case "TOS":
		d.option(false, "--set-tos 0x%02x/0x%02x", b[0], b[1])
	case "DSCP":
		d.option(false, "--set-dscp 0x%02x", b[0])
	case "TTL", "HL":
		modes := [...]string{"set", "inc", "dec"}
		if b[0] >= uint8(len(modes)) {
			return false
		}
		prefix := "--ttl"
		if name == "HL" {
			prefix = "--hl"
		}
		d.option(false, "%s-%s %d", prefix, modes[b[0]], b[1])
	case "CLASSIFY":
		class := xt32(b, 0)
		d.option(false, "--set-class %04x:%04x", class>>16, class&0xffff)
	case "CHECKSUM":
		d.option(false, "--checksum-fill")
	case "TEE":
		d.text = appendAddr(append(d.text, " --gateway "...), d.address(b))
		if oif := xtString(b[16:32]); len(oif) > 0 {
			d.option(false, "--oif %s", oif)
		}
	default:
		return false
	}
	return true
}

func (d *xtDecoder) log(b []byte) {
	const usual = 4 // LOG_WARNING
	level, flags, prefix := b[0], b[1], xtString(b[2:32])
	if len(prefix) > 0 {
		d.text = appendQuoted(append(d.text, " --log-prefix "...), prefix)
	}
	if level != usual {
		d.option(false, "--log-level %d", level)
	}
	for _, f := range [...]struct {
		flag uint8
		name string
	}{{1, "--log-tcp-sequence"}, {2, "--log-tcp-options"}, {4, "--log-ip-options"}, {8, "--log-uid"}, {0x20, "--log-macdecode"}} {
		if flags&f.flag != 0 {
			d.option(false, "%s", f.name)
		}
	}
}

// addNFLOG appends the options of NFLOG to the text.
func (d *xtDecoder) addNFLOG(prefix []byte, group uint16, copied uint32, hasSize bool, threshold uint16) {
	if len(prefix) > 0 {
		d.text = appendQuoted(append(d.text, " --nflog-prefix "...), prefix)
	}
	if group != 0 {
		d.option(false, "--nflog-group %d", group)
	}
	switch {
	case hasSize:
		d.option(false, "--nflog-size %d", copied)
	case copied != 0:
		d.option(false, "--nflog-range %d", copied)
	}
	if threshold != 0 {
		d.option(false, "--nflog-threshold %d", threshold)
	}
}
