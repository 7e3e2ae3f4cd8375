package iptables

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/natlens/natlens/pkg/internal/nfnetlink"
	"github.com/natlens/natlens/pkg/netfilter"
)

// NFT reads the tables of both families that iptables-nft has written, straight
// from the kernel's nf_tables over netlink. It runs no program, takes no lock,
// creates nothing and zeroes no counter. It needs the capability NET_ADMIN, and
// nothing else.
//
// It returns what Parse makes of iptables-nft-save -c, but for the order of the
// chains, and reads what iptables-nft-save refuses to print: rules that another
// program put into a table of iptables-nft. What it does not understand of
// those is netfilter.Unknown or netfilter.UnknownTarget, with a name.
//
// The zero value is ready for use.
type NFT struct{}

// wholeTable is how many rules, and jumps to its chains, a table may have at most
// to be dumped at once.
// The kernel walks a table's rules from the first for each 32 KiB of a dump
// (__nf_tables_dump_rules in net/netfilter/nf_tables_api.c): that is quadratic,
// while a dump for each chain has a fixed cost. Up to this, one dump takes half
// the time; they meet at some 13,000 rules.
var wholeTable uint64 = 8000

// Read reads the tables in the network namespace of the calling thread. A table
// with the name of one of iptables', but of another layout, is in
// [netfilter.Ruleset.Unreadable]. Read repeats what was changed meanwhile; if
// the rules keep changing, the result is Torn. An error means that nothing
// could be read, and wraps the kernel's error number.
func (n *NFT) Read(ctx context.Context) (*netfilter.Ruleset, error) {
	return nfnetlink.Read(ctx, func(conn *nfnetlink.Conn) (*netfilter.Ruleset, bool, error) {
		r := nftReader{conn: conn, rules: &netfilter.Ruleset{}}
		err := r.read(ctx)
		return r.rules, r.changed, err
	})
}

// nftReader reads everything once.
type nftReader struct {
	conn    *nfnetlink.Conn
	rules   *netfilter.Ruleset
	changed bool // something did not fit together, so the rules have changed

	request []byte // reused
	current *nftTable
	chain   *netfilter.Chain
}

// nftTable is one table while it is read.
type nftTable struct {
	*netfilter.Table
	proto  uint8
	flags  uint32
	uses   []uint32 // of each chain, as they were declared
	rules  uint64   // at most: the sum of uses
	reason string   // why it cannot be read
	decode *nftDecoder
}

// read reads all tables of both families, once.
func (r *nftReader) read(ctx context.Context) error {
	for _, f := range []struct {
		proto  uint8
		family netfilter.Family
	}{{unix.NFPROTO_IPV4, netfilter.IPv4}, {unix.NFPROTO_IPV6, netfilter.IPv6}} {
		if err := r.family(ctx, f.proto, f.family); err != nil {
			return err
		}
	}
	return nil
}

// dump is Conn.Dump, but an interrupted dump is no error yet.
func (r *nftReader) dump(kind int, proto uint8, attrs []byte, each func([]byte) error) error {
	err := r.conn.Dump(kind, proto, attrs, each)
	if errors.Is(err, nfnetlink.ErrInterrupted) {
		r.changed = true
		return nil
	}
	return err
}

func (r *nftReader) family(ctx context.Context, proto uint8, family netfilter.Family) error {
	var tables []*nftTable
	err := r.dump(unix.NFT_MSG_GETTABLE, proto, nil, func(b []byte) error {
		const name, flags = 1, 2
		var a [flags + 1][]byte
		nfnetlink.Collect(b, a[:])
		known := string(nfnetlink.String(a[name]))
		if builtin[known] == nil {
			return nil
		}
		t := &nftTable{Table: netfilter.NewTable(family, known, netfilter.BackendNFT), proto: proto}
		t.flags, _ = nfnetlink.Uint32(a[flags])
		t.decode = newNFTDecoder(t.Table)
		tables = append(tables, t)
		return nil
	})
	if err != nil || len(tables) == 0 {
		return err
	}
	// A dump of chains is one of all tables of the family.
	err = r.dump(unix.NFT_MSG_GETCHAIN, proto, nil, func(b []byte) error {
		var a [nftaChainFlags + 1][]byte
		nfnetlink.Collect(b, a[:])
		of := nfnetlink.String(a[nftaChainTable])
		for _, t := range tables {
			if t.Name == string(of) {
				t.addChain(&a)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, t := range tables {
		t.complete()
		if t.reason != "" {
			r.rules.Unreadable = append(r.rules.Unreadable, netfilter.Unreadable{Family: family, Table: t.Name, Reason: t.reason})
			continue
		}
		if err := r.table(ctx, t); err != nil {
			return err
		}
		t.Compact()
		r.rules.Tables = append(r.rules.Tables, t.Table)
	}
	return nil
}

// Attributes of a chain (enum nft_chain_attributes).
const (
	nftaChainTable    = 1
	nftaChainName     = 3
	nftaChainHook     = 4
	nftaChainPolicy   = 5
	nftaChainUse      = 6
	nftaChainType     = 7
	nftaChainCounters = 8
	nftaChainFlags    = 10
)

// addChain declares a chain.
func (t *nftTable) addChain(a *[nftaChainFlags + 1][]byte) {
	name := string(nfnetlink.String(a[nftaChainName]))
	if name == "" || t.Lookup(name) != nil {
		return // the dump was interrupted, or is none of chains
	}
	c := t.Declare(name)
	use, _ := nfnetlink.Uint32(a[nftaChainUse])
	t.uses = append(t.uses, use)
	t.rules += uint64(use)
	if a[nftaChainHook] != nil {
		t.addBase(c, a)
	}
}

// addBase ties a chain to its hook, if that is what iptables ties it to.
func (t *nftTable) addBase(c *netfilter.Chain, a *[nftaChainFlags + 1][]byte) {
	const number, priority = 1, 2
	var h [priority + 1][]byte
	nfnetlink.Collect(a[nftaChainHook], h[:])
	hook, ok1 := nfnetlink.Uint32(h[number])
	p, ok2 := nfnetlink.Uint32(h[priority])
	policy, ok3 := nfnetlink.Uint32(a[nftaChainPolicy])
	kind := netfilter.TypeFilter
	if string(nfnetlink.String(a[nftaChainType])) == "nat" {
		kind = netfilter.TypeNAT
	}
	want, isBuiltin := builtin[t.Name][c.Name]
	base := netfilter.Base{Hook: want.Hook, Priority: int(int32(p)), Type: kind, Policy: netfilter.Accept}
	const securityPriority = 150 // what iptables-nft uses; the kernel's own is 50
	fits := base.Priority == want.Priority || t.Name == "security" && base.Priority == securityPriority
	if !isBuiltin || !ok1 || !ok2 || !ok3 || hook != uint32(want.Hook) || kind != want.Type || !fits || policy > nfAccept {
		if t.reason == "" {
			at := fmt.Sprintf("hook %d", hook)
			if hook <= uint32(netfilter.Postrouting) {
				at = "hook " + netfilter.Hook(hook).String()
			}
			t.reason = fmt.Sprintf("the nf_tables table %q of %v is not in the layout of iptables-nft: its chain %q is at %s with priority %d, where iptables has none of that name: another program made it, read it with nft",
				t.Name, t.Family, c.Name, at, base.Priority)
		}
		return
	}
	if policy == nfDrop {
		base.Policy = netfilter.Drop
	}
	const size, packets = 1, 2
	var n [packets + 1][]byte
	nfnetlink.Collect(a[nftaChainCounters], n[:])
	base.Counter.Bytes, _ = nfnetlink.Uint64(n[size])
	base.Counter.Packets, _ = nfnetlink.Uint64(n[packets])
	c.Base = &base
}

// complete judges a table, and declares the built-in chains that it lacks, now
// that its chains are known: iptables-nft makes them when the first rule needs
// them, and prints all of them always.
func (t *nftTable) complete() {
	const dormant = 1 // NFT_TABLE_F_DORMANT
	if t.reason == "" && t.flags&dormant != 0 {
		t.reason = fmt.Sprintf("the nf_tables table %q of %v is dormant: its rules are switched off, which iptables cannot do: another program did it, see nft list table", t.Name, t.Family)
	}
	for h := netfilter.Prerouting; h <= netfilter.Postrouting; h++ {
		base, isBuiltin := builtin[t.Name][h.String()]
		if !isBuiltin || t.Lookup(h.String()) != nil {
			continue
		}
		base.Policy = netfilter.Accept
		t.Declare(h.String()).Base = &base
		t.uses = append(t.uses, 0)
	}
}

// table reads the rules of a table.
func (r *nftReader) table(ctx context.Context, t *nftTable) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	r.current, r.chain = t, nil
	r.request = nfnetlink.AppendString(r.request[:0], nftaRuleTable, t.Name)
	if t.rules <= wholeTable {
		return r.dump(unix.NFT_MSG_GETRULE, t.proto, r.request, r.rule)
	}
	head, rule := len(r.request), r.rule
	for i, c := range t.Chains() {
		if t.uses[i] == 0 {
			continue // no rules, and no jumps to it
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		r.chain = c
		r.request = nfnetlink.AppendString(r.request[:head], nftaRuleChain, c.Name)
		if err := r.dump(unix.NFT_MSG_GETRULE, t.proto, r.request, rule); err != nil {
			return err
		}
	}
	return nil
}

// rule adds a rule to its chain, whichever was asked for.
func (r *nftReader) rule(b []byte) error {
	var a [nftaRuleUserData + 1][]byte
	nfnetlink.Collect(b, a[:]) // newer kernels may say more
	if string(nfnetlink.String(a[nftaRuleTable])) != r.current.Name {
		return nil // a kernel that does not filter
	}
	name := nfnetlink.String(a[nftaRuleChain])
	if r.chain == nil || r.chain.Name != string(name) {
		if r.current.rules > wholeTable {
			return nil
		}
		if r.chain = r.current.Lookup(string(name)); r.chain == nil {
			r.changed = true // a chain that was not there when the chains were read
			return nil
		}
	}
	r.current.decode.rule(r.chain, a[nftaRuleExpressions], a[nftaRuleUserData])
	return nil
}
