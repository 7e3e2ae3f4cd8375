// Package render prints the documents of package api as text for people.
package render

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

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
	case p < 0.0001:
		return "<0.0001%"
	case p < 0.01:
		return fmt.Sprintf("%.2g%%", p)
	case p < 1:
		return fmt.Sprintf("%.2f%%", p)
	case p > 99.9999 && share < 1-tolerance:
		return ">99.9999%" // "100%" would hide that something is lost
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
	_, e.err = e.w.Write(printable(p))
	return len(p), e.err
}

// printable shows control characters as what they are: a comment in somebody's
// dump must not command the reader's terminal.
func printable(p []byte) []byte {
	control := func(r rune) bool { return unicode.IsControl(r) && r != '\n' && r != '\t' }
	if bytes.IndexFunc(p, control) < 0 {
		return p
	}
	var out []byte
	for _, r := range string(p) {
		if control(r) {
			out = fmt.Appendf(out, "\\x%02x", r)
			continue
		}
		out = utf8.AppendRune(out, r)
	}
	return out
}

// table prints rows in columns, without blanks at the ends of lines.
func table(w io.Writer, indent string, rows [][]string) {
	var widths []int
	for _, row := range rows {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	for _, row := range rows {
		var b strings.Builder
		for i, cell := range row {
			b.WriteString(cell)
			b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell)+2))
		}
		fmt.Fprintln(w, indent+strings.TrimRight(b.String(), " "))
	}
}

// header prints where an answer comes from, if that is worth a line.
func header(w io.Writer, h api.Header) {
	if h.Stale {
		fmt.Fprintf(w, "! stale: the rules are as of %s; reading them again fails: %s\n", h.Time.Format(time.RFC3339), h.Error)
	}
	if h.Torn {
		fmt.Fprintln(w, "! the rules kept changing while they were read; parts may be older than others")
	}
	switch a := h.API; {
	case a == nil || a.Error == "":
	case a.Compared:
		fmt.Fprintf(w, "! compared with what the Kubernetes API wanted at %s: %s\n", a.AsOf.Format(time.RFC3339), a.Error)
	default:
		fmt.Fprintf(w, "! not compared with the Kubernetes API: %s\n", a.Error)
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

// oddFirst sorts the Services with findings to the front.
func oddFirst(list []api.Service) []api.Service {
	out := slices.Clone(list)
	slices.SortStableFunc(out, func(a, b api.Service) int { return cmp.Compare(worst(a), worst(b)) })
	return out
}

// Services prints one line per route, the Services with findings first.
func Services(out io.Writer, doc api.Services) error {
	w := &errWriter{w: out}
	header(w, doc.Snapshot)
	findings(w, doc.Findings, "")
	services := oddFirst(doc.Services)
	var odd []api.Finding
	for _, s := range services {
		odd = append(odd, s.Findings...)
	}
	findings(w, odd, "")
	if len(services) == 0 {
		return w.err
	}
	if len(doc.Findings)+len(odd) > 0 {
		fmt.Fprintln(w)
	}
	rows := [][]string{{"SERVICE", "FRONTEND", "FROM", "GOES TO"}}
	for _, s := range services {
		name := serviceName(s.Namespace, s.Name, s.Port)
		if len(s.Findings) > 0 {
			name = mark(worstOf(s)) + " " + name
		}
		for _, f := range s.Frontends {
			front, last := frontend(f, s.Protocol), ""
			for _, r := range f.Routes {
				goes := shares(r)
				text := goes
				if goes == last && len(r.Endpoints) > 1 {
					text = "the same"
				}
				last = goes
				text += notes(r, s.SessionAffinity)
				for _, who := range from(r, f.Routes) {
					rows = append(rows, []string{name, front, who, text})
					name, front, text = "", "", ""
				}
			}
		}
	}
	table(w, "", rows)
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
	address := f.Address
	if len(f.Accepted) == 1 {
		address = f.Accepted[0].String()
	}
	if address != "" {
		return string(f.Type) + " " + net.JoinHostPort(address, strconv.Itoa(int(f.Port))) + suffix
	}
	switch {
	case len(f.Accepted) > 0:
		suffix += fmt.Sprintf(" (%d addresses)", len(f.Accepted))
	case f.Family == "ipv6":
		suffix += " (IPv6)"
	}
	return fmt.Sprintf("%s :%d%s", f.Type, f.Port, suffix)
}

// classes says which source classes take a route.
func classes(r api.Route, all []api.Route) string {
	var names []string
	for _, c := range r.From {
		names = append(names, string(c))
	}
	s := strings.Join(names, ", ")
	if len(names) == len(chain.Classes) {
		s = "anywhere"
	}
	if len(r.Sources) == 0 && slices.ContainsFunc(all, func(o api.Route) bool { return len(o.Sources) > 0 && shareClass(o, r) }) {
		s += " else"
	}
	return s
}

// from says which sources take a route, with a line for each range: side by
// side they would widen the column for all Services.
func from(r api.Route, all []api.Route) []string {
	if len(r.Sources) == 0 {
		return []string{classes(r, all)}
	}
	who := classes(r, all) + " "
	if slices.Equal(r.From, []chain.Class{chain.External}) {
		who = "" // as nearly all ranges are
	}
	var out []string
	for _, p := range r.Sources {
		out = append(out, who+p.String())
	}
	return out
}

func shareClass(a, b api.Route) bool {
	return slices.ContainsFunc(a.From, func(c chain.Class) bool { return slices.Contains(b.From, c) })
}

// shares says in one line where a route's connections go, what is lost first.
func shares(r api.Route) string {
	if len(r.Endpoints) == 0 {
		return map[chain.RouteVerdict]string{
			chain.RouteReject: "rejected", chain.RouteDrop: "dropped", chain.RouteNone: "nowhere: no rule applies",
			chain.RouteMixed: "no endpoint: partly refused",
		}[r.Verdict]
	}
	var parts []string
	if r.Undelivered > 0 {
		parts = append(parts, undelivered(r))
	}
	groups := byShare(r.Endpoints)
	for _, g := range groups {
		share := shareText(g[0].Share, g[0].MaxShare)
		switch {
		case len(g) > 1:
			parts = append(parts, share+" each"+addresses(g))
		case len(groups) == 1 && share == "100%":
			parts = append(parts, g[0].Address)
		default:
			parts = append(parts, share+" "+g[0].Address)
		}
	}
	return strings.Join(parts, ", ")
}

// undelivered is the share that reaches no endpoint, at most where a rule
// undelivered says what becomes of the connections that reach no endpoint.
func undelivered(r api.Route) string {
	if len(r.Unknown) > 0 {
		return "up to " + Percent(r.Undelivered) + " NOWHERE"
	}
	var parts []string
	for _, p := range []struct {
		share float64
		word  string
	}{{r.Undelivered - r.Rejected - r.Dropped, "NOWHERE"}, {r.Dropped, "DROPPED"}, {r.Rejected, "REJECTED"}} {
		if p.share > tolerance {
			parts = append(parts, Percent(p.share)+" "+p.word)
		}
	}
	return strings.Join(parts, ", ")
}

// byShare groups endpoints whose shares differ by rounding only, the greatest
// shares first.
func byShare(list []api.Endpoint) [][]api.Endpoint {
	var groups [][]api.Endpoint
	for _, e := range list {
		i := slices.IndexFunc(groups, func(g []api.Endpoint) bool {
			return near(g[0].Share, e.Share) && near(most(g[0]), most(e))
		})
		if i < 0 {
			groups = append(groups, nil)
			i = len(groups) - 1
		}
		groups[i] = append(groups[i], e)
	}
	slices.SortStableFunc(groups, func(a, b []api.Endpoint) int {
		return cmp.Or(cmp.Compare(b[0].Share, a[0].Share), cmp.Compare(most(b[0]), most(a[0])))
	})
	return groups
}

func near(a, b float64) bool { return a-b <= 2*tolerance && b-a <= 2*tolerance }

func most(e api.Endpoint) float64 {
	if e.MaxShare != nil {
		return *e.MaxShare
	}
	return e.Share
}

// notes says in brackets what else is to know of a route.
func notes(r api.Route, a *api.Affinity) string {
	var list []string
	if r.Masquerade {
		list = append(list, "masqueraded")
		if slices.ContainsFunc(r.Endpoints, func(e api.Endpoint) bool { return e.Masquerade != nil && !*e.Masquerade }) {
			list[0] = "partly masqueraded"
		}
	}
	if a != nil && len(r.Endpoints) > 0 {
		list = append(list, "sticky "+duration(a.TimeoutSeconds))
	}
	if len(r.Unknown) > 0 {
		list = append(list, "depends on a rule that cannot be decided")
	}
	if len(list) == 0 {
		return ""
	}
	return "  (" + strings.Join(list, ", ") + ")"
}

// duration prints seconds without the zeros of time.Duration: 3h, not 3h0m0s.
func duration(seconds int) string {
	s := (time.Duration(seconds) * time.Second).String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

func shareText(share float64, most *float64) string {
	if most != nil {
		return Percent(share) + "–" + Percent(*most)
	}
	return Percent(share)
}

// addresses lists endpoints, but not more than fit on a line; then it says how
// many there are.
func addresses(list []api.Endpoint) string {
	const most = 4
	of, tail := "", ""
	if len(list) > most+1 {
		of, tail = fmt.Sprintf(" of %d", len(list)), ", …"
		list = list[:most]
	}
	var out []string
	for _, e := range list {
		out = append(out, e.Address)
	}
	return of + ": " + strings.Join(out, ", ") + tail
}

// ServicesWide prints every endpoint on a line of its own, with its exact
// share and its chain.
func ServicesWide(out io.Writer, doc api.Services) error {
	w := &errWriter{w: out}
	header(w, doc.Snapshot)
	wideFindings(w, doc.Findings, "")
	for i, s := range oddFirst(doc.Services) {
		if i > 0 || len(doc.Findings) > 0 {
			fmt.Fprintln(w)
		}
		fmt.Fprintf(w, "%s %s", serviceName(s.Namespace, s.Name, s.Port), s.Protocol)
		if s.SessionAffinity != nil {
			fmt.Fprintf(w, ", session affinity %s for %s (shares are those of a new client)", s.SessionAffinity.Type, duration(s.SessionAffinity.TimeoutSeconds))
		}
		fmt.Fprintln(w)
		wideFindings(w, unnamed(s.Findings), "  ")
		sideBySide(w, s)
		for _, f := range s.Frontends {
			fmt.Fprintf(w, "  %s\n", frontend(f, "TCP"))
			if len(f.Accepted) > 1 {
				fmt.Fprintf(w, "    on %s\n", list(f.Accepted))
			}
			for _, r := range f.Routes {
				wideRoute(w, r, f.Routes)
			}
		}
	}
	return w.err
}

// wideFindings prints findings with what they rest on.
func wideFindings(w io.Writer, list []api.Finding, indent string) {
	for _, f := range list {
		findings(w, []api.Finding{f}, indent)
		for _, r := range slices.Concat(f.Evidence.Rules, f.Evidence.Objects, f.Evidence.Flows) {
			fmt.Fprintf(w, "%s    %s\n", indent, r)
		}
	}
}

// unnamed leaves the name of the Service out, which stands above its findings.
func unnamed(list []api.Finding) []api.Finding {
	out := slices.Clone(list)
	for i := range out {
		out[i].Service = nil
	}
	return out
}

// list prints values with commas between them.
func list[T fmt.Stringer](values []T) string {
	var out []string
	for _, v := range values {
		out = append(out, v.String())
	}
	return strings.Join(out, ", ")
}

func wideRoute(w io.Writer, r api.Route, all []api.Route) {
	who := classes(r, all)
	if len(r.Sources) > 0 {
		who += " in " + list(r.Sources)
	}
	note := string(r.Verdict)
	if r.Masquerade {
		note += ", masqueraded"
	}
	fmt.Fprintf(w, "    from %s: %s\n", who, note)
	var rows [][]string
	if len(r.Endpoints) > 0 && r.Undelivered > 0 {
		fmt.Fprintf(w, "      %s\n", undelivered(r))
	}
	for _, e := range r.Endpoints {
		exact, masq := short(e.Exact), ""
		if e.MaxShare != nil {
			exact = ""
		}
		if e.Masquerade != nil && *e.Masquerade != r.Masquerade {
			masq = "not masqueraded"
		}
		rows = append(rows, []string{shareText(e.Share, e.MaxShare), e.Address, e.Chain, exact, masq})
	}
	table(w, "      ", rows)
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
	findings(w, doc.Findings, "")
	p := doc.Packet
	fmt.Fprintf(w, "%s %s → %s, from %s\n", p.Protocol, p.From, net.JoinHostPort(p.To.String(), strconv.Itoa(int(p.Port))), classText(p.Class))
	for _, u := range doc.Unknown {
		fmt.Fprintf(w, "! cannot be decided, so the shares are bounds: %s\n", u)
	}
	fmt.Fprintln(w)
	list := make([]branch, len(doc.Outcomes))
	for i := range doc.Outcomes {
		list[i] = branch{decisive(&doc.Outcomes[i]), &doc.Outcomes[i]}
	}
	tree(w, list, 0, "")
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

// decisive leaves out returns, and the jumps into chains that changed nothing.
// It keeps those into the chains of a Service: that a connection passes them
// and reaches no endpoint is just what is odd.
func decisive(o *api.Outcome) []api.Step {
	var out []api.Step
	for i := len(o.Path) - 1; i >= 0; i-- {
		step := o.Path[i]
		target, isJump := jumpTarget(step)
		led := len(out) > 0 && out[len(out)-1].Chain == target
		if step.Effect == "return" || isJump && !led && (o.Verdict == chain.DNAT || step.Table != "nat" || !ofService(target)) {
			continue
		}
		out = append(out, step)
	}
	slices.Reverse(out)
	return out
}

func jumpTarget(s api.Step) (name string, ok bool) {
	if name, ok = strings.CutPrefix(s.Effect, "jump "); ok {
		return name, true
	}
	return strings.CutPrefix(s.Effect, "goto ")
}

// ofService reports whether a chain belongs to one Service.
func ofService(name string) bool {
	return slices.ContainsFunc([]string{"KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-", "KUBE-SEP-"},
		func(prefix string) bool { return strings.HasPrefix(name, prefix) })
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
	shares, width := make([]string, len(groups)), len("33.3% ")
	for i, g := range groups {
		shares[i] = groupShare(g)
		width = max(width, utf8.RuneCountInString(shares[i]))
	}
	for i, g := range groups {
		lead, deeper := "", indent
		if len(groups) > 1 {
			lead = strings.Repeat(" ", width-utf8.RuneCountInString(shares[i])) + shares[i] + " ─ "
			deeper += strings.Repeat(" ", utf8.RuneCountInString(lead))
		}
		if depth >= len(g[0].path) {
			for _, b := range g {
				fmt.Fprintf(w, "%s%s→ %s\n", indent, lead, outcomeText(b))
			}
			continue
		}
		step := g[0].path[depth]
		parted := slices.ContainsFunc(list, func(b branch) bool {
			return depth < len(b.path) && b.path[depth].Chain == step.Chain && !same(b, g[0], depth)
		})
		fmt.Fprintf(w, "%s%s%-6s %s%s\n", indent, lead, step.Table, step.Rule, odds(g, step, parted))
		tree(w, g, depth+1, deeper)
	}
}

// groupShare is the share of connections that takes one of several ways.
func groupShare(g []branch) string {
	var least, greatest float64
	for _, b := range g {
		least += b.outcome.Share
		greatest += b.greatest()
	}
	if greatest = min(greatest, 1); bounded(g) {
		return shareText(least, &greatest)
	}
	return Percent(least)
}

func (b branch) greatest() float64 {
	if b.outcome.MaxShare != nil {
		return *b.outcome.MaxShare
	}
	return b.outcome.Share
}

// bounded reports whether an undecidable rule leaves the shares open.
func bounded(g []branch) bool {
	return slices.ContainsFunc(g, func(b branch) bool { return b.outcome.MaxShare != nil })
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
		switch x, y := astray(a), astray(b); {
		case x && !y: // what no rule took comes behind them all
			return 1
		case y && !x:
			return -1
		}
		if depth >= len(a[0].path) || depth >= len(b[0].path) || a[0].path[depth].Chain != b[0].path[depth].Chain {
			return 0
		}
		return cmp.Compare(a[0].path[depth].Number, b[0].path[depth].Number)
	})
	return groups
}

// astray reports whether branches reach no endpoint, and are not refused.
func astray(g []branch) bool {
	return !slices.ContainsFunc(g, func(b branch) bool { return b.outcome.Verdict != chain.None && b.outcome.Verdict != chain.Accept })
}

// odds says how a random rule comes to the share it has: it sees only what
// the rules before it left.
func odds(g []branch, s api.Step, parted bool) string {
	reach := s.Share / s.Probability
	switch {
	case reach > 1-tolerance || bounded(g):
		return ""
	case s.Probability < 1:
		return fmt.Sprintf("   (%s of the %s that get here)", Percent(s.Probability), Percent(reach))
	case parted:
		return fmt.Sprintf("   (all of the %s that get here)", Percent(reach))
	}
	return ""
}

func outcomeText(b branch) string {
	o := b.outcome
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
	}
	for i := len(b.path) - 1; i >= 0; i-- {
		if target, ok := jumpTarget(b.path[i]); ok && ofService(target) {
			return fmt.Sprintf("%s NOWHERE: it passes %s without an endpoint, and goes on to the address it came with%s", share, target, masq)
		}
	}
	if o.Verdict == chain.Accept {
		return share + " accepted as it is, to the address it came with" + masq
	}
	return share + " unchanged: no rule applies, it goes on to the address it came with" + masq
}
