package desired

import (
	"cmp"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"time"

	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
)

// View is what is desired on one node at one moment. It does not change.
type View struct {
	Node  Node
	Ports []*Port // by namespace and name, in the order of the Service's spec
	// Release is what is taken for kube-proxy's.
	Release Release
	// Changed are the Services of which something else is desired than in the view
	// before, and when the API first told so; All says that any may be.
	Changed map[Key]time.Time
	All     bool

	objects map[Key]inputs
	made    map[Key][]*Port
}

// Port is one port of a Service.
type Port struct {
	chain.ServicePort
	AffinitySeconds int // of ClientIP session affinity, 0 for none
	Frontends       []Frontend
}

// Frontend is an address and port at which a Service is to be reached.
type Frontend struct {
	Type    chain.FrontendType
	Family  netfilter.Family
	Address netip.Addr // invalid for a NodePort
	Port    uint16
	// Sources are the ranges that may connect; none for all. Others are dropped.
	Sources []netip.Prefix
	// Local says that connections from other machines go to endpoints here only.
	Local bool
	// Fates are in the order of [chain.Classes].
	Fates [3]Fate
}

// Endpoints returns where new connections from a pod to the first frontend, which is the
// ClusterIP, are to go.
func (p *Port) Endpoints() []netip.AddrPort {
	if len(p.Frontends) == 0 {
		return nil
	}
	return p.Frontends[0].Fates[0].Endpoints
}

// Fate is what is to become of new connections: they go to one of the
// endpoints, or are refused as the verdict says.
type Fate struct {
	Verdict   chain.RouteVerdict // RouteDNAT, RouteReject or RouteDrop
	Endpoints []netip.AddrPort   // sorted
}

// inputs are the objects that one Service is worked out from.
type inputs struct {
	service *service
	slices  []*slice
}

// View works out what a kube-proxy of that release is to program, again only
// where something has changed since the view before.
func (o *Objects) View(r Release) *View {
	o.mu.Lock()
	defer o.mu.Unlock()
	last := o.last
	if last != nil && !o.everything && len(o.changed) == 0 && last.Release == r {
		return last
	}
	all := last == nil || o.everything || last.Release != r
	next := &View{Node: o.node, Release: r, All: all, Changed: map[Key]time.Time{}, objects: map[Key]inputs{}, made: map[Key][]*Port{}}
	keys := make([]Key, 0, len(o.services))
	for key, s := range o.services {
		keys = append(keys, key)
		if _, changed := o.changed[key]; !all && !changed {
			next.objects[key], next.made[key] = last.objects[key], last.made[key]
			continue
		}
		in := inputs{service: s}
		for _, k := range o.of[key] {
			in.slices = append(in.slices, o.slices[k])
		}
		next.objects[key] = in
		next.made[key] = in.ports(key, &o.node, r)
	}
	slices.SortFunc(keys, Key.Compare)
	for _, key := range keys {
		next.Ports = append(next.Ports, next.made[key]...)
	}
	for key, at := range o.changed {
		if !all && !reflect.DeepEqual(next.made[key], last.made[key]) {
			next.Changed[key] = at
		}
	}
	o.everything, o.last = false, next
	clear(o.changed)
	return next
}

// Waiting returns the Services of which objects have changed since the last View; nil
// where all may have.
func (o *Objects) Waiting() []Key {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.everything {
		return nil
	}
	return slices.Collect(maps.Keys(o.changed))
}

// As works out one port as a kube-proxy of another release is to program it; nil
// when the API does not have it.
func (v *View) As(r Release, of chain.ServicePort) *Port {
	key := Key{of.Namespace, of.Name}
	in, ok := v.objects[key]
	if !ok {
		return nil
	}
	for _, p := range in.ports(key, &v.Node, r) {
		if p.ServicePort == of {
			return p
		}
	}
	return nil
}

// Has reports whether the API has a port of a Service that kube-proxy handles.
func (v *View) Has(p chain.ServicePort) bool {
	return v.Port(p) != nil
}

// Port returns a Service port; nil when the API does not have it.
func (v *View) Port(p chain.ServicePort) *Port {
	for _, q := range v.made[Key{p.Namespace, p.Name}] {
		if q.ServicePort == p {
			return q
		}
	}
	return nil
}

// SlicesOf names the EndpointSlices that a Service port's endpoints are from.
func (v *View) SlicesOf(p chain.ServicePort) []string {
	var out []string
	for _, sl := range v.objects[Key{p.Namespace, p.Name}].slices {
		out = append(out, p.Namespace+"/"+sl.name)
	}
	slices.Sort(out)
	return out
}

// Serves reports whether the API has an address among a Service port's endpoints,
// on whichever node, that answers: kube-proxy leaves the connections to it alone, even where
// it sends no new ones there (CleanStaleEntries in pkg/proxy/conntrack/cleanup.go).
func (v *View) Serves(p chain.ServicePort, at netip.AddrPort) bool {
	in := v.objects[Key{p.Namespace, p.Name}]
	return v.Has(p) && slices.ContainsFunc(in.endpoints(servicePort{name: p.Port, protocol: p.Protocol}, netfilter.FamilyOf(at.Addr())), func(e target) bool {
		return e.at == at && (e.ready || e.serving)
	})
}

// WhyNot says why an address is not among those that a Service port's connections
// are to go to.
func (v *View) WhyNot(p chain.ServicePort, at netip.AddrPort) string {
	in := v.objects[Key{p.Namespace, p.Name}]
	for _, e := range in.endpoints(servicePort{name: p.Port, protocol: p.Protocol}, netfilter.FamilyOf(at.Addr())) {
		switch {
		case e.at != at:
		case e.terminating:
			return "the API has it as terminating"
		case !e.ready:
			return "the API has it as not ready"
		default:
			return "the API has it for other nodes (traffic policy or topology)"
		}
	}
	return "the API does not have it"
}

// ports works out all ports of a Service.
func (in inputs) ports(key Key, node *Node, r Release) []*Port {
	var out []*Port
	for _, p := range in.service.ports {
		port := &Port{
			ServicePort:     chain.ServicePort{Namespace: key.Namespace, Name: key.Name, Port: p.name, Protocol: p.protocol},
			AffinitySeconds: in.service.affinity,
		}
		for _, family := range []netfilter.Family{netfilter.IPv4, netfilter.IPv6} {
			if i := slices.IndexFunc(in.service.clusterIPs, func(a netip.Addr) bool { return netfilter.FamilyOf(a) == family }); i >= 0 {
				port.add(in, p, family, in.service.clusterIPs[i], node, r.habits())
			}
		}
		out = append(out, port)
	}
	return out
}

// add works out the frontends of one family: a Service without an address of it
// has none there.
func (port *Port) add(in inputs, p servicePort, family netfilter.Family, clusterIP netip.Addr, node *Node, h habits) {
	s := in.service
	internalLocal := s.internalLocal && h.internalLocal
	all := in.endpoints(p, family)
	if internalLocal && h.internalFirst && !s.externalLocal {
		all = slices.DeleteFunc(all, func(e target) bool { return !e.local })
		internalLocal = false
	}
	cluster, local, any := choose(all, s, node, h)

	inside := Fate{chain.RouteDNAT, cluster}
	if internalLocal {
		inside.Endpoints = local
	}
	if len(inside.Endpoints) == 0 {
		inside.Verdict = refusal(any)
	}
	port.Frontends = append(port.Frontends, Frontend{
		Type: chain.ClusterIP, Family: family, Address: clusterIP, Port: p.port, Fates: [3]Fate{inside, inside, inside},
	})

	near := Fate{chain.RouteDNAT, cluster} // from this node and its pods
	if len(cluster) == 0 {
		near.Verdict = refusal(any)
	}
	far := near
	if s.externalLocal {
		if far = (Fate{chain.RouteDNAT, local}); len(local) == 0 {
			far.Verdict = refusal(any)
		}
	}
	outside := Frontend{Family: family, Port: p.port, Local: s.externalLocal, Fates: [3]Fate{near, near, far}}
	if p.nodePort != 0 {
		f := outside
		f.Type, f.Port = chain.NodePort, p.nodePort
		port.Frontends = append(port.Frontends, f)
	}
	for _, a := range s.externalIPs {
		if netfilter.FamilyOf(a) == family {
			f := outside
			f.Type, f.Address = chain.ExternalIP, a
			port.Frontends = append(port.Frontends, f)
		}
	}
	for _, i := range s.ingress {
		if netfilter.FamilyOf(i.addr) == family && !(i.proxy && h.ipMode) {
			f := outside
			f.Type, f.Address, f.Sources = chain.LoadBalancer, i.addr, s.rangesOf(family)
			port.Frontends = append(port.Frontends, f)
		}
	}
}

// refusal is what becomes of connections when no endpoint fits: they are
// dropped where there is one elsewhere, so that clients try again.
func refusal(any bool) chain.RouteVerdict {
	if any {
		return chain.RouteDrop
	}
	return chain.RouteReject
}

// rangesOf returns the source ranges of a family. One that holds every address
// allows all.
func (s *service) rangesOf(family netfilter.Family) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range s.ranges {
		if netfilter.FamilyOf(p.Addr()) != family {
			continue
		}
		if p.Bits() == 0 {
			return nil
		}
		out = append(out, p)
	}
	return out
}

// target is an endpoint with the port that one of a Service's ports means there.
type target struct {
	*endpoint
	at netip.AddrPort
}

// endpoints returns those of one port and family, each address once: one that
// does not terminate goes before one that does.
func (in inputs) endpoints(p servicePort, family netfilter.Family) []target {
	var out []target
	for _, sl := range in.slices {
		for _, sp := range sl.ports {
			if sp.name != p.name || sp.protocol != p.protocol {
				continue
			}
			for i := range sl.endpoints {
				if e := &sl.endpoints[i]; netfilter.FamilyOf(e.addr) == family {
					out = append(out, target{e, netip.AddrPortFrom(e.addr, sp.port)})
				}
			}
		}
	}
	slices.SortStableFunc(out, func(a, b target) int {
		return cmp.Or(a.at.Compare(b.at), compareBool(a.terminating, b.terminating), compareBool(b.ready, a.ready))
	})
	return slices.CompactFunc(out, func(a, b target) bool { return a.at == b.at })
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

// choose returns the endpoints for the whole cluster and those for this node,
// and whether any endpoint anywhere could serve.
func choose(all []target, s *service, node *Node, h habits) (cluster, local []netip.AddrPort, any bool) {
	ready := func(e target) bool { return e.ready }
	standsIn := func(e target) bool { return h.terminating && e.serving && e.terminating }
	here := func(match func(target) bool) func(target) bool {
		return func(e target) bool { return e.local && match(e) }
	}
	available := topology(all, s, node, h)
	cluster = keep(all, func(e target) bool { return e.ready && available(e) })
	if len(cluster) == 0 {
		cluster = keep(all, standsIn)
	}
	if local = keep(all, here(ready)); len(local) == 0 {
		local = keep(all, here(standsIn))
	}
	return cluster, local, slices.ContainsFunc(all, func(e target) bool { return e.ready || standsIn(e) })
}

func keep(from []target, match func(target) bool) []netip.AddrPort {
	var out []netip.AddrPort
	for _, e := range from {
		if match(e) {
			out = append(out, e.at)
		}
	}
	return out
}

// topology tells which endpoints the hints leave to this node. Hints count only
// when every ready endpoint has one, and one of them is for this node or zone.
func topology(all []target, s *service, node *Node, h habits) func(target) bool {
	hinted := func(of func(target) []string, mine string) bool {
		every, mineToo := true, false
		for _, e := range all {
			if e.ready {
				every = every && len(of(e)) > 0
				mineToo = mineToo || slices.Contains(of(e), mine)
			}
		}
		return every && mineToo
	}
	nodes := func(e target) []string { return e.nodes }
	zones := func(e target) []string { return e.zones }
	switch {
	case h.nodeHints && hinted(nodes, node.Name):
		return func(e target) bool { return slices.Contains(e.nodes, node.Name) }
	case s.heedsHints(h.hints) && node.Zone != "" && hinted(zones, node.Zone):
		return func(e target) bool { return slices.Contains(e.zones, node.Zone) }
	}
	return func(target) bool { return true }
}

// heedsHints reports whether the Service's annotation, where the release asks
// for one, lets hints count.
func (s *service) heedsHints(rule hintRule) bool {
	switch rule {
	case hintsAlways:
		return true
	case hintsAnnotated:
		return s.hints != "" && s.hints != "Disabled" && s.hints != "disabled"
	case hintsAuto:
		return s.hintsOld && (s.hints == "Auto" || s.hints == "auto")
	}
	return false
}
