package render_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/natlens/natlens/internal/api"
	"github.com/natlens/natlens/internal/doctor"
	"github.com/natlens/natlens/internal/render"
	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares a text with testdata/NAME.txt.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".txt")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s differs; with -update it is written anew (-want +got):\n%s", file, diff)
	}
	for i, line := range strings.Split(got, "\n") {
		if strings.TrimRight(line, " ") != line {
			t.Errorf("%s:%d: blanks at the end", file, i+1)
		}
	}
}

func ptr[T any](v T) *T { return &v }

// TestSideBySide prints what the rules, the API and the traffic say of the same
// endpoints.
func TestSideBySide(t *testing.T) {
	const a, b, c, d = "10.52.1.4:8080", "10.52.1.5:8080", "10.52.1.6:8080", "[fd00:52::7]:8080"
	s := api.Service{Namespace: "default", Name: "go-app", Protocol: "TCP",
		Frontends: []api.Frontend{{Type: "ClusterIP", Family: "ipv4", Address: "10.56.11.169", Port: 80, Routes: []api.Route{{
			From: chain.Classes, Verdict: chain.RouteDNAT, Endpoints: []api.Endpoint{{Address: a, Share: 0.5, Chain: "KUBE-SEP-A"}, {Address: b, Share: 0.5, Chain: "KUBE-SEP-B"}},
		}}}},
		Desired: &api.Desired{Endpoints: []netip.AddrPort{netip.MustParseAddrPort(a), netip.MustParseAddrPort(c)}},
		Observed: &api.Observed{
			Since: &at, Connections: ptr(uint64(9)), Flows: ptr(3), StaleFlows: ptr(2), FlowsTime: &at,
			Endpoints: []api.ObservedEndpoint{
				{Address: a, Connections: ptr(uint64(6)), Share: ptr(0.75), Flows: ptr(3), Pinned: ptr(100), PinnedFull: true},
				{Address: b, Connections: ptr(uint64(2)), Share: ptr(0.25), Flows: ptr(0), Pinned: ptr(1)}, {Address: d, Flows: ptr(0)},
			},
		},
	}
	failed := s
	failed.Name, failed.Desired = "failed", nil
	failed.Observed = &api.Observed{NotCounted: "one rule sends the connections of several Services there", FlowsError: "no", Flows: ptr(0), Endpoints: []api.ObservedEndpoint{{Address: a}}}
	unknown := s
	unknown.Name, unknown.Desired, unknown.Observed = "unknown", nil, nil
	var out bytes.Buffer
	if err := render.ServicesWide(&out, api.Services{Services: []api.Service{s, failed, unknown}}); err != nil {
		t.Fatal(err)
	}
	golden(t, "services-observed", out.String())
}

func TestPercent(t *testing.T) {
	const third = 715827883.0 / (1 << 31) // as the kernel keeps it
	for _, tt := range []struct {
		share float64
		want  string
	}{
		{0, "0%"}, {1, "100%"}, {0.5, "50%"}, {0.25, "25%"}, {third, "33.3%"}, {2.0 / 3, "66.7%"}, {1.0 / 7, "14.3%"},
		{0.025, "2.5%"}, {0.01, "1%"}, {0.0025, "0.25%"}, {1.0 / 1000, "0.10%"}, {1.0 / 20000, "0.005%"}, {1.0 / 7000, "0.01%"},
		{1e-9, "<0.0001%"},
		{0.999, "99.9%"}, {0.9995, "99.9500%"}, {1 - 1e-9, ">99.9999%"},
		{1 - 1e-10, "100%"}, // the kernel's rounding
	} {
		if got := render.Percent(tt.share); got != tt.want {
			t.Errorf("Percent(%v) = %q, want %q", tt.share, got, tt.want)
		}
	}
}

var at = time.Date(2026, 3, 1, 3, 0, 0, 0, time.UTC)

func finding(code chain.Code, s chain.Severity, message string, rules ...string) api.Finding {
	return api.Finding{Code: code, Severity: s, Message: message, Evidence: api.Evidence{Rules: rules}, Since: at}
}

// of puts findings to a Service.
func of(s api.Service, list ...api.Finding) api.Service {
	for i := range list {
		list[i].Service = &api.ServiceKey{Namespace: s.Namespace, Name: s.Name, Port: s.Port, Protocol: s.Protocol}
	}
	s.Findings = list
	return s
}

func service(namespace, name, port string, frontends ...api.Frontend) api.Service {
	return api.Service{Namespace: namespace, Name: name, Port: port, Protocol: "TCP", Frontends: frontends}
}

func clusterIP(address string, port uint16, routes ...api.Route) api.Frontend {
	return api.Frontend{Type: "ClusterIP", Family: "ipv4", Address: address, Port: port, Routes: routes}
}

func nodePort(family string, port uint16, accepted []string, routes ...api.Route) api.Frontend {
	f := api.Frontend{Type: "NodePort", Family: family, Port: port, Routes: routes}
	for _, a := range accepted {
		f.Accepted = append(f.Accepted, netip.MustParseAddr(a))
	}
	return f
}

var everywhere = chain.Classes

func dnat(from []chain.Class, list ...api.Endpoint) api.Route {
	return api.Route{From: from, Verdict: chain.RouteDNAT, Endpoints: list}
}

func masqueraded(r api.Route) api.Route {
	r.Masquerade = true
	return r
}

func endpoint(share float64, address string) api.Endpoint {
	return api.Endpoint{Address: address, Share: share, Exact: "715827883/2147483648", Chain: "KUBE-SEP-AAAAAAAAAAAAAAAA"}
}

func between(least, most float64, address string) api.Endpoint {
	return api.Endpoint{Address: address, Share: least, MaxShare: &most, Exact: "0/1", Chain: "KUBE-SEP-AAAAAAAAAAAAAAAA"}
}

// equal makes endpoints with equal shares, but for the kernel's rounding.
func equal(n int, format string) []api.Endpoint {
	var out []api.Endpoint
	for i := range n {
		e := endpoint(1/float64(n), fmt.Sprintf(format, i+1))
		e.Share += float64(i%3-1) * 1e-10
		out = append(out, e)
	}
	return out
}

// everyOddity is a document that holds whatever a table can show.
func everyOddity() api.Services {
	pod, host, external := []chain.Class{chain.Pod}, []chain.Class{chain.Host}, []chain.Class{chain.External}
	others := []chain.Class{chain.Host, chain.External}
	notMasqueraded, yes := false, true
	two := equal(2, "10.52.1.%d:8080")

	uneven := service("shop", "uneven", "http", clusterIP("10.56.0.1", 80, dnat(everywhere, endpoint(0.2, "10.52.1.1:8080"), endpoint(0.6, "10.52.1.2:8080"), endpoint(0.2, "10.52.1.3:8080"))))
	lost := dnat(everywhere, endpoint(1/3., "10.52.2.1:8080"), endpoint(1/3., "10.52.2.2:8080"))
	lost.Verdict, lost.Undelivered = chain.RouteMixed, 1/3.
	unknown := dnat(pod, between(0, 0.5, "10.52.3.1:8080"), between(0.5, 1, "10.52.3.2:8080"))
	unknown.Unknown, unknown.Undelivered = []string{"-A KUBE-SVC-BBBBBBBBBBBBBBBB -m time --timestart 22:00:00 -j KUBE-SEP-AAAAAAAAAAAAAAAA"}, 0.5
	ranges := masqueraded(dnat(external, two...))
	ranges.Sources = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("192.0.2.0/25")}
	partly := masqueraded(dnat(everywhere, equal(2, "10.52.1.%d:8080")...))
	partly.Endpoints[0].Masquerade, partly.Endpoints[1].Masquerade = &yes, &notMasqueraded
	dns := service("kube-system", "kube-dns", "dns", clusterIP("10.56.0.10", 53, dnat(everywhere, equal(2, "10.52.1.%d:53")...)))
	dns.Protocol = "UDP"
	sticky := service("shop", "sticky", "", clusterIP("10.56.0.6", 80, dnat(pod, two...), masqueraded(dnat(others, two...))))
	sticky.SessionAffinity = &api.Affinity{Type: "ClientIP", TimeoutSeconds: 10800}
	long := service("shop", "long", "", clusterIP("10.56.0.13", 80, dnat(everywhere, equal(2, "10.52.1.%d:8080")...)))
	long.Frontends[0].Routes[0].Endpoints[0].Exact = strings.Repeat("1234567890", 40) + "/" + strings.Repeat("2345678901", 40)
	brief := service("shop", "sticky-briefly", "", clusterIP("10.56.0.16", 80, dnat(everywhere, endpoint(1, "10.52.1.1:8080"))))
	brief.SessionAffinity = &api.Affinity{Type: "ClientIP", TimeoutSeconds: 90}

	return api.Services{
		Snapshot: api.Header{Node: "node1", Time: at, Backend: "iptables-nft"},
		Services: []api.Service{
			service("default", "go-app", "", clusterIP("10.56.11.169", 80, dnat(pod, equal(3, "10.52.1.%d:8080")...), masqueraded(dnat(others, equal(3, "10.52.1.%d:8080")...)))),
			service("default", "kubernetes", "https", clusterIP("10.56.0.99", 443, dnat(pod, endpoint(1, "10.146.0.2:6443")), masqueraded(dnat(others, endpoint(1, "10.146.0.2:6443"))))),
			dns,
			of(service("shop", "explained", "", clusterIP("10.56.0.11", 80, dnat(everywhere, two...))),
				finding(chain.NotTracked, chain.Info, "ClusterIP 10.56.0.11:80: a rule takes these connections out of conntrack")),
			of(uneven, finding(chain.SharesUneven, chain.Warning, "ClusterIP 10.56.0.1:80: 10.52.1.2:8080 gets 60%", "-A KUBE-SVC-CCCCCCCCCCCCCCCC -j KUBE-SEP-AAAAAAAAAAAAAAAA")),
			of(service("shop", "lost", "", clusterIP("10.56.0.2", 80, lost)), finding(chain.FallThrough, chain.Error, "ClusterIP 10.56.0.2:80: 33.33% of new connections reach no endpoint")),
			of(service("shop", "unknown", "", clusterIP("10.56.0.3", 80, unknown,
				api.Route{From: others, Verdict: chain.RouteMixed, Unknown: unknown.Unknown})),
				finding(chain.UnknownMatch, chain.Warning, "ClusterIP 10.56.0.3:80: depends on a rule that cannot be decided")),
			sticky, brief, long,
			service("shop", "ranges", "", api.Frontend{Type: "LoadBalancer", Family: "ipv4", Address: "203.0.113.11", Port: 443, Routes: []api.Route{
				{From: everywhere, Verdict: chain.RouteDrop}, ranges,
			}}),
			service("shop", "local", "", nodePort("ipv4", 30081, nil, dnat(pod, two...), masqueraded(dnat(host, two...)), dnat(external, endpoint(1, "10.52.1.1:8080"))),
				nodePort("ipv6", 30081, nil, dnat(everywhere, endpoint(1, "[fd00:10:52::1]:8080")))),
			service("shop", "accepted", "", nodePort("ipv4", 30082, []string{"10.146.0.2"}, dnat(everywhere, two...)),
				nodePort("ipv4", 30083, []string{"10.146.0.2", "192.168.7.2"}, dnat(everywhere, two...)),
				nodePort("ipv6", 30082, []string{"fd00::2"}, dnat(everywhere, endpoint(1, "[fd00:10:52::1]:8080")))),
			service("shop", "partly", "", clusterIP("10.56.0.12", 80, partly)),
			service("shop", "six", "", api.Frontend{Type: "ExternalIP", Family: "ipv6", Address: "2001:db8::10", Port: 443, Routes: []api.Route{dnat(everywhere, equal(2, "[fd00:10:52::%d]:8443")...)}}),
			service("shop", "forty", "", clusterIP("10.56.0.40", 80, dnat(everywhere, equal(40, "10.52.3.%d:8080")...))),
			service("shop", "five", "", clusterIP("10.56.0.5", 80, dnat(everywhere, equal(5, "10.52.3.%d:8080")...))),
			service("shop", "empty", "", clusterIP("10.56.0.7", 80, api.Route{From: everywhere, Verdict: chain.RouteReject})),
			service("shop", "away", "", clusterIP("10.56.0.8", 80, api.Route{From: external, Verdict: chain.RouteDrop}, api.Route{From: []chain.Class{chain.Pod, chain.Host}, Verdict: chain.RouteNone})),
		},
		Findings: []api.Finding{
			finding(chain.HookJumpMissing, chain.Error, `table "nat" of ipv6: no rule leads from PREROUTING to KUBE-SERVICES`),
			finding(chain.ForeignRule, chain.Warning, "rule 1 of KUBE-SERVICES is none that kube-proxy writes", "-A KUBE-SERVICES -d 10.0.0.1/32 -j ACCEPT"),
		},
	}
}

func text(t *testing.T, do func(*bytes.Buffer) error) string {
	t.Helper()
	var b bytes.Buffer
	if err := do(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestServices(t *testing.T) {
	got := text(t, func(b *bytes.Buffer) error { return render.Services(b, everyOddity()) })
	golden(t, "services", got)
	if !strings.HasPrefix(got, "✗ ") {
		t.Error("the worst is not on top")
	}
	// With the longest usual names, two endpoints fit into 120 columns.
	const width = 120
	for _, line := range strings.Split(got, "\n") {
		if n := utf8.RuneCountInString(line); n > width && strings.HasSuffix(line, "  50% each: 10.52.1.1:8080, 10.52.1.2:8080") {
			t.Errorf("%d columns: %s", n, line)
		}
	}
}

func TestServicesWide(t *testing.T) {
	golden(t, "services-wide", text(t, func(b *bytes.Buffer) error { return render.ServicesWide(b, everyOddity()) }))
}

// TestServicesBrief covers the documents with little in them.
func TestServicesBrief(t *testing.T) {
	healthy := api.Services{Services: []api.Service{service("default", "go-app", "", clusterIP("10.56.11.169", 80, dnat(everywhere, equal(3, "10.52.1.%d:8080")...)))}}
	stale, torn := healthy, healthy
	stale.Snapshot = api.Header{Time: at, Stale: true, Error: "reading rules.save: permission denied"}
	torn.Snapshot = api.Header{Time: at, Torn: true}
	for _, tt := range []struct {
		name string
		doc  api.Services
		want string
	}{
		{"healthy", healthy, "SERVICE         FRONTEND                   FROM      GOES TO\ndefault/go-app  ClusterIP 10.56.11.169:80  anywhere  33.3% each: 10.52.1.1:8080, 10.52.1.2:8080, 10.52.1.3:8080\n"},
		{"stale", stale, "! stale: the rules are as of 2026-03-01T03:00:00Z; reading them again fails: reading rules.save: permission denied\nSERVICE "},
		{"torn", torn, "! the rules kept changing while they were read; parts may be older than others\nSERVICE "},
		{"nothing", api.Services{Findings: []api.Finding{finding(chain.ProxyModeUnsupported, chain.Error, "no chain of Kubernetes is there")}}, "✗ ProxyModeUnsupported: no chain of Kubernetes is there\n"},
		{"empty", api.Services{}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := text(t, func(b *bytes.Buffer) error { return render.Services(b, tt.doc) })
			if !strings.HasPrefix(got, tt.want) || tt.want == "" && got != "" {
				t.Errorf("got:\n%s\nwant it to begin with:\n%s", got, tt.want)
			}
		})
	}
}

// TestTrace walks the rules of testdata/odd.save, and prints each trace.
func TestTrace(t *testing.T) {
	f, err := os.Open("testdata/odd.save")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rules, err := iptables.Parse(f, "odd.save")
	if err != nil {
		t.Fatal(err)
	}
	snap := snapshot.Build(rules, chain.Node{}, "node1", snapshot.BackendFile, at)
	for _, tt := range []struct{ name, to, from string }{
		{"uneven", "10.56.0.1:80", "pod"},           // chance within chance, with a foreign chain
		{"hairpin", "10.56.0.1:80", "10.52.1.3"},    // one of the ends is masqueraded
		{"lost", "10.56.0.2:80", "pod"},             // a part passes the Service's chain
		{"lost-masquerade", "10.56.0.2:80", "node"}, // and is even masqueraded
		{"unknown", "10.56.0.3:80", "external"},
		{"reject", "10.56.0.4:80", "pod"},
		{"drop", "203.0.113.9:80", "external"},
		{"none", "198.51.100.1:9", "pod"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q, err := api.ParseQuery(tt.to, "", tt.from)
			if err != nil {
				t.Fatal(err)
			}
			doc, err := api.TraceOf(snap, q)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, "trace-"+tt.name, text(t, func(b *bytes.Buffer) error { return render.Trace(b, doc) }))
		})
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errors.New("no space left") }

func TestWriteError(t *testing.T) {
	doc := everyOddity()
	for name, err := range map[string]error{
		"services": render.Services(failing{}, doc), "wide": render.ServicesWide(failing{}, doc), "trace": render.Trace(failing{}, api.Trace{}),
	} {
		if err == nil {
			t.Errorf("%s: the error of the writer got lost", name)
		}
	}
}

// Readers that both find nothing agree, which must not look as if all were well.
func TestDoctorFindsNothing(t *testing.T) {
	var b strings.Builder
	if err := render.Doctor(&b, &doctor.Report{Agree: true}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(b.String(), "there are no tables") {
		t.Errorf("it says %q", b.String())
	}
}
