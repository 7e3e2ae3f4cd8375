package echo

import (
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

func TestMetrics(t *testing.T) {
	m := NewMetrics("v1.2.3")
	h := NewHandler(testIdentity(), m, yes)
	for _, path := range []string{"/", "/json", "/healthz", "/readyz", "/metrics", "/nothing"} {
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", path, nil))
	}
	want := `
# HELP natlens_echo_build_info Always 1; the labels say what is running.
# TYPE natlens_echo_build_info gauge
natlens_echo_build_info{goversion="` + runtime.Version() + `",version="v1.2.3"} 1
# HELP natlens_echo_requests_total Requests for an echo answer, by transport. Probes and scrapes are not counted.
# TYPE natlens_echo_requests_total counter
natlens_echo_requests_total{protocol="http"} 2
natlens_echo_requests_total{protocol="udp"} 0
# HELP natlens_echo_udp_send_errors_total UDP requests whose answer could not be sent.
# TYPE natlens_echo_udp_send_errors_total counter
natlens_echo_udp_send_errors_total 0
`
	if err := testutil.GatherAndCompare(m.registry, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
	problems, err := testutil.GatherAndLint(m.registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}
