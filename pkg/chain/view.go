package chain

import (
	"cmp"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/natlens/natlens/pkg/netfilter"
)

// View answers questions about one ruleset on one node. It does not change,
// and may be used by several goroutines once made.
type View struct {
	rules  *netfilter.Ruleset
	node   Node
	family [2]*familyView // IPv4, IPv6; nil where the ruleset has no table

	given Node            // the node before it was completed
	pods  map[podHint]int // how many rules tell where pods are
}

// familyView is what is worked out once per family.
type familyView struct {
	family  netfilter.Family
	hooks   [netfilter.Postrouting + 1][]netfilter.BaseChain
	tables  map[*netfilter.Table]*tableView
	sources map[Class]netip.Addr // an address that stands for the class
	named   *sourceRanges
	// masquerade and drop are the mark bits that KUBE-MARK-MASQ and
	// KUBE-MARK-DROP (kubelet up to v1.26) set; both can be configured.
	masquerade, drop uint32
}

// tableView is what is worked out once per table.
type tableView struct {
	number  uint32   // of the table in the ruleset
	indexes []*index // by ChainID; nil for short chains
	leaves  []leaf   // by ChainID
}

// add works out what there is about a chain.
func (t *tableView) add(c *netfilter.Chain) {
	t.indexes[c.ID], t.leaves[c.ID] = newIndex(c), leafOf(c)
	t.leaves[c.ID].sep = strings.HasPrefix(c.Name, "KUBE-SEP-")
}

// NewView prepares a ruleset for questions. Missing parts of the node are
// filled in from the rules: pod ranges from kube-proxy's masquerade rules, an
// unnamed address for the node's own.
func NewView(rs *netfilter.Ruleset, node Node) *View {
	tables := make([]tableView, len(rs.Tables))
	var chains sync.WaitGroup
	chains.Go(func() {
		for n, t := range rs.Tables {
			tables[n] = tableView{uint32(n), make([]*index, t.NameCount()), make([]leaf, t.NameCount())}
			for c := range t.Chains() {
				tables[n].add(c)
			}
		}
	})
	pods := map[podHint]int{}
	for _, t := range rs.Tables {
		for c := range t.Chains() {
			countPods(pods, t, c, 1)
		}
	}
	v := newView(rs, node, pods)
	for i, f := range []netfilter.Family{netfilter.IPv4, netfilter.IPv6} {
		if !slices.ContainsFunc(rs.Tables, func(t *netfilter.Table) bool { return t.Family == f }) {
			continue
		}
		fv := &familyView{family: f, tables: map[*netfilter.Table]*tableView{}, named: v.namedSources(f)}
		for n, t := range rs.Tables {
			if t.Family == f {
				fv.tables[t] = &tables[n]
			}
		}
		v.family[i] = fv
		v.complete(fv)
	}
	chains.Wait()
	return v
}

// Next is NewView for the ruleset that was read after that of v. It looks again
// only at the chains that have changed.
func (v *View) Next(rs *netfilter.Ruleset, node Node) *View {
	differ, ok := differing(rs, v.rules)
	if !ok || len(node.Local) == 0 || !reflect.DeepEqual(node, v.given) {
		return NewView(rs, node)
	}
	pods := maps.Clone(v.pods)
	for n, ids := range differ {
		for _, id := range ids {
			countPods(pods, v.rules.Tables[n], byID(v.rules.Tables[n], id), -1)
			countPods(pods, rs.Tables[n], byID(rs.Tables[n], id), 1)
		}
	}
	next := newView(rs, node, pods)
	if !slices.Equal(next.node.PodCIDRs, v.node.PodCIDRs) || len(next.node.PodCIDRs) == 0 {
		return NewView(rs, node) // the candidates are others, or those of endpoints
	}
	for i, last := range v.family {
		if last == nil {
			continue
		}
		fv := &familyView{family: last.family, tables: map[*netfilter.Table]*tableView{}, named: last.named.clone()}
		for n, t := range rs.Tables {
			if t.Family != fv.family {
				continue
			}
			was := last.tables[v.rules.Tables[n]]
			tv := &tableView{uint32(n), was.indexes, was.leaves}
			if len(differ[n]) > 0 {
				more := t.NameCount() - len(was.indexes)
				tv.indexes = append(slices.Clone(was.indexes), make([]*index, more)...)
				tv.leaves = append(slices.Clone(was.leaves), make([]leaf, more)...)
			}
			for _, id := range differ[n] {
				tv.indexes[id], tv.leaves[id] = nil, leaf{}
				if c := t.ByID(id); c != nil {
					tv.add(c)
					fv.named.count(c, 1)
				}
				if c := byID(v.rules.Tables[n], id); c != nil {
					fv.named.count(c, -1)
				}
			}
			fv.tables[t] = tv
		}
		next.family[i] = fv
		next.complete(fv)
	}
	return next
}

// newView completes the node, as far as no packets are needed.
func newView(rs *netfilter.Ruleset, node Node, pods map[podHint]int) *View {
	v := &View{rules: rs, node: node, given: node, pods: pods}
	v.node.Local = slices.Clone(node.Local)
	if len(node.Local) == 0 {
		v.node.Local = detectLocal(rs)
	}
	if len(node.PodCIDRs) == 0 && len(node.PodInterfaces) == 0 {
		v.node.PodCIDRs, v.node.PodInterfaces = detectPods(pods)
	}
	return v
}

// complete works out what does not depend on single chains.
func (v *View) complete(fv *familyView) {
	fv.hooks = v.rules.BaseChains(fv.family)
	fv.masquerade, fv.drop = fv.marks("KUBE-MARK-MASQ"), fv.marks("KUBE-MARK-DROP")
	v.choosePackets(fv)
}

func (v *View) of(f netfilter.Family) *familyView {
	if f == netfilter.IPv6 {
		return v.family[1]
	}
	return v.family[0]
}

// marks returns the mark bits that a chain of table nat sets.
func (fv *familyView) marks(chain string) uint32 {
	var mark uint32
	for t := range fv.tables {
		if isNFTables(t) && chain == "KUBE-MARK-MASQ" {
			mark |= nftMasquerade(t)
		}
		c := t.Lookup(chain)
		if t.Name != "nat" || c == nil {
			continue
		}
		for i := range c.Len() {
			for _, e := range c.Rule(i) {
				if e.Kind == netfilter.SetMark {
					mark |= e.A
				}
			}
		}
	}
	return mark
}

// Node returns the node as completed from the rules.
func (v *View) Node() Node { return v.node }

// Packet returns the first packet of a connection to a destination, from a
// source that stands for the class. ok is false when the ruleset has no table
// of the destination's family.
func (v *View) Packet(from Class, to netip.AddrPort, p netfilter.Protocol) (packet netfilter.Packet, ok bool) {
	fv := v.of(netfilter.FamilyOf(to.Addr()))
	if fv == nil {
		return packet, false
	}
	packet = netfilter.Packet{Source: fv.sources[from], Destination: to.Addr(), Port: to.Port(), Protocol: p}
	switch from {
	case Host:
		packet.FromHost = true
		if v.node.isLocal(to.Addr()) { // the kernel picks the destination itself as the source
			packet.Source = to.Addr()
		}
	case Pod:
		if len(v.node.PodInterfaces) > 0 {
			packet.In = v.node.PodInterfaces[0]
		}
	}
	return packet, true
}

// PacketFrom returns the first packet of a connection from an address, and the
// class of that source. What is the node's own comes from a process on it.
func (v *View) PacketFrom(source netip.Addr, to netip.AddrPort, p netfilter.Protocol) (netfilter.Packet, Class) {
	class := v.node.classOf(source)
	packet := netfilter.Packet{Source: source, Destination: to.Addr(), Port: to.Port(), Protocol: p, FromHost: class == Host}
	if class == Pod && len(v.node.PodInterfaces) > 0 {
		packet.In = v.node.PodInterfaces[0]
	}
	return packet, class
}

// podHint is a range or an interface that kube-proxy's rules take for the pods'.
type podHint struct {
	cidr netip.Prefix
	link string
}

// countPods adds what a chain tells about where pods are, as often as by says.
// Pods are those that are not masqueraded on their way to a ClusterIP, and those
// whose way to an external address is that to a ClusterIP: the local traffic
// detector of kube-proxy (pkg/proxy/util/localdetector.go). The chains of endpoints,
// which are most, have nothing of the kind.
func countPods(pods map[podHint]int, t *netfilter.Table, c *netfilter.Chain, by int) {
	if c == nil || t.Name != "nat" && !isNFTables(t) || isEndpointChain(c.Name) {
		return
	}
	add := func(h podHint) {
		if pods[h] += by; pods[h] == 0 {
			delete(pods, h)
		}
	}
	for i := range c.Len() {
		rule := c.Rule(i)
		bypass := bypassesPolicy(t, c, rule)
		if !bypass && !marksForMasquerade(t, rule) {
			continue
		}
		for _, e := range rule {
			if e.Negated() == bypass {
				continue
			}
			switch e.Kind {
			case netfilter.Source:
				if p, ok := c.CIDR(e); ok && p.Bits() > 0 && !p.IsSingleIP() {
					add(podHint{cidr: p})
				}
			case netfilter.InInterface:
				add(podHint{link: string(c.Text(e))})
			}
		}
	}
}

// detectPods returns where pods are, sorted.
func detectPods(pods map[podHint]int) (cidrs []netip.Prefix, interfaces []string) {
	for h := range pods {
		if h.link != "" {
			interfaces = append(interfaces, h.link)
		} else {
			cidrs = append(cidrs, h.cidr)
		}
	}
	slices.Sort(interfaces)
	slices.SortFunc(cidrs, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	return cidrs, interfaces
}

// marksForMasquerade reports whether a rule does nothing but mark packets so
// that kube-proxy masquerades them.
func marksForMasquerade(t *netfilter.Table, rule []netfilter.Expr) bool {
	if len(rule) == 0 {
		return false
	}
	switch e := rule[len(rule)-1]; e.Kind {
	case netfilter.Jump:
		name := t.ChainName(netfilter.ChainID(e.A))
		return name == "KUBE-MARK-MASQ" || isNFTables(t) && name == "mark-for-masquerade"
	case netfilter.SetMark: // nftables mode from v1.36 on
		return isNFTables(t)
	}
	return false
}

// bypassesPolicy reports whether a rule of an external address's chain sends
// pods on as if they had asked for the ClusterIP (externalTrafficPolicy Local).
func bypassesPolicy(t *netfilter.Table, c *netfilter.Chain, rule []netfilter.Expr) bool {
	external := strings.HasPrefix(c.Name, "KUBE-EXT-") || strings.HasPrefix(c.Name, "KUBE-XLB-") || isNFTables(t) && strings.HasPrefix(c.Name, "external-")
	if !external || len(rule) == 0 {
		return false
	}
	e := rule[len(rule)-1]
	if e.Kind != netfilter.Jump && e.Kind != netfilter.Goto {
		return false
	}
	target := t.ChainName(netfilter.ChainID(e.A))
	return strings.HasPrefix(target, "KUBE-SVC-") || isNFTables(t) && strings.HasPrefix(target, "service-")
}

// detectLocal returns the addresses that kube-proxy takes NodePorts on, where
// its rules name them one by one (--nodeport-addresses): they are the node's.
func detectLocal(rs *netfilter.Ruleset) []netip.Addr {
	var out []netip.Addr
	for _, t := range rs.Tables {
		if isNFTables(t) {
			for _, s := range t.Sets() {
				if s.Name == "nodeport-ips" {
					for _, k := range s.Keys {
						out = append(out, k.Addr)
					}
				}
			}
		}
		c := t.Lookup("KUBE-SERVICES")
		if t.Name != "nat" || c == nil {
			continue
		}
		for i := range c.Len() {
			a := ask(RuleRef{t, c, i})
			if a.port == 0 && a.addr.IsValid() && a.target.Kind == netfilter.Jump && t.ChainName(netfilter.ChainID(a.target.A)) == "KUBE-NODEPORTS" {
				out = append(out, a.addr)
			}
		}
	}
	return out
}

// choosePackets picks a source address for each class that no rule names, so
// that it fares as most of its class do.
func (v *View) choosePackets(fv *familyView) {
	external, own, pod := v.sourceCandidates(fv.family)
	fv.sources = map[Class]netip.Addr{External: fv.named.firstUnnamed(external), Pod: fv.named.firstUnnamed(pod)}
	fv.sources[Host] = v.node.address(fv.family)
	if fv.sources[Host].IsLoopback() {
		fv.sources[Host] = fv.named.firstUnnamed(own)
		v.node.Local = append(v.node.Local, fv.sources[Host])
	}
}

func (v *View) sourceCandidates(f netfilter.Family) (external, own, pod []candidate) {
	return externalCandidates(f), nodeCandidates(f), v.podCandidates(f)
}

// candidate is an address, within a range that may be named as a whole.
type candidate struct {
	addr   netip.Addr
	within netip.Prefix
}

// sourceRanges counts what rules ask of a source: of single addresses, those
// that are candidates.
type sourceRanges struct {
	single map[netip.Addr]int
	wide   map[netip.Prefix]int
}

func (s *sourceRanges) clone() *sourceRanges {
	return &sourceRanges{maps.Clone(s.single), maps.Clone(s.wide)}
}

func (v *View) namedSources(f netfilter.Family) *sourceRanges {
	out := &sourceRanges{single: map[netip.Addr]int{}, wide: map[netip.Prefix]int{}}
	external, own, pod := v.sourceCandidates(f)
	for _, list := range [][]candidate{external, own, pod} {
		for _, c := range list {
			out.single[c.addr] = 0
		}
	}
	for _, t := range v.rules.Tables {
		if t.Family != f {
			continue
		}
		for c := range t.Chains() {
			out.count(c, 1)
		}
	}
	return out
}

// count adds what a chain asks of sources, as often as by says.
func (s *sourceRanges) count(c *netfilter.Chain, by int) {
	for i := range c.Len() {
		for _, e := range c.Rule(i) {
			if e.Kind != netfilter.Source {
				continue
			}
			p, ok := c.CIDR(e)
			switch {
			case !ok || p.Bits() == 0:
			case !p.IsSingleIP():
				if s.wide[p.Masked()] += by; s.wide[p.Masked()] == 0 {
					delete(s.wide, p.Masked())
				}
			default:
				if n, isCandidate := s.single[p.Addr()]; isCandidate {
					s.single[p.Addr()] = n + by
				}
			}
		}
	}
}

// firstUnnamed returns the first candidate that no rule singles out; if all
// are, the first.
func (s *sourceRanges) firstUnnamed(list []candidate) netip.Addr {
	for _, c := range list {
		if s.single[c.addr] == 0 && !s.singlesOut(c) {
			return c.addr
		}
	}
	return list[0].addr
}

func (s *sourceRanges) singlesOut(c candidate) bool {
	for p := range s.wide {
		if p.Contains(c.addr) && !(c.within.IsValid() && p.Bits() <= c.within.Bits()) {
			return true
		}
	}
	return false
}

// externalCandidates are addresses of documentation and benchmark ranges, then
// of the wide public space.
func externalCandidates(f netfilter.Family) []candidate {
	list := []string{"203.0.113.77", "198.51.100.77", "192.0.2.77", "198.18.0.77", "198.19.77.77", "192.88.99.77", "100.127.77.77", "223.255.255.77", "9.255.77.77", "52.77.77.77", "151.77.77.77"}
	if f == netfilter.IPv6 {
		list = []string{"2001:db8:ffff::77", "2001:2::77", "3fff:ffff::77", "2600:ffff::77", "2a00:ffff::77"}
	}
	return candidates(list)
}

func nodeCandidates(f netfilter.Family) []candidate {
	list := []string{"192.0.2.1", "192.0.2.254", "198.18.255.1", "203.0.113.254", "198.51.100.254"}
	if f == netfilter.IPv6 {
		list = []string{"2001:db8:fffe::1", "2001:2:fffe::1", "3fff:fffe::1"}
	}
	return candidates(list)
}

func candidates(list []string) []candidate {
	out := make([]candidate, len(list))
	for i, s := range list {
		out[i].addr = netip.MustParseAddr(s)
	}
	return out
}

// podCandidates are addresses of the pod ranges; without a range, neighbours
// of endpoints.
func (v *View) podCandidates(f netfilter.Family) []candidate {
	var out []candidate
	for _, p := range v.node.PodCIDRs {
		if netfilter.FamilyOf(p.Addr()) != f {
			continue
		}
		// The range may be that of all nodes; this node's bridge knows its part.
		for _, n := range v.node.Networks {
			if p.Overlaps(n) && n.Bits() > p.Bits() && !n.IsSingleIP() {
				out = append(out, neighbours(n)...)
			}
		}
		out = append(out, neighbours(p)...)
	}
	if len(out) > 0 {
		return out
	}
	for _, t := range v.rules.Tables {
		if t.Family != f {
			continue
		}
		for c := range t.Chains() {
			for i := range c.Len() {
				rule := c.Rule(i)
				if len(rule) == 0 || rule[len(rule)-1].Kind != netfilter.DNAT {
					continue
				}
				if a := c.Target(rule[len(rule)-1]).Addr(); a.IsValid() && !v.node.isLocal(a) {
					bits := 24
					if f == netfilter.IPv6 {
						bits = 64
					}
					p, _ := a.Prefix(bits)
					return neighbours(p)
				}
			}
		}
	}
	if f == netfilter.IPv6 {
		return candidates([]string{"fd00:ffff::77"})
	}
	return candidates([]string{"10.255.255.77"})
}

// neighbours returns up to 600 addresses from the upper end of a range, where
// pods come last, and from its lower end.
func neighbours(p netip.Prefix) []candidate {
	const most = 300
	var out []candidate
	p = p.Masked()
	last := netfilter.SpanOf(p).To
	for a, i := last.Prev(), 0; i < most && a.IsValid() && p.Contains(a); a, i = a.Prev(), i+1 {
		out = append(out, candidate{a, p})
	}
	for a, i := p.Addr().Next(), 0; i < most && a.IsValid() && p.Contains(a); a, i = a.Next(), i+1 {
		out = append(out, candidate{a, p})
	}
	if len(out) == 0 {
		out = []candidate{{p.Addr(), p}}
	}
	return out
}

// world is the result of one walk under one set of assumptions.
type world struct {
	assume map[RuleRef]bool
	ends   []end
}

// explore walks the packet of a run under every assumption about what cannot
// be decided. The ends in a single world belong to the run.
func (v *View) explore(r *run) []world {
	r.view = v
	r.family = v.of(netfilter.FamilyOf(r.packet.Destination))
	r.outcomes()
	if r.undecided == nil {
		r.one[0] = world{ends: r.ends}
		return r.one[:]
	}
	var worlds []world
	first := *r.undecided
	v.assume(r, map[RuleRef]bool{first: false}, &worlds)
	v.assume(r, map[RuleRef]bool{first: true}, &worlds)
	return worlds
}

// assume walks once more under the assumptions, and, where another rule cannot
// be decided, under both answers to that too.
func (v *View) assume(r *run, assume map[RuleRef]bool, worlds *[]world) {
	r.assume, r.undecided, r.ends = assume, nil, nil
	r.outcomes()
	if r.undecided == nil {
		*worlds = append(*worlds, world{assume, r.ends})
		return
	}
	open := *r.undecided
	for _, taken := range []bool{false, true} {
		more := maps.Clone(assume)
		more[open] = taken
		v.assume(r, more, worlds)
	}
}
