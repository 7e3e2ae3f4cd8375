package iptables

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/natlens/natlens/pkg/internal/nfnetlink"
	"github.com/natlens/natlens/pkg/netfilter"
)

// This file reads the tables of iptables-nft, in steps:
//
//	Everything  built-in chains ─jumps─▶ every chain, and those that no jump leads to
//	Changes     the same way, but known KUBE-SEP chains of a large table are left out
//	            while the chains that lead to them are as before
//	First       the chains that were asked for, and the new endpoints behind them
//	Glance      of a large table, the chains of which the kernel counts other rules or
//	            does not have the last rule any more, and the new endpoints behind them
//	Counters    built-in chains ─jumps that counted─▶ the chains behind them
//
// Chains are read one by one. The kernel walks a table's rules from the first
// for each 32 KiB of a dump (__nf_tables_dump_rules in
// net/netfilter/nf_tables_api.c), so that the dump of a whole table is quadratic;
// so is that of all chains' names, which is why jumps find them.

// Attributes of tables and chains (enum nft_table_attributes, enum
// nft_chain_attributes).
const (
	nftaTableName  = 1
	nftaTableFlags = 2
	nftaTableUse   = 3

	nftaChainTable    = 1
	nftaChainName     = 3
	nftaChainHook     = 4
	nftaChainPolicy   = 5
	nftaChainUse      = 6
	nftaChainType     = 7
	nftaChainCounters = 8
	nftaChainFlags    = 10
)

const (
	// manyChains is from how many chains on a step leaves out endpoints' chains:
	// fewer are read in some milliseconds.
	manyChains = 1000
	// fewChains is up to how many chains a dump of their names costs a few
	// milliseconds.
	fewChains = 5000
	// manyToRead and manyToAsk are for how many chains a second worker is worth its
	// start.
	manyToRead = 200
	manyToAsk  = 800
)

// loners are chains that no rule leads to and that most nodes have: kubelet and
// kube-proxy make them to notice when somebody flushes the table.
var loners = []string{"KUBE-KUBELET-CANARY", "KUBE-PROXY-CANARY"}

// nftStepper reads the tables of iptables-nft of one namespace, and keeps them for
// the next step. It implements nfnetlink.Stepper.
type nftStepper struct {
	rules  *netfilter.Ruleset // of the last step
	tables []*nftTable
	first  []string // chains of table nat that First reads
	early  bool     // whether Glance is wanted

	// Of the step at hand.
	ctx    context.Context
	step   nfnetlink.Step
	gaveUp bool // what there is to tell is too much for a glance

	workers [2]nftWorker

	mu          sync.Mutex // guards what follows, and the tables, while both workers read
	interrupted bool
	pruned      bool
}

// nftWorker reads chains over a connection of its own. Nearly all the time is the
// kernel's, which answers two of them at the same time.
type nftWorker struct {
	conn    *nfnetlink.Conn
	request []byte          // reused
	draft   netfilter.Chain // reused
}

// nftTable is one table, as of the last step, and while it is read.
type nftTable struct {
	last   *netfilter.Table // complete, and maybe published
	next   *netfilter.Table // revises last, during a step
	proto  uint8
	flags  uint32
	use    uint32         // how many chains, sets and other objects the kernel counts, pending ones too
	reason string         // why it cannot be read
	decode [2]*nftDecoder // of each worker

	marks []chainMark         // by ChainID
	signs []chainSign         // by ChainID
	queue []netfilter.ChainID // to read
	// unsigned are chains that have been read since a step last asked how much they
	// are used.
	unsigned []netfilter.ChainID
	// counted are the chains that the last Counters found behind jumps that had
	// counted. They are read once more: the dumps are not of one moment.
	counted []netfilter.ChainID
	changed bool   // the step has found a chain with other rules
	absent  uint32 // built-in chains that the kernel does not have
}

// chainMark is what a step knows of a chain.
type chainMark uint8

const (
	markReached chainMark = 1 << iota // it exists: a rule leads to it, or the kernel says so
	markQueued
)

// chainSign is by what Glance tells a chain from what it was. A change that it
// does not show, such as one that was under way when the sign was asked for, is left to
// the steps that read the chain.
type chainSign struct {
	last uint64 // handle of its last rule; 0 for none
	used uint32 // how many rules, and jumps to it, the kernel counts; 0 when not known
}

// Forget implements nfnetlink.Stepper.
func (s *nftStepper) Forget() { s.rules, s.tables = nil, nil }

// Step implements nfnetlink.Stepper.
func (s *nftStepper) Step(ctx context.Context, conn *nfnetlink.Conn, step nfnetlink.Step) (rs *netfilter.Ruleset, interrupted, pruned bool, err error) {
	s.ctx, s.step, s.interrupted, s.pruned, s.gaveUp = ctx, step, false, false, false
	s.workers[0].conn, s.workers[1].conn = conn, conn.Second()
	before := s.tables
	if s.skips() {
		return s.rules, false, false, nil
	}
	if s.lists() {
		if s.tables, err = s.list(); err != nil {
			return nil, false, false, err
		}
	}
	for _, t := range s.tables {
		if err := s.read(t); err != nil {
			return nil, false, false, err
		}
		if s.gaveUp {
			s.tables = before
			return s.rules, s.interrupted, false, nil
		}
	}
	next := &netfilter.Ruleset{}
	same := s.rules != nil && slices.Equal(before, s.tables)
	for _, t := range s.tables {
		if t.reason != "" {
			next.Unreadable = append(next.Unreadable, netfilter.Unreadable{Family: t.last.Family, Table: t.last.Name, Backend: netfilter.BackendNFT, Reason: t.reason})
		} else {
			// What a glance sees by the way of counters is no news.
			if t.next.Touched() && (step != nfnetlink.Glance || t.changed) {
				t.last, same = t.next, false
			}
			next.Tables = append(next.Tables, t.last)
		}
	}
	if !same || !slices.Equal(next.Unreadable, s.rules.Unreadable) {
		s.rules = next
	}
	return s.rules, s.interrupted, s.pruned, nil
}

// skips reports whether the step can tell nothing early: all of a worn table is to
// be read, a glance is not worth it where no table is large, and cannot tell whether a
// table has become readable.
func (s *nftStepper) skips() bool {
	switch s.step {
	case nfnetlink.First:
		return slices.ContainsFunc(s.tables, (*nftTable).worn)
	case nfnetlink.Glance:
		return !s.early || !slices.ContainsFunc(s.tables, (*nftTable).large) ||
			slices.ContainsFunc(s.tables, func(t *nftTable) bool { return t.worn() || t.reason != "" })
	}
	return false
}

// lists reports whether the step asks which tables there are.
func (s *nftStepper) lists() bool { return s.step != nfnetlink.First && s.step != nfnetlink.Counters }

// list returns the tables that there are, with what is known of them.
func (s *nftStepper) list() ([]*nftTable, error) {
	var out []*nftTable
	for _, f := range []struct {
		proto  uint8
		family netfilter.Family
	}{{unix.NFPROTO_IPV4, netfilter.IPv4}, {unix.NFPROTO_IPV6, netfilter.IPv6}} {
		err := s.dump(&s.workers[0], unix.NFT_MSG_GETTABLE, f.proto, nil, func(b []byte) error {
			var a [nftaTableUse + 1][]byte
			nfnetlink.Collect(b, a[:])
			name := string(nfnetlink.String(a[nftaTableName]))
			if builtin[name] == nil {
				return nil
			}
			t := s.known(f.family, name)
			if t == nil {
				t = &nftTable{last: netfilter.NewTable(f.family, name, netfilter.BackendNFT), proto: f.proto}
			}
			t.flags, _ = nfnetlink.Uint32(a[nftaTableFlags])
			t.use, _ = nfnetlink.Uint32(a[nftaTableUse])
			out = append(out, t)
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (s *nftStepper) known(f netfilter.Family, name string) *nftTable {
	i := slices.IndexFunc(s.tables, func(t *nftTable) bool { return t.last.Family == f && t.last.Name == name })
	if i < 0 {
		return nil
	}
	return s.tables[i]
}

// dump is Conn.Dump, but an interrupted dump is no error yet.
func (s *nftStepper) dump(w *nftWorker, kind int, proto uint8, attrs []byte, each func([]byte) error) error {
	if err := s.ctx.Err(); err != nil {
		return err
	}
	err := w.conn.Dump(kind, proto, attrs, each)
	if errors.Is(err, nfnetlink.ErrInterrupted) {
		s.mu.Lock()
		s.interrupted = true
		s.mu.Unlock()
		return nil
	}
	return err
}

// read reads what the step wants of one table.
func (s *nftStepper) read(t *nftTable) error {
	t.begin()
	if s.lists() {
		t.judge()
	} else if t.reason != "" {
		return nil
	}
	if s.step == nfnetlink.First {
		return s.readFirst(t)
	}
	if err := s.builtins(t); err != nil || t.reason != "" {
		return err
	}
	if s.step == nfnetlink.Counters {
		for _, id := range t.counted {
			t.enqueue(id)
		}
		t.counted = t.counted[:0]
		return s.work(t)
	}
	if s.step == nfnetlink.Glance {
		return s.glance(t)
	}
	t.counted = t.counted[:0]
	if err := s.work(t); err != nil {
		return err
	}
	if err := s.unreached(t); err != nil || t.reason != "" {
		return err
	}
	if err := s.work(t); err != nil {
		return err
	}
	return s.learn(t)
}

// readFirst reads the chains that were asked for and that exist.
func (s *nftStepper) readFirst(t *nftTable) error {
	s.pruned = true
	for _, name := range s.first {
		c := t.next.Lookup(name)
		if c == nil || t.last.Name != "nat" {
			continue
		}
		_, exists, err := s.ask(t, name)
		if err != nil {
			return err
		}
		if exists {
			t.enqueue(c.ID)
		}
	}
	return s.work(t)
}

// glance reads the chains of a table that look as if they had changed, and all of
// a small one but those that no jump leads to. Where everything was written anew, as
// kube-proxy up to v1.25 does, it gives up.
func (s *nftStepper) glance(t *nftTable) error {
	s.pruned = true
	if t.large() {
		var all []netfilter.ChainID
		for c := range t.next.Chains() {
			if t.glancedAt(c) {
				all = append(all, c.ID)
			}
		}
		if err := s.look(t, all); err != nil {
			return err
		}
		if len(t.queue) > len(all)/4 {
			s.gaveUp = true
			return nil
		}
	}
	return s.work(t)
}

// glancedAt reports whether Glance asks for the sign of a chain: not of those that it
// reads anyway, nor of endpoints.
func (t *nftTable) glancedAt(c *netfilter.Chain) bool {
	return t.large() && c.Base == nil && !isEndpoint(c.Name)
}

// learn asks for the signs of the chains that have been read anew.
func (s *nftStepper) learn(t *nftTable) error {
	// A step whose tables were of no use may have given numbers that are not there.
	t.unsigned = slices.DeleteFunc(t.unsigned, func(id netfilter.ChainID) bool { return int(id) >= t.next.NameCount() })
	err := s.look(t, t.unsigned)
	t.unsigned = t.unsigned[:0]
	return err
}

// look asks for the signs of chains. In a glance, those that differ are queued.
func (s *nftStepper) look(t *nftTable, ids []netfilter.ChainID) error {
	pieces := slices.Collect(slices.Chunk(ids, lookAtOnce))
	return s.share(len(pieces), manyToAsk/lookAtOnce, func(worker, i int) error { return s.lookAt(t, worker, pieces[i]) })
}

// lookAtOnce is how many chains are asked for with one message: there are two
// questions about each.
const lookAtOnce = nfnetlink.MostAtOnce / 2

// lookAt is look for a few chains.
func (s *nftStepper) lookAt(t *nftTable, worker int, ids []netfilter.ChainID) error {
	if err := s.ctx.Err(); err != nil {
		return err
	}
	w := &s.workers[worker]
	type question struct {
		chain  int // in ids
		ofRule bool
	}
	var asked []question
	s.mu.Lock()
	for i, id := range ids {
		w.request = nfnetlink.AppendString(w.request[:0], nftaChainTable, t.last.Name)
		w.request = nfnetlink.AppendString(w.request, nftaChainName, t.next.ChainName(id))
		w.conn.Ask(unix.NFT_MSG_GETCHAIN, t.proto, w.request)
		asked = append(asked, question{i, false})
		if last := t.sign(id).last; s.step == nfnetlink.Glance && last != 0 {
			w.request = nfnetlink.AppendString(w.request[:0], nftaRuleTable, t.last.Name)
			w.request = nfnetlink.AppendString(w.request, nftaRuleChain, t.next.ChainName(id))
			w.request = nfnetlink.Append(w.request, nftaRuleHandle, binary.BigEndian.AppendUint64(nil, last))
			w.conn.Ask(unix.NFT_MSG_GETRULE, t.proto, w.request)
			asked = append(asked, question{i, true})
		}
	}
	s.mu.Unlock()
	var used [lookAtOnce]uint32 // 0 for a chain that is gone
	var lost [lookAtOnce]bool   // its last rule is gone, or cannot be told
	err := w.conn.Answers(func(i int, b []byte, err error) error {
		q := asked[i]
		switch {
		case q.ofRule: // one that is too long for an answer by itself is an error, too
			lost[q.chain] = err != nil
		case err != nil && !errors.Is(err, syscall.ENOENT):
			return err
		default:
			var a chainAttrs
			nfnetlink.Collect(b, a[:])
			used[q.chain], _ = nfnetlink.Uint32(a[nftaChainUse])
		}
		return nil
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, id := range ids {
		sign := t.sign(id)
		if s.step == nfnetlink.Glance && used[i] > 0 && (lost[i] || used[i] != sign.used) {
			t.enqueue(id)
		}
		sign.used = used[i]
	}
	return nil
}

// worn reports whether the table is to be read anew.
func (t *nftTable) worn() bool { return t.last.Worn() }

// large reports whether the table has so many chains that steps leave some out.
func (t *nftTable) large() bool { return t.use >= manyChains }

// begin prepares a table for a step.
func (t *nftTable) begin() {
	if t.worn() {
		t.last = netfilter.NewTable(t.last.Family, t.last.Name, t.last.Backend)
		t.marks, t.signs, t.unsigned = nil, nil, nil
	}
	t.next = t.last.Revise()
	for i := range t.decode {
		if t.decode[i] == nil {
			t.decode[i] = newNFTDecoder(t.next)
		}
		t.decode[i].table = t.next
	}
	clear(t.marks)
	t.queue, t.changed, t.absent = nil, false, 0
}

// judge says why a table cannot be read, as far as the table itself tells.
func (t *nftTable) judge() {
	const dormant = 1 // NFT_TABLE_F_DORMANT
	t.reason = ""
	if t.flags&dormant != 0 {
		t.reason = fmt.Sprintf("the nf_tables table %q of %v is dormant: its rules are switched off, which iptables cannot do: another program did it, see nft list table", t.last.Name, t.last.Family)
	}
}

func (t *nftTable) mark(id netfilter.ChainID) *chainMark {
	if n := t.next.NameCount(); n > len(t.marks) {
		t.marks = append(t.marks, make([]chainMark, n-len(t.marks)+n/8)...)
	}
	return &t.marks[id]
}

func (t *nftTable) sign(id netfilter.ChainID) *chainSign {
	if n := t.next.NameCount(); n > len(t.signs) {
		t.signs = append(t.signs, make([]chainSign, n-len(t.signs)+n/8)...)
	}
	return &t.signs[id]
}

// enqueue has a chain read, once.
func (t *nftTable) enqueue(id netfilter.ChainID) {
	if m := t.mark(id); *m&markQueued == 0 {
		*m |= markQueued | markReached
		t.queue = append(t.queue, id)
	}
}

// builtins reads the chains that hang on hooks. iptables-nft makes one when the
// first rule needs it, and prints all of them always.
func (s *nftStepper) builtins(t *nftTable) error {
	for h := netfilter.Prerouting; h <= netfilter.Postrouting; h++ {
		base, isBuiltin := builtin[t.last.Name][h.String()]
		if !isBuiltin {
			continue
		}
		base.Policy = netfilter.Accept
		a, exists, err := s.ask(t, h.String())
		if err != nil {
			return err
		}
		if !exists {
			t.absent++
		} else if base = t.base(h.String(), &a); t.reason != "" {
			return nil
		}
		id := t.next.ID(h.String())
		*t.mark(id) |= markReached | markQueued
		if err := s.chain(t, 0, id, &base, exists); err != nil {
			return err
		}
	}
	return nil
}

// chainAttrs are the attributes of a chain.
type chainAttrs [nftaChainFlags + 1][]byte

// ask asks for one chain, without its rules.
func (s *nftStepper) ask(t *nftTable, name string) (a chainAttrs, exists bool, err error) {
	if err := s.ctx.Err(); err != nil {
		return a, false, err
	}
	w := &s.workers[0]
	w.request = nfnetlink.AppendString(w.request[:0], nftaChainTable, t.last.Name)
	w.request = nfnetlink.AppendString(w.request, nftaChainName, name)
	b, err := w.conn.Get(unix.NFT_MSG_GETCHAIN, t.proto, w.request)
	if errors.Is(err, syscall.ENOENT) {
		return a, false, nil
	}
	nfnetlink.Collect(b, a[:])
	return a, err == nil, err
}

// base returns what ties a chain to its hook, if that is what iptables ties it
// to; otherwise the table has a reason not to be read.
func (t *nftTable) base(name string, a *chainAttrs) netfilter.Base {
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
	want, isBuiltin := builtin[t.last.Name][name]
	base := netfilter.Base{Hook: want.Hook, Priority: int(int32(p)), Type: kind, Policy: netfilter.Accept}
	const securityPriority = 150 // what iptables-nft uses; the kernel's own is 50
	fits := base.Priority == want.Priority || t.last.Name == "security" && base.Priority == securityPriority
	if !isBuiltin || !ok1 || !ok2 || !ok3 || hook != uint32(want.Hook) || kind != want.Type || !fits || policy > nfAccept {
		at := fmt.Sprintf("hook %d", hook)
		if hook <= uint32(netfilter.Postrouting) {
			at = "hook " + netfilter.Hook(hook).String()
		}
		t.reason = fmt.Sprintf("the nf_tables table %q of %v is not in the layout of iptables-nft: its chain %q is at %s with priority %d, where iptables has none of that name: another program made it, read it with nft",
			t.last.Name, t.last.Family, name, at, base.Priority)
		return base
	}
	if policy == nfDrop {
		base.Policy = netfilter.Drop
	}
	const size, packets = 1, 2
	var n [packets + 1][]byte
	nfnetlink.Collect(a[nftaChainCounters], n[:])
	base.Counter.Bytes, _ = nfnetlink.Uint64(n[size])
	base.Counter.Packets, _ = nfnetlink.Uint64(n[packets])
	return base
}

// work reads the chains that are queued, and those that they lead to.
func (s *nftStepper) work(t *nftTable) error {
	for len(t.queue) > 0 {
		batch := t.queue
		t.queue = nil
		if err := s.share(len(batch), manyToRead, func(w, i int) error { return s.chain(t, w, batch[i], nil, true) }); err != nil {
			return err
		}
	}
	return nil
}

// share does something n times; from many on, two workers share it.
func (s *nftStepper) share(n, many int, do func(worker, i int) error) error {
	if n < many || runtime.GOMAXPROCS(0) == 1 {
		for i := range n {
			if err := do(0, i); err != nil {
				return err
			}
		}
		return nil
	}
	var next atomic.Int64
	var errs [len(s.workers)]error
	var both sync.WaitGroup
	for w := range s.workers {
		both.Go(func() {
			for i := int(next.Add(1)) - 1; i < n && errs[w] == nil; i = int(next.Add(1)) - 1 {
				errs[w] = do(w, i)
			}
		})
	}
	both.Wait()
	return errors.Join(errs[:]...)
}

// chain reads the rules of a chain, puts them into the table, and queues the
// chains that they lead to.
func (s *nftStepper) chain(t *nftTable, worker int, id netfilter.ChainID, base *netfilter.Base, exists bool) error {
	w := &s.workers[worker]
	s.mu.Lock()
	t.next.Draft(&w.draft, t.next.ChainName(id))
	s.mu.Unlock()
	w.draft.Base = base
	handle := uint64(0) // of the last rule
	if exists {
		w.request = nfnetlink.AppendString(w.request[:0], nftaRuleTable, t.last.Name)
		w.request = nfnetlink.AppendString(w.request, nftaRuleChain, w.draft.Name)
		err := s.dump(w, unix.NFT_MSG_GETRULE, t.proto, w.request, func(b []byte) error {
			var a [nftaRuleUserData + 1][]byte
			nfnetlink.Collect(b, a[:]) // newer kernels may say more
			if string(nfnetlink.String(a[nftaRuleTable])) != t.last.Name || string(nfnetlink.String(a[nftaRuleChain])) != w.draft.Name {
				return nil // a kernel that does not filter
			}
			handle, _ = nfnetlink.Uint64(a[nftaRuleHandle])
			s.mu.Lock() // a rule may name a chain for the first time
			t.decode[worker].rule(&w.draft, a[nftaRuleExpressions], a[nftaRuleUserData])
			s.mu.Unlock()
			return nil
		})
		if err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	before := t.next.ByID(id)
	changed := t.next.Adopt(&w.draft)
	t.changed = t.changed || changed
	if changed && s.step == nfnetlink.Counters {
		s.interrupted = true
	}
	if s.early && t.glancedAt(&w.draft) {
		sign := t.sign(id)
		sign.last = handle
		if changed {
			sign.used = 0
			t.unsigned = append(t.unsigned, id)
		}
	}
	s.follow(t, &w.draft, before, changed)
	return nil
}

// follow goes on to the chains that a chain leads to, as far as the step wants
// them.
func (s *nftStepper) follow(t *nftTable, c, before *netfilter.Chain, changed bool) {
	for i := range c.Len() {
		rule := c.Rule(i)
		if len(rule) == 0 {
			continue
		}
		e := rule[len(rule)-1]
		if e.Kind != netfilter.Jump && e.Kind != netfilter.Goto {
			continue
		}
		target := netfilter.ChainID(e.A)
		// A rule counts before the rules behind its jump do.
		counted := before == nil || i >= before.Len() || !sameCount(c, before, i)
		switch {
		case s.step == nfnetlink.Counters:
			if counted {
				t.counted = append(t.counted, target)
				t.enqueue(target)
			}
		case s.step == nfnetlink.First, s.step == nfnetlink.Glance && t.large():
			if changed && (t.next.ByID(target) == nil || isEndpoint(t.next.ChainName(target))) {
				t.enqueue(target)
			}
		case !changed && s.pinned(t, target):
			s.pruned = true
			*t.mark(target) |= markReached
			if counted {
				t.counted = append(t.counted, target)
			}
		default:
			t.enqueue(target)
		}
	}
}

func sameCount(a, b *netfilter.Chain, i int) bool {
	m, _ := a.Counter(i)
	n, _ := b.Counter(i)
	return m == n
}

// isEndpoint reports whether a chain is one that kube-proxy makes of an endpoint.
func isEndpoint(name string) bool { return strings.HasPrefix(name, "KUBE-SEP-") }

// pinned reports whether a chain is taken to be as before: that of an endpoint,
// whose name kube-proxy makes of where it sends to.
func (s *nftStepper) pinned(t *nftTable, id netfilter.ChainID) bool {
	if s.step != nfnetlink.Changes || !t.large() {
		return false
	}
	c := t.next.ByID(id)
	if c == nil || c.Len() == 0 || !isEndpoint(c.Name) {
		return false
	}
	// A reading that was interrupted may have left it without its end.
	last := c.Rule(c.Len() - 1)
	return len(last) > 0 && last[len(last)-1].Kind == netfilter.DNAT
}

// unreached deals with the chains that no jump leads to: those known before may
// be gone, and others may be new.
func (s *nftStepper) unreached(t *nftTable) error {
	var gone []netfilter.ChainID
	chains := -t.absent
	for id := range netfilter.ChainID(t.next.NameCount()) {
		c := t.next.ByID(id)
		if c == nil {
			continue // a name of the past
		}
		chains++
		if *t.mark(id)&markReached != 0 {
			continue
		}
		_, exists, err := s.ask(t, c.Name)
		switch {
		case err != nil:
			return err
		case !exists:
			gone = append(gone, id)
			chains--
		case !s.pinned(t, id):
			t.enqueue(id)
		}
	}
	t.next.Remove(gone...)
	for _, name := range loners {
		if t.next.Lookup(name) != nil {
			continue
		}
		_, exists, err := s.ask(t, name)
		if err != nil {
			return err
		}
		if exists {
			t.enqueue(t.next.ID(name))
			chains++
		}
	}
	// A transaction under way is in what the kernel counts already, so that the
	// counts may agree though chains were missed. Those are of no use to a packet.
	missed := chains != t.use
	all := s.use(t.proto) // a dump of chains is one of all tables of the family
	if s.step == nfnetlink.Changes && all > fewChains {
		s.pruned = s.pruned || missed
		return nil
	}
	if missed || all < 4*fewChains {
		return s.names(t)
	}
	return nil
}

// use returns how many chains the tables of a family have, at least.
func (s *nftStepper) use(proto uint8) uint32 {
	sum := uint32(0)
	for _, t := range s.tables {
		if t.proto == proto {
			sum += t.use
		}
	}
	return sum
}

// names asks for the names of all chains, and queues those that were not found.
func (s *nftStepper) names(t *nftTable) error {
	return s.dump(&s.workers[0], unix.NFT_MSG_GETCHAIN, t.proto, nil, func(b []byte) error {
		var a chainAttrs
		nfnetlink.Collect(b, a[:])
		name := nfnetlink.String(a[nftaChainName])
		if string(nfnetlink.String(a[nftaChainTable])) != t.last.Name || len(name) == 0 {
			return nil
		}
		if id := t.next.IDOf(name); *t.mark(id)&markReached == 0 {
			t.enqueue(id)
			if a[nftaChainHook] != nil && t.reason == "" {
				t.base(string(name), &a)
			}
		}
		return nil
	})
}
