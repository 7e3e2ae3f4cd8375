package main

import (
	"archive/tar"
	"encoding/json"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
)

// writeArchive writes an image under its name as an OCI image layout in a tar
// file, which containerd, podman and docker load. A docker that keeps its images
// without containerd reads a list of its own, which knows no platforms: it is
// written for the images in single.
func writeArchive(file, reference string, index v1.ImageIndex, single ...v1.Image) error {
	dir, err := os.MkdirTemp("", "natlens-image-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	_, name, _ := strings.Cut(reference, ":")
	_, err = layout.Write(dir, mutate.AppendManifests(empty.Index, mutate.IndexAddendum{
		Add: index,
		Descriptor: v1.Descriptor{Annotations: map[string]string{
			"io.containerd.image.name":          reference, // containerd and docker
			"org.opencontainers.image.ref.name": name,      // the specification's: the tag
		}},
	}))
	if err != nil {
		return err
	}
	if len(single) > 0 {
		if err := writeDockerList(filepath.Join(dir, "manifest.json"), reference, single); err != nil {
			return err
		}
	}
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	defer out.Close() // a second Close fails, which does not matter
	if err := tarTree(out, dir); err != nil {
		return err
	}
	return out.Close()
}

// writeDockerList writes the manifest.json of docker save.
func writeDockerList(file, reference string, images []v1.Image) error {
	type entry struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	blob := func(h v1.Hash) string { return "blobs/" + h.Algorithm + "/" + h.Hex }
	var list []entry
	for _, img := range images {
		manifest, err := img.Manifest()
		if err != nil {
			return err
		}
		e := entry{Config: blob(manifest.Config.Digest), RepoTags: []string{reference}}
		for _, layer := range manifest.Layers {
			e.Layers = append(e.Layers, blob(layer.Digest))
		}
		list = append(list, e)
	}
	data, err := json.Marshal(list)
	if err != nil {
		return err
	}
	return os.WriteFile(file, data, 0o644)
}

// tarTree writes a directory in the order of names, without owners and times.
func tarTree(out io.Writer, dir string) error {
	w := tar.NewWriter(out)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		h := tar.Header{Name: filepath.ToSlash(name), Typeflag: tar.TypeReg, Mode: 0o644, ModTime: time.Unix(0, 0)}
		if d.IsDir() {
			h.Name, h.Typeflag, h.Mode = h.Name+"/", tar.TypeDir, 0o755
			return w.WriteHeader(&h)
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		h.Size = int64(len(content))
		if err := w.WriteHeader(&h); err != nil {
			return err
		}
		_, err = w.Write(content)
		return err
	})
	if err != nil {
		return err
	}
	return w.Close()
}
