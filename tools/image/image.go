package main

import (
	"archive/tar"
	"bytes"
	"debug/buildinfo"
	"fmt"
	"io"
	"os"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	home       = "https://github.com/natlens/natlens"
	repository = "ghcr.io/natlens/" // as the manifests in deploy/ name the images
	tag        = "latest"
)

// program is what an image's configuration says besides the program itself.
type program struct {
	name        string
	description string
	user        string // uid:gid
	ports       []string
}

// programs are the images. Their users are those of the manifests in deploy/: a
// capability reaches a program only as uid 0, and echo needs none.
var programs = []program{
	{
		name:        "agent",
		description: "Where do connections to Kubernetes Services really go on this node?",
		user:        "0:0",
		ports:       []string{"9753/tcp"},
	},
	{
		name:        "echo",
		description: "Answers with the pod's addresses, so that natlens can see where a Service sends connections.",
		user:        "65532:65532",
		ports:       []string{"8080/tcp", "8080/udp"},
	},
}

func (p program) reference() string { return repository + p.name + ":" + tag }

// source is what a program was built from.
type source struct {
	version  string
	revision string // the commit, or empty
	created  time.Time
}

// binary is a program for one platform.
type binary struct {
	source
	path    string
	arch    string
	content []byte
}

// readBinary reads a program and checks that it is what an image FROM scratch
// needs.
func readBinary(path, arch string, of source) (binary, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return binary{}, err
	}
	info, err := buildinfo.Read(bytes.NewReader(content))
	if err != nil {
		return binary{}, fmt.Errorf("%s: %w", path, err)
	}
	set := map[string]string{}
	for _, s := range info.Settings {
		set[s.Key] = s.Value
	}
	for key, want := range map[string]string{"GOOS": "linux", "GOARCH": arch, "CGO_ENABLED": "0", "-trimpath": "true"} {
		if set[key] != want {
			return binary{}, fmt.Errorf("%s: built with %s=%s, want %s", path, key, set[key], want)
		}
	}
	return binary{source: of, path: path, arch: arch, content: content}, nil
}

// labels are the annotations that the OCI image specification defines.
func labels(p program, bin binary) map[string]string {
	const prefix = "org.opencontainers.image."
	out := map[string]string{
		prefix + "title":         "natlens " + p.name,
		prefix + "description":   p.description,
		prefix + "url":           home,
		prefix + "source":        home,
		prefix + "documentation": home + "#readme",
		prefix + "licenses":      "Apache-2.0",
		prefix + "version":       bin.version,
		prefix + "created":       bin.created.Format(time.RFC3339),
	}
	if bin.revision != "" {
		out[prefix+"revision"] = bin.revision
	}
	return out
}

// newImage returns the image of one program for one platform.
func newImage(p program, bin binary) (v1.Image, error) {
	file, err := layerOf(p.name, bin)
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(file)), nil
	}, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	created := v1.Time{Time: bin.created}
	base := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err := mutate.Append(base, mutate.Addendum{Layer: layer, History: v1.History{Created: created, CreatedBy: "make image"}})
	if err != nil {
		return nil, err
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture, cfg.Created = "linux", bin.arch, created
	cfg.Config = v1.Config{
		User:         p.user,
		Entrypoint:   []string{"/" + p.name},
		WorkingDir:   "/",
		Labels:       labels(p, bin),
		ExposedPorts: map[string]struct{}{},
	}
	for _, port := range p.ports {
		cfg.Config.ExposedPorts[port] = struct{}{}
	}
	img, err = mutate.ConfigFile(img, cfg)
	if err != nil {
		return nil, err
	}
	return mutate.Annotations(img, labels(p, bin)).(v1.Image), nil
}

// layerOf returns the tar of a file system with nothing in it but the program.
func layerOf(name string, bin binary) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(bin.content)), ModTime: bin.created}); err != nil {
		return nil, err
	}
	if _, err := w.Write(bin.content); err != nil {
		return nil, err
	}
	return buf.Bytes(), w.Close()
}

// newIndex returns the list of one image for several platforms.
func newIndex(images ...v1.Image) (v1.ImageIndex, error) {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, img := range images {
		cfg, err := img.ConfigFile()
		if err != nil {
			return nil, err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add:        img,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: cfg.OS, Architecture: cfg.Architecture}},
		})
	}
	manifest, err := images[0].Manifest()
	if err != nil {
		return nil, err
	}
	return mutate.Annotations(index, manifest.Annotations).(v1.ImageIndex), nil
}
