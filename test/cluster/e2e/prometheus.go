package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/natlens/natlens/test/cluster/kube"
)

// prometheusProgram is Prometheus with the one way of discovery that the shipped
// configuration uses. Debian's is built without it.
var prometheusProgram = kube.Program{
	Module: "github.com/prometheus/prometheus", Version: "v0.316.0", // which is Prometheus 3.16.0
	Package: "github.com/prometheus/prometheus/cmd/prometheus",
	Flags:   []string{"-tags=remove_all_sd,enable_kubernetes_sd"},
}

// prometheusManifest runs Prometheus as a pod, for which the shipped configuration
// is made. The names are those in its comments.
const prometheusManifest = `
apiVersion: v1
kind: ServiceAccount
metadata: {name: prometheus, namespace: monitoring}
---
apiVersion: v1
kind: Pod
metadata: {name: prometheus, namespace: monitoring, labels: {app: prometheus}}
spec:
  serviceAccountName: prometheus
  terminationGracePeriodSeconds: 1
  nodeName: node1
  containers:
  - name: prometheus
    image: natlens.test/prometheus:latest
    imagePullPolicy: Never
    args: [--config.file=/config/prometheus.yml, --storage.tsdb.path=/data]
    readinessProbe: {httpGet: {path: /-/ready, port: 9090}, periodSeconds: 1}
    volumeMounts: [{name: config, mountPath: /config}, {name: data, mountPath: /data}]
  volumes: [{name: config, configMap: {name: prometheus}}, {name: data, emptyDir: {}}]
`

// prometheus is a Prometheus in the cluster.
type prometheus struct {
	pod *kube.Pod
}

// installPrometheus runs a real Prometheus with the shipped scrape configuration,
// changed in nothing but how often it scrapes: every 2s.
func (b *bench) installPrometheus(ctx context.Context) (*prometheus, error) {
	program, err := b.Build(ctx, prometheusProgram)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "natlens-e2e-")
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	var image bytes.Buffer
	if err := kube.PackImage(&image, "natlens.test/prometheus:latest", "prometheus", program); err != nil {
		return nil, err
	}
	archive := filepath.Join(dir, "prometheus.tar")
	if err := os.WriteFile(archive, image.Bytes(), 0o644); err != nil {
		return nil, err
	}
	if err := b.Nodes[0].Load(ctx, archive); err != nil {
		return nil, err
	}
	shipped, err := os.ReadFile(b.file("deploy/prometheus-scrape.yaml"))
	if err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(config, append([]byte("global: {scrape_interval: 2s}\n"), shipped...), 0o644); err != nil {
		return nil, err
	}
	for _, args := range [][]string{
		{"create", "namespace", "monitoring"},
		{"create", "clusterrolebinding", "natlens-metrics-reader", "--clusterrole=natlens-metrics-reader", "--serviceaccount=monitoring:prometheus"},
		{"-n", "natlens-system", "create", "role", "find-pods", "--verb=get,list,watch", "--resource=pods"},
		{"-n", "natlens-system", "create", "rolebinding", "find-pods", "--role=find-pods", "--serviceaccount=monitoring:prometheus"},
		{"-n", "monitoring", "create", "configmap", "prometheus", "--from-file=prometheus.yml=" + config},
	} {
		if _, err := b.Kubectl(ctx, args...); err != nil && !strings.Contains(err.Error(), "already exists") {
			return nil, err
		}
	}
	if _, err := b.KubectlInput(ctx, strings.NewReader(prometheusManifest), "apply", "-f", "-"); err != nil {
		return nil, err
	}
	if _, err := b.Kubectl(ctx, "wait", "-n", "monitoring", "--for=condition=Ready", "pod/prometheus", "--timeout=60s"); err != nil {
		return nil, err
	}
	pod, err := b.Pod(ctx, "monitoring", "prometheus")
	return &prometheus{pod: pod}, err
}

// get asks the API of Prometheus, and decodes the data in the answer.
func (p *prometheus) get(ctx context.Context, path string, data any) error {
	body, err := httpGet(ctx, p.pod.Client(), "http://127.0.0.1:9090/api/v1/"+path)
	if err != nil {
		return err
	}
	var answer struct{ Data json.RawMessage }
	if err := json.Unmarshal(body, &answer); err != nil {
		return err
	}
	return json.Unmarshal(answer.Data, data)
}

// query returns the value of a series for each node.
func (p *prometheus) query(ctx context.Context, promQL string) (map[string]float64, error) {
	var data struct {
		Result []struct {
			Metric map[string]string
			Value  [2]any
		}
	}
	if err := p.get(ctx, "query?query="+url.QueryEscape(promQL), &data); err != nil {
		return nil, err
	}
	out := map[string]float64{}
	for _, r := range data.Result {
		node := r.Metric["node"]
		if _, ok := out[node]; ok {
			return nil, fmt.Errorf("%s: several series for node %q", promQL, node)
		}
		text, _ := r.Value[1].(string)
		v, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", promQL, err)
		}
		out[node] = v
	}
	return out, nil
}

// prometheus checks that Prometheus finds all agents and holds what their JSON says.
func (w *walk) prometheus(ctx context.Context) {
	var p *prometheus
	if !w.check("a Prometheus with deploy/prometheus-scrape.yaml finds every agent, and scrapes it", func() (seen string, err error) {
		if p, err = w.installPrometheus(ctx); err != nil {
			return "", err
		}
		err = eventually(ctx, 30*time.Second, func() error {
			var targets struct {
				ActiveTargets []struct{ Health, LastError, ScrapeURL string }
			}
			if err := p.get(ctx, "targets", &targets); err != nil {
				return err
			}
			var up []string
			for _, t := range targets.ActiveTargets {
				if t.Health != "up" {
					return fmt.Errorf("%s is %s: %s", t.ScrapeURL, t.Health, t.LastError)
				}
				up = append(up, t.ScrapeURL)
			}
			if seen = strings.Join(up, ", "); len(up) != len(w.Nodes) {
				return fmt.Errorf("targets %v, want one for each node", up)
			}
			return nil
		})
		return seen, err
	}) {
		return
	}
	w.check("its natlens_* series say what the agents' JSON says", func() (seen string, err error) {
		err = eventually(ctx, 30*time.Second, func() (err error) {
			seen, err = w.series(ctx, p)
			return err
		})
		return seen, err
	})
}

// series compares the series of all nodes with the JSON of their agents.
func (w *walk) series(ctx context.Context, p *prometheus) (string, error) {
	const of = `{namespace="default",service="go-app"}`
	compared := 0
	for _, n := range w.Nodes {
		var doc servicesDoc
		if err := agentGet(ctx, n, "/api/v1/services", &doc); err != nil {
			return "", err
		}
		want := map[string]float64{"natlens_up": 1, "natlens_services": float64(len(doc.Services))}
		for _, s := range doc.Services {
			if s.Namespace != "default" || s.Name != "go-app" {
				continue
			}
			least, most := 1.0, 0.0
			endpoints := s.Frontends[0].Routes[0].Endpoints
			for _, e := range endpoints {
				least, most = min(least, e.Share), max(most, e.Share)
			}
			want["natlens_service_endpoints"+of] = float64(len(endpoints))
			want["natlens_service_share_min_ratio"+of] = least
			want["natlens_service_share_max_ratio"+of] = most
		}
		if len(want) != 5 {
			return "", fmt.Errorf("the agent of %s does not know default/go-app", n.Name)
		}
		for series, value := range want {
			got, err := p.query(ctx, series)
			if err != nil {
				return "", err
			}
			if v, ok := got[n.Name]; !ok || math.Abs(v-value) > 1e-9 {
				return "", fmt.Errorf("%s of %s: Prometheus holds %v, the agent says %v", series, n.Name, got, value)
			}
			compared++
		}
	}
	return fmt.Sprintf("%d values of %d nodes are equal", compared, len(w.Nodes)), nil
}
