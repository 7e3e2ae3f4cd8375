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

// nodePort are the rules that lead from NodePort 30080 to KUBE-EXT of a Service.
func nodePort(name string) string {
	return fmt.Sprintf(`*nat
-A KUBE-NODEPORTS -p tcp -m comment --comment "shop/%[1]s:http" -m tcp --dport 30080 -j EXT-%[1]s
`, name)
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
			if len(f) == 0 {
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
			name, isChain := strings.CutPrefix(line, ":")
			if !isChain {
				_, rule, _ := strings.Cut(line, "-A ") // behind counters
				name, _, _ = strings.Cut(rule, " ")
			}
			if !slices.Contains(declared, name) {
				declared = append(declared, name)
				fmt.Fprintf(&b, ":%s - [0:0]\n", name)
			}
		}
		for _, c := range []string{"KUBE-SERVICES", "KUBE-EXTERNAL-SERVICES", "KUBE-NODEPORTS", "KUBE-PROXY-FIREWALL", "KUBE-FIREWALL"} {
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
		every = every && r.MasqueradesTo(ep)
	}
	if r.Masquerade && every {
		words = append(words, "masq")
	}
	for _, ep := range r.Endpoints {
		to := shortAddr(ep.Address)
		if r.MasqueradesTo(ep) && !every {
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

// clusterWide are the lines of a ClusterIP whose connections are masqueraded
// but for those of pods.
func clusterWide(name, endpoints string, more ...string) string {
	return want(append([]string{name + " ClusterIP pod: dnat " + endpoints, name + " ClusterIP node,external: dnat masq " + endpoints}, more...)...)
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
			clusterWide("a", "1=0.5 2=0.5", "! RulesMissing"),
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
			"no endpoints", []string{nodePorts, "*filter", `-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment "shop/a:http has no endpoints" -m tcp --dport 80 -j REJECT --reject-with icmp-port-unreachable`},
			"a ClusterIP pod,node,external: reject lost=1",
		},
		{
			// Refused from outside only: pods and the node reach all endpoints.
			"no local endpoints", []string{usual(), nodePorts, nodePort("a"), extLocal("a"),
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
			// To the address of the interface that it came in on: a pod's is not known.
			want("a ClusterIP pod: dnat ?=1", "a ClusterIP node: dnat masq 1=0.5 2=0.5", "a ClusterIP external: dnat "+nodeIP+":15006=1", "! a ForeignRule"),
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
			clusterWide("a", "2=1", "! a RuleUnreachable"),
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
			"a hostPort with the number of a NodePort", []string{usual(), nodePorts, nodePort("a"), extCluster("a"),
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
			"the mark taken off, and nothing masqueraded", []string{usual(),
				`*nat
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0`},
			want("a ClusterIP pod,node,external: dnat 1=0.5 2=0.5", "! MasqueradeMissing"),
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
				endpoints("a", 1), toEndpoint("a", 1, ""), nodePorts, nodePort("a"),
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
			// Up to v1.20, what comes through a bridge is not sent to endpoints,
			// and the rules do not show which pods that is. The mark stands
			// ahead of the jump there.
			"external IPs of an old kube-proxy", []string{usual(),
				`*nat
-A KUBE-SERVICES -d 198.18.0.1/32 -p tcp -m comment --comment "shop/a:http external IP" -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SERVICES -d 198.18.0.1/32 -p tcp -m comment --comment "shop/a:http external IP" -m tcp --dport 80 -m physdev ! --physdev-is-in -m addrtype ! --src-type LOCAL -j SVC-a
-A KUBE-SERVICES -d 198.18.0.1/32 -p tcp -m comment --comment "shop/a:http external IP" -m tcp --dport 80 -m addrtype --dst-type LOCAL -j SVC-a`},
			want(clusterWide("a", "1=0.5 2=0.5"), "a ExternalIP pod,external: mixed masq 1=0..0.5 2=0..0.5 lost=1 unknown=1", "a ExternalIP node: none lost=1", "! a UnknownMatch"),
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
				nodePorts, nodePort("b"), clusterIP("b", "10.96.0.11"), endpoints("b", 3), toEndpoint("b", 3, ""), extCluster("b"),
				"*filter", `-A KUBE-EXTERNAL-SERVICES -d 192.0.2.10/32 -p tcp -m comment --comment "shop/a:http has no local endpoints" -m tcp --dport 30080 -j DROP`},
			want(clusterWide("a", "1=0.5 2=0.5"), "a LoadBalancer pod: dnat 1=0.5 2=0.5", "a LoadBalancer node: dnat masq 1=0.5 2=0.5", "a LoadBalancer external: dnat masq 3=1",
				clusterWide("b", "3=1"), "b NodePort pod: dnat 1=0.5 2=0.5", "b NodePort node: dnat masq 1=0.5 2=0.5", "b NodePort external: dnat masq 3=1", "! b ForeignRule"),
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
			want("a ClusterIP pod: drop lost=1", "a ClusterIP node,external: dnat masq 1=0.5 2=0.5", "! a ForeignRule"),
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
			// More of them than are ever tried both ways.
			"many unknown matches that change nothing", []string{strings.Repeat("-A PREROUTING -m limit --limit 5/min -j LOG\n-A OUTPUT -m owner --uid-owner 0 -j NFLOG\n", 10), usual()},
			clusterWide("a", "1=0.5 2=0.5"),
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
			got := tell(viewOf(t, theNode(), c.rules...).Services())
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// Who connects to itself would get answers without the Service's address, but
// for the masquerade, which is for that endpoint only.
func TestHairpin(t *testing.T) {
	v := viewOf(t, theNode(), usual())
	if got, want := tellTrace(traceFrom(t, v, "10.244.0.1", "10.96.0.10:80")), "dnat 1 masq=0.5, dnat 2=0.5"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if got, want := tellTrace(traceFrom(t, v, "10.244.0.3", "10.96.0.10:80")), "dnat 1=0.5, dnat 2=0.5"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// A new client is in no list, whatever the number of rules: the shares are its,
// and how long it will be kept is told apart.
func TestAffinityTimeout(t *testing.T) {
	rules := clusterIP("a", "10.96.0.10") + endpoints("a", 1, 2) +
		"-A SVC-a -m recent --rcheck --seconds 300 --reap --name SEP-a-1 --mask 255.255.255.255 --rsource -j SEP-a-1\n" +
		toEndpoint("a", 1, half) + toEndpoint("a", 2, "")
	p := viewOf(t, theNode(), rules, clusterIP("b", "10.96.0.11"), endpoints("b", 1), toEndpoint("b", 1, "")).Services()
	if len(p.Services) != 2 || p.Services[0].AffinitySeconds != 300 || p.Services[1].AffinitySeconds != 0 {
		t.Errorf("got %+v", p.Services)
	}
}

// Above 1000 endpoints kube-proxy writes no comments at endpoints, and a dump
// may have none at all: then a chain's own name is all there is to tell.
func TestServicesWithoutComments(t *testing.T) {
	text := regexp.MustCompile(` -m comment --comment ("[^"]*"|\S+)`).ReplaceAllString(dump("iptables-save", usual()), "")
	p := chain.NewView(rulesOf(t, text), theNode()).Services()
	want := strings.ReplaceAll(clusterWide("x", "1=0.5 2=0.5"), "x ", "/"+chain.ServiceChain("KUBE-SVC-", servicePort("a"))+" ")
	if diff := cmp.Diff(want, tell(p)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// A Service of 1,000 endpoints: each gets a thousandth, and nothing is lost in
// rounding.
func TestThousandEndpoints(t *testing.T) {
	const n = 1000
	var b strings.Builder
	b.WriteString(clusterIP("a", "10.96.0.10"))
	for i := range n {
		chance := ""
		if i < n-1 {
			stored := fmt.Sprintf("%.10f", 1/float64(n-i)) // as kube-proxy writes it
			chance = fmt.Sprintf("-m statistic --mode random --probability %.11f ", float64(kernelChance(t, stored))/(1<<31))
		}
		fmt.Fprintf(&b, "-A SVC-a %s-j KUBE-SEP-%016d\n-A KUBE-SEP-%016d -p tcp -m tcp -j DNAT --to-destination 10.244.%d.%d:8080\n", chance, i, i, 10+i/200, 1+i%200)
	}
	p := viewOf(t, theNode(), b.String()).Services()
	if len(p.Services) != 1 || len(p.Services[0].Findings) > 0 && p.Services[0].Findings[0].Code != chain.MasqueradeMissing {
		t.Fatalf("got %s", tell(p))
	}
	// The chain's order is that of the addresses.
	wants, left := make([]*big.Rat, n), big.NewRat(1, 1)
	for i := range n {
		wants[i] = left
		if i < n-1 {
			wants[i] = new(big.Rat).Mul(left, big.NewRat(int64(kernelChance(t, fmt.Sprintf("%.10f", 1/float64(n-i)))), 1<<31))
		}
		left = new(big.Rat).Sub(left, wants[i])
	}
	if left.Sign() != 0 {
		t.Errorf("%v is left", left)
	}
	for _, r := range p.Services[0].Frontends[0].Routes {
		if len(r.Endpoints) != n || !r.Undelivered.IsZero() {
			t.Fatalf("%v: %d endpoints, undelivered %v", r.From, len(r.Endpoints), r.Undelivered.Float64())
		}
		for i, ep := range r.Endpoints {
			if d := ep.Share.Float64() - 1.0/n; d > 4e-10 || d < -4e-10 {
				t.Errorf("%v gets %v", ep.Address, ep.Share.Float64())
			}
			if text := ep.Share.Exact(); text != "" && text != wants[i].String() || text == "" && i < 100 {
				t.Errorf("%v gets exactly %q, want %s", ep.Address, text, wants[i])
			}
			if f, _ := wants[i].Float64(); f != ep.Share.Float64() {
				t.Errorf("%v gets %v, want %v", ep.Address, ep.Share.Float64(), f)
			}
		}
	}
}

// kernelChance is what the kernel stores for a probability (libxt_statistic.c).
func kernelChance(t *testing.T, text string) uint32 {
	t.Helper()
	p, ok := new(big.Rat).SetString(text)
	if !ok {
		t.Fatalf("not a number: %q", text)
	}
	p.Mul(p, big.NewRat(1<<31, 1)).Add(p, big.NewRat(1, 2))
	return uint32(new(big.Int).Div(p.Num(), p.Denom()).Uint64())
}

// With both backends in use, the kernel asks one nat table first, and what that
// rewrites no other is asked about. Which one is first it does not tell, so that
// an answer is only known where both say the same. The filter tables of both count.
func TestBothBackends(t *testing.T) {
	stale := rulesOf(t, dump("iptables-save", clusterIP("a", "10.96.0.10"), endpoints("a", 9), toEndpoint("a", 9, "")))
	fresh := rulesOf(t, strings.Replace(dump("iptables-save", usual(), clusterIP("b", "10.96.0.11"), endpoints("b", 3), toEndpoint("b", 3, "")), "iptables-save v1.8.9", "iptables-save v1.8.9 (nf_tables)", 1))
	const open = "1=0..0.5 2=0..0.5 9=0..1 unknown=1"
	either := want("a ClusterIP pod: dnat "+open, "a ClusterIP node: dnat masq "+open, "a ClusterIP external: dnat masq "+open,
		clusterWide("b", "3=1"), "! BackendConflict", "! a UnknownMatch")
	for _, c := range []struct {
		name string
		sets []*netfilter.Ruleset
		want string
	}{
		{"stale first", []*netfilter.Ruleset{stale, fresh}, either},
		{"fresh first", []*netfilter.Ruleset{fresh, stale}, either},
	} {
		rs, err := netfilter.Merge(c.sets...)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(c.want, tell(chain.NewView(rs, theNode()).Services())); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}

	// What the first table sends to port 8080 the second would send elsewhere,
	// if it were asked.
	greedy := rulesOf(t, dump("iptables-save", "*nat\n-A PREROUTING -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.244.0.77:8080"))
	both, err := netfilter.Merge(fresh, greedy)
	if err != nil {
		t.Fatal(err)
	}
	v := chain.NewView(both, theNode())
	for to, want := range map[string]string{"10.96.0.10:80": "dnat 1 masq=0.5, dnat 2 masq=0.5", "198.51.100.1:8080": "dnat 77"} {
		if got := tellTrace(traceFrom(t, v, "203.0.113.200", to)); got != want {
			t.Errorf("to %s: %s, want %s", to, got, want)
		}
	}

	// kubelet's empty chains in the other backend are no conflict.
	idle := rulesOf(t, dump("iptables-save", "*nat\nWITHOUT KUBE-SERVICES\n*filter\nWITHOUT KUBE-S"))
	rs, err := netfilter.Merge(idle, fresh)
	if err != nil {
		t.Fatal(err)
	}
	if got := tell(chain.NewView(rs, theNode()).Services()); strings.Contains(got, "!") {
		t.Errorf("with empty chains in the other backend: %s", got)
	}
}

// A table that could not be read is never a table without rules.
func TestUnreadableTable(t *testing.T) {
	text := dump("iptables-save", usual())
	text = text[:strings.Index(text, "*nat")] + "# Table `nat' is incompatible, use 'nft' tool.\n"
	got := tell(chain.NewView(rulesOf(t, text), theNode()).Services())
	if !strings.Contains(got, "! RulesUnreadable") {
		t.Errorf("got %q", got)
	}
}

// 127.0.0.1 works as a NodePort's address only where the kernel is told to let
// such packets out; the rules are the same either way.
func TestLocalhostNodePort(t *testing.T) {
	rules := []string{usual(), extCluster("a"), nodePorts, nodePort("a")}
	for _, c := range []struct {
		name, to string
		sysctl   bool
		extra    string
		want     string
	}{
		{"route_localnet on", "127.0.0.1:30080", true, "", "dnat 1 masq=0.5, dnat 2 masq=0.5"},
		{"route_localnet off", "127.0.0.1:30080", false, "", "drop"},
		{"not for localhost", "127.0.0.1:30080", true, "! -d 127.0.0.0/8 ", "none"},
		{"the node's own address", nodeIP + ":30080", false, "", "dnat 1 masq=0.5, dnat 2 masq=0.5"},
	} {
		node := theNode()
		node.NoRouteLocalnet = !c.sysctl
		text := strings.Replace(dump("iptables-save", rules...), "-m addrtype --dst-type LOCAL -j KUBE-NODEPORTS", c.extra+"-m addrtype --dst-type LOCAL -j KUBE-NODEPORTS", 1)
		v := chain.NewView(rulesOf(t, text), node)
		to := netip.MustParseAddrPort(c.to)
		if got := tellTrace(traceFrom(t, v, to.Addr().String(), c.to)); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

// With --nodeport-addresses a NodePort answers on some of the node's addresses
// only: elsewhere there is no rule, which is no fault.
func TestNodePortAddresses(t *testing.T) {
	node := theNode()
	node.Local = append(node.Local, netip.MustParseAddr("198.51.100.1"))
	v := viewOf(t, node, usual(), extCluster("a"), nodePort("a"),
		`*nat
-A KUBE-SERVICES -d 198.51.100.1/32 -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -j KUBE-NODEPORTS`)
	p := v.Services()
	if diff := cmp.Diff(want(clusterWide("a", "1=0.5 2=0.5"), "a NodePort pod,node,external: dnat masq 1=0.5 2=0.5"), tell(p)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := p.Services[0].Frontends[1].Accepted; !slices.Equal(got, []netip.Addr{netip.MustParseAddr("198.51.100.1")}) {
		t.Errorf("accepted on %v", got)
	}
	for to, want := range map[string]string{nodeIP + ":30080": "none", "198.51.100.1:30080": "dnat 1 masq=0.5, dnat 2 masq=0.5"} {
		if got := tellTrace(traceFrom(t, v, "203.0.113.200", to)); got != want {
			t.Errorf("%s: %s, want %s", to, got, want)
		}
	}
}

// IPv6 has tables, addresses and marks of its own.
func TestIPv6(t *testing.T) {
	six := strings.NewReplacer("10.96.0.10/32", "fd00:10:96::10/128", podRange, "fd00:10:244::/56", "10.244.0.", "fd00:10:244::")
	nat := `*nat
-A KUBE-SERVICES -d fd00:10:96::10/128 -p tcp -m comment --comment "shop/a:http cluster IP" -m tcp --dport 80 -j SVC-a
-A SVC-a ! -s fd00:10:244::/56 -d fd00:10:96::10/128 -p tcp -m comment --comment "shop/a:http cluster IP" -m tcp --dport 80 -j KUBE-MARK-MASQ
-A SVC-a -m comment --comment "shop/a:http -> [fd00:10:244::1]:8080" -m statistic --mode random --probability 0.50000000000 -j SEP-a-1
-A SVC-a -m comment --comment "shop/a:http -> [fd00:10:244::2]:8080" -j SEP-a-2
-A SEP-a-1 -s fd00:10:244::1/128 -m comment --comment "shop/a:http" -j KUBE-MARK-MASQ
-A SEP-a-1 -p tcp -m comment --comment "shop/a:http" -m tcp -j DNAT --to-destination [fd00:10:244::1]:8080
-A SEP-a-2 -s fd00:10:244::2/128 -m comment --comment "shop/a:http" -j KUBE-MARK-MASQ
-A SEP-a-2 -p tcp -m comment --comment "shop/a:http" -m tcp -j DNAT --to-destination [fd00:10:244::2]:8080
-A KUBE-SERVICES ! -d ::1/128 -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
` + nodePort("a") + six.Replace(extLocal("a")) + `*filter
-A KUBE-SERVICES -d fd00:10:96::11/128 -p tcp -m comment --comment "shop/b:http has no endpoints" -m tcp --dport 80 -j REJECT --reject-with icmp6-port-unreachable
-A KUBE-EXTERNAL-SERVICES -p tcp -m comment --comment "shop/a:http has no local endpoints" -m addrtype --dst-type LOCAL -m tcp --dport 30080 -j DROP
`
	text := dump("ip6tables-save", nat)
	v := chain.NewView(rulesOf(t, text), theNode())
	one, two := "[fd00:10:244::1]:8080", "[fd00:10:244::2]:8080"
	both := one + "=0.5 " + two + "=0.5"
	p := v.Services()
	if diff := cmp.Diff(want(clusterWide("a", both), "a NodePort pod: dnat "+both, "a NodePort node: dnat masq "+both, "a NodePort external: drop lost=1",
		"b ClusterIP pod,node,external: reject lost=1"), tell(p)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if f := p.Services[0].Frontends[0]; f.Family != netfilter.IPv6 || f.Address != netip.MustParseAddr("fd00:10:96::10") {
		t.Errorf("the ClusterIP is %v of %v", f.Address, f.Family)
	}
	for source, want := range map[string]string{
		"fd00:10:244::1": "dnat " + one + " masq=0.5, dnat " + two + "=0.5",
		"2001:db8::10":   "dnat " + one + " masq=0.5, dnat " + two + " masq=0.5",
	} {
		if got := tellTrace(traceFrom(t, v, source, "[fd00:10:96::10]:80")); got != want {
			t.Errorf("from %s: %s, want %s", source, got, want)
		}
	}
	// Never on the loopback address, whatever the sysctl says: it goes on to the
	// filter with the address it came with.
	if got := tellTrace(traceFrom(t, v, "::1", "[::1]:30080")); got != "drop" {
		t.Errorf("NodePort on ::1: %s", got)
	}
	// There is no table of IPv4 to ask.
	if _, ok := v.Trace(v.PacketFrom(netip.MustParseAddr("10.244.0.9"), netip.MustParseAddrPort("10.96.0.10:80"), netfilter.TCP)); ok {
		t.Error("a packet of IPv4 was walked through tables of IPv6")
	}

	// A dual-stack Service has two answers, which may differ.
	rs, err := netfilter.Merge(rulesOf(t, dump("iptables-save", clusterIP("a", "10.96.0.10"), endpoints("a", 3), toEndpoint("a", 3, ""))), rulesOf(t, text))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want(clusterWide("a", "3=1"), clusterWide("a", both), "a NodePort pod: dnat "+both, "a NodePort node: dnat masq "+both, "a NodePort external: drop lost=1",
		"b ClusterIP pod,node,external: reject lost=1"), tell(chain.NewView(rs, theNode()).Services())); diff != "" {
		t.Errorf("dual-stack (-want +got):\n%s", diff)
	}
}

// What cannot be decided gives the least and the greatest share, and the rules
// that this hangs on; where it changes nothing, none.
func TestTraceOfUnknownMatches(t *testing.T) {
	drop := `*filter
-A FORWARD -m set --match-set blocked src -j DROP`
	for _, c := range []struct {
		name  string
		rules []string
		want  string
		rule  string // the unknown one, as printed; empty for none
	}{
		{"a drop that may match", []string{drop, usual()}, "drop=0..1, dnat 1=0..0.5, dnat 2=0..0.5", "-A FORWARD -m set --match-set blocked src -j DROP"},
		{"a log", []string{strings.Replace(drop, "DROP", "LOG", 1), usual()}, "dnat 1=0.5, dnat 2=0.5", ""},
		{"an accept of what would pass", []string{strings.Replace(drop, "DROP", "ACCEPT", 1), usual()}, "dnat 1=0.5, dnat 2=0.5", ""},
		{
			"an accept of what would be dropped", []string{strings.Replace(drop, "DROP", "ACCEPT", 1), "DROP FORWARD", usual()},
			"drop=0..1, dnat 1=0..0.5, dnat 2=0..0.5", "-A FORWARD -m set --match-set blocked src -j ACCEPT",
		},
		{"a drop in another hook", []string{strings.Replace(drop, "FORWARD", "INPUT", 1), usual()}, "dnat 1=0.5, dnat 2=0.5", ""},
		{
			"a way around in nat", []string{"*nat\n-A PREROUTING -m set --match-set bypass src -j ACCEPT", usual()},
			"accept=0..1, dnat 1=0..0.5, dnat 2=0..0.5", "-A PREROUTING -m set --match-set bypass src -j ACCEPT",
		},
		{
			"two unknown, of which one matters", []string{"*nat\n-A PREROUTING -m owner --uid-owner 5 -j LOG\n-A PREROUTING -m owner --uid-owner 6 -j MARK --set-xmark 0x1/0x1", drop, usual()},
			"drop=0..1, dnat 1=0..0.5, dnat 2=0..0.5", "-A FORWARD -m set --match-set blocked src -j DROP",
		},
	} {
		v := viewOf(t, theNode(), c.rules...)
		tr := traceFrom(t, v, "10.244.0.9", "10.96.0.10:80")
		if got := tellTrace(tr); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
		var got []string
		for _, ref := range tr.Unknown {
			got = append(got, iptables.RuleText(ref.Table, ref.Chain, ref.Index))
		}
		if strings.Join(got, "\n") != c.rule {
			t.Errorf("%s: depends on %q, want %q", c.name, got, c.rule)
		}
	}
}

// Each rule tried both ways doubles the work, so there is an end to it: the
// others are named too.
func TestManyUnknownMatches(t *testing.T) {
	var b strings.Builder
	for i := range 9 {
		fmt.Fprintf(&b, "-A PREROUTING -m set --match-set s%d src -j DNAT --to-destination 10.244.0.%d:8080\n", i, 10+i)
	}
	tr := traceFrom(t, viewOf(t, theNode(), b.String(), usual()), "10.244.0.9", "10.96.0.10:80")
	if len(tr.Unknown) != 9 {
		t.Errorf("%d rules are named, want 9", len(tr.Unknown))
	}
	for _, o := range tr.Outcomes {
		if !o.Share.IsZero() {
			t.Errorf("%v gets %v at least", o.To, o.Share.Float64())
		}
	}
}

// The path names the rules that decided, and what became of the connection at
// each of them.
func TestTracePath(t *testing.T) {
	v := viewOf(t, theNode(), usual())
	tr := traceFrom(t, v, "203.0.113.200", "10.96.0.10:80")
	if got, want := tellTrace(tr), "dnat 1 masq=0.5, dnat 2 masq=0.5"; got != want {
		t.Fatalf("%s, want %s", got, want)
	}
	for i, o := range tr.Outcomes {
		var chains []string
		for _, s := range o.Path {
			if s.Chain.Base == nil || len(chains) == 0 || chains[len(chains)-1] != s.Chain.Name {
				chains = append(chains, s.Chain.Name)
			}
			if s.Index < s.Chain.Len() && iptables.RuleText(s.Table, s.Chain, s.Index) == "" {
				t.Error("a step without a rule")
			}
		}
		want := spell(fmt.Sprintf("PREROUTING KUBE-SERVICES SVC-a KUBE-MARK-MASQ SVC-a SEP-a-%d", i+1))
		if got := strings.Join(chains[:min(6, len(chains))], " "); got != want {
			t.Errorf("the path is %v, want %s", chains, want)
		}
		last := o.Path[len(o.Path)-1]
		if last.Share.Cmp(o.Share) != 0 {
			t.Errorf("the last step has the share %v, the outcome %v", last.Share.Exact(), o.Share.Exact())
		}
	}
	if s := tr.Outcomes[0].Path[5]; s.Effect.Kind != netfilter.Jump && s.Effect.Kind != netfilter.DNAT {
		t.Errorf("the sixth step is %+v", s)
	}
	policy := viewOf(t, theNode(), usual(), "*filter", "DROP FORWARD")
	tr = traceFrom(t, policy, "10.244.0.9", "10.96.0.10:80")
	if got := tellTrace(tr); got != "drop" {
		t.Fatalf("%s, want drop", got)
	}
	if s := tr.Outcomes[0].Path[len(tr.Outcomes[0].Path)-1]; s.Chain.Name != "FORWARD" || s.Index != s.Chain.Len() || s.Effect.Kind != netfilter.Drop {
		t.Errorf("the last step is %s %d, want the policy of FORWARD", s.Chain.Name, s.Index)
	}
}

// A chain of random rules: the shares are the products of the rules' own
// fractions, without any rounding, and add up to everything.
func TestRandomChains(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		n := 1 + r.IntN(40)
		var b strings.Builder
		b.WriteString(clusterIP("a", "10.96.0.10"))
		left := big.NewRat(1, 1)
		wants := map[netip.AddrPort]*big.Rat{}
		for range n {
			stored := r.Uint32N(1<<31 + 1)
			switch r.IntN(8) {
			case 0:
				stored = 0
			case 1:
				stored = 1
			case 2:
				stored = 1<<31 - 1
			case 3:
				if r.IntN(4) == 0 {
					stored = 1 << 31
				}
			}
			p := big.NewRat(int64(stored), 1<<31)
			rule := fmt.Sprintf("-m statistic --mode random --probability %.11f ", float64(stored)/(1<<31))
			switch r.IntN(8) {
			case 0:
				rule = strings.Replace(rule, "--prob", "! --prob", 1)
				p.Sub(big.NewRat(1, 1), p)
			case 1:
				every := 1 + r.IntN(9)
				rule = fmt.Sprintf("-m statistic --mode nth --every %d --packet 0 ", every)
				p = big.NewRat(1, int64(every))
			}
			// Some endpoints stand in several rules.
			k := 1 + r.IntN(n)
			taken := new(big.Rat).Mul(left, p)
			rest := new(big.Rat).Sub(left, taken)
			if tiny(taken) || tiny(rest) {
				continue
			}
			fmt.Fprintf(&b, "-A SVC-a %s-j KUBE-SEP-%016d\n", rule, k)
			to := podPort(fmt.Sprint(k))
			if wants[to] == nil {
				wants[to] = new(big.Rat)
				fmt.Fprintf(&b, "-A KUBE-SEP-%016d -p tcp -m tcp -j DNAT --to-destination %v\n", k, to)
			}
			wants[to].Add(wants[to], taken)
			left = rest
		}
		v := viewOf(t, theNode(), b.String())
		tr := traceFrom(t, v, "10.244.200.1", "10.96.0.10:80")
		sum, told := new(big.Rat), true
		for _, o := range tr.Outcomes {
			want := left
			if o.Verdict == chain.DNAT {
				want = wants[o.To]
				delete(wants, o.To)
			}
			if want == nil {
				t.Errorf("%v gets %v, want nothing, of:\n%s", o.To, o.Share.Float64(), b.String())
				continue
			}
			if f, _ := want.Float64(); o.Share.Float64()-f > 1e-15 || f-o.Share.Float64() > 1e-15 {
				t.Errorf("%v gets %v, want %v, of:\n%s", o.To, o.Share.Float64(), f, b.String())
			}
			// Of very many factors, only the number is told.
			got, ok := new(big.Rat).SetString(o.Share.Exact())
			if told = told && ok; !ok {
				continue
			}
			sum.Add(sum, got)
			if !same(got, want) {
				t.Errorf("%v gets %v, want %v, of:\n%s", o.To, got, want, b.String())
			}
		}
		for to, want := range wants {
			if want.Sign() != 0 {
				t.Errorf("%v gets nothing, want %v", to, want)
			}
		}
		if told && !same(sum, big.NewRat(1, 1)) {
			t.Errorf("the shares add up to %v", sum)
		}
	}
}

// tiny reports whether a share is beyond what is kept of shares: less than one
// connection in 2^100.
func tiny(share *big.Rat) bool {
	return share.Sign() != 0 && share.Cmp(new(big.Rat).SetFrac(big.NewInt(1), new(big.Int).Lsh(big.NewInt(1), 100))) < 0
}

// same reports whether two shares are equal, but for parts that are not kept.
func same(a, b *big.Rat) bool {
	d := new(big.Rat).Sub(a, b)
	return d.Sign() == 0 || tiny(d.Abs(d))
}

// wildRule is a rule of the generated chains below, and what it is to the
// evaluator: no part of the program under test takes part in the reference.
type wildRule struct {
	text   string
	holds  bool     // its matches but for chance
	chance *big.Rat // nil for always
	act    string   // "dnat", "accept", "return", "mark", "jump", "goto", "note"
	to     netip.AddrPort
	target int
}

// rest is where a part of the connections came to: dnat or accept, or "" for
// what came back, each with or without the mark.
type rest struct {
	act    string
	to     netip.AddrPort
	marked bool
}

// reckon adds the shares of what the rules of chain c from i on make of a
// share. It is exponential and obvious.
func reckon(chains [][]wildRule, c, i int, share *big.Rat, marked bool, out map[rest]*big.Rat) {
	if share.Sign() == 0 {
		return
	}
	settle := func(r rest) {
		if out[r] == nil {
			out[r] = new(big.Rat)
		}
		out[r].Add(out[r], share)
	}
	if i == len(chains[c]) {
		settle(rest{marked: marked})
		return
	}
	rule := chains[c][i]
	if !rule.holds {
		reckon(chains, c, i+1, share, marked, out)
		return
	}
	if rule.chance != nil {
		taken := new(big.Rat).Mul(share, rule.chance)
		reckon(chains, c, i+1, new(big.Rat).Sub(share, taken), marked, out)
		if share = taken; share.Sign() == 0 {
			return
		}
	}
	switch rule.act {
	case "dnat", "accept":
		settle(rest{rule.act, rule.to, marked})
	case "return":
		settle(rest{marked: marked})
	case "mark":
		reckon(chains, c, i+1, share, true, out)
	case "note":
		reckon(chains, c, i+1, share, marked, out)
	case "jump", "goto":
		inner := map[rest]*big.Rat{}
		reckon(chains, rule.target, 0, share, marked, inner)
		for r, s := range inner {
			switch {
			case r.act == "" && rule.act == "jump":
				reckon(chains, c, i+1, s, r.marked, out)
			default:
				share = s
				settle(r)
			}
		}
	}
}

// Chains that jump, go to and return at random, with chances and matches,
// compared with the reference.
func TestRandomRulesets(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for round := range 400 {
		long := round%4 == 0 // long enough for an index of rules
		chains := make([][]wildRule, 3+r.IntN(3))
		for c := range chains {
			n := r.IntN(6)
			if long && c < 2 {
				n = 26 + r.IntN(10)
			}
			for range n {
				chains[c] = append(chains[c], wild(r, c, len(chains), long))
			}
		}
		var b strings.Builder
		b.WriteString("*nat\n")
		for c, rules := range chains {
			name := "KUBE-SERVICES"
			if c > 0 {
				name = fmt.Sprintf("C%d", c)
				fmt.Fprintf(&b, ":%s\n", name)
			}
			for _, rule := range rules {
				fmt.Fprintf(&b, "-A %s %s\n", name, rule.text)
			}
		}
		wants := map[rest]*big.Rat{}
		reckon(chains, 0, 0, big.NewRat(1, 1), false, wants)
		// What reaches no endpoint: KUBE-FORWARD accepts it where it is marked.
		merged := map[string]*big.Rat{}
		for k, s := range wants {
			text := "none"
			switch {
			case k.act == "dnat":
				text = fmt.Sprintf("dnat %v %v", k.to, k.marked)
			case k.act == "accept" || k.marked:
				text = "accept"
			}
			if merged[text] == nil {
				merged[text] = new(big.Rat)
			}
			merged[text].Add(merged[text], s)
		}

		tr := traceFrom(t, viewOf(t, theNode(), b.String()), "203.0.113.200", "10.96.0.10:80")
		sum, told := new(big.Rat), true
		for _, o := range tr.Outcomes {
			text := string(o.Verdict)
			if o.Verdict == chain.DNAT {
				text = fmt.Sprintf("dnat %v %v", o.To, o.Masquerade)
			}
			want := merged[text]
			if want == nil {
				t.Errorf("%s gets %v, want nothing", text, o.Share.Float64())
				continue
			}
			f, _ := want.Float64()
			if d := o.Share.Float64() - f; d > 1e-15 || d < -1e-15 || o.Share.Cmp(o.Max) != 0 {
				t.Errorf("%s: %v to %v, want %v", text, o.Share.Float64(), o.Max.Float64(), f)
			}
			// Of very many factors, only the number is told.
			if got, ok := new(big.Rat).SetString(o.Share.Exact()); ok {
				sum.Add(sum, got)
				if !same(got, want) {
					t.Errorf("%s: exactly %v, want %v", text, got, want)
				}
			} else {
				told = false
			}
			delete(merged, text)
		}
		for text, want := range merged {
			if !tiny(want) {
				t.Errorf("%s is missing, want %v", text, want)
			}
		}
		if len(tr.Unknown)+len(tr.Broken) > 0 {
			t.Errorf("unknown %v, broken %v", tr.Unknown, tr.Broken)
		}
		if told && !same(sum, big.NewRat(1, 1)) {
			t.Errorf("the shares add up to %v", sum)
		}
		if t.Failed() {
			t.Fatalf("round %d:\n%s", round, b.String())
		}
	}
}

// wild makes a rule of chain c of n. In a long chain most rules do not match
// the packet from 203.0.113.200 to 10.96.0.10:80.
func wild(r *rand.Rand, c, n int, long bool) wildRule {
	w := wildRule{holds: true}
	var words []string
	match := func(text string, holds bool) {
		words = append(words, text)
		w.holds = w.holds && holds
	}
	if long && r.IntN(6) > 0 || r.IntN(5) == 0 {
		switch r.IntN(8) {
		case 0:
			match("-d 10.96.0.10/32 -p tcp -m tcp --dport 80", true)
		case 1:
			match("-d 10.96.0.11/32 -p tcp -m tcp --dport 80", false)
		case 2:
			match("! -d 10.96.0.11/32 -p tcp -m tcp --dport 80", true)
		case 3:
			match("-p tcp -m tcp --dport 80", true)
		case 4:
			match("-p udp -m udp --dport 80", false)
		case 5:
			match("-d 10.96.0.0/16 -p tcp -m tcp --dport 79:81", true)
		case 6:
			match("-p tcp -m tcp ! --dport 80", false)
		case 7:
			match("! -s 203.0.113.0/24 -d 10.96.0.10/32 -p tcp -m tcp --dport 80", false)
		}
	}
	if r.IntN(2) == 0 {
		stored := r.Uint32N(1<<31 + 1)
		if r.IntN(10) == 0 {
			stored = []uint32{0, 1, 1 << 31}[r.IntN(3)]
		}
		not := ""
		w.chance = big.NewRat(int64(stored), 1<<31)
		if r.IntN(4) == 0 {
			not = "! "
			w.chance.Sub(big.NewRat(1, 1), w.chance)
		}
		words = append(words, fmt.Sprintf("-m statistic --mode random %s--probability %.11f", not, float64(stored)/(1<<31)))
	}
	act := r.IntN(12)
	if c == n-1 && act < 4 {
		act = 4
	}
	switch act {
	case 0, 1, 2, 3:
		w.target = c + 1 + r.IntN(n-c-1)
		w.act = "jump"
		letter := "j"
		if act == 3 {
			w.act, letter = "goto", "g"
		}
		words = append(words, fmt.Sprintf("-%s C%d", letter, w.target))
	case 4, 5, 6:
		w.act = "dnat"
		w.to = podPort(fmt.Sprint(1 + r.IntN(4)))
		// DNAT is for a protocol only, and so are all of kube-proxy's.
		words = append(words, fmt.Sprintf("-j DNAT --to-destination %v", w.to))
	case 7:
		w.act = "return"
		words = append(words, "-j RETURN")
	case 8:
		w.act = "accept"
		words = append(words, "-j ACCEPT")
	case 9, 10:
		w.act = "mark"
		words = append(words, "-j KUBE-MARK-MASQ")
	default:
		w.act = "note"
		words = append(words, `-m comment --comment "only a note"`)
	}
	w.text = strings.Join(words, " ")
	return w
}
