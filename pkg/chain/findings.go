package chain

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/natlens/natlens/pkg/netfilter"
)

// Code names a kind of finding; docs/findings.md explains each.
type Code string

// The findings that the rules alone give.
const (
	SharesUneven         Code = "SharesUneven"         // endpoints of one route get different shares
	FallThrough          Code = "FallThrough"          // connections pass a Service's chains and reach no endpoint
	RuleUnreachable      Code = "RuleUnreachable"      // an endpoint's rule stands behind one that takes everything
	HookJumpMissing      Code = "HookJumpMissing"      // kube-proxy's chains are there, but the kernel never enters them
	MasqueradeMissing    Code = "MasqueradeMissing"    // marked for masquerading, but it does not happen
	ForeignRule          Code = "ForeignRule"          // a rule that kube-proxy does not write decides
	NotTracked           Code = "NotTracked"           // taken out of conntrack, so that nat is never asked
	BackendConflict      Code = "BackendConflict"      // two of kube-proxy's backends or modes hold Services
	UnknownMatch         Code = "UnknownMatch"         // the answer depends on a match that cannot be decided
	RulesUnreadable      Code = "RulesUnreadable"      // rules exist that cannot be read
	ProxyModeUnsupported Code = "ProxyModeUnsupported" // Services are handled elsewhere than in these rules
	ChainMissing         Code = "ChainMissing"         // a jump that the kernel would refuse
	FrontendConflict     Code = "FrontendConflict"     // two Services on one address and port
	RulesMissing         Code = "RulesMissing"         // a part of kube-proxy's rules is gone
	EndpointBroken       Code = "EndpointBroken"       // an endpoint's chain does not send to it
	AffinityMismatch     Code = "AffinityMismatch"     // session affinity is not the same for all endpoints; package reconcile says also: not what the API wants
)

// Severity grades a finding.
type Severity string

// The severities: errors cost connections, warnings may, infos explain.
const (
	Error   Severity = "error"
	Warning Severity = "warning"
	Info    Severity = "info"
)

// Finding is something odd in the rules, with the rules that show it.
type Finding struct {
	Code     Code
	Severity Severity
	Service  *ServicePort // nil when it is about the node
	// About is what of the Service or the node it is about, such as a frontend
	// or a chain. It stays the same while the finding lasts.
	About   string
	Message string // one sentence for people
	Rules   []RuleRef
}

// facts are what the walks to one frontend saw, for findings.
type facts struct {
	fell      []fall
	bypassed  []RuleRef // foreign rules that decided before the Service's own
	untracked []RuleRef
	dropped   []RuleRef // foreign rules that drop what is on its way to an endpoint
	unmarked  bool      // marked for masquerading, but not masqueraded
	broken    []RuleRef
}

// none reports whether nothing odd was seen.
func (f *facts) none() bool {
	return len(f.fell)+len(f.bypassed)+len(f.untracked)+len(f.dropped)+len(f.broken) == 0 && !f.unmarked
}

// fall is a share that passed a Service's chains without an endpoint.
type fall struct {
	classes []Class
	sources []netip.Prefix // none for the classes as a whole
	share   Share
}

func (f *facts) add(v *View, class Class, sources []netip.Prefix, worlds []world, r *run) {
	for _, ref := range r.broken {
		f.broken = appendNew(f.broken, ref)
	}
	if len(worlds) == 1 { // a finding must not hang on what could not be decided
		f.addEnds(v, class, sources, worlds[0].ends, r)
	}
}

func (f *facts) addEnds(v *View, class Class, sources []netip.Prefix, ends []end, r *run) {
	var lost Share
	for i := range ends {
		s := &ends[i]
		switch {
		case s.has(notTracked):
			f.untracked = appendNew(f.untracked, s.by)
		case (s.verdict == Drop || s.verdict == Reject) && s.has(rewritten) && s.has(viaDispatch) && s.ended.Chain != nil && !strings.HasPrefix(s.ended.Chain.Name, "KUBE-"):
			f.dropped = appendNew(f.dropped, s.ended)
		case r.watch != nil && !s.has(viaDispatch) && (s.verdict == DNAT || s.has(shadowed)):
			f.bypassed = appendNew(f.bypassed, s.by)
		case s.verdict == DNAT && !s.has(masqueraded) && s.mark&r.family.masquerade != 0 && (class == Host || !v.node.isLocal(s.to.Addr())):
			f.unmarked = true
		case (s.verdict == None || s.verdict == Accept) && s.has(viaDispatch) && s.mark&r.family.drop == 0:
			lost = lost.plus(s.share)
		}
	}
	if !lost.IsZero() {
		f.addFall(fall{[]Class{class}, sources, lost})
	}
}

// addFall notes a fall, together with one of the same share if there is any.
func (f *facts) addFall(l fall) {
	for i := range f.fell {
		have := &f.fell[i]
		if have.share.Cmp(l.share) != 0 || len(have.sources) > 0 && len(l.sources) == 0 {
			continue
		}
		if len(have.sources) == 0 && len(l.sources) > 0 {
			if slices.Contains(have.classes, l.classes[0]) {
				return // the class as a whole fares so
			}
			continue
		}
		have.sources = append(have.sources, l.sources...)
		if !slices.Contains(have.classes, l.classes[0]) {
			have.classes = append(have.classes, l.classes[0])
		}
		return
	}
	f.fell = append(f.fell, l)
}

func appendNew(list []RuleRef, ref RuleRef) []RuleRef {
	if slices.Contains(list, ref) {
		return list
	}
	return append(list, ref)
}

// find adds the findings to what was resolved. It looks again only at what has
// changed since last, if that is known.
func (v *View) find(p *Programmed, d *discovery, last *Programmed, known *changes) {
	node := &finder{view: v, out: &p.Findings}
	node.unreadable()
	node.backends()
	node.hooks()
	node.missing()
	if len(p.Services) == 0 {
		node.nothing()
	} else {
		node.besides()
	}
	for _, e := range d.entries {
		if e.clean {
			continue
		}
		s := &p.Services[e.number]
		f := &finder{view: v, out: &s.Findings, service: &s.ServicePort}
		before := len(s.Findings)
		f.frontend(e, node.missingHooks)
		e.clean = len(s.Findings) == before
	}
	for _, c := range d.clashes {
		s := &p.Services[c.first.number]
		f := &finder{view: v, out: &s.Findings, service: &s.ServicePort, about: c.first.front.String()}
		f.add(FrontendConflict, Warning, []RuleRef{c.first.rule, c.rule},
			"%s is also a frontend of %s: the first rule wins, and which that is may change with every sync", c.first.front.String(), c.other)
	}
	v.scanChains(&owners{node: node, programmed: p, entries: d.entries}, last, known)
}

// finds returns how many findings there are about a frontend at most: what is not
// on every way to Services may explain some.
func (v *View) finds(e *entry) int {
	var found []Finding
	(&finder{view: v, out: &found}).frontend(e, nil)
	return len(found)
}

// finder collects findings about one Service, or about the node.
type finder struct {
	view         *View
	out          *[]Finding
	service      *ServicePort
	about        string
	missingHooks map[Class]bool // classes whose packets never enter KUBE-SERVICES
}

func (f *finder) add(code Code, s Severity, rules []RuleRef, format string, args ...any) {
	rules = slices.DeleteFunc(slices.Clone(rules), func(r RuleRef) bool { return r.Chain == nil }) // of an entry that no rule asks
	one := Finding{Code: code, Severity: s, Service: f.service, About: f.about, Message: fmt.Sprintf(format, args...), Rules: rules}
	for _, other := range *f.out {
		if other.Code == one.Code && other.Message == one.Message {
			return
		}
	}
	*f.out = append(*f.out, one)
}

func percent(share float64) string { return fmt.Sprintf("%.4g%%", 100*share) }

// dispatch returns the rules that lead to a frontend's endpoints, as evidence:
// the one that names the frontend, and the first of the chain it enters.
func (e *entry) dispatch() []RuleRef {
	if e.rule.Chain == nil {
		return nil // its element is in a map of nftables that no rule asks
	}
	const most = 16
	rules := []RuleRef{e.rule}
	if e.target != nil {
		for i := range min(e.target.Len(), most) {
			rules = append(rules, RuleRef{e.rule.Table, e.target, i})
		}
	}
	return rules
}

// frontend judges the routes of one frontend.
func (f *finder) frontend(e *entry, missing map[Class]bool) {
	var odd []Route
	for i := range e.routes {
		if r := &e.routes[i]; len(r.Unknown) > 0 || unevenness(r.Endpoints) != nil {
			odd = append(odd, *r)
		}
	}
	if len(odd) == 0 && e.facts.none() {
		return
	}
	name := e.front.String()
	f.about = name
	for _, l := range e.facts.fell {
		l.classes = slices.DeleteFunc(l.classes, func(c Class) bool { return missing[c] })
		if len(l.classes) > 0 {
			f.add(FallThrough, Error, e.dispatch(), "%s: %s of new connections from %s pass %s without reaching an endpoint, and go on as if the Service did not exist",
				name, percent(l.share.Float64()), classTexts(l.classes)+inSources(l.sources), targetName(e))
		}
	}
	for _, r := range likeRoutes(odd) {
		f.shares(name, e, r)
		if len(r.Unknown) > 0 {
			f.add(UnknownMatch, Warning, r.Unknown, "%s: where connections from %s go depends on a rule that cannot be decided", name, classTexts(r.From)+inSources(r.Sources))
		}
	}
	if len(e.facts.untracked) > 0 {
		f.add(NotTracked, Info, e.facts.untracked, "%s: a rule takes these connections out of conntrack, so that no nat rule is asked and the shares on paper are never used", name)
	}
	if len(e.facts.bypassed) > 0 {
		f.add(ForeignRule, Warning, e.facts.bypassed, "%s: a rule that is not the Service's own decides where connections go", name)
	}
	if len(e.facts.dropped) > 0 {
		f.add(ForeignRule, Warning, e.facts.dropped, "%s: connections that the Service's rules send to endpoints are then dropped by a rule that is not kube-proxy's", name)
	}
	if e.facts.unmarked {
		f.add(MasqueradeMissing, Error, []RuleRef{e.rule}, "%s: connections are marked for masquerading, but nat POSTROUTING does not masquerade them: answers may not find their way back", name)
	}
	if len(e.facts.broken) > 0 {
		f.add(ChainMissing, Error, e.facts.broken, "%s: a jump leads to a chain that does not exist, or into a loop: no kernel holds such rules, so the dump is damaged", name)
	}
}

// likeRoutes puts routes together that differ in masquerading only.
func likeRoutes(routes []Route) []Route {
	var out []Route
	for _, r := range routes {
		i := slices.IndexFunc(out, func(o Route) bool {
			return len(o.Sources) == 0 && len(r.Sources) == 0 && slices.Equal(o.Unknown, r.Unknown) &&
				slices.EqualFunc(o.Endpoints, r.Endpoints, func(a, b Endpoint) bool { return a.Address == b.Address && a.Share.Cmp(b.Share) == 0 })
		})
		if i < 0 {
			out = append(out, r)
			continue
		}
		out[i].From = append(slices.Clone(out[i].From), r.From...)
	}
	return out
}

func targetName(e *entry) string {
	if e.target == nil {
		return "the Service's chains"
	}
	return e.target.Name
}

func classText(c Class) string {
	switch c {
	case Pod:
		return "pods"
	case Host:
		return "the node"
	}
	return "outside"
}

func classTexts(list []Class) string {
	if len(list) == len(Classes) {
		return "anywhere"
	}
	var out []string
	for _, c := range list {
		out = append(out, classText(c))
	}
	return strings.Join(out, " and ")
}

func inSources(list []netip.Prefix) string {
	if len(list) == 0 {
		return ""
	}
	var out []string
	for _, p := range list {
		out = append(out, p.String())
	}
	return " in " + strings.Join(out, ", ")
}

// shares judges whether the endpoints of a route get equal shares.
func (f *finder) shares(name string, e *entry, r Route) {
	u := unevenness(r.Endpoints)
	if u == nil || len(r.Unknown) > 0 {
		return
	}
	f.add(SharesUneven, Warning, e.dispatch(), "%s: of new connections from %s, %s gets %s and %s gets %s, where each of %d should get %s",
		name, classTexts(r.From)+inSources(r.Sources), u.high.Address, percent(u.high.Share.Float64()), u.low.Address, percent(u.low.Share.Float64()), len(r.Endpoints), percent(u.mean))
}

// uneven are endpoints with the least and the greatest share.
type uneven struct {
	low, high *Endpoint
	mean      float64
}

// unevenness returns nil when all endpoints have the same share.
func unevenness(endpoints []Endpoint) *uneven {
	if len(endpoints) < 2 {
		return nil
	}
	u := uneven{low: &endpoints[0], high: &endpoints[0]}
	for i := range endpoints {
		ep := &endpoints[i]
		if ep.Share.Cmp(u.low.Share) < 0 {
			u.low = ep
		}
		if ep.Share.Cmp(u.high.Share) > 0 {
			u.high = ep
		}
		u.mean += ep.Share.Float64()
	}
	u.mean /= float64(len(endpoints))
	if u.high.Share.Float64()-u.mean < tolerance && u.mean-u.low.Share.Float64() < tolerance {
		return nil
	}
	return &u
}

// unreadable reports tables that could not be read, and parts that are missing
// from the ruleset.
func (f *finder) unreadable() {
	for _, u := range f.view.rules.Unreadable {
		f.about = fmt.Sprintf("table %s of %v", u.Table, u.Family)
		severity := Error
		if u.Backend == netfilter.BackendNFTables { // another program's, which may have nothing to do with Services
			severity = Warning
		}
		f.add(RulesUnreadable, severity, nil, "table %q of %v cannot be read: %s", u.Table, u.Family, u.Reason)
	}
	for _, fv := range f.view.family {
		if fv == nil {
			continue
		}
		if f.view.rules.Table(fv.family, "nat") != nil && f.view.rules.Table(fv.family, "filter") == nil {
			f.add(RulesUnreadable, Warning, nil, "table \"filter\" of %v is not among these rules: Services without endpoints, and connections that are refused or dropped, cannot be seen", fv.family)
		}
		for t := range fv.tables {
			if c := t.Lookup("KUBE-FIREWALL"); t.Name == "filter" && c != nil {
				f.suspectReader(t, c)
			}
		}
	}
}

// suspectReader reports a KUBE-FIREWALL that drops everything: none of its
// authors writes that, but an iptables-nft that is older than the one that
// wrote the rule loses its matches when it prints it.
func (f *finder) suspectReader(t *netfilter.Table, c *netfilter.Chain) {
	for i := range c.Len() {
		rule := c.Rule(i)
		if len(rule) == 0 || rule[len(rule)-1].Kind != netfilter.Drop {
			continue
		}
		if !slices.ContainsFunc(rule, func(e netfilter.Expr) bool { return e.IsMatch() && e.Kind != netfilter.Comment }) {
			f.add(RulesUnreadable, Error, []RuleRef{{t, c, i}}, "KUBE-FIREWALL drops every packet: the iptables that printed this rule is probably older than the one that wrote it, and has lost its matches")
		}
	}
}

// backends reports two nat tables of one family that both hold Services.
func (f *finder) backends() {
	for _, fv := range f.view.family {
		if fv == nil {
			continue
		}
		var holders []RuleRef
		var names []string
		for _, t := range f.view.rules.Tables {
			c := t.Lookup("KUBE-SERVICES")
			if isNFTables(t) {
				c = t.Lookup("services")
			}
			if t.Family == fv.family && (t.Name == "nat" || isNFTables(t)) && c != nil && c.Len() > 0 && (f.view.leads(t, netfilter.Prerouting, c) || f.view.leads(t, netfilter.Output, c)) {
				holders = append(holders, RuleRef{t, c, 0})
				names = append(names, string(t.Backend))
			}
		}
		if len(holders) > 1 {
			f.about = fv.family.String()
			f.add(BackendConflict, Error, holders, "%s both hold Services of %v: the one whose nat chains were made last is asked first, which the kernel does not tell, and a stale one sends connections to endpoints that are gone", strings.Join(names, " and "), fv.family)
		}
	}
}

// hookJump is a jump that kube-proxy keeps from a built-in chain.
type hookJump struct {
	table string
	hook  netfilter.Hook
	chain string
}

// hookJumps are those jumps (iptablesJumpChains in
// pkg/proxy/iptables/proxier.go). One is missed only where its chain has rules.
var hookJumps = []hookJump{
	{"nat", netfilter.Prerouting, "KUBE-SERVICES"},
	{"nat", netfilter.Output, "KUBE-SERVICES"},
	{"nat", netfilter.Postrouting, "KUBE-POSTROUTING"},
	{"filter", netfilter.Forward, "KUBE-SERVICES"},
	{"filter", netfilter.Output, "KUBE-SERVICES"},
	{"filter", netfilter.Forward, "KUBE-EXTERNAL-SERVICES"},
	{"filter", netfilter.Input, "KUBE-EXTERNAL-SERVICES"},
	{"filter", netfilter.Forward, "KUBE-FORWARD"},
	{"filter", netfilter.Input, "KUBE-NODEPORTS"},
	{"filter", netfilter.Forward, "KUBE-PROXY-FIREWALL"},
	{"filter", netfilter.Input, "KUBE-PROXY-FIREWALL"},
	{"filter", netfilter.Output, "KUBE-PROXY-FIREWALL"},
	// nftables mode has all in one table.
	{"kube-proxy", netfilter.Prerouting, "services"},
	{"kube-proxy", netfilter.Output, "services"},
	{"kube-proxy", netfilter.Postrouting, "masquerading"},
}

// hooks reports chains of kube-proxy that hold rules but that a hook no longer
// leads to. kube-proxy itself may not notice for hours.
func (f *finder) hooks() {
	f.missingHooks = map[Class]bool{}
	for _, t := range f.view.rules.Tables {
		for _, j := range hookJumps {
			c := t.Lookup(j.chain)
			if t.Name != j.table || c == nil || c.Len() == 0 {
				continue
			}
			if f.view.leads(t, j.hook, c) {
				continue
			}
			who := map[netfilter.Hook]string{
				netfilter.Prerouting: "pods and from outside", netfilter.Output: "the node itself", netfilter.Forward: "pods and from outside",
				netfilter.Input: "outside to the node", netfilter.Postrouting: "anywhere",
			}[j.hook]
			f.about = fmt.Sprintf("%v %s %v %s", t.Family, t.Name, j.hook, j.chain)
			f.add(HookJumpMissing, Error, nil, "table %q of %v: no rule leads from %v to %s, so its %d rules are not asked for connections from %s",
				t.Name, t.Family, j.hook, j.chain, c.Len(), who)
			if j.table == "nat" && j.chain == "KUBE-SERVICES" || j.chain == "services" {
				if j.hook == netfilter.Output {
					f.missingHooks[Host] = true
				} else {
					f.missingHooks[Pod], f.missingHooks[External] = true, true
				}
			}
		}
	}
}

// leads reports whether jumps lead from a hook to a chain.
func (v *View) leads(t *netfilter.Table, h netfilter.Hook, to *netfilter.Chain) bool {
	seen := make([]bool, t.NameCount())
	var queue []*netfilter.Chain
	for _, b := range v.of(t.Family).hooks[h] {
		if b.Table == t {
			queue = append(queue, b.Chain)
		}
	}
	for len(queue) > 0 {
		c := queue[0]
		queue = queue[1:]
		if c == to {
			return true
		}
		for i := range c.Len() {
			rule := c.Rule(i)
			if len(rule) == 0 {
				continue
			}
			e := rule[len(rule)-1]
			if e.Kind != netfilter.Jump && e.Kind != netfilter.Goto || seen[e.A] {
				continue
			}
			seen[e.A] = true
			if next := t.ByID(netfilter.ChainID(e.A)); next != nil {
				queue = append(queue, next)
			}
		}
	}
	return false
}
