package api

import (
	"net/netip"
	"time"

	"github.com/natlens/natlens/internal/monitor"
	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/chain"
)

// Echo is the document of /api/v1/echo: who answers connections from this node,
// beside what the rules say.
type Echo struct {
	Snapshot Header     `json:"snapshot"`
	Probing  bool       `json:"probing"` // otherwise this agent has no echo monitor
	Ports    []EchoPort `json:"ports"`
	Left     int        `json:"left,omitempty"` // ClusterIPs and ports that are marked, but too many
}

// EchoPort is one probed ClusterIP and port.
type EchoPort struct {
	Namespace       string          `json:"namespace"`
	Name            string          `json:"name"`
	Port            string          `json:"port"`
	Protocol        string          `json:"protocol"`
	Frontend        string          `json:"frontend"` // ip:port
	Verdict         monitor.Verdict `json:"verdict"`
	Reason          string          `json:"reason,omitempty"`
	SessionAffinity *Affinity       `json:"sessionAffinity,omitempty"`
	PinnedTo        string          `json:"pinnedTo,omitempty"` // by session affinity
	PinMoves        int             `json:"pinMoves,omitempty"`
	Window          EchoWindow      `json:"window"`               // being filled
	LastWindow      *EchoWindow     `json:"lastWindow,omitempty"` // closed, under the same rules
	Endpoints       []EchoEndpoint  `json:"endpoints"`
	Probes          []EchoProbes    `json:"probes"`            // since the agent began
	Dropped         int             `json:"dropped,omitempty"` // samples that may have met other rules
	LastProbe       *time.Time      `json:"lastProbe,omitempty"`
	LastSeconds     float64         `json:"lastSeconds"` // that the last probe took
}

// EchoWindow is a series of samples, beside what was to be expected.
type EchoWindow struct {
	Start    time.Time       `json:"start"`
	End      *time.Time      `json:"end,omitempty"`
	Verdict  monitor.Verdict `json:"verdict,omitempty"` // of a closed window
	Size     int             `json:"size"`
	Enough   int             `json:"enough"`
	Samples  int             `json:"samples"`
	Unknown  int             `json:"unknown"`
	EValue   float64         `json:"eValue,omitempty"`
	Alpha    float64         `json:"alpha"`
	Observed []EchoShare     `json:"observed"`
}

// EchoShare is an endpoint's part of the samples. Without an address it is what
// reached no endpoint.
type EchoShare struct {
	Address    string  `json:"address"`
	Samples    int     `json:"samples"`
	Share      float64 `json:"share"`
	Programmed float64 `json:"programmed"`
}

// EchoEndpoint is how an endpoint answers now.
type EchoEndpoint struct {
	Address      string         `json:"address"`
	Unreachable  bool           `json:"unreachable"`
	Failures     int            `json:"failures"` // in a row
	FailingSince *time.Time     `json:"failingSince,omitempty"`
	Result       monitor.Result `json:"result,omitempty"` // of the last failure
	LastAnswer   *time.Time     `json:"lastAnswer,omitempty"`
}

// EchoProbes counts probes. The endpoint is "" where it is not known.
type EchoProbes struct {
	Endpoint string         `json:"endpoint"`
	Result   monitor.Result `json:"result"`
	Count    uint64         `json:"count"`
}

// EchoOf makes the document of what probes have told.
func EchoOf(s *snapshot.Snapshot) Echo {
	doc := Echo{Snapshot: HeaderOf(s), Probing: s.Echo != nil, Ports: []EchoPort{}}
	if s.Echo == nil {
		return doc
	}
	doc.Left = s.Echo.Left
	for i := range s.Echo.Ports {
		doc.Ports = append(doc.Ports, echoPortOf(&s.Echo.Ports[i]))
	}
	return doc
}

// echoPortsOf are those of one Service port; nil when it is not probed.
func echoPortsOf(s *snapshot.Snapshot, p chain.ServicePort) (out []EchoPort) {
	if s.Echo == nil {
		return nil
	}
	for i := range s.Echo.Ports {
		if port := &s.Echo.Ports[i]; port.Service == p {
			out = append(out, echoPortOf(port))
		}
	}
	return out
}

func echoPortOf(p *monitor.Port) EchoPort {
	out := EchoPort{
		Namespace: p.Service.Namespace, Name: p.Service.Name, Port: p.Service.Port, Protocol: p.Service.Protocol.String(),
		Frontend: p.Frontend.String(), Verdict: p.Verdict, Reason: p.Reason, PinnedTo: knownText(p.Pin), PinMoves: p.Moves,
		Window: echoWindowOf(&p.Window), Endpoints: []EchoEndpoint{}, Probes: []EchoProbes{},
		Dropped: p.Dropped, LastProbe: timeOf(p.Probed), LastSeconds: p.Took.Seconds(),
	}
	if p.AffinitySeconds > 0 {
		out.SessionAffinity = &Affinity{Type: "ClientIP", TimeoutSeconds: p.AffinitySeconds}
	}
	if p.Last != nil {
		last := echoWindowOf(p.Last)
		out.LastWindow = &last
	}
	for _, e := range p.Endpoints {
		out.Endpoints = append(out.Endpoints, EchoEndpoint{
			Address: e.Address.String(), Unreachable: e.Unreachable, Failures: e.Failures,
			FailingSince: timeOf(e.First), Result: e.Result, LastAnswer: timeOf(e.Answered),
		})
	}
	for _, c := range p.Probes {
		out.Probes = append(out.Probes, EchoProbes{knownText(c.Endpoint), c.Result, c.Probes})
	}
	return out
}

func echoWindowOf(w *monitor.Window) EchoWindow {
	out := EchoWindow{
		Start: w.Start.UTC(), End: timeOf(w.End), Verdict: w.Verdict, Size: w.Size, Enough: w.Enough,
		Samples: w.Samples, Unknown: w.Unknown, EValue: w.Evidence, Alpha: monitor.Alpha, Observed: []EchoShare{},
	}
	add := func(a netip.AddrPort, n int, programmed float64) {
		out.Observed = append(out.Observed, EchoShare{knownText(a), n, float64(n) / float64(max(1, w.Samples)), programmed})
	}
	for _, way := range w.Ways {
		add(way.Address, way.Samples, way.Share)
	}
	for _, c := range w.Strangers {
		add(c.Endpoint, int(c.Probes), 0)
	}
	return out
}

// knownText prints an address, and "" for one that is not known.
func knownText(a netip.AddrPort) string {
	if !a.IsValid() {
		return ""
	}
	return a.String()
}

// timeOf leaves out what has not been.
func timeOf(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC()
	return &t
}
