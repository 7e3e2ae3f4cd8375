// Package metrics turns the current snapshot into Prometheus metrics. A scrape
// reads no rule: it prints the snapshot that the JSON prints.
package metrics

import (
	"math"
	"runtime"
	"strconv"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/chain"
)

// Source is what the metrics are made from.
type Source interface {
	Snapshot() *snapshot.Snapshot // nil before the first reading worked
	Reads() (ok, failed uint64)
	Changes() uint64
	Counted() // told that somebody reads what the rules have counted
}

// Collector is a prometheus.Collector over the current snapshot.
type Collector struct {
	source    Source
	version   string
	endpoints bool
}

// New returns a collector. With endpoints, each endpoint has a series of its
// own, which on a large cluster makes very many.
func New(source Source, version string, endpoints bool) *Collector {
	return &Collector{source: source, version: version, endpoints: endpoints}
}

var (
	serviceLabels  = []string{"namespace", "service", "port", "protocol"}
	endpointLabels = []string{"namespace", "service", "port", "protocol", "endpoint"}

	buildInfo = prometheus.NewDesc("natlens_build_info", "Always 1; the labels tell the version of the agent.", []string{"version", "goversion"}, nil)
	up        = prometheus.NewDesc("natlens_up", "Whether the last reading of the node's rules worked.", nil, nil)
	duration  = prometheus.NewDesc("natlens_read_duration_seconds", "Time that the last good reading of the rules took, with working out all Services.", nil, nil)
	reads     = prometheus.NewDesc("natlens_reads_total", "Readings of the node's rules since the agent started.", []string{"result"}, nil)
	stamp     = prometheus.NewDesc("natlens_snapshot_timestamp_seconds", "When the rules that all other values are made from were read, in seconds since 1970. It stands still while readings fail.", nil, nil)
	rules     = prometheus.NewDesc("natlens_rules", "Rules in each table.", []string{"table", "family", "backend"}, nil)
	changes   = prometheus.NewDesc("natlens_rules_changes_total", "Readings that found other rules than the reading before.", nil, nil)
	services  = prometheus.NewDesc("natlens_services", "Service ports that the rules hold.", nil, nil)
	epCount   = prometheus.NewDesc("natlens_service_endpoints", "Endpoints of a Service port in its main route: to the ClusterIP, from a pod on this node.", serviceLabels, nil)
	shareMin  = prometheus.NewDesc("natlens_service_share_min_ratio", "Smallest share of new connections that an endpoint gets in the Service port's main route. Equal shares are 1 over the number of endpoints.", serviceLabels, nil)
	shareMax  = prometheus.NewDesc("natlens_service_share_max_ratio", "Largest share of new connections that an endpoint gets in the Service port's main route.", serviceLabels, nil)
	findings  = prometheus.NewDesc("natlens_findings", "Present findings of each kind.", []string{"code", "severity"}, nil)
	compared  = prometheus.NewDesc("natlens_api_compared", "Whether the rules are compared with what the Kubernetes API wants now: 0 while it cannot be reached, or the rules cannot be compared.", nil, nil)
	pending   = prometheus.NewDesc("natlens_api_pending_differences", "Differences between the rules and the API that kube-proxy is given time to mend; later they are findings.", nil, nil)
	epShare   = prometheus.NewDesc("natlens_endpoint_share_ratio", "Share of new connections that an endpoint gets in the Service port's main route.", endpointLabels, nil)
)

// NewLatency returns a histogram of how long the rules take to follow the API, in
// seconds.
func NewLatency() prometheus.Histogram {
	return prometheus.NewHistogram(prometheus.HistogramOpts{
		Name:    "natlens_programming_latency_seconds",
		Help:    "Time from the moment that the Kubernetes API told of a change of a Service or its endpoints to the moment that the rules in the kernel were so, for each change that was followed.",
		Buckets: []float64{0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300},
	})
}

// Describe implements prometheus.Collector.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{buildInfo, up, duration, reads, stamp, rules, changes, services, epCount, shareMin, shareMax, findings, compared, pending, echoProbes, echoDuration, echoConsistent} {
		ch <- d
	}
	if c.endpoints {
		ch <- epShare
	}
	c.describeObserved(ch)
}

// Collect implements prometheus.Collector.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		for i := range labels {
			labels[i] = labelText(labels[i])
		}
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	c.source.Counted()
	gauge(buildInfo, 1, c.version, runtime.Version())
	ok, failed := c.source.Reads()
	counter(reads, ok, "success")
	counter(reads, failed, "failure")
	counter(changes, c.source.Changes())
	s := c.source.Snapshot()
	if s == nil || s.Stale {
		gauge(up, 0)
	} else {
		gauge(up, 1)
	}
	if s == nil {
		return
	}
	gauge(duration, s.Took.Seconds())
	gauge(stamp, float64(s.Time.UnixMilli())/1000)
	for _, t := range s.Rules.Tables {
		gauge(rules, float64(t.RuleCount()), t.Name, t.Family.String(), string(t.Backend))
	}
	gauge(services, float64(len(s.Programmed.Services)))
	if a := &s.API; a.Known || a.Error != "" {
		ok := 0.0
		if a.Known && a.Error == "" {
			ok = 1
		}
		gauge(compared, ok)
		gauge(pending, float64(a.Pending))
	}
	collectEcho(ch, s.Echo)
	count := map[[2]string]int{}
	for _, f := range s.Findings() {
		count[[2]string{string(f.Code), string(f.Severity)}]++
	}
	for k, n := range count {
		gauge(findings, float64(n), k[0], k[1])
	}
	for i := range s.Programmed.Services {
		c.service(gauge, &s.Programmed.Services[i])
	}
	c.collectObserved(ch, s)
}

func (c *Collector) service(gauge func(*prometheus.Desc, float64, ...string), sv *chain.Service) {
	labels := []string{sv.Namespace, sv.Name, sv.Port, sv.Protocol.String()}
	route := mainRoute(sv)
	if route == nil {
		return
	}
	gauge(epCount, float64(len(route.Endpoints)), labels...)
	if len(route.Endpoints) == 0 {
		return
	}
	low, high := math.Inf(1), 0.0
	for _, e := range route.Endpoints {
		share := e.Share.Float64()
		low, high = min(low, share), max(high, e.Max.Float64())
		if c.endpoints {
			address := "?" // one of a range, as in the JSON
			if e.Address.IsValid() {
				address = e.Address.String()
			}
			gauge(epShare, share, append(labels[:4:4], address)...)
		}
	}
	gauge(shareMin, low, labels...)
	gauge(shareMax, high, labels...)
}

// mainRoute is the route that stands for a Service where there is room for one
// only: from a pod to the first frontend, which is the ClusterIP if it has one.
func mainRoute(sv *chain.Service) *chain.Route {
	if len(sv.Frontends) == 0 || len(sv.Frontends[0].Routes) == 0 {
		return nil
	}
	return &sv.Frontends[0].Routes[0]
}

// labelText makes any text fit for a label. A Service's name comes from a
// comment, which may hold any bytes, and one label that is not UTF-8 would cost
// the whole scrape.
func labelText(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	return strconv.Quote(s)
}
