package observed

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/natlens/natlens/internal/desired"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/conntrack"
	"github.com/natlens/natlens/pkg/netfilter"
)

// ConntrackStale is the finding of UDP flows that conntrack goes on sending to
// what is no endpoint any more.
const ConntrackStale chain.Code = "ConntrackStale"

// Flows are the connections that conntrack held at one moment.
type Flows struct {
	Time  time.Time
	Took  time.Duration // to read them
	Total int           // whose destination nat has rewritten, of Services or not
	Error string        // why newer ones could not be read
	// Findings are by Service port and endpoint.
	Findings []Finding

	layout *layout
	live   []int32 // by endpoint
	stale  []int32 // by port
}

// Finding is a finding of what was observed.
type Finding struct {
	Code      chain.Code
	Severity  chain.Severity
	Service   chain.ServicePort
	About     string
	Message   string
	Addresses []netip.AddrPort // of the endpoint
	Flows     []string         // some of those that it is about
	Since     time.Time
}

// PortFlows are those of one Service port.
type PortFlows struct {
	Live  int // to all endpoints; TCP connections that have ended do not count
	Stale int // to what is no endpoint any more
	// Endpoints are by address.
	Endpoints []EndpointFlows
}

// EndpointFlows are those to one endpoint.
type EndpointFlows struct {
	Address netip.AddrPort
	Live    int
}

// Of returns the flows of a Service port; ok is false when the rules did not have
// it.
func (f *Flows) Of(p chain.ServicePort) (out PortFlows, ok bool) {
	i := f.layout.port(p)
	if i < 0 {
		return out, false
	}
	out.Stale = int(f.stale[i])
	for k, a := range f.layout.of(i) {
		n := int(f.live[int(f.layout.starts[i])+k])
		out.Live += n
		out.Endpoints = append(out.Endpoints, EndpointFlows{a, n})
	}
	return out, true
}

// Moment is what flows are held against.
type Moment struct {
	Time       time.Time
	Programmed *chain.Programmed
	Local      []netip.Addr // the node's own addresses, where NodePorts answer
	// Desired is what the API wants; nil when the agent does not ask it.
	Desired *desired.View
	// Blind says that the agent cannot tell what is an endpoint now: the rules or
	// the API are not known to be so.
	Blind bool
}

// Watch holds what conntrack remembers against the rules, time after time. It is
// used by one goroutine at a time.
type Watch struct {
	// Grace is how long kube-proxy is given to delete the flows of an endpoint
	// that has gone.
	Grace time.Duration

	programmed *chain.Programmed
	layout     *layout
	ports      map[front]int32            // in layout
	onNode     []bool                     // by port: it has a NodePort
	past       map[front]past             // UDP frontends that are no longer in the rules
	ended      map[goneEndpoint]time.Time // endpoints of NodePorts that are gone
	local      map[netip.Addr]bool
	standing   map[flowKey]*standing
	last       time.Time // of the last pass
	pending    bool
}

// front is an address and port that a Service answers on; a NodePort has the
// unspecified address of its family.
type front struct {
	at       netip.AddrPort
	protocol netfilter.Protocol
}

// past is the Service port of a frontend that is gone.
type past struct {
	port chain.ServicePort
	at   time.Time
}

// flowKey tells a flow from others for as long as it lasts.
type flowKey struct {
	id              uint32
	source, to, via netip.AddrPort
}

// standing is a UDP flow to what is no endpoint.
type standing struct {
	since time.Time
	// seen is a look, and timeout what was left then: with the first look after the
	// grace period it begins, and with each at which a packet had come.
	seen    time.Time
	timeout uint32
	used    time.Time // when a packet was last known to have come after the grace period
	pass    time.Time
}

// judged is how long after the grace period it takes to know whether a flow is in
// use: longer than the pauses of a client that is.
const judged = 10 * time.Second

// Pending reports whether there are flows of which the next look may tell that they
// are in use.
func (w *Watch) Pending() bool { return w.pending }

// mostStanding bounds the flows that are followed one by one.
const mostStanding = 10_000

// A Pass is one look at all flows.
type Pass struct {
	w      *Watch
	at     Moment
	flows  *Flows
	found  map[goneEndpoint]*found
	silent time.Duration // how long a flow may be silent and still be in use
}

// found are the used flows to one address that is no endpoint.
type found struct {
	n     int
	since time.Time
	flows []string
}

// Begin begins a pass: Add is to be called with each flow, then End.
func (w *Watch) Begin(at Moment) *Pass {
	w.turn(&at)
	f := &Flows{Time: at.Time, layout: w.layout, live: make([]int32, len(w.layout.endpoints)), stale: make([]int32, len(w.layout.ports))}
	if at.Blind {
		clear(w.standing)
	}
	p := &Pass{w: w, at: at, flows: f, found: map[goneEndpoint]*found{}, silent: w.Grace}
	if !w.last.IsZero() {
		p.silent = max(p.silent, 2*at.Time.Sub(w.last))
	}
	return p
}

// turn brings what is known of frontends and endpoints up to date.
func (w *Watch) turn(at *Moment) {
	w.local = map[netip.Addr]bool{}
	for _, a := range at.Local {
		w.local[a] = true
	}
	if w.programmed == at.Programmed {
		return
	}
	was, fronts, onNode := w.layout, w.ports, w.onNode
	w.programmed = at.Programmed
	w.layout = newLayout(at.Programmed, was)
	w.ports, w.onNode = make(map[front]int32, len(fronts)), make([]bool, len(w.layout.ports))
	for i := range at.Programmed.Services {
		s := &at.Programmed.Services[i]
		for j := range s.Frontends {
			f := &s.Frontends[j]
			w.ports[front{netip.AddrPortFrom(addressOf(f), f.Port), s.Protocol}] = int32(i)
			w.onNode[i] = w.onNode[i] || f.Type == chain.NodePort
		}
	}
	if was == nil {
		w.past, w.ended, w.standing = map[front]past{}, map[goneEndpoint]time.Time{}, map[flowKey]*standing{}
		return
	}
	for f, i := range fronts {
		if p := was.ports[i]; p.Protocol == netfilter.UDP {
			w.past[f] = past{p, at.Time}
		}
	}
	was.eachEndpoint(w.layout, func(i, n, to int) {
		if to < 0 && onNode[i] {
			w.ended[goneEndpoint{was.ports[i], was.endpoints[n]}] = at.Time
		}
	})
	w.forget(at.Time)
}

// forget drops what is there again, or has been gone for long.
func (w *Watch) forget(now time.Time) {
	for f, p := range w.past {
		if _, again := w.ports[f]; again || now.Sub(p.at) > remembered {
			delete(w.past, f)
		}
	}
	for e, at := range w.ended {
		if now.Sub(at) > remembered {
			delete(w.ended, e)
		}
	}
}

func addressOf(f *chain.Frontend) netip.Addr {
	if f.Type == chain.NodePort {
		return unspecified(f.Family)
	}
	return f.Address
}

func unspecified(f netfilter.Family) netip.Addr {
	if f == netfilter.IPv6 {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// Add takes a flow.
func (p *Pass) Add(f *conntrack.Flow) {
	p.flows.Total++
	if f.Zone != 0 { // somebody else's nat
		return
	}
	w := p.w
	port, nodePort, ok := w.find(f)
	if !ok {
		if gone, ok := w.pastOf(f); ok && !p.serves(gone, f.To) {
			p.judge(f, gone)
		}
		return
	}
	if n := w.layout.endpoint(port, f.To); n >= 0 {
		if f.Open() {
			p.flows.live[n]++
		}
		return
	}
	name := w.layout.ports[port]
	if nodePort && !w.knew(name, f.To) {
		return // a port of the node may be forwarded by others, too
	}
	if !f.Open() || p.serves(name, f.To) {
		return
	}
	p.flows.stale[port]++
	p.judge(f, name)
}

// find returns the Service port that a flow's client connected to.
func (w *Watch) find(f *conntrack.Flow) (port int, nodePort, ok bool) {
	if i, ok := w.ports[front{f.Destination, f.Protocol}]; ok {
		return int(i), false, true
	}
	at, local := w.nodePort(f)
	i, ok := w.ports[at]
	return int(i), true, ok && local
}

// pastOf returns the Service port that a flow's client connected to, when it is
// gone.
func (w *Watch) pastOf(f *conntrack.Flow) (chain.ServicePort, bool) {
	if p, ok := w.past[front{f.Destination, f.Protocol}]; ok {
		return p.port, true
	}
	at, local := w.nodePort(f)
	p, ok := w.past[at]
	return p.port, ok && local && w.knew(p.port, f.To)
}

// nodePort returns the NodePort that a flow went to if any; local says that it
// went to the node.
func (w *Watch) nodePort(f *conntrack.Flow) (at front, local bool) {
	a := f.Destination.Addr()
	return front{netip.AddrPortFrom(unspecified(netfilter.FamilyOf(a)), f.Destination.Port()), f.Protocol}, w.local[a] || a.IsLoopback()
}

// knew reports whether an address was an endpoint of a port lately.
func (w *Watch) knew(p chain.ServicePort, a netip.AddrPort) bool {
	_, ok := w.ended[goneEndpoint{p, a}]
	return ok
}

// serves reports whether the API has an address among those endpoints that may
// still be used: kube-proxy leaves their flows alone.
func (p *Pass) serves(port chain.ServicePort, a netip.AddrPort) bool {
	return p.at.Desired != nil && p.at.Desired.Serves(port, a)
}

// judge looks at a flow to what is no endpoint.
func (p *Pass) judge(f *conntrack.Flow, port chain.ServicePort) {
	w, now := p.w, p.at.Time
	if f.Protocol != netfilter.UDP || p.at.Blind { // TCP clients notice, and connect anew
		return
	}
	k := flowKey{f.ID, f.Source, f.Destination, f.To}
	s := w.standing[k]
	if s == nil {
		if len(w.standing) < mostStanding {
			w.standing[k] = &standing{since: now, seen: now, timeout: f.Timeout, pass: now}
		}
		return
	}
	// Without a packet the timeout falls with the clock. Both are of whole seconds.
	const slack = 2
	left := float64(s.timeout) - now.Sub(s.seen).Seconds()
	late := s.seen.Sub(s.since) >= w.Grace
	s.pass = now
	switch packet := float64(f.Timeout) > left+slack; {
	case packet && late:
		s.used = now
		fallthrough
	case packet, !late && now.Sub(s.since) >= w.Grace:
		s.seen, s.timeout = now, f.Timeout
	}
	if s.used.IsZero() || now.Sub(s.used) > p.silent {
		return
	}
	e := goneEndpoint{port, f.To}
	at := p.found[e]
	if at == nil {
		at = &found{since: s.since}
		p.found[e] = at
	}
	at.n++
	if s.since.Before(at.since) {
		at.since = s.since
	}
	if len(at.flows) < mostFlows {
		at.flows = append(at.flows, fmt.Sprintf("%v %v → %v → %v", f.Protocol, f.Source, f.Destination, f.To))
	}
}

// mostFlows is how many flows a finding lists.
const mostFlows = 10

// End ends the pass, and tells what was seen.
func (p *Pass) End(took time.Duration) *Flows {
	w := p.w
	w.pending = false
	for k, s := range w.standing {
		if !s.pass.Equal(p.at.Time) {
			delete(w.standing, k) // it is gone
			continue
		}
		w.pending = w.pending || s.used.IsZero() && p.at.Time.Sub(s.since) < w.Grace+judged
	}
	w.last = p.at.Time
	p.flows.Took = took
	for e, f := range p.found {
		p.flows.Findings = append(p.flows.Findings, p.finding(e, f))
	}
	slices.SortFunc(p.flows.Findings, func(a, b Finding) int {
		return cmp.Or(a.Service.Compare(b.Service), a.Addresses[0].Compare(b.Addresses[0]))
	})
	return p.flows
}

// Fail ends a pass in which not all flows could be read: what was seen last stays,
// with the reason why there is nothing newer.
func (p *Pass) Fail(last *Flows, err error) *Flows {
	next := Flows{layout: &layout{starts: []int32{0}}}
	if last != nil {
		next = *last
	}
	next.Error = err.Error()
	return &next
}

func (p *Pass) finding(e goneEndpoint, f *found) Finding {
	slices.Sort(f.flows)
	why, severity := "the rules do not send to it any more", chain.Warning
	switch d := p.at.Desired; {
	case p.w.layout.port(e.port) < 0: // the pod may be there, and answer
		why = "the rules do not have its Service any more"
	case d != nil:
		why, severity = d.WhyNot(e.port, e.address), chain.Error
	}
	verb, more := "are", ""
	if f.n == 1 {
		verb = "is"
	}
	if f.n > len(f.flows) {
		more = ", …"
	}
	return Finding{
		Code: ConntrackStale, Severity: severity, Service: e.port, About: e.address.String(), Addresses: []netip.AddrPort{e.address}, Flows: f.flows, Since: f.since,
		Message: fmt.Sprintf("%v is no endpoint (%s), but conntrack goes on sending %s there that %s in use: %s%s",
			e.address, why, plural(f.n, "UDP flow"), verb, strings.Join(clients(f.flows), ", "), more),
	}
}

// clients are the sources of flows, by their text.
func clients(flows []string) []string {
	var out []string
	for _, f := range flows {
		_, rest, _ := strings.Cut(f, " ")
		source, _, _ := strings.Cut(rest, " ")
		out = append(out, source)
	}
	return out
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}
