package metrics

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/natlens/natlens/internal/monitor"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
)

// probes is an echo monitor with one state.
type probes struct{ state monitor.State }

func (p *probes) See(*chain.Programmed, time.Time) {}
func (p *probes) State() *monitor.State            { return &p.state }
func (p *probes) Changed() <-chan struct{}         { return nil }

func TestEcho(t *testing.T) {
	app := chain.ServicePort{Namespace: "default", Name: "app", Port: "http", Protocol: netfilter.TCP}
	sticky := chain.ServicePort{Namespace: "default", Name: "sticky", Protocol: netfilter.TCP}
	duration := monitor.Histogram{Count: 3, Sum: .5}
	duration.Counts[0], duration.Counts[3] = 2, 1
	k, _ := newKeeper(capture(t, iptablesCapture))
	k.Echo = &probes{monitor.State{Ports: []monitor.Port{
		{
			Service: app, Frontend: netip.MustParseAddrPort("10.56.0.1:80"), Verdict: monitor.Consistent, Duration: duration,
			Probes: []monitor.Count{
				{Endpoint: netip.MustParseAddrPort("10.52.1.4:8080"), Result: monitor.Answered, Probes: 2},
				{Result: monitor.TimedOut, Probes: 1},
			},
		},
		{
			Service: app, Frontend: netip.MustParseAddrPort("[fd00::1]:80"), Verdict: monitor.Skewed, Duration: duration,
			Probes: []monitor.Count{
				{Endpoint: netip.MustParseAddrPort("[fd01::4]:8080"), Result: monitor.Refused, Probes: 4},
				{Result: monitor.TimedOut, Probes: 5},
			},
		},
		{Service: sticky, Verdict: monitor.Pinned},
	}}}
	if err := k.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	const want = `
# HELP natlens_echo_consistent Whether connections from this node follow the programmed shares; absent while there are not enough to tell, and with session affinity.
# TYPE natlens_echo_consistent gauge
natlens_echo_consistent{namespace="default",port="http",protocol="TCP",service="app"} 0
# HELP natlens_echo_probes_total Connections made to a Service port from this node, by the endpoint that the rules chose (empty where it is not known) and by what became of them.
# TYPE natlens_echo_probes_total counter
natlens_echo_probes_total{endpoint="",namespace="default",port="http",protocol="TCP",result="timeout",service="app"} 6
natlens_echo_probes_total{endpoint="10.52.1.4:8080",namespace="default",port="http",protocol="TCP",result="success",service="app"} 2
natlens_echo_probes_total{endpoint="[fd01::4]:8080",namespace="default",port="http",protocol="TCP",result="refused",service="app"} 4
`
	r := register(t, k, false)
	if err := testutil.GatherAndCompare(r, strings.NewReader(want), "natlens_echo_consistent", "natlens_echo_probes_total"); err != nil {
		t.Error(err)
	}
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, f := range families {
		if f.GetName() != "natlens_echo_duration_seconds" {
			continue
		}
		h := f.Metric[len(f.Metric)-1].GetHistogram() // of the port that has a name
		found = true
		if h.GetSampleCount() != 6 || h.GetSampleSum() != 1 || h.Bucket[0].GetCumulativeCount() != 4 || h.Bucket[3].GetCumulativeCount() != 6 {
			t.Errorf("histogram %v", h)
		}
	}
	if !found {
		t.Error("no histogram")
	}
	if problems, err := testutil.GatherAndLint(r); err != nil || len(problems) > 0 {
		t.Errorf("%v %v", problems, err)
	}
}
