package api

import (
	"net/netip"
	"time"

	"github.com/natlens/natlens/internal/observed"
	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/chain"
)

// Desired is what the API wants of a Service port.
type Desired struct {
	// Endpoints are where connections from a pod to the ClusterIP are to go.
	Endpoints []netip.AddrPort `json:"endpoints"`
}

// Observed is what traffic to a Service port was seen to do, whichever address of
// it was asked. What nobody looked at is left out.
type Observed struct {
	// Since is when counting connections began; left out where the counts are
	// those in the rules, since each chain was written.
	Since *time.Time `json:"since,omitempty"`
	// Connections counts new ones, those to endpoints that are gone included.
	Connections *uint64 `json:"connections,omitempty"`
	NotCounted  string  `json:"notCounted,omitempty"` // why some or all connections are not counted
	// Flows are the tracked connections to its endpoints as of FlowsTime, and
	// StaleFlows those to what is no endpoint any more.
	Flows      *int       `json:"flows,omitempty"`
	StaleFlows *int       `json:"staleFlows,omitempty"`
	FlowsTime  *time.Time `json:"flowsTime,omitempty"`
	FlowsError string     `json:"flowsError,omitempty"` // why there is nothing newer

	Endpoints []ObservedEndpoint `json:"endpoints"`
	// Echo is what the echo monitor has seen of its ClusterIPs; left out for a
	// Service that is not probed.
	Echo []EchoPort `json:"echo,omitempty"`
}

// ObservedEndpoint is the part that one endpoint had.
type ObservedEndpoint struct {
	Address     string   `json:"address"`
	Connections *uint64  `json:"connections,omitempty"`
	Share       *float64 `json:"share,omitempty"` // of the connections to all present endpoints
	Flows       *int     `json:"flows,omitempty"`
	// Pinned are the clients that session affinity binds to it; PinnedFull says that
	// the kernel's list of them has no room for more.
	Pinned     *int `json:"pinned,omitempty"`
	PinnedFull bool `json:"pinnedFull,omitempty"`
}

func desiredOf(s *snapshot.Snapshot, p chain.ServicePort) *Desired {
	if s.API.Desired == nil {
		return nil
	}
	out := &Desired{Endpoints: []netip.AddrPort{}}
	if port := s.API.Desired.Port(p); port != nil {
		out.Endpoints = append(out.Endpoints, port.Endpoints()...)
	}
	return out
}

func observedOf(s *snapshot.Snapshot, p chain.ServicePort) *Observed {
	echo := echoPortsOf(s, p)
	if s.Observed == (snapshot.Observed{}) && echo == nil {
		return nil
	}
	out := &Observed{Endpoints: []ObservedEndpoint{}, Echo: echo}
	if c := s.Observed.Connections; c != nil {
		out.count(c, p)
	}
	if f := s.Observed.Flows; f != nil {
		out.track(f, p)
	}
	if s.Observed.Pins != nil {
		out.pin(s.Observed.Pins.Of(p))
	}
	return out
}

// count adds the connections.
func (o *Observed) count(c *observed.Connections, p chain.ServicePort) {
	port, ok := c.Of(p)
	if !ok {
		return
	}
	if at := c.Since.UTC(); !c.Since.IsZero() {
		o.Since = &at
	}
	o.NotCounted = port.NotCounted
	var sum uint64
	any := len(port.Endpoints) == 0
	for _, e := range port.Endpoints {
		sum += e.Count
		any = any || e.Counted
	}
	if any {
		o.Connections = &port.Total
	}
	for _, e := range port.Endpoints {
		out := ObservedEndpoint{Address: addrText(e.Address)}
		if e.Counted {
			out.Connections = &e.Count
		}
		if sum > 0 && port.NotCounted == "" {
			share := float64(e.Count) / float64(sum)
			out.Share = &share
		}
		o.Endpoints = append(o.Endpoints, out)
	}
}

// track adds the flows, of endpoints that the present rules have.
func (o *Observed) track(f *observed.Flows, p chain.ServicePort) {
	o.FlowsError = f.Error
	port, ok := f.Of(p)
	if !ok {
		return
	}
	at := f.Time.UTC()
	o.Flows, o.StaleFlows, o.FlowsTime = &port.Live, &port.Stale, &at
	flows := map[string]int{}
	for _, e := range port.Endpoints {
		flows[addrText(e.Address)] = e.Live
	}
	for i := range o.Endpoints {
		if n, ok := flows[o.Endpoints[i].Address]; ok {
			o.Endpoints[i].Flows = &n
		}
	}
}

// pin adds the clients that session affinity binds.
func (o *Observed) pin(list []observed.EndpointPins) {
	for _, l := range list {
		for i := range o.Endpoints {
			if e := &o.Endpoints[i]; e.Address == addrText(l.Address) {
				e.Pinned, e.PinnedFull = &l.Clients, l.Full
			}
		}
	}
}
