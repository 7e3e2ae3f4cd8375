package kubeproxy

import (
	"fmt"
	"net/netip"
)

// kind is a sort of Service in the made-up cluster.
type kind int

const (
	plain kind = iota // a TCP port with a cluster IP only
	udp
	nodePort
	loadBalancer
	loadBalancerLocal
	loadBalancerRanges
	externalIP
	affinity
	noEndpoints
)

// special are the 22 of each 100 Services that are not plain. They are mixed
// so that already a few Services show most of the forms; each stands at every
// fourth place.
var special = [...]kind{
	nodePort, udp, loadBalancer, affinity, loadBalancerLocal, noEndpoints,
	nodePort, loadBalancerRanges, udp, externalIP, nodePort, loadBalancer,
	nodePort, udp, nodePort, affinity, loadBalancerLocal, nodePort,
	udp, loadBalancer, nodePort, udp,
}

// The ranges the made-up cluster takes its addresses from. SyntheticPodCIDR and
// SyntheticNodeIP suit Config.
var (
	// SyntheticPodCIDR contains all endpoints of Synthetic.
	SyntheticPodCIDR = netip.MustParsePrefix("10.128.0.0/9")
	// SyntheticServiceCIDR contains all cluster IPs of Synthetic.
	SyntheticServiceCIDR = netip.MustParsePrefix("10.96.0.0/12")
	// SyntheticNodeIP is the address of the node Synthetic's rules are for.
	SyntheticNodeIP = netip.MustParseAddr("192.0.2.10")

	syntheticLoadBalancers = netip.MustParsePrefix("198.18.0.0/16")
	syntheticExternals     = netip.MustParsePrefix("198.19.0.0/16")
)

// The default --service-node-port-range of the API server.
const firstNodePort, lastNodePort = 30000, 32767

// Synthetic returns the Service ports of a made-up IPv4 cluster, the same at
// every call. Of each 100, 5 are UDP, 7 have a node port, 3 are load balancers,
// 2 load balancers with a Local policy and 1 with source ranges, 1 has an
// external IP, 2 have client affinity, 1 has no endpoints and the rest a
// cluster IP only. About one endpoint in seven is on the node.
//
// No two share an address: there is room for a million Services and eight
// million endpoints, after which addresses repeat. Node ports, which load
// balancers need too, last for about 18,000 Services; from there on every
// Service that needs one is a plain one.
func Synthetic(services, endpointsPer int) []Service {
	out := make([]Service, services)
	ports := nodePortRange{next: firstNodePort}
	loadBalancers, externals := 0, 0
	for i := range out {
		s := &out[i]
		*s = Service{
			Namespace:  fmt.Sprintf("team-%02d", i%20),
			Name:       fmt.Sprintf("svc-%05d", i),
			Port:       "http",
			Protocol:   "TCP",
			ClusterIP:  nth(SyntheticServiceCIDR, i),
			PortNumber: 80,
		}
		k := plain
		if place := i % 100; place%4 == 0 && place/4 < len(special) {
			k = special[place/4]
		}
		if n := k.nodePorts(); n > 0 && !ports.has(n) {
			k = plain
		}
		target := uint16(8080)
		switch k {
		case udp:
			s.Port, s.Protocol, s.PortNumber, target = "dns", "UDP", 53, 5353
		case affinity:
			s.AffinitySeconds = 10800
		case externalIP:
			s.ExternalIPs = []netip.Addr{nth(syntheticExternals, externals)}
			externals++
		case nodePort, loadBalancer, loadBalancerLocal, loadBalancerRanges:
			s.NodePort = ports.take()
			if k != nodePort {
				s.LoadBalancerIPs = []netip.Addr{nth(syntheticLoadBalancers, loadBalancers)}
				loadBalancers++
			}
			if k == loadBalancerLocal {
				s.ExternalLocal, s.HealthCheckNodePort = true, ports.take()
			}
			if k == loadBalancerRanges {
				s.SourceRanges = []netip.Prefix{
					netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("198.51.100.0/25"),
				}
			}
		}
		if k == noEndpoints {
			continue
		}
		s.Endpoints = make([]Endpoint, endpointsPer)
		for e := range s.Endpoints {
			addr := nth(SyntheticPodCIDR, i*endpointsPer+e)
			s.Endpoints[e] = Endpoint{Addr: netip.AddrPortFrom(addr, target), Local: (i+e)%7 == 0}
		}
	}
	return out
}

// nodePorts is the number of node ports a Service of this kind takes. A Local
// load balancer has one more for its health check.
func (k kind) nodePorts() int {
	switch k {
	case nodePort, loadBalancer, loadBalancerRanges:
		return 1
	case loadBalancerLocal:
		return 2
	default:
		return 0
	}
}

type nodePortRange struct{ next int }

func (r *nodePortRange) has(n int) bool { return r.next+n-1 <= lastNodePort }

func (r *nodePortRange) take() uint16 {
	r.next++
	return uint16(r.next - 1)
}

// nth returns the n-th address of an IPv4 prefix, without its first and last,
// and starts again after the last.
func nth(p netip.Prefix, n int) netip.Addr {
	b := p.Masked().Addr().As4()
	n = n%(1<<(32-p.Bits())-2) + 1
	for i := 3; i >= 0; i-- {
		b[i] |= byte(n)
		n >>= 8
	}
	return netip.AddrFrom4(b)
}
