// Package deploy_test checks the manifests that users apply.
package deploy_test

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"
	sigsyaml "sigs.k8s.io/yaml"
)

// kinds are the kinds of objects that the manifests may hold.
var kinds = map[string]func() runtime.Object{
	"v1 Namespace":      func() runtime.Object { return &corev1.Namespace{} },
	"v1 ServiceAccount": func() runtime.Object { return &corev1.ServiceAccount{} },
	"v1 Service":        func() runtime.Object { return &corev1.Service{} },
	"v1 ResourceQuota":  func() runtime.Object { return &corev1.ResourceQuota{} },
	"rbac.authorization.k8s.io/v1 ClusterRole":        func() runtime.Object { return &rbacv1.ClusterRole{} },
	"rbac.authorization.k8s.io/v1 ClusterRoleBinding": func() runtime.Object { return &rbacv1.ClusterRoleBinding{} },
	"apps/v1 DaemonSet":                               func() runtime.Object { return &appsv1.DaemonSet{} },
	"apps/v1 Deployment":                              func() runtime.Object { return &appsv1.Deployment{} },
}

// objects reads a manifest as strictly as kubectl apply --validate=strict does.
func objects(t *testing.T, file string) []runtime.Object {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out []runtime.Object
	for docs := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(data))); ; {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			return out
		} else if err != nil {
			t.Fatal(err)
		}
		var kind metav1.TypeMeta
		if err := sigsyaml.Unmarshal(doc, &kind); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		make := kinds[kind.APIVersion+" "+kind.Kind]
		if make == nil {
			t.Fatalf("%s: an object of kind %v", file, kind)
		}
		object := make()
		if err := sigsyaml.UnmarshalStrict(doc, object); err != nil {
			t.Fatalf("%s: %s: %v", file, kind.Kind, err)
		}
		out = append(out, object)
	}
}

func TestManifestsDecode(t *testing.T) {
	for file, want := range map[string]int{"daemonset.yaml": 8, "echo.yaml": 2} {
		if got := len(objects(t, file)); got != want {
			t.Errorf("%s: %d objects, want %d", file, got, want)
		}
	}
}

// TestRights checks that the agent may do what it needs and no more, and so may
// its readers.
func TestRights(t *testing.T) {
	want := map[string][]rbacv1.PolicyRule{
		"natlens-agent": {
			{APIGroups: []string{""}, Resources: []string{"services", "nodes"}, Verbs: []string{"get", "list", "watch"}},
			{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: []string{"get", "list", "watch"}},
			{APIGroups: []string{"authentication.k8s.io"}, Resources: []string{"tokenreviews"}, Verbs: []string{"create"}},
			{APIGroups: []string{"authorization.k8s.io"}, Resources: []string{"subjectaccessreviews"}, Verbs: []string{"create"}},
		},
		"natlens-metrics-reader": {{NonResourceURLs: []string{"/metrics"}, Verbs: []string{"get"}}},
		"natlens-reader":         {{NonResourceURLs: []string{"/natlens/*", "/metrics"}, Verbs: []string{"get"}}},
	}
	got := map[string][]rbacv1.PolicyRule{}
	for _, object := range objects(t, "daemonset.yaml") {
		if role, ok := object.(*rbacv1.ClusterRole); ok {
			got[role.Name] = role.Rules
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("roles (-want +got):\n%s", diff)
	}
}

// TestPod checks what makes the agent's pod safe to run, and its probes reach
// the right listener.
func TestPod(t *testing.T) {
	var pod corev1.PodSpec
	for _, object := range objects(t, "daemonset.yaml") {
		if set, ok := object.(*appsv1.DaemonSet); ok {
			pod = set.Spec.Template.Spec
		}
	}
	if len(pod.Containers) != 1 || !pod.HostNetwork || pod.HostPID || pod.HostIPC || len(pod.Volumes) != 0 || len(pod.InitContainers) != 0 {
		t.Fatalf("pod: %+v", pod)
	}
	c := pod.Containers[0]
	no, yes, root := false, true, int64(0)
	want := &corev1.SecurityContext{
		RunAsUser: &root, RunAsGroup: &root, Privileged: &no, AllowPrivilegeEscalation: &no, ReadOnlyRootFilesystem: &yes,
		SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		Capabilities:   &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: []corev1.Capability{"NET_ADMIN"}},
	}
	if diff := cmp.Diff(want, c.SecurityContext); diff != "" {
		t.Errorf("security context (-want +got):\n%s", diff)
	}
	if !slices.Contains(c.Args, "--secure-listen=:9753") || slices.ContainsFunc(c.Args, func(a string) bool { return a == "--listen" || len(a) > 9 && a[:9] == "--listen=" }) {
		t.Errorf("arguments %q: want 9753 for the network, and the plain listener on loopback", c.Args)
	}
	if len(c.Ports) != 1 || c.Ports[0].Name != "https" || c.Ports[0].ContainerPort != 9753 {
		t.Errorf("ports %+v, want https at 9753 alone", c.Ports)
	}
	if get := c.LivenessProbe.HTTPGet; get.Host != "127.0.0.1" || get.Port.IntValue() != 9754 || get.Scheme != "" || get.Path != "/livez" {
		t.Errorf("liveness: %+v", get)
	}
	if get := c.ReadinessProbe.HTTPGet; get.Host != "" || get.Port.StrVal != "https" || get.Scheme != corev1.URISchemeHTTPS || get.Path != "/readyz" {
		t.Errorf("readiness: %+v", get)
	}
}

// TestScrape checks that the scrape configuration looks for what the DaemonSet
// runs. Whether Prometheus reads it is seen on a cluster.
func TestScrape(t *testing.T) {
	data, err := os.ReadFile("prometheus-scrape.yaml")
	if err != nil {
		t.Fatal(err)
	}
	type relabel struct {
		SourceLabels []string `json:"source_labels"`
		Regex        string   `json:"regex"`
		Action       string   `json:"action"`
		TargetLabel  string   `json:"target_label"`
	}
	var config struct {
		ScrapeConfigs []struct {
			JobName       string            `json:"job_name"`
			Scheme        string            `json:"scheme"`
			Authorization map[string]string `json:"authorization"`
			TLSConfig     map[string]bool   `json:"tls_config"`
			Discovery     []struct {
				Role       string `json:"role"`
				Namespaces struct {
					Names []string `json:"names"`
				} `json:"namespaces"`
				Selectors []struct {
					Role  string `json:"role"`
					Label string `json:"label"`
				} `json:"selectors"`
			} `json:"kubernetes_sd_configs"`
			Relabel []relabel `json:"relabel_configs"`
		} `json:"scrape_configs"`
	}
	if err := sigsyaml.UnmarshalStrict(data, &config); err != nil {
		t.Fatal(err)
	}
	var set *appsv1.DaemonSet
	for _, object := range objects(t, "daemonset.yaml") {
		if s, ok := object.(*appsv1.DaemonSet); ok {
			set = s
		}
	}
	job := config.ScrapeConfigs[0]
	find := job.Discovery[0]
	label, value, _ := strings.Cut(find.Selectors[0].Label, "=")
	if job.Scheme != "https" || find.Role != "pod" || !slices.Equal(find.Namespaces.Names, []string{set.Namespace}) || set.Spec.Template.Labels[label] != value {
		t.Errorf("job %+v does not find %s/%s", job, set.Namespace, set.Name)
	}
	if port := job.Relabel[0]; port.Action != "keep" || port.Regex != set.Spec.Template.Spec.Containers[0].Ports[0].Name {
		t.Errorf("port %+v is not kept", port)
	}
}
