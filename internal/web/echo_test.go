package web

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/natlens/natlens/internal/monitor"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
)

// probes is an echo monitor with one state.
type probes struct{ state monitor.State }

func (p *probes) See(*chain.Programmed, time.Time) {}
func (p *probes) State() *monitor.State            { return &p.state }
func (p *probes) Changed() <-chan struct{}         { return nil }

// newProbing is an agent whose echo monitor has something to say of everything.
func newProbing(t *testing.T, text string) *agent {
	t.Helper()
	a := newAgent(t)
	app := chain.ServicePort{Namespace: "default", Name: "go-app", Protocol: netfilter.TCP}
	endpoint, now := netip.MustParseAddrPort("10.52.1.32:8080"), time.Now()
	window := monitor.Window{
		Start: now, End: now, Size: 1000, Enough: 100, Samples: 3, Unknown: 1, Evidence: 2, Verdict: monitor.Consistent,
		Ways: []monitor.Way{{Address: endpoint, Share: .5, Samples: 2}, {Share: .5, Samples: 1}}, Strangers: []monitor.Count{{Endpoint: endpoint, Probes: 1}},
	}
	a.keeper.Echo = &probes{monitor.State{
		Number: 7, Left: 1,
		Ports: []monitor.Port{{
			Service: app, Frontend: netip.MustParseAddrPort("10.56.15.149:80"), AffinitySeconds: 10, Pin: endpoint, Moves: 1,
			Verdict: monitor.Unknown, Reason: "a reason", Window: window, Last: &window,
			Endpoints: []monitor.Endpoint{{Address: endpoint, Answered: now, Failures: 1, First: now, Last: now, Result: monitor.TimedOut, Unreachable: true}},
			Probes:    []monitor.Count{{Endpoint: endpoint, Result: monitor.Answered, Probes: 3}},
			Dropped:   1, Probed: now, Took: time.Millisecond,
		}},
		Findings: []monitor.Finding{{
			Finding:   chain.Finding{Code: monitor.EndpointUnreachable, Severity: chain.Error, Service: &app, Message: "a black hole"},
			Addresses: []netip.AddrPort{endpoint}, Since: now,
		}},
	}}
	a.read(t, text)
	return a
}

// TestEcho: what probes tell is there, and has an ETag of its own.
func TestEcho(t *testing.T) {
	a := newProbing(t, capture(t, iptablesCapture))
	answer := a.do("GET", "/api/v1/echo")
	tag := answer.Header().Get("ETag")
	if body := answer.Body.String(); answer.Code != 200 || tag == "" || !strings.Contains(body, `"verdict":"unknown"`) {
		t.Fatalf("%d %s", answer.Code, body)
	}
	if code := a.do("GET", "/api/v1/echo", "If-None-Match", tag).Code; code != 304 {
		t.Errorf("the same again: %d, want 304", code)
	}
	if body := a.do("GET", "/api/v1/services/default/go-app").Body.String(); !strings.Contains(body, `"message":"a black hole"`) {
		t.Errorf("no finding in %s", body)
	}
	if body := newAgent(t, capture(t, iptablesCapture)).do("GET", "/api/v1/echo").Body.String(); !strings.Contains(body, `"probing":false,"ports":[]`) {
		t.Errorf("without a monitor: %s", body)
	}
}
