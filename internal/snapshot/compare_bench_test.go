package snapshot

import (
	"bytes"
	"fmt"
	"net/netip"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/natlens/natlens/internal/desired"
	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
)

// BenchmarkCompare holds 10,000 Services with 10 endpoints each against their rules,
// after an EndpointSlice has changed; "at first" it has seen none of them before.
// cpu-ms is the processor time of one comparison.
func BenchmarkCompare(b *testing.B) {
	const services, endpoints = 10_000, 10
	all := kubeproxy.Synthetic(services, endpoints)
	var text bytes.Buffer
	config := kubeproxy.Config{Family: kubeproxy.IPv4, PodCIDR: kubeproxy.SyntheticPodCIDR}
	if err := kubeproxy.Write(&text, config, all); err != nil {
		b.Fatal(err)
	}
	rules, err := iptables.Parse(&text, "rules")
	if err != nil {
		b.Fatal(err)
	}
	s := Build(rules, chain.Node{Local: []netip.Addr{kubeproxy.SyntheticNodeIP}}, "bench", "", time.Now())
	keeper := func() (*Keeper, *api) {
		a := &api{objects: desired.NewObjects("bench"), status: desired.Status{Synced: true, Confirmed: time.Now()}}
		a.objects.SetNode(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "bench"}})
		for i := range all {
			service, slice := objectsOf(&all[i])
			a.objects.SetService(service)
			a.objects.SetSlice(slice)
		}
		return &Keeper{API: a, Grace: time.Hour}, a
	}
	k, a := keeper()
	b.Run("at first", func(b *testing.B) {
		var spent time.Duration
		for b.Loop() {
			b.StopTimer()
			k, a = keeper()
			next := *s
			b.StartTimer()
			start := processorTime()
			k.compared(&next)
			spent += processorTime() - start
			if !next.API.Known || next.API.Pending != 0 {
				b.Fatalf("%d differences: %s", next.API.Pending, next.API.Error)
			}
		}
		b.ReportMetric(spent.Seconds()*1e3/float64(b.N), "cpu-ms/op")
	})
	b.Run("one changed", func(b *testing.B) {
		b.ReportAllocs()
		var spent time.Duration
		_, slice := objectsOf(&all[services/2+1])
		n := 0
		for b.Loop() {
			n++
			changed := slice.DeepCopy()
			changed.Endpoints[0].Addresses = []string{fmt.Sprintf("10.255.%d.%d", n>>8&0xff, n&0xff)}
			a.objects.SetSlice(changed)
			next := *s
			start := processorTime()
			k.compared(&next)
			spent += processorTime() - start
			if next.API.Pending != 2 { // the new one is missing, the old one is stale
				b.Fatalf("%d differences: %s", next.API.Pending, next.API.Error)
			}
		}
		b.ReportMetric(spent.Seconds()*1e3/float64(b.N), "cpu-ms/op")
	})
}

// processorTime returns what this process has used, on all processors.
func processorTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// objectsOf returns what the API has of a Service port.
func objectsOf(s *kubeproxy.Service) (*corev1.Service, *discoveryv1.EndpointSlice) {
	protocol := corev1.Protocol(s.Protocol)
	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: s.Namespace, Name: s.Name},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: s.ClusterIP.String(), ClusterIPs: []string{s.ClusterIP.String()},
			Ports: []corev1.ServicePort{{Name: s.Port, Port: int32(s.PortNumber), NodePort: int32(s.NodePort), Protocol: protocol}},
		},
	}
	if s.NodePort != 0 {
		service.Spec.Type = corev1.ServiceTypeNodePort
	}
	for _, a := range s.LoadBalancerIPs {
		service.Spec.Type = corev1.ServiceTypeLoadBalancer
		service.Status.LoadBalancer.Ingress = append(service.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: a.String()})
	}
	for _, a := range s.ExternalIPs {
		service.Spec.ExternalIPs = append(service.Spec.ExternalIPs, a.String())
	}
	for _, p := range s.SourceRanges {
		service.Spec.LoadBalancerSourceRanges = append(service.Spec.LoadBalancerSourceRanges, p.String())
	}
	if s.ExternalLocal {
		service.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	}
	if s.AffinitySeconds != 0 {
		seconds := int32(s.AffinitySeconds)
		service.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		service.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &seconds}}
	}
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: s.Namespace, Name: s.Name, Labels: map[string]string{discoveryv1.LabelServiceName: s.Name}},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	for _, e := range s.Endpoints {
		port, node := int32(e.Addr.Port()), "other"
		if e.Local {
			node = "bench"
		}
		slice.Ports = []discoveryv1.EndpointPort{{Name: &s.Port, Port: &port, Protocol: &protocol}}
		slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{e.Addr.Addr().String()}, NodeName: &node})
	}
	return service, slice
}
