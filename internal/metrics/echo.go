package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/natlens/natlens/internal/monitor"
	"github.com/natlens/natlens/pkg/chain"
)

var (
	echoProbes     = prometheus.NewDesc("natlens_echo_probes_total", "Connections made to a Service port from this node, by the endpoint that the rules chose (empty where it is not known) and by what became of them.", append(serviceLabels[:4:4], "endpoint", "result"), nil)
	echoDuration   = prometheus.NewDesc("natlens_echo_duration_seconds", "How long connections that an echo server answered took, from the first packet to the end of the answer.", serviceLabels, nil)
	echoConsistent = prometheus.NewDesc("natlens_echo_consistent", "Whether connections from this node follow the programmed shares; absent while there are not enough to tell, and with session affinity.", serviceLabels, nil)
)

// echoSum is what the ClusterIPs of one Service port have in sum.
type echoSum struct {
	probes     map[[2]string]uint64 // by endpoint and result
	duration   monitor.Histogram
	consistent float64 // -1 for not known
}

// collectEcho turns what probes have told into metrics. A dual-stack Service has a
// ClusterIP of each family, and one series for both.
func collectEcho(ch chan<- prometheus.Metric, s *monitor.State) {
	if s == nil {
		return
	}
	sums := map[chain.ServicePort]*echoSum{}
	for i := range s.Ports {
		p := &s.Ports[i]
		sum := sums[p.Service]
		if sum == nil {
			sum = &echoSum{probes: map[[2]string]uint64{}, consistent: -1}
			sums[p.Service] = sum
		}
		sum.add(p)
	}
	for port, sum := range sums {
		sum.collect(ch, []string{labelText(port.Namespace), labelText(port.Name), labelText(port.Port), port.Protocol.String()})
	}
}

func (e *echoSum) add(p *monitor.Port) {
	for _, c := range p.Probes {
		endpoint := ""
		if c.Endpoint.IsValid() {
			endpoint = c.Endpoint.String()
		}
		e.probes[[2]string{endpoint, string(c.Result)}] += c.Probes
	}
	e.duration.Count += p.Duration.Count
	e.duration.Sum += p.Duration.Sum
	for i, n := range p.Duration.Counts {
		e.duration.Counts[i] += n
	}
	switch {
	case p.Verdict == monitor.Skewed:
		e.consistent = 0
	case p.Verdict == monitor.Consistent && e.consistent < 0:
		e.consistent = 1
	}
}

func (e *echoSum) collect(ch chan<- prometheus.Metric, labels []string) {
	for k, n := range e.probes {
		ch <- prometheus.MustNewConstMetric(echoProbes, prometheus.CounterValue, float64(n), append(labels[:4:4], k[0], k[1])...)
	}
	buckets := map[float64]uint64{}
	below := uint64(0)
	for i, n := range e.duration.Counts {
		below += n
		buckets[monitor.Buckets[i]] = below
	}
	ch <- prometheus.MustNewConstHistogram(echoDuration, e.duration.Count, e.duration.Sum, buckets, labels...)
	if e.consistent >= 0 {
		ch <- prometheus.MustNewConstMetric(echoConsistent, prometheus.GaugeValue, e.consistent, labels...)
	}
}
