package metrics

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"log/slog"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/natlens/natlens/internal/api"
	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/conntrack"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
)

var update = flag.Bool("update", false, "write the golden files anew")

const iptablesCapture = "v1.35.4-iptables.save"

func capture(t *testing.T, name string, edits ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../../testdata/captures", name))
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for i := 0; i < len(edits); i += 2 {
		if !strings.Contains(text, edits[i]) {
			t.Fatalf("%s does not hold %q", name, edits[i])
		}
		text = strings.Replace(text, edits[i], edits[i+1], 1)
	}
	return text
}

// dumps is a Reader of dumps, which are one node's.
type dumps struct {
	texts []string
	err   error
}

func (d *dumps) Read(context.Context) (*netfilter.Ruleset, error) {
	if d.err != nil {
		return nil, d.err
	}
	var sets []*netfilter.Ruleset
	for _, text := range d.texts {
		rs, err := iptables.Parse(strings.NewReader(text), "dump")
		if err != nil {
			return nil, err
		}
		sets = append(sets, rs)
	}
	return netfilter.Merge(sets...)
}

func newKeeper(texts ...string) (*snapshot.Keeper, *dumps) {
	d := &dumps{texts: texts}
	return &snapshot.Keeper{
		Reader: d, Name: "node1", Log: slog.New(slog.DiscardHandler),
		Node: func() (chain.Node, error) {
			return chain.Node{Local: []netip.Addr{netip.MustParseAddr("10.146.0.2")}}, nil
		},
	}, d
}

// register puts a collector into a registry that checks all it says.
func register(t *testing.T, source Source, endpoints bool) *prometheus.Registry {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	if err := r.Register(New(source, "v1.2.3", endpoints)); err != nil {
		t.Fatal(err)
	}
	return r
}

// series returns all values by metric name and labels, these as in
// "endpoint=10.0.0.1:80,namespace=shop".
func series(t *testing.T, r *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			var labels []string
			for _, l := range m.Label {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			slices.Sort(labels)
			out[f.GetName()+"{"+strings.Join(labels, ",")+"}"] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
		}
	}
	return out
}

func names(values map[string]float64) []string {
	var out []string
	for k := range values {
		name, _, _ := strings.Cut(k, "{")
		out = append(out, name)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// steady are the metrics that a capture decides alone.
var steady = []string{
	"natlens_up", "natlens_reads_total", "natlens_rules", "natlens_rules_changes_total", "natlens_services",
	"natlens_service_endpoints", "natlens_service_share_min_ratio", "natlens_service_share_max_ratio", "natlens_findings",
}

// exposition prints the steady metrics as a scrape does.
func exposition(r *prometheus.Registry) []byte {
	answer := httptest.NewRecorder()
	promhttp.HandlerFor(r, promhttp.HandlerOpts{}).ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
	var out bytes.Buffer
	for line := range strings.Lines(answer.Body.String()) {
		name := strings.TrimPrefix(strings.TrimPrefix(line, "# HELP "), "# TYPE ")
		if i := strings.IndexAny(name, "{ "); slices.Contains(steady, name[:max(i, 0)]) {
			out.WriteString(line)
		}
	}
	return out.Bytes()
}

func TestGolden(t *testing.T) {
	// One Service with a finding of its own; the others are as they should be.
	k, _ := newKeeper(capture(t, iptablesCapture, "--probability 0.33333333349 -j KUBE-SEP-GULQDFY7RLISPLBJ", "--probability 0.20000000000 -j KUBE-SEP-GULQDFY7RLISPLBJ"))
	if err := k.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	r := register(t, k, false)
	const name = "testdata/metrics.txt"
	if *update {
		if err := os.WriteFile(name, exposition(r), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := testutil.GatherAndCompare(r, bytes.NewReader(want), steady...); err != nil {
		t.Errorf("%v\n(-update writes %s anew)", err, name)
	}
	values := series(t, r)
	if v := values["natlens_build_info{goversion="+runtime.Version()+",version=v1.2.3}"]; v != 1 {
		t.Errorf("build_info = %v, want 1 among %q", v, names(values))
	}
	if v := values["natlens_snapshot_timestamp_seconds{}"]; v < float64(k.Snapshot().Time.Unix()) || v > float64(time.Now().Unix()+1) {
		t.Errorf("snapshot_timestamp_seconds = %v, want about now", v)
	}
	if v := values["natlens_read_duration_seconds{}"]; v != k.Snapshot().Took.Seconds() || v == 0 {
		t.Errorf("read_duration_seconds = %v, want %v", v, k.Snapshot().Took.Seconds())
	}
}

func TestLint(t *testing.T) {
	k, _ := newKeeper(capture(t, iptablesCapture, "--probability 0.33333333349 -j KUBE-SEP-GULQDFY7RLISPLBJ", "--probability 0.2 -j KUBE-SEP-GULQDFY7RLISPLBJ"))
	if err := k.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	problems, err := testutil.GatherAndLint(register(t, k, true))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestBeforeFirstSnapshot(t *testing.T) {
	k, d := newKeeper()
	d.err = errors.New("no such table")
	k.Refresh(t.Context())
	values := series(t, register(t, k, true))
	want := []string{"natlens_build_info", "natlens_reads_total", "natlens_rules_changes_total", "natlens_up"}
	if got := names(values); !slices.Equal(got, want) {
		t.Errorf("metrics %q, want %q", got, want)
	}
	if up, failed := values["natlens_up{}"], values["natlens_reads_total{result=failure}"]; up != 0 || failed != 1 {
		t.Errorf("up %v, failed readings %v; want 0 and 1", up, failed)
	}
}

// TestStale: while readings fail, the last values stay, and only up tells.
func TestStale(t *testing.T) {
	k, d := newKeeper(capture(t, iptablesCapture))
	if err := k.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	r := register(t, k, true)
	before := series(t, r)
	d.err = errors.New("no such table")
	k.Refresh(t.Context())
	after := series(t, r)
	before["natlens_up{}"], before["natlens_reads_total{result=failure}"] = 0, 1
	for name, want := range before {
		if got, ok := after[name]; !ok || got != want {
			t.Errorf("%s = %v (there: %t), want %v", name, got, ok, want)
		}
	}
	if len(after) != len(before) {
		t.Errorf("%d series, want %d", len(after), len(before))
	}
	d.err = nil
	k.Refresh(t.Context())
	if v := series(t, r)["natlens_up{}"]; v != 1 {
		t.Errorf("up = %v after recovery, want 1", v)
	}
}

func TestEndpointSeries(t *testing.T) {
	k, _ := newKeeper(capture(t, iptablesCapture))
	if err := k.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := names(series(t, register(t, k, false))); slices.Contains(got, "natlens_endpoint_share_ratio") {
		t.Error("series of endpoints without being asked for")
	}
	values := series(t, register(t, k, true))
	const one = "natlens_endpoint_share_ratio{endpoint=10.52.1.32:8080,namespace=default,port=,protocol=TCP,service=go-app}"
	if got := values[one]; got != 0.33333333348855376 {
		t.Errorf("%s = %v, want a third", one, got)
	}
}

// TestUniqueLabels gathers rulesets in which the same names come up in more
// than one place. A registry refuses two series with the same labels, and with
// them the whole scrape.
func TestUniqueLabels(t *testing.T) {
	const dnat = "-j DNAT --to-destination 10.52.1.32:8080"
	for _, test := range []struct {
		name  string
		dumps []string
		rules int // natlens_rules series
	}{
		{"v1.23", []string{capture(t, "v1.23.17-iptables.save")}, 3},
		{"dual-stack", []string{capture(t, iptablesCapture), capture(t, "v1.35.4-iptables.save6")}, 6},
		{"both backends", []string{capture(t, iptablesCapture), strings.ReplaceAll(capture(t, iptablesCapture), "(nf_tables)", "(legacy)")}, 6},
		{"a range of endpoints", []string{capture(t, iptablesCapture, dnat, "-j DNAT --to-destination 10.52.1.32-10.52.1.40:8080")}, 3},
		{"an endpoint twice", []string{capture(t, iptablesCapture, dnat, "-j DNAT --to-destination 10.52.1.33:8080")}, 3},
		{"names that are not UTF-8", []string{strings.ReplaceAll(capture(t, iptablesCapture), "default/go-app", "default/go-\xff\xfe")}, 3},
	} {
		t.Run(test.name, func(t *testing.T) {
			k, _ := newKeeper(test.dumps...)
			if err := k.Refresh(t.Context()); err != nil {
				t.Fatal(err)
			}
			values := series(t, register(t, k, true))
			n := 0
			for name := range values {
				if strings.HasPrefix(name, "natlens_rules{") {
					n++
				}
			}
			if n != test.rules {
				t.Errorf("%d tables, want %d", n, test.rules)
			}
			if got, want := values["natlens_services{}"], len(k.Snapshot().Programmed.Services); got != float64(want) || want == 0 {
				t.Errorf("services = %v, want %d", got, want)
			}
		})
	}
}

// TestSameAsJSON: a graph and a curl say the same.
func TestSameAsJSON(t *testing.T) {
	k, _ := newKeeper(capture(t, iptablesCapture, `[0:0] -A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES`, ""))
	for _, edit := range []bool{true, false} {
		if !edit {
			k, _ = newKeeper(capture(t, iptablesCapture))
		}
		if err := k.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		values := series(t, register(t, k, true))
		doc := api.ServicesOf(k.Snapshot(), api.Filter{})
		want := map[string]float64{"natlens_services{}": float64(len(doc.Services))}
		for _, sv := range doc.Services {
			labels := "namespace=" + sv.Namespace + ",port=" + sv.Port + ",protocol=" + sv.Protocol + ",service=" + sv.Name + "}"
			if sv.Observed.Connections != nil && sv.Observed.NotCounted == "" {
				want["natlens_service_connections_total{"+labels] = float64(*sv.Observed.Connections)
				for _, e := range sv.Observed.Endpoints {
					want["natlens_endpoint_connections_total{endpoint="+e.Address+","+labels] = float64(*e.Connections)
				}
			}
			endpoints := sv.Frontends[0].Routes[0].Endpoints
			want["natlens_service_endpoints{"+labels] = float64(len(endpoints))
			if len(endpoints) == 0 {
				continue
			}
			low, high := 1.0, 0.0
			for _, e := range endpoints {
				low, high = min(low, e.Share), max(high, e.Share)
				want["natlens_endpoint_share_ratio{endpoint="+e.Address+","+labels] = e.Share
			}
			want["natlens_service_share_min_ratio{"+labels] = low
			want["natlens_service_share_max_ratio{"+labels] = high
		}
		for _, f := range api.FindingsOf(k.Snapshot()).Findings {
			want["natlens_findings{code="+string(f.Code)+",severity="+string(f.Severity)+"}"]++
		}
		for name, v := range want {
			if got, ok := values[name]; !ok || got != v {
				t.Errorf("%s = %v (there: %t), want %v", name, got, ok, v)
			}
		}
		for name := range values {
			if _, ok := want[name]; !ok && (strings.Contains(name, "natlens_service") || strings.Contains(name, "natlens_endpoint") || strings.Contains(name, "natlens_findings")) {
				t.Errorf("%s is not in the JSON", name)
			}
		}
	}
}

// tracked is conntrack with two connections to one endpoint.
type tracked struct{ err error }

func (c tracked) Dump(_ context.Context, each func(*conntrack.Flow)) error {
	f := conntrack.Flow{Protocol: netfilter.TCP, State: 3, Destination: netip.MustParseAddrPort("10.56.15.149:80"), To: netip.MustParseAddrPort("10.52.1.32:8080")}
	each(&f)
	each(&f)
	f.To = netip.MustParseAddrPort("10.52.9.9:8080")
	each(&f)
	return c.err
}

func TestFlows(t *testing.T) {
	k, _ := newKeeper(capture(t, iptablesCapture))
	if err := k.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	const labels = "{namespace=default,port=,protocol=TCP,service=go-app}"
	k.Snapshot().Look(t.Context(), tracked{}, nil)
	values := series(t, register(t, k, false))
	for name, want := range map[string]float64{"natlens_service_flows" + labels: 2, "natlens_service_stale_flows" + labels: 1, "natlens_conntrack_flows{}": 3, "natlens_conntrack_up{}": 1} {
		if got, ok := values[name]; !ok || got != want {
			t.Errorf("%s = %v (there: %t), want %v", name, got, ok, want)
		}
	}
	k.Snapshot().Look(t.Context(), tracked{errors.New("no")}, nil)
	values = series(t, register(t, k, false))
	if up, ok := values["natlens_conntrack_up{}"]; !ok || up != 0 {
		t.Errorf("natlens_conntrack_up = %v (there: %t) after a failure", up, ok)
	}
	if _, ok := values["natlens_conntrack_flows{}"]; ok {
		t.Error("a number of flows, though none was ever read")
	}
}
