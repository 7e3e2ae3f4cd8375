package kube

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Version is the Kubernetes that the cluster runs. Nodes may have a kube-proxy of
// another version.
const Version = "v1.37.2"

// ProxyVersions are the versions of kube-proxy that can be built: of most others,
// some module was never published.
var ProxyVersions = []string{Version, "v1.35.4", "v1.34.4", "v1.28.15", "v1.23.17"}

// components are the programs built at Version.
var components = []string{"kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl", "kube-proxy"}

// cache holds what is built once for all clusters: the only thing that stays.
type cache struct {
	dir string
	log func(format string, args ...any)
}

func openCache(log func(string, ...any)) (*cache, error) {
	base, err := os.UserCacheDir()
	if err != nil {
		return nil, fmt.Errorf("where to keep the Kubernetes programs: %w", err)
	}
	c := &cache{dir: filepath.Join(base, "natlens-cluster"), log: log}
	return c, os.MkdirAll(c.dir, 0o755)
}

// program returns the path of a program of Kubernetes.
func (c *cache) program(version, name string) string { return filepath.Join(c.dir, version, name) }

// build builds the programs of these versions that are not there yet: all of
// Version, kube-proxy alone of others.
func (c *cache) build(ctx context.Context, versions []string) error {
	lock, err := lockFile(ctx, filepath.Join(c.dir, "lock"))
	if err != nil {
		return err
	}
	defer lock.Close()
	for _, version := range versions {
		if !slices.Contains(ProxyVersions, version) {
			return fmt.Errorf("kube-proxy %s cannot be built, only %s", version, strings.Join(ProxyVersions, ", "))
		}
		names := []string{"kube-proxy"}
		if version == Version {
			names = components
		}
		missing := slices.DeleteFunc(slices.Clone(names), func(name string) bool {
			_, err := os.Stat(c.program(version, name))
			return err == nil
		})
		if len(missing) == 0 {
			continue
		}
		// Ten minutes on two cores for all of Version, most of it for the first one.
		c.log("building %s of Kubernetes %s (once)", strings.Join(missing, ", "), version)
		start := time.Now()
		if err := c.buildVersion(ctx, version, missing); err != nil {
			return fmt.Errorf("building Kubernetes %s: %w", version, err)
		}
		c.log("built in %v", time.Since(start).Round(time.Second))
	}
	return nil
}

// buildVersion builds programs in a module of our own, since that of Kubernetes
// replaces its parts by directories that no released module has.
func (c *cache) buildVersion(ctx context.Context, version string, names []string) error {
	const module = "k8s.io/kubernetes"
	work, err := c.newModule(ctx, module, version, func(source string) (string, error) {
		edit, err := goCommand(ctx, c.dir, "mod", "edit", "-json", filepath.Join(source, "go.mod"))
		if err != nil {
			return "", err
		}
		return kubernetesModule(version, edit)
	})
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(work) }()
	// A linker older than Go 1.23 let a dependency of the oldest versions reach
	// into the runtime.
	flags := "-s -w -checklinkname=0 -X k8s.io/component-base/version.gitVersion=" + version
	for _, name := range names { // one by one, so that an interrupted build has made some
		c.log("  %s", name)
		if err := buildProgram(ctx, work, module+"/cmd/"+name, c.program(version, name), "-ldflags", flags); err != nil {
			return err
		}
	}
	return nil
}

// Program is a program to be built from its Go module.
type Program struct {
	Module, Version, Package string
	Flags                    []string // of go build
}

// Build builds a program that a test needs, unless it is in the cache, and returns
// its path.
func (c *Cluster) Build(ctx context.Context, p Program) (string, error) {
	name := path.Base(p.Package)
	file := c.cache.program(name+"-"+p.Version, name)
	lock, err := lockFile(ctx, filepath.Join(c.cache.dir, "lock"))
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if _, err := os.Stat(file); err == nil {
		return file, nil
	}
	c.log("building %s %s (once; a few minutes)", p.Package, p.Version)
	work, err := c.cache.newModule(ctx, p.Module, p.Version, func(string) (string, error) {
		return fmt.Sprintf("module natlens.test/build\n\nrequire %s %s\n", p.Module, p.Version), nil
	})
	if err == nil {
		defer func() { _ = os.RemoveAll(work) }()
		err = buildProgram(ctx, work, p.Package, file, append(p.Flags, "-ldflags=-s -w")...)
	}
	if err != nil {
		return "", fmt.Errorf("building %s: %w", p.Package, err)
	}
	return file, nil
}

// newModule returns a directory with a module that requires another one, whose
// source gomod is given, and whose checksums it takes over. The caller has the lock.
func (c *cache) newModule(ctx context.Context, module, version string, gomod func(source string) (string, error)) (string, error) {
	text, err := goCommand(ctx, c.dir, "mod", "download", "-json", module+"@"+version)
	if err != nil {
		return "", err
	}
	var download struct{ Dir string }
	if err := json.Unmarshal(text, &download); err != nil {
		return "", err
	}
	mod, err := gomod(download.Dir)
	if err != nil {
		return "", err
	}
	sums, err := os.ReadFile(filepath.Join(download.Dir, "go.sum"))
	if err != nil {
		return "", err
	}
	// One build at a time: what is there is of one that was interrupted.
	work := filepath.Join(c.dir, "build")
	if err := os.RemoveAll(work); err != nil {
		return "", err
	}
	err = errors.Join(
		os.Mkdir(work, 0o755),
		os.WriteFile(filepath.Join(work, "go.mod"), []byte(mod), 0o644),
		os.WriteFile(filepath.Join(work, "go.sum"), sums, 0o644),
	)
	return work, err
}

// buildProgram builds a program into a file, which appears when it is whole.
func buildProgram(ctx context.Context, work, pkg, file string, flags ...string) error {
	built := filepath.Join(work, "program")
	args := append([]string{"build", "-mod=mod", "-trimpath", "-o", built}, flags...)
	if _, err := goCommand(ctx, work, append(args, pkg)...); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.Rename(built, file)
}

// kubernetesModule returns the go.mod of a module that builds Kubernetes, given that of
// Kubernetes as go mod edit -json prints it.
func kubernetesModule(version string, edit []byte) (string, error) {
	var k struct {
		Go      string
		Replace []struct {
			Old, New struct{ Path, Version string }
		}
	}
	if err := json.Unmarshal(edit, &k); err != nil {
		return "", err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "module natlens.test/kubernetes\n\ngo %s\n\nrequire k8s.io/kubernetes %s\n\nreplace (\n", k.Go, version)
	for _, r := range k.Replace {
		if strings.HasPrefix(r.New.Path, "./staging/") {
			r.New.Path, r.New.Version = r.Old.Path, "v0."+strings.TrimPrefix(version, "v1.")
		}
		fmt.Fprintf(&b, "\t%s %s => %s %s\n", r.Old.Path, r.Old.Version, r.New.Path, r.New.Version)
	}
	b.WriteString(")\n")
	return b.String(), nil
}

//go:embed pause/main.go
var pauseSource []byte

// buildPause builds the program of boxes and of the pause image into a directory.
func buildPause(ctx context.Context, dir string) (string, error) {
	err := errors.Join(
		os.WriteFile(filepath.Join(dir, "go.mod"), []byte("module natlens.test/pause\n"), 0o644),
		os.WriteFile(filepath.Join(dir, "main.go"), pauseSource, 0o644),
	)
	if err != nil {
		return "", err
	}
	if _, err := goCommand(ctx, dir, "build", "-trimpath", "-ldflags", "-s -w", "-o", "pause", "."); err != nil {
		return "", fmt.Errorf("building the pause program: %w", err)
	}
	return filepath.Join(dir, "pause"), nil
}

// goCommand runs the go command for static programs, whatever the surrounding
// module or workspace.
func goCommand(ctx context.Context, dir string, args ...string) ([]byte, error) {
	return output(ctx, func(cmd *exec.Cmd) error {
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=mod", "GOWORK=off", "GOOS=", "GOARCH=")
		return cmd.Start()
	}, "go", args...)
}

// lockFile waits until this process alone has a file; closing it lets others in.
func lockFile(ctx context.Context, path string) (io.Closer, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return file, nil
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(context.Cause(ctx), file.Close())
		case <-time.After(200 * time.Millisecond):
		}
	}
}
