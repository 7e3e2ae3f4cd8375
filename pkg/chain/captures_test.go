package chain_test

import (
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"maps"
	"math"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
	"github.com/natlens/natlens/pkg/nftables"
)

// The tests in this file hold what chain reads out of recorded rules against
// what the API objects that the kube-proxy had demand of it. The demands are
// worked out from the objects alone: nothing below looks into a rule to learn
// what ought to be in it.

const (
	captures = "../../testdata/captures"
	nodeName = "node1"
	// tolerance is how far a share may lie from 1/n: kube-proxy writes a
	// probability with ten digits, and the kernel keeps it as a multiple of 2^-31.
	tolerance = 4e-10
)

// clusterCIDR was kube-proxy's --cluster-cidr: what tells it pods from others.
var clusterCIDR = netip.MustParsePrefix("10.52.0.0/16")

// proxy is what the releases of kube-proxy do differently, as far as the
// recorded objects show it.
type proxy struct {
	// An ingress address with ipMode Proxy gets no rules (on since v1.30).
	ipMode bool
	// Zone hints decide, without an annotation too (since v1.31; the gate for
	// hints was off up to v1.23).
	hints bool
	// Terminating endpoints stand in for ready ones (since v1.26; up to v1.23
	// only with a gate, and only with externalTrafficPolicy Local).
	terminating bool
	// internalTrafficPolicy Local takes endpoints elsewhere out before all else,
	// so that none here means none at all: REJECT instead of DROP (v1.21-v1.23).
	localIsAll bool
	// A pod's connections to an external IP are not masqueraded (v1.22, v1.23:
	// the rule asks for other sources than pods; from v1.24 KUBE-EXT marks all).
	podsKeepSource bool
	// What is to be dropped is marked in nat for kubelet's rules to drop (up to
	// v1.24), not dropped in filter.
	marksDrops bool
	// kubelet has written those rules: the mark, and the drop for what comes to
	// the node or from it. A forwarded connection is marked and goes on.
	kubelet bool
}

var (
	current = proxy{ipMode: true, hints: true, terminating: true}
	v123    = proxy{localIsAll: true, podsKeepSource: true, marksDrops: true}
)

// fate is what is to become of connections.
type fate struct {
	verdict   chain.RouteVerdict
	endpoints []target // in the order in which kube-proxy writes them
}

// target is an endpoint with all that is to be said of it.
type target struct {
	addr       netip.AddrPort
	masquerade bool
	chain      string
	share      *big.Rat // exactly what the kernel makes of kube-proxy's probabilities
}

// place names one answer: a frontend of a Service, and who connects to it.
type place struct {
	service  chain.ServicePort
	frontend chain.FrontendType
	addr     netip.Addr // invalid for a NodePort
	port     uint16
	class    chain.Class
	source   netip.Prefix // valid where a range of the class fares otherwise
}

func (p place) String() string {
	s := fmt.Sprintf("%s/%v %s", p.service, p.service.Protocol, p.frontend)
	if p.addr.IsValid() {
		s += " " + p.addr.String()
	}
	s = fmt.Sprintf("%s:%d from %s", s, p.port, p.class)
	if p.source.IsValid() {
		s += " in " + p.source.String()
	}
	return s
}

// demands are all answers that the objects ask for.
type demands struct {
	fates    map[place]fate
	affinity map[chain.ServicePort]int
}

func parse(t *testing.T, text string) *netfilter.Ruleset {
	t.Helper()
	rs, err := iptables.Parse(strings.NewReader(text), "capture")
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

func recorded(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(captures, file))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// merged reads dumps into one ruleset, with rules added to the first.
func merged(t *testing.T, files []string, add map[string]string) *netfilter.Ruleset {
	t.Helper()
	var sets []*netfilter.Ruleset
	for _, file := range files {
		sets = append(sets, parse(t, withRules(recorded(t, file), add)))
		add = nil
	}
	rs, err := netfilter.Merge(sets...)
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

// TestCaptures wants what the objects demand at every frontend, for every
// class, and nothing besides.
func TestCaptures(t *testing.T) {
	for _, tt := range []struct {
		name     string
		files    []string          // merged
		add      map[string]string // by table: rules besides those recorded
		proxy    proxy
		findings []string // see wantFindings
		want     map[string]string
	}{
		{
			name: "v1.35.4", files: []string{"v1.35.4-iptables.save"}, proxy: current,
			// What follows was put down by hand: it keeps the oracle honest.
			want: map[string]string{
				"default/kubernetes:https/TCP ClusterIP 10.56.0.1:443 from external":                "dnat 10.146.0.2:6443",
				"default/kubernetes:https/TCP ClusterIP 10.56.0.1:443 from node":                    "dnat 10.146.0.2:6443+masq",
				"dns/kube-dns:dns/UDP ClusterIP 10.56.0.10:53 from pod":                             "dnat 10.52.2.54:5353 10.52.2.55:5353",
				"shop/sctp/SCTP ClusterIP 10.56.1.21:5060 from node":                                "dnat 10.52.2.52:5060+masq 10.52.2.53:5060+masq",
				"shop/empty/TCP ClusterIP 10.56.1.2:80 from pod":                                    "reject",
				"shop/allnotready/TCP ClusterIP 10.56.1.3:80 from external":                         "reject",
				"shop/terminating/TCP ClusterIP 10.56.1.4:80 from pod":                              "dnat 10.52.2.13:8080 10.52.2.14:8080",
				"shop/mixedterm/TCP ClusterIP 10.56.1.5:80 from pod":                                "dnat 10.52.2.15:8080",
				"shop/zones/TCP ClusterIP 10.56.1.19:80 from pod":                                   "dnat 10.52.1.49:8080 10.52.2.48:8080",
				"shop/itp-local/TCP ClusterIP 10.56.1.17:80 from external":                          "dnat 10.52.1.46:8080+masq",
				"shop/itp-local-none/TCP ClusterIP 10.56.1.18:80 from node":                         "drop",
				"shop/hostnet/TCP ClusterIP 10.56.1.22:80 from pod":                                 "dnat 10.146.0.2:8080 10.146.0.3:8080",
				"shop/hostnet/TCP ClusterIP 10.56.1.22:80 from node":                                "dnat 10.146.0.2:8080+masq 10.146.0.3:8080+masq",
				"shop/hostnet/TCP ClusterIP 10.56.1.22:80 from external":                            "dnat 10.146.0.2:8080 10.146.0.3:8080+masq",
				"shop/np-local/TCP NodePort:30081 from pod":                                         "dnat 10.52.1.32:8080 10.52.1.33:8080 10.52.2.32:8080",
				"shop/np-local/TCP NodePort:30081 from node":                                        "dnat 10.52.1.32:8080+masq 10.52.1.33:8080+masq 10.52.2.32:8080+masq",
				"shop/np-local/TCP NodePort:30081 from external":                                    "dnat 10.52.1.32:8080 10.52.1.33:8080",
				"shop/np-local-none/TCP NodePort:30082 from pod":                                    "dnat 10.52.2.34:8080",
				"shop/np-local-none/TCP NodePort:30082 from external":                               "drop",
				"shop/lb-local-sticky/TCP LoadBalancer 203.0.113.14:80 from external":               "dnat 10.52.1.40:8080 10.52.1.41:8080",
				"shop/lb-ranges/TCP LoadBalancer 203.0.113.11:443 from pod":                         "drop",
				"shop/lb-ranges/TCP LoadBalancer 203.0.113.11:443 from external":                    "drop",
				"shop/lb-ranges/TCP LoadBalancer 203.0.113.11:443 from external in 198.51.100.0/24": "dnat 10.52.2.36:8443+masq 10.52.2.37:8443+masq 10.52.2.38:8443+masq",
				"shop/lb-ranges/TCP NodePort:30084 from pod":                                        "dnat 10.52.2.36:8443+masq 10.52.2.37:8443+masq 10.52.2.38:8443+masq",
				"shop/extip/TCP ExternalIP 192.0.2.200:80 from pod":                                 "dnat 10.52.2.44:8080+masq 10.52.2.45:8080+masq",
				"shop/lb-proxy/TCP NodePort:30087 from external":                                    "dnat 10.52.2.42:8080+masq 10.52.2.43:8080+masq",
				"shop/lb-proxy/TCP LoadBalancer 203.0.113.15:80 from external":                      "",
			},
		},
		{
			// The legacy backend prints the same rules.
			name: "v1.37.2", files: []string{"v1.37.2-iptables-legacy-backend.save"}, proxy: current,
		},
		{
			// The tables of IPv6 hold no Service: none is dual-stack.
			name: "v1.35.4 with IPv6", files: []string{"v1.35.4-iptables.save", "v1.35.4-iptables.save6"}, proxy: current,
		},
		{
			// This node had no kubelet: KUBE-MARK-DROP is there, since kube-proxy
			// makes sure of it, but empty. What is marked for dropping comes back
			// from the Service's chains as it came, and goes on to where it went.
			name: "v1.23.17", files: []string{"v1.23.17-iptables.save"}, proxy: v123,
			findings: []string{"shop/lb-ranges FallThrough", "shop/np-local-none FallThrough"},
			want: map[string]string{
				"shop/itp-local-none/TCP ClusterIP 10.56.1.18:80 from node":                      "reject",
				"shop/terminating/TCP ClusterIP 10.56.1.4:80 from pod":                           "reject",
				"shop/mixedterm/TCP ClusterIP 10.56.1.5:80 from pod":                             "dnat 10.52.2.15:8080",
				"shop/zones/TCP ClusterIP 10.56.1.19:80 from pod":                                "dnat 10.52.1.49:8080 10.52.2.48:8080 10.52.2.49:8080",
				"shop/np-local/TCP NodePort:30081 from external":                                 "dnat 10.52.1.32:8080 10.52.1.33:8080",
				"shop/np-local-none/TCP NodePort:30082 from external":                            "none",
				"shop/lb-ranges/TCP LoadBalancer 203.0.113.11:443 from node":                     "none",
				"shop/lb-ranges/TCP LoadBalancer 203.0.113.11:443 from external in 192.0.2.0/25": "dnat 10.52.2.36:8443+masq 10.52.2.37:8443+masq 10.52.2.38:8443+masq",
				"shop/extip/TCP ExternalIP 192.0.2.200:80 from pod":                              "dnat 10.52.2.44:8080 10.52.2.45:8080",
				"shop/extip/TCP ExternalIP 192.0.2.200:80 from external":                         "dnat 10.52.2.44:8080+masq 10.52.2.45:8080+masq",
				"shop/lb-proxy/TCP LoadBalancer 203.0.113.15:80 from pod":                        "dnat 10.52.2.42:8080+masq 10.52.2.43:8080+masq",
				"shop/lb-local-sticky/TCP LoadBalancer 203.0.113.14:80 from external":            "dnat 10.52.1.40:8080 10.52.1.41:8080",
			},
		},
		{
			// The same with what a kubelet of that time writes: now the mark means
			// something. It is deliberate, so it is no finding.
			name: "v1.23.17 with a kubelet", files: []string{"v1.23.17-iptables.save"},
			add: map[string]string{
				"filter": `:KUBE-FIREWALL - [0:0]
-A INPUT -j KUBE-FIREWALL
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL -m comment --comment "kubernetes firewall for dropping marked packets" -m mark --mark 0x8000/0x8000 -j DROP
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
`,
				"nat": "-A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000\n",
			},
			proxy: func() proxy { p := v123; p.kubelet = true; return p }(),
			want: map[string]string{
				"shop/np-local-none/TCP NodePort:30082 from external":             "drop",
				"shop/lb-ranges/TCP LoadBalancer 203.0.113.11:443 from node":      "drop",
				"shop/lb-ranges/TCP LoadBalancer 203.0.113.11:443 from pod":       "none",
				"shop/itp-local-none/TCP ClusterIP 10.56.1.18:80 from node":       "reject",
				"shop/np-local-none/TCP ClusterIP 10.56.1.10:80 from external":    "dnat 10.52.2.34:8080+masq",
				"shop/lb-local/TCP LoadBalancer 203.0.113.12:80 from external":    "dnat 10.52.1.39:8080",
				"shop/lb-local/TCP LoadBalancer 203.0.113.12:80 from node":        "dnat 10.52.1.39:8080+masq 10.52.2.39:8080+masq",
				"shop/lb-local-sticky/TCP LoadBalancer 203.0.113.13:80 from pod":  "dnat 10.52.1.40:8080 10.52.1.41:8080 10.52.2.40:8080",
				"shop/lb-local-sticky/TCP LoadBalancer 203.0.113.13:80 from node": "dnat 10.52.1.40:8080+masq 10.52.1.41:8080+masq 10.52.2.40:8080+masq",
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := readObjects(t)
			want := o.demands(t, tt.proxy)
			for at, text := range tt.want {
				if got := want.at(at); got != text {
					t.Errorf("%s: the objects demand %q, but by hand it is %q", at, got, text)
				}
			}
			if n := len(want.affinity); n != 31 {
				t.Errorf("the objects demand %d Service ports, but by hand it is 31", n)
			}
			if n := want.most(); n != 40 {
				t.Errorf("the largest Service has %d endpoints, but by hand it is 40", n)
			}

			rs := merged(t, tt.files, tt.add)
			p := chain.NewView(rs, o.node()).Services()
			for _, d := range want.compare(p) {
				t.Error(d)
			}
			wantFindings(t, p, tt.findings)
		})
		t.Run(tt.name+" from somewhere else", func(t *testing.T) {
			// Whoever looks at a dump elsewhere does not know the node; that must
			// not make up findings.
			wantFindings(t, chain.NewView(merged(t, tt.files, tt.add), chain.Node{}).Services(), tt.findings)
		})
	}
}

// wantFindings wants each finding, as "service code" or "node code", and no
// other: a false alarm costs people hours.
func wantFindings(t *testing.T, p *chain.Programmed, want []string) {
	t.Helper()
	got := map[string]bool{}
	for _, f := range findings(p) {
		who := "node"
		if f.Service != nil {
			who = f.Service.String()
		}
		what := fmt.Sprintf("%s %s", who, f.Code)
		got[what] = true
		if !slices.Contains(want, what) {
			t.Errorf("false alarm: %s: %s", what, f.Message)
		}
	}
	for _, what := range want {
		if !got[what] {
			t.Errorf("finding missing: %s", what)
		}
	}
}

// A rule put by hand before those of a Service is that Service's, and hides
// none of the others.
func TestRuleInFront(t *testing.T) {
	o := readObjects(t)
	text := alter(t, recorded(t, "v1.35.4-iptables.save"), `"shop/lb cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ`,
		"-A KUBE-SVC-EQPZH4W7LN3ZNZNG ", "-A KUBE-SVC-EQPZH4W7LN3ZNZNG -s 10.52.0.0/16 -j RETURN\n-A KUBE-SVC-EQPZH4W7LN3ZNZNG ")
	wantFindings(t, chain.NewView(parse(t, text), o.node()).Services(), []string{"shop/lb ForeignRule", "shop/lb FallThrough"})

	const name = "service-7N5376TV-shop/zones/tcp/"
	const rule = `{"rule": {"family": "ip", "table": "kube-proxy", "chain": "` + name + `", "handle": `
	const foreign = rule + `9999, "expr": [
		{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": {"prefix": {"addr": "10.52.0.0", "len": 16}}}}, {"return": null}]}}, `
	text = strings.Replace(recorded(t, "v1.35.4-nftables.nft.json"), rule, foreign+rule, 1)
	rs, err := nftables.Parse(strings.NewReader(text), "altered.json")
	if err != nil {
		t.Fatal(err)
	}
	wantFindings(t, chain.NewView(rs, o.node()).Services(), []string{"shop/zones ForeignRule"})
}

// Without kubelet's rules, each class that a v1.23 would drop is told of.
func TestFallThroughOfEmptyMarkDrop(t *testing.T) {
	p := chain.NewView(parse(t, recorded(t, "v1.23.17-iptables.save")), readObjects(t).node()).Services()
	var got []string
	for _, f := range findings(p) {
		if f.Code != chain.FallThrough || f.Severity != chain.Error || len(f.Rules) == 0 {
			t.Errorf("%s %s with %d rules: %s", f.Severity, f.Code, len(f.Rules), f.Message)
		}
		what, _, _ := strings.Cut(f.Message, " pass ")
		got = append(got, what)
	}
	want := []string{
		"LoadBalancer 203.0.113.11:443: 100% of new connections from anywhere",
		"NodePort 30082: 100% of new connections from outside",
	}
	if !slices.Equal(got, want) {
		t.Errorf("findings:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// The tables of IPv6 alone look like a kube-proxy that has not got to its
// Services yet, and there is no telling that IPv4 has them.
func TestCaptureOfIPv6Alone(t *testing.T) {
	p := chain.NewView(parse(t, recorded(t, "v1.35.4-iptables.save6")), chain.Node{}).Services()
	if len(p.Services) != 0 {
		t.Errorf("%d Services, want none: %v", len(p.Services), p.Services[0].ServicePort)
	}
	if len(p.Findings) != 1 {
		t.Fatalf("%d findings, want one: %v", len(p.Findings), p.Findings)
	}
	f := p.Findings[0]
	if f.Code != chain.ProxyModeUnsupported || f.Service != nil || !strings.Contains(f.Message, "hold no Service") {
		t.Errorf("finding %s about %v: %s", f.Code, f.Service, f.Message)
	}
}

// TestCapturesAltered breaks the rules in one place each and wants the
// comparison to say so, and to say it of nothing else.
func TestCapturesAltered(t *testing.T) {
	for _, tt := range []struct {
		name     string
		line     string // part of exactly one line
		old, new string // new without old comes in a line behind; neither takes the line out
		about    string // what each difference begins with
		want     string // part of one of them
	}{
		{"probability swapped for another", `"shop/forty -> 10.52.3.10:8080" -m statistic`, "0.02499999991", "0.02564102551",
			"shop/forty/TCP ClusterIP 10.56.1.25:80 from ", "from pod: share of 10.52.3.10:8080"},
		{"probability 1e-9 off", `"shop/dup-a -> 10.52.2.57:8080" -m statistic`, "0.50000000000", "0.50000000100",
			"shop/dup-a/TCP ClusterIP 10.56.1.23:80 from ", "from external: share of 10.52.2.58:8080"},
		{"probability off by the least that there is", `"shop/sctp -> 10.52.2.52:5060" -m statistic`, "0.50000000000", "0.50000000047",
			"shop/sctp/SCTP ClusterIP 10.56.1.21:5060 from ", "from node: share of 10.52.2.53:5060 is exactly"},
		{"probability missing", `"shop/seven -> 10.52.2.3:8080" -m statistic`, "-m statistic --mode random --probability 0.20000000019 ", "",
			"shop/seven/TCP ClusterIP 10.56.1.7:80 from ", "from pod: endpoints"},
		{"last endpoint missing", `"shop/seven -> 10.52.2.7:8080" -j`, "", "",
			"shop/seven/TCP ClusterIP 10.56.1.7:80 from ", `from pod: verdict "mixed"`},
		{"endpoint's address changed", "--to-destination 10.52.2.31:8080", "10.52.2.31", "10.52.2.99",
			"shop/np/TCP ", "NodePort:30080 from external: endpoints"},
		{"endpoint's port changed", "--to-destination 10.52.2.50:9090", "9090", "9091",
			"shop/multi:metrics/TCP ", "ClusterIP 10.56.1.20:9090 from pod: endpoints"},
		{"endpoint of another Service", `"dns/kube-dns:dns -> 10.52.2.55:5353" -j`, "KUBE-SEP-DSGH4FHZ2GPYACDA", "KUBE-SEP-UDQAA5Z7WWWNPVB5",
			"dns/kube-dns:dns/UDP ", "ClusterIP 10.56.0.10:53 from pod: "},
		{"REJECT removed", `"shop/empty has no endpoints"`, "", "",
			"shop/empty/TCP ", "ClusterIP 10.56.1.2:80 from pod: missing"},
		{"REJECT made a DROP", `"shop/allnotready has no endpoints"`, "REJECT --reject-with icmp-port-unreachable", "DROP",
			"shop/allnotready/TCP ", `from pod: verdict "drop", want "reject"`},
		{"DROP of internalTrafficPolicy removed", `"shop/itp-local-none has no local endpoints"`, "", "",
			"shop/itp-local-none/TCP ", "ClusterIP 10.56.1.18:80 from pod: missing"},
		{"DROP of externalTrafficPolicy removed", `"shop/np-local-none has no local endpoints"`, "", "",
			"shop/np-local-none/TCP NodePort:30082 from external: ", `verdict "none", want "drop"`},
		{"DROP of source ranges removed", `"shop/lb-ranges traffic not accepted by`, "", "",
			"shop/lb-ranges/TCP LoadBalancer 203.0.113.11:443 from ", `from pod: verdict "none", want "drop"`},
		{"source range widened", `-s 192.0.2.0/25`, "192.0.2.0/25", "192.0.2.0/24",
			"shop/lb-ranges/TCP LoadBalancer 203.0.113.11:443 from external in 192.0.2.0/2", "in 192.0.2.0/25: missing"},
		{"source range removed", `-s 198.51.100.0/24`, "", "",
			"shop/lb-ranges/TCP LoadBalancer 203.0.113.11:443 from external in 198.51.100.0/24: ", "missing"},
		{"dispatch to a ClusterIP removed", `"shop/single cluster IP" -m tcp --dport 80 -j KUBE-SVC-`, "", "",
			"shop/single/TCP ", "ClusterIP 10.56.1.1:80 from node: missing"},
		{"dispatch to a NodePort for localhost only", `-A KUBE-NODEPORTS -p tcp -m comment --comment "default/go-app"`, "", "",
			"default/go-app/TCP NodePort:30679 from ", `from external: verdict "none", want "dnat"`},
		{"dispatch by another port", `"shop/extip external IP"`, "--dport 80", "--dport 81",
			"shop/extip/TCP ExternalIP 192.0.2.200:8", ":81 from pod: not in the objects"},
		{"a Service too many", `"shop/dup-b cluster IP" -m tcp --dport 81 -j KUBE-SVC-`, "",
			`-A KUBE-SERVICES -d 10.56.9.9/32 -p tcp -m comment --comment "shop/ghost cluster IP" -m tcp --dport 80 -j KUBE-SVC-O65REM64E3H7FCXO`,
			"shop/ghost/TCP", "ClusterIP 10.56.9.9:80 from pod: not in the objects"},
		{"address of a load balancer with ipMode Proxy", `"shop/lb loadbalancer IP"`, "",
			`-A KUBE-SERVICES -d 203.0.113.15/32 -p tcp -m comment --comment "shop/lb-proxy loadbalancer IP" -m tcp --dport 80 -j KUBE-EXT-4PMKITJPDGHBIJPR`,
			"shop/lb-proxy/TCP LoadBalancer 203.0.113.15:80 from ", "not in the objects"},
		{"masquerading of ClusterIP removed", `"shop/lb cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ`, "", "",
			"shop/lb/TCP ClusterIP 10.56.1.11:80 from ", "from external: masquerading of 10.52.1.35:8080 is false, want true"},
		{"masquerading of NodePort removed", `"masquerade traffic for shop/np external destinations"`, "", "",
			"shop/np/TCP NodePort:30080 from ", "from pod: masquerading of 10.52.2.31:8080 is false, want true"},
		{"masquerading of the node's own removed", `"masquerade LOCAL traffic for shop/np-local external destinations"`, "", "",
			"shop/np-local/TCP NodePort:30081 from node: ", "masquerading of 10.52.1.32:8080 is false, want true"},
		{"masquerading removed altogether", `"kubernetes service traffic requiring SNAT" -j MASQUERADE`, "", "",
			"", "shop/hostnet/TCP ClusterIP 10.56.1.22:80 from external: masquerading of 10.146.0.3:8080 is false, want true"},
		{"way of pods around externalTrafficPolicy removed", `"pod traffic for shop/np-local external destinations"`, "", "",
			"shop/np-local/TCP NodePort:30081 from pod: ", "endpoints"},
		{"way of the node around externalTrafficPolicy removed", `"route LOCAL traffic for shop/lb-local external destinations"`, "", "",
			"shop/lb-local/TCP ", "LoadBalancer 203.0.113.12:80 from node: endpoints"},
		{"local endpoint missing", `"shop/np-local -> 10.52.1.33:8080" -j`, "", "",
			"shop/np-local/TCP NodePort:30081 from external: ", `verdict "mixed", want "dnat"`},
		{"timeout of session affinity changed", `"shop/sticky -> 10.52.2.21:8080" -m recent`, "--seconds 300", "--seconds 600",
			"shop/sticky/TCP: ", "affinity 600 s, want 300 s"},
		{"session affinity for some", `-A KUBE-SVC-W3NCAHCBFJTIP2BR -m comment --comment "shop/forty -> 10.52.3.10:8080" -m statistic`, "",
			`-A KUBE-SVC-W3NCAHCBFJTIP2BR -m comment --comment "shop/forty -> 10.52.3.1:8080" -m recent --rcheck --seconds 60 --reap --name x --mask 255.255.255.255 --rsource -j KUBE-SEP-WOZNGWZBLD3B3NXI`,
			"shop/forty/TCP: ", "affinity 60 s, want 0 s"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := readObjects(t)
			text := alter(t, recorded(t, "v1.35.4-iptables.save"), tt.line, tt.old, tt.new)
			diffs := o.demands(t, current).compare(chain.NewView(parse(t, text), o.node()).Services())
			found := false
			for _, d := range diffs {
				if !strings.HasPrefix(d, tt.about) {
					t.Errorf("difference elsewhere: %s", d)
				}
				found = found || strings.Contains(d, tt.want)
			}
			if !found {
				t.Errorf("no difference with %q among %d:\n%s", tt.want, len(diffs), strings.Join(diffs, "\n"))
			}
		})
	}
}

// alter changes the one line of a dump that has a part.
func alter(t *testing.T, text, part, old, repl string) string {
	t.Helper()
	var out []string
	hits := 0
	for line := range strings.Lines(text) {
		if !strings.Contains(line, part) {
			out = append(out, line)
			continue
		}
		hits++
		switch {
		case old != "":
			if strings.Count(line, old) != 1 {
				t.Fatalf("%q is not once in %q", old, line)
			}
			out = append(out, strings.Replace(line, old, repl, 1))
		case repl != "":
			out = append(out, line, repl+"\n")
		}
	}
	if hits != 1 {
		t.Fatalf("%d lines have %q, want one", hits, part)
	}
	return strings.Join(out, "")
}

// withRules puts rules at the end of tables.
func withRules(text string, add map[string]string) string {
	var out strings.Builder
	table := ""
	for line := range strings.Lines(text) {
		if name, ok := strings.CutPrefix(line, "*"); ok {
			table = strings.TrimSpace(name)
		}
		if strings.TrimSpace(line) == "COMMIT" {
			out.WriteString(add[table])
		}
		out.WriteString(line)
	}
	return out.String()
}

// findings returns those about the node and those about Services.
func findings(p *chain.Programmed) []chain.Finding {
	all := slices.Clone(p.Findings)
	for _, s := range p.Services {
		all = append(all, s.Findings...)
	}
	return all
}

// at renders the fate of a place, "" where nothing is demanded.
func (d *demands) at(name string) string {
	for p, f := range d.fates {
		if p.String() != name {
			continue
		}
		out := string(f.verdict)
		for _, e := range f.endpoints {
			out += " " + e.addr.String()
			if e.masquerade {
				out += "+masq"
			}
		}
		return out
	}
	return ""
}

// most returns the number of endpoints where there are most.
func (d *demands) most() int {
	n := 0
	for _, f := range d.fates {
		n = max(n, len(f.endpoints))
	}
	return n
}

// compare returns how what was read out of rules differs from the demands.
// Each difference begins with the Service and names frontend and class.
func (d *demands) compare(p *chain.Programmed) []string {
	var diffs []string
	services := map[chain.ServicePort]bool{}
	seen := map[place]bool{}
	for _, s := range p.Services {
		say := func(at any, format string, args ...any) {
			diffs = append(diffs, fmt.Sprintf("%v: ", at)+fmt.Sprintf(format, args...))
		}
		name := fmt.Sprintf("%s/%v", s.ServicePort, s.Protocol)
		if services[s.ServicePort] {
			say(name, "listed twice")
		}
		services[s.ServicePort] = true
		if want, ok := d.affinity[s.ServicePort]; !ok {
			say(name, "not in the objects")
		} else if s.AffinitySeconds != want {
			say(name, "affinity %d s, want %d s", s.AffinitySeconds, want)
		}
		for _, f := range s.Frontends {
			for _, r := range f.Routes {
				sources := r.Sources
				if len(sources) == 0 {
					sources = []netip.Prefix{{}}
				}
				for _, class := range r.From {
					for _, source := range sources {
						at := place{s.ServicePort, f.Type, f.Address, f.Port, class, source}
						want, ok := d.fates[at]
						switch {
						case seen[at]:
							say(at, "answered twice")
						case !ok:
							say(at, "not in the objects")
						case f.Family != netfilter.IPv4 || len(f.Accepted) > 0:
							say(at, "family %v, accepted at %v; want ipv4, at all addresses", f.Family, f.Accepted)
						default:
							for _, diff := range want.compare(r) {
								say(at, "%s", diff)
							}
						}
						seen[at] = true
					}
				}
			}
		}
	}
	for at := range d.fates {
		if !seen[at] {
			diffs = append(diffs, fmt.Sprintf("%v: missing from the rules", at))
		}
	}
	slices.Sort(diffs)
	return diffs
}

// compare returns how a route differs from a fate.
func (f fate) compare(r chain.Route) []string {
	var diffs []string
	say := func(format string, args ...any) { diffs = append(diffs, fmt.Sprintf(format, args...)) }

	if r.Verdict != f.verdict {
		say("verdict %q, want %q", r.Verdict, f.verdict)
	}
	if len(r.Unknown) > 0 {
		say("%d rules undecided", len(r.Unknown))
	}
	// Whatever the verdict, each connection is accounted for.
	sum, masquerade := exact(r.Undelivered), false
	want := map[netip.AddrPort]target{}
	for _, e := range f.endpoints {
		want[e.addr] = e
		masquerade = masquerade || e.masquerade
	}
	var got []netip.AddrPort
	for _, e := range r.Endpoints {
		got = append(got, e.Address)
		sum.Add(sum, exact(e.Share))
		if e.Share.Cmp(e.Max) != 0 {
			say("share of %s is from %s to %s, want one", e.Address, e.Share.Exact(), e.Max.Exact())
		}
		w, ok := want[e.Address]
		if !ok {
			continue
		}
		if off := e.Share.Float64() - 1/float64(len(want)); math.Abs(off) >= tolerance {
			say("share of %s is %.12f, want 1/%d", e.Address, e.Share.Float64(), len(want))
		}
		if x := exact(e.Share); x.Cmp(w.share) != 0 {
			say("share of %s is exactly %s, want %s", e.Address, x, w.share)
		}
		if got := r.MasqueradesTo(e); got != w.masquerade {
			say("masquerading of %s is %v, want %v", e.Address, got, w.masquerade)
		}
		if e.Chain != w.chain {
			say("chain of %s is %s, want %s", e.Address, e.Chain, w.chain)
		}
	}
	// Nothing twice either: the list is as long as the set.
	if wanted := slices.SortedFunc(maps.Keys(want), netip.AddrPort.Compare); !slices.Equal(got, wanted) {
		say("endpoints %v, want %v", got, wanted)
	}
	if sum.Cmp(big.NewRat(1, 1)) != 0 {
		say("all shares add up to %s, want 1", sum)
	}
	if f.verdict == chain.RouteDNAT && !r.Undelivered.IsZero() || f.verdict != chain.RouteDNAT && !r.Undelivered.IsWhole() {
		say("undelivered %s with verdict %q", r.Undelivered.Exact(), f.verdict)
	}
	if r.Masquerade != masquerade {
		say("masquerading %v, want %v", r.Masquerade, masquerade)
	}
	return diffs
}

// exact returns a share as a number; one that cannot be told adds nothing.
func exact(s chain.Share) *big.Rat {
	x, ok := new(big.Rat).SetString(s.Exact())
	if !ok {
		return new(big.Rat)
	}
	return x
}

// What follows is kube-proxy's side of the matter, told once more from its
// documentation: objects in, demands out.

// Names of fields are those of the API but for case, which JSON forgives.

type object struct {
	Metadata struct {
		Namespace, Name string
		Labels          map[string]string
	}
}

type service struct {
	object
	Spec struct {
		Type      string
		ClusterIP string
		Ports     []struct {
			Name, Protocol string
			Port, NodePort uint16
		}
		ExternalIPs              []string
		ExternalTrafficPolicy    string
		InternalTrafficPolicy    string
		LoadBalancerSourceRanges []string
		SessionAffinity          string
		SessionAffinityConfig    struct {
			ClientIP struct{ TimeoutSeconds int }
		}
	}
	Status struct {
		LoadBalancer struct {
			Ingress []struct{ IP, IPMode string }
		}
	}
}

type endpoint struct {
	Addresses  []string
	NodeName   string
	Conditions struct{ Ready, Serving, Terminating *bool }
	Hints      struct {
		ForZones []struct{ Name string }
	}

	addr netip.AddrPort // with the port that was asked for
}

// The API says what a condition that is missing means.
func (e endpoint) ready() bool { return e.Conditions.Ready == nil || *e.Conditions.Ready }
func (e endpoint) standsIn() bool {
	serving, terminating := e.ready(), false
	if e.Conditions.Serving != nil {
		serving = *e.Conditions.Serving
	}
	if e.Conditions.Terminating != nil {
		terminating = *e.Conditions.Terminating
	}
	return serving && terminating
}
func (e endpoint) here() bool { return e.NodeName == nodeName }

type endpointSlice struct {
	object
	AddressType string
	Endpoints   []endpoint
	Ports       []struct {
		Name, Protocol string
		Port           uint16
	}
}

type node struct {
	object
	Status struct {
		Addresses []struct{ Type, Address string }
	}
}

// objects are those that the kube-proxy had.
type objects struct {
	services []service
	slices   []endpointSlice
	own      []netip.Addr // of the node
	zone     string
}

func readObjects(t *testing.T) *objects {
	t.Helper()
	o := &objects{
		services: list[service](t, "objects-services.yaml"),
		slices:   list[endpointSlice](t, "objects-endpointslices.yaml"),
	}
	for _, n := range list[node](t, "objects-nodes.yaml") {
		if n.Metadata.Name != nodeName {
			continue
		}
		o.zone = n.Metadata.Labels["topology.kubernetes.io/zone"]
		for _, a := range n.Status.Addresses {
			if a.Type == "InternalIP" {
				o.own = append(o.own, netip.MustParseAddr(a.Address))
			}
		}
	}
	if len(o.own) != 1 || o.zone != "a" {
		t.Fatalf("node %s has addresses %v and zone %q", nodeName, o.own, o.zone)
	}
	return o
}

func list[T any](t *testing.T, file string) []T {
	t.Helper()
	var l struct{ Items []T }
	if err := yaml.Unmarshal([]byte(recorded(t, file)), &l); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	if len(l.Items) == 0 {
		t.Fatalf("%s has no objects", file)
	}
	return l.Items
}

// node is all that chain is told besides the rules.
func (o *objects) node() chain.Node { return chain.Node{Local: o.own} }

// demands works out what the objects demand of a kube-proxy of IPv4.
func (o *objects) demands(t *testing.T, px proxy) *demands {
	t.Helper()
	d := &demands{map[place]fate{}, map[chain.ServicePort]int{}}
	skipped := map[string]bool{}
	for _, s := range o.services {
		if _, other := s.Metadata.Labels["service.kubernetes.io/service-proxy-name"]; other || s.Spec.Type == "ExternalName" || s.Spec.ClusterIP == "None" {
			skipped[s.Metadata.Name] = true
			continue
		}
		for i, p := range s.Spec.Ports {
			protocol, err := netfilter.ParseProtocol(p.Protocol)
			if err != nil {
				t.Fatal(err)
			}
			w := &working{objects: o, proxy: px, demands: d, spec: s, name: chain.ServicePort{
				Namespace: s.Metadata.Namespace, Name: s.Metadata.Name, Port: p.Name, Protocol: protocol,
			}}
			w.cluster, w.local = w.choose(o.endpoints(s, p.Name, p.Protocol))
			w.port(t, i)
		}
	}
	if !skipped["headless"] {
		t.Fatal("no headless Service among the objects")
	}
	return d
}

// endpoints returns those of a Service's port, with addresses of IPv4.
func (o *objects) endpoints(s service, port, protocol string) []endpoint {
	var out []endpoint
	for _, sl := range o.slices {
		if sl.Metadata.Namespace != s.Metadata.Namespace || sl.Metadata.Labels["kubernetes.io/service-name"] != s.Metadata.Name || sl.AddressType != "IPv4" {
			continue
		}
		for _, p := range sl.Ports {
			if p.Name != port || p.Protocol != protocol {
				continue
			}
			for _, e := range sl.Endpoints {
				e.addr = netip.AddrPortFrom(netip.MustParseAddr(e.Addresses[0]), p.Port)
				out = append(out, e)
			}
		}
	}
	// kube-proxy keeps them in the order of "ip:port" as text.
	slices.SortFunc(out, func(a, b endpoint) int { return strings.Compare(a.addr.String(), b.addr.String()) })
	return out
}

// working is one port of a Service being worked out.
type working struct {
	*objects
	proxy
	*demands
	spec           service
	name           chain.ServicePort
	cluster, local []endpoint
}

func keep(from []endpoint, match func(endpoint) bool) []endpoint {
	return slices.DeleteFunc(slices.Clone(from), func(e endpoint) bool { return !match(e) })
}

// choose returns the endpoints for connections to all of the cluster, and for
// those to this node.
func (w *working) choose(all []endpoint) (cluster, local []endpoint) {
	// Up to v1.23 the policy for inside is asked first, unless there is one for
	// outside, and all else sees only what it left.
	if w.localIsAll && w.internalLocal() && !w.externalLocal() {
		all = keep(all, endpoint.here)
	}
	inZone := func(e endpoint) bool {
		return slices.ContainsFunc(e.Hints.ForZones, func(z struct{ Name string }) bool { return z.Name == w.zone })
	}
	hinted := func(e endpoint) bool { return len(e.Hints.ForZones) > 0 }

	cluster = keep(all, endpoint.ready)
	if w.hints && len(keep(cluster, hinted)) == len(cluster) && slices.ContainsFunc(cluster, inZone) {
		cluster = keep(cluster, inZone)
	}
	local = keep(keep(all, endpoint.ready), endpoint.here)
	if w.terminating {
		if len(cluster) == 0 {
			cluster = keep(all, endpoint.standsIn)
		}
		if len(local) == 0 {
			local = keep(keep(all, endpoint.standsIn), endpoint.here)
		}
	}
	return cluster, local
}

func (w *working) internalLocal() bool { return w.spec.Spec.InternalTrafficPolicy == "Local" }
func (w *working) externalLocal() bool { return w.spec.Spec.ExternalTrafficPolicy == "Local" }

// port works out every frontend of a port.
func (w *working) port(t *testing.T, i int) {
	t.Helper()
	spec, port := w.spec.Spec, w.spec.Spec.Ports[i]
	w.affinity[w.name] = 0
	if spec.SessionAffinity == "ClientIP" && len(w.cluster) > 0 {
		w.affinity[w.name] = spec.SessionAffinityConfig.ClientIP.TimeoutSeconds
	}

	for _, class := range chain.Classes {
		at := place{service: w.name, frontend: chain.ClusterIP, addr: netip.MustParseAddr(spec.ClusterIP), port: port.Port, class: class}
		w.fates[at] = w.inside(class)
	}
	var outside []place
	if port.NodePort != 0 {
		outside = append(outside, place{frontend: chain.NodePort, port: port.NodePort})
	}
	for _, ip := range spec.ExternalIPs {
		outside = append(outside, place{frontend: chain.ExternalIP, addr: netip.MustParseAddr(ip), port: port.Port})
	}
	for _, in := range w.spec.Status.LoadBalancer.Ingress {
		if !w.ipMode || in.IPMode != "Proxy" {
			outside = append(outside, place{frontend: chain.LoadBalancer, addr: netip.MustParseAddr(in.IP), port: port.Port})
		}
	}
	if len(outside) > 0 && len(w.cluster) == 0 {
		t.Fatalf("%s: no recorded Service has frontends to the outside and no endpoints; say here what they do", w.name)
	}
	for _, at := range outside {
		at.service = w.name
		for _, class := range chain.Classes {
			at.class = class
			w.fates[at] = w.outside(at)
			if at.frontend != chain.LoadBalancer || len(spec.LoadBalancerSourceRanges) == 0 {
				continue
			}
			// Only the ranges get in, and only other machines are in them: neither
			// the node nor its pods have such addresses.
			w.fates[at] = w.dropped(at)
			if class == chain.External {
				for _, r := range spec.LoadBalancerSourceRanges {
					in := at
					in.source = netip.MustParsePrefix(r)
					if in.source.Overlaps(clusterCIDR) || in.source.Contains(w.own[0]) {
						t.Fatalf("%s: range %s holds pods or the node; say here what becomes of them", w.name, r)
					}
					w.fates[in] = w.outside(in)
				}
			}
		}
	}
}

// inside is the fate of connections to the ClusterIP: those from anywhere but
// pods are masqueraded, so that the answers come back through the node.
func (w *working) inside(class chain.Class) fate {
	endpoints := w.cluster
	if w.internalLocal() {
		endpoints = w.local
	}
	switch {
	case len(endpoints) > 0:
		return w.dnat(class, endpoints, class != chain.Pod)
	case len(w.cluster) > 0:
		return fate{verdict: chain.RouteDrop}
	}
	return fate{verdict: chain.RouteReject}
}

// outside is the fate of connections to a frontend for other machines.
func (w *working) outside(at place) fate {
	switch {
	case !w.externalLocal():
		keepsSource := w.podsKeepSource && at.frontend == chain.ExternalIP && at.class == chain.Pod
		return w.dnat(at.class, w.cluster, !keepsSource)
	case at.class != chain.External:
		// The policy is for other machines: pods and the node get all endpoints,
		// as with the ClusterIP.
		return w.dnat(at.class, w.cluster, at.class == chain.Host)
	case len(w.local) > 0:
		return w.dnat(at.class, w.local, false)
	}
	return w.dropped(at)
}

// dropped is the fate of what kube-proxy wants to be dropped.
func (w *working) dropped(at place) fate {
	if w.marksDrops {
		forwarded := at.class != chain.Host && at.frontend != chain.NodePort
		if !w.kubelet || forwarded {
			return fate{verdict: chain.RouteNone}
		}
	}
	return fate{verdict: chain.RouteDrop}
}

// dnat is the fate of connections that are shared out among endpoints.
func (w *working) dnat(class chain.Class, endpoints []endpoint, marked bool) fate {
	f := fate{verdict: chain.RouteDNAT}
	shares := balanced(len(endpoints))
	for i, e := range endpoints {
		// Only POSTROUTING masquerades, and what comes from elsewhere for the node
		// itself does not get there.
		passesPostrouting := class == chain.Host || !slices.Contains(w.own, e.addr.Addr())
		f.endpoints = append(f.endpoints, target{
			addr: e.addr, masquerade: marked && passesPostrouting, chain: w.chain(e.addr), share: shares[i],
		})
	}
	return f
}

// chain returns the name of an endpoint's chain.
func (w *working) chain(endpoint netip.AddrPort) string {
	sum := sha256.Sum256([]byte(w.name.String() + strings.ToLower(w.name.Protocol.String()) + endpoint.String()))
	return "KUBE-SEP-" + base32.StdEncoding.EncodeToString(sum[:])[:16]
}

// balanced returns the shares of n endpoints: each but the last takes one of
// as many as are left, written with ten digits and rounded to 2^-31.
func balanced(n int) []*big.Rat {
	var out []*big.Rat
	left := big.NewRat(1, 1)
	for ; n > 1; n-- {
		text := fmt.Sprintf("%.10f", 1/float64(n))
		p, err := strconv.ParseFloat(text, 64)
		if err != nil {
			panic(err)
		}
		q := big.NewRat(int64(math.Round(p*(1<<31))), 1<<31)
		share := new(big.Rat).Mul(left, q)
		out = append(out, share)
		left = new(big.Rat).Sub(left, share)
	}
	return append(out, left)
}
