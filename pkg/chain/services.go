package chain

import (
	"cmp"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/natlens/natlens/pkg/netfilter"
)

// tolerance is how far shares of equal endpoints lie apart at most: the kernel
// keeps a probability as a multiple of 2^-31, and kube-proxy writes it with ten
// digits, which together makes less than this for any number of endpoints.
const tolerance = 4e-10

// Programmed is what a ruleset makes of all Services.
type Programmed struct {
	Services []Service // by namespace, name, port name, protocol
	Findings []Finding // about the node, not about one Service

	memory memory
}

// Service is one port of a Service, as the rules have it.
type Service struct {
	ServicePort
	// AffinitySeconds is the timeout of ClientIP session affinity, 0 for none.
	// The shares are those of a client that has no affinity yet.
	AffinitySeconds int
	Frontends       []Frontend
	Findings        []Finding
}

// FrontendType tells what kind of address a frontend is.
type FrontendType string

// The frontend types.
const (
	ClusterIP    FrontendType = "ClusterIP"
	NodePort     FrontendType = "NodePort"
	LoadBalancer FrontendType = "LoadBalancer"
	ExternalIP   FrontendType = "ExternalIP"
)

// Frontend is an address and port that a Service answers on.
type Frontend struct {
	Type    FrontendType
	Family  netfilter.Family
	Address netip.Addr // invalid for a NodePort
	Port    uint16
	// Accepted are the node's addresses on which a NodePort answers, when the
	// rules name them one by one; empty for all local addresses.
	Accepted []netip.Addr
	// Routes say what becomes of connections. Source classes with the same
	// answer share one; those for particular Sources come last.
	Routes []Route
}

// String returns "ClusterIP 10.56.11.169:80" or "NodePort 30679", which is what
// findings are About.
func (f Frontend) String() string {
	if f.Type == NodePort {
		return fmt.Sprintf("NodePort %d", f.Port)
	}
	return fmt.Sprintf("%s %s", f.Type, netip.AddrPortFrom(f.Address, f.Port))
}

// Route is what becomes of connections from some sources.
type Route struct {
	From []Class
	// Sources narrows the classes to those address ranges; empty for all
	// sources that no other route of the class names.
	Sources []netip.Prefix
	Verdict RouteVerdict
	// Masquerade says that the source of connections that reach an endpoint
	// becomes an address of the node, except for those endpoints that say otherwise.
	Masquerade bool
	Endpoints  []Endpoint // by address; routes with the same ones share them
	// Undelivered is the share that reaches no endpoint. Rejected and Dropped
	// are parts of it; the rest goes on as if the Service did not exist.
	Undelivered, Rejected, Dropped Share
	// Unknown are the rules on which the answer depends and that could not be
	// decided.
	Unknown []RuleRef
}

// RouteVerdict sums up a route.
type RouteVerdict string

// The verdicts of a [Route]. Mixed means that connections fare differently and
// that not all reach an endpoint.
const (
	RouteDNAT   RouteVerdict = "dnat"
	RouteReject RouteVerdict = "reject"
	RouteDrop   RouteVerdict = "drop"
	RouteNone   RouteVerdict = "none"
	RouteMixed  RouteVerdict = "mixed"
)

// MasqueradesTo reports whether connections that reach one of the route's endpoints
// get an address of the node as their source.
func (r *Route) MasqueradesTo(e Endpoint) bool { return r.Masquerade && !e.Unmasqueraded }

// Endpoint is one of the addresses that connections are sent to.
type Endpoint struct {
	Address    netip.AddrPort
	Share, Max Share // at least, and at most; they differ only where Route.Unknown is not empty
	// Unmasqueraded is set where the route's Masquerade does not hold.
	Unmasqueraded bool
	Chain         string // of the rule that rewrites the destination
}

// entry is one frontend as found in the rules.
type entry struct {
	service ServicePort
	front   Frontend
	target  *netfilter.Chain // that the nat rule enters; nil when only filter names the frontend
	rule    RuleRef
	routes  []Route
	// What the walks saw, for findings.
	affinity int
	facts    facts
	trail    trail
	// Where its Service is among those of Programmed, and whether nothing was
	// found about it.
	number int
	clean  bool
}

// Services works out every Service of the ruleset.
func (v *View) Services() *Programmed { return v.Update(&Programmed{}) }

// Update works out every Service of the ruleset, as Services does. It walks only
// to those that may fare differently than in the last ruleset, of which last was
// worked out.
func (v *View) Update(last *Programmed) *Programmed {
	d := v.discover()
	all := slices.Clone(d.entries) // in the order of the rules, which is that of the chains in memory
	var sorted sync.WaitGroup
	sorted.Go(d.sort)
	anew := all
	var known *changes // since last; nil for everything
	if last.memory.view != nil {
		known = v.changes(last.memory.view)
	}
	if known != nil {
		anew = nil
		for _, e := range all {
			if !e.recall(last.memory.entries[e.key()], known) {
				anew = append(anew, e)
			}
		}
	}
	share(len(anew), 64, func(first, step int) {
		res := &resolver{view: v, run: run{splits: splits{}, exits: exits{}, tracks: v.newTracks()}}
		for i := first; i < len(anew); i += step {
			res.resolve(anew[i])
			anew[i].clean = v.finds(anew[i]) == 0
		}
	})

	sorted.Wait()
	p := &Programmed{memory: memory{view: v, entries: d.at}}
	p.gather(d.entries)
	v.find(p, d, last, known)
	return p
}

// gather puts sorted frontends to their Services.
func (p *Programmed) gather(entries []*entry) {
	services := 0
	for i, e := range entries {
		if i == 0 || entries[i-1].service != e.service {
			services++
		}
	}
	p.Services = make([]Service, 0, services)
	fronts := make([]Frontend, 0, len(entries))
	for i, e := range entries {
		if i == 0 || entries[i-1].service != e.service {
			p.Services = append(p.Services, Service{ServicePort: e.service})
		}
		e.front.Routes = e.routes
		e.number = len(p.Services) - 1
		fronts = append(fronts, e.front)
		s := &p.Services[e.number]
		n := len(s.Frontends) + 1
		s.Frontends = fronts[len(fronts)-n : len(fronts) : len(fronts)]
		s.AffinitySeconds = max(s.AffinitySeconds, e.affinity)
	}
}

// share has n things done by all processors: each does those from first on, step
// by step. A processor more is worth its start for least things.
func share(n, least int, do func(first, step int)) {
	workers := min(runtime.GOMAXPROCS(0), max(1, n/least))
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() { do(w, workers) })
	}
	wg.Wait()
}

// Service returns a Service port; nil when the rules do not have it.
func (p *Programmed) Service(port ServicePort) *Service {
	i, ok := slices.BinarySearchFunc(p.Services, port, func(s Service, port ServicePort) int { return s.Compare(port) })
	if !ok {
		return nil
	}
	return &p.Services[i]
}

// Rules returns the rules that a frontend rests on: the one that names it, and
// the first of the chain that it enters. They are in the ruleset that p was
// worked out of.
func (p *Programmed) Rules(f Frontend, protocol netfilter.Protocol) []RuleRef {
	e := p.memory.entries[frontKey{f.Family, f.Address, f.Port, protocol}]
	if e == nil {
		return nil
	}
	return e.dispatch()
}

var frontendOrder = map[FrontendType]int{ClusterIP: 0, ExternalIP: 1, LoadBalancer: 2, NodePort: 3}

// sort puts frontends in the order in which they are listed.
func (d *discovery) sort() {
	slices.SortStableFunc(d.entries, func(a, b *entry) int {
		if c := a.service.Compare(b.service); c != 0 {
			return c
		}
		return cmp.Or(
			cmp.Compare(frontendOrder[a.front.Type], frontendOrder[b.front.Type]),
			cmp.Compare(a.front.Family, b.front.Family), a.front.Address.Compare(b.front.Address),
			cmp.Compare(a.front.Port, b.front.Port))
	})
}

// discovery is what the dispatch chains say.
type discovery struct {
	view    *View
	entries []*entry
	at      map[frontKey]*entry
	names   map[string]ServicePort // by the hash in a chain's name
	// accepted are the node addresses that KUBE-SERVICES sends to
	// KUBE-NODEPORTS one by one.
	accepted map[netfilter.Family][]netip.Addr
	clashes  []clash
	// nodePorts are the Services that filter names with a NodePort.
	nodePorts map[ServicePort]bool
}

type frontKey struct {
	family   netfilter.Family
	addr     netip.Addr
	port     uint16
	protocol netfilter.Protocol
}

// clash is a second Service on the same address and port.
type clash struct {
	first *entry
	rule  RuleRef
	other ServicePort
}

// discover lists the frontends. Chains and comments only name things here;
// what happens to a packet is the walk's to say.
func (v *View) discover() *discovery {
	d := &discovery{view: v, at: make(map[frontKey]*entry, v.frontends()), names: map[string]ServicePort{}, accepted: map[netfilter.Family][]netip.Addr{}, nodePorts: map[ServicePort]bool{}}
	for _, t := range v.rules.Tables {
		if isNFTables(t) {
			d.maps(t)
		}
		if t.Name != "nat" {
			continue
		}
		for _, name := range []string{"KUBE-SERVICES", "KUBE-NODEPORTS"} {
			if c := t.Lookup(name); c != nil {
				for i := range c.Len() {
					d.dispatch(RuleRef{t, c, i})
				}
			}
		}
	}
	for _, t := range v.rules.Tables {
		if t.Name != "filter" {
			continue
		}
		if c := t.Lookup("KUBE-EXTERNAL-SERVICES"); c != nil {
			for i := range c.Len() {
				if a := ask(RuleRef{t, c, i}); a.local {
					d.nodePorts[d.name(a, "", nil)] = true
				}
			}
		}
		for _, name := range []string{"KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES"} {
			if c := t.Lookup(name); c != nil {
				for i := range c.Len() {
					d.refusal(RuleRef{t, c, i})
				}
			}
		}
	}
	return d
}

// frontends returns how many frontends there are about.
func (v *View) frontends() int {
	n := 0
	for _, t := range v.rules.Tables {
		if c := t.Lookup("KUBE-SERVICES"); t.Name == "nat" && c != nil {
			n += c.Len()
		}
	}
	return n
}

// asked is what a dispatch rule asks of a packet.
type asked struct {
	addr     netip.Addr // of a single destination
	local    bool       // any address of the node
	port     uint16
	protocol netfilter.Protocol
	comment  string
	target   netfilter.Expr
}

func ask(ref RuleRef) asked {
	var a asked
	rule := ref.Chain.Rule(ref.Index)
	for _, e := range rule {
		switch e.Kind {
		case netfilter.Destination:
			if p, ok := ref.Chain.CIDR(e); ok && !e.Negated() && p.IsSingleIP() {
				a.addr = p.Addr()
			}
		case netfilter.DestinationType:
			a.local = e.A&netfilter.AddrLocal != 0 && !e.Negated()
		case netfilter.ProtocolIs:
			a.protocol = netfilter.Protocol(e.A)
		case netfilter.DestinationPort:
			if e.A == e.B {
				a.port = uint16(e.A)
			}
		case netfilter.Comment:
			a.comment = string(ref.Chain.Text(e))
		}
	}
	if len(rule) > 0 {
		a.target = rule[len(rule)-1]
	}
	return a
}

// dispatch reads one rule of nat KUBE-SERVICES or KUBE-NODEPORTS.
func (d *discovery) dispatch(ref RuleRef) {
	a := ask(ref)
	if a.target.Kind != netfilter.Jump && a.target.Kind != netfilter.Goto {
		return
	}
	target := ref.Table.ByID(netfilter.ChainID(a.target.A))
	name := ref.Table.ChainName(netfilter.ChainID(a.target.A))
	family := ref.Table.Family
	if a.port == 0 || a.protocol == 0 {
		if a.addr.IsValid() && name == "KUBE-NODEPORTS" && !slices.Contains(d.accepted[family], a.addr) {
			d.accepted[family] = append(d.accepted[family], a.addr)
		}
		return
	}
	if target != nil && chainHash(name) == "" && onlyMarks(target) {
		return // kube-proxy up to v1.21 masquerades here, ahead of the jump
	}
	front := Frontend{Family: family, Address: a.addr, Port: a.port}
	if ref.Chain.Name == "KUBE-NODEPORTS" {
		front.Address, front.Type = netip.Addr{}, NodePort
	} else if !a.addr.IsValid() {
		return
	} else {
		front.Type = frontendType(a.comment, name)
	}
	d.add(&entry{service: d.name(a, name, target), front: front, target: target, rule: ref})
}

// refusal reads one rule of filter KUBE-SERVICES or KUBE-EXTERNAL-SERVICES: a
// frontend without endpoints stands only there.
func (d *discovery) refusal(ref RuleRef) {
	a := ask(ref)
	if a.port == 0 || a.protocol == 0 || a.target.Kind != netfilter.Reject && a.target.Kind != netfilter.Drop {
		return
	}
	front := Frontend{Family: ref.Table.Family, Address: a.addr, Port: a.port}
	service := d.name(a, "", nil)
	switch {
	case a.addr.IsValid() && ref.Chain.Name == "KUBE-SERVICES":
		front.Type = ClusterIP
	case a.addr.IsValid():
		// The rule does not say which. A LoadBalancer mostly has a NodePort too.
		front.Type = ExternalIP
		if d.nodePorts[service] {
			front.Type = LoadBalancer
		}
	case a.local:
		front.Type = NodePort
	default:
		return
	}
	d.add(&entry{service: service, front: front, rule: ref})
}

func (e *entry) key() frontKey {
	return frontKey{e.front.Family, e.front.Address, e.front.Port, e.service.Protocol}
}

func (d *discovery) add(e *entry) {
	if e.front.Type == NodePort {
		e.front.Accepted = d.accepted[e.front.Family]
	}
	k := e.key()
	first, ok := d.at[k]
	if !ok {
		d.at[k] = e
		d.entries = append(d.entries, e)
		return
	}
	if first.service != e.service && first.target != nil && e.target != nil && first.target != e.target {
		d.clashes = append(d.clashes, clash{first, e.rule, e.service})
	}
}

// name tells the Service of a dispatch rule: from its comment, or, where there
// is none, from a comment in the chain that it enters, whose hash must agree.
func (d *discovery) name(a asked, target string, c *netfilter.Chain) ServicePort {
	word, _, _ := strings.Cut(a.comment, " ")
	if s, ok := parseServicePort(word, a.protocol); ok {
		return s
	}
	hash := chainHash(target)
	if s, ok := d.names[hash]; ok && hash != "" && s.Protocol == a.protocol {
		return s
	}
	if c != nil && hash != "" {
		for i := range c.Len() {
			for word := range strings.FieldsSeq(c.Comment(i)) {
				if s, ok := parseServicePort(word, a.protocol); ok && s.hash("") == hash {
					d.names[hash] = s
					return s
				}
			}
		}
	}
	if target == "" {
		target = a.comment
	}
	return ServicePort{Name: target, Protocol: a.protocol}
}

// chainHash returns the hash in the name of a Service's chain, or "".
func chainHash(name string) string {
	for _, prefix := range []string{"KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-"} {
		if h, ok := strings.CutPrefix(name, prefix); ok && len(h) == 16 {
			return h
		}
	}
	for _, prefix := range []string{"service-", "local-", "external-", "firewall-"} { // service-ULMVA6XW-ns/name/tcp/port
		if h, ok := strings.CutPrefix(name, prefix); ok && len(h) > 8 && h[8] == '-' {
			return h
		}
	}
	return ""
}

// frontendType tells the type of an address from kube-proxy's comment, or,
// without one, from the chain that it leads to.
func frontendType(comment, target string) FrontendType {
	switch {
	case strings.HasSuffix(comment, " cluster IP"):
		return ClusterIP
	case strings.HasSuffix(comment, " external IP"):
		return ExternalIP
	case strings.HasSuffix(comment, " loadbalancer IP"):
		return LoadBalancer
	case strings.HasPrefix(target, "KUBE-FW-"):
		return LoadBalancer
	case strings.HasPrefix(target, "KUBE-EXT-"), strings.HasPrefix(target, "KUBE-XLB-"):
		return ExternalIP
	}
	return ClusterIP
}

// onlyMarks reports whether a chain does nothing but set marks.
func onlyMarks(c *netfilter.Chain) bool {
	for i := range c.Len() {
		for _, e := range c.Rule(i) {
			if !e.IsMatch() && e.Kind != netfilter.SetMark {
				return false
			}
		}
	}
	return c.Len() > 0 || strings.HasPrefix(c.Name, "KUBE-MARK-")
}

// resolver walks the frontends, one after the other.
type resolver struct {
	view    *View
	run     run
	scratch []Endpoint // of the route being worked out
	// Which sources stand for a range among others: Services mostly have the same.
	sources map[netip.Prefix]standIns
	// Of the frontend being worked out; special are those for particular sources.
	routes, special []Route
}

// resolve walks a frontend for every source class, and for every source range
// that the rules on the way single out.
func (x *resolver) resolve(e *entry) {
	x.run.tracks.begin()
	x.run.spreads = x.run.spreads[:0]
	routes, special := x.routes[:0], x.special[:0]
	defer func() {
		e.routes = slices.Concat(routes, special)
		e.trail = x.run.tracks.trail(e.routes)
		x.routes, x.special = routes, special
	}()
	to := netip.AddrPortFrom(e.front.Address, e.front.Port)
	if e.front.Type == NodePort {
		to = netip.AddrPortFrom(x.nodeAddress(e.front), e.front.Port)
	}
	var ranges []netip.Prefix
	var of [3]int // the route of each class
	for i, class := range Classes {
		packet, ok := x.view.Packet(class, to, e.service.Protocol)
		if !ok {
			return
		}
		route := x.walk(e, packet, class, nil)
		ranges = x.addRanges(ranges)
		routes, of[i] = x.addRoute(routes, route)
	}
	for i := 0; i < len(ranges); i++ {
		p := ranges[i]
		for _, source := range x.standIns(p, ranges) {
			packet, class := x.view.PacketFrom(source, to, e.service.Protocol)
			if general, _ := x.view.Packet(class, to, e.service.Protocol); p.Contains(general.Source) {
				continue // the class as a whole was walked with such a source
			}
			route := x.walk(e, packet, class, []netip.Prefix{p})
			ranges = x.addRanges(ranges)
			if !sameFate(routes[of[slices.Index(Classes, class)]], route) {
				special, _ = x.addRoute(special, route)
			}
		}
	}
}

// addRanges appends the source ranges that the last walk met. That rules tell
// loopback addresses from others is no matter of a Service's clients.
func (x *resolver) addRanges(ranges []netip.Prefix) []netip.Prefix {
	for _, s := range x.run.sensitive {
		if !s.prefix.Addr().IsLoopback() && !slices.Contains(ranges, s.prefix) {
			ranges = append(ranges, s.prefix)
		}
	}
	return ranges
}

// standIns are the addresses that stand for a range among others.
type standIns struct {
	among   []netip.Prefix
	sources []netip.Addr
}

// standIns is View.standIns, which is asked only once as long as ranges are alike.
func (x *resolver) standIns(p netip.Prefix, ranges []netip.Prefix) []netip.Addr {
	if known, ok := x.sources[p]; ok && slices.Equal(known.among, ranges) {
		return known.sources
	}
	if x.sources == nil || len(x.sources) >= mostSources {
		x.sources = map[netip.Prefix]standIns{}
	}
	of := standIns{slices.Clone(ranges), x.view.standIns(p, ranges)}
	x.sources[p] = of
	return of.sources
}

// mostSources bounds what a resolver remembers of source ranges.
const mostSources = 256

// standIns returns an address of the range for each source class that has any
// there, outside the narrower ranges that rules ask for as well.
func (v *View) standIns(p netip.Prefix, ranges []netip.Prefix) []netip.Addr {
	narrower := func(q netip.Prefix) bool { return q.Bits() > p.Bits() && p.Contains(q.Addr()) }
	candidates := []netip.Addr{p.Addr().Next(), p.Addr(), netfilter.SpanOf(p).To}
	var inner []netip.Prefix
	for _, list := range [][]netip.Prefix{ranges, v.node.PodCIDRs} {
		for _, q := range list {
			if narrower(q) {
				inner = append(inner, q)
				candidates = append(candidates, netfilter.SpanOf(q).To.Next(), q.Addr().Prev(), q.Addr().Next())
			}
		}
	}
	for _, a := range v.node.Local {
		candidates = append(candidates, a.Next())
	}
	var out []netip.Addr
	seen := map[Class]bool{}
	for _, a := range candidates {
		if !a.IsValid() || !p.Contains(a) {
			continue
		}
		class := v.node.classOf(a)
		hidden := slices.ContainsFunc(inner, func(q netip.Prefix) bool {
			return q.Contains(a) && !(class == Pod && slices.Contains(v.node.PodCIDRs, q))
		})
		if !hidden && !seen[class] {
			seen[class] = true
			out = append(out, a)
		}
	}
	return out
}

// nodeAddress returns the address at which a NodePort is tried.
func (x *resolver) nodeAddress(f Frontend) netip.Addr {
	main := x.view.node.address(f.Family)
	if len(f.Accepted) == 0 || slices.Contains(f.Accepted, main) {
		return main
	}
	for _, a := range f.Accepted {
		if x.view.node.isLocal(a) && !a.IsLoopback() {
			return a
		}
	}
	return f.Accepted[0]
}

// addRoute appends a route, or puts its sources to one with the same answer.
// It returns which one that is.
func (x *resolver) addRoute(routes []Route, r Route) ([]Route, int) {
	for i := range routes {
		if !sameFate(routes[i], r) || len(routes[i].Sources) > 0 && !slices.Equal(routes[i].From, r.From) {
			continue
		}
		if len(r.Sources) > 0 {
			routes[i].Sources = append(routes[i].Sources, r.Sources...)
		} else {
			routes[i].From = append(routes[i].From, r.From...)
		}
		return routes, i
	}
	if i := slices.IndexFunc(routes, func(o Route) bool {
		return sameList(o.Endpoints, r.Endpoints) || slices.Equal(o.Endpoints, r.Endpoints)
	}); i >= 0 {
		r.Endpoints = routes[i].Endpoints
	} else if sameList(r.Endpoints, x.scratch) {
		r.Endpoints = slices.Clone(r.Endpoints)
	}
	return append(routes, r), len(routes)
}

// sameFate reports whether two routes say the same.
func sameFate(a, b Route) bool {
	return a.Verdict == b.Verdict && a.Masquerade == b.Masquerade && a.Undelivered.Cmp(b.Undelivered) == 0 &&
		(sameList(a.Endpoints, b.Endpoints) || slices.EqualFunc(a.Endpoints, b.Endpoints, sameEndpoint)) && slices.Equal(a.Unknown, b.Unknown)
}

// sameList reports whether two routes have one list.
func sameList(a, b []Endpoint) bool { return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0]) }

func sameEndpoint(p, q Endpoint) bool {
	return p.Address == q.Address && p.Unmasqueraded == q.Unmasqueraded && p.Share.Cmp(q.Share) == 0 && p.Max.Cmp(q.Max) == 0
}

// walk follows one packet to a frontend and sums up what becomes of it.
func (x *resolver) walk(e *entry, p netfilter.Packet, class Class, sources []netip.Prefix) Route {
	r := &x.run
	r.reset(p)
	r.class = class
	r.natOnly, r.collect, r.watch = true, true, e.target
	worlds := x.view.explore(r)
	if e.affinity == 0 {
		e.affinity = r.affinity
	}
	only := slices.Index(Classes, class)
	route := Route{From: Classes[only : only+1 : only+1], Sources: sources} // shared: appending to it makes a copy
	if len(worlds) == 1 {
		x.deliver(&route, worlds[0].ends)
		for i := range worlds[0].ends {
			switch s := &worlds[0].ends[i]; s.verdict {
			case Reject:
				route.Rejected = route.Rejected.plus(s.share)
			case Drop:
				route.Dropped = route.Dropped.plus(s.share)
			}
		}
	} else {
		route.Endpoints, route.Undelivered = bounds(worlds)
		route.masquerade()
		route.Unknown = influential(worlds, false)
	}
	route.Unknown = slices.Concat(route.Unknown, r.ignored, r.unresolved)
	if len(r.ignored) > 0 { // they might do anything
		for i := range route.Endpoints {
			route.Endpoints[i].Share, route.Endpoints[i].Max = Share{}, whole()
		}
		route.Undelivered = whole()
	}
	route.Verdict = sumUp(worlds)
	e.facts.add(x.view, class, sources, worlds, r)
	return route
}

// deliver sets the endpoints of a route that was walked once.
func (x *resolver) deliver(route *Route, ends []end) {
	if len(ends) == 1 && ends[0].many != nil && ends[0].verdict == DNAT && len(x.run.ignored) == 0 {
		route.Endpoints, route.Masquerade = ends[0].many.list(), ends[0].has(masqueraded)
		return
	}
	x.scratch, route.Undelivered = endpoints(x.scratch[:0], ends)
	route.Endpoints = x.scratch
	route.masquerade()
}

// masquerade sums up of which endpoints it holds.
func (r *Route) masquerade() {
	r.Masquerade = slices.ContainsFunc(r.Endpoints, func(ep Endpoint) bool { return !ep.Unmasqueraded })
	for i := range r.Endpoints {
		r.Endpoints[i].Unmasqueraded = r.Masquerade && r.Endpoints[i].Unmasqueraded
	}
}

// sumUp returns the one verdict of all ends, or mixed.
func sumUp(worlds []world) RouteVerdict {
	var sum RouteVerdict
	for _, w := range worlds {
		for i := range w.ends {
			v := RouteVerdict(w.ends[i].verdict)
			if w.ends[i].verdict == Accept {
				v = RouteNone
			}
			if sum != "" && sum != v {
				return RouteMixed
			}
			sum = v
		}
	}
	return sum
}

// endpoints sums up the ends of one walk by address, appending to list; whether the
// route's connections are masqueraded is not known then, so each endpoint tells.
func endpoints(list []Endpoint, ends []end) (_ []Endpoint, undelivered Share) {
	for i := range ends {
		s := &ends[i]
		if s.verdict != DNAT {
			undelivered = undelivered.plus(s.share)
			continue
		}
		if s.many != nil {
			for _, ep := range s.many.list() {
				ep.Unmasqueraded = !s.has(masqueraded)
				list = append(list, ep)
			}
			continue
		}
		to := s.to
		if s.has(unresolvedTo) {
			to = netip.AddrPort{}
		}
		list = append(list, Endpoint{Address: to, Share: s.share, Max: s.share, Unmasqueraded: !s.has(masqueraded), Chain: s.by.Chain.Name})
	}
	return merge(list), undelivered
}

// merge sorts endpoints by address, and makes one of those that share it: a pod may
// be reached through two chains. It takes over the slice.
func merge(list []Endpoint) []Endpoint {
	slices.SortStableFunc(list, func(a, b Endpoint) int { return a.Address.Compare(b.Address) })
	out := list[:0]
	for _, ep := range list {
		if n := len(out); n > 0 && out[n-1].Address == ep.Address {
			out[n-1].Share = out[n-1].Share.plus(ep.Share)
			out[n-1].Max = out[n-1].Share
			out[n-1].Unmasqueraded = out[n-1].Unmasqueraded && ep.Unmasqueraded
			continue
		}
		out = append(out, ep)
	}
	return out
}

// bounds sums up the walks of several worlds: each endpoint's least and
// greatest share, and the greatest share that may stay undelivered.
func bounds(worlds []world) (list []Endpoint, undelivered Share) {
	at := map[netip.AddrPort]int{}
	seen := map[netip.AddrPort]int{}
	for _, w := range worlds {
		eps, lost := endpoints(nil, w.ends)
		if lost.Cmp(undelivered) > 0 {
			undelivered = lost
		}
		for _, ep := range eps {
			i, ok := at[ep.Address]
			if !ok {
				at[ep.Address] = len(list)
				list = append(list, ep)
				i = len(list) - 1
			}
			seen[ep.Address]++
			if ep.Share.Cmp(list[i].Share) < 0 {
				list[i].Share = ep.Share
			}
			if ep.Max.Cmp(list[i].Max) > 0 {
				list[i].Max = ep.Max
			}
		}
	}
	for i := range list {
		if seen[list[i].Address] < len(worlds) {
			list[i].Share = Share{}
		}
	}
	slices.SortStableFunc(list, func(a, b Endpoint) int { return a.Address.Compare(b.Address) })
	return list, undelivered
}
