package kubeproxy

import (
	"bufio"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// printer writes rules in the normal form of iptables-save: source,
// destination and protocol first, then the matches in the order in which
// kube-proxy writes them, then the target. That is why "-p tcp" and "-m tcp"
// stand apart, with the comment between them.
type printer struct {
	w      *bufio.Writer
	cfg    Config
	mark   string
	large  bool // more endpoints than the threshold: fewer comments
	prefix string
	probs  probabilities
}

func newPrinter(w io.Writer, cfg Config, endpoints int) *printer {
	pr := &printer{w: bufio.NewWriterSize(w, 1<<16), cfg: cfg, prefix: "-A "}
	if cfg.Counters {
		pr.prefix = "[0:0] -A "
	}
	mark := cfg.MasqueradeMark
	if mark == 0 {
		mark = DefaultMasqueradeMark
	}
	pr.mark = fmt.Sprintf("%#x", mark)
	threshold := cfg.LargeClusterThreshold
	if threshold == 0 {
		threshold = DefaultLargeClusterThreshold
	}
	pr.large = threshold > 0 && endpoints > threshold
	return pr
}

func (pr *printer) print(ports []port) error {
	pr.text("# Written by natlens in the form of iptables-save; not read from a kernel.\n")
	pr.mangle()
	pr.filter(ports)
	pr.nat(ports)
	return pr.w.Flush()
}

// text writes the parts one after the other. The writer keeps its first error
// and does nothing after it, so print needs to look only once, at the end.
func (pr *printer) text(parts ...string) {
	for _, s := range parts {
		_, _ = pr.w.WriteString(s)
	}
}

// rule writes one rule; the parts after the chain start with a space.
func (pr *printer) rule(chain string, parts ...string) {
	pr.text(pr.prefix, chain)
	pr.text(parts...)
	pr.text("\n")
}

func (pr *printer) table(name string, builtin ...string) {
	pr.text("*", name, "\n")
	for _, chain := range builtin {
		pr.text(":", chain, " ACCEPT [0:0]\n")
	}
}

func (pr *printer) declare(chains ...string) {
	for _, chain := range chains {
		pr.text(":", chain, " - [0:0]\n")
	}
}

func (pr *printer) commit() { pr.text("COMMIT\n") }

// mangle writes the one table without rules. Its chains only mark what runs on
// the node: each canary tells its owner that somebody flushed the tables, and
// the hint tells others which backend kubelet uses (kubelet_network_linux.go).
func (pr *printer) mangle() {
	pr.table("mangle", "PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
	if !pr.cfg.NoKubelet {
		pr.declare("KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY")
	}
	pr.declare("KUBE-PROXY-CANARY")
	pr.commit()
}

// localhostNodePorts is never true for IPv6: route_localnet has no IPv6 twin.
func (pr *printer) localhostNodePorts() bool {
	return pr.cfg.Family == IPv4 && !pr.cfg.NoLocalhostNodePorts
}

// host prints an address the way iptables-save does, with its full length.
func host(addr netip.Addr) string {
	return addr.String() + "/" + strconv.Itoa(addr.BitLen())
}

// comment prints a comment match; iptables-save quotes all of ours, since they
// contain a slash or a space.
func comment(parts ...string) string {
	return ` -m comment --comment "` + strings.Join(parts, "") + `"`
}

// dport prints the port match of a protocol, which stands after the comment.
func dport(protocol string, number uint16) string {
	return " -m " + protocol + " --dport " + strconv.Itoa(int(number))
}

func jump(target string) string { return " -j " + target }

const (
	ctNew     = " -m conntrack --ctstate NEW"
	markMasq  = " -j KUBE-MARK-MASQ"
	dstLocal  = " -m addrtype --dst-type LOCAL"
	srcLocal  = " -m addrtype --src-type LOCAL"
	drop      = " -j DROP"
	nodePorts = `kubernetes service nodeports; NOTE: this must be the last rule in this chain`
)

// nfacct prints the accounting match, with the second space iptables-save puts
// before the name.
func (pr *printer) nfacct(object string) string {
	if !pr.cfg.NFAcct {
		return ""
	}
	return " -m nfacct --nfacct-name  " + object
}

func (pr *printer) filter(ports []port) {
	pr.table("filter", "INPUT", "FORWARD", "OUTPUT")
	pr.declare("KUBE-EXTERNAL-SERVICES", "KUBE-FIREWALL", "KUBE-FORWARD")
	if !pr.cfg.NoKubelet {
		pr.declare("KUBE-KUBELET-CANARY")
	}
	pr.declare("KUBE-NODEPORTS", "KUBE-PROXY-CANARY", "KUBE-PROXY-FIREWALL", "KUBE-SERVICES")
	pr.filterJumps()
	for i := range ports {
		pr.refuseExternal(&ports[i])
	}
	pr.filterFixed()
	for i := range ports {
		if p := &ports[i]; p.HealthCheckNodePort != 0 {
			pr.rule("KUBE-NODEPORTS", " -p tcp", comment(p.name, " health check node port"),
				dport("tcp", p.HealthCheckNodePort), " -j ACCEPT")
		}
	}
	for i := range ports {
		pr.refuseByRange(&ports[i])
	}
	for i := range ports {
		pr.refuseInternal(&ports[i])
	}
	pr.commit()
}

// filterJumps writes the jumps in the order a node has them. kube-proxy
// prepends each one, so a node has them in the reverse order of
// iptablesJumpChains in proxier.go.
func (pr *printer) filterJumps() {
	firewall := []string{ctNew, comment("kubernetes load balancer firewall"), " -j KUBE-PROXY-FIREWALL"}
	external := []string{ctNew, comment("kubernetes externally-visible service portals"), " -j KUBE-EXTERNAL-SERVICES"}
	services := []string{ctNew, comment("kubernetes service portals"), " -j KUBE-SERVICES"}

	pr.rule("INPUT", " -j KUBE-FIREWALL")
	pr.rule("INPUT", firewall...)
	pr.rule("INPUT", comment("kubernetes health check service ports"), " -j KUBE-NODEPORTS")
	pr.rule("INPUT", external...)
	pr.rule("FORWARD", firewall...)
	pr.rule("FORWARD", comment("kubernetes forwarding rules"), " -j KUBE-FORWARD")
	pr.rule("FORWARD", services...)
	pr.rule("FORWARD", external...)
	pr.rule("OUTPUT", " -j KUBE-FIREWALL")
	pr.rule("OUTPUT", firewall...)
	pr.rule("OUTPUT", services...)
}

// filterFixed writes the chains that do not depend on Services.
func (pr *printer) filterFixed() {
	// kubelet writes this rule too; either is enough. The IPv6 chain is empty,
	// since it is route_localnet that makes the rule necessary.
	if pr.localhostNodePorts() || pr.cfg.Family == IPv4 && !pr.cfg.NoKubelet {
		pr.rule("KUBE-FIREWALL", " ! -s 127.0.0.0/8 -d 127.0.0.0/8", comment("block incoming localnet connections"),
			" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT", drop)
	}
	if !pr.cfg.ConntrackBeLiberal {
		pr.rule("KUBE-FORWARD", " -m conntrack --ctstate INVALID", pr.nfacct("ct_state_invalid_dropped_pkts"), drop)
	}
	pr.rule("KUBE-FORWARD", comment("kubernetes forwarding rules"), " -m mark --mark ", pr.mark, "/", pr.mark, " -j ACCEPT")
	pr.rule("KUBE-FORWARD", comment("kubernetes forwarding conntrack rule"),
		" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT")
}

// refusal returns the comment and the target for traffic no endpoint serves:
// rejected when there is none at all, dropped when there are some elsewhere,
// because then another node serves it.
func (pr *printer) refusal(p *port) (note, target string) {
	switch {
	case p.hasEndpoints:
		return comment(p.name, " has no local endpoints"), drop
	case pr.cfg.Family == IPv6:
		return comment(p.name, " has no endpoints"), " -j REJECT --reject-with icmp6-port-unreachable"
	default:
		return comment(p.name, " has no endpoints"), " -j REJECT --reject-with icmp-port-unreachable"
	}
}

func (pr *printer) refuseInternal(p *port) {
	if p.hasInternal {
		return
	}
	note, target := pr.refusal(p)
	pr.rule("KUBE-SERVICES", " -d ", host(p.ClusterIP), " -p ", p.protocol, note, dport(p.protocol, p.PortNumber), target)
}

func (pr *printer) refuseExternal(p *port) {
	if p.hasExternal {
		return
	}
	note, target := pr.refusal(p)
	for _, ips := range [][]netip.Addr{p.externalIPs, p.loadBalancerIPs} {
		for _, ip := range ips {
			pr.rule("KUBE-EXTERNAL-SERVICES", " -d ", host(ip), " -p ", p.protocol, note,
				dport(p.protocol, p.PortNumber), target)
		}
	}
	if p.NodePort != 0 {
		pr.rule("KUBE-EXTERNAL-SERVICES", " -p ", p.protocol, note, dstLocal, dport(p.protocol, p.NodePort), target)
	}
}

// refuseByRange drops what KUBE-FW let fall through: a packet it sent to an
// endpoint no longer has the load balancer's address here.
func (pr *printer) refuseByRange(p *port) {
	if !p.usesFirewall {
		return
	}
	for _, ip := range p.loadBalancerIPs {
		pr.rule("KUBE-PROXY-FIREWALL", " -d ", host(ip), " -p ", p.protocol,
			comment(p.name, " traffic not accepted by ", p.firewallChain()), dport(p.protocol, p.PortNumber), drop)
	}
}

// chain is a chain of the nat table and what writes its rules; nil for none.
type chain struct {
	name  string
	rules func(*printer, chain)
	port  *port     // of a Service's chain
	ep    *endpoint // of a KUBE-SEP chain
}

// nat writes the nat table. iptables-save prints chains and their rules sorted
// by name with either backend.
func (pr *printer) nat(ports []port) {
	chains := pr.natChains(ports)
	sorted := slices.SortedFunc(slices.Values(chains), func(a, b chain) int { return strings.Compare(a.name, b.name) })
	if !pr.cfg.SyncOrder {
		chains = sorted
	}
	pr.table("nat", "PREROUTING", "INPUT", "OUTPUT", "POSTROUTING")
	for i := range chains {
		pr.declare(chains[i].name)
	}
	pr.rule("PREROUTING", comment("kubernetes service portals"), " -j KUBE-SERVICES")
	pr.rule("OUTPUT", comment("kubernetes service portals"), " -j KUBE-SERVICES")
	pr.rule("POSTROUTING", comment("kubernetes postrouting rules"), " -j KUBE-POSTROUTING")
	for _, c := range sorted {
		if c.rules != nil {
			c.rules(pr, c)
		}
	}
	pr.commit()
}

// natChains returns all chains of the nat table, those of the Services in the
// order in which syncProxyRules declares them.
func (pr *printer) natChains(ports []port) []chain {
	n := 6
	for i := range ports {
		n += 4 + len(ports[i].reachable)
	}
	chains := append(make([]chain, 0, n),
		chain{name: "KUBE-MARK-MASQ", rules: (*printer).markMasq},
		chain{name: "KUBE-NODEPORTS", rules: func(pr *printer, _ chain) { pr.nodePorts(ports) }},
		chain{name: "KUBE-POSTROUTING", rules: (*printer).postrouting},
		chain{name: "KUBE-PROXY-CANARY"},
		chain{name: "KUBE-SERVICES", rules: func(pr *printer, _ chain) { pr.services(ports) }},
	)
	if !pr.cfg.NoKubelet {
		chains = append(chains, chain{name: "KUBE-KUBELET-CANARY"})
	}
	for i := range ports {
		p := &ports[i]
		if p.usesExternal {
			chains = append(chains, chain{p.externalChain(), (*printer).external, p, nil})
		}
		if p.usesFirewall {
			chains = append(chains, chain{p.firewallChain(), (*printer).firewall, p, nil})
		}
		if len(p.cluster) > 0 {
			chains = append(chains, chain{p.clusterChain(), (*printer).cluster, p, nil})
		}
		if len(p.local) > 0 {
			chains = append(chains, chain{p.localChain(), (*printer).local, p, nil})
		}
		for _, ep := range p.reachable {
			chains = append(chains, chain{ep.chain, (*printer).endpoint, p, ep})
		}
	}
	return chains
}

func (pr *printer) markMasq(c chain) {
	pr.rule(c.name, " -j MARK --set-xmark ", pr.mark, "/", pr.mark)
}

// postrouting masquerades marked packets and clears the mark, so that a packet
// passing the stack a second time is not masqueraded again.
func (pr *printer) postrouting(c chain) {
	masquerade := " -j MASQUERADE --random-fully"
	if pr.cfg.NoRandomFully {
		masquerade = " -j MASQUERADE"
	}
	pr.rule(c.name, " -m mark ! --mark ", pr.mark, "/", pr.mark, " -j RETURN")
	pr.rule(c.name, " -j MARK --set-xmark ", pr.mark, "/0x0")
	pr.rule(c.name, comment("kubernetes service traffic requiring SNAT"), masquerade)
}

func (pr *printer) nodePorts(ports []port) {
	for i := range ports {
		p := &ports[i]
		if p.NodePort == 0 || !p.hasEndpoints {
			continue
		}
		note, match, target := comment(p.name), dport(p.protocol, p.NodePort), jump(p.externalChain())
		// The twin does nothing but count, so it comes only with the counter.
		if pr.cfg.NFAcct && pr.localhostNodePorts() {
			pr.rule("KUBE-NODEPORTS", " -d 127.0.0.0/8 -p ", p.protocol, note, match,
				pr.nfacct("localhost_nps_accepted_pkts"), target)
		}
		pr.rule("KUBE-NODEPORTS", " -p ", p.protocol, note, match, target)
	}
}

func (pr *printer) services(ports []port) {
	for i := range ports {
		p := &ports[i]
		match := dport(p.protocol, p.PortNumber)
		capture := func(ip netip.Addr, what, chain string) {
			pr.rule("KUBE-SERVICES", " -d ", host(ip), " -p ", p.protocol, comment(p.name, what), match, jump(chain))
		}
		if p.hasInternal {
			capture(p.ClusterIP, " cluster IP", p.internalChain())
		}
		if !p.hasEndpoints {
			continue
		}
		for _, ip := range p.externalIPs {
			capture(ip, " external IP", p.externalChain())
		}
		for _, ip := range p.loadBalancerIPs {
			capture(ip, " loadbalancer IP", p.loadBalancerChain())
		}
	}
	pr.nodePortJumps()
}

func (pr *printer) nodePortJumps() {
	const to = " -j KUBE-NODEPORTS"
	if len(pr.cfg.NodePortAddresses) == 0 {
		except := ""
		if pr.cfg.Family == IPv6 {
			except = " ! -d ::1/128"
		} else if !pr.localhostNodePorts() {
			except = " ! -d 127.0.0.0/8"
		}
		pr.rule("KUBE-SERVICES", except, comment(nodePorts), dstLocal, to)
		return
	}
	for _, ip := range pr.cfg.NodePortAddresses {
		if ip.IsLoopback() && !pr.localhostNodePorts() {
			continue
		}
		pr.rule("KUBE-SERVICES", " -d ", host(ip), comment(nodePorts), to)
	}
}

// external writes KUBE-EXT, where a Local policy makes the endpoints depend on
// where the packet comes from.
func (pr *printer) external(c chain) {
	p := c.port
	if !p.ExternalLocal {
		pr.rule(c.name, comment("masquerade traffic for ", p.name, " external destinations"), markMasq)
	} else {
		if pr.cfg.PodCIDR.IsValid() {
			pr.rule(c.name, " -s ", pr.cfg.PodCIDR.Masked().String(),
				comment("pod traffic for ", p.name, " external destinations"), jump(p.clusterChain()))
		}
		pr.rule(c.name, comment("masquerade LOCAL traffic for ", p.name, " external destinations"), srcLocal, markMasq)
		pr.rule(c.name, comment("route LOCAL traffic for ", p.name, " external destinations"), srcLocal, jump(p.clusterChain()))
	}
	switch {
	case !p.hasExternal:
		// Falls through; the filter table drops it.
	case p.ExternalLocal:
		pr.rule(c.name, jump(p.localChain()))
	default:
		pr.rule(c.name, jump(p.clusterChain()))
	}
}

// firewall writes KUBE-FW. Its last rule has no target and does nothing.
func (pr *printer) firewall(c chain) {
	p := c.port
	note, target := comment(p.name, " loadbalancer IP"), jump(p.externalChain())
	fromNode := false
	for _, r := range p.sourceRanges {
		pr.rule(c.name, " -s ", r.String(), note, target)
		fromNode = fromNode || r.Contains(pr.cfg.NodeIP)
	}
	// A node that holds the load balancer's address uses it as its source.
	if fromNode {
		for _, ip := range p.loadBalancerIPs {
			pr.rule(c.name, " -s ", host(ip), note, target)
		}
	}
	pr.rule(c.name, comment("other traffic to ", p.name, " will be dropped by KUBE-PROXY-FIREWALL"))
}

func (pr *printer) cluster(c chain) {
	if !c.port.InternalLocal {
		pr.masqueradeInternal(c)
	}
	pr.choose(c, c.port.cluster)
}

func (pr *printer) local(c chain) {
	if c.port.InternalLocal {
		pr.masqueradeInternal(c)
	}
	pr.choose(c, c.port.local)
}

// masqueradeInternal marks traffic to the cluster IP that does not come from a
// pod. It is in the chain the cluster IP leads to, whichever that is.
func (pr *printer) masqueradeInternal(c chain) {
	from := ""
	if !pr.cfg.MasqueradeAll {
		if !pr.cfg.PodCIDR.IsValid() {
			return
		}
		from = " ! -s " + pr.cfg.PodCIDR.Masked().String()
	}
	p := c.port
	pr.rule(c.name, from, " -d ", host(p.ClusterIP), " -p ", p.protocol, comment(p.name, " cluster IP"),
		dport(p.protocol, p.PortNumber), markMasq)
}

// choose writes the choice among endpoints (writeServiceToEndpointRules): first
// the clients known by affinity, then each endpoint with its share of what the
// rules before it left over.
func (pr *printer) choose(c chain, eps []*endpoint) {
	if c.port.AffinitySeconds > 0 {
		seconds := strconv.Itoa(c.port.AffinitySeconds)
		for _, ep := range eps {
			pr.rule(c.name, pr.endpointComment(c.port, ep), " -m recent --rcheck --seconds ", seconds,
				" --reap --name ", ep.chain, pr.recentBySource(), " -j ", ep.chain)
		}
	}
	for i, ep := range eps {
		if left := len(eps) - i; left > 1 {
			pr.rule(c.name, pr.endpointComment(c.port, ep), " -m statistic --mode random --probability ", pr.probs.of(left),
				" -j ", ep.chain)
		} else {
			pr.rule(c.name, pr.endpointComment(c.port, ep), " -j ", ep.chain)
		}
	}
}

// endpoint writes KUBE-SEP: a client that reaches itself is masqueraded,
// everyone is sent to the endpoint.
func (pr *printer) endpoint(c chain) {
	note, affinity := "", ""
	if !pr.large {
		note = comment(c.port.name)
	}
	if c.port.AffinitySeconds > 0 {
		affinity = " -m recent --set --name " + c.name + pr.recentBySource()
	}
	pr.rule(c.name, " -s ", host(c.ep.addr), note, markMasq)
	pr.rule(c.name, " -p ", c.port.protocol, note, affinity, " -m ", c.port.protocol, " -j DNAT --to-destination ", c.ep.to)
}

// endpointComment is the comment of a jump to an endpoint, which kube-proxy
// saves in large clusters (appendServiceCommentLocked).
func (pr *printer) endpointComment(p *port, ep *endpoint) string {
	if pr.large {
		return ""
	}
	return comment(p.name, " -> ", ep.to)
}

// recentBySource is what iptables adds to every recent match: the list holds
// whole source addresses.
func (pr *printer) recentBySource() string {
	if pr.cfg.Family == IPv6 {
		return " --mask ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff --rsource"
	}
	return " --mask 255.255.255.255 --rsource"
}
