package kubeproxy

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestHash(t *testing.T) {
	for _, tt := range []struct {
		namespace, name, port, protocol, endpoint string
		want                                      string
	}{
		{"default", "kubernetes", "https", "tcp", "", "NPX46M4PTMTKRN6Y"},
		{"kube-system", "kube-dns", "dns", "udp", "", "TCOU7JCQXEZGVUNU"},
		{"kube-system", "kube-dns", "dns-tcp", "tcp", "", "ERIFXISQEP7F7OF4"},
		{"ns1", "svc1", "p80", "tcp", "", "XPGD46QRK7WJZT7O"},
		{"ns1", "svc1", "", "tcp", "", "AQI2S6QIMU7PVVRP"},
		{"ns1", "svc1", "p80", "tcp", "10.180.0.1:80", "SXIVWICOYRO3J4NJ"},
		{"ns1", "svc1", "p80", "tcp", "[fd00:10::1]:80", "RT5VHSJR44ZNF7G5"},
	} {
		if got := hash(servicePortName(tt.namespace, tt.name, tt.port), tt.protocol, tt.endpoint); got != tt.want {
			t.Errorf("hash of %+v = %s, want %s", tt, got, tt.want)
		}
	}
}

func TestProbability(t *testing.T) {
	for left, want := range map[int]string{
		2: "0.50000000000", 3: "0.33333333349", 7: "0.14285714272", 1001: "0.00099900085",
	} {
		if got := probability(left); got != want {
			t.Errorf("probability(%d) = %s, want %s", left, got, want)
		}
	}
}

// TestProbabilityText holds the arithmetic against the two texts it stands
// for: the one kube-proxy writes and the one iptables makes of it.
func TestProbabilityText(t *testing.T) {
	for left := 2; left <= 20000; left++ {
		p, err := strconv.ParseFloat(fmt.Sprintf("%0.10f", 1/float64(left)), 64)
		if err != nil {
			t.Fatal(err)
		}
		steps := uint32(p*(1<<31) + 0.5)
		if got, want := probability(left), fmt.Sprintf("%.11f", float64(steps)/(1<<31)); got != want {
			t.Fatalf("probability(%d) = %s, want %s", left, got, want)
		}
	}
}

func service(edit func(*Service)) Service {
	s := Service{
		Namespace: "ns", Name: "svc", ClusterIP: netip.MustParseAddr("10.96.0.1"), PortNumber: 80,
		Endpoints: []Endpoint{
			{Addr: netip.MustParseAddrPort("10.128.0.9:80")},
			{Addr: netip.MustParseAddrPort("10.128.0.10:80")},
		},
	}
	if edit != nil {
		edit(&s)
	}
	return s
}

func TestEndpointOrderIsThatOfTheString(t *testing.T) {
	got := parse(t, write(t, Config{}, service(nil)))
	first := "KUBE-SEP-" + hash("ns/svc", "tcp", "10.128.0.10:80")
	second := "KUBE-SEP-" + hash("ns/svc", "tcp", "10.128.0.9:80")
	want := []string{
		`-m comment --comment "ns/svc -> 10.128.0.10:80" -m statistic --mode random --probability 0.50000000000 -j ` + first,
		`-m comment --comment "ns/svc -> 10.128.0.9:80" -j ` + second,
	}
	if diff := cmp.Diff(want, got.chain("nat", "KUBE-SVC-"+hash("ns/svc", "tcp", ""))); diff != "" {
		t.Errorf("KUBE-SVC differs (-want +got):\n%s", diff)
	}
}

func TestLargeClusterDropsEndpointComments(t *testing.T) {
	comments := func(threshold int) int {
		rules := parse(t, write(t, Config{LargeClusterThreshold: threshold}, service(nil)))["nat"]
		n := 0
		for _, r := range rules {
			if strings.Contains(r, "KUBE-SEP-") && strings.Contains(r, "comment") {
				n++
			}
		}
		return n
	}
	for threshold, want := range map[int]int{0: 6, 1: 0, 2: 6, -1: 6} {
		if got := comments(threshold); got != want {
			t.Errorf("threshold %d: %d rules of endpoints have comments, want %d", threshold, got, want)
		}
	}
}

func TestSyncOrderOnlyMovesDeclarations(t *testing.T) {
	services := Synthetic(20, 5)
	want := parse(t, write(t, Config{}, services...))
	got := parse(t, write(t, Config{SyncOrder: true}, services...))
	if slices.Equal(want["nat"], got["nat"]) {
		t.Error("declarations are sorted")
	}
	isRule := func(line string) bool { return strings.HasPrefix(line, "-A") }
	for _, ts := range []tables{want, got} {
		slices.Sort(ts["nat"][:slices.IndexFunc(ts["nat"], isRule)])
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("more than the order of declarations differs (-sorted +sync):\n%s", diff)
	}
}

func TestSourceRanges(t *testing.T) {
	ranges := func(prefixes ...string) func(*Service) {
		return func(s *Service) {
			s.LoadBalancerIPs = []netip.Addr{netip.MustParseAddr("198.18.0.1")}
			for _, p := range prefixes {
				s.SourceRanges = append(s.SourceRanges, netip.MustParsePrefix(p))
			}
		}
	}
	h := hash("ns/svc", "tcp", "")
	lb := `-m comment --comment "ns/svc loadbalancer IP" -j KUBE-EXT-` + h
	end := `-m comment --comment "other traffic to ns/svc will be dropped by KUBE-PROXY-FIREWALL"`
	for _, tt := range []struct {
		name     string
		prefixes []string
		want     []string
	}{
		{"none", nil, []string{}},
		{"masked", []string{"203.0.113.7/24"}, []string{"-s 203.0.113.0/24 " + lb, end}},
		{"with node", []string{"192.0.2.0/24"}, []string{"-s 192.0.2.0/24 " + lb, "-s 198.18.0.1/32 " + lb, end}},
		{"everybody", []string{"203.0.113.0/24", "0.0.0.0/0"}, []string{}},
		{"other family", []string{"2001:db8::/32"}, []string{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := Config{NodeIP: netip.MustParseAddr("192.0.2.10")}
			got := parse(t, write(t, cfg, service(ranges(tt.prefixes...))))
			if diff := cmp.Diff(tt.want, got.chain("nat", "KUBE-FW-"+h)); diff != "" {
				t.Errorf("KUBE-FW differs (-want +got):\n%s", diff)
			}
		})
	}
}

func TestNodePortJumps(t *testing.T) {
	const note = `-m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain"`
	addrs := []netip.Addr{netip.MustParseAddr("192.0.2.10"), netip.MustParseAddr("127.0.0.1")}
	for _, tt := range []struct {
		name string
		cfg  Config
		want []string
	}{
		{"all", Config{}, []string{note + " -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"}},
		{
			"not localhost", Config{NoLocalhostNodePorts: true},
			[]string{"! -d 127.0.0.0/8 " + note + " -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS"},
		},
		{
			"listed", Config{NodePortAddresses: addrs},
			[]string{"-d 192.0.2.10/32 " + note + " -j KUBE-NODEPORTS", "-d 127.0.0.1/32 " + note + " -j KUBE-NODEPORTS"},
		},
		{
			"listed, not localhost", Config{NodePortAddresses: addrs, NoLocalhostNodePorts: true},
			[]string{"-d 192.0.2.10/32 " + note + " -j KUBE-NODEPORTS"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, parse(t, write(t, tt.cfg)).chain("nat", "KUBE-SERVICES")); diff != "" {
				t.Errorf("KUBE-SERVICES differs (-want +got):\n%s", diff)
			}
		})
	}
}

func TestWriteRefuses(t *testing.T) {
	v6 := netip.MustParseAddr("fd00::1")
	for _, tt := range []struct {
		name     string
		cfg      Config
		services []Service
		want     string
	}{
		{"family", Config{Family: 7}, nil, "unknown family 7"},
		{"pod CIDR", Config{PodCIDR: netip.MustParsePrefix("fd00::/8")}, nil, "pod CIDR fd00::/8 is not IPv4"},
		{"node port address", Config{NodePortAddresses: []netip.Addr{v6}}, nil, "node port address fd00::1 is not IPv4"},
		{"twice", Config{}, []Service{service(nil), service(nil)}, "service port ns/svc: given twice"},
		{
			"cluster IP", Config{}, []Service{service(func(s *Service) { s.ClusterIP = v6 })},
			"service port ns/svc: cluster IP fd00::1 is not IPv4",
		},
		{
			"headless", Config{}, []Service{service(func(s *Service) { s.ClusterIP = netip.Addr{} })},
			"service port ns/svc: cluster IP invalid IP is not IPv4",
		},
		{
			"protocol", Config{}, []Service{service(func(s *Service) { s.Protocol = "ICMP" })},
			`service port ns/svc: unknown protocol "ICMP"`,
		},
		{
			"name", Config{}, []Service{service(func(s *Service) { s.Name = "a\"\nb" })},
			"service port ns/a\"\nb: namespace, name or port name is not a DNS label",
		},
		{
			"port", Config{}, []Service{service(func(s *Service) { s.PortNumber = 0 })},
			"service port ns/svc: port number is 0",
		},
		{
			"affinity", Config{}, []Service{service(func(s *Service) { s.AffinitySeconds = -1 })},
			"service port ns/svc: affinity of -1 seconds",
		},
		{
			"endpoint twice", Config{}, []Service{service(func(s *Service) { s.Endpoints[1] = s.Endpoints[0] })},
			"service port ns/svc: endpoint 10.128.0.9:80 given twice",
		},
		{
			"endpoint family", Config{},
			[]Service{service(func(s *Service) { s.Endpoints[0].Addr = netip.MustParseAddrPort("[::ffff:10.0.0.1]:80") })},
			"service port ns/svc: endpoint [::ffff:10.0.0.1]:80 is not IPv4",
		},
		{
			"endpoint port", Config{},
			[]Service{service(func(s *Service) { s.Endpoints[0].Addr = netip.MustParseAddrPort("10.128.0.9:0") })},
			"service port ns/svc: endpoint 10.128.0.9:0 has port 0",
		},
		{
			"only local", Config{},
			[]Service{service(func(s *Service) { s.Endpoints[0].LocalOnly, s.Endpoints[1].LocalOnly = true, true })},
			"service port ns/svc: all endpoints are LocalOnly: topology never empties the cluster's choice",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var b strings.Builder
			err := Write(&b, tt.cfg, tt.services)
			if err == nil || err.Error() != tt.want {
				t.Errorf("error %v, want %s", err, tt.want)
			}
			if b.Len() > 0 {
				t.Errorf("wrote %d bytes of wrong input", b.Len())
			}
		})
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

func TestWriteReturnsTheWritersError(t *testing.T) {
	want := errors.New("disk full")
	if err := Write(failing{want}, Config{}, Synthetic(1000, 2)); err != want {
		t.Errorf("error %v, want %v", err, want)
	}
}

// TestSyntheticMix counts what a hundred Services are.
func TestSyntheticMix(t *testing.T) {
	got := map[string]int{}
	for _, s := range Synthetic(300, 3) {
		switch {
		case len(s.Endpoints) == 0:
			got["none"]++
		case s.Protocol == "UDP":
			got["udp"]++
		case s.AffinitySeconds > 0:
			got["affinity"]++
		case len(s.ExternalIPs) > 0:
			got["external"]++
		case len(s.SourceRanges) > 0:
			got["ranges"]++
		case s.ExternalLocal:
			got["lb-local"]++
		case len(s.LoadBalancerIPs) > 0:
			got["lb"]++
		case s.NodePort > 0:
			got["nodeport"]++
		default:
			got["plain"]++
		}
	}
	want := map[string]int{
		"udp": 15, "nodeport": 21, "lb": 9, "lb-local": 6, "ranges": 3, "external": 3, "affinity": 6, "none": 3, "plain": 234,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("mix differs (-want +got):\n%s", diff)
	}
}

// TestSyntheticIsUnique goes beyond the point where node ports run out.
func TestSyntheticIsUnique(t *testing.T) {
	services := Synthetic(25000, 10)
	seen := map[any]bool{}
	add := func(what any) {
		if seen[what] {
			t.Fatalf("%v given twice", what)
		}
		seen[what] = true
	}
	nodePorts := 0
	for _, s := range services {
		add(s.ClusterIP)
		for _, a := range slices.Concat(s.ExternalIPs, s.LoadBalancerIPs) {
			add(a)
		}
		for _, p := range []uint16{s.NodePort, s.HealthCheckNodePort} {
			if p == 0 {
				continue
			}
			add(p)
			nodePorts++
			if p < firstNodePort || p > lastNodePort {
				t.Fatalf("node port %d", p)
			}
		}
		for _, e := range s.Endpoints {
			add(e.Addr.Addr())
			if !SyntheticPodCIDR.Contains(e.Addr.Addr()) {
				t.Fatalf("endpoint %s", e.Addr)
			}
		}
	}
	if want := lastNodePort - firstNodePort + 1; nodePorts != want {
		t.Errorf("%d node ports used, want all %d", nodePorts, want)
	}
}

// TestSyntheticSize keeps the number the benchmarks speak of: 10 endpoints make
// about 33 rules of a Service.
func TestSyntheticSize(t *testing.T) {
	rules := strings.Count(write(t, Config{PodCIDR: SyntheticPodCIDR}, Synthetic(1000, 10)...), "\n-A ")
	if rules < 32000 || rules > 34000 {
		t.Errorf("%d rules for 1,000 Services, want about 33,000", rules)
	}
}

func BenchmarkWrite(b *testing.B) {
	for _, services := range []int{100, 1000, 10000} {
		b.Run(fmt.Sprintf("services=%d", services), func(b *testing.B) {
			cfg := Config{PodCIDR: SyntheticPodCIDR, NodeIP: SyntheticNodeIP}
			list := Synthetic(services, 10)
			text := write(b, cfg, list...)
			b.SetBytes(int64(len(text)))
			b.ReportAllocs()
			for b.Loop() {
				if err := Write(io.Discard, cfg, list); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(strings.Count(text, "\n-A ")), "rules")
		})
	}
}

func BenchmarkSynthetic(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		Synthetic(10000, 10)
	}
}
