package kubeproxy

import (
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestKernelPrintsItBack loads the rules into a kernel and wants iptables-save
// to print the same lines in the same order: that is what it means for Write
// to write the normal form. Each case has a network namespace of its own.
func TestKernelPrintsItBack(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("loading rules needs root")
	}
	if _, err := exec.LookPath("unshare"); err != nil {
		t.Skip("making a network namespace needs unshare(1)")
	}
	if out, err := exec.Command("unshare", "-n", "true").CombinedOutput(); err != nil {
		t.Skipf("no network namespace to be had: %v: %s", err, out)
	}
	for _, backend := range []string{"nft", "legacy"} {
		for _, family := range []Family{IPv4, IPv6} {
			tool := "iptables-" + backend
			if family == IPv6 {
				tool = "ip6tables-" + backend
			}
			t.Run(tool, func(t *testing.T) {
				for name, cfg := range kernelConfigs(family) {
					t.Run(name, func(t *testing.T) { roundTrip(t, tool, cfg, everyForm(family)) })
				}
				if family == IPv4 {
					cfg := Config{PodCIDR: SyntheticPodCIDR, NodeIP: SyntheticNodeIP}
					t.Run("synthetic", func(t *testing.T) { roundTrip(t, tool, cfg, Synthetic(100, 20)) })
				}
			})
		}
	}
}

func kernelConfigs(family Family) map[string]Config {
	pods, node, node2 := "10.128.0.0/9", "192.0.2.10", "192.0.2.11"
	if family == IPv6 {
		pods, node, node2 = "fd00:10:128::/48", "2001:db8:2::10", "2001:db8:2::11"
	}
	usual := Config{Family: family, PodCIDR: netip.MustParsePrefix(pods), NodeIP: netip.MustParseAddr(node)}
	unusual := Config{
		Family: family, MasqueradeAll: true, MasqueradeMark: 1 << 31, NoLocalhostNodePorts: true,
		ConntrackBeLiberal: true, NoRandomFully: true, NoKubelet: true, Counters: true,
	}
	large := usual
	large.LargeClusterThreshold = 1
	listed := usual
	listed.NodePortAddresses = []netip.Addr{netip.MustParseAddr(node), netip.MustParseAddr(node2)}
	counted := usual
	counted.NFAcct = true
	unsorted := usual
	unsorted.SyncOrder = true
	return map[string]Config{
		"zero": {Family: family}, "usual": usual, "unusual": unusual, "large": large, "listed": listed,
		"nfacct": counted, "unsorted": unsorted,
	}
}

func roundTrip(t *testing.T, tool string, cfg Config, services []Service) {
	t.Helper()
	for _, name := range []string{tool + "-restore", tool + "-save"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skipf("%s is not installed", name)
		}
	}
	script := tool + "-restore && " + tool + "-save"
	if cfg.NFAcct {
		if _, err := exec.LookPath("nfacct"); err != nil {
			t.Skip("nfacct is not installed")
		}
		script = "nfacct add ct_state_invalid_dropped_pkts && nfacct add localhost_nps_accepted_pkts && " + script
	}
	written := write(t, cfg, services...)
	cmd := exec.Command("unshare", "-n", "sh", "-c", script)
	cmd.Stdin = strings.NewReader(written)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	saved, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, stderr.String())
	}
	if cfg.SyncOrder {
		// Only what is loaded is unsorted; what is saved never is.
		cfg.SyncOrder = false
		written = write(t, cfg, services...)
	}
	if diff := cmp.Diff(parse(t, written), parse(t, string(saved))); diff != "" {
		t.Errorf("rules differ (-written +saved):\n%s", diff)
	}
}

// everyForm has a Service for each form of rule there is.
func everyForm(family Family) []Service {
	// addr takes the last part of an address.
	cluster, pods, node, lb, ext := "10.96.0.", "10.128.0.", "192.0.2.", "198.18.0.", "198.19.0."
	ranges := []string{"203.0.113.77/24", "192.0.2.0/28"}
	if family == IPv6 {
		cluster, pods, node, lb, ext = "fd00:10:96::", "fd00:10:128::", "2001:db8:2::", "2001:db8:18::", "2001:db8:19::"
		ranges = []string{"2001:db8:113::77/64", "2001:db8:2::/112"}
	}
	ip := func(s string) netip.Addr { return netip.MustParseAddr(s) }
	ep := func(last string, local, localOnly bool) Endpoint {
		return Endpoint{Addr: netip.AddrPortFrom(ip(pods+last), 8080), Local: local, LocalOnly: localOnly}
	}
	far := []Endpoint{ep("9", false, false), ep("10", false, false), ep("11", false, false)}
	mixed := append([]Endpoint{ep("1", true, false), ep("2", false, true)}, far...)

	services := []Service{
		{Name: "plain", Endpoints: far},
		{Name: "one", Endpoints: far[:1]},
		{Name: "named", Port: "http", Endpoints: far},
		{Name: "udp", Protocol: "UDP", Endpoints: far},
		{Name: "sctp", Protocol: "SCTP", Endpoints: far},
		{Name: "sticky", AffinitySeconds: 300, Endpoints: far},
		{Name: "host", Endpoints: []Endpoint{{Addr: netip.AddrPortFrom(ip(node+"10"), 443), Local: true}}},
		{Name: "none"},
		{Name: "none-external", NodePort: 30000, ExternalIPs: []netip.Addr{ip(ext + "1")}, LoadBalancerIPs: []netip.Addr{ip(lb + "1")}},
		{Name: "np", NodePort: 30001, Endpoints: far},
		{Name: "np-udp", NodePort: 30001, Protocol: "UDP", Endpoints: far},
		{Name: "np-local", NodePort: 30002, ExternalLocal: true, Endpoints: mixed},
		{Name: "np-local-none", NodePort: 30003, ExternalLocal: true, Endpoints: far},
		{Name: "ext", ExternalIPs: []netip.Addr{ip(ext + "2"), ip(ext + "3")}, Endpoints: far},
		{Name: "lb", NodePort: 30004, LoadBalancerIPs: []netip.Addr{ip(lb + "2"), ip(lb + "3")}, Endpoints: far},
		{
			Name: "lb-local", NodePort: 30005, LoadBalancerIPs: []netip.Addr{ip(lb + "4")}, ExternalLocal: true,
			HealthCheckNodePort: 30006, AffinitySeconds: 10800, Endpoints: mixed,
		},
		{
			Name: "lb-ranges", LoadBalancerIPs: []netip.Addr{ip(lb + "5"), ip(lb + "6")}, Endpoints: far,
			SourceRanges: []netip.Prefix{netip.MustParsePrefix(ranges[0]), netip.MustParsePrefix(ranges[1])},
		},
		{Name: "itp-local", InternalLocal: true, Endpoints: mixed},
		{Name: "itp-local-none", InternalLocal: true, Endpoints: far},
		{Name: "both-local", NodePort: 30007, InternalLocal: true, ExternalLocal: true, Endpoints: mixed},
		{Name: "itp-local-np", NodePort: 30008, InternalLocal: true, Endpoints: mixed},
	}
	for i := range services {
		s := &services[i]
		s.Namespace, s.PortNumber = "forms", 80
		s.ClusterIP = ip(cluster + "1")
		for range i {
			s.ClusterIP = s.ClusterIP.Next()
		}
	}
	return services
}
