package observed

import (
	"bytes"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/natlens/natlens/internal/desired"
	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/conntrack"
	"github.com/natlens/natlens/pkg/netfilter"
)

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// dns is a UDP Service with a NodePort.
func dns(name string, endpoints ...string) kubeproxy.Service {
	s := kubeproxy.Service{Namespace: "kube-system", Name: name, Protocol: "UDP", ClusterIP: netip.MustParseAddr("10.96.0.10"), PortNumber: 53, NodePort: 30053}
	for _, e := range endpoints {
		s.Endpoints = append(s.Endpoints, kubeproxy.Endpoint{Addr: ap(e)})
	}
	return s
}

func programmed(t *testing.T, services ...kubeproxy.Service) *chain.Programmed {
	t.Helper()
	var b bytes.Buffer
	if err := kubeproxy.Write(&b, kubeproxy.Config{Family: kubeproxy.IPv4, PodCIDR: netip.MustParsePrefix("10.52.0.0/16")}, services); err != nil {
		t.Fatal(err)
	}
	_, p := parsed(t, b.String())
	return p
}

// wants is an API with the Service dns, whose endpoints are in the given states.
func wants(t *testing.T, ready, terminating []string) *desired.View {
	t.Helper()
	o := desired.NewObjects("node1")
	o.SetNode(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node1"}})
	o.SetService(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: "dns"}, Spec: corev1.ServiceSpec{
		ClusterIP: "10.96.0.10", Ports: []corev1.ServicePort{{Protocol: corev1.ProtocolUDP, Port: 53}}}})
	port, name, udp := int32(53), "", corev1.ProtocolUDP
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Namespace: "kube-system", Name: "dns-1", Labels: map[string]string{discoveryv1.LabelServiceName: "dns"}},
		Ports:      []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &udp}},
	}
	yes, no := true, false
	for _, a := range ready {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}, Conditions: discoveryv1.EndpointConditions{Ready: &yes, Serving: &yes}})
	}
	for _, a := range terminating {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}, Conditions: discoveryv1.EndpointConditions{Ready: &no, Serving: &yes, Terminating: &yes}})
	}
	o.SetSlice(s)
	return o.View(desired.Release(37))
}

// stage runs passes over flows, ten seconds apart.
type stage struct {
	w     Watch
	now   Moment
	flows []conntrack.Flow
	used  bool // the clients of all flows send packets
	last  *Flows
}

func newStage(p *chain.Programmed) *stage {
	return &stage{
		w:   Watch{Grace: 30 * time.Second},
		now: Moment{Time: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), Programmed: p, Local: []netip.Addr{netip.MustParseAddr("10.146.0.2")}},
	}
}

// flow is a UDP flow of that client; what is sent for it stands for 100 s.
func flow(from, to, via string) conntrack.Flow {
	return conntrack.Flow{ID: 1, Protocol: netfilter.UDP, Source: ap(from), Destination: ap(to), To: ap(via), Status: conntrack.Redirected, Timeout: 100}
}

// pass looks once, and returns what was found as "endpoint count".
func (s *stage) pass() []string {
	p := s.w.Begin(s.now)
	for i := range s.flows {
		p.Add(&s.flows[i])
	}
	s.last = p.End(time.Millisecond)
	s.now.Time = s.now.Time.Add(10 * time.Second)
	for i := range s.flows {
		if s.flows[i].Timeout -= 10; s.used {
			s.flows[i].Timeout = 100 - uint32(i)
		}
	}
	var out []string
	for _, f := range s.last.Findings {
		out = append(out, f.Service.String()+" "+f.About)
	}
	return out
}

func (s *stage) want(t *testing.T, when string, passes int, want ...string) {
	t.Helper()
	for range passes {
		if got := s.pass(); !slices.Equal(got, want) {
			t.Errorf("%s, at %v: found %q, want %q", when, s.now.Time.Sub(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)), got, want)
		}
	}
}

func TestFlows(t *testing.T) {
	s := newStage(programmed(t, dns("dns", "10.52.1.4:53", "10.52.1.5:53"), kubeproxy.Service{
		Namespace: "default", Name: "app", ClusterIP: netip.MustParseAddr("10.96.0.1"), PortNumber: 80,
		Endpoints: []kubeproxy.Endpoint{{Addr: ap("10.52.1.4:80")}}, LoadBalancerIPs: []netip.Addr{netip.MustParseAddr("203.0.113.7")},
	}))
	tcp := func(f conntrack.Flow, state uint8) conntrack.Flow {
		f.Protocol, f.State = netfilter.TCP, state
		return f
	}
	other := flow("10.52.1.9:1", "10.96.0.10:53", "10.52.1.4:53")
	other.Zone = 7
	s.flows = []conntrack.Flow{
		flow("10.52.1.9:1", "10.96.0.10:53", "10.52.1.4:53"),
		flow("10.52.1.9:2", "10.96.0.10:53", "10.52.1.5:53"),
		flow("192.0.2.1:3", "10.146.0.2:30053", "10.52.1.5:53"), // by the NodePort
		flow("127.0.0.1:4", "127.0.0.1:30053", "10.52.1.5:53"),
		flow("192.0.2.1:5", "10.146.0.9:30053", "10.52.1.5:53"), // not this node's address
		flow("10.52.1.9:6", "10.96.0.99:53", "10.52.1.5:53"),    // no Service
		tcp(flow("10.52.1.9:7", "10.96.0.10:53", "10.52.1.5:53"), 3),
		tcp(flow("10.52.1.9:8", "10.96.0.1:80", "10.52.1.4:80"), 3),
		tcp(flow("10.52.1.4:9", "203.0.113.7:80", "10.52.1.4:80"), 1),
		tcp(flow("10.52.1.9:10", "10.96.0.1:80", "10.52.1.4:80"), 7), // has ended
		tcp(flow("10.52.1.9:11", "10.96.0.1:80", "10.52.1.77:80"), 3),
		tcp(flow("10.52.1.9:12", "10.96.0.1:80", "10.52.1.77:80"), 7),
		other,
	}
	s.want(t, "at first", 1)
	for port, want := range map[chain.ServicePort]PortFlows{
		{Namespace: "kube-system", Name: "dns", Protocol: netfilter.UDP}: {4, 0, []EndpointFlows{{ap("10.52.1.4:53"), 1}, {ap("10.52.1.5:53"), 3}}},
		app: {2, 1, []EndpointFlows{{ap("10.52.1.4:80"), 2}}},
	} {
		if got, ok := s.last.Of(port); !ok || got.Live != want.Live || got.Stale != want.Stale || !slices.Equal(got.Endpoints, want.Endpoints) {
			t.Errorf("%v: %+v, want %+v", port, got, want)
		}
	}
	if s.last.Total != len(s.flows) {
		t.Errorf("%d flows, want %d", s.last.Total, len(s.flows))
	}
	if _, ok := s.last.Of(chain.ServicePort{Name: "none"}); ok {
		t.Error("flows of a Service that is not there")
	}
	failed := s.w.Begin(s.now).Fail(s.last, errors.New("no"))
	if got, ok := failed.Of(app); !ok || got.Live != 2 || failed.Error != "no" || s.last.Error != "" {
		t.Errorf("a failure left %+v (%v) %q", got, ok, failed.Error)
	}
	if _, ok := s.w.Begin(s.now).Fail(nil, errors.New("no")).Of(app); ok {
		t.Error("flows, though none was ever read")
	}
	// What an endpoint had counts when it is gone, but not for TCP's findings.
	s.used = true
	s.now.Programmed = programmed(t, dns("dns", "10.52.1.4:53", "10.52.1.5:53"))
	s.want(t, "TCP", 10)
}

const stale = "kube-system/dns 10.52.1.5:53"

// A flow that is used counts once it has outlived the grace period, and no longer
// when it is gone or its client has stopped.
func TestConntrackStale(t *testing.T) {
	both, one := programmed(t, dns("dns", "10.52.1.4:53", "10.52.1.5:53")), programmed(t, dns("dns", "10.52.1.4:53"))
	s := newStage(both)
	s.flows, s.used = []conntrack.Flow{flow("10.52.1.9:1", "10.96.0.10:53", "10.52.1.5:53"), flow("10.52.1.9:2", "10.96.0.10:53", "10.52.1.4:53")}, true
	s.want(t, "with its endpoint", 10)
	s.now.Programmed = one
	began := s.now.Time
	s.want(t, "within the grace period", 4) // at 0, 10, 20 and 30 s: a packet since 30 s is not known of
	s.want(t, "after it", 10, stale)
	f := s.last.Findings[0]
	if f.Code != ConntrackStale || f.Severity != chain.Warning || !f.Since.Equal(began) || !slices.Equal(f.Addresses, []netip.AddrPort{ap("10.52.1.5:53")}) ||
		!slices.Equal(f.Flows, []string{"UDP 10.52.1.9:1 → 10.96.0.10:53 → 10.52.1.5:53"}) || !strings.Contains(f.Message, "10.52.1.9:1") {
		t.Errorf("%+v", f)
	}
	if got, _ := s.last.Of(f.Service); got.Stale != 1 || got.Live != 1 {
		t.Errorf("%+v, want one of each", got)
	}
	s.used = false
	s.want(t, "the client pauses", 3, stale)
	s.pass()
	s.want(t, "the client has stopped", 3)
	s.used = true
	s.pass()
	s.want(t, "it goes on", 2, stale)
	s.flows = s.flows[1:]
	s.want(t, "the flow is deleted", 3)
}

// kube-proxy deletes flows within its sync; those that nobody uses end alone.
func TestConntrackNotStale(t *testing.T) {
	both, one := programmed(t, dns("dns", "10.52.1.4:53", "10.52.1.5:53")), programmed(t, dns("dns", "10.52.1.4:53"))
	old := flow("10.52.1.9:1", "10.96.0.10:53", "10.52.1.5:53")
	s := newStage(both)
	s.flows, s.used = []conntrack.Flow{old}, true
	s.want(t, "with its endpoint", 2)
	s.now.Programmed = one
	s.want(t, "within the grace period", 3)
	s.flows = nil
	s.want(t, "deleted in time", 5)

	s = newStage(one)
	s.flows = []conntrack.Flow{old}
	s.want(t, "never used again", 9)

	s = newStage(one)
	s.flows, s.used = []conntrack.Flow{old}, true
	s.want(t, "within the grace period", 2)
	s.used = false
	s.want(t, "used within the grace period only", 8)

	s = newStage(one)
	s.flows, s.used, s.now.Blind = []conntrack.Flow{old}, true, true
	s.want(t, "while nothing is known for sure", 20)
	s.now.Blind = false
	s.want(t, "known again, within the grace period", 4)
	s.want(t, "and after it", 1, stale)

	s = newStage(both)
	s.flows, s.used = []conntrack.Flow{old}, true
	s.now.Programmed = one
	s.want(t, "the endpoint leaves", 3)
	s.now.Programmed = both
	s.want(t, "and comes back", 5)
}

// Which Service a leftover flow belongs to, and whether it has one.
func TestConntrackStaleWhose(t *testing.T) {
	const cluster, node = "10.96.0.10:53", "10.146.0.2:30053"
	later := func(s *stage, p *chain.Programmed) {
		s.pass()
		s.now.Programmed = p
		for range 5 {
			s.pass()
		}
	}
	full := programmed(t, dns("dns", "10.52.1.5:53"))
	for name, c := range map[string]struct {
		first, then *chain.Programmed
		to          string
		want        []string
	}{
		"no endpoint at all":               {full, programmed(t, dns("dns")), cluster, []string{stale}},
		"no endpoint from the start":       {programmed(t, dns("dns")), programmed(t, dns("dns")), cluster, []string{stale}},
		"a deleted Service":                {full, programmed(t), cluster, []string{stale}},
		"a Service deleted before":         {programmed(t), programmed(t), cluster, nil},
		"another Service has the address":  {full, programmed(t, dns("new", "10.52.1.8:53")), cluster, []string{"kube-system/new 10.52.1.5:53"}},
		"another Service has both":         {full, programmed(t, dns("new", "10.52.1.5:53")), cluster, nil},
		"a NodePort":                       {full, programmed(t, dns("dns", "10.52.1.4:53")), node, []string{stale}},
		"a deleted Service's NodePort":     {full, programmed(t), node, []string{stale}},
		"a port of the node of others":     {programmed(t, dns("dns", "10.52.1.4:53")), programmed(t, dns("dns", "10.52.1.4:53")), node, nil},
		"another node's port":              {full, programmed(t, dns("dns", "10.52.1.4:53")), "10.146.0.9:30053", nil},
		"an address that is no Service's":  {full, programmed(t, dns("dns", "10.52.1.4:53")), "10.96.0.11:53", nil},
		"another port of the same address": {full, programmed(t, dns("dns", "10.52.1.4:53")), "10.96.0.10:54", nil},
	} {
		s := newStage(c.first)
		s.flows, s.used = []conntrack.Flow{flow("10.52.1.9:1", c.to, "10.52.1.5:53")}, true
		later(s, c.then)
		if got := s.pass(); !slices.Equal(got, c.want) {
			t.Errorf("%s: found %q, want %q", name, got, c.want)
		}
	}

	// A deleted Service is not remembered for ever.
	s := newStage(full)
	s.pass()
	s.now.Programmed = programmed(t)
	s.pass()
	s.now.Time = s.now.Time.Add(2 * remembered)
	s.flows, s.used = []conntrack.Flow{flow("10.52.1.9:1", cluster, "10.52.1.5:53")}, true
	later(s, programmed(t))
	s.want(t, "long after the Service", 3)
}

// What the API has as serving is an endpoint, though no rule sends to it; what it
// does not have is an error.
func TestConntrackStaleAPI(t *testing.T) {
	old := flow("10.52.1.9:1", "10.96.0.10:53", "10.52.1.5:53")
	one := programmed(t, dns("dns", "10.52.1.4:53"))
	s := newStage(one)
	s.flows, s.used = []conntrack.Flow{old}, true
	s.now.Desired = wants(t, []string{"10.52.1.4"}, []string{"10.52.1.5"})
	s.want(t, "terminating, but serving", 10)
	if got, _ := s.last.Of(chain.ServicePort{Namespace: "kube-system", Name: "dns", Protocol: netfilter.UDP}); got.Stale != 0 {
		t.Errorf("%+v, want no stale flow", got)
	}
	s.now.Desired = wants(t, []string{"10.52.1.4"}, nil)
	s.want(t, "gone, within the grace period", 4)
	s.want(t, "after it", 2, stale)
	if f := s.last.Findings[0]; f.Severity != chain.Error || !strings.Contains(f.Message, "the API does not have it") {
		t.Errorf("%+v", f)
	}
	s.now.Desired = wants(t, []string{"10.52.1.4", "10.52.1.5"}, nil)
	s.want(t, "the API has it again", 3)

	// The pods of a Service that is deleted mostly stay.
	s.now.Desired, s.now.Programmed = wants(t, []string{"10.52.1.4"}, nil), programmed(t)
	s.want(t, "the Service is gone, within the grace period", 4)
	s.want(t, "and after it", 2, stale)
	if f := s.last.Findings[0]; f.Severity != chain.Warning || !strings.Contains(f.Message, "do not have its Service") {
		t.Errorf("%+v", f)
	}
}

// No flow leaves garbage, whether its Service is known or not.
func TestPassAllocates(t *testing.T) {
	s := newStage(programmed(t, dns("dns", "10.52.1.4:53")))
	known, unknown := flow("10.52.1.9:1", "10.96.0.10:53", "10.52.1.4:53"), flow("10.52.1.9:1", "192.0.2.1:53", "10.52.1.4:53")
	node := flow("10.52.1.9:1", "10.146.0.2:30053", "10.52.1.4:53")
	p := s.w.Begin(s.now)
	if n := testing.AllocsPerRun(100, func() {
		p.Add(&known)
		p.Add(&unknown)
		p.Add(&node)
	}); n != 0 {
		t.Errorf("%v allocations for three flows", n)
	}
}
