package monitor

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/natlens/natlens/internal/desired"
	"github.com/natlens/natlens/internal/signal"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
)

const (
	// MostFrontends bounds how many ClusterIPs and ports are probed.
	MostFrontends = 32
	// mostAtOnce bounds the probes under way.
	mostAtOnce = 8
)

// Selector chooses Service ports by name; an empty Port, which may also be a
// number, chooses all.
type Selector struct{ Namespace, Name, Port string }

// String returns the Selector as it is written: NAMESPACE/NAME[:PORT].
func (s Selector) String() string {
	text := s.Namespace + "/" + s.Name
	if s.Port != "" {
		text += ":" + s.Port
	}
	return text
}

func (s Selector) fits(sv *chain.Service, f *chain.Frontend) bool {
	return s.Namespace == sv.Namespace && s.Name == sv.Name && (s.Port == "" || s.Port == sv.Port || s.Port == strconv.Itoa(int(f.Port)))
}

// Monitor probes Services. Its fields are set before it is used.
type Monitor struct {
	// Marked returns the Services to probe that the API marks; nil for none.
	Marked func() []desired.Key
	// Selected are Services to probe besides.
	Selected []Selector
	// Interval is the time between two probes of a frontend, some more or less.
	Interval time.Duration
	// Grace is how long rules have stood before an endpoint that does not answer is
	// a finding.
	Grace time.Duration
	// Lag is how much older than a reading the rules may be that it found.
	Lag time.Duration
	// Within brings a function that makes sockets into the network namespace to
	// probe from; nil for the process's own.
	Within func(func() error) error
	Log    *slog.Logger

	mu         sync.Mutex
	programmed *chain.Programmed
	marked     []desired.Key
	watches    map[key]*watch
	left       int
	absent     []Selector // those that fit nothing, which the log tells once
	number     uint64
	news       uint64
	atOnce     int
	state      atomic.Pointer[State]
	changed    signal.Signal
	wake       signal.Signal // the schedule has changed

	// probe is a prober's, but in tests.
	probe func(ctx context.Context, to netip.AddrPort, knows func(netip.AddrPort) bool, listen bool) sample
}

// key identifies a watch.
type key struct {
	service chain.ServicePort
	front   netip.AddrPort
}

func (k key) compare(o key) int {
	return cmp.Or(k.service.Compare(o.service), k.front.Compare(o.front))
}

// State returns what probes have told so far; it is never nil.
func (m *Monitor) State() *State {
	if s := m.state.Load(); s != nil {
		return s
	}
	return &State{}
}

// Changed gets a value after each probe.
func (m *Monitor) Changed() <-chan struct{} { return m.changed.C() }

// See takes in what a reading of the rules found, which began at a time. Each good
// reading is to be told.
func (m *Monitor) See(p *chain.Programmed, began time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var marked []desired.Key
	if m.Marked != nil {
		marked = m.Marked()
	}
	if p != m.programmed || !slices.Equal(marked, m.marked) || m.watches == nil {
		m.programmed, m.marked = p, marked
		m.choose(began)
	}
	for k, w := range m.watches {
		sv, f := m.frontend(k)
		w.see(routeOf(sv, f, w.source), began.Add(-m.Lag), time.Now())
	}
	m.publish()
}

// choose makes watches for the frontends that are to be probed, and ends others.
func (m *Monitor) choose(now time.Time) {
	var want []key
	for i := range m.programmed.Services {
		sv := &m.programmed.Services[i]
		for j := range sv.Frontends {
			if f := &sv.Frontends[j]; probeable(sv, f) && m.wants(sv, f) {
				want = append(want, key{sv.ServicePort, netip.AddrPortFrom(f.Address, f.Port)})
			}
		}
	}
	slices.SortFunc(want, key.compare)
	left := max(0, len(want)-MostFrontends)
	if left > 0 && left != m.left {
		m.Log.Warn("more Services are marked for probing than are probed", "probed", MostFrontends, "left", left)
	}
	m.left = left
	m.warnOfAbsent()
	watches := map[key]*watch{}
	for _, k := range want[:len(want)-left] {
		w := m.watches[k]
		if w == nil {
			w = &watch{
				service: k.service, front: k.front, grace: m.Grace, next: now.Add(m.pause() / 2),
				counts: map[Count]uint64{}, seen: map[netip.AddrPort]time.Time{},
			}
		}
		watches[k] = w
	}
	m.watches = watches
	m.wake.Wake()
}

// probeable reports whether a frontend is of the kind that is probed.
func probeable(sv *chain.Service, f *chain.Frontend) bool {
	return f.Type == chain.ClusterIP && sv.Protocol == netfilter.TCP
}

// warnOfAbsent logs the selected Services that the rules lack: a name with a slip
// in it would look like one that nothing is wrong with.
func (m *Monitor) warnOfAbsent() {
	var absent []Selector
	for _, s := range m.Selected {
		if m.selects(s) {
			continue
		}
		absent = append(absent, s)
		if !slices.Contains(m.absent, s) {
			m.Log.Warn("a Service to connect to has no TCP ClusterIP in the rules", "service", s)
		}
	}
	m.absent = absent
}

func (m *Monitor) selects(s Selector) bool {
	return slices.ContainsFunc(m.programmed.Services, func(sv chain.Service) bool {
		return slices.ContainsFunc(sv.Frontends, func(f chain.Frontend) bool { return probeable(&sv, &f) && s.fits(&sv, &f) })
	})
}

func (m *Monitor) wants(sv *chain.Service, f *chain.Frontend) bool {
	_, marked := slices.BinarySearchFunc(m.marked, desired.Key{Namespace: sv.Namespace, Name: sv.Name}, desired.Key.Compare)
	return marked || slices.ContainsFunc(m.Selected, func(s Selector) bool { return s.fits(sv, f) })
}

// frontend finds that of a watch in the rules.
func (m *Monitor) frontend(k key) (*chain.Service, *chain.Frontend) {
	sv := m.programmed.Service(k.service)
	i := slices.IndexFunc(sv.Frontends, func(f chain.Frontend) bool {
		return f.Type == chain.ClusterIP && netip.AddrPortFrom(f.Address, f.Port) == k.front
	})
	return sv, &sv.Frontends[i]
}

// publish makes the state anew.
func (m *Monitor) publish() {
	m.number++
	s := &State{Number: m.number, Left: m.left}
	for _, w := range m.watches {
		s.Ports = append(s.Ports, w.port())
		s.Findings = append(s.Findings, w.findings()...)
	}
	slices.SortFunc(s.Ports, func(a, b Port) int {
		return key{a.Service, a.Frontend}.compare(key{b.Service, b.Frontend})
	})
	slices.SortFunc(s.Findings, func(a, b Finding) int {
		return cmp.Or(a.Service.Compare(*b.Service), cmp.Compare(a.Code, b.Code), cmp.Compare(a.About, b.About))
	})
	if !m.State().says(s) {
		m.news++
	}
	s.News = m.news
	m.state.Store(s)
}

// says reports whether two states tell readers the same, numbers apart.
func (s *State) says(o *State) bool {
	return slices.EqualFunc(s.Ports, o.Ports, func(a, b Port) bool {
		return a.Service == b.Service && a.Frontend == b.Frontend && a.Verdict == b.Verdict && a.Reason == b.Reason
	}) && slices.EqualFunc(s.Findings, o.Findings, func(a, b Finding) bool {
		return a.Code == b.Code && *a.Service == *b.Service && a.About == b.About && a.Message == b.Message && a.Since.Equal(b.Since)
	})
}

// Run probes until the context ends.
func (m *Monitor) Run(ctx context.Context) {
	var probes sync.WaitGroup
	defer probes.Wait()
	for {
		timer := time.NewTimer(m.launch(ctx, &probes))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		case <-m.wake.C():
			timer.Stop()
		}
	}
}

// idle is how long there is nothing to do without a target.
const idle = time.Minute

// launch begins the probes that are due, and returns how long nothing more is.
func (m *Monitor) launch(ctx context.Context, probes *sync.WaitGroup) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	rest := idle
	for _, k := range slices.SortedFunc(maps.Keys(m.watches), key.compare) {
		w := m.watches[k]
		if w.inFlight || !w.route.delivers() {
			continue
		}
		if wait := w.next.Sub(now); wait > 0 {
			rest = min(rest, wait)
			continue
		}
		if m.atOnce >= mostAtOnce {
			continue // the end of one wakes
		}
		w.inFlight, w.next = true, now.Add(m.pause())
		m.atOnce++
		rest = min(rest, w.next.Sub(now))
		route, listen := w.route, now.Before(w.listenUntil)
		probes.Go(func() { m.connect(ctx, w, route, listen) })
	}
	return rest
}

// pause is an interval, some more or less, so that probes from many nodes, and of
// many Services, do not keep step.
func (m *Monitor) pause() time.Duration {
	return time.Duration((.8 + .4*rand.Float64()) * float64(m.Interval))
}

// connect makes one probe of a watch, which has the route, and takes it in.
func (m *Monitor) connect(ctx context.Context, w *watch, r *route, listen bool) {
	s := m.prober()(ctx, w.front, func(a netip.AddrPort) bool { return a.IsValid() && r.way(a) >= 0 }, listen)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.atOnce--
	w.inFlight = false
	m.wake.Wake()
	if ctx.Err() != nil { // it ended the probe
		return
	}
	w.add(s)
	m.publish()
	m.changed.Wake()
}

func (m *Monitor) prober() func(context.Context, netip.AddrPort, func(netip.AddrPort) bool, bool) sample {
	switch {
	case m.probe != nil:
		return m.probe
	case m.Within != nil:
		return prober{m.Within}.probe
	}
	return prober{func(f func() error) error { return f() }}.probe
}
