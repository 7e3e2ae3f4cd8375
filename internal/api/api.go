package api

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
	"github.com/natlens/natlens/pkg/nftables"
)

// Header says what a document was made from.
type Header struct {
	Node    string    `json:"node"`
	Time    time.Time `json:"time"` // when the rules were read
	Backend string    `json:"backend"`
	Stale   bool      `json:"stale"`           // newer readings failed
	Error   string    `json:"error,omitempty"` // why
	Torn    bool      `json:"torn,omitempty"`  // the rules kept changing during the reading
	API     *API      `json:"api,omitempty"`   // what the rules were compared with, if with anything
}

// API says whether the rules were compared with the Kubernetes API, and how.
type API struct {
	Compared bool       `json:"compared"`          // otherwise error says why not
	Release  string     `json:"release,omitempty"` // of kube-proxy, whose rules are expected
	Error    string     `json:"error,omitempty"`   // what keeps the agent from knowing what the API wants now
	AsOf     *time.Time `json:"asOf,omitempty"`    // with an error: the last moment of which it knows
}

// Services is the document of "agent services" and /api/v1/services.
type Services struct {
	Snapshot Header    `json:"snapshot"`
	Services []Service `json:"services"`
	Findings []Finding `json:"findings"` // about the node, and about Services that the rules do not have
}

// Service is one port of a Service.
type Service struct {
	Namespace       string     `json:"namespace"`
	Name            string     `json:"name"`
	Port            string     `json:"port"`
	Protocol        string     `json:"protocol"`
	SessionAffinity *Affinity  `json:"sessionAffinity,omitempty"`
	Frontends       []Frontend `json:"frontends"`
	Desired         *Desired   `json:"desired,omitempty"`
	Observed        *Observed  `json:"observed,omitempty"`
	Findings        []Finding  `json:"findings"`
}

// Affinity is the session affinity of a Service.
type Affinity struct {
	Type           string `json:"type"`
	TimeoutSeconds int    `json:"timeoutSeconds"`
}

// Frontend is an address and port that a Service answers on. A NodePort has no
// address: it answers on all local ones, or on those in Accepted.
type Frontend struct {
	Type     string       `json:"type"`
	Family   string       `json:"family"`
	Address  string       `json:"address"`
	Port     uint16       `json:"port"`
	Accepted []netip.Addr `json:"accepted,omitempty"`
	Routes   []Route      `json:"routes"`
}

// Route is what becomes of connections from some sources.
type Route struct {
	From        []chain.Class      `json:"from"`
	Sources     []netip.Prefix     `json:"sources,omitempty"`
	Verdict     chain.RouteVerdict `json:"verdict"`
	Masquerade  bool               `json:"masquerade"`
	Endpoints   []Endpoint         `json:"endpoints"`
	Undelivered float64            `json:"undelivered"`
	Rejected    float64            `json:"rejected,omitempty"` // part of undelivered
	Dropped     float64            `json:"dropped,omitempty"`  // part of undelivered
	Unknown     []string           `json:"unknown,omitempty"`  // undecidable rules, by text
}

// Endpoint is an address that connections are sent to. MaxShare stands where an
// undecidable rule leaves the share open between the two; Masquerade where the
// endpoints of a route differ in it.
type Endpoint struct {
	Address    string   `json:"address"`
	Share      float64  `json:"share"`
	MaxShare   *float64 `json:"maxShare,omitempty"`
	Exact      string   `json:"exact,omitempty"`
	Chain      string   `json:"chain"`
	Masquerade *bool    `json:"masquerade,omitempty"`
}

// Findings is the document of /api/v1/findings.
type Findings struct {
	Snapshot Header    `json:"snapshot"`
	Findings []Finding `json:"findings"`
}

// Finding is something odd, with what shows it.
type Finding struct {
	Code     chain.Code     `json:"code"`
	Severity chain.Severity `json:"severity"`
	Service  *ServiceKey    `json:"service,omitempty"`
	Message  string         `json:"message"`
	Evidence Evidence       `json:"evidence"`
	Since    time.Time      `json:"since"`
}

// ServiceKey names one port of a Service.
type ServiceKey struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Port      string `json:"port"`
	Protocol  string `json:"protocol"`
}

// Evidence is what a finding rests on: rules by their text, objects of the API as
// "Service default/go-app", addresses of endpoints, tracked connections.
type Evidence struct {
	Rules     []string         `json:"rules,omitempty"`
	Objects   []string         `json:"objects,omitempty"`
	Addresses []netip.AddrPort `json:"addresses,omitempty"`
	Flows     []string         `json:"flows,omitempty"`
}

// Trace is the document of "agent trace" and /api/v1/trace.
type Trace struct {
	Snapshot Header    `json:"snapshot"`
	Packet   Packet    `json:"packet"`
	Outcomes []Outcome `json:"outcomes"`
	Unknown  []string  `json:"unknown"` // rules that could not be decided
	// Findings are the errors about the node, which concern every packet.
	Findings []Finding `json:"findings"`
}

// Packet is the first packet of the connection that was traced.
type Packet struct {
	From     netip.Addr  `json:"from"`
	To       netip.Addr  `json:"to"`
	Port     uint16      `json:"port"`
	Protocol string      `json:"protocol"`
	Class    chain.Class `json:"class"`
}

// Outcome is one of the ends that the connection can come to.
type Outcome struct {
	Verdict    chain.Verdict `json:"verdict"`
	To         string        `json:"to,omitempty"`
	Share      float64       `json:"share"`
	MaxShare   *float64      `json:"maxShare,omitempty"`
	Exact      string        `json:"exact,omitempty"`
	Masquerade bool          `json:"masquerade"`
	Path       []Step        `json:"path"`
}

// Step is one rule on the path of an outcome.
type Step struct {
	Table       string  `json:"table"`
	Chain       string  `json:"chain"`
	Number      int     `json:"number"` // of the rule in its chain, from 1, as iptables --line-numbers counts
	Rule        string  `json:"rule"`
	Effect      string  `json:"effect"`
	Probability float64 `json:"probability"` // that the rule matches what reaches it
	Share       float64 `json:"share"`       // of all connections, behind the rule
}

// Chain is the document of /api/v1/chains/{table}/{chain}.
type Chain struct {
	Snapshot Header      `json:"snapshot"`
	Chains   []ChainDump `json:"chains"` // one per family and backend that has it
}

// ChainDump is one chain, rule by rule.
type ChainDump struct {
	Family  string `json:"family"`
	Backend string `json:"backend"`
	Table   string `json:"table"`
	Name    string `json:"name"`
	Rules   []Rule `json:"rules"`
}

// Rule is one rule with its counters.
type Rule struct {
	Rule    string  `json:"rule"`
	Packets *uint64 `json:"packets,omitempty"`
	Bytes   *uint64 `json:"bytes,omitempty"`
}

// Error is the document of every failed request.
type Error struct {
	Error ErrorDetail `json:"error"`
}

// ErrorDetail says what went wrong.
type ErrorDetail struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

// ErrNotFound is returned for what the snapshot does not have.
var ErrNotFound = errors.New("not found")

// notFound is an ErrNotFound with a text of its own.
type notFound string

// Error implements error.
func (e notFound) Error() string { return string(e) }

// Is makes it an ErrNotFound.
func (e notFound) Is(target error) bool { return target == ErrNotFound }

// HeaderOf describes a snapshot.
func HeaderOf(s *snapshot.Snapshot) Header {
	h := Header{Node: s.Node, Time: s.Time.UTC(), Backend: s.Backend, Stale: s.Stale, Error: s.Error, Torn: s.Rules.Torn}
	if c := &s.API; c.Known || c.Error != "" {
		h.API = &API{Compared: c.Known, Error: c.Error}
		if c.Release != 0 {
			h.API.Release = c.Release.String()
		}
		if at := c.Confirmed.UTC(); c.Known && c.Error != "" {
			h.API.AsOf = &at
		}
	}
	return h
}

// Filter chooses Services; empty fields fit all.
type Filter struct {
	Namespace, Name, Port string
}

// ParseFilter reads "NAMESPACE/NAME[:PORT]"; the empty text chooses all.
func ParseFilter(s string) (Filter, error) {
	if s == "" {
		return Filter{}, nil
	}
	ns, rest, ok := strings.Cut(s, "/")
	name, port, hasPort := strings.Cut(rest, ":")
	if !ok || ns == "" || name == "" || hasPort && port == "" {
		return Filter{}, fmt.Errorf("%q is not NAMESPACE/NAME[:PORT]", s)
	}
	return Filter{ns, name, port}, nil
}

func (f Filter) fits(s *chain.Service) bool {
	return (f.Namespace == "" || f.Namespace == s.Namespace) && (f.Name == "" || f.Name == s.Name) &&
		(f.Port == "" || f.Port == s.Port || slices.ContainsFunc(s.Frontends, func(fr chain.Frontend) bool { return fmt.Sprint(fr.Port) == f.Port }))
}

// ServicesOf makes the document of the Services that the filter chooses.
func ServicesOf(s *snapshot.Snapshot, f Filter) Services {
	doc := Services{Snapshot: HeaderOf(s), Services: []Service{}, Findings: findingsOf(s.NodeFindings())}
	for i := range s.Programmed.Services {
		if sv := &s.Programmed.Services[i]; f.fits(sv) {
			doc.Services = append(doc.Services, serviceOf(s, sv))
		}
	}
	return doc
}

// ServiceOf is ServicesOf for one Service, which must be there.
func ServiceOf(s *snapshot.Snapshot, f Filter) (Services, error) {
	doc := ServicesOf(s, f)
	if len(doc.Services) == 0 {
		return doc, notFound(fmt.Sprintf("the rules hold no Service %s/%s", f.Namespace, f.Name))
	}
	return doc, nil
}

func serviceOf(s *snapshot.Snapshot, sv *chain.Service) Service {
	out := Service{
		Namespace: sv.Namespace, Name: sv.Name, Port: sv.Port, Protocol: sv.Protocol.String(),
		Frontends: make([]Frontend, len(sv.Frontends)), Findings: findingsOf(s.ServiceFindings(sv)),
		Desired: desiredOf(s, sv.ServicePort), Observed: observedOf(s, sv.ServicePort),
	}
	if sv.AffinitySeconds > 0 {
		out.SessionAffinity = &Affinity{Type: "ClientIP", TimeoutSeconds: sv.AffinitySeconds}
	}
	for i, f := range sv.Frontends {
		fr := Frontend{Type: string(f.Type), Family: f.Family.String(), Port: f.Port, Accepted: f.Accepted, Routes: make([]Route, len(f.Routes))}
		if f.Address.IsValid() {
			fr.Address = f.Address.String()
		}
		for j := range f.Routes {
			fr.Routes[j] = routeOf(&f.Routes[j])
		}
		out.Frontends[i] = fr
	}
	return out
}

func routeOf(r *chain.Route) Route {
	out := Route{
		From: r.From, Sources: r.Sources, Verdict: r.Verdict, Masquerade: r.Masquerade,
		Endpoints: make([]Endpoint, len(r.Endpoints)), Undelivered: r.Undelivered.Float64(),
		Rejected: r.Rejected.Float64(), Dropped: r.Dropped.Float64(), Unknown: ruleTexts(r.Unknown),
	}
	mixed := slices.ContainsFunc(r.Endpoints, func(e chain.Endpoint) bool { return e.Unmasqueraded })
	for i, e := range r.Endpoints {
		ep := Endpoint{Address: addrText(e.Address), Share: e.Share.Float64(), Exact: e.Share.Exact(), Chain: e.Chain, MaxShare: maxOf(e.Share, e.Max)}
		if mixed {
			masquerade := r.MasqueradesTo(e)
			ep.Masquerade = &masquerade
		}
		out.Endpoints[i] = ep
	}
	return out
}

func maxOf(least, most chain.Share) *float64 {
	if least.Cmp(most) == 0 {
		return nil
	}
	m := most.Float64()
	return &m
}

// addrText prints ip:port, and "?" for one of a range of addresses.
func addrText(a netip.AddrPort) string {
	if !a.IsValid() {
		return "?"
	}
	return a.String()
}

func ruleTexts(refs []chain.RuleRef) []string {
	var out []string
	for _, r := range refs {
		out = append(out, RuleText(r))
	}
	return out
}

// RuleText prints a rule in the language of the program that wrote it:
// iptables-save's or nft's.
func RuleText(r chain.RuleRef) string {
	if r.Index < r.Chain.Len() {
		if r.Table.Backend == netfilter.BackendNFTables {
			return nftables.RuleText(r.Table, r.Chain, r.Index)
		}
		return iptables.RuleText(r.Table, r.Chain, r.Index)
	}
	policy := "ACCEPT"
	if r.Chain.Base != nil && r.Chain.Base.Policy == netfilter.Drop {
		policy = "DROP"
	}
	return "-P " + r.Chain.Name + " " + policy
}

// FindingsOf makes the document of all findings.
func FindingsOf(s *snapshot.Snapshot) Findings {
	return Findings{Snapshot: HeaderOf(s), Findings: findingsOf(s.Findings())}
}

var severityOrder = map[chain.Severity]int{chain.Error: 0, chain.Warning: 1, chain.Info: 2}

func findingsOf(list []snapshot.Finding) []Finding {
	out := make([]Finding, len(list))
	for i := range list {
		f := &list[i]
		out[i] = Finding{
			Code: f.Code, Severity: f.Severity, Message: f.Message,
			Evidence: Evidence{ruleTexts(f.Rules), f.Objects, f.Addresses, f.Flows}, Since: f.Since.UTC(),
		}
		if f.Service != nil {
			out[i].Service = &ServiceKey{f.Service.Namespace, f.Service.Name, f.Service.Port, f.Service.Protocol.String()}
		}
	}
	slices.SortStableFunc(out, func(a, b Finding) int { return cmp.Compare(severityOrder[a.Severity], severityOrder[b.Severity]) })
	return out
}

// Query is the question of a trace.
type Query struct {
	To       netip.AddrPort
	Protocol netfilter.Protocol
	From     string // an address, or a source class; "" is "pod"
}

// ParseQuery reads "ADDRESS:PORT[/tcp|udp|sctp]".
func ParseQuery(destination, protocol, from string) (Query, error) {
	q := Query{Protocol: netfilter.TCP, From: from}
	dst, suffix, ok := strings.Cut(destination, "/")
	if ok {
		protocol = suffix
	}
	var err error
	if q.To, err = netip.ParseAddrPort(dst); err == nil && protocol != "" {
		if q.Protocol, err = netfilter.ParseProtocol(protocol); err != nil {
			return q, err
		}
	}
	if err != nil {
		return q, fmt.Errorf("destination %q is not ADDRESS:PORT (IPv6 as [ADDRESS]:PORT), with /tcp, /udp or /sctp behind it if need be", destination)
	}
	q.To = netip.AddrPortFrom(q.To.Addr().Unmap().WithZone(""), q.To.Port())
	return q, nil
}

// TraceOf walks one packet through a snapshot.
func TraceOf(s *snapshot.Snapshot, q Query) (Trace, error) {
	packet, class, err := packetOf(s.View, q)
	if err != nil {
		return Trace{}, err
	}
	t, ok := s.View.Trace(packet, class)
	if !ok {
		return Trace{}, notFound(fmt.Sprintf("these rules have no table of %v", netfilter.FamilyOf(q.To.Addr())))
	}
	doc := Trace{
		Snapshot: HeaderOf(s),
		Packet:   Packet{From: packet.Source, To: packet.Destination, Port: packet.Port, Protocol: packet.Protocol.String(), Class: t.Class},
		Outcomes: make([]Outcome, len(t.Outcomes)),
		Unknown:  append([]string{}, ruleTexts(append(t.Unknown, t.Broken...))...),
	}
	doc.Findings = slices.DeleteFunc(findingsOf(s.NodeFindings()), func(f Finding) bool { return f.Severity != chain.Error || f.Service != nil })
	for i, o := range t.Outcomes {
		out := Outcome{Verdict: o.Verdict, Share: o.Share.Float64(), Exact: o.Share.Exact(), MaxShare: maxOf(o.Share, o.Max), Masquerade: o.Masquerade, Path: make([]Step, len(o.Path))}
		if o.Verdict == chain.DNAT {
			out.To = addrText(o.To)
		}
		for j, step := range o.Path {
			out.Path[j] = Step{
				Table: step.Table.Name, Chain: step.Chain.Name, Number: step.Index + 1, Rule: RuleText(step.RuleRef), Effect: Effect(step),
				Probability: step.Chance, Share: step.Share.Float64(),
			}
		}
		doc.Outcomes[i] = out
	}
	return doc, nil
}

func packetOf(v *chain.View, q Query) (netfilter.Packet, chain.Class, error) {
	class := chain.Class(cmp.Or(q.From, string(chain.Pod)))
	if slices.Contains(chain.Classes, class) {
		p, ok := v.Packet(class, q.To, q.Protocol)
		if !ok {
			return p, class, notFound(fmt.Sprintf("these rules have no table of %v", netfilter.FamilyOf(q.To.Addr())))
		}
		return p, class, nil
	}
	from, err := netip.ParseAddr(q.From)
	if err != nil {
		return netfilter.Packet{}, "", fmt.Errorf("source %q is neither an address nor one of pod, node, external", q.From)
	}
	from = from.Unmap().WithZone("")
	if netfilter.FamilyOf(from) != netfilter.FamilyOf(q.To.Addr()) {
		return netfilter.Packet{}, "", fmt.Errorf("source %v and destination %v are of different families", from, q.To.Addr())
	}
	packet, class := v.PacketFrom(from, q.To, q.Protocol)
	return packet, class, nil
}

// Effect says in a few words what a rule on a path did.
func Effect(s chain.Step) string {
	e := s.Effect
	switch e.Kind {
	case netfilter.Jump:
		return "jump " + s.Table.ChainName(netfilter.ChainID(e.A))
	case netfilter.Goto:
		return "goto " + s.Table.ChainName(netfilter.ChainID(e.A))
	case netfilter.Return:
		return "return"
	case netfilter.Accept:
		return "accept"
	case netfilter.Drop:
		return "drop"
	case netfilter.Reject:
		return "reject"
	case netfilter.DNAT:
		return "dnat " + addrText(s.Chain.Target(e))
	case netfilter.DNATRange:
		return "dnat to one of several addresses"
	case netfilter.Redirect:
		return "redirect"
	case netfilter.SNAT:
		return "snat"
	case netfilter.Masquerade:
		return "masquerade"
	case netfilter.SetMark:
		return fmt.Sprintf("mark 0x%x/0x%x", e.A, e.B)
	case netfilter.SetConnMark, netfilter.SaveMark, netfilter.RestoreMark:
		return "connection mark"
	case netfilter.NoTrack:
		return "notrack"
	case netfilter.Queue:
		return "queue"
	case netfilter.UnknownTarget:
		return "unknown"
	}
	return "goes on"
}

// ChainOf makes the document of one chain in all families and backends.
func ChainOf(s *snapshot.Snapshot, table, name string) (Chain, error) {
	doc := Chain{Snapshot: HeaderOf(s)}
	for _, t := range s.Rules.Tables {
		c := t.Lookup(name)
		if t.Name != table || c == nil {
			continue
		}
		dump := ChainDump{Family: t.Family.String(), Backend: string(t.Backend), Table: t.Name, Name: c.Name, Rules: make([]Rule, c.Len())}
		for i := range c.Len() {
			dump.Rules[i].Rule = RuleText(chain.RuleRef{Table: t, Chain: c, Index: i})
			if n, ok := c.Counter(i); ok {
				dump.Rules[i].Packets, dump.Rules[i].Bytes = &n.Packets, &n.Bytes
			}
		}
		doc.Chains = append(doc.Chains, dump)
	}
	if doc.Chains == nil {
		return doc, notFound(fmt.Sprintf("no chain %q in a table %q", name, table))
	}
	return doc, nil
}
