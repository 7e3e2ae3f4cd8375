package chain_test

import (
	"fmt"
	"math/big"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
)

// These are the ways in which a reader of kube-proxy's rules goes wrong: each
// test holds rules for which the obvious answer is another than the kernel's.
//
// Not here, since rules alone do not show them: which clients are pinned by
// session affinity, which endpoints the API server wants, live connections in
// conntrack, eBPF programs ahead of netfilter, network namespaces, and what is
// peculiar to kube-proxy's nftables mode. How dumps themselves go wrong is
// tested in package iptables.

// The cluster of these tests: Service a is shop/a:http, its n-th endpoint is
// 10.244.0.n:8080.
const (
	podRange = "10.244.0.0/16"
	nodeIP   = "192.0.2.10"
)

func servicePort(name string) chain.ServicePort {
	return chain.ServicePort{Namespace: "shop", Name: name, Port: "http", Protocol: netfilter.TCP}
}

func podPort(n string) netip.AddrPort { return netip.MustParseAddrPort("10.244.0." + n + ":8080") }

var (
	serviceWord  = regexp.MustCompile(`\b(SVC|SVL|EXT|FW|XLB)-([a-z]+)\b`)
	endpointWord = regexp.MustCompile(`\bSEP-([a-z]+)-(\d+)\b`)
)

// spell turns SVC-a and SEP-a-1 into the names that kube-proxy gives.
func spell(text string) string {
	text = serviceWord.ReplaceAllStringFunc(text, func(s string) string {
		m := serviceWord.FindStringSubmatch(s)
		return chain.ServiceChain("KUBE-"+m[1]+"-", servicePort(m[2]))
	})
	return endpointWord.ReplaceAllStringFunc(text, func(s string) string {
		m := endpointWord.FindStringSubmatch(s)
		return chain.EndpointChain(servicePort(m[1]), podPort(m[2]))
	})
}

// clusterIP are the rules that lead to a Service, up to its endpoints.
func clusterIP(name, ip string) string {
	return fmt.Sprintf(`*nat
-A KUBE-SERVICES -d %[2]s/32 -p tcp -m comment --comment "shop/%[1]s:http cluster IP" -m tcp --dport 80 -j SVC-%[1]s
-A SVC-%[1]s ! -s %[3]s -d %[2]s/32 -p tcp -m comment --comment "shop/%[1]s:http cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ
`, name, ip, podRange)
}

// endpoints are the KUBE-SEP chains of a Service.
func endpoints(name string, numbers ...int) string {
	b := "*nat\n"
	for _, n := range numbers {
		b += fmt.Sprintf(`-A SEP-%[1]s-%[2]d -s 10.244.0.%[2]d/32 -m comment --comment "shop/%[1]s:http" -j KUBE-MARK-MASQ
-A SEP-%[1]s-%[2]d -p tcp -m comment --comment "shop/%[1]s:http" -m tcp -j DNAT --to-destination 10.244.0.%[2]d:8080
`, name, n)
	}
	return b
}

// nodePort are the rules that lead from a NodePort to KUBE-EXT of a Service.
func nodePort(name string, port int) string {
	return fmt.Sprintf(`*nat
-A KUBE-NODEPORTS -p tcp -m comment --comment "shop/%[1]s:http" -m tcp --dport %[2]d -j EXT-%[1]s
`, name, port)
}

const nodePorts = `*nat
-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
`

// extCluster is KUBE-EXT with externalTrafficPolicy Cluster, extLocal with
// Local and no endpoint on this node.
func extCluster(name string) string {
	return fmt.Sprintf(`*nat
-A EXT-%[1]s -m comment --comment "masquerade traffic for shop/%[1]s:http external destinations" -j KUBE-MARK-MASQ
-A EXT-%[1]s -j SVC-%[1]s
`, name)
}

func extLocal(name string) string {
	return fmt.Sprintf(`*nat
-A EXT-%[1]s -s %[2]s -m comment --comment "pod traffic for shop/%[1]s:http external destinations" -j SVC-%[1]s
-A EXT-%[1]s -m comment --comment "masquerade LOCAL traffic for shop/%[1]s:http external destinations" -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ
-A EXT-%[1]s -m comment --comment "route LOCAL traffic for shop/%[1]s:http external destinations" -m addrtype --src-type LOCAL -j SVC-%[1]s
`, name, podRange)
}

// toEndpoint is the rule of SVC-name to an endpoint; p is its probability,
// empty for the last.
func toEndpoint(name string, n int, p string) string {
	if p != "" {
		p = "-m statistic --mode random --probability " + p + " "
	}
	return fmt.Sprintf("*nat\n-A SVC-%[1]s -m comment --comment \"shop/%[1]s:http -> 10.244.0.%[2]d:8080\" %[3]s-j SEP-%[1]s-%[2]d\n", name, n, p)
}

const (
	third = "0.33333333349"
	half  = "0.50000000000"
)

// usual are Service a's rules with two endpoints of equal share.
func usual() string {
	return clusterIP("a", "10.96.0.10") + endpoints("a", 1, 2) + toEndpoint("a", 1, half) + toEndpoint("a", 2, "")
}

// frame are the rules that kube-proxy and kubelet write around those of the
// Services, by table. A chain that a test fills itself is left out.
var frame = map[string]string{
	"raw": "", "mangle": "",
	"nat": `
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
`,
	"filter": `
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
`,
}

var builtIn = map[string][]string{
	"raw": {"PREROUTING", "OUTPUT"}, "mangle": {"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"},
	"nat": {"PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"}, "filter": {"INPUT", "FORWARD", "OUTPUT"},
}

// dump puts rules into the frame, as iptables-save prints a node. A line
// "*table" says where the lines behind it belong; "DROP CHAIN" sets a policy,
// "WITHOUT text" takes the frame's rules that hold the text away, and ":CHAIN"
// declares one without rules. Rules of built-in chains come before the frame's.
func dump(program string, parts ...string) string {
	lines := map[string][]string{}
	without := map[string][]string{}
	policy := map[string]string{}
	table := "nat"
	for line := range strings.Lines(spell(strings.Join(parts, "\n"))) {
		line = strings.TrimSpace(line)
		if rest, ok := strings.CutPrefix(line, "WITHOUT "); ok {
			without[table] = append(without[table], rest)
		} else if rest, ok := strings.CutPrefix(line, "DROP "); ok {
			policy[table+rest] = "DROP"
		} else if rest, ok := strings.CutPrefix(line, "*"); ok {
			table = rest
		} else if line != "" {
			lines[table] = append(lines[table], line)
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "# Generated by %s v1.8.9 on Sun Nov 22 22:38:38 2026\n", program)
	for _, table := range []string{"raw", "mangle", "filter", "nat"} {
		fmt.Fprintf(&b, "*%s\n", table)
		declared := slices.Clone(builtIn[table])
		for _, c := range declared {
			p := policy[table+c]
			if p == "" {
				p = "ACCEPT"
			}
			fmt.Fprintf(&b, ":%s %s [0:0]\n", c, p)
		}
		own := lines[table]
		rules := slices.Clone(own)
	framed:
		for line := range strings.Lines(frame[table]) {
			line = strings.TrimSpace(line)
			f := strings.Fields(line)
			if line == "" {
				continue
			}
			for _, text := range without[table] {
				if strings.Contains(line, text) {
					continue framed
				}
			}
			if !slices.Contains(declared, f[1]) && slices.ContainsFunc(own, func(l string) bool { return strings.HasPrefix(l, "-A "+f[1]+" ") }) {
				continue
			}
			if program == "ip6tables-save" && strings.Contains(line, "127.0.0.0/8") {
				continue
			}
			rules = append(rules, line)
		}
		// Jumps of the frame to chains that nothing fills stay valid.
		for _, line := range rules {
			name := strings.TrimPrefix(line, ":")
			if f := strings.Fields(line); f[0] == "-A" {
				name = f[1]
			}
			if !slices.Contains(declared, name) {
				declared = append(declared, name)
				fmt.Fprintf(&b, ":%s - [0:0]\n", name)
			}
		}
		for _, c := range []string{"KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-NODEPORTS", "KUBE-PROXY-FIREWALL"} {
			if (table == "filter" || table == "nat" && c == "KUBE-SERVICES") && !slices.Contains(declared, c) {
				fmt.Fprintf(&b, ":%s - [0:0]\n", c)
			}
		}
		for _, line := range rules {
			if line[0] != ':' {
				fmt.Fprintln(&b, line)
			}
		}
		fmt.Fprintln(&b, "COMMIT")
	}
	return b.String()
}

func rulesOf(t testing.TB, text string) *netfilter.Ruleset {
	t.Helper()
	rs, err := iptables.Parse(strings.NewReader(text), "rules")
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return rs
}

func viewOf(t testing.TB, node chain.Node, parts ...string) *chain.View {
	t.Helper()
	return chain.NewView(rulesOf(t, dump("iptables-save", parts...)), node)
}

func theNode() chain.Node {
	return chain.Node{Local: []netip.Addr{netip.MustParseAddr(nodeIP), netip.MustParseAddr("2001:db8::10")}}
}

// tell says in short what Services found: "a ClusterIP pod,node: dnat 1=0.5
// 2=0.5", with "masq" where the source is masqueraded, "lost" for what reaches
// no endpoint, and a line "! a Code" for each finding about Service a.
func tell(p *chain.Programmed) string {
	var out []string
	for _, s := range p.Services {
		name := strings.TrimSuffix(strings.TrimPrefix(s.String(), "shop/"), ":http")
		for _, f := range s.Frontends {
			for _, r := range f.Routes {
				out = append(out, fmt.Sprintf("%s %s %s: %s", name, f.Type, fromText(r), tellRoute(r)))
			}
		}
		for _, f := range s.Findings {
			if f.Service == nil || *f.Service != s.ServicePort || f.Message == "" || f.Severity == "" {
				out = append(out, fmt.Sprintf("finding without a Service, message or severity: %+v", f))
			}
			out = appendNew(out, fmt.Sprintf("! %s %s", name, f.Code))
		}
	}
	for _, f := range p.Findings {
		out = appendNew(out, "! "+string(f.Code))
	}
	slices.SortStableFunc(out, func(a, b string) int {
		// Findings last, in no other order than their names.
		x, y := strings.HasPrefix(a, "!"), strings.HasPrefix(b, "!")
		switch {
		case x && y:
			return strings.Compare(a, b)
		case x:
			return 1
		case y:
			return -1
		}
		return 0
	})
	return strings.Join(out, "\n")
}

func appendNew(list []string, s string) []string {
	if slices.Contains(list, s) {
		return list
	}
	return append(list, s)
}

func fromText(r chain.Route) string {
	var classes []string
	for _, c := range r.From {
		classes = append(classes, string(c))
	}
	text := strings.Join(classes, ",")
	for i, p := range r.Sources {
		text += []string{" from ", "+"}[min(i, 1)] + p.String()
	}
	return text
}

func tellRoute(r chain.Route) string {
	words := []string{string(r.Verdict)}
	every := true
	for _, ep := range r.Endpoints {
		every = every && ep.Masquerade
	}
	if r.Masquerade && every {
		words = append(words, "masq")
	}
	for _, ep := range r.Endpoints {
		to := shortAddr(ep.Address)
		if ep.Masquerade && !every {
			to += "(masq)"
		}
		words = append(words, to+"="+shareRange(ep.Share, ep.Max))
	}
	if !r.Undelivered.IsZero() {
		words = append(words, "lost="+number(r.Undelivered))
	}
	if len(r.Unknown) > 0 {
		words = append(words, fmt.Sprintf("unknown=%d", len(r.Unknown)))
	}
	return strings.Join(words, " ")
}

func shortAddr(a netip.AddrPort) string {
	if !a.IsValid() {
		return "?"
	}
	if n, ok := strings.CutPrefix(a.String(), "10.244.0."); ok && a.Port() == 8080 {
		return strings.TrimSuffix(n, ":8080")
	}
	return a.String()
}

func number(s chain.Share) string { return fmt.Sprintf("%.7g", float64(float32(s.Float64()))) }

func shareRange(lo, hi chain.Share) string {
	if lo.Cmp(hi) == 0 {
		return number(lo)
	}
	return number(lo) + ".." + number(hi)
}

// tellTrace says in short what became of a packet, each outcome with its share.
func tellTrace(tr *chain.Trace) string {
	var out []string
	for _, o := range tr.Outcomes {
		text := string(o.Verdict)
		if o.To.IsValid() {
			text += " " + shortAddr(o.To)
		}
		if o.Masquerade {
			text += " masq"
		}
		if o.Share.Cmp(o.Max) != 0 || !o.Share.IsWhole() {
			text += "=" + shareRange(o.Share, o.Max)
		}
		out = append(out, text)
	}
	return strings.Join(out, ", ")
}

func traceFrom(t *testing.T, v *chain.View, source, to string) *chain.Trace {
	t.Helper()
	tr, ok := v.Trace(v.PacketFrom(netip.MustParseAddr(source), netip.MustParseAddrPort(to), netfilter.TCP))
	if !ok {
		t.Fatal("no table of the packet's family")
	}
	return tr
}

func want(lines ...string) string { return strings.Join(lines, "\n") }

// lines expects the same from pods, where it is not masqueraded, and from the
// node and from outside, where it is.
func clusterWide(name, endpoints string) string {
	return want(name+" ClusterIP pod: dnat "+endpoints, name+" ClusterIP node,external: dnat masq "+endpoints)
}

func TestTraps(t *testing.T) {
	a := clusterIP("a", "10.96.0.10")
	for _, c := range []struct {
		name  string
		rules []string
		want  string
	}{
		{"nothing wrong", []string{usual()}, clusterWide("a", "1=0.5 2=0.5")},
		{
			// Not 1/2 each: the first rule still takes a third.
			"a missing rule", []string{a, endpoints("a", 1, 3), toEndpoint("a", 1, third), toEndpoint("a", 3, "")},
			want(clusterWide("a", "1=0.3333333 3=0.6666667"), "! a SharesUneven"),
		},
		{
			// Not 1/2 each: a third goes on to the Service's own address.
			"the last rule missing", []string{a, endpoints("a", 1, 2), toEndpoint("a", 1, third), toEndpoint("a", 2, half)},
			want("a ClusterIP pod: mixed 1=0.3333333 2=0.3333333 lost=0.3333333",
				"a ClusterIP node,external: mixed masq 1=0.3333333 2=0.3333333 lost=0.3333333", "! a FallThrough"),
		},
		{
			"no rule takes the rest", []string{a, endpoints("a", 1, 2), toEndpoint("a", 1, half), toEndpoint("a", 2, half)},
			want("a ClusterIP pod: mixed 1=0.5 2=0.25 lost=0.25", "a ClusterIP node,external: mixed masq 1=0.5 2=0.25 lost=0.25",
				"! a FallThrough", "! a SharesUneven"),
		},
		{
			"a rule behind one that takes all",
			[]string{a, endpoints("a", 1, 2, 3), toEndpoint("a", 1, ""), toEndpoint("a", 2, half), toEndpoint("a", 3, "")},
			want(clusterWide("a", "1=1"), "! a RuleUnreachable"),
		},
		{
			// Six rules lead to endpoints; a new client is only asked three.
			"session affinity", []string{a,
				`-A SVC-a -m comment --comment "shop/a:http -> 10.244.0.1:8080" -m recent --rcheck --seconds 10800 --reap --name SEP-a-1 --mask 255.255.255.255 --rsource -j SEP-a-1
-A SVC-a -m comment --comment "shop/a:http -> 10.244.0.2:8080" -m recent --rcheck --seconds 10800 --reap --name SEP-a-2 --mask 255.255.255.255 --rsource -j SEP-a-2
-A SEP-a-1 -s 10.244.0.1/32 -m comment --comment "shop/a:http" -j KUBE-MARK-MASQ
-A SEP-a-1 -p tcp -m comment --comment "shop/a:http" -m recent --set --name SEP-a-1 --mask 255.255.255.255 --rsource -m tcp -j DNAT --to-destination 10.244.0.1:8080
-A SEP-a-2 -s 10.244.0.2/32 -m comment --comment "shop/a:http" -j KUBE-MARK-MASQ
-A SEP-a-2 -p tcp -m comment --comment "shop/a:http" -m recent --set --name SEP-a-2 --mask 255.255.255.255 --rsource -m tcp -j DNAT --to-destination 10.244.0.2:8080`,
				toEndpoint("a", 1, half), toEndpoint("a", 2, "")},
			clusterWide("a", "1=0.5 2=0.5"),
		},
		{
			// Not a third for each of three chains.
			"one endpoint in two chains", []string{a, endpoints("a", 1, 2),
				`-A KUBE-SEP-AAAAAAAAAAAAAAAA -s 10.244.0.1/32 -j KUBE-MARK-MASQ
-A KUBE-SEP-AAAAAAAAAAAAAAAA -p tcp -m tcp -j DNAT --to-destination 10.244.0.1:8080`,
				toEndpoint("a", 1, third), "-A SVC-a -m statistic --mode random --probability " + half + " -j KUBE-SEP-AAAAAAAAAAAAAAAA", toEndpoint("a", 2, "")},
			want(clusterWide("a", "1=0.6666667 2=0.3333333"), "! a SharesUneven"),
		},
		{
			"two Services with one pod", []string{usual(), clusterIP("b", "10.96.0.11"), endpoints("b", 1), toEndpoint("b", 1, "")},
			want(clusterWide("a", "1=0.5 2=0.5"), clusterWide("b", "1=1")),
		},
		{
			"two ports of one Service", []string{usual(),
				`-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment "shop/a:metrics cluster IP" -m tcp --dport 9090 -j KUBE-SVC-METRICSMETRICSAA
-A KUBE-SVC-METRICSMETRICSAA -m comment --comment "shop/a:metrics -> 10.244.0.1:8080" -j SEP-a-1`},
			want(clusterWide("a", "1=0.5 2=0.5"), "a:metrics ClusterIP pod,node,external: dnat 1=1"),
		},
		{
			// No share, but nothing that a kernel could hold either.
			"a jump to a Service's chain that is not there",
			[]string{`-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment "shop/a:http cluster IP" -m tcp --dport 80 -j SVC-a`},
			want("a ClusterIP pod,node,external: none lost=1", "! a ChainMissing"),
		},
		{
			// Not 1/2 each: what would have gone to the first goes on.
			"a jump to an endpoint's chain that is not there",
			[]string{a, endpoints("a", 2), toEndpoint("a", 1, half), toEndpoint("a", 2, "")},
			want(clusterWide("a", "2=1"), "! a ChainMissing"),
		},
		{
			"a chain without rules", []string{`-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment "shop/a:http cluster IP" -m tcp --dport 80 -j SVC-a
:SVC-a`},
			want("a ClusterIP pod,node,external: none lost=1", "! a FallThrough"),
		},
		{
			"a chain with the masquerade rule only", []string{a},
			want("a ClusterIP pod,node,external: none lost=1", "! a FallThrough"),
		},
		{
			// Its endpoints get nothing, and it is no Service any more.
			"chains that nothing leads to", []string{usual(), endpoints("b", 3), toEndpoint("b", 3, "")},
			clusterWide("a", "1=0.5 2=0.5"),
		},
		{
			"the jump from PREROUTING missing", []string{usual(), "*nat", "WITHOUT -A PREROUTING"},
			want("a ClusterIP pod,external: none lost=1", "a ClusterIP node: dnat masq 1=0.5 2=0.5", "! HookJumpMissing"),
		},
		{
			"the jump from OUTPUT missing", []string{usual(), "*nat", "WITHOUT -A OUTPUT"},
			want("a ClusterIP pod: dnat 1=0.5 2=0.5", "a ClusterIP node: none lost=1", "a ClusterIP external: dnat masq 1=0.5 2=0.5", "! HookJumpMissing"),
		},
		{
			"no endpoints", []string{"*filter", `-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment "shop/a:http has no endpoints" -m tcp --dport 80 -j REJECT --reject-with icmp-port-unreachable`},
			"a ClusterIP pod,node,external: reject lost=1",
		},
		{
			// Refused from outside only: pods and the node reach all endpoints.
			"no local endpoints", []string{usual(), nodePorts, nodePort("a", 30080), extLocal("a"),
				"*filter", `-A KUBE-EXTERNAL-SERVICES -p tcp -m comment --comment "shop/a:http has no local endpoints" -m addrtype --dst-type LOCAL -m tcp --dport 30080 -j DROP`},
			want(clusterWide("a", "1=0.5 2=0.5"), "a NodePort pod: dnat 1=0.5 2=0.5", "a NodePort node: dnat masq 1=0.5 2=0.5", "a NodePort external: drop lost=1"),
		},
		{
			// The filter names the same address as nat: it decides only about
			// what nat did not rewrite. The rule without a target is none.
			"source ranges", []string{usual(), extCluster("a"),
				`*nat
-A KUBE-SERVICES -d 198.18.0.1/32 -p tcp -m comment --comment "shop/a:http loadbalancer IP" -m tcp --dport 80 -j FW-a
-A FW-a -s 203.0.113.0/24 -m comment --comment "shop/a:http loadbalancer IP" -j EXT-a
-A FW-a -m comment --comment "other traffic to shop/a:http will be dropped by KUBE-PROXY-FIREWALL"
*filter
-A KUBE-PROXY-FIREWALL -d 198.18.0.1/32 -p tcp -m comment --comment "shop/a:http traffic not accepted by FW-a" -m tcp --dport 80 -j DROP`},
			want(clusterWide("a", "1=0.5 2=0.5"), "a LoadBalancer pod,node,external: drop lost=1", "a LoadBalancer external from 203.0.113.0/24: dnat masq 1=0.5 2=0.5"),
		},
		{
			// v1.24 repeats the block for each address. Marking for dropping
			// lets the packet go on, and only INPUT and OUTPUT drop it.
			"two blocks of source ranges", []string{usual(), extCluster("a"),
				`*nat
-A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000
-A KUBE-SERVICES -d 198.18.0.1/32 -p tcp -m comment --comment "shop/a:http loadbalancer IP" -m tcp --dport 80 -j FW-a
-A FW-a -s 203.0.113.0/24 -m comment --comment "shop/a:http loadbalancer IP" -j EXT-a
-A FW-a -m comment --comment "shop/a:http loadbalancer IP" -j KUBE-MARK-DROP
-A FW-a -s 203.0.113.0/24 -m comment --comment "shop/a:http loadbalancer IP" -j EXT-a
-A FW-a -s 198.18.0.2/32 -m comment --comment "shop/a:http loadbalancer IP" -j EXT-a
-A FW-a -m comment --comment "shop/a:http loadbalancer IP" -j KUBE-MARK-DROP
*filter
-A KUBE-FIREWALL -m comment --comment "kubernetes firewall for dropping marked packets" -m mark --mark 0x8000/0x8000 -j DROP`},
			want(clusterWide("a", "1=0.5 2=0.5"), "a LoadBalancer pod,external: none lost=1", "a LoadBalancer node: drop lost=1",
				"a LoadBalancer external from 203.0.113.0/24+198.18.0.2/32: dnat masq 1=0.5 2=0.5"),
		},
		{
			"marked for dropping, then sent to an endpoint", []string{a,
				`*nat
-A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000
-A SVC-a -j KUBE-MARK-DROP
*filter
-A KUBE-FIREWALL -m comment --comment "kubernetes firewall for dropping marked packets" -m mark --mark 0x8000/0x8000 -j DROP`,
				endpoints("a", 1), toEndpoint("a", 1, "")},
			want("a ClusterIP pod: dnat 1=1", "a ClusterIP node: drop lost=1", "a ClusterIP external: dnat masq 1=1", "! a ForeignRule"),
		},
		{
			// A goto does not come back, a jump does.
			"goto", []string{a, endpoints("a", 1, 2), "-A SVC-a -g HELPER", toEndpoint("a", 2, ""),
				"-A HELPER -m statistic --mode random --probability " + half + " -j SEP-a-1"},
			want("a ClusterIP pod: mixed 1=0.5 lost=0.5", "a ClusterIP node,external: mixed masq 1=0.5 lost=0.5", "! a FallThrough", "! a ForeignRule"),
		},
		{
			"jump", []string{a, endpoints("a", 1, 2), "-A SVC-a -j HELPER", toEndpoint("a", 2, ""),
				"-A HELPER -m statistic --mode random --probability " + half + " -j SEP-a-1"},
			want(clusterWide("a", "1=0.5 2=0.5"), "! a ForeignRule"),
		},
		{
			"a foreign RETURN for a range", []string{"-A SVC-a -s 10.9.0.0/16 -j RETURN", usual()},
			want(clusterWide("a", "1=0.5 2=0.5"), "a ClusterIP external from 10.9.0.0/16: none lost=1", "! a FallThrough", "! a ForeignRule"),
		},
		{
			"a foreign RETURN for all", []string{a, endpoints("a", 1, 2), toEndpoint("a", 1, half), "-A SVC-a -j RETURN", toEndpoint("a", 2, "")},
			want("a ClusterIP pod: mixed 1=0.5 lost=0.5", "a ClusterIP node,external: mixed masq 1=0.5 lost=0.5", "! a FallThrough", "! a ForeignRule"),
		},
		{
			"a foreign DNAT in an endpoint's chain", []string{a, "-A SEP-a-1 -p tcp -m tcp -j DNAT --to-destination 10.244.0.9:8080", endpoints("a", 1), toEndpoint("a", 1, "")},
			want(clusterWide("a", "9=1"), "! a MasqueradeMissing"),
		},
		{
			// Accepted in nat means that nat is done.
			"ACCEPT ahead of KUBE-SERVICES", []string{"*nat\n-A PREROUTING -d 10.96.0.10/32 -j ACCEPT", usual()},
			want("a ClusterIP pod,external: none lost=1", "a ClusterIP node: dnat masq 1=0.5 2=0.5", "! a ForeignRule"),
		},
		{
			"REDIRECT ahead of KUBE-SERVICES", []string{"*nat\n-A PREROUTING -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 15006", usual()},
			want("a ClusterIP pod,external: dnat "+nodeIP+":15006=1", "a ClusterIP node: dnat masq 1=0.5 2=0.5", "! a ForeignRule"),
		},
		{
			"marks and logs ahead of KUBE-SERVICES", []string{`*nat
-A PREROUTING -i eni+ -m comment --comment "AWS, primary ENI" -m addrtype --dst-type LOCAL --limit-iface-in -j CONNMARK --set-xmark 0x80/0x80
-A PREROUTING -p tcp -m limit --limit 5/min -j LOG --log-prefix "new: "
-A PREROUTING -m mark --mark 0x2 -j RETURN
-A PREROUTING -j MARK --set-xmark 0x1/0x1`, usual()},
			clusterWide("a", "1=0.5 2=0.5"),
		},
		{
			"taken out of conntrack", []string{"*raw\n-A PREROUTING -d 10.96.0.10/32 -p tcp -m tcp --dport 80 -j CT --notrack\n-A OUTPUT -d 10.96.0.10/32 -p tcp -m tcp --dport 80 -j NOTRACK", usual()},
			want("a ClusterIP pod,node,external: none lost=1", "! a NotTracked"),
		},
		{
			"a loop", []string{a, endpoints("a", 1), toEndpoint("a", 1, half), "-A SVC-a -j HELPER\n-A HELPER -j SVC-a"},
			want("a ClusterIP pod: mixed 1=0.5 lost=0.5", "a ClusterIP node,external: mixed masq 1=0.5 lost=0.5",
				"! a ChainMissing", "! a FallThrough", "! a ForeignRule"),
		},
		{
			// Chance decides about the mark here, not about the endpoint.
			"probability on the masquerade rule", []string{usual(), "*nat", "-A SVC-b -m statistic --mode random --probability " + half + " -j KUBE-MARK-MASQ",
				`-A KUBE-SERVICES -d 10.96.0.11/32 -p tcp -m comment --comment "shop/b:http cluster IP" -m tcp --dport 80 -j SVC-b`,
				endpoints("b", 1, 2), toEndpoint("b", 1, half), toEndpoint("b", 2, "")},
			want(clusterWide("a", "1=0.5 2=0.5"), "b ClusterIP pod,node,external: dnat masq 1=0.5 2=0.5"),
		},
		{
			"probability the other way round", []string{a, endpoints("a", 1, 2),
				"-A SVC-a -m statistic --mode random ! --probability 0.25000000000 -j SEP-a-1", toEndpoint("a", 2, "")},
			want(clusterWide("a", "1=0.75 2=0.25"), "! a ForeignRule", "! a SharesUneven"),
		},
		{
			"every fourth", []string{a, endpoints("a", 1, 2),
				"-A SVC-a -m statistic --mode nth --every 4 --packet 0 -j SEP-a-1", toEndpoint("a", 2, "")},
			want(clusterWide("a", "1=0.25 2=0.75"), "! a ForeignRule", "! a SharesUneven"),
		},
		{
			"two chances in one rule", []string{a, endpoints("a", 1, 2),
				"-A SVC-a -m statistic --mode random --probability " + half + " -m statistic --mode random --probability " + half + " -j SEP-a-1", toEndpoint("a", 2, "")},
			want(clusterWide("a", "1=0.25 2=0.75"), "! a SharesUneven"),
		},
		{
			"a chance that never comes, and one that always does", []string{a, endpoints("a", 1, 2, 3),
				toEndpoint("a", 1, "0.00000000000"), toEndpoint("a", 2, "1.00000000000"), toEndpoint("a", 3, "")},
			clusterWide("a", "2=1"),
		},
		{
			// To the node itself there is no POSTROUTING: the mark does nothing.
			"an endpoint in the node's network", []string{a, toEndpoint("a", 1, half), endpoints("a", 1),
				`*nat
-A SVC-a -m comment --comment "shop/a:http -> 192.0.2.10:8080" -j KUBE-SEP-HOSTHOSTHOSTHOST
-A KUBE-SEP-HOSTHOSTHOSTHOST -s 192.0.2.10/32 -m comment --comment "shop/a:http" -j KUBE-MARK-MASQ
-A KUBE-SEP-HOSTHOSTHOSTHOST -p tcp -m comment --comment "shop/a:http" -m tcp -j DNAT --to-destination 192.0.2.10:8080`},
			want("a ClusterIP pod: dnat 1=0.5 192.0.2.10:8080=0.5", "a ClusterIP node: dnat masq 1=0.5 192.0.2.10:8080=0.5",
				"a ClusterIP external: dnat 1(masq)=0.5 192.0.2.10:8080=0.5"),
		},
		{
			// The node's own chain for hostPorts stands behind kube-proxy's.
			"a hostPort with the number of a NodePort", []string{usual(), nodePorts, nodePort("a", 30080), extCluster("a"),
				`*nat
-A PREROUTING -m addrtype --dst-type LOCAL -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A CNI-HOSTPORT-DNAT -p tcp -m tcp --dport 30080 -j DNAT --to-destination 10.244.0.99:8080`},
			want(clusterWide("a", "1=0.5 2=0.5"), "a NodePort pod,node,external: dnat masq 1=0.5 2=0.5"),
		},
		{
			"endpoints with different ports", []string{a, endpoints("a", 1), toEndpoint("a", 1, half),
				`*nat
-A SVC-a -m comment --comment "shop/a:http -> 10.244.0.2:9090" -j KUBE-SEP-OTHEROTHEROTHERA
-A KUBE-SEP-OTHEROTHEROTHERA -s 10.244.0.2/32 -m comment --comment "shop/a:http" -j KUBE-MARK-MASQ
-A KUBE-SEP-OTHEROTHEROTHERA -p tcp -m comment --comment "shop/a:http" -m tcp -j DNAT --to-destination 10.244.0.2:9090`},
			clusterWide("a", "1=0.5 10.244.0.2:9090=0.5"),
		},
		{
			// Any bit can be the mark; an old kubelet may use another beside.
			"another masquerade bit", []string{usual(),
				`*nat
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x80000/0x80000
-A KUBE-POSTROUTING -m mark ! --mark 0x80000/0x80000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x80000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully`},
			clusterWide("a", "1=0.5 2=0.5"),
		},
		{
			"a mark that nothing masquerades", []string{usual(),
				`*nat
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x80000/0x80000`},
			want("a ClusterIP pod,node,external: dnat 1=0.5 2=0.5", "! a MasqueradeMissing"),
		},
		{
			"the jump from POSTROUTING missing", []string{usual(), "*nat", "WITHOUT -A POSTROUTING"},
			want("a ClusterIP pod,node,external: dnat 1=0.5 2=0.5", "! HookJumpMissing", "! a MasqueradeMissing"),
		},
		{
			// What another program masquerades first, kube-proxy need not.
			"another SNAT first", []string{"*nat\n-A POSTROUTING -s 10.244.0.0/16 ! -d 10.96.0.0/16 -j MASQUERADE", usual()},
			"a ClusterIP pod,node,external: dnat masq 1=0.5 2=0.5",
		},
		{
			"no comments at the endpoints", []string{a,
				`*nat
-A SVC-a -m statistic --mode random --probability 0.50000000000 -j SEP-a-1
-A SVC-a -j SEP-a-2
-A SEP-a-1 -s 10.244.0.1/32 -j KUBE-MARK-MASQ
-A SEP-a-1 -p tcp -m tcp -j DNAT --to-destination 10.244.0.1:8080
-A SEP-a-2 -s 10.244.0.2/32 -j KUBE-MARK-MASQ
-A SEP-a-2 -p tcp -m tcp -j DNAT --to-destination 10.244.0.2:8080`},
			clusterWide("a", "1=0.5 2=0.5"),
		},
		{
			// The name is in the chain behind, and its hash proves it.
			"no comments in KUBE-SERVICES", []string{
				`*nat
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m tcp --dport 80 -j SVC-a
-A SVC-a ! -s 10.244.0.0/16 -d 10.96.0.10/32 -p tcp -m comment --comment "shop/a:http cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ`,
				endpoints("a", 1), toEndpoint("a", 1, "")},
			clusterWide("a", "1=1"),
		},
		{
			// Bridges and veths are known by name only where packets come in:
			// in OUTPUT there is no such interface, so "!" always holds.
			"local traffic by interface", []string{
				`*nat
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment "shop/a:http cluster IP" -m tcp --dport 80 -j SVC-a
-A SVC-a -d 10.96.0.10/32 ! -i veth+ -p tcp -m comment --comment "shop/a:http cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ`,
				endpoints("a", 1), toEndpoint("a", 1, ""), nodePorts, nodePort("a", 30080),
				`*nat
-A EXT-a -i veth+ -m comment --comment "pod traffic for shop/a:http external destinations" -j SVC-a
-A EXT-a -m comment --comment "masquerade LOCAL traffic for shop/a:http external destinations" -m addrtype --src-type LOCAL -j KUBE-MARK-MASQ
-A EXT-a -m comment --comment "route LOCAL traffic for shop/a:http external destinations" -m addrtype --src-type LOCAL -j SVC-a
*filter
-A KUBE-EXTERNAL-SERVICES -p tcp -m comment --comment "shop/a:http has no local endpoints" -m addrtype --dst-type LOCAL -m tcp --dport 30080 -j DROP`},
			want(clusterWide("a", "1=1"), "a NodePort pod: dnat 1=1", "a NodePort node: dnat masq 1=1", "a NodePort external: drop lost=1"),
		},
		{
			"local traffic by bridge", []string{
				`*nat
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment "shop/a:http cluster IP" -m tcp --dport 80 -j SVC-a
-A SVC-a -d 10.96.0.10/32 ! -i cni0 -p tcp -m comment --comment "shop/a:http cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ`,
				endpoints("a", 1), toEndpoint("a", 1, "")},
			clusterWide("a", "1=1"),
		},
		{
			"no detector of local traffic", []string{
				`*nat
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment "shop/a:http cluster IP" -m tcp --dport 80 -j SVC-a`,
				endpoints("a", 1), toEndpoint("a", 1, "")},
			"a ClusterIP pod,node,external: dnat 1=1",
		},
		{
			// The first rule wins, not half of both.
			"two Services on one external IP", []string{usual(), extCluster("a"),
				`*nat
-A KUBE-SERVICES -d 198.18.0.1/32 -p tcp -m comment --comment "shop/a:http external IP" -m tcp --dport 80 -j EXT-a
-A KUBE-SERVICES -d 198.18.0.1/32 -p tcp -m comment --comment "shop/b:http external IP" -m tcp --dport 80 -j EXT-b`,
				clusterIP("b", "10.96.0.11"), endpoints("b", 3), toEndpoint("b", 3, ""), extCluster("b")},
			want(clusterWide("a", "1=0.5 2=0.5"), "a ExternalIP pod,node,external: dnat masq 1=0.5 2=0.5", clusterWide("b", "3=1"), "! a FrontendConflict"),
		},
		{
			// KUBE-EXT has nothing for outside: KUBE-SERVICES goes on, and the
			// address being local, another Service's NodePort takes it.
			"an address that another Service's NodePort shares", []string{usual(), extLocal("a"),
				`*nat
-A KUBE-SERVICES -d 192.0.2.10/32 -p tcp -m comment --comment "shop/a:http loadbalancer IP" -m tcp --dport 30080 -j EXT-a`,
				nodePorts, nodePort("b", 30080), clusterIP("b", "10.96.0.11"), endpoints("b", 3), toEndpoint("b", 3, ""), extCluster("b"),
				"*filter", `-A KUBE-EXTERNAL-SERVICES -d 192.0.2.10/32 -p tcp -m comment --comment "shop/a:http has no local endpoints" -m tcp --dport 30080 -j DROP`},
			"",
		},
		{
			"chains of kubelet only", []string{"*nat", "WITHOUT KUBE", "*filter", "WITHOUT KUBE-S", "WITHOUT KUBE-E", "WITHOUT KUBE-P", "WITHOUT KUBE-N", "WITHOUT KUBE-FO", "*mangle", ":KUBE-KUBELET-CANARY"},
			"! ProxyModeUnsupported",
		},
		{
			"a health check port", []string{usual(), "*filter", `-A KUBE-NODEPORTS -p tcp -m comment --comment "shop/a:http health check node port" -m tcp --dport 31863 -j ACCEPT`},
			clusterWide("a", "1=0.5 2=0.5"),
		},
		{
			// The first packet is new: what is dropped later is another matter.
			"a drop of established connections", []string{"*filter\n-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j DROP\n-A OUTPUT -m state ! --state NEW -j DROP", usual()},
			clusterWide("a", "1=0.5 2=0.5"),
		},
		{
			// KUBE-FORWARD lets through what is masqueraded; a pod's own
			// connection is not.
			"policy DROP in FORWARD", []string{usual(), "*filter", "DROP FORWARD"},
			want("a ClusterIP pod: drop lost=1", "a ClusterIP node,external: dnat masq 1=0.5 2=0.5"),
		},
		{
			// Of no interest to where a Service sends connections.
			"an ipset in a foreign filter chain", []string{"*filter\n-A FORWARD -m set --match-set blocked src -j DROP\n-A OUTPUT -m set --match-set blocked src -j DROP", usual()},
			clusterWide("a", "1=0.5 2=0.5"),
		},
		{
			"an unknown match on the way", []string{a, endpoints("a", 1, 2), "-A SVC-a -m bpf --object-pinned /sys/fs/bpf/x -j SEP-a-1", toEndpoint("a", 2, "")},
			want("a ClusterIP pod: dnat 1=0..1 2=0..1 unknown=1", "a ClusterIP node,external: dnat masq 1=0..1 2=0..1 unknown=1", "! a ForeignRule", "! a UnknownMatch"),
		},
		{
			"an unknown match behind a chance", []string{a, endpoints("a", 1, 2), toEndpoint("a", 1, half), "-A SVC-a -m time --timestart 08:00:00 -j RETURN", toEndpoint("a", 2, "")},
			want("a ClusterIP pod: mixed 1=0.5 2=0..0.5 lost=0.5 unknown=1", "a ClusterIP node,external: mixed masq 1=0.5 2=0..0.5 lost=0.5 unknown=1", "! a ForeignRule", "! a UnknownMatch"),
		},
		{
			"an unknown match that a known one rules out", []string{"*nat\n-A PREROUTING -d 10.1.2.3/32 -m set --match-set x dst -j ACCEPT\n-A PREROUTING -p udp -m owner --uid-owner 0 -j ACCEPT", usual()},
			clusterWide("a", "1=0.5 2=0.5"),
		},
		{
			"an unknown match that changes nothing", []string{a, endpoints("a", 1),
				"-A SVC-a -m set --match-set x src -j LOG\n-A SVC-a -m set --match-set x src", toEndpoint("a", 1, "")},
			want(clusterWide("a", "1=1"), "! a ForeignRule"),
		},
		{
			"an unknown match before the same endpoint", []string{a, endpoints("a", 1), "-A SVC-a -m set --match-set x src -j SEP-a-1", toEndpoint("a", 1, "")},
			want(clusterWide("a", "1=1"), "! a ForeignRule"),
		},
		{
			"counters of a chain just written", []string{strings.ReplaceAll(spell(usual()), "-A KUBE-SVC", "[0:0] -A KUBE-SVC")},
			clusterWide("a", "1=0.5 2=0.5"),
		},
		{
			// An iptables older than the one that wrote the rule loses matches.
			"KUBE-FIREWALL drops everything", []string{usual(), "*filter\n-A KUBE-FIREWALL -j DROP"},
			want("a ClusterIP pod: dnat 1=0.5 2=0.5", "a ClusterIP node: drop lost=1", "a ClusterIP external: dnat masq 1=0.5 2=0.5", "! RulesUnreadable"),
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.want == "" {
				t.Skip("stands alone") // replaced below
			}
			got := tell(viewOf(t, theNode(), c.rules...).Services())
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

var _ = big.NewRat
var _ = rand.IntN
