package deploy_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	sigsyaml "sigs.k8s.io/yaml"

	"github.com/natlens/natlens/internal/desired"
	"github.com/natlens/natlens/internal/metrics"
	"github.com/natlens/natlens/internal/monitor"
	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/conntrack"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
)

const captures = "../testdata/captures/"

// recorded reads the rules of a recorded node.
type recorded struct{}

func (recorded) Read(context.Context) (*netfilter.Ruleset, error) {
	const name = captures + "v1.35.4-iptables.save"
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return iptables.Parse(f, name)
}

// told is what the API wants of it: something else since a rollout.
type told struct{ objects *desired.Objects }

func (a told) Objects() *desired.Objects { return a.objects }
func (told) Status() desired.Status      { return desired.Status{Synced: true, Confirmed: time.Now()} }
func (told) Changed() <-chan struct{}    { return nil }
func (told) Confirm(context.Context)     {}

// probed has told who answers behind default/go-app.
type probed struct{}

func (probed) See(*chain.Programmed, time.Time) {}
func (probed) Changed() <-chan struct{}         { return nil }
func (probed) State() *monitor.State {
	p := monitor.Port{
		Service: chain.ServicePort{Namespace: "default", Name: "go-app", Protocol: netfilter.TCP}, Verdict: monitor.Consistent,
		Probes: []monitor.Count{{Endpoint: netip.MustParseAddrPort("10.52.1.32:8080"), Result: monitor.Answered, Probes: 100}},
	}
	p.Duration.Count, p.Duration.Sum, p.Duration.Counts[0] = 100, 0.1, 100
	return &monitor.State{Ports: []monitor.Port{p}}
}

// tracked is a connection to default/go-app.
type tracked struct{}

func (tracked) Dump(_ context.Context, each func(*conntrack.Flow)) error {
	at := netip.MustParseAddrPort
	each(&conntrack.Flow{
		ID: 1, Protocol: netfilter.TCP, Source: at("10.52.1.9:40000"), Destination: at("10.56.15.149:80"),
		To: at("10.52.1.32:8080"), From: at("10.52.1.9:40000"), Status: conntrack.SeenReply | conntrack.Redirected, Timeout: 100, State: 3,
	})
	return nil
}

// agent returns the /metrics of an agent that reads the recorded node and
// compares. With each scrape, the rules have followed a change of the API.
func agent(t *testing.T) (*prometheus.Registry, http.Handler) {
	t.Helper()
	objects := desired.NewObjects("node1")
	for _, file := range []string{captures + "objects-services.yaml", captures + "objects-endpointslices.yaml", captures + "objects-nodes.yaml", "../testdata/rollout.yaml"} {
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := objects.Load(f, file); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	keeper := &snapshot.Keeper{
		Reader: recorded{}, Node: func() (chain.Node, error) { return chain.Node{}, nil }, Name: "node1", Backend: snapshot.BackendFile,
		Interval: time.Second, Log: slog.New(slog.DiscardHandler), API: told{objects},
		Echo: probed{}, Flows: tracked{}, FlowPause: time.Second,
	}
	news, end := keeper.Subscribe()
	defer end()
	go keeper.Run(t.Context())
	for keeper.Snapshot() == nil || keeper.Snapshot().Observed.Flows == nil {
		select {
		case <-news:
		case <-time.After(100 * time.Millisecond): // flows alone are no news
		}
	}
	latency := metrics.NewLatency()
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(metrics.New(keeper, "test", true), latency, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	handler := promhttp.HandlerFor(registry, promhttp.HandlerOpts{})
	return registry, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		latency.Observe(0.2)
		handler.ServeHTTP(w, r)
	})
}

// names returns the metrics that an agent has.
func names(t *testing.T) []string {
	t.Helper()
	registry, _ := agent(t)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := []string{"up"} // Prometheus' own
	for _, f := range families {
		out = append(out, f.GetName())
	}
	return out
}

var metricName = regexp.MustCompile(`\b(up\b|(natlens|process|go)_\w+)`)

// checkMetrics checks that the metrics in an expression are there.
func checkMetrics(t *testing.T, names []string, expr string) {
	t.Helper()
	found := metricName.FindAllString(expr, -1)
	if len(found) == 0 {
		t.Errorf("%s: no metric", expr)
	}
	for _, m := range found {
		for _, suffix := range []string{"_bucket", "_count", "_sum"} {
			m = strings.TrimSuffix(m, suffix)
		}
		if !slices.Contains(names, m) {
			t.Errorf("%s: no agent has %s", expr, m)
		}
	}
}

type alert struct {
	Alert, Expr, For    string
	Labels, Annotations map[string]string
}

func alerts(t *testing.T) []alert {
	t.Helper()
	data, err := os.ReadFile("prometheus-rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Name  string
			Rules []alert
		}
	}
	if err := sigsyaml.UnmarshalStrict(data, &file); err != nil {
		t.Fatal(err)
	}
	var out []alert
	for _, g := range file.Groups {
		out = append(out, g.Rules...)
	}
	return out
}

// TestAlerts checks that each alert says what it is about, asks for metrics that
// exist, and leads to a section that explains it.
func TestAlerts(t *testing.T) {
	text, err := os.ReadFile("../docs/findings.md")
	if err != nil {
		t.Fatal(err)
	}
	var anchors []string
	for _, m := range regexp.MustCompile(`<a id="(\w+)"></a>`).FindAllStringSubmatch(string(text), -1) {
		anchors = append(anchors, m[1])
	}
	names := names(t)
	codes := regexp.MustCompile(`code=~?"([\w|]+)"`)
	for _, a := range alerts(t) {
		checkMetrics(t, names, a.Expr)
		if !slices.Contains([]string{"warning", "critical"}, a.Labels["severity"]) || a.Annotations["summary"] == "" || a.Annotations["description"] == "" {
			t.Errorf("%s: severity, summary or description is missing", a.Alert)
		}
		if wait, err := time.ParseDuration(a.For); err != nil || wait < 5*time.Minute {
			t.Errorf("%s: for %s is shorter than a rollout", a.Alert, a.For)
		}
		anchor, ok := strings.CutPrefix(a.Annotations["runbook_url"], "https://github.com/natlens/natlens/blob/main/docs/findings.md#")
		if !ok {
			t.Errorf("%s: runbook_url %q", a.Alert, a.Annotations["runbook_url"])
		}
		sections := []string{anchor}
		if m := codes.FindStringSubmatch(a.Expr); m != nil && anchor == "{{ $labels.code }}" {
			sections = strings.Split(m[1], "|")
		}
		for _, s := range sections {
			if !slices.Contains(anchors, s) {
				t.Errorf("%s: docs/findings.md has no %s", a.Alert, s)
			}
		}
	}
}

// TestAlertsFire has promtool prove which series fire which alert, and that each
// alert has a case in which it does, and one in which it does not.
func TestAlertsFire(t *testing.T) {
	promtool, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("promtool is not installed (Debian: prometheus)")
	}
	if out, err := exec.Command(promtool, "test", "rules", "prometheus-rules_test.yaml").CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	data, err := os.ReadFile("prometheus-rules_test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Tests []struct {
			AlertRuleTest []struct {
				Alertname string           `json:"alertname"`
				ExpAlerts []map[string]any `json:"exp_alerts"`
			} `json:"alert_rule_test"`
		} `json:"tests"`
	}
	if err := sigsyaml.Unmarshal(data, &file); err != nil {
		t.Fatal(err)
	}
	fires, silent := map[string]bool{}, map[string]bool{}
	for _, test := range file.Tests {
		for _, c := range test.AlertRuleTest {
			fires[c.Alertname] = fires[c.Alertname] || len(c.ExpAlerts) > 0
			silent[c.Alertname] = silent[c.Alertname] || len(c.ExpAlerts) == 0
		}
	}
	for _, a := range alerts(t) {
		if !fires[a.Alert] || !silent[a.Alert] {
			t.Errorf("%s: no case in which it fires, or none in which it is silent", a.Alert)
		}
	}
}

// dashboard is what of a Grafana dashboard asks Prometheus.
type dashboard struct {
	UID        string
	Templating struct{ List []variable }
	Panels     []panel
}

type variable struct {
	Name, Type string
	Query      json.RawMessage
}

type panel struct {
	Title, Type, Description string
	GridPos                  struct{ X, Y, W, H int }
	Targets                  []struct{ Expr, RefID string }
}

func readDashboard(t *testing.T) dashboard {
	t.Helper()
	data, err := os.ReadFile("grafana-dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var d dashboard
	if err := json.Unmarshal(data, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestDashboard asks a real Prometheus, which scrapes an agent, what the
// dashboard asks: where the metrics are there, it has an answer.
func TestDashboard(t *testing.T) {
	d := readDashboard(t)
	names := names(t)
	server := startPrometheus(t)
	for _, v := range d.Templating.List {
		if v.Type != "query" {
			continue
		}
		var query struct{ Query string }
		if err := json.Unmarshal(v.Query, &query); err != nil {
			t.Fatal(err)
		}
		m := regexp.MustCompile(`^label_values\((.*), (\w+)\)$`).FindStringSubmatch(query.Query)
		if m == nil {
			t.Errorf("variable %s: %s", v.Name, query.Query)
			continue
		}
		checkMetrics(t, names, m[1])
		server.ask(t, "variable "+v.Name, "count by ("+m[2]+") ("+substitute(m[1])+")", true)
	}
	asked := 0
	for _, p := range d.Panels {
		if p.Type != "row" && (len(p.Targets) == 0 || p.Description == "" || p.GridPos.X+p.GridPos.W > 24) {
			t.Errorf("panel %s: no query, no description, or too wide", p.Title)
		}
		for _, q := range p.Targets {
			asked++
			checkMetrics(t, names, q.Expr)
			server.ask(t, p.Title+" "+q.RefID, substitute(q.Expr), true)
		}
	}
	if asked == 0 {
		t.Error("the dashboard asks nothing")
	}
	for _, a := range alerts(t) { // most have no answer, which is well
		server.ask(t, a.Alert, a.Expr, false)
	}
}

// substitute puts in what Grafana puts in when All is chosen.
func substitute(expr string) string {
	return strings.NewReplacer("$node", ".*", "$namespace", ".*", "$service", ".*", "$__rate_interval", "20s").Replace(expr)
}

// server is a Prometheus.
type server struct{ url string }

// startPrometheus starts one on loopback that scrapes an agent each second.
func startPrometheus(t *testing.T) server {
	t.Helper()
	program, err := exec.LookPath("prometheus")
	if err != nil {
		t.Skip("prometheus is not installed (Debian: prometheus)")
	}
	_, handler := agent(t)
	target := httptest.NewServer(handler)
	t.Cleanup(target.Close)
	dir := t.TempDir()
	config := fmt.Sprintf(`
scrape_configs:
  - job_name: natlens
    scrape_interval: 1s
    static_configs:
      - targets: ['%s']
        labels: {node: node1}
`, strings.TrimPrefix(target.URL, "http://"))
	if err := os.WriteFile(filepath.Join(dir, "prometheus.yml"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	ln.Close()
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(program, "--config.file="+filepath.Join(dir, "prometheus.yml"), "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+address)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("prometheus: %s", text)
		}
	})
	s := server{"http://" + address}
	s.ask(t, "some scrapes", "count_over_time(natlens_up[1m]) >= 3", true)
	return s
}

// ask wants a query to be right, and to have an answer after a while if wanted.
func (s server) ask(t *testing.T, what, query string, wanted bool) {
	t.Helper()
	var last string
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		resp, err := http.Get(s.url + "/api/v1/query?query=" + url.QueryEscape(query))
		if err != nil { // not up yet
			last = err.Error()
			continue
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if last = string(body); resp.StatusCode == http.StatusServiceUnavailable {
			continue
		}
		var answer struct {
			Status, Error string
			Data          struct{ Result []any }
		}
		if err := json.Unmarshal(body, &answer); err != nil || answer.Status != "success" {
			t.Errorf("%s: %s: %s", what, query, body)
			return
		}
		if !wanted || len(answer.Data.Result) > 0 {
			return
		}
	}
	t.Errorf("%s: %s: no data; last: %s", what, query, last)
}
