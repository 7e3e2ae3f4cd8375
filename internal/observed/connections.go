package observed

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
)

// remembered is how long what is no longer in the rules is remembered: a total
// goes on when its endpoint comes back.
const remembered = time.Hour

// Connections are the new connections that the rules have counted. They never
// fall: what is lost when kube-proxy rewrites a chain, between a reading and that,
// is missing in them.
type Connections struct {
	// Since is when counting began; zero where the counts are those that stand in
	// the rules, since each chain was written.
	Since time.Time

	plan   *plan
	counts []uint64 // by endpoint
	totals []uint64 // by port, with the endpoints that are gone
}

// PortConnections are those of one Service port.
type PortConnections struct {
	Total uint64
	// NotCounted says why some are missing; "" for nothing.
	NotCounted string
	Endpoints  []EndpointConnections // by address
}

// EndpointConnections are those that went to one endpoint.
type EndpointConnections struct {
	Address netip.AddrPort
	Count   uint64
	Counted bool // otherwise Count means nothing
}

// Of returns the connections to a Service port; ok is false when the rules do not
// have it.
func (c *Connections) Of(p chain.ServicePort) (out PortConnections, ok bool) {
	l := c.plan.layout
	i := l.port(p)
	if i < 0 {
		return out, false
	}
	out.Total = c.totals[i]
	for k, a := range l.of(i) {
		n := int(l.starts[i]) + k
		e := EndpointConnections{Address: a, Count: c.counts[n], Counted: c.plan.states[n] == counted}
		out.Endpoints = append(out.Endpoints, e)
		if why := c.plan.states[n].why(); why != "" {
			out.NotCounted = why
		}
	}
	return out, true
}

// state says whether the connections to an endpoint can be counted.
type state uint8

const (
	noRule state = iota
	noCounters
	noMode
	shared
	counted
)

func (s state) why() string {
	switch s {
	case counted:
		return ""
	case noMode:
		return "the rules of kube-proxy's nftables mode count no connections"
	case noCounters:
		return "the dump has no counters: iptables-save -c prints them"
	case shared:
		return "one rule sends the connections of several Services there"
	}
	return "no single rule sends there"
}

// plan says which rules count for which endpoint of a ruleset.
type plan struct {
	layout *layout
	sent   []rule  // all that send to an endpoint, by port
	starts []int32 // of each port's in sent; one more than ports
	rules  []rule  // those that count, in the order of the ruleset
	found  []state // by endpoint: what its own rules say
	states []state // by endpoint, also of those that share a rule
}

// earlier is what there was before a plan is made.
type earlier struct {
	rules      *netfilter.Ruleset
	programmed *chain.Programmed
	plan       *plan
}

// rule is one that counts the connections to an endpoint.
type rule struct {
	table, index int32
	chain        netfilter.ChainID
	endpoint     int32
}

// compare orders rules as they stand in the ruleset.
func (r rule) compare(o rule) int {
	switch {
	case r.table != o.table:
		return cmp.Compare(r.table, o.table)
	case r.chain != o.chain:
		return cmp.Compare(r.chain, o.chain)
	case r.index != o.index:
		return cmp.Compare(r.index, o.index)
	}
	return cmp.Compare(r.endpoint, o.endpoint)
}

// newPlan finds the rule of each endpoint: the DNAT of its KUBE-SEP chain, which
// all ways lead through, those of session affinity too. Of Services that are as they
// were, it takes over what the earlier plan says, if there is one.
func newPlan(rs *netfilter.Ruleset, p *chain.Programmed, was *earlier) *plan {
	if was != nil && !sameLine(rs, was.rules) {
		was = nil
	}
	out := &plan{starts: make([]int32, 1, len(p.Services)+1)}
	var before *layout
	if was != nil {
		before = was.plan.layout
		out.found, out.sent = make([]state, 0, len(was.plan.found)+spare), make([]rule, 0, len(was.plan.sent)+spare)
	}
	n := newNumbering(len(p.Services), before)
	out.layout = n.layout
	var spots []spot // reused
	port := 0        // of the earlier plan
	for i := range p.Services {
		s := &p.Services[i]
		for was != nil && port < len(was.plan.layout.ports) && was.plan.layout.ports[port].Compare(s.ServicePort) < 0 {
			port++
		}
		if was == nil || !out.keep(rs, s, was, port) {
			spots = n.add(s, spots[:0])
			for len(out.found) < len(n.endpoints) {
				out.found = append(out.found, counted)
			}
			for _, at := range spots {
				if st := out.find(rs, at); st != counted {
					out.found[at.endpoint] = st
				}
			}
		}
		out.starts = append(out.starts, int32(len(out.sent)))
	}
	out.part()
	return out
}

// keep takes over what an earlier plan says of a port of that number, and reports
// whether it did: when the Service and the chains that send to its endpoints are as
// they were.
func (p *plan) keep(rs *netfilter.Ruleset, s *chain.Service, was *earlier, port int) bool {
	old := was.plan
	if port == len(old.layout.ports) || old.layout.ports[port] != s.ServicePort || !sameRoutes(s, &was.programmed.Services[port]) {
		return false
	}
	found := old.found[old.layout.starts[port]:old.layout.starts[port+1]]
	if slices.Contains(found, noCounters) {
		return false // now it may have some: those are no part of a chain's version
	}
	sent := old.sent[old.starts[port]:old.starts[port+1]]
	for _, r := range sent {
		now, then := rs.Tables[r.table].ByID(r.chain), was.rules.Tables[r.table].ByID(r.chain)
		if now != then && (now == nil || now.Version() != then.Version()) {
			return false
		}
	}
	shift := int32(len(p.layout.endpoints)) - old.layout.starts[port]
	for _, r := range sent {
		r.endpoint += shift
		p.sent = append(p.sent, r)
	}
	p.found = append(p.found, found...)
	p.layout.endpoints = append(p.layout.endpoints, old.layout.of(port)...)
	p.layout.end(s.ServicePort)
	return true
}

// sameRoutes reports whether the routes of two Services are the very same.
func sameRoutes(a, b *chain.Service) bool {
	return slices.EqualFunc(a.Frontends, b.Frontends, func(f, g chain.Frontend) bool {
		return len(f.Routes) == len(g.Routes) && (len(f.Routes) == 0 || &f.Routes[0] == &g.Routes[0])
	})
}

// find adds the rules of a chain that send to an endpoint.
func (p *plan) find(rs *netfilter.Ruleset, s spot) state {
	a, out := p.layout.endpoints[s.endpoint], noRule
	for i, t := range rs.Tables {
		if t.Family != netfilter.FamilyOf(a.Addr()) || !mayCount(t, s.chain) {
			continue
		}
		c := t.Lookup(s.chain)
		if c == nil {
			continue
		}
		if t.Backend == netfilter.BackendNFTables {
			return noMode
		}
		index := ruleTo(c, a)
		if index < 0 {
			return noRule
		}
		if _, ok := c.Counter(index); !ok {
			return noCounters
		}
		out = counted
		p.sent = append(p.sent, rule{int32(i), int32(index), c.ID, s.endpoint})
	}
	return out
}

// mayCount reports whether the counters of a chain last: each sync of kube-proxy
// writes the dispatch chains anew.
func mayCount(t *netfilter.Table, chain string) bool {
	switch chain {
	case "KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-POSTROUTING", "KUBE-MARK-MASQ":
		return false
	}
	return t.Name == "nat" || t.Backend == netfilter.BackendNFTables
}

// part sorts the rules, and leaves out those that do not count for one endpoint
// alone.
func (p *plan) part() {
	p.rules, p.states = slices.Clone(p.sent), slices.Clone(p.found)
	slices.SortFunc(p.rules, rule.compare)
	p.rules = slices.Compact(p.rules)
	same := func(a, b rule) bool { return a.table == b.table && a.chain == b.chain && a.index == b.index }
	for i := 1; i < len(p.rules); i++ {
		if same(p.rules[i-1], p.rules[i]) {
			p.states[p.rules[i-1].endpoint], p.states[p.rules[i].endpoint] = shared, shared
		}
	}
	p.rules = slices.DeleteFunc(p.rules, func(r rule) bool { return p.states[r.endpoint] != counted })
}

// ruleTo returns the one rule of a chain that sends to an address; -1 when it is
// not just one.
func ruleTo(c *netfilter.Chain, a netip.AddrPort) int {
	found := -1
	for i := range c.Len() {
		r := c.Rule(i)
		if len(r) == 0 || r[len(r)-1].Kind != netfilter.DNAT {
			continue
		}
		to := c.Target(r[len(r)-1])
		if to.Addr() != a.Addr() || to.Port() != 0 && to.Port() != a.Port() {
			continue
		}
		if found >= 0 {
			return -1
		}
		found = i
	}
	return found
}

// Count returns what stands in the rules: the connections since each chain was
// written.
func Count(rs *netfilter.Ruleset, p *chain.Programmed) *Connections {
	c := &Connections{plan: newPlan(rs, p, nil)}
	c.counts, c.totals = make([]uint64, len(c.plan.states)), make([]uint64, len(c.plan.layout.ports))
	c.add(rs, func(_ rule, now uint64) uint64 { return now })
	return c
}

// add adds an increase to the counts and totals for each rule.
func (c *Connections) add(rs *netfilter.Ruleset, increase func(rule, uint64) uint64) {
	l, port := c.plan.layout, 0
	for _, r := range c.plan.rules {
		ch := rs.Tables[r.table].ByID(r.chain)
		now, _ := ch.Counter(int(r.index))
		n := increase(r, now.Packets)
		if n == 0 {
			continue
		}
		c.counts[r.endpoint] += n
		if r.endpoint < l.starts[port] || r.endpoint >= l.starts[port+1] {
			port, _ = slices.BinarySearch(l.starts, r.endpoint+1)
			port--
		}
		c.totals[port] += n
	}
}

// Counter adds up what the rules count from reading to reading. The zero value
// is ready; it is used by one goroutine at a time.
type Counter struct {
	rules      *netfilter.Ruleset
	programmed *chain.Programmed
	now        *Connections
	gone       map[goneEndpoint]gone
	gonePorts  map[chain.ServicePort]gone
}

// goneEndpoint is an endpoint that the rules no longer have.
type goneEndpoint struct {
	port    chain.ServicePort
	address netip.AddrPort
}

type gone struct {
	count uint64
	at    time.Time
}

// Update takes a reading and what was worked out of it. It does nothing when the
// reading is the last one.
func (c *Counter) Update(rs *netfilter.Ruleset, p *chain.Programmed, at time.Time) *Connections {
	switch {
	case rs == c.rules && p == c.programmed:
	case c.rules == nil:
		now := &Connections{Since: at, plan: newPlan(rs, p, nil)}
		now.counts, now.totals = make([]uint64, len(now.plan.states)), make([]uint64, len(now.plan.layout.ports))
		c.now, c.gone, c.gonePorts = now, map[goneEndpoint]gone{}, map[chain.ServicePort]gone{}
	case p == c.programmed && sameLine(rs, c.rules):
		c.count(rs)
	default:
		c.replan(rs, p, at)
	}
	c.rules, c.programmed = rs, p
	return c.now
}

// sameLine reports whether chains and rules of two rulesets have the same numbers.
func sameLine(a, b *netfilter.Ruleset) bool {
	return slices.EqualFunc(a.Tables, b.Tables, func(x, y *netfilter.Table) bool { return x == y || x.Revises(y) })
}

// count adds what was counted since the last reading of the same rules.
func (c *Counter) count(rs *netfilter.Ruleset) {
	var next *Connections
	for _, r := range c.now.plan.rules {
		if rs.Tables[r.table].ByID(r.chain) != c.rules.Tables[r.table].ByID(r.chain) {
			next = c.now.copy()
			break
		}
	}
	if next == nil {
		return
	}
	next.add(rs, func(r rule, now uint64) uint64 {
		last := c.rules.Tables[r.table].ByID(r.chain)
		if last == rs.Tables[r.table].ByID(r.chain) {
			return 0
		}
		before, _ := last.Counter(int(r.index))
		return increase(before.Packets, now)
	})
	c.now = next
}

func (c *Connections) copy() *Connections {
	return &Connections{Since: c.Since, plan: c.plan, counts: slices.Clone(c.counts), totals: slices.Clone(c.totals)}
}

// increase is what a counter has counted since it stood at before. One that has
// fallen was set to zero in between.
func increase(before, now uint64) uint64 {
	if now < before {
		return now
	}
	return now - before
}

// replan counts for other rules than before. A rule is the same when it stands in
// a chain of the same name and sends to the same address, wherever in the chain.
func (c *Counter) replan(rs *netfilter.Ruleset, p *chain.Programmed, at time.Time) {
	next := &Connections{Since: c.now.Since, plan: newPlan(rs, p, &earlier{c.rules, c.programmed, c.now.plan})}
	next.counts, next.totals = make([]uint64, len(next.plan.states)), make([]uint64, len(next.plan.layout.ports))
	c.carry(next, at)
	tables := make([]*netfilter.Table, len(rs.Tables)) // as they were
	for i, t := range rs.Tables {
		if n := slices.IndexFunc(c.rules.Tables, t.Same); n >= 0 {
			tables[i] = c.rules.Tables[n]
		}
	}
	next.add(rs, func(r rule, now uint64) uint64 {
		if tables[r.table] == nil {
			if unreadable(c.rules, rs.Tables[r.table]) {
				return 0
			}
			return now
		}
		ch := rs.Tables[r.table].ByID(r.chain)
		var last *netfilter.Chain
		switch t := tables[r.table]; {
		case !rs.Tables[r.table].Revises(t):
			last = t.Lookup(ch.Name)
		case int(r.chain) < t.NameCount(): // its numbers are the same
			last = t.ByID(r.chain)
		}
		if last == nil {
			return now
		}
		if last == ch {
			return 0
		}
		index := ruleTo(last, next.plan.layout.endpoints[r.endpoint])
		if index < 0 {
			return now
		}
		before, _ := last.Counter(index)
		return increase(before.Packets, now)
	})
	c.now = next
}

// unreadable reports whether a table was there, but could not be read.
func unreadable(rs *netfilter.Ruleset, t *netfilter.Table) bool {
	return slices.ContainsFunc(rs.Unreadable, func(u netfilter.Unreadable) bool { return u.Family == t.Family && u.Table == t.Name })
}

// carry takes the counts along, and remembers those of what is gone.
func (c *Counter) carry(next *Connections, at time.Time) {
	was, l := c.now, next.plan.layout
	was.plan.layout.eachEndpoint(l, func(i, n, to int) {
		switch {
		case to >= 0:
			next.counts[to] = was.counts[n]
		case was.counts[n] > 0:
			c.gone[goneEndpoint{was.plan.layout.ports[i], was.plan.layout.endpoints[n]}] = gone{was.counts[n], at}
		}
	})
	for i, p := range was.plan.layout.ports {
		if j := l.port(p); j >= 0 {
			next.totals[j] = was.totals[i]
		} else if was.totals[i] > 0 {
			c.gonePorts[p] = gone{was.totals[i], at}
		}
	}
	c.recall(next, at)
}

// recall takes up the counts of what has come back, and forgets what has been
// gone for long.
func (c *Counter) recall(next *Connections, at time.Time) {
	l := next.plan.layout
	for p, g := range c.gonePorts {
		i := l.port(p)
		if i >= 0 {
			next.totals[i] = g.count
		}
		if i >= 0 || at.Sub(g.at) > remembered {
			delete(c.gonePorts, p)
		}
	}
	for e, g := range c.gone {
		n := -1
		if i := l.port(e.port); i >= 0 {
			n = l.endpoint(i, e.address)
		}
		if n >= 0 {
			next.counts[n] = g.count
		}
		if n >= 0 || at.Sub(g.at) > remembered {
			delete(c.gone, e)
		}
	}
}
