package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/natlens/natlens/internal/observed"
	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/chain"
)

var (
	connections   = prometheus.NewDesc("natlens_service_connections_total", "New connections to a Service port that the rules have counted since the agent started. Those just before kube-proxy rewrites a chain may be missing; kube-proxy's nftables mode counts none.", serviceLabels, nil)
	epConnections = prometheus.NewDesc("natlens_endpoint_connections_total", "New connections to a Service port that went to an endpoint, as the rules have counted them since the agent started.", endpointLabels, nil)
	flows         = prometheus.NewDesc("natlens_service_flows", "Connections to the endpoints of a Service port that conntrack holds.", serviceLabels, nil)
	staleFlows    = prometheus.NewDesc("natlens_service_stale_flows", "Connections of a Service port that conntrack sends to what is no endpoint any more.", serviceLabels, nil)
	desiredCount  = prometheus.NewDesc("natlens_service_desired_endpoints", "Endpoints that connections from a pod to the ClusterIP of a Service port are to go to, as the Kubernetes API wants it.", serviceLabels, nil)
	ctFlows       = prometheus.NewDesc("natlens_conntrack_flows", "Connections that conntrack holds whose destination nat has rewritten, of Services or not.", nil, nil)
	ctDuration    = prometheus.NewDesc("natlens_conntrack_read_duration_seconds", "Time that the last good look at conntrack took.", nil, nil)
	ctUp          = prometheus.NewDesc("natlens_conntrack_up", "Whether the last look at conntrack worked.", nil, nil)
)

// describeObserved describes what collectObserved tells.
func (c *Collector) describeObserved(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{connections, flows, staleFlows, desiredCount, ctFlows, ctDuration, ctUp} {
		ch <- d
	}
	if c.endpoints {
		ch <- epConnections
	}
}

// collectObserved tells what traffic was seen to do, and what the API wants
// beside it.
func (c *Collector) collectObserved(ch chan<- prometheus.Metric, s *snapshot.Snapshot) {
	send := func(d *prometheus.Desc, kind prometheus.ValueType, v float64, p *chain.ServicePort, more ...string) {
		labels := append([]string{labelText(p.Namespace), labelText(p.Name), labelText(p.Port), p.Protocol.String()}, more...)
		ch <- prometheus.MustNewConstMetric(d, kind, v, labels...)
	}
	for i := range s.Programmed.Services {
		p := &s.Programmed.Services[i].ServicePort
		if s.Observed.Connections != nil {
			c.connections(send, s.Observed.Connections, p)
		}
		if s.Observed.Flows == nil {
			continue
		}
		if f, ok := s.Observed.Flows.Of(*p); ok {
			send(flows, prometheus.GaugeValue, float64(f.Live), p)
			send(staleFlows, prometheus.GaugeValue, float64(f.Stale), p)
		}
	}
	if d := s.API.Desired; d != nil {
		for _, p := range d.Ports {
			send(desiredCount, prometheus.GaugeValue, float64(len(p.Endpoints())), &p.ServicePort)
		}
	}
	if f := s.Observed.Flows; f != nil {
		gauge := func(d *prometheus.Desc, v float64) { ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v) }
		up := 1.0
		if f.Error != "" {
			up = 0
		}
		gauge(ctUp, up)
		if !f.Time.IsZero() {
			gauge(ctFlows, float64(f.Total))
			gauge(ctDuration, f.Took.Seconds())
		}
	}
}

func (c *Collector) connections(send func(*prometheus.Desc, prometheus.ValueType, float64, *chain.ServicePort, ...string), all *observed.Connections, p *chain.ServicePort) {
	port, ok := all.Of(*p)
	if !ok || port.NotCounted != "" {
		return
	}
	send(connections, prometheus.CounterValue, float64(port.Total), p)
	if !c.endpoints {
		return
	}
	for _, e := range port.Endpoints {
		send(epConnections, prometheus.CounterValue, float64(e.Count), p, e.Address.String())
	}
}
