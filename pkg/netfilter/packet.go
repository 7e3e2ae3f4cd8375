package netfilter

import (
	"fmt"
	"net/netip"
	"strings"
)

// Family is an address family of rules and packets.
type Family uint8

// The families that kube-proxy writes rules for.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// FamilyOf returns the family of an address. An IPv4-mapped IPv6 address is one
// of IPv6, as it is for the rules.
func FamilyOf(a netip.Addr) Family {
	if a.Is4() {
		return IPv4
	}
	return IPv6
}

// String returns "ipv4" or "ipv6".
func (f Family) String() string {
	if f == IPv6 {
		return "ipv6"
	}
	return "ipv4"
}

// Protocol is an IANA transport protocol number.
type Protocol uint8

// The protocols of the Kubernetes Service API.
const (
	TCP  Protocol = 6
	UDP  Protocol = 17
	SCTP Protocol = 132
)

// ParseProtocol reads "tcp", "udp" or "sctp" in any case.
func ParseProtocol(s string) (Protocol, error) {
	switch strings.ToLower(s) {
	case "tcp":
		return TCP, nil
	case "udp":
		return UDP, nil
	case "sctp":
		return SCTP, nil
	}
	return 0, fmt.Errorf("unknown protocol %q: want tcp, udp or sctp", s)
}

// String returns the name as the Kubernetes API writes it, such as "TCP", or
// the number of a protocol that Services do not use.
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "TCP"
	case UDP:
		return "UDP"
	case SCTP:
		return "SCTP"
	}
	return fmt.Sprintf("%d", uint8(p))
}

// Hook is a place in the kernel's packet path where base chains run
// (enum nf_inet_hooks in linux/netfilter.h).
type Hook uint8

// The hooks, in the kernel's numbering.
const (
	Prerouting Hook = iota
	Input
	Forward
	Output
	Postrouting
)

// String returns the name of the hook's iptables chain.
func (h Hook) String() string {
	return [...]string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}[h]
}

// Packet is the first packet of a new connection, at the moment it enters
// netfilter: nat rules see no other.
type Packet struct {
	Source      netip.Addr
	Destination netip.Addr
	Port        uint16 // destination port
	Protocol    Protocol
	// FromHost says that a process on this node sends it: it enters at OUTPUT,
	// and has no input interface. Others enter at PREROUTING.
	FromHost bool
	// In is the interface that it arrives on; empty when not known.
	In string
}
