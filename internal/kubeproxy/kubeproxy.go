package kubeproxy

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
)

// Family selects the tables the rules are for. kube-proxy writes each family
// by itself, and Write is called once for each.
type Family int

const (
	// IPv4 is for iptables-restore.
	IPv4 Family = iota
	// IPv6 is for ip6tables-restore.
	IPv6
)

// String returns "IPv4" or "IPv6".
func (f Family) String() string {
	if f == IPv6 {
		return "IPv6"
	}
	return "IPv4"
}

// has reports whether addr is written in the rules of f. An IPv4-mapped IPv6
// address belongs to neither: kube-proxy's API validation refuses it.
func (f Family) has(addr netip.Addr) bool {
	if f == IPv6 {
		return addr.Is6() && !addr.Is4In6()
	}
	return addr.Is4()
}

// DefaultLargeClusterThreshold is the number of endpoints above which
// kube-proxy drops the comments of the KUBE-SEP chains and of the jumps to them.
const DefaultLargeClusterThreshold = 1000

// DefaultMasqueradeMark is the packet mark for kube-proxy's default
// --iptables-masquerade-bit, 14.
const DefaultMasqueradeMark = 0x4000

// Config is what kube-proxy takes from its flags and from the node. The zero
// value is a usual IPv4 node whose kube-proxy has no local detector.
type Config struct {
	// Family of the rules. Service ports of the other family are refused,
	// addresses of the other family among a Service's external addresses and
	// source ranges are left out, as kube-proxy leaves them out.
	Family Family

	// PodCIDR tells pods from other clients (--cluster-cidr). The zero Prefix
	// means that nothing does: then no rule distinguishes pods, and traffic
	// to cluster IPs is not masqueraded.
	PodCIDR netip.Prefix

	// MasqueradeAll is --masquerade-all.
	MasqueradeAll bool

	// MasqueradeMark is 1<<--iptables-masquerade-bit; 0 means
	// DefaultMasqueradeMark.
	MasqueradeMark uint32

	// NodeIP is the node's own address. It matters only for source ranges: when
	// one contains it, the node may use the load balancer's addresses as
	// sources. The zero Addr is in no range.
	NodeIP netip.Addr

	// NodePortAddresses are the node's addresses that --nodeport-addresses
	// selects. None means all, as in kube-proxy.
	NodePortAddresses []netip.Addr

	// NoLocalhostNodePorts is --iptables-localhost-nodeports=false. IPv6 has no
	// node ports on localhost in either case.
	NoLocalhostNodePorts bool

	// LargeClusterThreshold replaces DefaultLargeClusterThreshold; negative
	// means that comments are always written. kube-proxy counts all endpoints
	// it knows, also those it did not select; Write can count only those given.
	LargeClusterThreshold int

	// NFAcct adds the nfacct matches. Loading them needs the accounting objects
	// ct_state_invalid_dropped_pkts and localhost_nps_accepted_pkts, which
	// kube-proxy makes at its start.
	NFAcct bool

	// ConntrackBeLiberal is for a node with nf_conntrack_tcp_be_liberal set,
	// where kube-proxy does not drop packets in state INVALID.
	ConntrackBeLiberal bool

	// NoRandomFully is for a node with an iptables older than 1.6.2, where
	// kube-proxy masquerades without --random-fully.
	NoRandomFully bool

	// NoKubelet leaves out the chains that kubelet makes for itself,
	// KUBE-KUBELET-CANARY and KUBE-IPTABLES-HINT. Only a kube-proxy running
	// without a kubelet lacks them.
	NoKubelet bool

	// Counters prefixes each rule with "[0:0]", as iptables-save -c does.
	Counters bool

	// SyncOrder declares the chains of the nat table Service by Service, as
	// kube-proxy's own input does, instead of sorted. The rules are the same.
	// Set it to load very many Services with the nf_tables backend: that keeps
	// chains in the order of their declaration, and iptables-nft-save 1.8.9
	// sorts them with a recursion that is as deep as the list when the list is
	// sorted already. It takes minutes for 110,000 chains, and overflows the
	// usual 8 MB stack.
	SyncOrder bool
}

// Service is one port of a Service, the unit kube-proxy makes rules for. A
// Service with three ports is three values.
type Service struct {
	Namespace string
	Name      string
	Port      string // name of the port; empty for an unnamed one
	Protocol  string // TCP, UDP or SCTP in any case; empty means TCP

	ClusterIP  netip.Addr
	PortNumber uint16
	NodePort   uint16 // 0 for none

	ExternalIPs []netip.Addr
	// LoadBalancerIPs are the ingress addresses with ipMode VIP: kube-proxy
	// writes nothing for a hostname or for ipMode Proxy.
	LoadBalancerIPs []netip.Addr
	// SourceRanges limit who may use LoadBalancerIPs. A range of length 0 lifts
	// the limit altogether, as it does since v1.34.
	SourceRanges []netip.Prefix

	ExternalLocal bool // externalTrafficPolicy: Local
	InternalLocal bool // internalTrafficPolicy: Local

	// HealthCheckNodePort is of a LoadBalancer with ExternalLocal; 0 for none.
	HealthCheckNodePort uint16

	// AffinitySeconds is the timeout of sessionAffinity ClientIP; 0 means no
	// affinity.
	AffinitySeconds int

	// Endpoints are those kube-proxy selected, in any order.
	Endpoints []Endpoint
}

// Endpoint is a selected endpoint of a Service port.
type Endpoint struct {
	Addr netip.AddrPort

	// Local says that the endpoint is on this node. It decides something only
	// for a Service with a Local policy.
	Local bool

	// LocalOnly says that only Local policies use the endpoint, which is then
	// Local too. It happens when topology hints take a ready local endpoint
	// from the cluster's choice, and when the local endpoints are all
	// terminating while others are ready.
	LocalOnly bool
}

// Write writes the rules for the given Service ports to w. The slice and what
// it refers to are only read.
//
// All of the input is checked before the first byte is written. An error from
// w is returned as it is.
func Write(w io.Writer, cfg Config, services []Service) error {
	if err := cfg.check(); err != nil {
		return err
	}
	ports := make([]port, len(services))
	seen := make(map[string]bool, len(services))
	total := 0
	for i := range services {
		p, err := newPort(cfg.Family, &services[i])
		if err == nil && seen[p.name+p.protocol] {
			err = errors.New("given twice")
		}
		if err != nil {
			s := &services[i]
			return fmt.Errorf("service port %s: %w", servicePortName(s.Namespace, s.Name, s.Port), err)
		}
		seen[p.name+p.protocol] = true
		ports[i] = p
		total += len(services[i].Endpoints)
	}
	return newPrinter(w, cfg, total).print(ports)
}

func (cfg Config) check() error {
	if cfg.Family != IPv4 && cfg.Family != IPv6 {
		return fmt.Errorf("unknown family %d", int(cfg.Family))
	}
	if cfg.PodCIDR.IsValid() && !cfg.Family.has(cfg.PodCIDR.Addr()) {
		return fmt.Errorf("pod CIDR %s is not %s", cfg.PodCIDR, cfg.Family)
	}
	for _, ip := range cfg.NodePortAddresses {
		if !cfg.Family.has(ip) {
			return fmt.Errorf("node port address %s is not %s", ip, cfg.Family)
		}
	}
	return nil
}

// port is a Service port with everything derived that more than one rule
// depends on. The names of its fields follow syncProxyRules in proxier.go.
type port struct {
	*Service
	name     string // "namespace/name:port", as in the comments
	protocol string // lower case, as iptables and the name hash want it
	hash     string // common to the KUBE-SVC, SVL, EXT and FW chains

	externalIPs     []netip.Addr
	loadBalancerIPs []netip.Addr
	sourceRanges    []netip.Prefix

	cluster   []*endpoint // of KUBE-SVC; empty when no policy uses it
	local     []*endpoint // of KUBE-SVL; empty when no policy uses it
	reachable []*endpoint // with a KUBE-SEP chain: the union of the two

	hasEndpoints bool // kube-proxy found any, used by a policy or not
	hasInternal  bool // some serve the cluster IP
	hasExternal  bool // some serve external traffic from off the node
	usesExternal bool // there is a KUBE-EXT chain
	usesFirewall bool // there is a KUBE-FW chain
}

type endpoint struct {
	addr  netip.Addr
	to    string // "ip:port", the DNAT target
	chain string
	Endpoint
}

func newPort(family Family, s *Service) (port, error) {
	p := port{Service: s, protocol: strings.ToLower(s.Protocol)}
	if p.protocol == "" {
		p.protocol = "tcp"
	}
	if err := p.check(family); err != nil {
		return port{}, err
	}
	p.name = servicePortName(s.Namespace, s.Name, s.Port)
	p.hash = hash(p.name, p.protocol, "")
	p.externalIPs = ofFamily(family, s.ExternalIPs)
	p.loadBalancerIPs = ofFamily(family, s.LoadBalancerIPs)
	p.sourceRanges = ranges(family, s.SourceRanges)

	eps, err := p.endpoints(family)
	if err != nil {
		return port{}, err
	}
	accessible := s.NodePort != 0 || len(p.externalIPs) > 0 || len(p.loadBalancerIPs) > 0
	// UsesClusterEndpoints and UsesLocalEndpoints of pkg/proxy/serviceport.go.
	usesCluster := !s.InternalLocal || accessible
	usesLocal := s.InternalLocal || s.ExternalLocal && accessible
	for _, ep := range eps {
		inCluster, inLocal := usesCluster && !ep.LocalOnly, usesLocal && ep.Local
		if inCluster {
			p.cluster = append(p.cluster, ep)
		}
		if inLocal {
			p.local = append(p.local, ep)
		}
		if inCluster || inLocal {
			p.reachable = append(p.reachable, ep)
		}
	}
	p.hasEndpoints = len(eps) > 0
	if p.hasEndpoints && usesCluster && len(p.cluster) == 0 {
		return port{}, errors.New("all endpoints are LocalOnly: topology never empties the cluster's choice")
	}
	p.hasInternal = p.hasEndpoints && (!s.InternalLocal || len(p.local) > 0)
	p.hasExternal = p.hasEndpoints && (!s.ExternalLocal || len(p.local) > 0)
	p.usesExternal = p.hasEndpoints && accessible
	p.usesFirewall = p.hasEndpoints && len(p.loadBalancerIPs) > 0 && len(p.sourceRanges) > 0
	return p, nil
}

func (p *port) check(family Family) error {
	switch p.protocol {
	case "tcp", "udp", "sctp":
	default:
		return fmt.Errorf("unknown protocol %q", p.Protocol)
	}
	// The names end in quoted comments: what is a DNS label needs no escaping.
	if !isName(p.Namespace) || !isName(p.Service.Name) || p.Port != "" && !isName(p.Port) {
		return errors.New("namespace, name or port name is not a DNS label")
	}
	if !family.has(p.ClusterIP) {
		return fmt.Errorf("cluster IP %s is not %s", p.ClusterIP, family)
	}
	if p.PortNumber == 0 {
		return errors.New("port number is 0")
	}
	if p.AffinitySeconds < 0 {
		return fmt.Errorf("affinity of %d seconds", p.AffinitySeconds)
	}
	return nil
}

// endpoints returns the endpoints in kube-proxy's order, that of the string
// "ip:port" (endpointslicecache.go): 10.0.0.10 comes before 10.0.0.9.
func (p *port) endpoints(family Family) ([]*endpoint, error) {
	all := make([]endpoint, len(p.Endpoints))
	eps := make([]*endpoint, len(all))
	for i, given := range p.Endpoints {
		ep := &all[i]
		*ep = endpoint{addr: given.Addr.Addr(), to: given.Addr.String(), Endpoint: given}
		if !family.has(ep.addr) {
			return nil, fmt.Errorf("endpoint %s is not %s", ep.to, family)
		}
		if given.Addr.Port() == 0 {
			return nil, fmt.Errorf("endpoint %s has port 0", ep.to)
		}
		ep.Local = given.Local || given.LocalOnly
		ep.chain = "KUBE-SEP-" + hash(p.name, p.protocol, ep.to)
		eps[i] = ep
	}
	slices.SortFunc(eps, func(a, b *endpoint) int { return strings.Compare(a.to, b.to) })
	for i := 1; i < len(eps); i++ {
		if eps[i].to == eps[i-1].to {
			return nil, fmt.Errorf("endpoint %s given twice", eps[i].to)
		}
	}
	return eps, nil
}

// internalChain is where traffic to the cluster IP goes.
func (p *port) internalChain() string {
	if p.InternalLocal {
		return p.localChain()
	}
	return p.clusterChain()
}

// loadBalancerChain is where traffic to a load balancer's address goes.
func (p *port) loadBalancerChain() string {
	if p.usesFirewall {
		return p.firewallChain()
	}
	return p.externalChain()
}

func (p *port) clusterChain() string  { return "KUBE-SVC-" + p.hash }
func (p *port) localChain() string    { return "KUBE-SVL-" + p.hash }
func (p *port) externalChain() string { return "KUBE-EXT-" + p.hash }
func (p *port) firewallChain() string { return "KUBE-FW-" + p.hash }

// isName accepts the characters of a DNS label or subdomain.
func isName(s string) bool {
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '.' {
			return false
		}
	}
	return s != ""
}

func ofFamily(family Family, addrs []netip.Addr) []netip.Addr {
	var out []netip.Addr
	for _, a := range addrs {
		if family.has(a) {
			out = append(out, a)
		}
	}
	return out
}

// ranges returns the source ranges of a family. A range that contains every
// address means that there is no limit (serviceport.go, since v1.34).
func ranges(family Family, prefixes []netip.Prefix) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range prefixes {
		if !p.IsValid() || !family.has(p.Addr()) {
			continue
		}
		if p.Bits() == 0 {
			return nil
		}
		out = append(out, p.Masked())
	}
	return out
}
