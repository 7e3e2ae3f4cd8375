package snapshot

import (
	"fmt"
	"reflect"
	"time"

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
	// Since tells when each finding was first seen, by [FindingKey].
	Since map[string]time.Time
	// Stale says that newer readings failed, and Error why; Checked is the time
	// of the last attempt.
	Stale   bool
	Error   string
	Checked time.Time
	// Version counts the snapshots of this process whose contents differed.
	Version uint64
	node    chain.Node // as it was given
}

// Build resolves a ruleset. The node's missing parts are taken from the rules.
func Build(rs *netfilter.Ruleset, node chain.Node, name, backend string, now time.Time) *Snapshot {
	s := &Snapshot{Node: name, Time: now, Checked: now, Backend: backend, Rules: rs, Version: 1, node: node}
	s.View = chain.NewView(rs, node)
	s.Programmed = s.View.Services()
	if backend == "" {
		s.Backend = backendOf(rs)
	}
	s.Since = map[string]time.Time{}
	s.eachFinding(func(f *chain.Finding) { s.Since[FindingKey(f)] = now })
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
	next.Since = map[string]time.Time{}
	next.eachFinding(func(f *chain.Finding) {
		key := FindingKey(f)
		since, ok := s.Since[key]
		if !ok {
			since = now
		}
		next.Since[key] = since
	})
	return &next
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
		if any == "" {
			any = string(t.Backend)
		}
	}
	return any
}

// FindingKey identifies a finding across snapshots.
func FindingKey(f *chain.Finding) string {
	if f.Service == nil {
		return fmt.Sprintf("%s %s", f.Code, f.About)
	}
	return fmt.Sprintf("%s %s %s %s", f.Code, f.Service, f.Service.Protocol, f.About)
}

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
func (s *Snapshot) Findings() []chain.Finding {
	var out []chain.Finding
	s.eachFinding(func(f *chain.Finding) { out = append(out, *f) })
	return out
}
