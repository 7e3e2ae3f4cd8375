package snapshot

import (
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"time"

	"github.com/natlens/natlens/internal/desired"
	"github.com/natlens/natlens/internal/monitor"
	"github.com/natlens/natlens/internal/reconcile"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
)

// BackendFile is the backend of a snapshot that was read from a dump.
const BackendFile = "file"

// Snapshot is everything known of the node at one moment.
type Snapshot struct {
	Node       string
	Time       time.Time // when the rules were read
	Backend    string    // of the table that holds the Services; "file" for a dump
	Rules      *netfilter.Ruleset
	View       *chain.View
	Programmed *chain.Programmed
	Took       time.Duration // for reading and resolving
	// API is what came of comparing the rules with the API.
	API Comparison
	// Observed is what traffic was seen to do.
	Observed Observed
	// Echo is what probes have told; nil without an echo monitor.
	Echo *monitor.State
	// Stale says that newer readings failed, and Error why; Checked is the time
	// of the last attempt.
	Stale   bool
	Error   string
	Checked time.Time
	// Version counts the snapshots of this process whose contents differed.
	Version uint64
	node    chain.Node           // as it was given
	since   map[string]time.Time // when each finding in Programmed was first seen, by findingKey
	held    map[string]bool      // those of them that are kept back, see hold
}

// Comparison is what came of holding the rules against the Kubernetes API.
type Comparison struct {
	// Known says that the API told what it wants, at least once, and that the
	// rules can be held against it. Otherwise Error tells why not.
	Known     bool
	Confirmed time.Time // when the API was last known to want this
	Error     string    // what is wrong with reaching it now
	// Release is the release whose rules kube-proxy is expected to write.
	Release desired.Release
	// Desired is what the API wants; nil unless Known.
	Desired  *desired.View
	Pending  int // differences that kube-proxy is given time to mend
	Findings []reconcile.Finding

	due time.Time // when the time of the first of them is over
}

// Finding is a finding of any kind.
type Finding struct {
	chain.Finding
	Objects   []string // of the API that it rests on, by kind and name
	Addresses []netip.AddrPort
	Flows     []string  // tracked connections, as "UDP client → frontend → endpoint"
	Since     time.Time // when it began, as far as this agent knows
}

// Build resolves a ruleset. The node's missing parts are taken from the rules.
func Build(rs *netfilter.Ruleset, node chain.Node, name, backend string, now time.Time) *Snapshot {
	s := &Snapshot{Node: name, Time: now, Checked: now, Backend: backend, Rules: rs, Version: 1, node: node}
	s.View = chain.NewView(rs, node)
	s.Programmed = s.View.Services()
	if backend == "" {
		s.Backend = backendOf(rs)
	}
	s.since = map[string]time.Time{}
	s.eachFinding(func(f *chain.Finding) { s.since[findingKey(f)] = now })
	return s
}

// next returns the snapshot of a later reading. It does again only what has
// changed.
func (s *Snapshot) next(rs *netfilter.Ruleset, node chain.Node, now time.Time) *Snapshot {
	next := *s
	next.Time, next.Checked, next.Stale, next.Error = now, now, false, ""
	sameNode := reflect.DeepEqual(node, s.node)
	next.Rules, next.node = rs, node
	if sameNode && (rs == s.Rules || rs.SameRules(s.Rules)) {
		return &next // where connections go does not hang on what has been counted
	}
	next.Version++
	next.View = s.View.Next(rs, node)
	next.Programmed = next.View.Update(s.Programmed)
	if s.Backend != BackendFile {
		next.Backend = backendOf(rs)
	}
	next.since = map[string]time.Time{}
	next.eachFinding(func(f *chain.Finding) {
		key := findingKey(f)
		since, ok := s.since[key]
		if !ok {
			since = now
		}
		next.since[key] = since
	})
	return &next
}

// settled is how long a finding about the rules alone has to last before it is
// told: kube-proxy writes one table after the other, which in a large cluster takes
// seconds, and between them a Service may seem to lead nowhere.
const settled = 5 * time.Second

// hold keeps back the findings that were not there in the snapshot before, until
// they have lasted for so long.
func (s *Snapshot) hold(last *Snapshot, long time.Duration) {
	s.held = nil
	for key, since := range s.since {
		if _, before := last.since[key]; (!before || last.held[key]) && s.Time.Sub(since) < long {
			if s.held == nil {
				s.held = map[string]bool{}
			}
			s.held[key] = true
		}
	}
	if !maps.Equal(s.held, last.held) {
		s.Version++
	}
}

// heldSince returns when the oldest finding began that is kept back; zero for none.
func (s *Snapshot) heldSince() (oldest time.Time) {
	for key := range s.held {
		if since := s.since[key]; oldest.IsZero() || since.Before(oldest) {
			oldest = since
		}
	}
	return oldest
}

// backendOf names the backend whose tables hold kube-proxy's Services, or that
// has any table at all.
func backendOf(rs *netfilter.Ruleset) string {
	any := ""
	for _, t := range rs.Tables {
		if t.Backend == netfilter.BackendNFTables && t.Name == "kube-proxy" {
			return string(t.Backend)
		}
		if c := t.Lookup("KUBE-SERVICES"); t.Name == "nat" && c != nil && c.Len() > 0 {
			return string(t.Backend)
		}
		if any == "" && t.Backend != netfilter.BackendNFTables { // another program's
			any = string(t.Backend)
		}
	}
	return any
}

// hasLegacy reports whether a table is legacy iptables': nothing but reading it
// tells that it has moved.
func (s *Snapshot) hasLegacy() bool {
	return slices.ContainsFunc(s.Rules.Tables, func(t *netfilter.Table) bool { return t.Backend == netfilter.BackendLegacy })
}

// findingKey identifies a finding across snapshots.
func findingKey(f *chain.Finding) string {
	if f.Service == nil {
		return fmt.Sprintf("%s %s", f.Code, f.About)
	}
	return fmt.Sprintf("%s %s %s %s", f.Code, f.Service, f.Service.Protocol, f.About)
}

// told calls do with each finding that the rules alone give, and that is not kept
// back.
func (s *Snapshot) told(list []chain.Finding, do func(Finding)) {
	for i := range list {
		if key := findingKey(&list[i]); !s.held[key] {
			do(Finding{Finding: list[i], Since: s.since[key]})
		}
	}
}

// eachFinding calls do with each finding that the rules alone give.
func (s *Snapshot) eachFinding(do func(*chain.Finding)) {
	for i := range s.Programmed.Findings {
		do(&s.Programmed.Findings[i])
	}
	for i := range s.Programmed.Services {
		for j := range s.Programmed.Services[i].Findings {
			do(&s.Programmed.Services[i].Findings[j])
		}
	}
}

// Findings returns all findings, the node's first.
func (s *Snapshot) Findings() []Finding {
	var out []Finding
	add := func(f Finding) { out = append(out, f) }
	s.told(s.Programmed.Findings, add)
	for i := range s.Programmed.Services {
		s.told(s.Programmed.Services[i].Findings, add)
	}
	for i := range s.API.Findings {
		out = append(out, ofAPI(&s.API.Findings[i]))
	}
	return append(out, s.observedFindings(func(chain.ServicePort) bool { return true })...)
}

// NodeFindings returns the findings that no Service in the rules has: those about
// the node, and those about Services that are not in the rules.
func (s *Snapshot) NodeFindings() []Finding {
	var out []Finding
	s.told(s.Programmed.Findings, func(f Finding) { out = append(out, f) })
	for i := range s.API.Findings {
		if f := &s.API.Findings[i]; s.Programmed.Service(f.Service) == nil {
			out = append(out, ofAPI(f))
		}
	}
	return append(out, s.observedFindings(func(p chain.ServicePort) bool { return s.Programmed.Service(p) == nil })...)
}

// ServiceFindings returns the findings about a Service port in the rules.
func (s *Snapshot) ServiceFindings(sv *chain.Service) []Finding {
	var out []Finding
	s.told(sv.Findings, func(f Finding) { out = append(out, f) })
	list := s.API.Findings // sorted by Service port
	i, _ := slices.BinarySearchFunc(list, sv.ServicePort, func(f reconcile.Finding, p chain.ServicePort) int { return f.Service.Compare(p) })
	for ; i < len(list) && list[i].Service == sv.ServicePort; i++ {
		out = append(out, ofAPI(&list[i]))
	}
	return append(out, s.observedFindings(func(p chain.ServicePort) bool { return p == sv.ServicePort })...)
}

func ofAPI(f *reconcile.Finding) Finding {
	return Finding{
		Finding: chain.Finding{Code: f.Code, Severity: f.Severity, Service: &f.Service, About: f.About, Message: f.Message, Rules: f.Rules},
		Objects: f.Objects, Addresses: f.Addresses, Since: f.Since,
	}
}
