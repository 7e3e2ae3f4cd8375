package desired_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/natlens/natlens/internal/desired"
	"github.com/natlens/natlens/pkg/chain"
)

func ptr[T any](v T) *T { return &v }

// A pod is an endpoint as a test tells it: its address, its node, and of
// "ready", "serving", "terminating", "zone=a", "node=n" what holds.
func pod(address, node string, is ...string) discoveryv1.Endpoint {
	e := discoveryv1.Endpoint{Addresses: []string{address}, NodeName: &node, Hints: &discoveryv1.EndpointHints{}}
	e.Conditions.Ready = ptr(slices.Contains(is, "ready"))
	e.Conditions.Serving = ptr(slices.Contains(is, "ready") || slices.Contains(is, "serving"))
	e.Conditions.Terminating = ptr(slices.Contains(is, "terminating"))
	for _, s := range is {
		if z, ok := strings.CutPrefix(s, "zone="); ok {
			e.Hints.ForZones = append(e.Hints.ForZones, discoveryv1.ForZone{Name: z})
		}
		if n, ok := strings.CutPrefix(s, "node="); ok {
			e.Hints.ForNodes = append(e.Hints.ForNodes, discoveryv1.ForNode{Name: n})
		}
	}
	return e
}

// fate prints the fates of a frontend's classes, those that are the same once.
func fate(f desired.Frontend) string {
	var parts []string
	for i, class := range chain.Classes {
		s := string(f.Fates[i].Verdict)
		for _, e := range f.Fates[i].Endpoints {
			s += " " + e.Addr().String()
		}
		if len(parts) == 0 || !strings.HasSuffix(parts[len(parts)-1], ": "+s) {
			parts = append(parts, string(class)+": "+s)
		}
	}
	return strings.Join(parts, "; ")
}

func TestFates(t *testing.T) {
	local, localInside := corev1.ServiceExternalTrafficPolicyLocal, corev1.ServiceInternalTrafficPolicyLocal
	nodePort := func(s *corev1.Service) { s.Spec.Type, s.Spec.Ports[0].NodePort = corev1.ServiceTypeNodePort, 30080 }
	externalLocal := func(s *corev1.Service) { nodePort(s); s.Spec.ExternalTrafficPolicy = local }
	internalLocal := func(s *corev1.Service) { s.Spec.InternalTrafficPolicy = &localInside }
	annotated := func(key, value string) func(*corev1.Service) {
		return func(s *corev1.Service) { s.Annotations = map[string]string{key: value} }
	}
	zoned := []discoveryv1.Endpoint{pod("10.0.0.1", "n1", "ready", "zone=a"), pod("10.0.0.2", "n2", "ready", "zone=b")}
	for _, tt := range []struct {
		name      string
		change    func(*corev1.Service)
		endpoints []discoveryv1.Endpoint
		want      map[desired.Release][]string // of each frontend
	}{
		{"two ready", nil, []discoveryv1.Endpoint{pod("10.0.0.2", "n2", "ready"), pod("10.0.0.1", "n1", "ready")}, map[desired.Release][]string{
			20: {"pod: dnat 10.0.0.1 10.0.0.2"}, 37: {"pod: dnat 10.0.0.1 10.0.0.2"}}},
		{"none", nil, nil, map[desired.Release][]string{20: {"pod: reject"}, 37: {"pod: reject"}}},
		{"none ready", nil, []discoveryv1.Endpoint{pod("10.0.0.1", "n1"), pod("10.0.0.2", "n1", "terminating")}, map[desired.Release][]string{37: {"pod: reject"}}},
		{"terminating ones stand in", nil, []discoveryv1.Endpoint{pod("10.0.0.1", "n1", "serving", "terminating"), pod("10.0.0.2", "n2", "terminating")},
			map[desired.Release][]string{25: {"pod: reject"}, 26: {"pod: dnat 10.0.0.1"}}},
		{"terminating ones beside a ready one", nil, []discoveryv1.Endpoint{pod("10.0.0.1", "n1", "serving", "terminating"), pod("10.0.0.2", "n2", "ready")},
			map[desired.Release][]string{37: {"pod: dnat 10.0.0.2"}}},
		{"one address twice: the one that does not terminate", nil, []discoveryv1.Endpoint{pod("10.0.0.1", "n1", "serving", "terminating"), pod("10.0.0.1", "n1", "ready")},
			map[desired.Release][]string{37: {"pod: dnat 10.0.0.1"}}},
		{"conditions left out", nil, []discoveryv1.Endpoint{{Addresses: []string{"10.0.0.1", "10.0.0.9"}}}, map[desired.Release][]string{37: {"pod: dnat 10.0.0.1"}}},
		{"externalTrafficPolicy Local", externalLocal, []discoveryv1.Endpoint{pod("10.0.0.1", "n1", "ready"), pod("10.0.0.2", "n2", "ready")}, map[desired.Release][]string{
			37: {"pod: dnat 10.0.0.1 10.0.0.2", "pod: dnat 10.0.0.1 10.0.0.2; external: dnat 10.0.0.1"}}},
		{"externalTrafficPolicy Local, none here", externalLocal, []discoveryv1.Endpoint{pod("10.0.0.2", "n2", "ready")}, map[desired.Release][]string{
			37: {"pod: dnat 10.0.0.2", "pod: dnat 10.0.0.2; external: drop"}}},
		{"externalTrafficPolicy Local, the one here terminating", externalLocal, []discoveryv1.Endpoint{pod("10.0.0.1", "n1", "serving", "terminating"), pod("10.0.0.2", "n2", "ready")},
			map[desired.Release][]string{37: {"pod: dnat 10.0.0.2", "pod: dnat 10.0.0.2; external: dnat 10.0.0.1"}}},
		{"externalTrafficPolicy Local, none anywhere", externalLocal, nil, map[desired.Release][]string{37: {"pod: reject", "pod: reject"}}},
		{"internalTrafficPolicy Local", func(s *corev1.Service) { nodePort(s); internalLocal(s) }, []discoveryv1.Endpoint{pod("10.0.0.1", "n1", "ready"), pod("10.0.0.2", "n2", "ready")},
			map[desired.Release][]string{
				21: {"pod: dnat 10.0.0.1 10.0.0.2", "pod: dnat 10.0.0.1 10.0.0.2"},
				23: {"pod: dnat 10.0.0.1", "pod: dnat 10.0.0.1"},
				24: {"pod: dnat 10.0.0.1", "pod: dnat 10.0.0.1 10.0.0.2"}}},
		{"internalTrafficPolicy Local, none here", internalLocal, []discoveryv1.Endpoint{pod("10.0.0.2", "n2", "ready")}, map[desired.Release][]string{
			23: {"pod: reject"}, 37: {"pod: drop"}}},
		{"both policies Local", func(s *corev1.Service) { externalLocal(s); internalLocal(s) }, []discoveryv1.Endpoint{pod("10.0.0.2", "n2", "ready")}, map[desired.Release][]string{
			37: {"pod: drop", "pod: dnat 10.0.0.2; external: drop"}}},
		{"zone hints", nil, zoned, map[desired.Release][]string{23: {"pod: dnat 10.0.0.1 10.0.0.2"}, 30: {"pod: dnat 10.0.0.1 10.0.0.2"}, 31: {"pod: dnat 10.0.0.1"}}},
		{"zone hints with the annotation of v1.26", annotated("service.kubernetes.io/topology-aware-hints", "Auto"), zoned, map[desired.Release][]string{
			23: {"pod: dnat 10.0.0.1 10.0.0.2"}, 24: {"pod: dnat 10.0.0.1"}, 30: {"pod: dnat 10.0.0.1"}}},
		{"zone hints with the annotation of v1.27", annotated("service.kubernetes.io/topology-mode", "Auto"), zoned, map[desired.Release][]string{
			26: {"pod: dnat 10.0.0.1 10.0.0.2"}, 27: {"pod: dnat 10.0.0.1"}}},
		{"zone hints switched off by it", annotated("service.kubernetes.io/topology-mode", "Disabled"), zoned, map[desired.Release][]string{
			30: {"pod: dnat 10.0.0.1 10.0.0.2"}, 31: {"pod: dnat 10.0.0.1"}}},
		{"an endpoint without a hint", nil, append(slices.Clone(zoned), pod("10.0.0.3", "n3", "ready")), map[desired.Release][]string{37: {"pod: dnat 10.0.0.1 10.0.0.2 10.0.0.3"}}},
		{"one not ready without a hint", nil, append(slices.Clone(zoned), pod("10.0.0.3", "n3")), map[desired.Release][]string{37: {"pod: dnat 10.0.0.1"}}},
		{"hints for other zones", nil, zoned[1:], map[desired.Release][]string{37: {"pod: dnat 10.0.0.2"}}},
		{"node hints before zone hints", nil, []discoveryv1.Endpoint{pod("10.0.0.1", "n1", "ready", "zone=a", "node=n1"), pod("10.0.0.2", "n2", "ready", "zone=a", "node=n2")},
			map[desired.Release][]string{33: {"pod: dnat 10.0.0.1 10.0.0.2"}, 34: {"pod: dnat 10.0.0.1"}}},
		{"node hints for other nodes", nil, []discoveryv1.Endpoint{pod("10.0.0.2", "n2", "ready", "zone=a", "node=n2"), pod("10.0.0.3", "n3", "ready", "zone=b", "node=n3")},
			map[desired.Release][]string{37: {"pod: dnat 10.0.0.2"}}},
		{"local ones whatever the hints", externalLocal, []discoveryv1.Endpoint{pod("10.0.0.1", "n1", "ready", "zone=b"), pod("10.0.0.2", "n2", "ready", "zone=a")}, map[desired.Release][]string{
			37: {"pod: dnat 10.0.0.2", "pod: dnat 10.0.0.2; external: dnat 10.0.0.1"}}},
		{"headless", func(s *corev1.Service) { s.Spec.ClusterIP = "None" }, nil, map[desired.Release][]string{37: nil}},
		{"no address yet", func(s *corev1.Service) { s.Spec.ClusterIP = "" }, nil, map[desired.Release][]string{37: nil}},
		{"ExternalName", func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeExternalName }, nil, map[desired.Release][]string{37: nil}},
		{"another proxy's", func(s *corev1.Service) { s.Labels = map[string]string{"service.kubernetes.io/service-proxy-name": "x"} }, nil, map[desired.Release][]string{37: nil}},
		{"load balancer", func(s *corev1.Service) {
			proxied := corev1.LoadBalancerIPModeProxy
			s.Spec.Type = corev1.ServiceTypeLoadBalancer
			s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "192.0.2.1"}, {IP: "192.0.2.2", IPMode: &proxied}, {Hostname: "lb.example"}, {IP: "2001:db8::1"}}
		}, nil, map[desired.Release][]string{29: {"pod: reject", "pod: reject", "pod: reject"}, 30: {"pod: reject", "pod: reject"}}},
		{"two families", func(s *corev1.Service) { s.Spec.ClusterIPs = []string{"10.96.0.1", "fd00::1"} }, []discoveryv1.Endpoint{pod("10.0.0.1", "n1", "ready")},
			map[desired.Release][]string{37: {"pod: dnat 10.0.0.1", "pod: reject"}}},
	} {
		for r, want := range tt.want {
			t.Run(fmt.Sprintf("%s, %v", tt.name, r), func(t *testing.T) {
				o := desired.NewObjects("n1")
				o.SetNode(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", Labels: map[string]string{corev1.LabelTopologyZone: "a"}}})
				s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "d", Name: "s"}, Spec: corev1.ServiceSpec{
					Type: corev1.ServiceTypeClusterIP, ClusterIP: "10.96.0.1", Ports: []corev1.ServicePort{{Port: 80, Protocol: "TCP"}}}}
				if tt.change != nil {
					tt.change(s)
				}
				o.SetService(s)
				o.SetSlice(endpointSlice("s-1", tt.endpoints...))
				var got []string
				for _, p := range o.View(r).Ports {
					for _, f := range p.Frontends {
						got = append(got, fate(f))
					}
				}
				if !slices.Equal(got, want) {
					t.Errorf("%q, want %q", got, want)
				}
			})
		}
	}
}

func endpointSlice(name string, endpoints ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
	return &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "d", Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: "s"}},
		AddressType: discoveryv1.AddressTypeIPv4, Endpoints: endpoints,
		Ports: []discoveryv1.EndpointPort{{Name: ptr(""), Port: ptr(int32(8080)), Protocol: ptr(corev1.ProtocolTCP)}},
	}
}

// Slices come and go one by one, in any order; a view is that of the objects at
// its time, however they came about.
func TestSlicesComeAndGo(t *testing.T) {
	o := desired.NewObjects("n1")
	service := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "d", Name: "s"}, Spec: corev1.ServiceSpec{ClusterIP: "10.96.0.1", Ports: []corev1.ServicePort{{Port: 80}}}}
	endpoints := func() string {
		v := o.View(37)
		if len(v.Ports) != 1 {
			return fmt.Sprintf("%d ports", len(v.Ports))
		}
		return fate(v.Ports[0].Frontends[0])
	}
	headless := endpointSlice("s-3", pod("10.0.0.9", "n1", "ready"))
	headless.Labels[corev1.IsHeadlessService] = ""
	elsewhere := endpointSlice("s-2", pod("10.0.0.2", "n1", "ready"))
	elsewhere.Labels[discoveryv1.LabelServiceName] = "other"
	for i, step := range []struct {
		do      func() bool
		changed bool
		want    string
	}{
		{func() bool { return o.SetSlice(endpointSlice("s-1", pod("10.0.0.1", "n1", "ready"))) }, true, "0 ports"},
		{func() bool { return o.SetService(service) }, true, "pod: dnat 10.0.0.1"},
		{func() bool { return o.SetService(service) }, false, "pod: dnat 10.0.0.1"},
		{func() bool { return o.SetSlice(endpointSlice("s-2", pod("10.0.0.2", "n1", "ready"))) }, true, "pod: dnat 10.0.0.1 10.0.0.2"},
		{func() bool { return o.SetSlice(headless) }, false, "pod: dnat 10.0.0.1 10.0.0.2"},
		{func() bool { return o.SetSlice(elsewhere) }, true, "pod: dnat 10.0.0.1"},
		{func() bool { return o.DeleteSlice(desired.Key{Namespace: "d", Name: "s-2"}) }, true, "pod: dnat 10.0.0.1"},
		{func() bool { return o.DeleteSlice(desired.Key{Namespace: "d", Name: "s-2"}) }, false, "pod: dnat 10.0.0.1"},
		{func() bool { return o.SetSlice(endpointSlice("s-1", pod("10.0.0.1", "n1"))) }, true, "pod: reject"},
		{func() bool { return o.DeleteService(desired.Key{Namespace: "d", Name: "s"}) }, true, "0 ports"},
	} {
		if changed := step.do(); changed != step.changed {
			t.Errorf("step %d: changed %v, want %v", i, changed, step.changed)
		}
		if got := endpoints(); got != step.want {
			t.Errorf("step %d: %s, want %s", i, got, step.want)
		}
	}
}

func TestLoad(t *testing.T) {
	read := func(name string) string {
		text, err := os.ReadFile(filepath.Join("../../testdata/captures", name))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	all := read("objects-services.yaml") + "\n---\n" + read("objects-endpointslices.yaml") + "\n---\n" + read("objects-nodes.yaml")
	for _, tt := range []struct {
		name, text string
		want       desired.Counts
		wrong      string // part of the error
	}{
		{"as kubectl prints them, one behind the other", all, desired.Counts{Services: 29, EndpointSlices: 29, Nodes: 1}, ""},
		{"a typed list in JSON", `{"apiVersion":"v1","kind":"ServiceList","items":[{"metadata":{"namespace":"a","name":"b"}}]}`, desired.Counts{Services: 1}, ""},
		{"one object, and one of a kind that does not matter", "kind: Service\nmetadata: {name: x}\n---\nkind: Pod\n", desired.Counts{Services: 1}, ""},
		{"empty documents", "---\n---\n", desired.Counts{}, ""},
		{"fields that are not known", "kind: Node\nspec: {novel: 1}\n", desired.Counts{Nodes: 1}, ""},
		{"no object", "a: b\n", desired.Counts{}, `objects: document 1: no Kubernetes object: "kind" is missing`},
		{"rules", "*nat\n:A - [0:0]\n", desired.Counts{}, "objects: document 1 is neither YAML nor JSON"},
		{"a text", "Error from server", desired.Counts{}, "objects: document 1: not a Kubernetes object"},
		{"a field of another type", "kind: List\nitems:\n- kind: Service\n  spec: {ports: 80}\n", desired.Counts{}, "objects: document 1: item 0: Service: "},
		{"an old version", "apiVersion: discovery.k8s.io/v1beta1\nkind: EndpointSlice\n", desired.Counts{}, "expected discovery.k8s.io/v1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := desired.NewObjects("node1").Load(strings.NewReader(tt.text), "objects")
			switch {
			case tt.wrong == "" && err != nil, tt.wrong != "" && (err == nil || !strings.Contains(err.Error(), tt.wrong)):
				t.Errorf("error %v, want %q", err, tt.wrong)
			case tt.wrong == "" && got != tt.want:
				t.Errorf("%+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestCandidates(t *testing.T) {
	for _, tt := range []struct {
		told, oldest, newest desired.Release
		want                 string
	}{
		{37, 25, 37, "[v1.37]"},
		{35, 33, 37, "[v1.35 v1.33]"},
		{23, 21, 24, "[v1.23 v1.24 v1.21]"},
		{0, 36, 37, "[v1.37]"},
		{40, 25, 37, "[v1.37]"},
	} {
		if got := fmt.Sprint(desired.Candidates(tt.told, tt.oldest, tt.newest)); got != tt.want {
			t.Errorf("told %v, looks like %v to %v: %s, want %s", tt.told, tt.oldest, tt.newest, got, tt.want)
		}
	}
	for text, want := range map[string]desired.Release{"v1.37.2": 37, "v1.31.4-gke.1": 31, "v1.20+": 20, "": 0, "1.37": 0, "v2.1": 0} {
		if got, ok := desired.ParseRelease(text); ok && got != want || !ok && want != 0 {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
}
