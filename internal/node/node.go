// Package node tells what the rules may ask about the machine that the agent
// runs on: its addresses, and how its kernel routes.
package node

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/natlens/natlens/pkg/chain"
)

// Discover asks the network namespace that the agent runs in. Pod ranges stay
// empty: kube-proxy's rules name them.
func Discover() (chain.Node, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return chain.Node{}, fmt.Errorf("reading this node's addresses: %w", err)
	}
	n := chain.Node{NoRouteLocalnet: !routeLocalnet()}
	for _, name := range chain.TellingLinks {
		if _, err := net.InterfaceByName(name); err == nil {
			n.Links = append(n.Links, name)
		}
	}
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		// An IPv6 link-local address is no Service's, and each pod's interface has
		// one; an IPv4 one may well be, such as a node-local DNS cache's.
		if err == nil && !p.Addr().IsLoopback() && !(p.Addr().Is6() && p.Addr().IsLinkLocalUnicast()) {
			n.Local = append(n.Local, p.Addr().Unmap())
			n.Networks = append(n.Networks, p.Masked())
		}
	}
	// Link-local ones are local too, but nobody's main address.
	slices.SortStableFunc(n.Local, func(a, b netip.Addr) int {
		switch la, lb := a.IsLinkLocalUnicast(), b.IsLinkLocalUnicast(); {
		case la == lb:
			return 0
		case lb:
			return -1
		}
		return 1
	})
	for _, probe := range []string{"192.0.2.1:9", "[2001:db8::1]:9"} {
		n.Local = first(n.Local, sourceFor(probe))
	}
	return n, nil
}

// sourceFor returns the address that this node would use to reach another: its
// main one. Connecting a UDP socket sends nothing.
func sourceFor(to string) netip.Addr {
	c, err := net.Dial("udp", to)
	if err != nil {
		return netip.Addr{}
	}
	defer c.Close()
	ap, err := netip.ParseAddrPort(c.LocalAddr().String())
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap()
}

// first moves an address to the front of a list that holds it.
func first(list []netip.Addr, a netip.Addr) []netip.Addr {
	i := slices.Index(list, a)
	if i < 0 {
		return list
	}
	return append([]netip.Addr{a}, slices.Delete(list, i, i+1)...)
}

// routeLocalnet reports whether any interface may route 127.0.0.0/8, which
// NodePorts on localhost need. Without the sysctl it says yes: the rules decide.
func routeLocalnet() bool {
	files, _ := filepath.Glob("/proc/sys/net/ipv4/conf/*/route_localnet")
	if len(files) == 0 {
		return true
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) != "0" {
			return true
		}
	}
	return false
}
