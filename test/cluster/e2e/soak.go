package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/natlens/natlens/test/cluster/kube"
)

// soak changes a healthy cluster without a pause, as its users may, and wants
// silence: with the grace period that the agent is shipped with.
var soak = suite{
	name: "soak",
	nodes: kube.ThreeNodes(
		kube.Proxy{Version: "v1.37.2", Mode: kube.IPTablesNFT},
		kube.Proxy{Version: "v1.35.4", Mode: kube.NFTables},
		kube.Proxy{Version: "v1.34.4", Mode: kube.IPTablesLegacy}, // at most three releases apart
	),
	run: runSoak,
}

var (
	soakFor  = flag.Duration("soak", 3*time.Minute, "for how long suite soak changes things")
	soakSeed = flag.Uint64("seed", uint64(time.Now().UnixNano()), "what suite soak changes is drawn from this number")
)

// soaker makes changes.
type soaker struct {
	*bench
	api *kubeAPI

	mu      sync.Mutex
	changes map[string]int // by kind
	refused map[string]string
}

func runSoak(ctx context.Context, b *bench) error {
	if err := b.install(ctx, soakObjects); err != nil {
		return err
	}
	for _, d := range []string{"roll", "scale"} {
		if err := b.rollout(ctx, "soak", "deployment/"+d); err != nil {
			return err
		}
	}
	ctx, end := context.WithCancel(ctx)
	defer end()
	api, err := b.openAPI(ctx)
	if err != nil {
		return err
	}
	s := &soaker{bench: b, api: api, changes: map[string]int{}, refused: map[string]string{}}
	looks := watchFindings(ctx, b.Nodes)
	if !b.check("nothing is found before anything changes", func() (string, error) {
		return "no finding", allQuiet(ctx, looks, time.Minute)
	}) {
		return errors.New("there is no use in going on")
	}
	gauges := map[*kube.Node]*gauge{}
	for _, n := range b.Nodes {
		gauges[n] = watchMetrics(ctx, n)
	}
	start := time.Now()
	s.soak(ctx)
	took := time.Since(start)
	pause(ctx, 45*time.Second) // longer than the grace period: what is wrong now would show
	for _, l := range looks {
		b.check(fmt.Sprintf("nothing is found while all changes, %v", l.node.Proxy), func() (string, error) {
			polls, err := l.silent(start)
			seen := fmt.Sprintf("%d looks in %v", polls, took.Round(time.Second))
			if err == nil {
				seen += ", each with a comparison and no finding"
			}
			return seen, err
		})
	}
	b.check("enough has changed", func() (string, error) {
		seen := s.summary(took)
		if total := s.total(); total < int(took/time.Second)/4 {
			return seen, errors.New("too little to prove anything")
		}
		return seen, nil
	})
	for _, n := range b.Nodes {
		b.check(fmt.Sprintf("the agent keeps up and costs little, %v", n.Proxy), gauges[n].summary)
	}
	return nil
}

// silent wants every look since then to have had an answer, a comparison and no
// finding.
func (l *lookout) silent(since time.Time) (polls int, err error) {
	err = unexpected(l, since, nil, nil)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.blind > 0 {
		err = errors.Join(err, fmt.Errorf("%d of %d looks without a comparison: %s", l.blind, l.polls, l.api.Error))
	}
	return l.polls, err
}

// soak runs all who change things side by side.
func (s *soaker) soak(ctx context.Context) {
	ctx, end := context.WithTimeout(ctx, *soakFor)
	defer end()
	fmt.Fprintf(s.results.out, "      -seed %d for %v\n", *soakSeed, *soakFor)
	actors := []struct {
		least, most time.Duration // between two changes
		act         func(context.Context, *rand.Rand) error
	}{
		{10 * time.Second, 25 * time.Second, s.rollOut},
		{4 * time.Second, 12 * time.Second, s.scale},
		{500 * time.Millisecond, 3 * time.Second, s.service},
		{500 * time.Millisecond, 3 * time.Second, s.slice},
		{2 * time.Second, 8 * time.Second, s.readiness},
		{8 * time.Second, 20 * time.Second, s.zone},
		{40 * time.Second, 80 * time.Second, s.restart},
	}
	var all sync.WaitGroup
	for i, a := range actors {
		draw := rand.New(rand.NewPCG(*soakSeed, uint64(i)))
		all.Go(func() {
			for {
				pause(ctx, a.least+time.Duration(draw.Int64N(int64(a.most-a.least))))
				if ctx.Err() != nil {
					return
				}
				if err := a.act(ctx, draw); err != nil && ctx.Err() == nil {
					s.mu.Lock()
					s.refused[firstWords(err)] = err.Error()
					s.mu.Unlock()
				}
			}
		})
	}
	all.Wait()
}

func firstWords(err error) string { return strings.Join(strings.Fields(err.Error())[:2], " ") }

// made counts a change.
func (s *soaker) made(kind string, err error) error {
	if err == nil {
		s.mu.Lock()
		s.changes[kind]++
		s.mu.Unlock()
	}
	return err
}

func (s *soaker) total() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, k := range s.changes {
		n += k
	}
	return n
}

func (s *soaker) summary(took time.Duration) string {
	text := fmt.Sprintf("%d changes in %v:", s.total(), took.Round(time.Second))
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, kind := range slices.Sorted(maps.Keys(s.changes)) {
		text += fmt.Sprintf(" %d %s", s.changes[kind], kind)
	}
	for _, e := range s.refused {
		text += fmt.Sprintf("; refused: %.200s", e)
	}
	return text
}

const deployments = "/apis/apps/v1/namespaces/soak/deployments/"

func (s *soaker) rollOut(ctx context.Context, draw *rand.Rand) error {
	return s.made("rollouts", s.api.do(ctx, http.MethodPatch, deployments+"roll", object{
		"spec": object{"template": object{"metadata": object{"annotations": object{"soak": fmt.Sprint(draw.Uint32())}}}},
	}, nil))
}

func (s *soaker) scale(ctx context.Context, draw *rand.Rand) error {
	return s.made("scalings", s.api.do(ctx, http.MethodPatch, deployments+"scale", object{"spec": object{"replicas": draw.IntN(6)}}, nil))
}

// readiness makes a pod of gated ready or not.
func (s *soaker) readiness(ctx context.Context, draw *rand.Rand) error {
	var list struct {
		Items []struct{ Metadata struct{ Name string } }
	}
	if err := s.api.do(ctx, http.MethodGet, "/api/v1/namespaces/soak/pods?labelSelector=app=gated", nil, &list); err != nil || len(list.Items) == 0 {
		return err
	}
	pod := list.Items[draw.IntN(len(list.Items))].Metadata.Name
	status := []string{"True", "True", "False"}[draw.IntN(3)]
	return s.made("readiness flaps", s.api.do(ctx, http.MethodPatch, "/api/v1/namespaces/soak/pods/"+pod+"/status", object{
		"status": object{"conditions": []object{{"type": "natlens.io/soak", "status": status}}},
	}, nil))
}

// zone moves a node to another zone, or out of all.
func (s *soaker) zone(ctx context.Context, draw *rand.Rand) error {
	var zone any
	if i := draw.IntN(5); i < 4 {
		zone = string("abcd"[i])
	}
	n := s.Nodes[draw.IntN(len(s.Nodes))]
	return s.made("zone changes", s.api.do(ctx, http.MethodPatch, "/api/v1/nodes/"+n.Name, object{
		"metadata": object{"labels": object{"topology.kubernetes.io/zone": zone}},
	}, nil))
}

func (s *soaker) restart(ctx context.Context, draw *rand.Rand) error {
	// What has begun is ended, or the node would be without kube-proxy.
	return s.made("kube-proxy restarts", s.Nodes[draw.IntN(len(s.Nodes))].KubeProxy.Restart(context.WithoutCancel(ctx)))
}

const soakServices = "/api/v1/namespaces/soak/services"

// service creates, deletes or changes one of a few Services.
func (s *soaker) service(ctx context.Context, draw *rand.Rand) error {
	name := fmt.Sprint("svc-", draw.IntN(8))
	var have object
	if s.api.do(ctx, http.MethodGet, soakServices+"/"+name, nil, &have) != nil {
		return s.made("Services made", s.api.do(ctx, http.MethodPost, soakServices, object{
			"metadata": object{"name": name}, "spec": randomSpec(draw),
		}, nil))
	}
	switch draw.IntN(6) {
	case 0:
		return s.made("Services deleted", s.api.do(ctx, http.MethodDelete, soakServices+"/"+name, nil, nil))
	case 1:
		return s.made("load balancer addresses", s.balance(ctx, draw, name))
	}
	patch := randomSpec(draw)
	delete(patch, "ipFamilyPolicy")
	return s.made("Services changed", s.api.do(ctx, http.MethodPatch, soakServices+"/"+name, object{"spec": patch}, nil))
}

// balance gives a Service of type LoadBalancer an address, or takes it away.
func (s *soaker) balance(ctx context.Context, draw *rand.Rand, name string) error {
	var ingress []object
	if draw.IntN(3) > 0 {
		ingress = []object{{"ip": fmt.Sprint("203.0.113.", 10+draw.IntN(200)), "ipMode": []string{"VIP", "Proxy"}[draw.IntN(2)]}}
	}
	if err := s.api.do(ctx, http.MethodPatch, soakServices+"/"+name, object{"spec": object{"type": "LoadBalancer"}}, nil); err != nil {
		return err
	}
	return s.api.do(ctx, http.MethodPatch, soakServices+"/"+name+"/status", object{"status": object{"loadBalancer": object{"ingress": ingress}}}, nil)
}

// randomSpec is that of a Service, or a patch of one: what is absent is nil.
func randomSpec(draw *rand.Rand) object {
	maybe := func(v any) any {
		if draw.IntN(3) == 0 {
			return v
		}
		return nil
	}
	kind := []string{"ClusterIP", "NodePort", "LoadBalancer"}[draw.IntN(3)]
	spec := object{
		"type":                     kind,
		"ipFamilyPolicy":           []string{"SingleStack", "PreferDualStack"}[draw.IntN(2)],
		"selector":                 object{"app": []string{"roll", "scale", "gated", "nobody"}[draw.IntN(4)]},
		"sessionAffinity":          []string{"None", "None", "ClientIP"}[draw.IntN(3)],
		"internalTrafficPolicy":    []string{"Cluster", "Cluster", "Local"}[draw.IntN(3)],
		"trafficDistribution":      maybe([]string{"PreferSameZone", "PreferSameNode", "PreferClose"}[draw.IntN(3)]),
		"publishNotReadyAddresses": draw.IntN(4) == 0,
		"ports":                    randomPorts(draw),
	}
	if draw.IntN(5) == 0 {
		spec["externalIPs"] = []string{fmt.Sprint("198.51.100.", 1+draw.IntN(200))}
	} else {
		spec["externalIPs"] = nil
	}
	spec["externalTrafficPolicy"], spec["loadBalancerSourceRanges"] = nil, nil
	if kind != "ClusterIP" {
		spec["externalTrafficPolicy"] = []string{"Cluster", "Local"}[draw.IntN(2)]
	}
	if kind == "LoadBalancer" && draw.IntN(2) == 0 {
		spec["loadBalancerSourceRanges"] = []string{"192.0.2.0/24", "10.0.0.0/8"}[:1+draw.IntN(2)]
	}
	return spec
}

func randomPorts(draw *rand.Rand) []object {
	ports := []object{{"name": "web", "port": 80, "targetPort": []any{8080, "http"}[draw.IntN(2)]}}
	if draw.IntN(2) == 0 {
		ports = append(ports, object{"name": "dns", "port": 53, "protocol": "UDP", "targetPort": []any{8080, "udp"}[draw.IntN(2)]})
	}
	if draw.IntN(3) == 0 {
		ports = append(ports, object{"name": "more", "port": 8000 + draw.IntN(3), "targetPort": 8080})
	}
	return ports
}

const soakSlices = "/apis/discovery.k8s.io/v1/namespaces/soak/endpointslices"

// slice sets or deletes an EndpointSlice that no controller looks after: with
// endpoints in any condition, and slices of a Service that is not there (yet). An
// endpoint is never in two of different conditions: which one kube-proxy takes
// then is chance.
func (s *soaker) slice(ctx context.Context, draw *rand.Rand) error {
	service := fmt.Sprint("manual-", draw.IntN(3))
	if draw.IntN(8) == 0 {
		err := s.api.do(ctx, http.MethodDelete, soakServices+"/"+service, nil, nil)
		if err != nil {
			err = s.api.do(ctx, http.MethodPost, soakServices, object{"metadata": object{"name": service}, "spec": object{
				"ports": []object{{"name": "web", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}},
			}}, nil)
		}
		return s.made("Services without a selector made and deleted", err)
	}
	number := draw.IntN(3)
	name := fmt.Sprint(service, "-", number)
	_ = s.api.do(ctx, http.MethodDelete, soakSlices+"/"+name, nil, nil)
	if draw.IntN(5) == 0 {
		return s.made("EndpointSlices deleted", nil)
	}
	var endpoints []object
	for i := range draw.IntN(6) {
		endpoints = append(endpoints, randomEndpoint(draw, 200+10*number+i))
	}
	slice := object{
		"metadata":    object{"name": name, "labels": object{"kubernetes.io/service-name": service, "endpointslice.kubernetes.io/managed-by": "soak"}},
		"addressType": "IPv4", "endpoints": endpoints,
		"ports": []object{{"name": "web", "port": 8080 + draw.IntN(2)}, {"name": "dns", "port": 8080, "protocol": "UDP"}}[:1+draw.IntN(2)],
	}
	return s.made("EndpointSlices set", s.api.do(ctx, http.MethodPost, soakSlices, slice, nil))
}

// randomEndpoint is one on any node, whose address ends with that number.
func randomEndpoint(draw *rand.Rand, number int) object {
	node := 1 + draw.IntN(3)
	ready := draw.IntN(3) > 0
	e := object{
		"addresses": []string{fmt.Sprintf("10.52.%d.%d", node, number)}, "nodeName": fmt.Sprint("node", node),
		"conditions": object{"ready": ready, "serving": ready || draw.IntN(2) == 0, "terminating": !ready && draw.IntN(2) == 0},
	}
	hints := object{}
	if draw.IntN(3) > 0 {
		hints["forZones"] = []object{{"name": string("abcd"[draw.IntN(4)])}}
	}
	if draw.IntN(3) == 0 {
		hints["forNodes"] = []object{{"name": fmt.Sprint("node", 1+draw.IntN(3))}}
	}
	e["hints"] = hints
	return e
}

var soakObjects = `
apiVersion: v1
kind: Namespace
metadata: {name: soak}
---
` + echoDeployment("soak", "roll", 4) + echoDeployment("soak", "scale", 2) +
	strings.Replace(echoDeployment("soak", "gated", 3), "    spec:\n", "    spec:\n      readinessGates: [{conditionType: natlens.io/soak}]\n", 1)
