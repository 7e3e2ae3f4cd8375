package desired

import (
	"slices"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestEchoes: the label alone marks a Service, and for as long as it is there.
func TestEchoes(t *testing.T) {
	o := NewObjects("node1")
	set := func(name, label string) {
		sv := &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{LabelEcho: label}},
			Spec:       corev1.ServiceSpec{ClusterIP: "10.96.0.1", Ports: []corev1.ServicePort{{Port: 80}}},
		}
		o.SetService(sv)
	}
	check := func(want ...Key) {
		t.Helper()
		if got := o.Echoes(); !slices.Equal(got, want) {
			t.Errorf("marked are %v, want %v", got, want)
		}
	}
	a, b := Key{"default", "a"}, Key{"default", "b"}
	set("b", "true")
	set("a", "true")
	set("c", "false")
	check(a, b)
	set("a", "")
	check(b)
	set("a", "true")
	o.DeleteService(b)
	check(a)
}
