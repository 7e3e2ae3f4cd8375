package kube

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
)

// The addresses of a cluster. Clusters beside each other may all have the same:
// nothing of them is on the network of this machine.
//
// control is the router as well. It has a route to every node's pods, and sends
// LoadBalancers to the first node, which [Cluster.Route] changes.
var (
	PodRanges          = []netip.Prefix{netip.MustParsePrefix("10.52.0.0/16"), netip.MustParsePrefix("fd00:52::/48")}
	ServiceRanges      = []netip.Prefix{netip.MustParsePrefix("10.56.0.0/16"), netip.MustParsePrefix("fd00:56::/112")}
	LoadBalancerRanges = []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("2001:db8:18::/64")}
	ExternalRanges     = []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8:19::/64")}

	controlAddrs = []netip.Addr{netip.MustParseAddr("10.146.0.1"), netip.MustParseAddr("fd00:146::1")}
	routerAddrs  = []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8:2::1")}
	OutsideAddrs = []netip.Addr{netip.MustParseAddr("192.0.2.10"), netip.MustParseAddr("2001:db8:2::10")}
)

// bits is the length of the prefix of an ordinary network of the address's family.
func bits(a netip.Addr) int {
	if a.Is4() {
		return 24
	}
	return 64
}

// nodeAddrs returns the addresses of the i-th node, from 0.
func nodeAddrs(i int) []netip.Addr {
	return []netip.Addr{
		netip.AddrFrom4([4]byte{10, 146, 0, byte(2 + i)}),
		netip.MustParseAddr(fmt.Sprintf("fd00:146::%x", 2+i)),
	}
}

// podCIDRs returns the ranges of pods of the i-th node, from 0.
func podCIDRs(i int) []netip.Prefix {
	return []netip.Prefix{
		netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 52, byte(1 + i), 0}), 24),
		netip.MustParsePrefix(fmt.Sprintf("fd00:52:0:%x::/64", 1+i)),
	}
}

// wire joins the boxes.
func (c *Cluster) wire(ctx context.Context) error {
	// Nodes refuse by ICMP as often as they are asked; the limit is there to be
	// nice to a network, and would look like a rule that drops.
	sysctls := []string{
		"net/ipv4/ip_forward 1", "net/ipv6/conf/all/forwarding 1", "net/ipv4/icmp_ratelimit 0", "net/ipv6/icmp/ratelimit 0",
		"net/ipv4/conf/all/rp_filter 0", "net/ipv4/conf/default/rp_filter 0",
		"net/ipv6/conf/all/accept_dad 0", "net/ipv6/conf/default/accept_dad 0",
	}
	control := []string{"link add nodes type bridge", "link set nodes up"}
	for _, a := range controlAddrs {
		control = append(control, fmt.Sprintf("addr add %s/%d dev nodes nodad", a, bits(a)))
	}
	control = append(control, fmt.Sprintf("link add outside type veth peer name eth0 netns %d", c.Outside.first.PID()), "link set outside up")
	var outside []string
	outside = append(outside, "link set eth0 up")
	for i, a := range OutsideAddrs {
		control = append(control, fmt.Sprintf("addr add %s/%d dev outside nodad", routerAddrs[i], bits(a)))
		outside = append(outside, fmt.Sprintf("addr add %s/%d dev eth0 nodad", a, bits(a)), fmt.Sprintf("route add default via %s", routerAddrs[i]))
	}
	lines := map[*Box][]string{c.Control: control, c.Outside: outside}
	for _, n := range c.Nodes {
		lines[c.Control] = append(lines[c.Control],
			fmt.Sprintf("link add %s type veth peer name eth0 netns %d", n.Name, n.first.PID()),
			fmt.Sprintf("link set %s master nodes up", n.Name))
		lines[n.Box] = append(lines[n.Box], "link set eth0 up")
		for f, a := range n.Addrs {
			lines[n.Box] = append(lines[n.Box], fmt.Sprintf("addr add %s/%d dev eth0 nodad", a, bits(a)), fmt.Sprintf("route add default via %s", controlAddrs[f]))
		}
	}
	for _, n := range c.Nodes { // when all have addresses
		for f, a := range n.Addrs {
			for _, b := range c.Boxes() {
				if b != n.Box && b != c.Outside {
					lines[b] = append(lines[b], fmt.Sprintf("route add %s via %s", n.PodCIDRs[f], a))
				}
			}
		}
	}
	for _, b := range c.Boxes() {
		var script strings.Builder
		for _, s := range sysctls {
			name, value, _ := strings.Cut(s, " ")
			fmt.Fprintf(&script, "echo %s > /proc/sys/%s\n", value, name)
		}
		if _, err := b.Output(ctx, "sh", "-ec", script.String()); err != nil {
			return fmt.Errorf("network of %s: %w", b.Name, err)
		}
	}
	// control first: it makes the others' interfaces.
	for _, b := range c.Boxes() {
		if err := ipBatch(ctx, b.Netns, lines[b]); err != nil {
			return fmt.Errorf("network of %s: %w", b.Name, err)
		}
	}
	return c.Route(ctx, c.Nodes[0], slices.Concat(LoadBalancerRanges, ExternalRanges)...)
}

// Route sends what comes from outside for these addresses to a node, as a load
// balancer or a router announcing them would. IPv6 needs a node with IPv6.
func (c *Cluster) Route(ctx context.Context, n *Node, to ...netip.Prefix) error {
	var lines []string
	for _, p := range to {
		for _, a := range n.Addrs {
			if a.Is4() == p.Addr().Is4() {
				lines = append(lines, fmt.Sprintf("route replace %s via %s", p, a))
			}
		}
	}
	return ipBatch(ctx, c.Control.Netns, lines)
}

// ipBatch runs lines of ip in a namespace.
func ipBatch(ctx context.Context, n Netns, lines []string) error {
	_, err := output(ctx, func(cmd *exec.Cmd) error {
		cmd.Stdin = strings.NewReader(strings.Join(lines, "\n"))
		return n.Start(cmd)
	}, "ip", "-batch", "-")
	return err
}
