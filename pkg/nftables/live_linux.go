package nftables

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/natlens/natlens/pkg/internal/nfnetlink"
	"github.com/natlens/natlens/pkg/netfilter"
)

// Live reads the tables "ip kube-proxy" and "ip6 kube-proxy", which kube-proxy's
// nftables mode writes, straight from the kernel's nf_tables over netlink. It
// runs no program, takes no lock, creates nothing and zeroes no counter. It
// needs the capability NET_ADMIN, and nothing else.
//
// It returns what [Parse] makes of "nft -nn -j list table" of the same tables.
// What it does not understand is netfilter.Unknown or netfilter.UnknownTarget,
// with a text {"undecoded": …} that names the expression.
//
// The zero value is ready for use.
type Live struct{}

// Read reads the tables in the network namespace of the calling thread. A table
// that is not there is no error. Read starts again when something changed
// meanwhile; if the rules keep changing, the result is Torn. An error means that
// nothing could be read, and wraps the kernel's error number.
func (l *Live) Read(ctx context.Context) (*netfilter.Ruleset, error) {
	return nfnetlink.Read(ctx, func(conn *nfnetlink.Conn) (*netfilter.Ruleset, bool, error) {
		r := liveReader{conn: conn, rules: &netfilter.Ruleset{}}
		err := r.read(ctx)
		return r.rules, r.changed, err
	})
}

// liveReader reads everything once.
type liveReader struct {
	conn    *nfnetlink.Conn
	rules   *netfilter.Ruleset
	changed bool // something did not fit together, so the rules have changed
}

// read reads both tables, once.
func (r *liveReader) read(ctx context.Context) error {
	for _, f := range []struct {
		proto  uint8
		family netfilter.Family
	}{{unix.NFPROTO_IPV4, netfilter.IPv4}, {unix.NFPROTO_IPV6, netfilter.IPv6}} {
		if err := r.table(ctx, f.proto, f.family); err != nil {
			return err
		}
	}
	return nil
}

// dump is Conn.Dump, but neither an interrupted dump nor an object that is gone
// is an error yet.
func (r *liveReader) dump(ctx context.Context, kind int, proto uint8, attrs []byte, each func([]byte) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	err := r.conn.Dump(kind, proto, attrs, each)
	if errors.Is(err, nfnetlink.ErrInterrupted) || errors.Is(err, syscall.ENOENT) {
		r.changed = true
		return nil
	}
	return err
}

// table reads the table of one family, if there is one.
func (r *liveReader) table(ctx context.Context, proto uint8, family netfilter.Family) error {
	name := nfnetlink.AppendString(nil, unix.NFTA_TABLE_NAME, kubeProxyTable)
	b, err := r.conn.Get(unix.NFT_MSG_GETTABLE, proto, name)
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.EAFNOSUPPORT) {
		return nil
	}
	if err != nil {
		return err
	}
	const dormant = 1 // NFT_TABLE_F_DORMANT
	var a [unix.NFTA_TABLE_FLAGS + 1][]byte
	nfnetlink.Collect(b, a[:])
	if flags, _ := nfnetlink.Uint32(a[unix.NFTA_TABLE_FLAGS]); flags&dormant != 0 {
		r.rules.Unreadable = append(r.rules.Unreadable, netfilter.Unreadable{Family: family, Table: kubeProxyTable, Reason: fmt.Sprintf(
			"the nf_tables table %q of %v is dormant: its rules are switched off, which kube-proxy does not do: another program did it, see nft list table", kubeProxyTable, family)})
		return nil
	}
	d := newLiveDecoder(netfilter.NewTable(family, kubeProxyTable, netfilter.BackendNFTables))

	// Verdicts and lookups name chains and sets, so these come first. A dump of
	// chains is one of all tables of the family.
	err = r.dump(ctx, unix.NFT_MSG_GETCHAIN, proto, nil, func(b []byte) error {
		d.addChain(b)
		return nil
	})
	if err != nil {
		return err
	}
	err = r.dump(ctx, unix.NFT_MSG_GETSET, proto, nfnetlink.AppendString(nil, nftaSetTable, kubeProxyTable), func(b []byte) error {
		d.addSet(b)
		return nil
	})
	if err != nil {
		return err
	}
	if err := r.elements(ctx, proto, d, false); err != nil {
		return err
	}
	// The kernel walks a table's rules from the first for each 32 KiB of a dump
	// (__nf_tables_dump_rules in net/netfilter/nf_tables_api.c). With two rules
	// for a Service, it does not yet matter at 10,000 of them.
	err = r.dump(ctx, unix.NFT_MSG_GETRULE, proto, nfnetlink.AppendString(nil, nftaRuleTable, kubeProxyTable), func(b []byte) error {
		d.addRule(b)
		return nil
	})
	if err != nil {
		return err
	}
	if err := r.elements(ctx, proto, d, true); err != nil {
		return err
	}
	r.changed = r.changed || d.missing
	d.table.Compact()
	r.rules.Tables = append(r.rules.Tables, d.table)
	return nil
}

// elements reads the elements of sets, before the rules or behind them.
func (r *liveReader) elements(ctx context.Context, proto uint8, d *liveDecoder, behindRules bool) error {
	request := nfnetlink.AppendString(nil, unix.NFTA_SET_ELEM_LIST_TABLE, kubeProxyTable)
	head := len(request)
	for _, s := range d.order {
		if !s.wanted(behindRules) {
			continue
		}
		request = nfnetlink.AppendString(request[:head], unix.NFTA_SET_ELEM_LIST_SET, s.name)
		err := r.dump(ctx, unix.NFT_MSG_GETSETELEM, proto, request, func(b []byte) error {
			var a [unix.NFTA_SET_ELEM_LIST_ELEMENTS + 1][]byte
			nfnetlink.Collect(b, a[:])
			d.addElements(s, a[unix.NFTA_SET_ELEM_LIST_ELEMENTS])
			return nil
		})
		if err != nil {
			return err
		}
		d.finishSet(s)
	}
	return nil
}
