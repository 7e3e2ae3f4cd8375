package chain

import (
	"slices"
	"strings"
	"sync/atomic"

	"github.com/natlens/natlens/pkg/netfilter"
)

// own says what kube-proxy and kubelet write into a kind of chain: the prefixes
// of the chains that its rules jump to, and the other targets it uses. It
// covers v1.20 to v1.37 in iptables mode.
type own struct {
	jumps   []string
	targets []netfilter.Kind
	balance bool // its jumps to endpoints' chains choose an endpoint
}

// kubeChains is the catalogue, by table and by name or name prefix.
var kubeChains = map[string]map[string]own{
	"nat": {
		"KUBE-SERVICES":  {jumps: []string{"KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-", "KUBE-MARK-MASQ", "KUBE-NODEPORTS"}},
		"KUBE-NODEPORTS": {jumps: []string{"KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-XLB-", "KUBE-MARK-MASQ"}},
		"KUBE-SVC-":      {jumps: []string{"KUBE-SEP-", "KUBE-MARK-MASQ"}, balance: true},
		"KUBE-SVL-":      {jumps: []string{"KUBE-SEP-", "KUBE-MARK-MASQ", "KUBE-MARK-DROP"}, balance: true},
		"KUBE-XLB-":      {jumps: []string{"KUBE-SVC-", "KUBE-SEP-", "KUBE-MARK-MASQ", "KUBE-MARK-DROP"}, balance: true},
		"KUBE-EXT-":      {jumps: []string{"KUBE-SVC-", "KUBE-SVL-", "KUBE-MARK-MASQ"}},
		"KUBE-FW-":       {jumps: []string{"KUBE-EXT-", "KUBE-SVC-", "KUBE-XLB-", "KUBE-MARK-MASQ", "KUBE-MARK-DROP"}},
		"KUBE-SEP-":      {jumps: []string{"KUBE-MARK-MASQ"}, targets: []netfilter.Kind{netfilter.DNAT}},
	},
	"filter": {
		"KUBE-SERVICES":          {targets: []netfilter.Kind{netfilter.Reject, netfilter.Drop}},
		"KUBE-EXTERNAL-SERVICES": {targets: []netfilter.Kind{netfilter.Reject, netfilter.Drop}},
		"KUBE-PROXY-FIREWALL":    {targets: []netfilter.Kind{netfilter.Drop}},
	},
	// nftables mode, v1.29 to v1.37.
	"kube-proxy": {
		"services":  {targets: []netfilter.Kind{netfilter.VerdictMap, netfilter.SetMark}},
		"service-":  {jumps: []string{"endpoint-", "mark-for-masquerade"}, targets: []netfilter.Kind{netfilter.Choose, netfilter.DNAT}, balance: true},
		"local-":    {jumps: []string{"endpoint-", "mark-for-masquerade"}, targets: []netfilter.Kind{netfilter.Choose, netfilter.DNAT}, balance: true},
		"external-": {jumps: []string{"service-", "local-", "mark-for-masquerade"}, targets: []netfilter.Kind{netfilter.SetMark}},
		"endpoint-": {jumps: []string{"mark-for-masquerade"}, targets: []netfilter.Kind{netfilter.DNAT, netfilter.NoEffect}},
		"firewall-": {targets: []netfilter.Kind{netfilter.Drop}},
	},
}

// kind returns the catalogue's entry for a chain.
func kind(table, chain string) (own, bool) {
	if o, ok := kubeChains[table][chain]; ok {
		return o, true
	}
	prefix, rest, _ := strings.Cut(chain, "-")
	if table == "kube-proxy" && !strings.Contains(rest, "/") {
		return own{}, false // not of a Service
	}
	end := len(prefix)
	if prefix == "KUBE" {
		more, _, _ := strings.Cut(rest, "-")
		end += 1 + len(more)
	}
	o, ok := kubeChains[table][chain[:min(end+1, len(chain))]]
	return o, ok
}

// owners tells which Service a chain belongs to.
type owners struct {
	node       *finder // for chains of no Service
	programmed *Programmed
	entries    []*entry
	byHash     map[string]*Service // made when first needed, as most often nothing is found
	endpoints  map[string]*Service // by the name of a KUBE-SEP chain; the same
	leaves     []leaf              // of the table at hand
	asked      int
	probing    bool // only asked is wanted
}

// finder returns what collects findings about a chain. It is asked only when
// there is one.
func (o *owners) finder(c *netfilter.Chain) *finder {
	o.asked++
	if o.probing {
		return &finder{out: &[]Finding{}}
	}
	if o.byHash == nil {
		o.byHash = map[string]*Service{}
		for _, e := range o.entries {
			if e.target != nil {
				if h := chainHash(e.target.Name); h != "" {
					o.byHash[h] = &o.programmed.Services[e.number]
				}
			}
		}
	}
	s := o.byHash[chainHash(c.Name)]
	if s == nil {
		s = o.sender(c.Name)
	}
	if s == nil {
		return &finder{view: o.node.view, out: o.node.out, about: c.Name}
	}
	return &finder{view: o.node.view, out: &s.Findings, service: &s.ServicePort, about: c.Name}
}

// sender returns the Service that sends to an endpoint's chain, or nil.
func (o *owners) sender(chain string) *Service {
	if o.endpoints == nil {
		o.endpoints = map[string]*Service{}
		for i := range o.programmed.Services {
			s := &o.programmed.Services[i]
			for _, f := range s.Frontends {
				for _, r := range f.Routes {
					for _, e := range r.Endpoints {
						o.endpoints[e.Chain] = s
					}
				}
			}
		}
	}
	return o.endpoints[chain]
}

// scanChains looks at every chain of kube-proxy for rules that it does not
// write, and for endpoint rules that nothing can reach. Chains that nothing was
// found about and that are as they were are passed over.
func (v *View) scanChains(owners *owners, last *Programmed, known *changes) {
	for n, t := range v.rules.Tables {
		odd := map[netfilter.ChainID]bool{}
		owners.programmed.memory.odd = append(owners.programmed.memory.odd, odd)
		if t.Lookup("KUBE-NODE-PORT") != nil {
			continue // ipvs mode, which writes other rules into chains of the same names
		}
		owners.leaves = v.of(t.Family).tables[t].leaves
		chains := slices.AppendSeq(make([]*netfilter.Chain, 0, t.ChainCount()), t.Chains())
		for _, c := range suspects(t, chains, owners.leaves, func(c *netfilter.Chain) bool {
			return known == nil || known.concernChain(n, c) || last.memory.odd[n][c.ID]
		}) {
			odd[c.ID] = true
			scanChain(owners, t, c)
		}
		if t.Name == "nat" {
			unreferenced(owners, t, chains)
			unmasqueraded(owners, t)
		}
	}
}

// leastChains is how many chains to look at are worth another processor.
const leastChains = 1024

// suspects returns the chains that there is a finding about, of those that may be
// looked at.
func suspects(t *netfilter.Table, chains []*netfilter.Chain, leaves []leaf, look func(*netfilter.Chain) bool) []*netfilter.Chain {
	odd := make([]bool, len(chains))
	share(len(chains), leastChains, func(first, step int) {
		for i := first; i < len(chains); i += step {
			if look(chains[i]) {
				probe := owners{leaves: leaves, probing: true}
				scanChain(&probe, t, chains[i])
				odd[i] = probe.asked > 0
			}
		}
	})
	var out []*netfilter.Chain
	for i, c := range chains {
		if odd[i] {
			out = append(out, c)
		}
	}
	return out
}

// scanChain looks at one chain.
func scanChain(owners *owners, t *netfilter.Table, c *netfilter.Chain) {
	o, ok := kind(t.Name, c.Name)
	if !ok || (t.Name == "kube-proxy") != isNFTables(t) {
		return
	}
	o.foreign(owners, t, c)
	if o.balance {
		unreachable(owners, t, c)
		forgetful(owners, t, c)
	}
	if strings.HasPrefix(c.Name, "KUBE-SEP-") {
		hairpin(owners, t, c)
	}
}

// unreferenced reports the chains of Services that no rule leads to. Above 1000
// endpoints, where it also leaves comments out, kube-proxy keeps such chains of
// deleted Services for a while; below, it deletes them at once.
func unreferenced(owners *owners, t *netfilter.Table, chains []*netfilter.Chain) {
	if c := t.Lookup("KUBE-SERVICES"); c == nil || c.Len() == 0 {
		return // all are: RulesMissing says so
	}
	for _, c := range chains {
		if strings.HasPrefix(c.Name, "KUBE-SVC-") && c.Len() > 0 && !balancesWithComments(c) {
			return
		}
	}
	used := make([]atomic.Bool, t.NameCount())
	var unknown atomic.Bool // a target that may lead anywhere
	share(len(chains), leastChains, func(first, step int) {
		for n := first; n < len(chains); n += step {
			for i := range chains[n].Len() {
				rule := chains[n].Rule(i)
				if len(rule) == 0 {
					continue
				}
				switch e := rule[len(rule)-1]; e.Kind {
				case netfilter.Jump, netfilter.Goto:
					if !used[e.A].Load() { // writing takes it from the other processors
						used[e.A].Store(true)
					}
				case netfilter.UnknownTarget:
					unknown.Store(true)
				}
			}
		}
	})
	if unknown.Load() {
		return
	}
	for _, c := range chains {
		if !used[c.ID].Load() && strings.HasPrefix(c.Name, "KUBE-SVC-") && balancesWithComments(c) {
			owners.finder(c).add(RulesMissing, Error, []RuleRef{{t, c, 0}}, "no rule leads to %s, which has endpoints: the rule of its Service's address is gone", c.Name)
		}
	}
}

// balancesWithComments reports whether a chain has commented rules for
// endpoints.
func balancesWithComments(c *netfilter.Chain) bool {
	return c.Len() > 0 && strings.Contains(c.Comment(c.Len()-1), " -> ")
}

// unmasqueraded reports chains of Services that lack the rule that masquerades
// clients from outside the pod range, where others have it.
func unmasqueraded(owners *owners, t *netfilter.Table) {
	mark := t.Lookup("KUBE-MARK-MASQ")
	dispatch := t.Lookup("KUBE-SERVICES")
	if mark == nil || dispatch == nil {
		return
	}
	var with, without []*netfilter.Chain
	for i := range dispatch.Len() {
		a := ask(RuleRef{t, dispatch, i})
		if a.target.Kind != netfilter.Jump {
			continue
		}
		c := t.ByID(netfilter.ChainID(a.target.A))
		if c == nil || c.Len() == 0 || !strings.HasPrefix(c.Name, "KUBE-SVC-") && !strings.HasPrefix(c.Name, "KUBE-SVL-") {
			continue
		}
		if jumpsTo(c, mark) {
			with = append(with, c)
		} else {
			without = append(without, c)
		}
	}
	if len(with) < 3 || len(without) > len(with)/4 {
		return // none has it, as without a pod range, or only those that kube-proxy has rewritten lately
	}
	for _, c := range without {
		owners.finder(c).add(MasqueradeMissing, Warning, []RuleRef{{t, c, 0}}, "%s has no rule that masquerades clients from outside the pod range, as the other Services have: answers may not find their way back", c.Name)
	}
}

// masquerades reports whether any rule of a chain does, or leads to one that may.
func masquerades(c *netfilter.Chain) bool {
	for i := range c.Len() {
		for _, e := range c.Rule(i) {
			if e.Kind == netfilter.Masquerade || e.Kind == netfilter.SNAT || e.Kind == netfilter.Jump || e.Kind == netfilter.Goto || e.Kind == netfilter.UnknownTarget {
				return true
			}
		}
	}
	return false
}

// jumpsTo reports whether any rule of a chain jumps to another.
func jumpsTo(c, to *netfilter.Chain) bool {
	for i := range c.Len() {
		rule := c.Rule(i)
		if e := rule[max(0, len(rule)-1):]; len(e) == 1 && e[0].Kind == netfilter.Jump && netfilter.ChainID(e[0].A) == to.ID {
			return true
		}
	}
	return false
}

// missing reports parts of kube-proxy's rules that are gone while others are
// there, as after a flush by hand.
func (f *finder) missing() {
	for _, t := range f.view.rules.Tables {
		if t.Name == "nat" {
			if c := t.Lookup("KUBE-MARK-MASQ"); c != nil && c.Len() == 0 {
				f.about = "KUBE-MARK-MASQ of " + t.Family.String()
				f.add(MasqueradeMissing, Error, nil, "KUBE-MARK-MASQ of %v is empty: nothing is masqueraded any more, and answers may not find their way back", t.Family)
			}
			if c := t.Lookup("KUBE-POSTROUTING"); c != nil && c.Len() > 0 && !masquerades(c) {
				f.about = "KUBE-POSTROUTING of " + t.Family.String()
				f.add(MasqueradeMissing, Error, []RuleRef{{t, c, c.Len() - 1}}, "KUBE-POSTROUTING of %v has lost its MASQUERADE: nothing is masqueraded any more, and answers may not find their way back", t.Family)
			}
		}
		if t.Name != "filter" || t.Lookup("KUBE-FORWARD") == nil || t.Lookup("KUBE-FORWARD").Len() == 0 {
			continue
		}
		nat := f.natBeside(t)
		if nat == nil || f.servedElsewhere(nat) {
			continue
		}
		for _, name := range []string{"KUBE-SERVICES", "KUBE-POSTROUTING"} {
			if c := nat.Lookup(name); c == nil || c.Len() == 0 {
				f.about = name + " of " + t.Family.String()
				f.add(RulesMissing, Error, nil, "chain %s in table nat of %v is %s, though kube-proxy's chains in table filter are there: nat was flushed, or never written", name, t.Family, goneText(c))
			}
		}
	}
}

// natBeside returns the nat table of the same family and backend.
func (f *finder) natBeside(filter *netfilter.Table) *netfilter.Table {
	for _, t := range f.view.rules.Tables {
		if t.Name == "nat" && t.Family == filter.Family && t.Backend == filter.Backend {
			return t
		}
	}
	return nil
}

// servedElsewhere reports whether another nat table of the family has Services:
// then this one is a leftover.
func (f *finder) servedElsewhere(nat *netfilter.Table) bool {
	return slices.ContainsFunc(f.view.rules.Tables, func(t *netfilter.Table) bool {
		c := t.Lookup("KUBE-SERVICES")
		return t != nat && t.Family == nat.Family && (isNFTables(t) || t.Name == "nat" && c != nil && c.Len() > 0)
	})
}

func goneText(c *netfilter.Chain) string {
	if c == nil {
		return "gone"
	}
	return "empty"
}

// foreign reports rules that the owner of a chain does not write.
func (o own) foreign(owners *owners, t *netfilter.Table, c *netfilter.Chain) {
	for i := range c.Len() {
		if !o.writes(t, owners.leaves, c.Rule(i)) {
			owners.finder(c).add(ForeignRule, Warning, []RuleRef{{t, c, i}}, "rule %d of %s is none that kube-proxy writes; it stays until kube-proxy rewrites the chain, which may be never", i+1, c.Name)
		}
	}
}

// writes reports whether the owner of a chain writes such a rule.
func (o own) writes(t *netfilter.Table, leaves []leaf, rule []netfilter.Expr) bool {
	if len(rule) == 0 {
		return false
	}
	e := rule[len(rule)-1]
	if e.IsMatch() { // KUBE-FW ends with a note
		return true
	}
	for _, k := range o.targets {
		if e.Kind == k {
			return true
		}
	}
	if e.Kind != netfilter.Jump && e.Kind != netfilter.Goto {
		return false
	}
	if leaves[e.A].sep {
		return slices.Contains(o.jumps, "KUBE-SEP-") && onlyBalances(rule)
	}
	name := t.ChainName(netfilter.ChainID(e.A))
	return slices.ContainsFunc(o.jumps, func(prefix string) bool { return strings.HasPrefix(name, prefix) })
}

// onlyBalances reports whether a jump to an endpoint depends on nothing but
// chance and session affinity.
func onlyBalances(rule []netfilter.Expr) bool {
	for _, e := range rule[:len(rule)-1] {
		switch e.Kind {
		case netfilter.Random, netfilter.Recent, netfilter.Comment:
			if e.Negated() {
				return false
			}
		default:
			return false
		}
	}
	return true
}

// unreachable reports endpoint rules behind one that takes every packet.
func unreachable(owners *owners, t *netfilter.Table, c *netfilter.Chain) {
	taken := -1
	for i := range c.Len() {
		rule := c.Rule(i)
		if len(rule) == 0 || rule[len(rule)-1].Kind != netfilter.Jump {
			continue
		}
		id := netfilter.ChainID(rule[len(rule)-1].A)
		if !owners.leaves[id].sep {
			continue
		}
		if never(rule) {
			owners.finder(c).add(RuleUnreachable, Warning, []RuleRef{{t, c, i}}, "rule %d of %s never matches: its probability is 0", i+1, c.Name)
			continue
		}
		delivers := owners.leaves[id].port != 0 || deliversAll(t.ByID(id))
		if !delivers {
			owners.finder(c).add(EndpointBroken, Error, []RuleRef{{t, c, i}}, "%s has no DNAT: what rule %d of %s sends there comes back, and goes to the endpoints behind it", t.ChainName(id), i+1, c.Name)
		}
		if taken >= 0 {
			owners.finder(c).add(RuleUnreachable, Warning, []RuleRef{{t, c, taken}, {t, c, i}}, "rule %d of %s is never reached: rule %d takes every packet", i+1, c.Name, taken+1)
			continue
		}
		if unconditional(rule) && delivers {
			taken = i
		}
	}
}

// forgetful reports the endpoints of a chain whose clients session affinity does
// not keep as it keeps those of the others: kube-proxy writes it for all or none.
func forgetful(owners *owners, t *netfilter.Table, c *netfilter.Chain) {
	known := map[netfilter.ChainID]bool{} // the endpoints' chains that known clients go to
	seconds := 0                          // for how long, in the first such rule
	for i := range c.Len() {
		rule := c.Rule(i)
		to, keeps, ok := knownClients(t, c, rule)
		if !ok {
			continue
		}
		if len(known) == 0 {
			seconds = keeps
		}
		known[to.ID] = true
		if keeps != seconds {
			owners.finder(c).add(AffinityMismatch, Warning, []RuleRef{{t, c, i}}, "rule %d of %s keeps clients with %s for %d s, other rules of this Service for %d s", i+1, c.Name, to.Name, keeps, seconds)
		}
		if !remembers(to) {
			owners.finder(c).add(AffinityMismatch, Warning, []RuleRef{{t, c, i}}, "no rule of %s notes its clients, so session affinity does not keep them as it does those of this Service's other endpoints", to.Name)
		}
	}
	if len(known) == 0 {
		return
	}
	for i := range c.Len() {
		for _, to := range sendsTo(t, c, c.Rule(i)) {
			if !known[to.ID] {
				owners.finder(c).add(AffinityMismatch, Warning, []RuleRef{{t, c, i}}, "no rule of %s keeps known clients with %s, as others do for this Service's other endpoints", c.Name, to.Name)
			}
		}
	}
}

// knownClients tells which endpoint's chain a rule sends those clients to that
// session affinity knows, and for how many seconds it does since they were seen;
// ok is false for another kind of rule.
func knownClients(t *netfilter.Table, c *netfilter.Chain, rule []netfilter.Expr) (to *netfilter.Chain, seconds int, ok bool) {
	if len(rule) == 0 {
		return nil, 0, false
	}
	for _, e := range rule[:len(rule)-1] {
		switch {
		case e.Kind == netfilter.Recent && e.N != netfilter.RecentSet:
			seconds, ok = affinitySeconds(c.Text(e)), true
		case e.Kind == netfilter.InSet && t.Set(e.A).Timeout > 0: // without the rule that notes them, the set is not even dynamic
			seconds, ok = int(t.Set(e.A).Timeout.Seconds()), true
		}
		if ok {
			break
		}
	}
	if e := rule[len(rule)-1]; ok && (e.Kind == netfilter.Jump || e.Kind == netfilter.Goto) {
		to = t.ByID(netfilter.ChainID(e.A))
	}
	if to == nil || !isEndpointChain(to.Name) {
		return nil, 0, false
	}
	return to, seconds, true
}

// sendsTo returns the endpoints' chains that a rule sends to.
func sendsTo(t *netfilter.Table, c *netfilter.Chain, rule []netfilter.Expr) []*netfilter.Chain {
	var out []*netfilter.Chain
	add := func(e netfilter.Expr) {
		if e.Kind != netfilter.Jump && e.Kind != netfilter.Goto {
			return
		}
		if to := t.ByID(netfilter.ChainID(e.A)); to != nil && isEndpointChain(to.Name) {
			out = append(out, to)
		}
	}
	if len(rule) == 0 {
		return nil
	}
	e := rule[len(rule)-1]
	add(e)
	if e.Kind == netfilter.Choose {
		for _, choice := range c.Choices(e) {
			add(choice.Verdict)
		}
	}
	return out
}

// isEndpointChain reports whether kube-proxy names an endpoint's chain so.
func isEndpointChain(name string) bool {
	return strings.HasPrefix(name, "KUBE-SEP-") || strings.HasPrefix(name, "endpoint-")
}

// remembers reports whether an endpoint's chain notes its clients for session
// affinity: in iptables mode the rule with the DNAT does, in nftables mode one of
// its own.
func remembers(c *netfilter.Chain) bool {
	for i := range c.Len() {
		for _, e := range c.Rule(i) {
			if e.Kind == netfilter.Recent && e.N&netfilter.RecentSet != 0 || e.Kind == netfilter.NoEffect {
				return true
			}
		}
	}
	return false
}

// never reports whether a rule's chance is none.
func never(rule []netfilter.Expr) bool {
	return slices.ContainsFunc(rule, func(e netfilter.Expr) bool {
		return e.Kind == netfilter.Random && chanceOf(e).num == 0
	})
}

// unconditional reports whether a rule matches every packet.
func unconditional(rule []netfilter.Expr) bool {
	for _, e := range rule {
		if e.IsMatch() && e.Kind != netfilter.Comment {
			return false
		}
	}
	return true
}

// deliversAll reports whether an endpoint's chain has its DNAT: without it,
// packets come back to the caller.
func deliversAll(c *netfilter.Chain) bool {
	for i := range c.Len() {
		if rule := c.Rule(i); len(rule) > 0 && rule[len(rule)-1].Kind == netfilter.DNAT {
			return true
		}
	}
	return false
}

// hairpin reports an endpoint that could not reach itself through its Service.
func hairpin(owners *owners, t *netfilter.Table, c *netfilter.Chain) {
	masquerades := false
	for i := range c.Len() {
		rule := c.Rule(i)
		if len(rule) == 0 {
			continue
		}
		switch e := rule[len(rule)-1]; e.Kind {
		case netfilter.Jump:
			masquerades = masquerades || t.ChainName(netfilter.ChainID(e.A)) == "KUBE-MARK-MASQ"
		case netfilter.DNAT:
			if !masquerades {
				owners.finder(c).add(MasqueradeMissing, Warning, []RuleRef{{t, c, i}}, "%s does not masquerade %s when it connects to itself through the Service: such connections hang", c.Name, c.Target(e))
			}
			return
		}
	}
}
