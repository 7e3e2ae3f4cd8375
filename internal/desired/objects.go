package desired

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/natlens/natlens/pkg/netfilter"
)

// Key names an object within its namespace.
type Key struct{ Namespace, Name string }

// Compare orders keys.
func (k Key) Compare(o Key) int {
	return cmp.Or(cmp.Compare(k.Namespace, o.Namespace), cmp.Compare(k.Name, o.Name))
}

// Node is this node as the API knows it.
type Node struct {
	Name  string
	Zone  string // its label topology.kubernetes.io/zone
	Local []netip.Addr
	// Release is that of its kube-proxy, or of its kubelet where it does not
	// tell: from v1.31 on it mostly does not. 0 for unknown.
	Release Release
}

// service is what of a Service decides about rules.
type service struct {
	clusterIPs    []netip.Addr
	ports         []servicePort
	externalIPs   []netip.Addr
	ingress       []ingress
	ranges        []netip.Prefix
	affinity      int // seconds; 0 for none
	externalLocal bool
	internalLocal bool
	hints         string // the annotation about topology
	hintsOld      bool   // it is the one that v1.26 knew
}

// LabelEcho marks a Service whose endpoints are echo servers, for the agents to
// connect to.
const LabelEcho = "natlens.io/echo"

type servicePort struct {
	name           string
	protocol       netfilter.Protocol
	port, nodePort uint16
}

type ingress struct {
	addr  netip.Addr
	proxy bool // ipMode
}

// slice is what of an EndpointSlice decides about rules.
type slice struct {
	name      string
	service   Key
	ports     []slicePort
	endpoints []endpoint
}

type slicePort struct {
	name     string
	protocol netfilter.Protocol
	port     uint16
}

type endpoint struct {
	addr                        netip.Addr
	ready, serving, terminating bool
	local                       bool
	zones, nodes                []string // that hints name; mostly none
}

// Status is how far objects are what the API has.
type Status struct {
	Synced bool // every kind of object has been listed once
	// Confirmed is when they were last known to be.
	Confirmed time.Time
	// Settled is until when kube-proxy may need to hear of the API again after it
	// was gone.
	Settled time.Time
	Error   string // what keeps them from being so now; "" for nothing
}

// Objects are the objects of the API, as far as they decide about the rules of
// one node. It is safe for concurrent use.
type Objects struct {
	name string // of the node

	mu       sync.Mutex
	node     Node
	services map[Key]*service
	slices   map[Key]*slice
	of       map[Key][]Key // the slices of a Service
	echoes   map[Key]bool  // the Services that [LabelEcho] marks
	// What has changed since the last view: all, or these Services.
	everything bool
	changed    map[Key]time.Time
	last       *View
}

// NewObjects returns no objects yet, for the node of that name.
func NewObjects(nodeName string) *Objects {
	return &Objects{
		name: nodeName, services: map[Key]*service{}, slices: map[Key]*slice{}, of: map[Key][]Key{},
		echoes: map[Key]bool{}, changed: map[Key]time.Time{}, everything: true,
	}
}

// Node returns this node, and whether the API has it.
func (o *Objects) Node() (Node, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.node, o.node.Name != ""
}

// SetNode takes a Node in; those of other names are passed over. It reports
// whether that changes anything.
func (o *Objects) SetNode(n *corev1.Node) bool {
	if n.Name != o.name {
		return false
	}
	node := Node{Name: n.Name, Zone: n.Labels[corev1.LabelTopologyZone]}
	for _, version := range []string{n.Status.NodeInfo.KubeProxyVersion, n.Status.NodeInfo.KubeletVersion} { //nolint:staticcheck // empty where it is no longer told
		if r, ok := ParseRelease(version); ok {
			node.Release = r
			break
		}
	}
	for _, a := range n.Status.Addresses {
		if ip, err := netip.ParseAddr(a.Address); err == nil && a.Type == corev1.NodeInternalIP {
			node.Local = append(node.Local, ip.Unmap())
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	same := node.Name == o.node.Name && node.Zone == o.node.Zone && node.Release == o.node.Release && slices.Equal(node.Local, o.node.Local)
	o.node = node
	o.everything = o.everything || !same
	return !same
}

// SetService takes a Service in. It reports whether that changes what is
// desired.
func (o *Objects) SetService(s *corev1.Service) bool {
	key := Key{s.Namespace, s.Name}
	if skipped(s) {
		return o.DeleteService(key)
	}
	next := serviceOf(s)
	o.mu.Lock()
	defer o.mu.Unlock()
	if delete(o.echoes, key); s.Labels[LabelEcho] == "true" {
		o.echoes[key] = true
	}
	if last := o.services[key]; last != nil && last.equal(next) {
		return false
	}
	o.services[key] = next
	o.note(key)
	return true
}

// DeleteService takes a Service out. It reports whether it was there.
func (o *Objects) DeleteService(key Key) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.services[key] == nil {
		return false
	}
	delete(o.services, key)
	delete(o.echoes, key)
	o.note(key)
	return true
}

// Echoes lists the Services that [LabelEcho] marks, sorted.
func (o *Objects) Echoes() []Key {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.SortedFunc(maps.Keys(o.echoes), Key.Compare)
}

// SetSlice takes an EndpointSlice in. It reports whether that changes what may
// be desired.
func (o *Objects) SetSlice(s *discoveryv1.EndpointSlice) bool {
	key := Key{s.Namespace, s.Name}
	next := o.sliceOf(s)
	if next == nil {
		return o.DeleteSlice(key)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	last := o.slices[key]
	if last != nil && last.equal(next) {
		return false
	}
	if last != nil && last.service != next.service {
		o.forget(key, last)
		last = nil
	}
	if last == nil {
		o.of[next.service] = append(o.of[next.service], key)
	}
	o.slices[key] = next
	o.note(next.service)
	return true
}

// DeleteSlice takes an EndpointSlice out. It reports whether it was there.
func (o *Objects) DeleteSlice(key Key) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := o.slices[key]
	if s == nil {
		return false
	}
	o.forget(key, s)
	return true
}

func (o *Objects) forget(key Key, s *slice) {
	delete(o.slices, key)
	left := slices.DeleteFunc(o.of[s.service], func(k Key) bool { return k == key })
	if o.of[s.service] = left; len(left) == 0 {
		delete(o.of, s.service)
	}
	o.note(s.service)
}

// note remembers that a Service, or its endpoints, have changed, and when first.
func (o *Objects) note(key Key) {
	if _, ok := o.changed[key]; !ok {
		o.changed[key] = time.Now()
	}
}

// Keys lists the Services that are held, or the EndpointSlices.
func (o *Objects) Keys() (services, endpointSlices []Key) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Collect(maps.Keys(o.services)), slices.Collect(maps.Keys(o.slices))
}

// skipped reports whether kube-proxy leaves a Service alone: headless, without
// an address yet, an ExternalName, or another proxy's (ShouldSkipService in
// pkg/proxy/util/utils.go, and the selector in cmd/kube-proxy/app/server.go).
func skipped(s *corev1.Service) bool {
	_, other := s.Labels[labelProxyName]
	return other || s.Spec.Type == corev1.ServiceTypeExternalName || s.Spec.ClusterIP == "" || s.Spec.ClusterIP == corev1.ClusterIPNone
}

const (
	labelProxyName = "service.kubernetes.io/service-proxy-name"
	hintsOfV126    = "service.kubernetes.io/topology-aware-hints"
)

func serviceOf(s *corev1.Service) *service {
	out := &service{
		externalLocal: s.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal && reachesOut(s),
		internalLocal: s.Spec.InternalTrafficPolicy != nil && *s.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal,
	}
	if out.hints, out.hintsOld = s.Annotations[hintsOfV126]; !out.hintsOld {
		out.hints = s.Annotations[corev1.AnnotationTopologyMode]
	}
	ips := s.Spec.ClusterIPs
	if len(ips) == 0 {
		ips = []string{s.Spec.ClusterIP}
	}
	out.clusterIPs, out.externalIPs = addresses(ips), addresses(s.Spec.ExternalIPs)
	for _, in := range s.Status.LoadBalancer.Ingress {
		if a, err := netip.ParseAddr(in.IP); err == nil { // an ingress by host name has none
			out.ingress = append(out.ingress, ingress{a.Unmap(), in.IPMode != nil && *in.IPMode == corev1.LoadBalancerIPModeProxy})
		}
	}
	for _, text := range s.Spec.LoadBalancerSourceRanges {
		if p, err := netip.ParsePrefix(strings.TrimSpace(text)); err == nil {
			out.ranges = append(out.ranges, p.Masked())
		}
	}
	if s.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		out.affinity = int(corev1.DefaultClientIPServiceAffinitySeconds)
		if c := s.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
			out.affinity = int(*c.ClientIP.TimeoutSeconds)
		}
	}
	for _, p := range s.Spec.Ports {
		if protocol, ok := protocolOf(&p.Protocol); ok {
			out.ports = append(out.ports, servicePort{p.Name, protocol, uint16(p.Port), uint16(p.NodePort)})
		}
	}
	return out
}

// reachesOut reports whether externalTrafficPolicy has a meaning
// (ExternalPolicyLocal in pkg/api/v1/service/util.go).
func reachesOut(s *corev1.Service) bool {
	return s.Spec.Type == corev1.ServiceTypeNodePort || s.Spec.Type == corev1.ServiceTypeLoadBalancer ||
		s.Spec.Type == corev1.ServiceTypeClusterIP && len(s.Spec.ExternalIPs) > 0
}

func addresses(texts []string) []netip.Addr {
	var out []netip.Addr
	for _, text := range texts {
		if a, err := netip.ParseAddr(text); err == nil {
			out = append(out, a.Unmap())
		}
	}
	return out
}

func protocolOf(p *corev1.Protocol) (netfilter.Protocol, bool) {
	if p == nil || *p == "" {
		return netfilter.TCP, true
	}
	out, err := netfilter.ParseProtocol(strings.ToLower(string(*p)))
	return out, err == nil
}

// sliceOf returns nil for slices that kube-proxy does not watch.
func (o *Objects) sliceOf(s *discoveryv1.EndpointSlice) *slice {
	name := s.Labels[discoveryv1.LabelServiceName]
	_, headless := s.Labels[corev1.IsHeadlessService]
	_, other := s.Labels[labelProxyName]
	if name == "" || headless || other || s.AddressType == discoveryv1.AddressTypeFQDN {
		return nil
	}
	out := &slice{name: s.Name, service: Key{s.Namespace, name}}
	for _, p := range s.Ports {
		protocol, ok := protocolOf(p.Protocol)
		if p.Name == nil || p.Port == nil || *p.Port == 0 || !ok {
			continue // kube-proxy passes over them as well
		}
		out.ports = append(out.ports, slicePort{*p.Name, protocol, uint16(*p.Port)})
	}
	out.endpoints = make([]endpoint, 0, len(s.Endpoints))
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		if len(e.Addresses) == 0 {
			continue
		}
		addr, err := netip.ParseAddr(e.Addresses[0]) // the first alone counts
		if err != nil {
			continue
		}
		made := endpoint{
			addr: addr.Unmap(), local: e.NodeName != nil && *e.NodeName == o.name,
			ready: isSet(e.Conditions.Ready, true), serving: isSet(e.Conditions.Serving, true), terminating: isSet(e.Conditions.Terminating, false),
		}
		if e.Hints != nil {
			for _, z := range e.Hints.ForZones {
				made.zones = append(made.zones, strings.Clone(z.Name))
			}
			for _, n := range e.Hints.ForNodes {
				made.nodes = append(made.nodes, strings.Clone(n.Name))
			}
		}
		out.endpoints = append(out.endpoints, made)
	}
	return out
}

func isSet(b *bool, missing bool) bool {
	if b == nil {
		return missing
	}
	return *b
}

func (s *service) equal(o *service) bool {
	return slices.Equal(s.clusterIPs, o.clusterIPs) && slices.Equal(s.ports, o.ports) && slices.Equal(s.externalIPs, o.externalIPs) &&
		slices.Equal(s.ingress, o.ingress) && slices.Equal(s.ranges, o.ranges) && s.affinity == o.affinity &&
		s.externalLocal == o.externalLocal && s.internalLocal == o.internalLocal && s.hints == o.hints && s.hintsOld == o.hintsOld
}

func (s *slice) equal(o *slice) bool {
	return s.service == o.service && slices.Equal(s.ports, o.ports) && slices.EqualFunc(s.endpoints, o.endpoints, func(a, b endpoint) bool {
		return a.addr == b.addr && a.ready == b.ready && a.serving == b.serving && a.terminating == b.terminating && a.local == b.local &&
			slices.Equal(a.zones, b.zones) && slices.Equal(a.nodes, b.nodes)
	})
}
