package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/natlens/natlens/test/cluster/kube"
)

// The Services of testdata/captures, on which kube-proxies' rules were recorded,
// made real. There, one node's view was of interest: it has endpoints on node1,
// which is that node, and on node2. Here all nodes are, so that there is a copy of
// the set for each, in a namespace of its own, with endpoints on that node and on
// the next.
//
// The endpoints are addresses in a range that one pod per node has besides its own,
// and where real echo servers answer. So the EndpointSlices can be as they were
// recorded: forty endpoints, some not ready, some terminating, some with hints.

// fixture is the copy for one node.
type fixture struct {
	namespace string
	node      *kube.Node // where the recording has node1
	next      *kube.Node // where it has node2
	number    int        // of the copy, from 0

	services []object
	slices   []object
	ready    []service
	places   map[string]place // by recorded address
}

// service is a port of a Service, and what the API wants of it.
type service struct {
	namespace, name, port, protocol string
	frontends                       []frontend
	affinity                        bool
	endpoints                       []endpoint
}

// frontend is where clients connect to. A NodePort's address is the node's.
type frontend struct {
	kind string // as natlens calls it
	at   netip.AddrPort
}

// endpoint is one of the addresses of an EndpointSlice.
type endpoint struct {
	at    netip.AddrPort
	ready bool
}

// place is where an endpoint is.
type place struct {
	node  *kube.Node
	addrs []netip.Addr // one of each family
}

// newFixture makes the copy for the i-th node.
func newFixture(b *bench, i int) (*fixture, error) {
	f := &fixture{
		namespace: fmt.Sprint("shop-", i+1), number: i, places: map[string]place{},
		node: b.Nodes[i], next: b.Nodes[(i+1)%len(b.Nodes)],
	}
	services, err := readList(b.file("testdata/captures/objects-services.yaml"))
	if err != nil {
		return nil, err
	}
	slices, err := readList(b.file("testdata/captures/objects-endpointslices.yaml"))
	if err != nil {
		return nil, err
	}
	for _, s := range slices {
		if !isAPIServer(text(s, "metadata", "labels", "kubernetes.io/service-name")) {
			f.addSlices(s)
		}
	}
	for _, s := range services {
		if !isAPIServer(text(s, "metadata", "name")) {
			f.addService(s)
		}
	}
	return f, nil
}

// isAPIServer reports whether a Service is the one that every cluster has.
func isAPIServer(name string) bool { return name == "kubernetes" }

// readList reads what kubectl get -o yaml printed.
func readList(file string) ([]object, error) {
	content, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var list struct{ Items []object }
	if err := yaml.Unmarshal(content, &list); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return list.Items, nil
}

// list returns a list of objects in an object.
func list(o object, path ...string) []object {
	all, _ := field(o, path...).([]any)
	var objects []object
	for _, v := range all {
		objects = append(objects, v.(object))
	}
	return objects
}

// number returns a number in an object.
func number(o object, path ...string) int {
	n, _ := field(o, path...).(float64)
	return int(n)
}

// addService adds a Service of both families, without a selector, since the
// EndpointSlices are ours.
func (f *fixture) addService(recorded object) {
	name := text(recorded, "metadata", "name")
	spec := object{"ipFamilyPolicy": "RequireDualStack"}
	for _, key := range []string{"type", "sessionAffinity", "sessionAffinityConfig", "externalTrafficPolicy", "internalTrafficPolicy", "trafficDistribution"} {
		if v := field(recorded, "spec", key); v != nil {
			spec[key] = v
		}
	}
	if text(spec, "type") == "ClusterIP" && field(recorded, "spec", "externalIPs") == nil {
		delete(spec, "externalTrafficPolicy")
	}
	// Of the outside's addresses, the first is in the recorded ranges, and the
	// second is not.
	if ranges := field(recorded, "spec", "loadBalancerSourceRanges"); ranges != nil {
		spec["loadBalancerSourceRanges"] = append(append([]any{}, ranges.([]any)...), "2001:db8:2::/121")
	}
	s := service{namespace: f.namespace, name: name, affinity: text(spec, "sessionAffinity") == "ClientIP"}
	var clusterIPs, externalIPs, balancers []netip.Addr
	if ip := text(recorded, "spec", "clusterIP"); ip == "None" {
		spec["clusterIP"] = ip
	} else {
		clusterIPs = f.clusterIPs(ip)
		spec["clusterIP"], spec["clusterIPs"] = clusterIPs[0], clusterIPs
	}
	if field(recorded, "spec", "externalIPs") != nil {
		externalIPs = f.inRanges(kube.ExternalRanges, 20)
		spec["externalIPs"] = externalIPs
	}
	var ingress []any
	for _, in := range list(recorded, "status", "loadBalancer", "ingress") {
		for _, a := range f.inRanges(kube.LoadBalancerRanges, lastByte(text(in, "ip"))) {
			ingress = append(ingress, object{"ip": a, "ipMode": in["ipMode"]})
			balancers = append(balancers, a)
		}
	}
	var ports []any
	for _, p := range list(recorded, "spec", "ports") {
		port := object{"port": p["port"], "protocol": p["protocol"], "targetPort": p["targetPort"]}
		if p["name"] != nil {
			port["name"] = p["name"]
		}
		s := s
		s.port, s.protocol = text(p, "name"), text(p, "protocol")
		s.endpoints = f.endpointsOf(name, s.port)
		add := func(kind string, port int, addrs []netip.Addr) {
			for _, a := range addrs {
				s.frontends = append(s.frontends, frontend{kind, netip.AddrPortFrom(a, uint16(port))})
			}
		}
		add("ClusterIP", number(p, "port"), clusterIPs)
		add("ExternalIP", number(p, "port"), externalIPs)
		add("LoadBalancer", number(p, "port"), balancers)
		if n := number(p, "nodePort"); n != 0 {
			n = f.nodePort(n)
			port["nodePort"] = n
			add("NodePort", n, f.node.Addrs)
		}
		ports = append(ports, port)
		f.ready = append(f.ready, s)
	}
	spec["ports"] = ports
	o := object{
		"apiVersion": "v1", "kind": "Service", "spec": spec,
		"metadata": object{"name": name, "namespace": f.namespace, "annotations": object{}},
	}
	if spec["trafficDistribution"] != nil {
		// The names that kube-proxies before v1.30 knew it by.
		o["metadata"].(object)["annotations"] = object{"service.kubernetes.io/topology-mode": "Auto", "service.kubernetes.io/topology-aware-hints": "Auto"}
	}
	if ingress != nil {
		o["status"] = object{"loadBalancer": object{"ingress": ingress}}
	}
	f.services = append(f.services, o)
}

// addSlices adds the EndpointSlices of both families of a Service.
func (f *fixture) addSlices(recorded object) {
	service := text(recorded, "metadata", "labels", "kubernetes.io/service-name")
	for family, kind := range []string{"IPv4", "IPv6"} {
		var endpoints []any
		for _, e := range list(recorded, "endpoints") {
			at := f.place(e["addresses"].([]any)[0].(string), text(e, "nodeName"))
			out := object{"addresses": []any{at.addrs[family]}, "conditions": e["conditions"], "nodeName": at.node.Name}
			// Zones move with the nodes.
			if zone := text(e, "zone"); zone != "" {
				out["zone"] = f.zone(zone)
			}
			for _, z := range list(e, "hints", "forZones") {
				out["hints"] = object{"forZones": []any{object{"name": f.zone(text(z, "name"))}}}
			}
			endpoints = append(endpoints, out)
		}
		if endpoints == nil {
			endpoints = []any{}
		}
		f.slices = append(f.slices, object{
			"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": kind,
			"metadata": object{
				"name": service + "-" + strings.ToLower(kind), "namespace": f.namespace,
				"labels": object{"kubernetes.io/service-name": service, "endpointslice.kubernetes.io/managed-by": "natlens.test"},
			},
			"ports": recorded["ports"], "endpoints": endpoints,
		})
	}
}

// endpointsOf returns the endpoints of a port.
func (f *fixture) endpointsOf(service, port string) []endpoint {
	var all []endpoint
	for _, s := range f.slices {
		if text(s, "metadata", "labels", "kubernetes.io/service-name") != service {
			continue
		}
		for _, p := range list(s, "ports") {
			if text(p, "name") != port {
				continue
			}
			for _, e := range list(s, "endpoints") {
				a := e["addresses"].([]any)[0].(netip.Addr)
				ready, _ := field(e, "conditions", "ready").(bool)
				all = append(all, endpoint{netip.AddrPortFrom(a, uint16(number(p, "port"))), ready})
			}
		}
	}
	return all
}

// place returns where a recorded endpoint is.
func (f *fixture) place(recorded, node string) place {
	key := recorded + " " + node
	if p, ok := f.places[key]; ok {
		return p
	}
	p := place{node: f.node}
	first := 0
	if node == "node2" { // which is to another copy what node1 is to this
		p.node, first = f.next, 32
	}
	if strings.HasPrefix(recorded, "10.146.") {
		p.addrs = p.node.Addrs
	} else {
		n := 0
		for _, q := range f.places {
			if q.node == p.node && q.addrs[0] != p.node.Addrs[0] {
				n++
			}
		}
		for _, r := range endpointRanges(p.node) {
			p.addrs = append(p.addrs, nth(r, first+n))
		}
	}
	f.places[key] = p
	return p
}

// zone returns what is to a node here as the recorded zone was to node1.
func (f *fixture) zone(recorded string) string {
	if recorded == "a" {
		return string(rune('a' + f.number))
	}
	return string(rune('a' + (f.number+1)%3))
}

// clusterIPs returns addresses for a recorded one: those of a copy have a range of
// their own, which is routed to its node.
func (f *fixture) clusterIPs(recorded string) []netip.Addr {
	n := lastByte(recorded)
	if strings.HasPrefix(recorded, "10.56.15.") || strings.HasPrefix(recorded, "10.56.0.") {
		n += 90
	}
	var addrs []netip.Addr
	for _, r := range kube.ServiceRanges {
		addrs = append(addrs, nth(r, 256*(100+f.number)+n))
	}
	return addrs
}

// inRanges returns the n-th address of this copy in ranges outside the cluster.
func (f *fixture) inRanges(ranges []netip.Prefix, n int) []netip.Addr {
	var addrs []netip.Addr
	for _, r := range ranges {
		addrs = append(addrs, nth(r, 64*f.number+n))
	}
	return addrs
}

// routes are the ranges of addresses that outside is to reach through the node.
func (f *fixture) routes() []netip.Prefix {
	var all []netip.Prefix
	for i, r := range kube.ServiceRanges {
		all = append(all, netip.PrefixFrom(nth(r, 256*(100+f.number)), []int{24, 120}[i]))
	}
	for _, ranges := range [][]netip.Prefix{kube.LoadBalancerRanges, kube.ExternalRanges} {
		for i, r := range ranges {
			all = append(all, netip.PrefixFrom(nth(r, 64*f.number), []int{26, 122}[i]))
		}
	}
	return all
}

// nth returns an address of a range.
func nth(p netip.Prefix, n int) netip.Addr {
	b := p.Addr().AsSlice()
	n += int(b[len(b)-1])
	b[len(b)-1], b[len(b)-2] = byte(n), b[len(b)-2]+byte(n>>8)
	a, _ := netip.AddrFromSlice(b)
	return a
}

// nodePort returns the copy's own port in place of a recorded one. The API server
// gives ports that nobody asks for from 30086 on, at random, as long as there are
// any (ServiceNodePortStaticSubrange): another Service may have one of those.
func (f *fixture) nodePort(recorded int) int {
	const each = 28 // ports of a copy, in which the recorded ones stay apart
	return 30000 + each*f.number + recorded%each
}

// lastByte returns the last number of an IPv4 address.
func lastByte(address string) int {
	b := netip.MustParseAddr(address).As4()
	return int(b[3])
}

// echoPods are the pods of the fixtures: per node a client, the servers, and one on
// the node's own network.
func echoPods(nodes []*kube.Node) []object {
	var pods []object
	for _, n := range nodes {
		for _, role := range []string{"client", "server", "host"} {
			ports := []int{8080}
			if role == "server" {
				ports = []int{8080, 8443, 9090, 5353}
			}
			var containers []any
			for _, p := range ports {
				containers = append(containers, object{
					"name": fmt.Sprint("echo-", p), "image": "ghcr.io/natlens/echo:latest", "imagePullPolicy": "IfNotPresent",
					"args": []any{fmt.Sprint("-listen=:", p), "-drain=0s"},
				})
			}
			pods = append(pods, object{
				"apiVersion": "v1", "kind": "Pod",
				"metadata": object{"name": role + "-" + n.Name, "namespace": "matrix"},
				"spec": object{
					"nodeName": n.Name, "hostNetwork": role == "host", "containers": containers,
					"automountServiceAccountToken": false, "terminationGracePeriodSeconds": 1,
				},
			})
		}
	}
	return pods
}

// startEchoes starts the pods of the fixtures, and gives the servers the addresses of
// the endpoints.
func startEchoes(ctx context.Context, b *bench) error {
	objects := append([]object{namespace("matrix")}, echoPods(b.Nodes)...)
	if err := b.create(ctx, objects); err != nil {
		return err
	}
	if _, err := b.Kubectl(ctx, "wait", "-n", "matrix", "--for=condition=Ready", "pod", "--all", "--timeout=60s"); err != nil {
		return err
	}
	for _, n := range b.Nodes {
		if err := spreadOut(ctx, b, n); err != nil {
			return fmt.Errorf("addresses of the endpoints on %s: %w", n.Name, err)
		}
	}
	return nil
}

// endpointRanges returns the addresses of endpoints on a node: the second half of
// its first 256, behind those that pods get.
func endpointRanges(n *kube.Node) []netip.Prefix {
	var ranges []netip.Prefix
	for _, r := range n.PodCIDRs {
		ranges = append(ranges, netip.PrefixFrom(nth(r, 128), r.Addr().BitLen()-7))
	}
	return ranges
}

// spreadOut makes all addresses of the range the server's own: nothing lists them,
// least of all the echo server in each answer.
func spreadOut(ctx context.Context, b *bench, n *kube.Node) error {
	pod, err := b.Pod(ctx, "matrix", "server-"+n.Name)
	if err != nil {
		return err
	}
	ips, err := b.Kubectl(ctx, "get", "pod", "-n", "matrix", pod.Name, "-o", "jsonpath={.status.podIPs[*].ip}")
	if err != nil {
		return err
	}
	// So that UDP over IPv6 is answered from the address that it was sent to.
	if _, err := pod.Output(ctx, "sh", "-ec", "echo 1 >/proc/sys/net/ipv6/ip_nonlocal_bind"); err != nil {
		return err
	}
	for i, ip := range strings.Fields(string(ips)) {
		r := endpointRanges(n)[i].String()
		if _, err := pod.Output(ctx, "ip", "route", "add", "local", r, "dev", "lo"); err != nil {
			return err
		}
		if _, err := n.Output(ctx, "ip", "route", "add", r, "via", ip); err != nil {
			return err
		}
	}
	return nil
}

// install makes the fixture's objects, and routes their addresses to its node.
func (f *fixture) install(ctx context.Context, b *bench) error {
	objects := []object{namespace(f.namespace)}
	objects = append(append(objects, f.slices...), f.services...)
	if err := b.create(ctx, objects); err != nil {
		return err
	}
	var balancers []object
	for _, s := range f.services {
		if s["status"] != nil {
			balancers = append(balancers, object{
				"apiVersion": "v1", "kind": "Service", "status": s["status"],
				"metadata": object{"name": text(s, "metadata", "name"), "namespace": f.namespace},
			})
		}
	}
	if err := b.kubectlObjects(ctx, balancers, "apply", "--server-side", "--subresource=status"); err != nil {
		return err
	}
	return b.Route(ctx, f.node, f.routes()...)
}

// installFixtures makes everything for the fixtures of all nodes.
func installFixtures(ctx context.Context, b *bench) ([]*fixture, error) {
	var all []*fixture
	for i := range b.Nodes {
		f, err := newFixture(b, i)
		if err != nil {
			return nil, err
		}
		all = append(all, f)
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	if err := startEchoes(ctx, b); err != nil {
		return nil, err
	}
	for _, f := range all {
		if err := f.install(ctx, b); err != nil {
			return nil, err
		}
	}
	return all, nil
}
