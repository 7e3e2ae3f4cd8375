package api

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/natlens/natlens/internal/monitor"
	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
)

func TestEchoOf(t *testing.T) {
	s := snapshot.Build(&netfilter.Ruleset{}, chain.Node{}, "node1", snapshot.BackendFile, time.Now())
	if doc := EchoOf(s); doc.Probing || doc.Ports == nil {
		t.Errorf("without a monitor: %+v", doc)
	}
	a, b := netip.MustParseAddrPort("10.52.1.4:8080"), netip.MustParseAddrPort("10.52.1.9:8080")
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.FixedZone("", 3600))
	window := monitor.Window{
		Start: start, Size: 1000, Enough: 100, Samples: 4, Unknown: 1, Evidence: .5,
		Ways: []monitor.Way{{Address: a, Share: .75, Samples: 2}, {Share: .25, Samples: 1}}, Strangers: []monitor.Count{{Endpoint: b, Probes: 1}},
	}
	closed := window
	closed.End, closed.Verdict = start.Add(time.Hour), monitor.Consistent
	s.Echo = &monitor.State{Left: 2, Ports: []monitor.Port{{
		Service: chain.ServicePort{Namespace: "default", Name: "app", Protocol: netfilter.TCP}, Frontend: netip.MustParseAddrPort("10.56.0.1:80"),
		AffinitySeconds: 10, Pin: a, Moves: 1, Verdict: monitor.Pinned, Reason: "why", Window: window, Last: &closed,
		Endpoints: []monitor.Endpoint{{Address: a, Failures: 3, First: start, Last: start, Result: monitor.Refused, Unreachable: true}},
		Probes:    []monitor.Count{{Endpoint: a, Result: monitor.Refused, Probes: 3}, {Result: monitor.TimedOut, Probes: 1}},
		Dropped:   5, Probed: start, Took: time.Millisecond,
	}}}
	got, err := json.Marshal(EchoOf(s))
	if err != nil {
		t.Fatal(err)
	}
	const w = `"size":1000,"enough":100,"samples":4,"unknown":1,"eValue":0.5,"alpha":0.000001,"observed":[` +
		`{"address":"10.52.1.4:8080","samples":2,"share":0.5,"programmed":0.75},{"address":"","samples":1,"share":0.25,"programmed":0.25},` +
		`{"address":"10.52.1.9:8080","samples":1,"share":0.25,"programmed":0}]}`
	const want = `"probing":true,"ports":[{"namespace":"default","name":"app","port":"","protocol":"TCP","frontend":"10.56.0.1:80",` +
		`"verdict":"affinity","reason":"why","sessionAffinity":{"type":"ClientIP","timeoutSeconds":10},"pinnedTo":"10.52.1.4:8080","pinMoves":1,` +
		`"window":{"start":"2026-01-02T02:04:05Z",` + w + `,"lastWindow":{"start":"2026-01-02T02:04:05Z","end":"2026-01-02T03:04:05Z","verdict":"consistent",` + w + `,` +
		`"endpoints":[{"address":"10.52.1.4:8080","unreachable":true,"failures":3,"failingSince":"2026-01-02T02:04:05Z","result":"refused"}],` +
		`"probes":[{"endpoint":"10.52.1.4:8080","result":"refused","count":3},{"endpoint":"","result":"timeout","count":1}],` +
		`"dropped":5,"lastProbe":"2026-01-02T02:04:05Z","lastSeconds":0.001}],"left":2}`
	if !strings.HasSuffix(string(got), want) {
		t.Errorf("document\n%s\nwant\n%s", got, want)
	}
}

// TestServiceEcho: a Service's document has what probes have told of it, and of no
// other.
func TestServiceEcho(t *testing.T) {
	s := capture(t)
	app := chain.ServicePort{Namespace: "default", Name: "go-app", Protocol: netfilter.TCP}
	a, b := netip.MustParseAddrPort("10.56.15.149:80"), netip.MustParseAddrPort("[fd00:56::149]:80")
	s.Echo = &monitor.State{Ports: []monitor.Port{
		{Service: app, Frontend: a, Verdict: monitor.Consistent}, {Service: app, Frontend: b, Verdict: monitor.NotEnough},
		{Service: chain.ServicePort{Namespace: "shop", Name: "other", Protocol: netfilter.TCP}, Verdict: monitor.Skewed},
	}}
	if got := ServicesOf(s, Filter{Namespace: "default", Name: "go-app"}).Services[0].Observed; got == nil || len(got.Echo) != 2 ||
		got.Echo[0].Frontend != a.String() || got.Echo[0].Verdict != monitor.Consistent || got.Echo[1].Frontend != b.String() {
		t.Errorf("observed %+v", got)
	}
	if got := ServicesOf(s, Filter{Namespace: "shop", Name: "lb-local"}).Services[0].Observed; got != nil {
		t.Errorf("observed of a Service that is not probed: %+v", got)
	}
}
