package monitor

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/natlens/natlens/pkg/chain"
)

const (
	// failuresInRow and failuresFor are what it takes at least to call an endpoint
	// unreachable: the failures in a row, and the time from the first to the last.
	// A pod that ends is out of the rules before.
	failuresInRow = 3
	failuresFor   = 10 * time.Second
	// unknownPart is how many of a window's samples may be of unknown endpoints for
	// the window to tell that the shares are consistent: one in so many.
	unknownPart = 10
	// strangerAfter is how long a route has stood when an endpoint that it does not
	// have counts: the kernel keeps the choice for a connection that nobody answered
	// for two minutes (nf_conntrack_tcp_timeout_syn_sent), and a port can be used
	// again meanwhile.
	strangerAfter = 3 * time.Minute
	strangers     = 2 // such samples of a window are enough
	// listenAfter is how long after a refused connection new ones are listened for:
	// conntrack forgets those that are refused.
	listenAfter = time.Minute
	// mostPending bounds the samples that wait for a reading of the rules.
	mostPending = 1000
	// keepCounts is how long the counts of an endpoint outlive its last probe.
	keepCounts = time.Hour
)

// sample is what became of one probe.
type sample struct {
	start, end time.Time
	source     netip.Addr
	result     Result
	// endpoint is where the connection went. Not known, or known to be none: then
	// it is invalid, and nowhere says which.
	endpoint netip.AddrPort
	nowhere  bool
	took     time.Duration
}

// watch follows one frontend. It is used with the Monitor's lock held.
type watch struct {
	service chain.ServicePort
	front   netip.AddrPort
	grace   time.Duration

	route   *route    // of the last reading; nil for none
	changed time.Time // when a reading had first found it
	source  netip.Addr
	pending []sample
	dropped int

	window Window
	test   *Test // nil when there are no shares to test
	last   *Window
	skew   *Finding
	ends   map[netip.AddrPort]*Endpoint
	pin    netip.AddrPort
	moves  int

	counts map[Count]uint64 // with Probes 0
	seen   map[netip.AddrPort]time.Time
	hist   Histogram
	probed time.Time
	took   time.Duration

	inFlight    bool
	next        time.Time // probe
	listenUntil time.Time
}

// add takes in a probe that has ended.
func (w *watch) add(s sample) {
	w.counts[Count{Endpoint: s.endpoint, Result: s.result}]++
	w.seen[s.endpoint] = s.end
	w.probed, w.took = s.end, s.took
	if s.result == Answered {
		w.hist.add(s.took)
	}
	if s.result == Refused {
		w.listenUntil = s.end.Add(listenAfter)
	}
	if s.source.IsValid() {
		w.source = s.source
	}
	if w.pending = append(w.pending, s); len(w.pending) > mostPending {
		w.pending = w.pending[1:]
		w.dropped++
	}
	w.forget(s.end)
}

// forget bounds the counts to endpoints that were there lately.
func (w *watch) forget(now time.Time) {
	for a, at := range w.seen {
		if now.Sub(at) > keepCounts {
			delete(w.seen, a)
			maps.DeleteFunc(w.counts, func(c Count, _ uint64) bool { return c.Endpoint == a })
		}
	}
}

// see takes in the route that a reading found now, whose rules are at least as new
// as of a time.
func (w *watch) see(r *route, at, now time.Time) {
	if !w.route.same(r) || w.changed.IsZero() {
		w.reset(r, now)
		return
	}
	w.route = r
	left := w.pending[:0]
	for _, s := range w.pending {
		switch {
		case s.start.Before(w.changed): // it may have met the rules before
			w.dropped++
		case s.end.After(at):
			left = append(left, s)
		default:
			w.settle(s)
		}
	}
	w.pending = left
	for _, e := range w.ends {
		w.judge(e, now)
	}
}

// reset begins anew, under another route.
func (w *watch) reset(r *route, now time.Time) {
	w.route, w.changed = r, now
	w.dropped += len(w.pending)
	w.pending, w.last, w.skew, w.pin, w.moves = nil, nil, nil, netip.AddrPort{}, 0
	ends := map[netip.AddrPort]*Endpoint{}
	if r != nil {
		for _, way := range r.ways {
			if a := way.Address; a.IsValid() {
				ends[a] = cmp.Or(w.ends[a], &Endpoint{Address: a})
			}
		}
	}
	w.ends = ends
	w.open(now)
}

// open begins a window.
func (w *watch) open(now time.Time) {
	w.window, w.test = Window{Start: now}, nil
	if !w.route.delivers() {
		return
	}
	w.window.Ways = slices.Clone(w.route.ways)
	w.window.Size, w.window.Enough = WindowOf(len(w.route.ways))
	if w.route.open == "" && w.route.affinity == 0 {
		w.test = NewTest(w.route.shares())
		w.window.Evidence = 1
	}
}

// settle counts a sample that met the present route.
func (w *watch) settle(s sample) {
	if !w.route.delivers() {
		return
	}
	w.answered(s)
	w.pinned(s)
	way := w.route.way(s.endpoint)
	switch {
	case s.result == OtherAnswer || !s.endpoint.IsValid() && !s.nowhere,
		way < 0 && s.start.Sub(w.changed) < strangerAfter:
		w.window.Unknown++
	case way < 0:
		w.window.Samples++
		w.stranger(s.endpoint)
	default:
		w.window.Samples++
		w.window.Ways[way].Samples++
		if w.test != nil {
			w.test.Add(way)
		}
	}
	w.decide(s.end)
}

func (w *watch) stranger(a netip.AddrPort) {
	list := &w.window.Strangers
	i := slices.IndexFunc(*list, func(c Count) bool { return c.Endpoint == a })
	if i < 0 {
		i = len(*list)
		*list = append(*list, Count{Endpoint: a})
	}
	(*list)[i].Probes++
}

// decide closes the window when it has told what it can.
func (w *watch) decide(now time.Time) {
	if w.test == nil {
		if w.window.Samples+w.window.Unknown >= w.window.Size {
			w.open(now) // the counts of it are of some time
		}
		return
	}
	w.window.Evidence = w.test.Evidence()
	known := w.window.Samples - int(w.strange())
	switch {
	case w.strange() >= strangers:
		w.window.Evidence = mostEvidence
		w.close(Skewed, now)
	case w.window.Evidence >= 1/Alpha && w.test.Without(w.window.Unknown) >= 1/Alpha:
		w.close(Skewed, now)
	case w.window.Samples+w.window.Unknown < w.window.Size:
	case w.tooUnknown() || known < w.window.Enough:
		w.close(Unknown, now)
	default:
		w.close(Consistent, now)
	}
}

func (w *watch) strange() (n uint64) {
	for _, c := range w.window.Strangers {
		n += c.Probes
	}
	return n
}

func (w *watch) tooUnknown() bool {
	return w.window.Unknown*unknownPart > w.window.Samples+w.window.Unknown
}

func (w *watch) close(v Verdict, now time.Time) {
	closed := w.window
	closed.End, closed.Verdict = now, v
	w.last = &closed
	switch {
	case v == Consistent:
		w.skew = nil
	case v == Skewed && w.skew == nil:
		w.skew = w.skewed(&closed)
	}
	w.open(now)
}

// verdict sums up, and says why where there is nothing to sum up.
func (w *watch) verdict() (Verdict, string) {
	now := &w.window
	switch {
	case !w.route.delivers():
		return NoEndpoints, "the rules send no connection of this node to an endpoint"
	case w.skew != nil:
		return Skewed, ""
	case w.route.open != "":
		return Unknown, w.route.open
	case w.route.affinity > 0:
		return Pinned, "session affinity keeps all connections of this node at one endpoint"
	case w.tooUnknown() && now.Samples+now.Unknown >= now.Enough:
		return Unknown, w.whyUnknown()
	case now.Samples >= now.Enough:
		return Consistent, ""
	case w.last != nil && w.last.Verdict == Consistent:
		return Consistent, ""
	}
	return NotEnough, ""
}

func (w *watch) whyUnknown() string {
	other := uint64(0)
	for c, n := range w.counts {
		if c.Result == OtherAnswer {
			other += n
		}
	}
	if other > 0 {
		return "the answers are not those of an echo server"
	}
	return "neither an answer nor conntrack tells where too many of the connections went"
}

// pinned notes to which endpoint affinity has tied this node.
func (w *watch) pinned(s sample) {
	if w.route.affinity == 0 || !s.endpoint.IsValid() {
		return
	}
	if w.pin.IsValid() && w.pin != s.endpoint {
		w.moves++
	}
	w.pin = s.endpoint
}

// answered counts failures in a row.
func (w *watch) answered(s sample) {
	e := w.ends[s.endpoint]
	if e == nil {
		return
	}
	if !s.result.failed() {
		*e = Endpoint{Address: e.Address, Answered: s.end}
		return
	}
	if e.Failures == 0 {
		e.First = s.start
	}
	e.Failures++
	e.Last, e.Result = s.end, s.result
}

// judge calls an endpoint unreachable, once the rules have stood for the grace
// period.
func (w *watch) judge(e *Endpoint, now time.Time) {
	if e.Failures >= failuresInRow && e.Last.Sub(e.First) >= failuresFor && now.Sub(w.changed) >= w.grace {
		e.Unreachable = true
	}
}

// findings are those of now.
func (w *watch) findings() []Finding {
	var out []Finding
	if w.skew != nil {
		out = append(out, *w.skew)
	}
	for _, way := range w.window.Ways {
		if e := w.ends[way.Address]; e != nil && e.Unreachable {
			out = append(out, w.unreachable(e, way.Share))
		}
	}
	return out
}

func (w *watch) unreachable(e *Endpoint, share float64) Finding {
	how := map[Result]string{Refused: "it refuses connections", TimedOut: "no answer comes in time", Reset: "it ends connections without an answer", NoRoute: "there is no way to its host"}[e.Result]
	part := fmt.Sprintf("%.3g%%", 100*share)
	if n := 1 / share; n-float64(int(n+.5)) < 1e-6 && float64(int(n+.5))-n < 1e-6 {
		part = fmt.Sprintf("1/%d", int(n+.5))
	}
	return w.finding(EndpointUnreachable, chain.Error, e.Address.String(), e.First, []netip.AddrPort{e.Address},
		"%s does not answer (%s), but the rules send connections there: a black hole for %s of the connections to ClusterIP %s from this node",
		e.Address, cmp.Or(how, "connections fail"), part, w.front)
}

// skewed tells what of a window is not as programmed, the greatest difference
// first.
func (w *watch) skewed(closed *Window) *Finding {
	ways := slices.Clone(closed.Ways)
	for _, c := range closed.Strangers {
		ways = append(ways, Way{Address: c.Endpoint, Samples: int(c.Probes)})
	}
	off := func(way Way) float64 {
		d := float64(way.Samples) - way.Share*float64(closed.Samples)
		return max(d, -d)
	}
	slices.SortStableFunc(ways, func(a, b Way) int { return cmp.Compare(off(b), off(a)) })
	const shown = 4
	var parts []string
	var addresses []netip.AddrPort
	for _, way := range ways[:min(shown, len(ways))] {
		name := "no endpoint"
		if way.Address.IsValid() {
			name = way.Address.String()
			addresses = append(addresses, way.Address)
		}
		parts = append(parts, fmt.Sprintf("%s got %d, %.1f expected", name, way.Samples, way.Share*float64(closed.Samples)))
	}
	if len(ways) > shown {
		parts = append(parts, fmt.Sprintf("and %d more", len(ways)-shown))
	}
	f := w.finding(ObservedSkew, chain.Warning, "ClusterIP "+w.front.String(), closed.End, addresses,
		"%d connections from this node to ClusterIP %s did not follow the programmed shares: %s (e-value %.2g, where %.0g is enough)",
		closed.Samples, w.front, strings.Join(parts, "; "), closed.Evidence, 1/Alpha)
	return &f
}

func (w *watch) finding(code chain.Code, s chain.Severity, about string, since time.Time, addresses []netip.AddrPort, format string, args ...any) Finding {
	return Finding{
		Finding:   chain.Finding{Code: code, Severity: s, Service: &w.service, About: about, Message: fmt.Sprintf(format, args...)},
		Addresses: addresses, Since: since,
	}
}

// port prints the watch.
func (w *watch) port() Port {
	p := Port{
		Service: w.service, Frontend: w.front, Pin: w.pin, Moves: w.moves, Window: w.window, Last: w.last,
		Dropped: w.dropped, Duration: w.hist, Probed: w.probed, Took: w.took,
	}
	if w.route != nil {
		p.AffinitySeconds = w.route.affinity
	}
	p.Verdict, p.Reason = w.verdict()
	p.Window.Ways, p.Window.Strangers = slices.Clone(w.window.Ways), slices.Clone(w.window.Strangers)
	for _, e := range w.ends {
		p.Endpoints = append(p.Endpoints, *e)
	}
	slices.SortFunc(p.Endpoints, func(a, b Endpoint) int { return a.Address.Compare(b.Address) })
	for c, n := range w.counts {
		c.Probes = n
		p.Probes = append(p.Probes, c)
	}
	slices.SortFunc(p.Probes, func(a, b Count) int {
		return cmp.Or(a.Endpoint.Compare(b.Endpoint), cmp.Compare(a.Result, b.Result))
	})
	return p
}
