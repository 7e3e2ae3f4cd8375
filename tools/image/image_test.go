package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
)

var testSource = source{version: "v1.2.3", revision: "0123abc", created: time.Date(2024, 2, 3, 4, 5, 6, 0, time.UTC)}

// build makes small programs where pack looks for them.
func build(t *testing.T, dir, name string) {
	t.Helper()
	src := t.TempDir()
	write := func(file, text string) {
		if err := os.WriteFile(filepath.Join(src, file), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("go.mod", "module example.com/test\n\ngo 1.26.0\n")
	write("main.go", "package main\n\nfunc main() {}\n")
	for _, arch := range platforms {
		goBuild(t, src, filepath.Join(dir, arch, name), "GOOS=linux", "GOARCH="+arch, "CGO_ENABLED=0")
	}
}

func goBuild(t *testing.T, src, out string, env ...string) {
	t.Helper()
	cmd := exec.Command("go", "build", "-trimpath", "-o", out, ".")
	cmd.Dir = src
	cmd.Env = append(os.Environ(), env...)
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, said)
	}
}

func packed(t *testing.T, p program) string {
	t.Helper()
	dir := t.TempDir()
	build(t, dir, p.name)
	if err := pack(dir, p, testSource, io.Discard); err != nil {
		t.Fatal(err)
	}
	return dir
}

// entries reads a tar stream.
func entries(t *testing.T, r io.Reader) (headers []*tar.Header, content map[string][]byte) {
	t.Helper()
	content = map[string][]byte{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return headers, content
		} else if err != nil {
			t.Fatal(err)
		}
		headers = append(headers, h)
		if content[h.Name], err = io.ReadAll(tr); err != nil {
			t.Fatal(err)
		}
	}
}

// unpack lays an archive out in a directory, for the library to read.
func unpack(t *testing.T, file string) (dir string, index v1.ImageIndex) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	_, content := entries(t, bytes.NewReader(data))
	for name, data := range content {
		path := filepath.Join(dir, name)
		if strings.HasSuffix(name, "/") {
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	index, err = layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	return dir, index
}

// TestRepeatable packs twice, in other directories and at other times.
func TestRepeatable(t *testing.T) {
	p := programs[0]
	first, second := packed(t, p), packed(t, p)
	for _, suffix := range []string{".tar", "-amd64.tar", "-arm64.tar", "-amd64.cdx.json", "-arm64.cdx.json"} {
		a, err := os.ReadFile(filepath.Join(first, p.name+suffix))
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(second, p.name+suffix))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(a, b) {
			t.Errorf("%s: the second is another", p.name+suffix)
		}
	}
}

// TestArchive reads an archive as a container runtime does.
func TestArchive(t *testing.T) {
	for _, p := range programs {
		t.Run(p.name, func(t *testing.T) {
			dir := packed(t, p)
			_, top := unpack(t, filepath.Join(dir, p.name+".tar"))
			manifest, err := top.IndexManifest()
			if err != nil || len(manifest.Manifests) != 1 {
				t.Fatalf("want one image by name, got %v, %v", manifest, err)
			}
			if name := manifest.Manifests[0].Annotations["io.containerd.image.name"]; name != "ghcr.io/natlens/"+p.name+":latest" {
				t.Errorf("the image is named %q", name)
			}
			index, err := top.ImageIndex(manifest.Manifests[0].Digest)
			if err != nil {
				t.Fatal(err)
			}
			list, err := index.IndexManifest()
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, d := range list.Manifests {
				got = append(got, d.Platform.String())
				img, err := index.Image(d.Digest)
				if err != nil {
					t.Fatal(err)
				}
				checkImage(t, p, d.Platform.Architecture, img, filepath.Join(dir, d.Platform.Architecture, p.name))
			}
			if want := []string{"linux/amd64", "linux/arm64"}; !slices.Equal(got, want) {
				t.Errorf("platforms %v, want %v", got, want)
			}
		})
	}
}

func checkImage(t *testing.T, p program, arch string, img v1.Image, path string) {
	t.Helper()
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if cfg.OS != "linux" || cfg.Architecture != arch || cfg.Config.User != p.user || !slices.Equal(cfg.Config.Entrypoint, []string{"/" + p.name}) || !cfg.Created.Equal(testSource.created) {
		t.Errorf("%s: configuration %+v", arch, cfg)
	}
	for label, want := range map[string]string{"version": "v1.2.3", "revision": "0123abc", "created": "2024-02-03T04:05:06Z", "licenses": "Apache-2.0"} {
		if got := cfg.Config.Labels["org.opencontainers.image."+label]; got != want {
			t.Errorf("%s: label %s is %q, want %q", arch, label, got, want)
		}
	}
	layers, err := img.Layers()
	if err != nil || len(layers) != 1 {
		t.Fatalf("%s: layers %v, %v; want one", arch, layers, err)
	}
	r, err := layers[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	headers, content := entries(t, r)
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(headers) != 1 || headers[0].Mode != 0o755 || headers[0].Uid != 0 || !bytes.Equal(content[p.name], want) {
		t.Errorf("%s: the file system is not just the program: %+v", arch, headers)
	}
}

// TestDockerList checks that the list that only docker reads names what is in
// the archive.
func TestDockerList(t *testing.T) {
	dir, _ := unpack(t, filepath.Join(packed(t, programs[1]), "echo-arm64.tar"))
	data, err := os.ReadFile(filepath.Join(dir, "manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	var list []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	if err := json.Unmarshal(data, &list); err != nil || len(list) != 1 || !slices.Equal(list[0].RepoTags, []string{"ghcr.io/natlens/echo:latest"}) || len(list[0].Layers) != 1 {
		t.Fatalf("manifest.json: %s, %v", data, err)
	}
	config, err := os.ReadFile(filepath.Join(dir, list[0].Config))
	if err != nil || !strings.Contains(string(config), `"architecture":"arm64"`) {
		t.Errorf("configuration: %s, %v", config, err)
	}
	if _, err := os.Stat(filepath.Join(dir, list[0].Layers[0])); err != nil {
		t.Error(err)
	}
}

// TestSBOM checks what a reader of the document looks for.
func TestSBOM(t *testing.T) {
	f, err := os.Open(filepath.Join(packed(t, programs[0]), "agent-amd64.cdx.json"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var bom cdx.BOM
	if err := cdx.NewBOMDecoder(f, cdx.BOMFileFormatJSON).Decode(&bom); err != nil {
		t.Fatal(err)
	}
	if c := bom.Metadata.Component; c.Name != "example.com/test" || c.Version != "v1.2.3" {
		t.Errorf("about %s %s", c.Name, c.Version)
	}
	if !slices.ContainsFunc(*bom.Components, func(c cdx.Component) bool { return c.Name == "std" && c.Version != "" }) {
		t.Errorf("no standard library in %+v", *bom.Components)
	}
}

// TestRefuses checks that no image is made of what could not run in it.
func TestRefuses(t *testing.T) {
	dir := t.TempDir()
	build(t, dir, "agent")
	if err := os.Rename(filepath.Join(dir, "amd64", "agent"), filepath.Join(dir, "arm64", "agent")); err != nil {
		t.Fatal(err)
	}
	if _, err := readBinary(filepath.Join(dir, "arm64", "agent"), "arm64", testSource); err == nil || !strings.Contains(err.Error(), "GOARCH=amd64, want arm64") {
		t.Errorf("a program for another platform: %v", err)
	}
	if _, err := readBinary(filepath.Join(dir, "none"), "amd64", testSource); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no program: %v", err)
	}
	script := filepath.Join(dir, "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := readBinary(script, "amd64", testSource); err == nil {
		t.Error("a script passes for a program")
	}
}

// TestManifests checks that deploy/ names these images and runs them as the
// users in them.
func TestManifests(t *testing.T) {
	for _, p := range programs {
		file := map[string]string{"agent": "daemonset.yaml", "echo": "echo.yaml"}[p.name]
		text, err := os.ReadFile(filepath.Join("..", "..", "deploy", file))
		if err != nil {
			t.Fatal(err)
		}
		uid, gid, _ := strings.Cut(p.user, ":")
		for _, want := range []string{"image: " + p.reference(), "runAsUser: " + uid, "runAsGroup: " + gid} {
			if !regexp.MustCompile(`(?m)^\s*` + regexp.QuoteMeta(want) + `$`).Match(text) {
				t.Errorf("deploy/%s: no line %q", file, want)
			}
		}
	}
}
