package chain

import (
	"net/netip"
	"slices"

	"github.com/natlens/natlens/pkg/netfilter"
)

// Class is a class of sources. The rules treat all of one class alike, as far
// as they do not ask for particular addresses.
type Class string

// The source classes, as the node sees them.
const (
	Pod      Class = "pod"      // a pod on this node
	Host     Class = "node"     // a process in the node's own network namespace
	External Class = "external" // anything that comes from another machine
)

// Classes are all source classes, in the order in which they are printed.
var Classes = []Class{Pod, Host, External}

// Node is what the rules ask about the node itself.
type Node struct {
	// Local are the addresses of the node's own interfaces, the main one of
	// each family first. Loopback addresses are local without being listed.
	// Without any, an address that no rule names stands for the node's.
	Local []netip.Addr
	// PodCIDRs are the address ranges, and PodInterfaces the interfaces ("cni0",
	// or "veth+" for all that begin so), of the pods on this node. Without any,
	// those that kube-proxy's own rules name are used.
	PodCIDRs      []netip.Prefix
	PodInterfaces []string
	// Networks are the subnets of the node's interfaces. One within a pod range
	// is the part of it that this node's pods have.
	Networks []netip.Prefix
	// NoRouteLocalnet says that the sysctl route_localnet is off, so that the
	// kernel drops what nat sends from 127.0.0.0/8 off the loopback interface.
	NoRouteLocalnet bool
	// Links are the interfaces of the node that are among [TellingLinks], sorted.
	// They only serve to say who handles Services, if not these rules.
	Links []string
}

func (n *Node) hasLink(name string) bool { return slices.Contains(n.Links, name) }

// isLocal reports whether the node's routing table calls an address LOCAL.
func (n *Node) isLocal(a netip.Addr) bool {
	if a.IsLoopback() {
		return true
	}
	for _, l := range n.Local {
		if l == a {
			return true
		}
	}
	return false
}

func (n *Node) isPodInterface(name []byte) bool {
	for _, i := range n.PodInterfaces {
		if i == string(name) {
			return true
		}
	}
	return false
}

func (n *Node) isPod(a netip.Addr) bool {
	for _, p := range n.PodCIDRs {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// address returns the node's main address of a family.
func (n *Node) address(f netfilter.Family) netip.Addr {
	for _, a := range n.Local {
		if netfilter.FamilyOf(a) == f && !a.IsLoopback() {
			return a
		}
	}
	return loopback(f)
}

func loopback(f netfilter.Family) netip.Addr {
	if f == netfilter.IPv6 {
		return netip.IPv6Loopback()
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

// classOf returns the class of a source address.
func (n *Node) classOf(a netip.Addr) Class {
	switch {
	case n.isLocal(a):
		return Host
	case n.isPod(a):
		return Pod
	}
	return External
}
