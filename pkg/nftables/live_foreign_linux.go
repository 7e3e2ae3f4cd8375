package nftables

import (
	"errors"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/natlens/natlens/pkg/internal/nfnetlink"
	"github.com/natlens/natlens/pkg/netfilter"
)

// foreign reads the tables of other programs, and adds to the ruleset what of them
// can decide where connections go.
//
// Which chains a table has is never asked for as a dump: the kernel dumps those of
// all tables of a family, kube-proxy's hundred thousand with them. The rules of a
// table name those that have any, and the others do nothing.
func (s *liveStepper) foreign(next *netfilter.Ruleset) error {
	before := s.others
	s.others = nil
	for _, f := range []struct {
		proto uint8
		name  string
	}{{unix.NFPROTO_IPV4, "ip"}, {unix.NFPROTO_IPV6, "ip6"}, {unix.NFPROTO_INET, "inet"}} {
		err := s.dump(s.conn, unix.NFT_MSG_GETTABLE, f.proto, nil, func(b []byte) {
			const dormant = 1 // NFT_TABLE_F_DORMANT: its rules are switched off
			var a [nftaTableHandle + 1][]byte
			nfnetlink.Collect(b, a[:])
			name := string(nfnetlink.String(a[nftaTableName]))
			flags, _ := nfnetlink.Uint32(a[nftaTableFlags])
			if name == "" || flags&dormant != 0 || !isForeignTable(f.name, name) {
				return
			}
			handle, _ := nfnetlink.Uint64(a[nftaTableHandle])
			i := slices.IndexFunc(before, func(t *foreignTable) bool {
				return t.proto == f.proto && t.name == name && t.handle == handle
			})
			if i >= 0 {
				s.others = append(s.others, before[i])
			} else {
				s.others = append(s.others, newForeignTable(f.name, f.proto, name, handle))
			}
		})
		if err != nil && !errors.Is(err, syscall.EAFNOSUPPORT) {
			return err
		}
	}
	for _, t := range s.others {
		if err := s.foreignTable(t); err != nil {
			return err
		}
		next.Tables = append(next.Tables, t.tables...)
		next.Unreadable = append(next.Unreadable, t.unreadable...)
	}
	return nil
}

// foreignTable reads one of them.
func (s *liveStepper) foreignTable(t *foreignTable) error {
	t.begin()
	defer t.end()
	if err := s.dump(s.conn, unix.NFT_MSG_GETRULE, t.proto, nfnetlink.AppendString(nil, nftaRuleTable, t.name), t.addRule); err != nil {
		return err
	}
	sum := t.hash.Sum64()
	switch same := t.bases != nil && sum == t.sum; {
	case same && t.settled:
		return nil
	case !same:
		if err := s.foreignBases(t); err != nil {
			return err
		}
		t.sum = sum
	}
	if !t.large() {
		if err := t.follow(func(set string) error { return s.foreignSet(t, set) }); err != nil {
			return err
		}
	}
	t.decode()
	t.settled = len(t.sets) == 0
	if s.interrupted.Load() {
		t.bases = nil // they may be of another moment than the rules
	}
	return nil
}

// foreignBases asks which of the chains with rules hang where they may direct.
func (s *liveStepper) foreignBases(t *foreignTable) error {
	t.bases = map[string]*netfilter.Base{}
	for _, name := range t.order {
		if err := s.ctx.Err(); err != nil {
			return err
		}
		b, err := s.conn.Get(unix.NFT_MSG_GETCHAIN, t.proto, nfnetlink.AppendString(nfnetlink.AppendString(nil, nftaChainTable, t.name), nftaChainName, name))
		if errors.Is(err, syscall.ENOENT) {
			s.interrupted.Store(true)
			continue
		}
		if err != nil {
			return err
		}
		var a [nftaChainType + 1][]byte
		nfnetlink.Collect(b, a[:])
		if base := baseOf(a[nftaChainHook], a[nftaChainType], a[nftaChainPolicy]); mayDirect(base) {
			t.bases[name] = base
		}
	}
	return nil
}

// foreignSet reads a set with its elements.
func (s *liveStepper) foreignSet(t *foreignTable, name string) error {
	b, err := s.conn.Get(unix.NFT_MSG_GETSET, t.proto, nfnetlink.AppendString(nfnetlink.AppendString(nil, nftaSetTable, t.name), nftaSetName, name))
	if errors.Is(err, syscall.ENOENT) {
		s.interrupted.Store(true)
		return nil
	}
	if err != nil {
		return err
	}
	var a setAttrs
	nfnetlink.Collect(b, a[:])
	set := newLiveSet(&a)
	t.sets[name] = set
	if set.opaque() && !set.anonymous() {
		return nil // nobody asks for its elements
	}
	return s.elementsOf(s.conn, t.proto, t.name, name, func(list []byte) { set.raw = append(set.raw, list...) })
}
