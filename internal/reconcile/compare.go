package reconcile

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/natlens/natlens/internal/desired"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
)

// The findings that comparing gives.
const (
	ServiceMissing  chain.Code = "ServiceMissing"  // no rule for a Service port
	ServiceStale    chain.Code = "ServiceStale"    // rules for a Service port that the API does not have
	FrontendMissing chain.Code = "FrontendMissing" // an address of a Service without a rule
	FrontendStale   chain.Code = "FrontendStale"   // rules for an address that the Service does not have
	EndpointMissing chain.Code = "EndpointMissing" // an endpoint that gets no connections
	EndpointStale   chain.Code = "EndpointStale"   // connections go to what is no endpoint
	VerdictMismatch chain.Code = "VerdictMismatch" // refused in another way than wanted, or let in where not wanted
)

// Difference is one thing in which the rules and the API disagree.
type Difference struct {
	Code     chain.Code
	Severity chain.Severity
	Service  chain.ServicePort
	// About is the frontend or the endpoint that it is about, "" for the Service
	// port as a whole. Code, Service and About stay the same while it lasts.
	About   string
	Message string
	// What it rests on: rules, in the ruleset that was compared, objects of the
	// API by kind and name, and addresses.
	Rules     []chain.RuleRef
	Objects   []string
	Addresses []netip.AddrPort

	ways []way // of an endpoint, which complete the message
}

// Sides are what is compared.
type Sides struct {
	Desired    *desired.View
	Rules      *netfilter.Ruleset
	View       *chain.View
	Programmed *chain.Programmed
	// Others are further releases that kube-proxy may be of. A Service port that
	// is as one of them would have it is no difference.
	Others []desired.Release
}

// Compare lists the differences, by Service port. It lists none where the rules
// as a whole cannot be compared: then Incomparable tells why.
func Compare(s Sides) []Difference {
	if Incomparable(s) != "" {
		return nil
	}
	c := &comparison{Sides: s, at: map[place]spot{}, claims: map[place][]chain.ServicePort{}, nodePorts: map[netfilter.Family]bool{}}
	for _, f := range s.Programmed.Findings {
		c.hookless = c.hookless || f.Code == chain.HookJumpMissing
	}
	for i := range s.Programmed.Services {
		sv := &s.Programmed.Services[i]
		for j := range sv.Frontends {
			f := &sv.Frontends[j]
			c.at[placeOf(f.Family, f.Address, f.Port, sv.Protocol)] = spot{sv, f}
		}
	}
	for _, p := range s.Desired.Ports {
		for i := range p.Frontends {
			f := &p.Frontends[i]
			at := placeOf(f.Family, f.Address, f.Port, p.Protocol)
			c.claims[at] = append(c.claims[at], p.ServicePort)
		}
	}
	var out []Difference
	for _, p := range s.Desired.Ports {
		out = append(out, c.port(p)...)
	}
	return append(out, c.stale()...)
}

// Incomparable says why the rules cannot be held against the API as a whole; ""
// when they can.
func Incomparable(s Sides) string {
	for _, u := range s.Rules.Unreadable {
		if u.Backend == netfilter.BackendNFTables {
			continue // another program's
		}
		return fmt.Sprintf("table %s of %v cannot be read", u.Table, u.Family)
	}
	for _, f := range s.Programmed.Findings {
		if f.Code == chain.ProxyModeUnsupported && (f.Severity == chain.Warning || !hasKubeProxy(s.Rules, netfilter.IPv4, netfilter.IPv6)) {
			return "these rules hold no Services"
		}
	}
	return ""
}

// hasKubeProxy reports whether any chain of the families is there that kube-proxy
// alone makes. Others make table nat too.
func hasKubeProxy(rs *netfilter.Ruleset, families ...netfilter.Family) bool {
	return slices.ContainsFunc(rs.Tables, func(t *netfilter.Table) bool {
		return slices.Contains(families, t.Family) && (t.Name == "kube-proxy" || t.Lookup("KUBE-SERVICES") != nil || t.Lookup("KUBE-PROXY-CANARY") != nil)
	})
}

// place is where a frontend answers.
type place struct {
	family   netfilter.Family
	addr     netip.Addr // invalid for a NodePort
	port     uint16
	protocol netfilter.Protocol
}

func placeOf(family netfilter.Family, addr netip.Addr, port uint16, protocol netfilter.Protocol) place {
	return place{family, addr, port, protocol}
}

// spot is a frontend in the rules.
type spot struct {
	service  *chain.Service
	frontend *chain.Frontend
}

type comparison struct {
	Sides
	at       map[place]spot
	claims   map[place][]chain.ServicePort
	hookless bool // some of kube-proxy's chains are not asked
	// nodePorts says, of a family that was asked about, whether any are led to.
	nodePorts map[netfilter.Family]bool
}

// port compares one Service port. Where it differs, it may be as another release
// of kube-proxy would have it.
func (c *comparison) port(want *desired.Port) []Difference {
	out := c.compare(want, c.Desired.Release)
	if len(out) == 0 {
		return nil
	}
	for _, r := range c.Others {
		if other := c.Desired.As(r, want.ServicePort); other != nil && len(c.compare(other, r)) == 0 {
			return nil
		}
	}
	return out
}

func (c *comparison) compare(want *desired.Port, r desired.Release) []Difference {
	d := &differences{c: c, want: want, release: r}
	found, missing := 0, []*desired.Frontend(nil)
	for i := range want.Frontends {
		f := &want.Frontends[i]
		if !c.reads(f) {
			continue
		}
		have, ok := c.at[placeOf(f.Family, f.Address, f.Port, want.Protocol)]
		switch {
		case !ok || d.unasked(f, have):
			missing = append(missing, f)
		case have.service.ServicePort == want.ServicePort || have.service.Namespace == "":
			found++
			d.frontend(f, have)
		case slices.Contains(c.claims[placeOf(f.Family, f.Address, f.Port, want.Protocol)], have.service.ServicePort):
			found++ // two Services claim it, and the other one has it
		default:
			missing = append(missing, f)
		}
	}
	missing = slices.DeleteFunc(missing, func(f *desired.Frontend) bool { return c.mayLack(f, found, r) })
	switch {
	case len(missing) == 0:
	case found == 0:
		d.add(ServiceMissing, chain.Error, "", nil, nil, "no rule decides where connections to it go, though the API has it with %s", frontendList(missing))
	default:
		for _, f := range missing {
			d.add(FrontendMissing, chain.Error, name(f), nil, nil, "no rule decides where connections to %s go, though the API has it", name(f))
		}
	}
	d.affinity()
	d.staleFrontends()
	for i := range d.list {
		var ways []string
		for _, w := range d.list[i].ways {
			ways = append(ways, w.String())
		}
		d.list[i].Message += strings.Join(ways, ", ")
	}
	return d.list
}

// reads reports whether the rules are there in which a frontend would stand: a
// node without IPv6 has none of it, or none that are kube-proxy's, and neither
// may a dump.
func (c *comparison) reads(f *desired.Frontend) bool {
	if c.native(f.Family) {
		return true
	}
	// What is refused stands in filter alone, in iptables mode.
	refused := f.Fates[0].Verdict != chain.RouteDNAT && f.Fates[1].Verdict != chain.RouteDNAT && f.Fates[2].Verdict != chain.RouteDNAT
	return c.has(f.Family, "nat") && (!refused || c.has(f.Family, "filter")) && hasKubeProxy(c.Rules, f.Family)
}

// native reports whether kube-proxy's nftables mode writes the rules of a family.
func (c *comparison) native(family netfilter.Family) bool { return c.has(family, "kube-proxy") }

func (c *comparison) has(family netfilter.Family, table string) bool {
	return slices.ContainsFunc(c.Rules.Tables, func(t *netfilter.Table) bool { return t.Family == family && t.Name == table })
}

// mayLack reports whether kube-proxy may have been told to leave a frontend out:
// external IPs can be switched off from v1.36 on (AllowServiceExternalIPs), and
// worked for some sources only in v1.20.
func (c *comparison) mayLack(f *desired.Frontend, found int, r desired.Release) bool {
	if f.Type == chain.NodePort {
		return !c.leadsToNodePorts(f.Family)
	}
	return f.Type == chain.ExternalIP && (r.BridgedExternal() || r >= 36 && found > 0 && !c.anyExternal())
}

// leadsToNodePorts reports whether any rule does: none does where kube-proxy's
// --nodeport-addresses fits no address of the node.
func (c *comparison) leadsToNodePorts(family netfilter.Family) bool {
	on, asked := c.nodePorts[family]
	if !asked {
		on = c.anyNodePort(family) || slices.ContainsFunc(c.Rules.Tables, func(t *netfilter.Table) bool {
			return t.Family == family && t.Name == "nat" && jumps(t, "KUBE-SERVICES", "KUBE-NODEPORTS")
		})
		c.nodePorts[family] = on
	}
	return on
}

// anyNodePort reports whether connections to any NodePort reach an endpoint.
func (c *comparison) anyNodePort(family netfilter.Family) bool {
	for at, s := range c.at {
		if at.family == family && s.frontend.Type == chain.NodePort && slices.ContainsFunc(s.frontend.Routes, func(r chain.Route) bool { return len(r.Endpoints) > 0 }) {
			return true
		}
	}
	return false
}

// jumps reports whether a chain of a table has a jump to another.
func jumps(t *netfilter.Table, from, to string) bool {
	ch := t.Lookup(from)
	if ch == nil {
		return false
	}
	for i := range ch.Len() {
		for _, e := range ch.Rule(i) {
			if e.Kind == netfilter.Jump && t.ChainName(netfilter.ChainID(e.A)) == to {
				return true
			}
		}
	}
	return false
}

// goesOn reports whether all connections to a frontend go on as if there were no
// Service.
func goesOn(f *chain.Frontend) bool {
	return !slices.ContainsFunc(f.Routes, func(r chain.Route) bool { return len(r.Endpoints) > 0 || r.Verdict != chain.RouteNone })
}

// anyExternal reports whether any Service has a rule for an external IP.
func (c *comparison) anyExternal() bool {
	for at, s := range c.at {
		if s.frontend.Type == chain.ExternalIP && at.addr.IsValid() {
			return true
		}
	}
	return false
}

// stale lists the Service ports in the rules that the API does not have.
func (c *comparison) stale() []Difference {
	var out []Difference
	for i := range c.Programmed.Services {
		sv := &c.Programmed.Services[i]
		if c.Desired.Has(sv.ServicePort) {
			continue // port has looked at its frontends
		}
		var fronts []string
		var rules []chain.RuleRef
		for j := range sv.Frontends {
			f := &sv.Frontends[j]
			if sv.Namespace == "" && len(c.claims[placeOf(f.Family, f.Address, f.Port, sv.Protocol)]) > 0 {
				continue // only its name is not known
			}
			fronts = append(fronts, f.String())
			rules = append(rules, c.Programmed.Rules(*f, sv.Protocol)...)
		}
		if len(fronts) > 0 {
			out = append(out, Difference{
				Code: ServiceStale, Severity: chain.Warning, Service: sv.ServicePort, Rules: rules,
				Message: fmt.Sprintf("%s: the rules still handle connections to it, though the API has no such Service port", strings.Join(fronts, ", ")),
			})
		}
	}
	return out
}

// differences collects those of one Service port.
type differences struct {
	c       *comparison
	want    *desired.Port
	release desired.Release
	list    []Difference
}

func (d *differences) add(code chain.Code, s chain.Severity, about string, rules []chain.RuleRef, addresses []netip.AddrPort, format string, args ...any) {
	d.list = append(d.list, Difference{
		Code: code, Severity: s, Service: d.want.ServicePort, About: about, Message: fmt.Sprintf(format, args...), Rules: rules,
		Objects: []string{"Service " + d.want.Namespace + "/" + d.want.Name}, Addresses: addresses,
	})
}

// frontend compares where connections to one frontend go.
func (d *differences) frontend(f *desired.Frontend, have spot) {
	if d.explained(have) || f.Type == chain.ExternalIP && d.release.BridgedExternal() {
		return
	}
	if f.Type == chain.NodePort && !d.c.leadsToNodePorts(f.Family) {
		return // what refuses it may be there nevertheless
	}
	for i := range have.frontend.Routes {
		r := &have.frontend.Routes[i]
		for _, class := range r.From {
			if len(r.Sources) == 0 {
				if source, ok := d.source(f, class); !ok || allowed(f, source) {
					d.route(f, have, r, class)
				} else {
					d.shutOut(f, have, r, classText(class))
				}
				continue
			}
			if len(f.Sources) == 0 {
				continue // rules of somebody else's tell these sources apart
			}
			for _, p := range r.Sources {
				if p.IsSingleIP() && p.Addr() == f.Address {
					continue // the node's own, where it has the load balancer's address (allowFromNode in kube-proxy)
				}
				switch within(p, f.Sources) {
				case yes:
					d.route(f, have, r, class)
				case no:
					d.shutOut(f, have, r, p.String())
				}
			}
		}
	}
	for _, p := range f.Sources {
		d.letIn(f, have, p)
	}
}

// unasked reports whether a frontend is in the rules in name only: connections
// that are to reach an endpoint go on as if there were no Service. Where they
// fail on the way to the only endpoint, that one is missing.
func (d *differences) unasked(f *desired.Frontend, have spot) bool {
	if len(f.Fates[1].Endpoints) == 1 && d.has(have, chain.FallThrough) {
		return false
	}
	return len(have.frontend.Routes) > 0 && goesOn(have.frontend) && len(f.Fates[1].Endpoints) > 0 && !d.c.hookless && !d.explained(have) && !fits(&have.frontend.Routes[0], f.Fates[2], chain.External, d.release)
}

// explained reports whether a finding about the rules alone says why
// connections to a frontend go elsewhere.
func (d *differences) explained(have spot) bool {
	return d.has(have, chain.ForeignRule, chain.NotTracked, chain.ChainMissing, chain.FrontendConflict)
}

// has reports whether there is a finding of the rules alone about a frontend.
func (d *differences) has(have spot, codes ...chain.Code) bool {
	about := have.frontend.String()
	return slices.ContainsFunc(have.service.Findings, func(f chain.Finding) bool {
		return f.About == about && slices.Contains(codes, f.Code)
	})
}

// source is the address that stands for a class, as the walk had it.
func (d *differences) source(f *desired.Frontend, class chain.Class) (netip.Addr, bool) {
	if len(f.Sources) == 0 {
		return netip.Addr{}, false
	}
	p, ok := d.c.View.Packet(class, netip.AddrPortFrom(f.Address, f.Port), d.want.Protocol)
	return p.Source, ok
}

func allowed(f *desired.Frontend, a netip.Addr) bool {
	return slices.ContainsFunc(f.Sources, func(p netip.Prefix) bool { return p.Contains(a) })
}

type answer int

const (
	no answer = iota
	yes
	partly
)

// within tells whether a range lies in others.
func within(p netip.Prefix, list []netip.Prefix) answer {
	out := no
	for _, q := range list {
		switch {
		case q.Bits() <= p.Bits() && q.Contains(p.Addr()):
			return yes
		case q.Overlaps(p):
			out = partly
		}
	}
	return out
}

// route compares one route with the fate of its class.
func (d *differences) route(f *desired.Frontend, have spot, r *chain.Route, class chain.Class) {
	fates := d.fates(f, class)
	if d.c.hookless && len(r.Endpoints) == 0 && (r.Verdict == chain.RouteNone || len(fates[0].Endpoints) > 0) {
		return // the kernel does not ask kube-proxy's rules for this class
	}
	best := -1
	for i, fate := range fates {
		if fits(r, fate, class, d.release) {
			return
		}
		if best < 0 && len(r.Endpoints) > 0 == (len(fate.Endpoints) > 0) {
			best = i
		}
	}
	fate := fates[max(best, 0)]
	missing, stale := apart(fate.Endpoints, r)
	for _, a := range missing {
		d.endpoint(EndpointMissing, a, class, have, r)
	}
	for _, a := range stale {
		d.endpoint(EndpointStale, a, class, have, r)
	}
	refused := r.Verdict == chain.RouteReject || r.Verdict == chain.RouteDrop
	asOthers := f.Local && r.Verdict == f.Fates[2].Verdict // the rule that refuses has its place there
	if len(r.Endpoints) == 0 && (len(fate.Endpoints) == 0 || refused && !asOthers) {
		d.verdict(f, have, fmt.Sprintf("connections from %s are %s, but are to be %s", classText(class), verdictText(r.Verdict), verdictText(fate.Verdict)))
	}
}

// fates lists what may become of a class: the first is what is wanted. Whether
// kube-proxy can tell this node's pods from other machines is its configuration's
// matter (--detect-local-mode).
func (d *differences) fates(f *desired.Frontend, class chain.Class) []desired.Fate {
	i := slices.Index(chain.Classes, class)
	out := []desired.Fate{f.Fates[i]}
	dropsOwn := len(f.Fates[2].Endpoints) == 0 && d.release.DropsOwn() && d.c.native(f.Family)
	if f.Local && (class == chain.Pod || class == chain.Host && dropsOwn) {
		out = append(out, f.Fates[2])
	}
	return out
}

// fits reports whether a route does what is wanted.
func fits(r *chain.Route, fate desired.Fate, class chain.Class, release desired.Release) bool {
	missing, stale := apart(fate.Endpoints, r)
	if len(missing) > 0 || len(stale) > 0 {
		return false
	}
	if len(fate.Endpoints) > 0 || len(r.Endpoints) > 0 {
		return true // what falls through has a finding of its own
	}
	switch {
	case r.Verdict == fate.Verdict, len(r.Unknown) > 0, r.Verdict == chain.RouteMixed:
		return true
	case class == chain.Host && r.Verdict == chain.RouteNone:
		return true // OUTPUT does not ask KUBE-EXTERNAL-SERVICES
	case fate.Verdict == chain.RouteDrop && release.LeavesDrops():
		return r.Verdict == chain.RouteNone
	}
	return false
}

// apart returns the endpoints that a route surely lacks, and those that it has
// too many.
func apart(want []netip.AddrPort, r *chain.Route) (missing, stale []netip.AddrPort) {
	i := 0
	for _, e := range r.Endpoints {
		if !e.Address.IsValid() {
			return nil, nil // one of a range of addresses
		}
		for i < len(want) && want[i].Compare(e.Address) < 0 {
			missing = append(missing, want[i])
			i++
		}
		switch {
		case i < len(want) && want[i] == e.Address:
			i++
			if e.Max.IsZero() {
				missing = append(missing, e.Address)
			}
		case !e.Share.IsZero():
			stale = append(stale, e.Address)
		}
	}
	return append(missing, want[i:]...), stale
}

// endpoint adds an endpoint that is missing or stale, or one more way in which
// it is.
func (d *differences) endpoint(code chain.Code, a netip.AddrPort, class chain.Class, have spot, r *chain.Route) {
	about := a.String()
	w := way{have.frontend.String(), []chain.Class{class}}
	for i := range d.list {
		if o := &d.list[i]; o.Code == code && o.About == about {
			o.ways = addWay(o.ways, w)
			return
		}
	}
	rules := d.c.Programmed.Rules(*have.frontend, have.service.Protocol)
	why := "the API has it among the endpoints for this node, but no connection goes to it: "
	if code == EndpointStale {
		why = d.c.Desired.WhyNot(d.want.ServicePort, a) + ", but connections still go to it: "
		rules = append(rules, d.c.endpointRules(rules, a, r)...)
	}
	d.add(code, chain.Error, about, rules, []netip.AddrPort{a}, "%s: %s", about, why)
	last := &d.list[len(d.list)-1]
	last.ways = []way{w}
	for _, name := range d.c.Desired.SlicesOf(d.want.ServicePort) {
		last.Objects = append(last.Objects, "EndpointSlice "+name)
	}
}

// way is how an endpoint is, or is not, reached.
type way struct {
	frontend string
	classes  []chain.Class
}

func addWay(ways []way, w way) []way {
	for i := range ways {
		if ways[i].frontend == w.frontend {
			if !slices.Contains(ways[i].classes, w.classes[0]) {
				ways[i].classes = append(ways[i].classes, w.classes...)
			}
			return ways
		}
	}
	return append(ways, w)
}

// String returns "ClusterIP 10.96.0.1:80 from pods of this node and outside".
func (w way) String() string {
	if len(w.classes) == len(chain.Classes) {
		return w.frontend + " from anywhere"
	}
	var from []string
	for _, c := range w.classes {
		from = append(from, classText(c))
	}
	return w.frontend + " from " + strings.Join(from, " and ")
}

// endpointRules returns the rules of the chain that sends to an endpoint.
func (c *comparison) endpointRules(dispatch []chain.RuleRef, a netip.AddrPort, r *chain.Route) []chain.RuleRef {
	i := slices.IndexFunc(r.Endpoints, func(e chain.Endpoint) bool { return e.Address == a })
	if i < 0 || len(dispatch) == 0 {
		return nil
	}
	t := dispatch[0].Table
	ch := t.Lookup(r.Endpoints[i].Chain)
	if ch == nil || !strings.HasPrefix(ch.Name, "KUBE-SEP-") {
		return nil
	}
	var out []chain.RuleRef
	for n := range ch.Len() {
		out = append(out, chain.RuleRef{Table: t, Chain: ch, Index: n})
	}
	return out
}

// shutOut wants a route to let nobody in: its sources are outside the ranges.
func (d *differences) shutOut(f *desired.Frontend, have spot, r *chain.Route, who string) {
	for _, e := range r.Endpoints {
		if !e.Share.IsZero() {
			d.verdict(f, have, "connections from "+who+" are let in, though "+rangeText(f)+" leave them out")
			return
		}
	}
}

// letIn wants the sources of a range to be let in, where any are.
func (d *differences) letIn(f *desired.Frontend, have spot, p netip.Prefix) {
	if len(f.Fates[2].Endpoints) == 0 || d.c.hookless {
		return
	}
	for i := range have.frontend.Routes {
		r := &have.frontend.Routes[i]
		if len(r.Endpoints) > 0 && (len(r.Sources) == 0 || within(p, r.Sources) != no || slices.ContainsFunc(r.Sources, p.Overlaps)) {
			return
		}
	}
	d.verdict(f, have, "connections from "+p.String()+" are not let in, though "+rangeText(f)+" allow them")
}

func rangeText(f *desired.Frontend) string {
	return fmt.Sprintf("its loadBalancerSourceRanges %v", f.Sources)
}

// verdict adds a frontend that lets the wrong connections in, or refuses them in
// a wrong way.
func (d *differences) verdict(f *desired.Frontend, have spot, what string) {
	about := name(f)
	for i := range d.list {
		if o := &d.list[i]; o.Code == VerdictMismatch && o.About == about {
			if !strings.Contains(o.Message, what) {
				o.Message += "; " + what
			}
			return
		}
	}
	d.add(VerdictMismatch, chain.Error, about, d.c.Programmed.Rules(*have.frontend, have.service.Protocol), nil, "%s: %s", about, what)
}

// affinity compares session affinity, which stands in the rules of a Service
// with endpoints only.
func (d *differences) affinity() {
	var have *chain.Service
	for i := range d.want.Frontends {
		f := &d.want.Frontends[i]
		s, ok := d.c.at[placeOf(f.Family, f.Address, f.Port, d.want.Protocol)]
		if !ok || s.service.ServicePort != d.want.ServicePort || d.explained(s) {
			continue
		}
		for j := range s.frontend.Routes {
			if len(s.frontend.Routes[j].Endpoints) > 0 {
				have = s.service
			}
		}
	}
	if have != nil && have.AffinitySeconds != d.want.AffinitySeconds {
		d.add(chain.AffinityMismatch, chain.Warning, "", nil, nil, "the rules have %s, the API wants %s", affinityText(have.AffinitySeconds), affinityText(d.want.AffinitySeconds))
	}
}

func affinityText(seconds int) string {
	if seconds == 0 {
		return "no session affinity"
	}
	return fmt.Sprintf("ClientIP session affinity of %d s", seconds)
}

// staleFrontends lists the frontends that the rules have for this port and the
// API does not.
func (d *differences) staleFrontends() {
	have := d.c.Programmed.Service(d.want.ServicePort)
	if have == nil {
		return
	}
	for i := range have.Frontends {
		f := &have.Frontends[i]
		wanted := slices.ContainsFunc(d.want.Frontends, func(w desired.Frontend) bool {
			return w.Family == f.Family && w.Address == f.Address && w.Port == f.Port
		})
		if !wanted {
			d.add(FrontendStale, chain.Warning, f.String(), d.c.Programmed.Rules(*f, have.Protocol), nil,
				"%s: the rules still handle connections to it, though the Service has no such address and port", f)
		}
	}
}

func name(f *desired.Frontend) string {
	return chain.Frontend{Type: f.Type, Address: f.Address, Port: f.Port}.String()
}

func frontendList(list []*desired.Frontend) string {
	var out []string
	for _, f := range list {
		out = append(out, name(f))
	}
	return strings.Join(out, ", ")
}

func classText(c chain.Class) string {
	switch c {
	case chain.Pod:
		return "pods of this node"
	case chain.Host:
		return "the node itself"
	}
	return "outside"
}

func verdictText(v chain.RouteVerdict) string {
	switch v {
	case chain.RouteReject:
		return "rejected"
	case chain.RouteDrop:
		return "dropped"
	case chain.RouteDNAT:
		return "sent to an endpoint"
	case chain.RouteNone:
		return "left to go on as if there were no Service"
	}
	return "refused in different ways"
}
