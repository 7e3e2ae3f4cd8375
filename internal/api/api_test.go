package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
)

var update = flag.Bool("update", false, "write the golden files anew")

// capture builds a snapshot of a real node's dump; edits are pairs of old and new text.
func capture(t *testing.T, edits ...string) *snapshot.Snapshot {
	t.Helper()
	const name = "../../testdata/captures/v1.35.4-iptables.save"
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(edits); i += 2 {
		if !strings.Contains(string(text), edits[i]) {
			t.Fatalf("%s does not hold %q", name, edits[i])
		}
		text = []byte(strings.Replace(string(text), edits[i], edits[i+1], 1))
	}
	rs, err := iptables.Parse(bytes.NewReader(text), name)
	if err != nil {
		t.Fatal(err)
	}
	node := chain.Node{Local: []netip.Addr{netip.MustParseAddr("10.146.0.2")}}
	return snapshot.Build(rs, node, "node1", "", time.Date(2026, 1, 2, 3, 4, 5, 6e6, time.FixedZone("", 3600)))
}

// TestGolden holds the documents against files that show what users script
// against. Of a file, nothing may be renamed or go away.
func TestGolden(t *testing.T) {
	s := capture(t)
	missing := capture(t, `[0:0] -A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES`, "")
	trace := func(to, from string) any {
		q, err := ParseQuery(to, "", from)
		if err != nil {
			t.Fatal(err)
		}
		doc, err := TraceOf(s, q)
		if err != nil {
			t.Fatal(err)
		}
		return doc
	}
	chainDoc, err := ChainOf(s, "nat", "KUBE-SEP-GULQDFY7RLISPLBJ")
	if err != nil {
		t.Fatal(err)
	}
	findings := FindingsOf(missing)
	for i := range findings.Findings {
		findings.Findings[i].Message = "…" // for people, and free to change
	}
	for _, test := range []struct {
		name string
		doc  any
	}{
		{"service", ServicesOf(s, Filter{Namespace: "default", Name: "go-app"})},
		{"service-affinity-local", ServicesOf(s, Filter{Namespace: "shop", Name: "lb-local-sticky", Port: "80"})},
		{"service-sources", ServicesOf(s, Filter{Namespace: "shop", Name: "lb-ranges"})},
		{"trace", trace("10.56.15.149:80", "node")},
		{"trace-reject", trace("10.56.1.2:80", "10.52.1.9")},
		{"chain", chainDoc},
		{"findings", findings},
		{"error", Error{ErrorDetail{404, "no such path: /x"}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var got bytes.Buffer
			enc := json.NewEncoder(&got)
			enc.SetEscapeHTML(false)
			enc.SetIndent("", "  ")
			if err := enc.Encode(test.doc); err != nil {
				t.Fatal(err)
			}
			name := filepath.Join("testdata", test.name+".json")
			if *update {
				if err := os.WriteFile(name, got.Bytes(), 0o666); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got.String()); diff != "" {
				t.Errorf("%s (-want +got; -update writes it anew):\n%s", name, diff)
			}
		})
	}
}

// TestNoNull: a list without members is [], which scripts can range over.
func TestNoNull(t *testing.T) {
	empty := snapshot.Build(&netfilter.Ruleset{}, chain.Node{}, "", "", time.Now())
	s := capture(t)
	reject, err := TraceOf(s, Query{To: netip.MustParseAddrPort("10.56.1.2:80"), Protocol: netfilter.TCP})
	if err != nil {
		t.Fatal(err)
	}
	for name, doc := range map[string]any{
		"no rules": ServicesOf(empty, Filter{}), "no findings": FindingsOf(empty), "all": ServicesOf(s, Filter{}),
		"no such Service": ServicesOf(s, Filter{Name: "nobody"}), "trace": reject,
	} {
		b, err := json.Marshal(doc)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(b, []byte("null")) {
			t.Errorf("%s holds null: %.300s", name, b)
		}
	}
}

func TestParseFilter(t *testing.T) {
	for _, test := range []struct {
		text    string
		want    Filter
		problem bool
	}{
		{"", Filter{}, false},
		{"shop/web", Filter{"shop", "web", ""}, false},
		{"shop/web:http", Filter{"shop", "web", "http"}, false},
		{"shop/web:80", Filter{"shop", "web", "80"}, false},
		{"web", Filter{}, true},
		{"shop/", Filter{}, true},
		{"/web", Filter{}, true},
		{"shop/:80", Filter{}, true},
		{"/", Filter{}, true},
	} {
		got, err := ParseFilter(test.text)
		if got != test.want || (err != nil) != test.problem {
			t.Errorf("ParseFilter(%q) = %+v, %v; want %+v, error %t", test.text, got, err, test.want, test.problem)
		}
	}
}

func TestFilter(t *testing.T) {
	s := capture(t)
	for _, test := range []struct {
		filter Filter
		want   int
	}{
		{Filter{}, 31},
		{Filter{Namespace: "dns"}, 2},
		{Filter{Name: "multi"}, 3},
		{Filter{Namespace: "shop", Name: "multi", Port: "http"}, 1},
		{Filter{Namespace: "shop", Name: "multi", Port: "443"}, 1},
		{Filter{Namespace: "shop", Name: "np", Port: "30080"}, 1},
		{Filter{Namespace: "shop", Name: "np", Port: "8080"}, 0},
		{Filter{Namespace: "sho"}, 0},
	} {
		if got := len(ServicesOf(s, test.filter).Services); got != test.want {
			t.Errorf("%+v chooses %d, want %d", test.filter, got, test.want)
		}
	}
}

func TestParseQuery(t *testing.T) {
	to := netip.MustParseAddrPort
	for _, test := range []struct {
		destination, protocol string
		want                  netip.AddrPort
		wantProtocol          netfilter.Protocol
		problem               string // part of the error
	}{
		{"10.0.0.1:80", "", to("10.0.0.1:80"), netfilter.TCP, ""},
		{"10.0.0.1:53", "udp", to("10.0.0.1:53"), netfilter.UDP, ""},
		{"10.0.0.1:53", "UDP", to("10.0.0.1:53"), netfilter.UDP, ""},
		{"10.0.0.1:53/udp", "", to("10.0.0.1:53"), netfilter.UDP, ""},
		{"10.0.0.1:53/SCTP", "tcp", to("10.0.0.1:53"), netfilter.SCTP, ""},
		{"[fd00::1]:443", "", to("[fd00::1]:443"), netfilter.TCP, ""},
		{"[fd00::1]:53/udp", "", to("[fd00::1]:53"), netfilter.UDP, ""},
		{"[fe80::1%eth0]:80", "", to("[fe80::1]:80"), netfilter.TCP, ""},
		{"[::ffff:10.0.0.1]:80", "", to("10.0.0.1:80"), netfilter.TCP, ""},
		{"", "", netip.AddrPort{}, 0, "is not ADDRESS:PORT"},
		{"10.0.0.1", "", netip.AddrPort{}, 0, "is not ADDRESS:PORT"},
		{"10.0.0.1:", "", netip.AddrPort{}, 0, "is not ADDRESS:PORT"},
		{"10.0.0.1:http", "", netip.AddrPort{}, 0, "is not ADDRESS:PORT"},
		{"10.0.0.1:65536", "", netip.AddrPort{}, 0, "is not ADDRESS:PORT"},
		{"10.0.0.1:-1", "", netip.AddrPort{}, 0, "is not ADDRESS:PORT"},
		{"fd00::1:80", "", netip.AddrPort{}, 0, "IPv6 as [ADDRESS]:PORT"},
		{"web.shop:80", "", netip.AddrPort{}, 0, "is not ADDRESS:PORT"},
		{"10.0.0.1:80/icmp", "", netip.AddrPort{}, 0, `unknown protocol "icmp"`},
		{"10.0.0.1:80/", "", to("10.0.0.1:80"), netfilter.TCP, ""},
		{"10.0.0.1:80", "icmp", netip.AddrPort{}, 0, `unknown protocol "icmp"`},
	} {
		got, err := ParseQuery(test.destination, test.protocol, "node")
		if test.problem != "" {
			if err == nil || !strings.Contains(err.Error(), test.problem) {
				t.Errorf("ParseQuery(%q, %q) = %v, want an error with %q", test.destination, test.protocol, err, test.problem)
			}
			continue
		}
		if want := (Query{test.want, test.wantProtocol, "node"}); err != nil || got != want {
			t.Errorf("ParseQuery(%q, %q) = %+v, %v; want %+v", test.destination, test.protocol, got, err, want)
		}
	}
}

func TestTraceSources(t *testing.T) {
	s := capture(t)
	v4, v6 := netip.MustParseAddrPort("10.56.15.149:80"), netip.MustParseAddrPort("[fd00::1]:80")
	for _, test := range []struct {
		from    string
		to      netip.AddrPort
		class   chain.Class
		missing bool   // it is an ErrNotFound
		problem string // part of the error
	}{
		{from: "", to: v4, class: chain.Pod},
		{from: "pod", to: v4, class: chain.Pod},
		{from: "node", to: v4, class: chain.Host},
		{from: "external", to: v4, class: chain.External},
		{from: "10.52.1.9", to: v4, class: chain.Pod},
		{from: "10.146.0.2", to: v4, class: chain.Host},
		{from: "127.0.0.1", to: v4, class: chain.Host},
		{from: "::ffff:198.51.100.7", to: v4, class: chain.External},
		{from: "host", to: v4, problem: "neither an address nor one of pod, node, external"},
		{from: "Pod", to: v4, problem: "neither an address"},
		{from: "fd00::2", to: v4, problem: "different families"},
		{from: "10.52.1.9", to: v6, problem: "different families"},
		{from: "pod", to: v6, missing: true, problem: "no table of ipv6"},
		{from: "fd00::2", to: v6, missing: true, problem: "no table of ipv6"},
	} {
		doc, err := TraceOf(s, Query{To: test.to, Protocol: netfilter.TCP, From: test.from})
		if test.problem != "" {
			if err == nil || !strings.Contains(err.Error(), test.problem) || errors.Is(err, ErrNotFound) != test.missing {
				t.Errorf("from %q to %v: %v, want an error with %q, not found %t", test.from, test.to, err, test.problem, test.missing)
			}
			continue
		}
		if err != nil || doc.Packet.Class != test.class {
			t.Errorf("from %q to %v: class %q, %v; want %q", test.from, test.to, doc.Packet.Class, err, test.class)
		}
	}
}

// TestSharesAddUp: what a route says of its connections is all of them.
func TestSharesAddUp(t *testing.T) {
	for _, sv := range ServicesOf(capture(t), Filter{}).Services {
		for _, f := range sv.Frontends {
			for _, r := range f.Routes {
				sum := r.Undelivered
				for _, e := range r.Endpoints {
					sum += e.Share
				}
				if sum < 1-1e-12 || sum > 1+1e-12 {
					t.Errorf("%s/%s %s:%d from %v: the shares sum up to %v", sv.Namespace, sv.Name, f.Address, f.Port, r.From, sum)
				}
			}
		}
	}
}

// TestOpenShares: where a rule cannot be decided, both bounds are told, and
// the rule.
func TestOpenShares(t *testing.T) {
	const first = "[0:0] -A KUBE-SVC-7WFRCR3BAURI7IH5 -m comment"
	s := capture(t, first, "[0:0] -A KUBE-SVC-7WFRCR3BAURI7IH5 -m made-up --option -j RETURN\n"+first)
	route := ServicesOf(s, Filter{Name: "go-app"}).Services[0].Frontends[0].Routes[0]
	if len(route.Unknown) != 1 || !strings.Contains(route.Unknown[0], "made-up") || route.Verdict != chain.RouteMixed {
		t.Errorf("verdict %s, unknown %q; want mixed, and the rule", route.Verdict, route.Unknown)
	}
	for _, e := range route.Endpoints {
		if e.Share != 0 || e.MaxShare == nil || *e.MaxShare < 0.33 {
			t.Errorf("endpoint %s: share %v to %v, want 0 to a third", e.Address, e.Share, e.MaxShare)
		}
	}
	doc, err := TraceOf(s, Query{To: netip.MustParseAddrPort("10.56.15.149:80"), Protocol: netfilter.TCP})
	if err != nil || len(doc.Unknown) != 1 {
		t.Errorf("trace: unknown %q, %v", doc.Unknown, err)
	}
}

func TestChainOf(t *testing.T) {
	s := capture(t)
	for _, name := range [][2]string{{"nat", "KUBE-NOTHING"}, {"raw", "PREROUTING"}, {"", ""}} {
		if _, err := ChainOf(s, name[0], name[1]); !errors.Is(err, ErrNotFound) {
			t.Errorf("ChainOf(%q) = %v, want %v", name, err, ErrNotFound)
		}
	}
}
