package monitor

import (
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
)

var (
	clusterIP = netip.MustParseAddr("10.56.0.1")
	front     = netip.AddrPortFrom(clusterIP, 80)
	nodeIP    = netip.MustParseAddr("10.146.0.2")
)

func endpoint(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 52, 1, byte(i)}), 8080)
}

// rules are those of the Service default/app with so many endpoints.
func rules(t *testing.T, endpoints int, change func(*kubeproxy.Service)) string {
	t.Helper()
	sv := kubeproxy.Service{Namespace: "default", Name: "app", ClusterIP: clusterIP, PortNumber: 80}
	for i := range endpoints {
		sv.Endpoints = append(sv.Endpoints, kubeproxy.Endpoint{Addr: endpoint(i), Local: true})
	}
	if change != nil {
		change(&sv)
	}
	var text strings.Builder
	if err := kubeproxy.Write(&text, kubeproxy.Config{PodCIDR: netip.MustParsePrefix("10.52.0.0/16"), NodeIP: nodeIP}, []kubeproxy.Service{sv}); err != nil {
		t.Fatal(err)
	}
	return text.String()
}

func programmed(t *testing.T, text string) *chain.Programmed {
	t.Helper()
	rs, err := iptables.Parse(strings.NewReader(text), "rules")
	if err != nil {
		t.Fatal(err)
	}
	return chain.NewView(rs, chain.Node{Local: []netip.Addr{nodeIP}}).Services()
}

// story drives a watch through seconds, each with a probe and a reading behind it.
type story struct {
	*watch
	t   *testing.T
	r   *route
	now time.Time
	rnd *rand.Rand
}

func newStory(t *testing.T, endpoints int, change func(*kubeproxy.Service)) *story {
	s := &story{
		t: t, now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), rnd: rand.New(rand.NewPCG(3, 3)),
		watch: &watch{front: front, grace: 30 * time.Second, counts: map[Count]uint64{}, seen: map[netip.AddrPort]time.Time{}},
	}
	s.rules(rules(t, endpoints, change))
	return s
}

// rules has readings find other rules from now on.
func (s *story) rules(text string) {
	s.t.Helper()
	p := programmed(s.t, text)
	sv := p.Service(chain.ServicePort{Namespace: "default", Name: "app", Protocol: 6})
	if sv == nil {
		s.t.Fatal("no Service")
	}
	s.service = sv.ServicePort
	s.r = routeOf(sv, &sv.Frontends[0], nodeIP)
	s.see(s.r, s.now, s.now)
}

// probe has one probe end so.
func (s *story) probe(e netip.AddrPort, result Result) {
	start := s.now
	s.now = s.now.Add(time.Second)
	s.add(sample{start: start, end: start.Add(time.Millisecond), source: nodeIP, result: result, endpoint: e})
	s.see(s.r, s.now, s.now)
}

// answers has so many probes be answered, by each endpoint as often as its share.
func (s *story) answers(n int, shares ...float64) {
	for range n {
		s.probe(endpoint(draw(s.rnd, cumulate(shares))), Answered)
	}
}

func (s *story) want(verdict Verdict, codes ...chain.Code) {
	s.t.Helper()
	if v, why := s.verdict(); v != verdict {
		s.t.Errorf("verdict %s (%s), want %s; window %+v", v, why, verdict, s.window)
	}
	var got []chain.Code
	for _, f := range s.findings() {
		got = append(got, f.Code)
	}
	if len(got) != len(codes) || len(got) > 0 && got[0] != codes[0] {
		s.t.Errorf("findings %v, want %v", got, codes)
	}
}

const third = 1. / 3

func TestWatchConsistent(t *testing.T) {
	s := newStory(t, 3, nil)
	s.want(NotEnough)
	s.answers(99, third, third, third)
	s.want(NotEnough)
	s.answers(1, third, third, third)
	s.want(Consistent)
	s.answers(2500, third, third, third)
	s.want(Consistent)
	if s.last == nil || s.last.Samples != 1000 || s.last.Verdict != Consistent || s.window.Samples != 600 {
		t.Errorf("last window %+v, now %+v", s.last, s.window)
	}
	s.rules(rules(t, 2, nil))
	s.want(NotEnough)
	if s.last != nil || s.window.Samples != 0 {
		t.Errorf("last window %+v, now %+v, under other rules", s.last, s.window)
	}
	s.answers(300, .5, .5)
	s.want(Consistent)
}

func TestWatchSkew(t *testing.T) {
	s := newStory(t, 3, nil)
	s.answers(800, .5, .25, .25)
	s.want(Skewed, ObservedSkew)
	f := s.findings()[0]
	if f.Severity != chain.Warning || f.Service.Name != "app" || !strings.Contains(f.Message, endpoint(0).String()+" got ") || f.Addresses[0] != endpoint(0) {
		t.Errorf("finding %+v", f)
	}
	s.answers(100, third, third, third)
	s.want(Skewed, ObservedSkew)
	s.answers(2000, third, third, third)
	s.want(Consistent)

	s = newStory(t, 3, nil)
	s.answers(800, .5, .25, .25)
	s.rules(rules(t, 2, nil))
	s.want(NotEnough)
}

// TestWatchStranger: an endpoint that the rules do not have is impossible, unless
// the kernel may still remember it.
func TestWatchStranger(t *testing.T) {
	s := newStory(t, 3, nil)
	for range 100 {
		s.probe(endpoint(9), Answered)
	}
	s.want(Unknown)
	s = newStory(t, 3, nil)
	s.answers(200, third, third, third)
	s.probe(endpoint(9), Answered)
	s.want(Consistent)
	s.probe(endpoint(9), TimedOut)
	s.want(Skewed, ObservedSkew)
}

// TestWatchDrops: samples around a change of the rules are not counted.
func TestWatchDrops(t *testing.T) {
	s := newStory(t, 3, nil)
	two := rules(t, 2, nil)
	for i := range 200 {
		// The answer comes before the reading that finds the change.
		s.add(sample{start: s.now, end: s.now.Add(time.Millisecond), source: nodeIP, result: Answered, endpoint: endpoint(2)})
		s.now = s.now.Add(time.Second)
		if i%2 == 0 {
			s.rules(two)
		} else {
			s.rules(rules(t, 3, nil))
		}
	}
	s.want(NotEnough)
	if s.dropped != 200 || s.window.Samples != 0 {
		t.Errorf("%d dropped, %d counted", s.dropped, s.window.Samples)
	}
	// A probe that was under way when the rules changed.
	start := s.now.Add(-time.Millisecond)
	s.add(sample{start: start, end: s.now, source: nodeIP, result: Answered, endpoint: endpoint(0)})
	s.see(s.r, s.now.Add(time.Second), s.now.Add(time.Second))
	if s.dropped != 201 || s.window.Samples != 0 {
		t.Errorf("%d dropped, %d counted", s.dropped, s.window.Samples)
	}
}

// TestWatchUnreachable: an endpoint that fails again and again is named, as soon
// as it cannot be a passing thing.
func TestWatchUnreachable(t *testing.T) {
	dead := func(s *story, n int) { // one of three
		for range n {
			s.probe(endpoint(0), Answered)
			s.probe(endpoint(1), TimedOut)
			s.probe(endpoint(2), Answered)
		}
	}
	s := newStory(t, 3, nil)
	dead(s, 9)
	s.want(NotEnough) // within the grace period
	dead(s, 2)
	s.want(NotEnough, EndpointUnreachable)
	f := s.findings()[0]
	if f.Severity != chain.Error || f.About != endpoint(1).String() || !strings.Contains(f.Message, "a black hole for 1/3 of the connections") {
		t.Errorf("finding %+v", f)
	}
	dead(s, 300)
	s.want(Consistent, EndpointUnreachable) // the rules' choice was as programmed
	s.probe(endpoint(1), Answered)
	s.want(Consistent)
	dead(s, 20)
	s.want(Consistent, EndpointUnreachable)
	s.rules(strings.ReplaceAll(rules(t, 3, nil), endpoint(1).String(), endpoint(7).String()))
	s.want(NotEnough) // no longer chosen

	s = newStory(t, 3, nil)
	s.answers(100, third, third, third)
	for range 3 { // within two seconds
		s.probe(endpoint(1), Refused)
	}
	s.want(Consistent)
	for range 20 { // never three in a row
		s.probe(endpoint(1), Answered)
		s.now = s.now.Add(time.Minute)
		s.probe(endpoint(1), Refused)
		s.now = s.now.Add(time.Minute)
		s.probe(endpoint(1), Refused)
	}
	for _, f := range s.findings() {
		if f.Code == EndpointUnreachable {
			t.Errorf("finding %+v", f)
		}
	}
}

// TestWatchUnknown: what cannot be told is not counted against anybody.
func TestWatchUnknown(t *testing.T) {
	s := newStory(t, 3, nil)
	for range 1000 { // the third endpoint fails, and conntrack does not tell
		s.answers(1, third, third, third)
		if s.rnd.IntN(3) == 0 {
			s.probe(netip.AddrPort{}, TimedOut)
		}
	}
	s.want(Unknown)
	s = newStory(t, 3, nil)
	for range 1500 {
		if e := s.rnd.IntN(3); e == 2 {
			s.probe(netip.AddrPort{}, TimedOut)
		} else {
			s.probe(endpoint(e), Answered)
		}
	}
	s.want(Unknown)
	s = newStory(t, 3, nil)
	for range 300 {
		s.probe(endpoint(0), OtherAnswer)
	}
	s.want(Unknown)
	if _, why := s.verdict(); !strings.Contains(why, "echo server") {
		t.Errorf("reason %q", why)
	}
}

func TestWatchUndelivered(t *testing.T) {
	text := rules(t, 3, nil)
	i := strings.LastIndex(text, "-A KUBE-SVC-")
	last := text[i : i+strings.Index(text[i:], "\n")+1]
	s := newStory(t, 3, nil)
	s.rules(strings.Replace(text, last, "", 1))
	if n := len(s.r.ways); n != 3 {
		t.Fatalf("ways %+v, want two endpoints and none", s.r.ways)
	}
	for range 400 {
		if e := s.rnd.IntN(3); e == 2 {
			s.add(sample{start: s.now, end: s.now, source: nodeIP, result: TimedOut, nowhere: true})
			s.now = s.now.Add(time.Second)
		} else {
			s.probe(s.r.ways[e].Address, Answered)
		}
	}
	s.see(s.r, s.now, s.now)
	s.want(Consistent)
}

func TestWatchAffinity(t *testing.T) {
	s := newStory(t, 3, func(sv *kubeproxy.Service) { sv.AffinitySeconds = 10800 })
	s.answers(1500, 1, 0, 0)
	s.want(Pinned)
	if s.pin != endpoint(0) || s.moves != 0 {
		t.Errorf("pinned to %v, moved %d times", s.pin, s.moves)
	}
	s.answers(3, 0, 1)
	if s.pin != endpoint(1) || s.moves != 1 {
		t.Errorf("pinned to %v, moved %d times", s.pin, s.moves)
	}
}

func TestWatchNoEndpoints(t *testing.T) {
	s := newStory(t, 0, nil)
	s.want(NoEndpoints)
}

// TestWatchForgets: counts do not grow with the endpoints that have been.
func TestWatchForgets(t *testing.T) {
	s := newStory(t, 3, nil)
	for i := range 250 {
		s.probe(endpoint(i), Answered)
		s.now = s.now.Add(10 * time.Minute)
	}
	if n := len(s.counts); n > 10 {
		t.Errorf("%d counts are kept", n)
	}
}
