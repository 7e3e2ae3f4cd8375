//go:build linux

package kernel

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
)

// cell is one way to connect to a Service.
type cell struct {
	service  chain.ServicePort
	frontend chain.Frontend
	to       netip.AddrPort
	client   client
	beside   bool // the rule for the frontend does not see it
}

func (c cell) String() string {
	return fmt.Sprintf("%s %s %s from %s", c.service, c.frontend.Type, c.to, c.client.name)
}

// cell returns the way to a Service's frontend of a type. A NodePort is tried
// at the node's main address.
func (w *world) cell(t *testing.T, name string, typ chain.FrontendType, c client) cell {
	t.Helper()
	for i := range w.services {
		if w.services[i].Name != name {
			continue
		}
		for _, f := range w.services[i].Frontends {
			if f.Type == typ {
				return w.cellAt(w.services[i].ServicePort, f, c)
			}
		}
	}
	t.Fatalf("the rules hold no %s of %s", typ, name)
	return cell{}
}

func (w *world) cellAt(s chain.ServicePort, f chain.Frontend, c client) cell {
	to := f.Address
	if f.Type == chain.NodePort {
		to = w.node
	}
	return cell{service: s, frontend: f, to: netip.AddrPortFrom(to, f.Port), client: c}
}

// source is the address that the first packet carries.
func (w *world) source(c cell) netip.Addr {
	if c.client.class == chain.Host && (c.to.Addr().IsLoopback() || slices.Contains(w.view.Node().Local, c.to.Addr())) {
		return c.to.Addr() // the kernel's choice, to reach itself
	}
	return c.client.addr
}

// route returns what the Services' view says of a cell: the route of the
// narrowest sources that hold the client.
func (w *world) route(t *testing.T, c cell) *chain.Route {
	t.Helper()
	var found *chain.Route
	best := -1
	for i := range c.frontend.Routes {
		r := &c.frontend.Routes[i]
		if !slices.Contains(r.From, c.client.class) {
			continue
		}
		bits := 0
		if len(r.Sources) > 0 {
			bits = -1
			for _, p := range r.Sources {
				if p.Contains(w.source(c)) {
					bits = max(bits, p.Bits())
				}
			}
		}
		if bits > best {
			found, best = r, bits
		}
	}
	if found == nil {
		t.Fatalf("%s: no route: %+v", c, c.frontend.Routes)
	}
	return found
}

// expected is what natlens says a client meets, and with which probability.
type expected map[outcome]float64

func (w *world) trace(t *testing.T, c cell) *chain.Trace {
	t.Helper()
	tr, ok := w.view.Trace(w.view.PacketFrom(w.source(c), c.to, c.service.Protocol))
	if !ok {
		t.Fatalf("%s: no table of the family", c)
	}
	if tr.Class != c.client.class || len(tr.Unknown) > 0 || len(tr.Broken) > 0 {
		t.Errorf("%s: traced as class %s, unknown %v, broken %v", c, tr.Class, tr.Unknown, tr.Broken)
	}
	return tr
}

// byTrace is what the trace of the client's own packet says.
func (w *world) byTrace(t *testing.T, c cell) expected {
	t.Helper()
	want := expected{}
	for _, o := range w.trace(t, c).Outcomes {
		switch o.Verdict {
		case chain.DNAT:
			want[w.answer(c, o.To, o.Masquerade)] += o.Share.Float64()
		default:
			want[w.withoutAnswer(c, o.Verdict)] += o.Share.Float64()
		}
	}
	return want
}

// byRoute is what the Service's route says.
func (w *world) byRoute(t *testing.T, c cell) expected {
	t.Helper()
	r := w.route(t, c)
	if len(r.Unknown) > 0 {
		t.Errorf("%s: the route depends on rules that could not be decided: %v", c, r.Unknown)
	}
	want := expected{}
	for _, e := range r.Endpoints {
		want[w.answer(c, e.Address, r.MasqueradesTo(e))] += e.Share.Float64()
	}
	if r.Undelivered.IsZero() {
		return want
	}
	if r.Verdict != chain.RouteMixed {
		want[w.withoutAnswer(c, chain.Verdict(r.Verdict))] += r.Undelivered.Float64()
		return want
	}
	// The route does not say what becomes of the rest; the trace does.
	lost := 0.0
	for _, o := range w.trace(t, c).Outcomes {
		if o.Verdict != chain.DNAT {
			want[w.withoutAnswer(c, o.Verdict)] += o.Share.Float64()
			lost += o.Share.Float64()
		}
	}
	if !near(lost, r.Undelivered.Float64()) {
		t.Errorf("%s: undelivered %v by route, %v by trace", c, r.Undelivered.Float64(), lost)
	}
	return want
}

// answer tells what a client meets that is sent to a pod. One that is sent to
// itself gets no answer unless it is masqueraded: the kernel does not take a
// packet from outside that bears its own address.
func (w *world) answer(c cell, pod netip.AddrPort, masquerade bool) outcome {
	switch {
	case masquerade:
		return outcome{pod: pod, seen: w.node}
	case pod.Addr() == c.client.addr && c.client.class == chain.Pod:
		return outcome{fate: silence}
	}
	return outcome{pod: pod, seen: w.source(c)}
}

// withoutAnswer tells how a client feels a verdict. What no rule takes on dies
// outside, unanswered; but the node itself refuses what is sent to it, since
// nothing listens on these ports there.
func (w *world) withoutAnswer(c cell, v chain.Verdict) outcome {
	local := c.to.Addr().IsLoopback() || slices.Contains(w.view.Node().Local, c.to.Addr())
	if v == chain.Reject || v != chain.Drop && local {
		return outcome{fate: refused}
	}
	return outcome{fate: silence}
}

func near(a, b float64) bool { return max(a-b, b-a) < 1e-9 }

func (e expected) equal(o expected) bool { return maps.EqualFunc(e, o, near) }

func (e expected) String() string {
	var list []string
	for o, share := range e {
		list = append(list, fmt.Sprintf("%.10f %s", share, o))
	}
	slices.Sort(list)
	return "  " + strings.Join(list, "\n  ")
}

// Attempts per cell, times the cell's factor: enough of each outcome to see a
// share that is off by some hundredths, and few where there is only one.
const (
	perOutcome = 40
	onlyOne    = 12
	unanswered = 3
)

// patience is how long a connection may take that should be answered, and quiet
// how long one without an answer is waited for: less than the second after which
// TCP sends its SYN again, and the rules count it again.
const (
	patience = 5 * time.Second
	quiet    = 700 * time.Millisecond
	resend   = 900 * time.Millisecond
)

// check connects, and compares with what natlens says. factor multiplies the
// usual number of attempts.
func (w *world) check(t *testing.T, c cell, factor int) {
	t.Helper()
	want := w.byRoute(t, c)
	if traced := w.byTrace(t, c); !traced.equal(want) {
		t.Errorf("%s: the route and the trace differ:\n%s\nand\n%s", c, want, traced)
	}
	w.compare(t, c, want, factor)
}

// compare connects, and compares with what is expected. Where silence is, it
// does so in the background: w.waiting waits for it.
func (w *world) compare(t *testing.T, c cell, want expected, factor int) {
	t.Helper()
	n := perOutcome * factor * len(want)
	if len(want) == 1 {
		n = onlyOne
		if w.hasOutcome(want, silence) || w.hasOutcome(want, refused) {
			n = unanswered
		}
	}
	limit := patience
	if w.hasOutcome(want, silence) {
		limit = quiet
	}
	judge := func() {
		w.judge(t, c.String(), want, func() map[outcome]int {
			got := w.sample(t, c, want, n, limit)
			w.mu.Lock()
			defer w.mu.Unlock()
			w.pool.add(c.service, want, got)
			return got
		})
	}
	if limit == quiet {
		w.waiting.Go(judge) // most of its time goes by waiting
		return
	}
	judge()
}

func (w *world) hasOutcome(want expected, fate string) bool {
	_, ok := want[outcome{fate: fate}]
	return ok
}

// judge draws a sample, and a second one if the first is unlikely.
func (w *world) judge(t *testing.T, what string, want expected, draw func() map[outcome]int) {
	t.Helper()
	var seen []string
	for range 2 {
		got := draw()
		for o, n := range got {
			if want[o] == 0 {
				t.Errorf("%s: %d times %s, which natlens holds to be impossible; it says\n%s", what, n, o, want)
				return
			}
		}
		var counts []int
		var shares []float64
		for o, share := range want {
			counts, shares = append(counts, got[o]), append(shares, share)
		}
		p := pValue(counts, shares)
		if p > unlikely {
			return
		}
		seen = append(seen, fmt.Sprintf("%v (p = %.2g)", got, p))
	}
	t.Errorf("%s: natlens says\n%s\nbut the kernel did %s", what, want, strings.Join(seen, ", then "))
}

// sample makes n connections and counts what came of them. It gives up early
// when some come to what is not expected.
func (w *world) sample(t *testing.T, c cell, want expected, n int, limit time.Duration) map[outcome]int {
	t.Helper()
	parallel := 16
	if limit == quiet {
		parallel = 128
	}
	got := map[outcome]int{}
	ctx, giveUp := context.WithCancel(t.Context())
	defer giveUp()
	var mu sync.Mutex
	var wg sync.WaitGroup
	turn := make(chan struct{}, parallel)
	for range n {
		if ctx.Err() != nil {
			break
		}
		turn <- struct{}{}
		wg.Go(func() {
			defer func() { <-turn }()
			o, err := w.connectNoted(ctx, c, limit)
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				t.Errorf("%s: %v", c, err)
				giveUp()
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if got[o]++; want[o] == 0 && got[o] >= unanswered {
				giveUp()
			}
		})
	}
	wg.Wait()
	return got
}

// connectNoted connects and enters the connection in the ledger.
func (w *world) connectNoted(ctx context.Context, c cell, limit time.Duration) (outcome, error) {
	start := time.Now()
	o, err := w.connect(ctx, c.client, c.service.Protocol, c.to, limit)
	if o.seen == w.node2 {
		o.seen = w.node // the kernel's choice: to natlens they are the same
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	again := time.Since(start) > resend && c.service.Protocol == netfilter.TCP
	itself := o.fate == silence && slices.Contains(w.pods, c.client.addr)
	w.ledger.note(c, o, again || itself)
	return o, err
}

// pool sums up, for each Service, what came of all its samples and what was
// expected of them: a share that is a little off shows only in thousands of
// connections.
type pool map[chain.ServicePort]map[outcome]*pooled

type pooled struct {
	expected float64
	got      int
}

func (p pool) add(s chain.ServicePort, want expected, got map[outcome]int) {
	if p[s] == nil {
		p[s] = map[outcome]*pooled{}
	}
	at := func(o outcome) *pooled {
		o.seen = netip.Addr{}
		if p[s][o] == nil {
			p[s][o] = &pooled{}
		}
		return p[s][o]
	}
	n := 0
	for o, k := range got {
		at(o).got += k
		n += k
	}
	for o, share := range want {
		at(o).expected += share * float64(n)
	}
}

// checkPool compares the sums. There is no second sample here, so the bound is
// the probability that remains when there is one.
func (w *world) checkPool(t *testing.T) {
	for s, sums := range w.pool {
		var counts []int
		var shares []float64
		total := 0.0
		for _, p := range sums {
			total += p.expected
		}
		for _, p := range sums {
			counts, shares = append(counts, p.got), append(shares, p.expected/total)
		}
		if p := pValue(counts, shares); p < unlikely*unlikely {
			t.Errorf("%s: the kernel did %v, natlens expected the shares %.4f (p = %.2g)", s, counts, shares, p)
		}
	}
}
