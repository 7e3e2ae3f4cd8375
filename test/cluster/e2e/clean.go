package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/natlens/natlens/test/cluster/kube"
)

// footprint lists what programs of a cluster would leave on this machine if they
// were not in a box.
func footprint(ctx context.Context) ([]string, error) {
	home, err := os.UserHomeDir()
	if err != nil {
		return nil, err
	}
	var found []string
	for _, path := range []string{
		filepath.Join(home, ".kube"),
		"/etc/cni", "/opt/cni", "/opt/containerd", "/run/containerd", "/run/kubernetes", "/run/mount",
		"/usr/libexec/kubernetes", "/var/lib/cni", "/var/lib/containerd", "/var/lib/etcd", "/var/lib/kubelet", "/var/log/containers", "/var/log/pods",
	} {
		if _, err := os.Lstat(path); err == nil {
			found = append(found, path)
		}
	}
	out, err := exec.CommandContext(ctx, "nft", "list", "tables").Output()
	if err != nil {
		return nil, fmt.Errorf("nft list tables: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		found = append(found, strings.TrimSpace(line))
	}
	return found, nil
}

// untouched checks that nothing came to this machine's footprint, and that nothing
// of the cluster of that name runs or is mounted.
func untouched(ctx context.Context, name string, before []string) (string, error) {
	left, err := kube.Left(name)
	if err != nil {
		return "", err
	}
	after, err := footprint(ctx)
	if err != nil {
		return "", err
	}
	for _, x := range after {
		if !slices.Contains(before, x) {
			left = append(left, x)
		}
	}
	if len(left) > 0 {
		return "", fmt.Errorf("left: %s", strings.Join(left, "; "))
	}
	return "no process, and so no namespace; no mount, cgroup, table or file", nil
}
