// Package render prints the documents of package api as text for people.
package render

import (
	"cmp"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/natlens/natlens/internal/api"
	"github.com/natlens/natlens/pkg/chain"
)

// tolerance is how far a share may be off for the kernel's rounding.
const tolerance = 4e-10

// Percent prints a share: as few digits as tell it apart from its neighbours.
func Percent(share float64) string {
	switch p := 100 * share; {
	case p == 0:
		return "0%"
	case p < 0.01:
		return fmt.Sprintf("%.2g%%", p)
	case p < 1:
		return fmt.Sprintf("%.2f%%", p)
	case p > 99.9 && share < 1-tolerance:
		return fmt.Sprintf("%.4f%%", p)
	default:
		return strings.TrimSuffix(fmt.Sprintf("%.1f", p), ".0") + "%"
	}
}

// errWriter remembers the first error, so that printing reads straight.
type errWriter struct {
	w   io.Writer
	err error
}

func (e *errWriter) Write(p []byte) (int, error) {
	if e.err != nil {
		return 0, e.err
	}
	n, err := e.w.Write(p)
	e.err = err
	return n, err
}

// header prints where an answer comes from, if that is worth a line.
func header(w io.Writer, h api.Header) {
	if h.Stale {
		fmt.Fprintf(w, "! stale: the rules are as of %s; reading them again fails: %s\n", h.Time.Format(time.RFC3339), h.Error)
	}
	if h.Torn {
		fmt.Fprintln(w, "! the rules kept changing while they were read; parts may be older than others")
	}
}

func findings(w io.Writer, list []api.Finding, indent string) {
	for _, f := range list {
		who := ""
		if f.Service != nil {
			who = serviceName(f.Service.Namespace, f.Service.Name, f.Service.Port) + ": "
		}
		fmt.Fprintf(w, "%s%s %s: %s%s\n", indent, mark(f.Severity), f.Code, who, f.Message)
	}
}

func mark(s chain.Severity) string {
	switch s {
	case chain.Error:
		return "✗"
	case chain.Warning:
		return "!"
	}
	return "i"
}

func serviceName(namespace, name, port string) string {
	out := name
	if namespace != "" {
		out = namespace + "/" + name
	}
	if port != "" {
		out += ":" + port
	}
	return out
}

// Services prints one line per route, the Services with findings first.
func Services(out io.Writer, doc api.Services) error {
	w := &errWriter{w: out}
	header(w, doc.Snapshot)
	findings(w, doc.Findings, "")
	services := slices.Clone(doc.Services)
	slices.SortStableFunc(services, func(a, b api.Service) int { return cmp.Compare(worst(a), worst(b)) })
	var odd []api.Finding
	for _, s := range services {
		odd = append(odd, s.Findings...)
	}
	findings(w, odd, "")
	if len(doc.Findings)+len(odd) > 0 && len(services) > 0 {
		fmt.Fprintln(w)
	}
	if len(services) == 0 {
		return w.err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "SERVICE\tFRONTEND\tFROM\tGOES TO")
	for _, s := range services {
		name := serviceName(s.Namespace, s.Name, s.Port)
		if len(s.Findings) > 0 {
			name = mark(worstOf(s)) + " " + name
		}
		for _, f := range s.Frontends {
			front := frontend(f, s.Protocol)
			for _, r := range f.Routes {
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", name, front, from(r), summary(r, s.SessionAffinity))
				name, front = "", ""
			}
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	return w.err
}

func worst(s api.Service) int {
	switch worstOf(s) {
	case chain.Error:
		return 0
	case chain.Warning:
		return 1
	case chain.Info:
		return 2
	}
	return 3
}

func worstOf(s api.Service) chain.Severity {
	var out chain.Severity
	for _, f := range s.Findings {
		if out == "" || out == chain.Info || f.Severity == chain.Error {
			out = f.Severity
		}
	}
	return out
}

func frontend(f api.Frontend, protocol string) string {
	suffix := ""
	if protocol != "TCP" {
		suffix = "/" + strings.ToLower(protocol)
	}
	if f.Address == "" {
		v6 := ""
		if f.Family == "ipv6" {
			v6 = " (IPv6)"
		}
		return fmt.Sprintf("%s :%d%s%s", f.Type, f.Port, suffix, v6)
	}
	return f.Type + " " + net.JoinHostPort(f.Address, strconv.Itoa(int(f.Port))) + suffix
}

func from(r api.Route) string {
	var classes []string
	for _, c := range r.From {
		classes = append(classes, string(c))
	}
	s := strings.Join(classes, ",")
	if len(classes) == len(chain.Classes) {
		s = "anywhere"
	}
	if len(r.Sources) > 0 {
		var list []string
		for _, p := range r.Sources {
			list = append(list, p.String())
		}
		s += " in " + strings.Join(list, ",")
	}
	return s
}

// summary says in one line what becomes of a route's connections.
func summary(r api.Route, a *api.Affinity) string {
	var b strings.Builder
	switch {
	case len(r.Endpoints) == 0:
		b.WriteString(map[chain.RouteVerdict]string{
			chain.RouteReject: "rejected", chain.RouteDrop: "dropped", chain.RouteNone: "nowhere: no rule applies",
			chain.RouteMixed: "no endpoint: partly refused",
		}[r.Verdict])
	case even(r) && len(r.Endpoints) == 1:
		b.WriteString(r.Endpoints[0].Address)
	case even(r):
		fmt.Fprintf(&b, "%s each: %s", Percent(r.Endpoints[0].Share), addresses(r.Endpoints))
	default:
		var parts []string
		for _, e := range r.Endpoints {
			parts = append(parts, shareText(e.Share, e.MaxShare)+" "+e.Address)
		}
		b.WriteString(strings.Join(parts, ", "))
	}
	if len(r.Endpoints) > 0 && r.Undelivered > 0 {
		fmt.Fprintf(&b, ", %s NOWHERE", Percent(r.Undelivered))
	}
	var notes []string
	if r.Masquerade {
		notes = append(notes, "masqueraded")
	}
	if a != nil && len(r.Endpoints) > 0 {
		notes = append(notes, fmt.Sprintf("sticky %s", (time.Duration(a.TimeoutSeconds)*time.Second).String()))
	}
	if len(r.Unknown) > 0 {
		notes = append(notes, "depends on a rule that cannot be decided")
	}
	if len(notes) > 0 {
		fmt.Fprintf(&b, "  (%s)", strings.Join(notes, ", "))
	}
	return b.String()
}

func shareText(share float64, most *float64) string {
	if most != nil {
		return Percent(share) + "–" + Percent(*most)
	}
	return Percent(share)
}

// even reports whether the endpoints' shares differ by rounding only.
func even(r api.Route) bool {
	for _, e := range r.Endpoints {
		if d := e.Share - r.Endpoints[0].Share; d > 2*tolerance || d < -2*tolerance || e.MaxShare != nil {
			return false
		}
	}
	return true
}

// addresses lists endpoints, but not more than fit on a line.
func addresses(list []api.Endpoint) string {
	const most = 4
	var out []string
	for i, e := range list {
		if i == most && len(list) > most+1 {
			out = append(out, fmt.Sprintf("… %d more", len(list)-most))
			break
		}
		out = append(out, e.Address)
	}
	return strings.Join(out, ", ")
}

// ServicesWide prints every endpoint on a line of its own, with its exact
// share and its chain.
func ServicesWide(out io.Writer, doc api.Services) error {
	w := &errWriter{w: out}
	header(w, doc.Snapshot)
	findings(w, doc.Findings, "")
	for i, s := range doc.Services {
		if i > 0 || len(doc.Findings) > 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprintf(w, "%s %s", serviceName(s.Namespace, s.Name, s.Port), s.Protocol)
		if s.SessionAffinity != nil {
			fmt.Fprintf(w, ", session affinity %s for %s (shares are those of a new client)", s.SessionAffinity.Type, time.Duration(s.SessionAffinity.TimeoutSeconds)*time.Second)
		}
		fmt.Fprintln(w)
		findings(w, s.Findings, "  ")
		for _, f := range s.Findings {
			for _, r := range f.Evidence.Rules {
				fmt.Fprintf(w, "      %s\n", r)
			}
		}
		for _, f := range s.Frontends {
			fmt.Fprintf(w, "  %s\n", frontend(f, "TCP"))
			for _, r := range f.Routes {
				wideRoute(w, r)
			}
		}
	}
	return w.err
}

func wideRoute(w io.Writer, r api.Route) {
	note := string(r.Verdict)
	if r.Masquerade {
		note += ", masqueraded"
	}
	fmt.Fprintf(w, "    from %s: %s\n", from(r), note)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, e := range r.Endpoints {
		masq := ""
		if e.Masquerade != nil && *e.Masquerade != r.Masquerade {
			masq = "not masqueraded"
		}
		fmt.Fprintf(t, "      %s\t%s\t%s\t%s\t%s\n", shareText(e.Share, e.MaxShare), e.Address, e.Chain, short(e.Exact), masq)
	}
	t.Flush() //nolint:errcheck // errWriter keeps the error
	if len(r.Endpoints) > 0 && r.Undelivered > 0 {
		fmt.Fprintf(w, "      %s  reaches no endpoint\n", Percent(r.Undelivered))
	}
	for _, u := range r.Unknown {
		fmt.Fprintf(w, "      cannot be decided: %s\n", u)
	}
}

// short cuts a long fraction: with many endpoints it has hundreds of digits,
// which the JSON has in full.
func short(exact string) string {
	const most = 44
	if len(exact) > most {
		return ""
	}
	return exact
}

// Trace prints the rules that decide on a packet as a tree. Where the ways
// part, each branch begins with the share of connections that takes it. Rules
// that were met but changed nothing are left out; the JSON has them.
func Trace(out io.Writer, doc api.Trace) error {
	w := &errWriter{w: out}
	header(w, doc.Snapshot)
	p := doc.Packet
	fmt.Fprintf(w, "%s %s → %s, from %s\n\n", p.Protocol, p.From, net.JoinHostPort(p.To.String(), strconv.Itoa(int(p.Port))), classText(p.Class))
	list := make([]branch, len(doc.Outcomes))
	for i := range doc.Outcomes {
		list[i] = branch{decisive(doc.Outcomes[i].Path), &doc.Outcomes[i]}
	}
	tree(w, list, 0, "")
	for _, u := range doc.Unknown {
		fmt.Fprintf(w, "\n! cannot be decided, so the shares are bounds: %s\n", u)
	}
	return w.err
}

func classText(c chain.Class) string {
	switch c {
	case chain.Pod:
		return "a pod on this node"
	case chain.Host:
		return "a process on this node"
	}
	return "outside this node"
}

// decisive leaves out the jumps into chains that changed nothing, and returns.
func decisive(path []api.Step) []api.Step {
	var out []api.Step
	for i := len(path) - 1; i >= 0; i-- {
		target, isJump := strings.CutPrefix(path[i].Effect, "jump ")
		if !isJump {
			target, isJump = strings.CutPrefix(path[i].Effect, "goto ")
		}
		if path[i].Effect == "return" || isJump && (len(out) == 0 || out[len(out)-1].Chain != target) {
			continue
		}
		out = append(out, path[i])
	}
	slices.Reverse(out)
	return out
}

// branch is an outcome with what is left of its path.
type branch struct {
	path    []api.Step
	outcome *api.Outcome
}

// same reports whether two branches take the same rule at a depth.
func same(a, b branch, depth int) bool {
	if depth >= len(a.path) || depth >= len(b.path) {
		return depth >= len(a.path) && depth >= len(b.path)
	}
	p, q := a.path[depth], b.path[depth]
	return p.Table == q.Table && p.Chain == q.Chain && p.Number == q.Number && p.Rule == q.Rule
}

// tree prints the branches from a depth on, those together that have their
// next rule in common.
func tree(w io.Writer, list []branch, depth int, indent string) {
	groups := group(list, depth)
	for _, g := range groups {
		lead, deeper := "", indent
		if len(groups) > 1 {
			var share float64
			for _, b := range g {
				share += b.outcome.Share
			}
			lead = fmt.Sprintf("%6s ─ ", Percent(share))
			deeper += strings.Repeat(" ", len("100.0% ─ ")-2)
		}
		if depth >= len(g[0].path) {
			for _, b := range g {
				fmt.Fprintf(w, "%s%s→ %s\n", indent, lead, outcomeText(b.outcome))
			}
			continue
		}
		step := g[0].path[depth]
		fmt.Fprintf(w, "%s%s%-6s %s%s\n", indent, lead, step.Table, step.Rule, odds(step, len(groups) > 1))
		tree(w, g, depth+1, deeper)
	}
}

// group parts branches by their next rule, in the order of the rules.
func group(list []branch, depth int) [][]branch {
	var groups [][]branch
	for _, b := range list {
		i := slices.IndexFunc(groups, func(g []branch) bool { return same(g[0], b, depth) })
		if i < 0 {
			groups = append(groups, nil)
			i = len(groups) - 1
		}
		groups[i] = append(groups[i], b)
	}
	slices.SortStableFunc(groups, func(a, b []branch) int {
		if depth >= len(a[0].path) || depth >= len(b[0].path) || a[0].path[depth].Chain != b[0].path[depth].Chain {
			return 0
		}
		return cmp.Compare(a[0].path[depth].Number, b[0].path[depth].Number)
	})
	return groups
}

// odds says how a random rule comes to the share it has: it sees only what
// the rules before it left.
func odds(s api.Step, parted bool) string {
	reach := s.Share / s.Probability
	if s.Probability == 1 && parted {
		return fmt.Sprintf("   (all of the %s that get here)", Percent(reach))
	}
	if s.Probability == 1 {
		return ""
	}
	if reach > 1-tolerance {
		return ""
	}
	return fmt.Sprintf("   (%s of the %s that get here)", Percent(s.Probability), Percent(reach))
}

func outcomeText(o *api.Outcome) string {
	share := shareText(o.Share, o.MaxShare)
	masq := ""
	if o.Masquerade {
		masq = ", with an address of this node as the source"
	}
	switch o.Verdict {
	case chain.DNAT:
		return fmt.Sprintf("%s to %s%s", share, o.To, masq)
	case chain.Reject:
		return share + " rejected: the client sees \"connection refused\" at once"
	case chain.Drop:
		return share + " dropped: the client waits until it times out"
	case chain.Accept:
		return share + " accepted as it is, to the address it came with"
	}
	return share + " unchanged: no rule applies, it goes on to the address it came with"
}
