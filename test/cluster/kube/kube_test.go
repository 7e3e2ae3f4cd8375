package kube

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestKubernetesModule(t *testing.T) {
	edit := `{"Go": "1.26.0", "Replace": [
		{"Old": {"Path": "k8s.io/api"}, "New": {"Path": "./staging/src/k8s.io/api"}},
		{"Old": {"Path": "a.test/old", "Version": "v1.0.0"}, "New": {"Path": "b.test/new", "Version": "v1.2.3"}}]}`
	got, err := kubernetesModule("v1.37.2", []byte(edit))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"go 1.26.0", "require k8s.io/kubernetes v1.37.2", "k8s.io/api => k8s.io/api v0.37.2", "a.test/old v1.0.0 => b.test/new v1.2.3"} {
		if !strings.Contains(strings.ReplaceAll(got, "  ", " "), line) {
			t.Errorf("no line %q in\n%s", line, got)
		}
	}
}

func TestLastSync(t *testing.T) {
	const last, count = "kubeproxy_sync_proxy_rules_last_timestamp_seconds", "kubeproxy_sync_proxy_rules_duration_seconds_count"
	for _, c := range []struct {
		name, metrics string
		synced        bool
	}{
		{"nothing yet", "# HELP " + last + " x\n", false},
		{"v1.28, not yet", count + " 0\n" + last + " 0\n", false},
		{"v1.28, one family", count + " 1\n" + last + " 1.79e+09\n", false},
		{"v1.28, both", count + " 2\n" + last + " 1.79e+09\n", true},
		{"v1.37, one family", last + `{ip_family="IPv4"} 1.79e+09`, false},
		{"v1.37, one not yet", last + "{ip_family=\"IPv4\"} 1.79e+09\n" + last + `{ip_family="IPv6"} 0`, false},
		{"v1.37, both", last + "{ip_family=\"IPv4\"} 1.79e+09\n" + last + `{ip_family="IPv6"} 1.79e+09`, true},
	} {
		if err := lastSync(c.metrics); (err == nil) != c.synced {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// TestIdentify checks that a process is known until it ends, also while nobody has
// taken note of its end.
func TestIdentify(t *testing.T) {
	cmd := exec.Command("cat")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := Process{running: identify(cmd.Process.Pid)}
	if p.PID() != cmd.Process.Pid {
		t.Errorf("PID is %d, want %d", p.PID(), cmd.Process.Pid)
	}
	other := Process{running: p.running}
	other.running.Start++
	if other.PID() != 0 {
		t.Error("a process that had the number before counts as running")
	}
	stdin.Close()
	err = wait(t.Context(), 1e10, func() error {
		if p.PID() != 0 {
			return errors.New("it still counts as running")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

func TestMarked(t *testing.T) {
	cmd := exec.Command("cat")
	Netns{cluster: "one"}.mark(cmd)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// Only now its environment is sure to be in place.
	err = wait(t.Context(), 1e10, func() error {
		if !marked(cmd.Process.Pid, "one") {
			return errors.New("its mark is not seen")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	for _, other := range []string{"on", "one2", ""} {
		if marked(cmd.Process.Pid, other) {
			t.Errorf("it counts as one of cluster %q", other)
		}
	}
	stdin.Close()
	_ = cmd.Wait()
}

func TestPackImage(t *testing.T) {
	program := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(program, []byte("content"), 0o755); err != nil {
		t.Fatal(err)
	}
	var archive bytes.Buffer
	if err := PackImage(&archive, "a.test/b:c", "b", program); err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for r := tar.NewReader(&archive); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		files[h.Name], _ = io.ReadAll(r)
	}
	type descriptor struct {
		Digest      string
		Annotations map[string]string
	}
	blob := func(d descriptor, into any) {
		t.Helper()
		content, ok := files["blobs/"+strings.ReplaceAll(d.Digest, ":", "/")]
		if !ok {
			t.Fatalf("no blob %s", d.Digest)
		}
		if err := json.Unmarshal(content, into); err != nil {
			t.Fatal(err)
		}
	}
	var index struct{ Manifests []descriptor }
	if err := json.Unmarshal(files["index.json"], &index); err != nil {
		t.Fatal(err)
	}
	if got := index.Manifests[0].Annotations["io.containerd.image.name"]; got != "a.test/b:c" {
		t.Errorf("the name is %q", got)
	}
	var manifest struct{ Config descriptor }
	blob(index.Manifests[0], &manifest)
	var config struct{ Config struct{ Entrypoint []string } }
	blob(manifest.Config, &config)
	if got := config.Config.Entrypoint; len(got) != 1 || got[0] != "/b" {
		t.Errorf("the entry point is %q", got)
	}
}

func TestConfig(t *testing.T) {
	cfg := Config{}
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	if cfg.Name != "natlens" || len(cfg.Nodes) != 3 || cfg.Nodes[2].Proxy != (Proxy{Version, IPTablesNFT}) {
		t.Errorf("completed to %+v", cfg)
	}
	for _, bad := range []Config{
		{Name: "../x"},
		{Nodes: ThreeNodes(Proxy{Version: "v1.30.0"})},
		{Nodes: ThreeNodes(Proxy{Mode: "ipvs"})},
		{Nodes: ThreeNodes(Proxy{Version: "v1.28.15", Mode: NFTables})},
	} {
		if err := bad.complete(); err == nil {
			t.Errorf("%+v is taken", bad)
		}
	}
}
