package iptables

import (
	"github.com/natlens/natlens/pkg/netfilter"
)

// builtin maps table and chain to the hook that the kernel ties the chain to,
// and its priority (enum nf_ip_hook_priorities in linux/netfilter_ipv4.h).
var builtin = map[string]map[string]netfilter.Base{
	"raw": {
		"PREROUTING": {Hook: netfilter.Prerouting, Priority: -300},
		"OUTPUT":     {Hook: netfilter.Output, Priority: -300},
	},
	"mangle": {
		"PREROUTING":  {Hook: netfilter.Prerouting, Priority: -150},
		"INPUT":       {Hook: netfilter.Input, Priority: -150},
		"FORWARD":     {Hook: netfilter.Forward, Priority: -150},
		"OUTPUT":      {Hook: netfilter.Output, Priority: -150},
		"POSTROUTING": {Hook: netfilter.Postrouting, Priority: -150},
	},
	"nat": {
		"PREROUTING":  {Hook: netfilter.Prerouting, Priority: -100, Type: netfilter.TypeNAT},
		"OUTPUT":      {Hook: netfilter.Output, Priority: -100, Type: netfilter.TypeNAT},
		"INPUT":       {Hook: netfilter.Input, Priority: 100, Type: netfilter.TypeNAT},
		"POSTROUTING": {Hook: netfilter.Postrouting, Priority: 100, Type: netfilter.TypeNAT},
	},
	"filter": {
		"INPUT":   {Hook: netfilter.Input},
		"FORWARD": {Hook: netfilter.Forward},
		"OUTPUT":  {Hook: netfilter.Output},
	},
	"security": {
		"INPUT":   {Hook: netfilter.Input, Priority: 50},
		"FORWARD": {Hook: netfilter.Forward, Priority: 50},
		"OUTPUT":  {Hook: netfilter.Output, Priority: 50},
	},
}

// protocols are the names that iptables-save prints for -p.
var protocols = map[string]uint8{
	"icmp": 1, "igmp": 2, "ggp": 3, "ipencap": 4, "st": 5, "tcp": 6, "egp": 8, "igp": 9, "pup": 12, "udp": 17, "hmp": 20,
	"xns-idp": 22, "rdp": 27, "iso-tp4": 29, "dccp": 33, "xtp": 36, "ddp": 37, "idpr-cmtp": 38, "ipv6": 41,
	"ipv6-route": 43, "ipv6-frag": 44, "idrp": 45, "rsvp": 46, "gre": 47, "esp": 50, "ah": 51, "skip": 57,
	"ipv6-icmp": 58, "icmpv6": 58, "ipv6-nonxt": 59, "ipv6-opts": 60, "rspf": 73, "vmtp": 81, "eigrp": 88, "ospf": 89,
	"ax.25": 93, "ipip": 94, "etherip": 97, "encap": 98, "pim": 103, "ipcomp": 108, "vrrp": 112, "l2tp": 115,
	"isis": 124, "sctp": 132, "fc": 133, "mobility-header": 135, "mh": 135, "udplite": 136, "mpls-in-ip": 137,
	"manet": 138, "hip": 139, "shim6": 140, "wesp": 141, "rohc": 142, "ethernet": 143,
}

var protocolNames = func() map[uint32]string {
	m := make(map[uint32]string, len(protocols))
	for name, n := range protocols {
		if name != "icmpv6" && name != "mh" {
			m[uint32(n)] = name
		}
	}
	return m
}()

// addrTypes are the names of addrtype, at the bit that netfilter.SourceType
// and netfilter.DestinationType use.
var addrTypes = []string{
	"UNSPEC", "UNICAST", "LOCAL", "BROADCAST", "ANYCAST", "MULTICAST",
	"BLACKHOLE", "UNREACHABLE", "PROHIBIT", "THROW", "NAT", "XRESOLVE",
}

// ctStates are the names of conntrack --ctstate, at their netfilter.CT bit.
var ctStates = []string{"INVALID", "NEW", "RELATED", "ESTABLISHED", "UNTRACKED", "SNAT", "DNAT"}

// tcpFlags are the names of tcp --tcp-flags, at the bit of the TCP header.
var tcpFlags = []string{"FIN", "SYN", "RST", "PSH", "ACK", "URG"}

// noEffect are the targets that change nothing a Service's traffic depends on,
// and let the packet go on to the next rule.
var noEffect = map[string]bool{
	"LOG": true, "NFLOG": true, "ULOG": true, "TRACE": true, "AUDIT": true, "LED": true, "TEE": true,
	"TCPMSS": true, "TCPOPTSTRIP": true, "TOS": true, "DSCP": true, "TTL": true, "HL": true, "ECN": true,
	"CLASSIFY": true, "SET": true, "CHECKSUM": true, "SECMARK": true, "CONNSECMARK": true, "RATEEST": true,
	"IDLETIMER": true, "CT": true,
}

// unknownTargets are extensions that exist, but whose effect on a Service's
// traffic cannot be told from the rule.
var unknownTargets = map[string]bool{
	"HMARK": true, "TPROXY": true, "SYNPROXY": true, "NETMAP": true, "CLUSTERIP": true, "DNPT": true, "SNPT": true,
}
