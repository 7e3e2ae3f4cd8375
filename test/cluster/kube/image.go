package kube

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
)

// pauseImage is what every pod's first container runs.
const pauseImage = "natlens.test/pause:latest"

// PackImage writes an OCI image archive with one static program and nothing else,
// under the name reference. [Cluster.Load] loads it.
func PackImage(out io.Writer, reference, name, program string) error {
	content, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	layer, err := tarOf(file{name, 0o755, content})
	if err != nil {
		return err
	}
	type object = map[string]any
	var blobs []file
	add := func(mediaType string, blob []byte) object {
		sum := fmt.Sprintf("%x", sha256.Sum256(blob))
		blobs = append(blobs, file{"blobs/sha256/" + sum, 0o644, blob})
		return object{"mediaType": mediaType, "digest": "sha256:" + sum, "size": len(blob)}
	}
	text := func(v object) []byte {
		b, _ := json.Marshal(v) // strings, numbers and maps alone
		return b
	}
	rootfs := add("application/vnd.oci.image.layer.v1.tar", layer)
	config := add("application/vnd.oci.image.config.v1+json", text(object{
		"os": "linux", "architecture": runtime.GOARCH,
		"config": object{"Entrypoint": []string{"/" + name}},
		"rootfs": object{"type": "layers", "diff_ids": []any{rootfs["digest"]}},
	}))
	manifest := add("application/vnd.oci.image.manifest.v1+json", text(object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": []any{rootfs},
	}))
	manifest["annotations"] = object{"io.containerd.image.name": reference}
	archive, err := tarOf(append(blobs,
		file{"oci-layout", 0o644, text(object{"imageLayoutVersion": "1.0.0"})},
		file{"index.json", 0o644, text(object{"schemaVersion": 2, "manifests": []any{manifest}})},
	)...)
	if err != nil {
		return err
	}
	_, err = out.Write(archive)
	return err
}

type file struct {
	name    string
	mode    int64
	content []byte
}

func tarOf(files ...file) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range files {
		if err := w.WriteHeader(&tar.Header{Name: f.name, Typeflag: tar.TypeReg, Mode: f.mode, Size: int64(len(f.content))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(f.content); err != nil {
			return nil, err
		}
	}
	return buf.Bytes(), w.Close()
}
