//go:build linux

package nftables

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/natlens/natlens/internal/nodebox"
	"github.com/natlens/natlens/internal/nodebox/boxtest"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
)

// unable skips a test that cannot run here. In CI it must run.
func unable(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("in CI this must run: "+format, args...)
	}
	t.Skipf(format, args...)
}

func newNode(t testing.TB) *nodebox.Box {
	t.Helper()
	if os.Geteuid() != 0 {
		unable(t, "needs root: it makes network namespaces")
	}
	if _, err := exec.LookPath("nft"); err != nil {
		unable(t, "%v", err)
	}
	b, err := nodebox.New(nodebox.Config{
		NodeAddrs:    []netip.Prefix{netip.MustParsePrefix("10.146.0.2/24"), netip.MustParsePrefix("fd00:146::2/64")},
		OutsideAddrs: []netip.Prefix{netip.MustParsePrefix("10.146.0.100/24"), netip.MustParsePrefix("fd00:146::100/64")},
	})
	if errors.Is(err, syscall.EPERM) {
		unable(t, "%v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// nft runs nft in the node and returns what it prints.
func nft(b *nodebox.Box, input string, args ...string) (string, error) {
	var out, errs bytes.Buffer
	cmd := exec.Command("nft", args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &errs
	if err := b.Node.Run(cmd); err != nil {
		return "", fmt.Errorf("%v: %w: %.2000s", cmd.Args, err, &errs)
	}
	return out.String(), nil
}

// load replaces the node's rules.
func load(t testing.TB, b *nodebox.Box, rules string) {
	t.Helper()
	if _, err := nft(b, "flush ruleset\n"+rules, "-f", "-"); err != nil {
		t.Fatal(err)
	}
}

func readLive(t testing.TB, b *nodebox.Box) *netfilter.Ruleset {
	t.Helper()
	var rs *netfilter.Ruleset
	err := b.Node.Do(func() (err error) {
		rs, err = new(Live).Read(context.Background())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

// refreshLive reads what can have changed.
func refreshLive(t testing.TB, b *nodebox.Box, l *Live) *netfilter.Ruleset {
	t.Helper()
	var rs *netfilter.Ruleset
	err := b.Node.Do(func() (err error) {
		rs, err = l.Refresh(context.Background())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

func readListing(t testing.TB, b *nodebox.Box) *netfilter.Ruleset {
	t.Helper()
	text, err := nft(b, "", "-j", "list", "ruleset")
	if err != nil {
		t.Fatal(err)
	}
	rs, err := Parse(strings.NewReader(text), "listing")
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

// plain is a ruleset as text, with the kinds of its expressions, since equal
// texts may be understood differently, and all choices. Elements of named sets
// have no order.
func plain(rs *netfilter.Ruleset) map[string][]string {
	out := map[string][]string{}
	for _, t := range rs.Tables {
		name := fmt.Sprintf("%v %s %s", t.Family, t.Name, t.Backend)
		out[name] = []string{fmt.Sprint(t.ChainCount(), len(t.Sets()))}
		for i, s := range t.Sets() {
			head := fmt.Sprintf("map %v dynamic %v opaque %v timeout %v", s.Map, s.Dynamic, s.Opaque, s.Timeout)
			var lines []string
			if s.Dynamic || s.Opaque {
				// Live does not ask for the clients of a moment.
				out[fmt.Sprintf("%s set %d %q", name, i, s.Name)] = []string{head}
				continue
			}
			for _, k := range s.Keys {
				e, ok := s.Lookup(k)
				target := ""
				if e.Verdict.Kind == netfilter.Jump || e.Verdict.Kind == netfilter.Goto {
					target = t.ChainName(netfilter.ChainID(e.Verdict.A))
					e.Verdict.A = 0
				}
				lines = append(lines, fmt.Sprint(k, e, target, ok))
			}
			for _, r := range s.Ranges {
				lines = append(lines, fmt.Sprint(r))
			}
			if s.Name != "" {
				slices.Sort(lines)
			}
			out[fmt.Sprintf("%s set %d %q", name, i, s.Name)] = append([]string{head}, lines...)
		}
		for i, c := range slices.Collect(t.Chains()) {
			lines := []string{"chain"}
			if c.Base != nil {
				lines[0] = fmt.Sprintf("%+v", *c.Base)
			}
			for i := range c.Len() {
				n, counted := c.Counter(i)
				kinds := []string{}
				for _, e := range c.Rule(i) {
					kinds = append(kinds, fmt.Sprint(e.Kind, e.Flags, e.N))
					if e.Kind == netfilter.Choose {
						for _, choice := range c.Choices(e) {
							p := printer{table: t, chain: c}
							kinds = append(kinds, fmt.Sprint(choice.Count, p.verdict(choice.Verdict)))
						}
					}
				}
				lines = append(lines, fmt.Sprint(RuleText(t, c, i), " | ", kinds, n, counted))
			}
			out[fmt.Sprintf("%s chain %d %s", name, i, c.Name)] = lines
		}
	}
	return out
}

func undecodedRules(rs *netfilter.Ruleset) (out []string) {
	for _, t := range rs.Tables {
		for c := range t.Chains() {
			for i := range c.Len() {
				for _, e := range c.Rule(i) {
					switch e.Kind {
					case netfilter.Unknown, netfilter.UnknownTarget, netfilter.DNATRange:
						out = append(out, RuleText(t, c, i))
					}
				}
			}
		}
	}
	return out
}

var chainNumber = regexp.MustCompile(`"ID": \d+,`)

// services is what a view says of all Services.
func services(t testing.TB, rs *netfilter.Ruleset, node chain.Node) string {
	t.Helper()
	return told(t, chain.NewView(rs, node).Services())
}

// told is what was worked out of all Services.
func told(t testing.TB, found *chain.Programmed) string {
	t.Helper()
	b, err := json.MarshalIndent(found, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	var shares []string
	for _, s := range found.Services {
		for _, f := range s.Frontends {
			for _, r := range f.Routes {
				for _, e := range r.Endpoints {
					shares = append(shares, fmt.Sprint(e.Address, " ", e.Share.Exact(), " ", e.Max.Exact()))
				}
			}
		}
	}
	// The number of a chain's name follows the order of reading.
	text := strings.ReplaceAll(string(b), `"Endpoints": null`, `"Endpoints": []`)
	return chainNumber.ReplaceAllString(text, "") + strings.Join(shares, "\n")
}

// compare wants the rules of the node to be the same in both ways to read them.
func compare(t testing.TB, b *nodebox.Box) (rules int) {
	t.Helper()
	live, want := readLive(t, b), readListing(t, b)
	if live.Torn {
		t.Error("a quiet read is torn")
	}
	if diff := gocmp.Diff(plain(want), plain(live)); diff != "" {
		t.Errorf("-nft +live\n%s", diff)
	}
	node := chain.Node{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, Local: []netip.Addr{netip.MustParseAddr("10.146.0.2")}}
	if diff := gocmp.Diff(services(t, want, node), services(t, live, node)); diff != "" {
		t.Errorf("the Services differ: -nft +live\n%s", diff)
	}
	if list := undecodedRules(live); len(list) > 0 && list[0] != "" {
		t.Logf("not decoded: %q", list)
	}
	return live.RuleCount()
}

// TestLiveFlows loads the rules of kube-proxy's own packet flow tests, and asks
// what their authors expect.
func TestLiveFlows(t *testing.T) {
	data, err := os.ReadFile("../../testdata/flows/flow-nftables-v1.35.4.json")
	if err != nil {
		t.Fatal(err)
	}
	var tests []struct {
		Test, NFT string
		NodeIPs   []string
		Cases     []struct {
			Name, SourceIP, Protocol, DestIP string
			DestPort                         uint16
			Output                           string
			Masq                             bool
		}
	}
	if err := json.Unmarshal(data, &tests); err != nil {
		t.Fatal(err)
	}
	b := newNode(t)
	cases, rules := 0, 0
	for i, ft := range tests {
		load(t, b, ft.NFT)
		rules += compare(t, b)
		if t.Failed() {
			t.Fatalf("%d %s", i, ft.Test)
		}
		rs := readLive(t, b)
		if list := undecodedRules(rs); list != nil {
			t.Errorf("%d %s: not decoded: %q", i, ft.Test, list)
		}
		node := chain.Node{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
		for _, ip := range ft.NodeIPs {
			node.Local = append(node.Local, netip.MustParseAddr(ip))
		}
		v := chain.NewView(rs, node)
		for _, c := range ft.Cases {
			cases++
			if c.Protocol == "" {
				c.Protocol = "TCP"
			}
			protocol, err := netfilter.ParseProtocol(c.Protocol)
			if err != nil {
				t.Fatal(err)
			}
			to := netip.AddrPortFrom(netip.MustParseAddr(c.DestIP), c.DestPort)
			packet, class := v.PacketFrom(netip.MustParseAddr(c.SourceIP), to, protocol)
			trace, ok := v.Trace(packet, class)
			if !ok {
				t.Fatal("no table of the packet's family")
			}
			if got, masq := answer(trace); got != c.Output || masq != c.Masq {
				t.Errorf("%d %s/%s: got %q masquerade %v, kube-proxy's authors expect %q masquerade %v", i, ft.Test, c.Name, got, masq, c.Output, c.Masq)
			}
		}
	}
	t.Logf("%d rulesets, %d rules, %d cases", len(tests), rules, cases)
	if len(tests) != 43 || cases != 218 {
		t.Errorf("%d rulesets with %d cases, want 43 with 218", len(tests), cases)
	}
}

// answer puts a trace in the form of the recorded answers.
func answer(trace *chain.Trace) (output string, masquerade bool) {
	var targets []string
	for _, o := range trace.Outcomes {
		switch o.Verdict {
		case chain.DNAT:
			targets = append(targets, o.To.String())
			masquerade = masquerade || o.Masquerade
		case chain.None:
		default:
			targets = append(targets, strings.ToUpper(string(o.Verdict)))
		}
	}
	slices.Sort(targets)
	return strings.Join(targets, ", "), masquerade
}

// TestLiveRecordings feeds what nft once listed on a node back to it.
func TestLiveRecordings(t *testing.T) {
	b := newNode(t)
	files, _ := filepath.Glob("../../testdata/captures/*.nft.json")
	if len(files) != 2 {
		t.Fatalf("%d recordings", len(files))
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			load(t, b, "")
			if _, err := nft(b, reloadable(t, text), "-j", "-f", "-"); err != nil {
				t.Skipf("this nft does not take its own listing: %v", err)
			}
			n := compare(t, b)
			live := readLive(t, b)
			if list := undecodedRules(live); list != nil {
				t.Errorf("not decoded: %q", list)
			}
			recorded, err := Parse(bytes.NewReader(text), file)
			if err != nil {
				t.Fatal(err)
			}
			keep := &netfilter.Ruleset{}
			for _, table := range recorded.Tables {
				if table.Name == kubeProxyTable {
					keep.Tables = append(keep.Tables, table)
				}
			}
			node := chain.Node{PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
			if services(t, live, node) != services(t, keep, node) {
				t.Error("the Services are not those of the recording")
			}
			t.Logf("%d rules", n)
		})
	}
}

// reloadable makes commands of a listing: tables, then chains and sets, then
// elements and rules. nft 1.0.6 cannot read what it prints of a set's flags.
func reloadable(t *testing.T, text []byte) string {
	var doc struct {
		Objects []map[string]map[string]any `json:"nftables"`
	}
	if err := json.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	var out []any
	add := func(kind string, o map[string]any) {
		out = append(out, map[string]any{"add": map[string]any{kind: o}})
	}
	var elements []map[string]any
	for _, kind := range []string{"table", "chain", "counter", "set", "map", "element", "rule"} {
		for _, o := range doc.Objects {
			body, ok := o[kind]
			if table := body["table"]; !ok || table != kubeProxyTable && body["name"] != kubeProxyTable {
				continue
			}
			delete(body, "handle")
			if elem, ok := body["elem"]; ok && (kind == "set" || kind == "map") {
				delete(body, "elem")
				elements = append(elements, map[string]any{"family": body["family"], "table": body["table"], "name": body["name"], "elem": elem})
			}
			add(kind, body)
		}
		if kind == "element" {
			for _, e := range elements {
				add(kind, e)
			}
		}
	}
	b, err := json.Marshal(map[string]any{"nftables": out})
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// oldLayout has forms of v1.29 to v1.35 that the recordings lack, and every
// other statement that Parse and Live understand alike.
const oldLayout = `
add table ip kube-proxy
add counter ip kube-proxy localhost-nodeport-rejected-tcp
add set ip kube-proxy cluster-ips { type ipv4_addr ; comment "active ClusterIPs" ; }
add set ip kube-proxy nodeport-ips { type ipv4_addr ; }
add set ip kube-proxy ranges { type ipv4_addr ; flags interval ; }
add set ip kube-proxy marks { type mark ; }
add set ip kube-proxy affinity-A { type ipv4_addr ; flags dynamic,timeout ; timeout 10800s ; }
add set ip kube-proxy hairpin-connections { type ipv4_addr . ipv4_addr . inet_proto . inet_service ; }
add map ip kube-proxy firewall-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }
add map ip kube-proxy service-nodeports { type inet_proto . inet_service : verdict ; }
add map ip kube-proxy no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict ; }
add chain ip kube-proxy services
add chain ip kube-proxy masquerading
add chain ip kube-proxy mark-for-masquerade
add chain ip kube-proxy firewall-HVFWP5L3-ns5/svc5/tcp/p80
add chain ip kube-proxy service-ULMVA6XW-ns1/svc1/tcp/p80
add chain ip kube-proxy service-42NFTM6N-ns2/svc2/tcp/p80
add chain ip kube-proxy endpoint-A
add chain ip kube-proxy endpoint-B
add chain ip kube-proxy empty
add chain ip kube-proxy other
add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100 ; }
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority 100 ; }
add chain ip kube-proxy filter-input { type filter hook input priority -110 ; policy drop ; }
add element ip kube-proxy cluster-ips { 172.30.0.41, 172.30.0.42 }
add element ip kube-proxy nodeport-ips { 192.168.0.2 }
add element ip kube-proxy ranges { 10.0.0.0/8, 172.16.0.1, 192.168.1.0-192.168.1.9, 255.0.0.0/8 }
add element ip kube-proxy hairpin-connections { 10.180.0.1 . 10.180.0.1 . tcp . 80, 10.180.0.2 . 10.180.0.2 . udp . 53 }
add element ip kube-proxy firewall-ips { 5.6.7.8 . tcp . 80 comment "ns5/svc5:p80" : goto firewall-HVFWP5L3-ns5/svc5/tcp/p80 }
add element ip kube-proxy service-ips { 172.30.0.41 . tcp . 80 : goto service-ULMVA6XW-ns1/svc1/tcp/p80, 172.30.0.42 . sctp . 80 : goto service-42NFTM6N-ns2/svc2/tcp/p80 }
add element ip kube-proxy service-nodeports { tcp . 3001 : goto service-42NFTM6N-ns2/svc2/tcp/p80 }
add element ip kube-proxy no-endpoint-services { 172.30.0.46 . tcp . 80 comment "ns6/svc6:p80" : drop, 172.30.0.47 . 132 . 80 : goto other }
add set ip kube-proxy firewall-allow { type ipv4_addr . inet_proto . inet_service . ipv4_addr ; flags interval ; }
add element ip kube-proxy firewall-allow { 5.6.7.8 . tcp . 80 . 203.0.113.0/25 }
add set ip kube-proxy firewall-allow-1 { type ipv4_addr . inet_proto . inet_service . ipv4_addr ; flags interval ; }
add element ip kube-proxy firewall-allow-1 { 5.6.7.8 . tcp . 80 . 203.0.113.5 }
add rule ip kube-proxy nat-output jump services
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy nat-postrouting jump masquerading
add rule ip kube-proxy filter-input ct state new jump other
add rule ip kube-proxy services ip daddr @cluster-ips ip saddr != 10.0.0.0/8 meta mark set mark or 0x4000 comment "masquerade clusterIP traffic from outside cluster"
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
add rule ip kube-proxy services fib daddr type local ip daddr != 127.0.0.0/8 meta l4proto . th dport vmap @service-nodeports
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @firewall-ips
add rule ip kube-proxy services fib daddr type != local meta l4proto . th dport vmap { tcp . 1 : drop, udp . 2 : goto other }
add rule ip kube-proxy services meta l4proto vmap { tcp : goto other, udp : drop }
add rule ip kube-proxy masquerading mark and 0x4000 != 0 mark set mark xor 0x4000 masquerade fully-random
add rule ip kube-proxy masquerading mark and 0x4000 == 0 return
add rule ip kube-proxy masquerading mark set mark xor 0x4000
add rule ip kube-proxy masquerading mark set mark and 0xff
add rule ip kube-proxy masquerading mark set 0x7
add rule ip kube-proxy masquerading mark 0x7 masquerade
add rule ip kube-proxy masquerading mark != 0x7 masquerade random,persistent
add rule ip kube-proxy masquerading ct status dnat ip saddr . ip daddr . meta l4proto . th dport @hairpin-connections masquerade fully-random
add rule ip kube-proxy masquerading meta l4proto tcp snat to 1.2.3.4:80 random
add rule ip kube-proxy mark-for-masquerade mark set mark or 0x4000
add rule ip kube-proxy firewall-HVFWP5L3-ns5/svc5/tcp/p80 ip saddr != { 203.0.113.0/25, 5.6.7.8, 10.0.0.0-10.0.0.4 } drop
add rule ip kube-proxy firewall-HVFWP5L3-ns5/svc5/tcp/p80 ip saddr { 9.9.9.9, 5.6.7.8 } ip daddr @ranges drop
add rule ip kube-proxy service-ULMVA6XW-ns1/svc1/tcp/p80 ip daddr 172.30.0.41 tcp dport 80 ip saddr != 10.0.0.0/12 jump mark-for-masquerade
add rule ip kube-proxy service-ULMVA6XW-ns1/svc1/tcp/p80 ip saddr @affinity-A goto endpoint-A
add rule ip kube-proxy service-ULMVA6XW-ns1/svc1/tcp/p80 numgen random mod 3 vmap { 0 : goto endpoint-A, 1 : goto endpoint-B, 2 : goto endpoint-A }
add rule ip kube-proxy service-42NFTM6N-ns2/svc2/tcp/p80 meta l4proto tcp dnat ip addr . port to numgen random mod 12 map { 0 : 10.180.0.4 . 80, 1 : 10.180.0.5 . 81, 2 : 10.180.0.6 . 80, 3 : 10.180.0.4 . 80, 4 : 10.180.0.4 . 80, 5 : 10.180.0.7 . 80, 6 : 10.180.0.8 . 80, 7 : 10.180.0.9 . 80, 8 : 10.180.0.10 . 80, 9 : 10.180.0.11 . 80, 10 : 10.180.0.12 . 80, 11 : 10.180.0.13 . 80 }
add rule ip kube-proxy service-42NFTM6N-ns2/svc2/tcp/p80 meta l4proto tcp dnat to numgen random mod 2 map { 0 : 10.180.0.4, 1 : 10.180.0.5 }
add rule ip kube-proxy service-42NFTM6N-ns2/svc2/tcp/p80 numgen inc mod 2 offset 3 vmap { 3 : goto endpoint-A, 4 : jump other }
add rule ip kube-proxy service-42NFTM6N-ns2/svc2/tcp/p80 meta l4proto udp dnat to 10.180.0.1:53 comment "one endpoint"
add rule ip kube-proxy service-42NFTM6N-ns2/svc2/tcp/p80 dnat to 10.180.0.1
add rule ip kube-proxy service-42NFTM6N-ns2/svc2/tcp/p80 meta l4proto tcp dnat to 10.0.0.1-10.0.0.9:80 random,persistent
add rule ip kube-proxy service-42NFTM6N-ns2/svc2/tcp/p80 meta l4proto tcp dnat to :80
add rule ip kube-proxy service-42NFTM6N-ns2/svc2/tcp/p80 meta l4proto tcp redirect to :8080
add rule ip kube-proxy service-42NFTM6N-ns2/svc2/tcp/p80 redirect
add rule ip kube-proxy endpoint-A ip saddr 10.180.0.4 jump mark-for-masquerade
add rule ip kube-proxy endpoint-A update @affinity-A { ip saddr }
add rule ip kube-proxy endpoint-A update @affinity-A { ip saddr timeout 5s }
add rule ip kube-proxy endpoint-A meta l4proto sctp dnat to 10.180.0.4:80
add rule ip kube-proxy other ct state invalid drop
add rule ip kube-proxy other ct state established,related,new accept
add rule ip kube-proxy other ct state != new accept
add rule ip kube-proxy other ip saddr 10.0.0.1 ip daddr 10.0.0.2 counter accept
add rule ip kube-proxy other ip saddr 10.1.0.0/16 ip daddr 10.1.2.0/24 counter packets 7 bytes 99 drop
add rule ip kube-proxy other tcp dport 1-1024 return
add rule ip kube-proxy other tcp dport != 1-1024 return
add rule ip kube-proxy other th dport 53 return
add rule ip kube-proxy other meta l4proto != tcp th dport != 53 return
add rule ip kube-proxy other meta l4proto { tcp, udp } th dport { 80, 53, 443 } accept
add rule ip kube-proxy other iifname "eth0" oifname != "lo" accept
add rule ip kube-proxy other iifname "veth*" oifname "a.b*" accept
add rule ip kube-proxy other fib saddr type local goto empty
add rule ip kube-proxy other meta l4proto tcp counter name localhost-nodeport-rejected-tcp reject with tcp reset
add rule ip kube-proxy other reject
add rule ip kube-proxy other reject with icmp type host-unreachable
add rule ip kube-proxy other log prefix "a <b> " group 2
add rule ip kube-proxy other log level debug
add rule ip kube-proxy other log
add rule ip kube-proxy other notrack comment "for nothing"
add table ip6 kube-proxy
add set ip6 kube-proxy hairpin-connections { type ipv6_addr . ipv6_addr . inet_proto . inet_service ; }
add set ip6 kube-proxy ranges { type ipv6_addr ; flags interval ; }
add element ip6 kube-proxy ranges { fd00::/64, fd01::1, ffff::/16 }
add element ip6 kube-proxy hairpin-connections { fd00::1 . fd00::1 . tcp . 80 }
add chain ip6 kube-proxy c { type nat hook prerouting priority -100 ; }
add rule ip6 kube-proxy c ip6 saddr fd00::1 ip6 daddr fd00::2 accept
add rule ip6 kube-proxy c ip6 saddr != fd00::/56 ip6 daddr fd00::/61 drop
add rule ip6 kube-proxy c ip6 daddr != ::1 drop
add rule ip6 kube-proxy c ip6 saddr { fd00::/64, fd02::1 } ip6 saddr @ranges drop
add rule ip6 kube-proxy c ip6 saddr . ip6 daddr . meta l4proto . th dport @hairpin-connections drop
add rule ip6 kube-proxy c ip6 daddr . meta l4proto . th dport vmap { fd00::9 . tcp . 80 : drop, fd00::8 . udp . 53 : accept }
add rule ip6 kube-proxy c meta l4proto tcp dnat ip6 to numgen random mod 3 map { 0 : fd00::4 . 80, 1 : fd00::5 . 81, 2 : fd00::4 . 80 }
add rule ip6 kube-proxy c meta l4proto tcp dnat to [fd00::4]:80
add rule ip6 kube-proxy c dnat to numgen random mod 2 map { 0 : fd00::4, 1 : fd00::5 }
add rule ip6 kube-proxy c reject with icmpv6 type admin-prohibited
add table inet kube-proxy
add chain inet kube-proxy c { type filter hook input priority 0 ; }
`

func TestLiveForms(t *testing.T) {
	b := newNode(t)
	load(t, b, oldLayout)
	t.Logf("%d rules", compare(t, b))
	for _, rule := range undecodedRules(readLive(t, b)) {
		if !strings.Contains(rule, `: meta l4proto tcp {"addr": {"range": ["10.0.0.1", "10.0.0.9"]}, "port": 80, `) && !strings.HasSuffix(rule, `: meta l4proto tcp {"port": 80}`) {
			t.Errorf("not decoded: %s", rule)
		}
	}
}

// TestLiveOthers has what kube-proxy does not write. Each must be Unknown, with
// its name, or mean the same as in nft's language.
func TestLiveOthers(t *testing.T) {
	b := newNode(t)
	for _, c := range []struct{ rule, want string }{
		{"meta skuid 7 drop", `{"undecoded": "meta key 10 == 0x07000000"} drop`},
		{"tcp dport < 80 drop", `meta l4proto tcp {"undecoded": "payload of 2 bytes at 2 of header 2 < 0x0050"} drop`},
		{"tcp dport >= 80 drop", `meta l4proto tcp {"undecoded": "payload of 2 bytes at 2 of header 2 at least 0x0050"} drop`},
		{"tcp sport 80 drop", `meta l4proto tcp {"undecoded": "payload of 2 bytes at 0 of header 2 == 0x0050"} drop`},
		{"ip saddr 10.0.0.1-10.0.0.7 drop", `{"undecoded": "payload of 4 bytes at 12 of header 1 from 0x0a0000010a000007"} drop`},
		{"ip saddr & 255.0.0.255 == 10.0.0.1 drop", `{"undecoded": "payload of 4 bytes at 12 of header 1 & 0xff0000ff ^ 0x00000000 == 0x0a000001"} drop`},
		{"ct status == dnat drop", `{"undecoded": "ct key 2 == 0x20000000"} drop`},
		{"ct state ! new drop", `ct state != new drop`},
		{"ct mark 7 drop", `{"undecoded": "ct key 3 == 0x07000000"} drop`},
		{"tcp dport { 80, 443 } drop", `meta l4proto tcp th dport { 80, 443 } drop`},
		{"tcp dport vmap { 80 : drop }", `meta l4proto tcp th dport vmap { 80 : drop }`},
		{"mark { 1, 2 } drop", `{"undecoded": "lookup in @__set0"} drop`},
		{"ip daddr . ip saddr { 1.1.1.1 . 2.2.2.2 } drop", `{"undecoded": "lookup in @__set0"} drop`},
		{"ip saddr vmap { 10.0.0.0/8 : drop }", `{"undecoded": "vmap: lookup in @__map0"}`},
		{"tcp dport { 1-7, 9 } drop", `meta l4proto tcp {"undecoded": "lookup in @__set0"} drop`},
		{"ip saddr . tcp dport @firewall-allow drop", `meta l4proto tcp ip saddr . th dport @firewall-allow drop`},
		{"limit rate 5/second drop", `{"undecoded": "limit"} drop`},
		{"dnat to ip saddr map @m", `{"undecoded": "nat: map: lookup in @m"}`},
		{"tcp dport 1 dnat to 10.0.0.1-10.0.0.9:80-90 random", `meta l4proto tcp th dport 1 {"addr": {"range": ["10.0.0.1", "10.0.0.9"]}, "port": {"range": [80, 90]}, "flags": "random"}`},
		{"meta l4proto tcp redirect to :80-90", `meta l4proto tcp {"undecoded": "redir to several ports"}`},
		{"ip saddr vmap @marked", `ip saddr vmap @marked`},
		{"ip daddr . meta l4proto . th dport . ip saddr @allow drop", `{"undecoded": "lookup in @allow"} drop`},
		{"ip saddr @static drop", `ip saddr @static drop`},
		{"jhash ip saddr mod 2 vmap { 0 : drop }", `{"undecoded": "payload of 4 bytes at 12 of header 1"} {"undecoded": "vmap: lookup in @__map0"}`},
		{"meta priority set 1:2 accept", `{"undecoded": "meta set key 2"} accept`},
		{"ip ttl set 7 accept", `{"undecoded": "payload of 2 bytes at 8 of header 1 & 0x00ff ^ 0x0700"} {"undecoded": "payload"} accept`},
		{"meta mark set ct mark accept", `{"undecoded": "meta mark set ct key 3"} accept`},
		{"accept comment \"x\"", `accept comment "x"`},
		{"continue", ``},
	} {
		rules := "add table ip kube-proxy\nadd set ip kube-proxy firewall-allow { type ipv4_addr . inet_service; flags interval; }\n" +
			"add set ip kube-proxy static { type ipv4_addr; flags timeout; }\nadd element ip kube-proxy static { 10.0.0.9 }\nadd set ip kube-proxy allow { type ipv4_addr . inet_proto . inet_service . ipv4_addr; flags interval; }\nadd map ip kube-proxy m { type ipv4_addr : ipv4_addr; }\nadd map ip kube-proxy marked { type ipv4_addr : verdict; flags interval; }\n" +
			"add element ip kube-proxy marked { 10.0.0.0/8 : drop }\nadd element ip kube-proxy firewall-allow { 10.0.0.0/8 . 1-7 }\n" +
			"add chain ip kube-proxy c { type nat hook prerouting priority 0; }\nadd rule ip kube-proxy c "
		load(t, b, rules+c.rule)
		rs := readLive(t, b)
		table := rs.Table(netfilter.IPv4, "kube-proxy")
		if got := RuleText(table, table.Lookup("c"), 0); got != strings.TrimSpace("c: "+c.want) {
			t.Errorf("%s:\n got %s\nwant c: %s", c.rule, got, c.want)
		}
		for _, s := range table.Sets() {
			switch s.Name {
			case "static":
				if s.Dynamic || s.Opaque || s.Len() != 1 {
					t.Errorf("set %+v", s)
				}
			case "m", "marked", "firewall-allow":
				if !s.Opaque {
					t.Errorf("set %s is not opaque", s.Name)
				}
			}
		}
	}
}

func TestLiveCreatesNothing(t *testing.T) {
	b := newNode(t)
	rs := readLive(t, b)
	if len(rs.Tables) != 0 || len(rs.Unreadable) != 0 || rs.Torn {
		t.Errorf("of an empty namespace: %+v", rs)
	}
	if out, err := nft(b, "", "list", "ruleset"); err != nil || out != "" {
		t.Errorf("after the read there is %q, %v", out, err)
	}
	load(t, b, "add table ip kube-proxy { flags dormant ; }")
	if rs := readLive(t, b); len(rs.Tables) != 0 || len(rs.Unreadable) != 1 {
		t.Errorf("of a dormant table: %+v", rs)
	}
}

func TestLiveCancelled(t *testing.T) {
	b := newNode(t)
	load(t, b, "add table ip kube-proxy")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := b.Node.Do(func() error {
		_, err := new(Live).Read(ctx)
		return err
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("the error is %v", err)
	}
}

// TestLiveCapability reads as a user with the capability NET_ADMIN alone, and as
// one without any.
func TestLiveCapability(t *testing.T) {
	if boxtest.IsAgain() {
		rs, err := new(Live).Read(context.Background())
		if err != nil {
			fmt.Printf("answer: %v (%v)\n", err, errors.Is(err, os.ErrPermission))
			return
		}
		fmt.Printf("answer: %d rules, torn %v\n", rs.RuleCount(), rs.Torn)
		return
	}
	b := newNode(t)
	load(t, b, "add table ip kube-proxy\nadd chain ip kube-proxy c\nadd rule ip kube-proxy c accept")
	for _, c := range []struct {
		caps []uintptr
		want string
	}{
		{[]uintptr{unix.CAP_NET_ADMIN}, "1 rules, torn false"},
		{nil, "reading the kernel's nf_tables: permission denied: it needs the capability NET_ADMIN: operation not permitted (true)"},
	} {
		if got := boxtest.Again(t, b.Node, c.caps...); got != c.want {
			t.Errorf("with capabilities %v, it said %q, want %q", c.caps, got, c.want)
		}
	}
}

// layout37 has services of so many endpoints in the layout of v1.37.
func layout37(services, endpoints int, tag string) string {
	var s, elements, ips strings.Builder
	s.WriteString("add table ip kube-proxy\nadd set ip kube-proxy cluster-ips { type ipv4_addr ; }\n" +
		"add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }\n" +
		"add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }\nadd chain ip kube-proxy services\n" +
		"add rule ip kube-proxy nat-output jump services\n" +
		"add rule ip kube-proxy services ip daddr @cluster-ips ip saddr != 10.0.0.0/8 mark set mark or 0x4000\n" +
		"add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips\n")
	for i := range services {
		name := fmt.Sprintf("service-%08X-%s/svc%d/tcp/p80", i, tag, i)
		ip := fmt.Sprintf("172.30.%d.%d", i/250, i%250+1)
		fmt.Fprintf(&s, "add chain ip kube-proxy %s\nadd rule ip kube-proxy %s meta l4proto tcp dnat ip addr . port to numgen random mod %d map {", name, name, endpoints)
		for j := range endpoints {
			n := i*endpoints + j
			fmt.Fprintf(&s, "%s %d : 10.%d.%d.%d . 8080", map[bool]string{true: ","}[j > 0], j, n>>16, n>>8&255, n&255)
		}
		s.WriteString(" }\n")
		fmt.Fprintf(&elements, "%s . tcp . 80 comment \"%s/svc%d:p80\" : goto %s,\n", ip, tag, i, name)
		fmt.Fprintf(&ips, "%s,\n", ip)
	}
	fmt.Fprintf(&s, "add element ip kube-proxy service-ips { %s }\nadd element ip kube-proxy cluster-ips { %s }\n", &elements, &ips)
	return s.String()
}

// TestLiveWhileRulesChange wants every result to be one of two rulesets that
// take turns, or to say that it is torn.
func TestLiveWhileRulesChange(t *testing.T) {
	b := newNode(t)
	layouts := []string{layout37(40, 3, "a"), layout37(60, 2, "b")}
	text := func(rs *netfilter.Ruleset) string { return fmt.Sprint(normalRules(rs)) }
	var want []string
	for _, rules := range layouts {
		load(t, b, rules)
		compare(t, b)
		want = append(want, text(readLive(t, b)))
	}
	stop, done := make(chan struct{}), make(chan error, 1)
	go func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			if _, err := nft(b, "flush ruleset\n"+layouts[i%2], "-f", "-"); err != nil {
				done <- err
				return
			}
		}
	}()
	seen := map[string]int{}
	for i := 0; i < 100 || i < 5000 && (seen["a"] == 0 || seen["b"] == 0); i++ {
		rs := readLive(t, b)
		switch got := text(rs); {
		case rs.Torn:
			seen["torn"]++
		case got == want[0]:
			seen["a"]++
		case got == want[1]:
			seen["b"]++
		default:
			t.Fatalf("read %d: %d rules that are of neither set: %.3000s", i, rs.RuleCount(), text(rs))
		}
	}
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Log(seen)
	if seen["a"] == 0 || seen["b"] == 0 {
		t.Errorf("the two sets were not both seen: %v", seen)
	}
}

// TestLiveTorn has transactions follow each other faster than a read can be: the
// result must say so.
func TestLiveTorn(t *testing.T) {
	b := newNode(t)
	load(t, b, layout37(200, 3, "a")+"add table ip other\n")
	want := fmt.Sprint(plain(readLive(t, b)))
	cmd := exec.Command("nft", "-i")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Node.Start(cmd); err != nil {
		t.Fatal(err)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				if _, err := io.WriteString(in, "add chain ip other c\ndelete chain ip other c\n"); err != nil {
					return
				}
			}
		}
	}()
	torn := 0
	for i := 0; i < 20 || i < 500 && torn == 0; i++ {
		rs := readLive(t, b)
		if rs.Torn {
			torn++
		}
		if !rs.Torn && fmt.Sprint(plain(rs)) != want {
			t.Fatal("the rules of a table that nobody changed differ")
		}
	}
	close(stop)
	in.Close()
	<-done
	_ = cmd.Wait()
	t.Logf("%d torn", torn)
	if torn == 0 {
		t.Error("no read was torn")
	}
	if readLive(t, b).Torn {
		t.Error("a quiet read is torn")
	}
}

// BenchmarkReadLive compares the ways to read a table of a thousand Services, or
// of NATLENS_BENCH_SERVICES.
func BenchmarkReadLive(b *testing.B) {
	services := 1000
	if n, err := strconv.Atoi(os.Getenv("NATLENS_BENCH_SERVICES")); err == nil {
		services = n
	}
	box := newNode(b)
	load(b, box, layout37(services, 10, "ns"))
	b.Run("netlink", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			readLive(b, box)
		}
	})
	b.Run("nft", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := nft(box, "", "list", "table", "ip", kubeProxyTable); err != nil {
				b.Fatal(err)
			}
		}
	})
	var l Live
	defer l.Close()
	refreshLive(b, box, &l)
	b.Run("refresh-unchanged", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			refreshLive(b, box, &l)
		}
	})
	b.Run("refresh-changed", func(b *testing.B) {
		b.ReportAllocs()
		n := 0
		for b.Loop() {
			b.StopTimer()
			n++
			if _, err := nft(box, fmt.Sprintf("flush chain ip kube-proxy service-00000007-ns/svc7/tcp/p80\nadd rule ip kube-proxy service-00000007-ns/svc7/tcp/p80 meta l4proto tcp dnat ip to 10.9.9.%d:80\n", n%250), "-f", "-"); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
			refreshLive(b, box, &l)
		}
	})
}
