package echo

import (
	"net/http"
	"runtime"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Metrics counts what one server did. Each has a registry of its own, so that
// several servers can live in one process.
type Metrics struct {
	registry      *prometheus.Registry
	httpRequests  prometheus.Counter
	udpRequests   prometheus.Counter
	udpSendErrors prometheus.Counter
}

// NewMetrics returns metrics at zero. The version is the value of that label of
// natlens_echo_build_info.
func NewMetrics(version string) *Metrics {
	requests := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "natlens_echo_requests_total",
		Help: "Requests for an echo answer, by transport. Probes and scrapes are not counted.",
	}, []string{"protocol"})
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "natlens_echo_build_info",
		Help:        "Always 1; the labels say what is running.",
		ConstLabels: prometheus.Labels{"version": version, "goversion": runtime.Version()},
	})
	build.Set(1)
	m := &Metrics{
		registry:     prometheus.NewPedanticRegistry(),
		httpRequests: requests.WithLabelValues("http"),
		udpRequests:  requests.WithLabelValues("udp"),
		udpSendErrors: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "natlens_echo_udp_send_errors_total",
			Help: "UDP requests whose answer could not be sent.",
		}),
	}
	m.registry.MustRegister(requests, build, m.udpSendErrors)
	return m
}

// handler serves the registry.
func (m *Metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{EnableOpenMetrics: true})
}
