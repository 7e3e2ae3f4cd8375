package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

// home holds a directory for each cluster of this machine.
const home = "/var/lib/natlens-cluster"

// Config describes a cluster.
type Config struct {
	// Name tells clusters of one machine apart: "natlens" if empty.
	Name string
	// Nodes are the nodes: if empty, [ThreeNodes] with kube-proxy as it is by
	// default.
	Nodes []NodeConfig
}

// NodeConfig describes a node.
type NodeConfig struct {
	Name   string
	Labels map[string]string // besides those that a kubelet gives
	Proxy  Proxy
}

// ThreeNodes returns node1, node2 and node3, in zones a, b and c, with these
// kube-proxies, or the default one where there are fewer.
func ThreeNodes(proxies ...Proxy) []NodeConfig {
	var nodes []NodeConfig
	for i := range 3 {
		n := NodeConfig{Name: fmt.Sprint("node", i+1), Labels: map[string]string{"topology.kubernetes.io/zone": string(rune('a' + i))}}
		if i < len(proxies) {
			n.Proxy = proxies[i]
		}
		nodes = append(nodes, n)
	}
	return nodes
}

func (cfg *Config) complete() error {
	if cfg.Name == "" {
		cfg.Name = "natlens"
	}
	if !regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,30}$`).MatchString(cfg.Name) {
		return fmt.Errorf("cluster name %q: want up to 31 lower-case letters, digits and dashes", cfg.Name)
	}
	if len(cfg.Nodes) == 0 {
		cfg.Nodes = ThreeNodes()
	}
	for i := range cfg.Nodes {
		if err := cfg.Nodes[i].Proxy.complete(); err != nil {
			return fmt.Errorf("node %s: %w", cfg.Nodes[i].Name, err)
		}
	}
	return nil
}

// Cluster is a running Kubernetes.
type Cluster struct {
	Name    string
	Nodes   []*Node
	Control *Box // where etcd and the API server run; the router between nodes and outside
	Outside *Box // a client that belongs to no node

	dir        string
	cache      *cache
	log        func(format string, args ...any)
	components []*Process // of Control
}

// newCluster returns the cluster that a configuration describes, running or not.
func newCluster(cfg Config, log func(string, ...any)) (*Cluster, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	store, err := openCache(log)
	if err != nil {
		return nil, err
	}
	c := &Cluster{Name: cfg.Name, dir: filepath.Join(home, cfg.Name), cache: store, log: log}
	c.Control, c.Outside = c.boxOf("control"), c.boxOf("outside")
	c.components = c.controlPlane()
	for i, n := range cfg.Nodes {
		c.Nodes = append(c.Nodes, c.newNode(i, n))
	}
	return c, nil
}

// Boxes returns all boxes, control first.
func (c *Cluster) Boxes() []*Box {
	all := []*Box{c.Control, c.Outside}
	for _, n := range c.Nodes {
		all = append(all, n.Box)
	}
	return all
}

// Box returns the box of a name: control, outside or a node's.
func (c *Cluster) Box(name string) (*Box, error) {
	var names []string
	for _, b := range c.Boxes() {
		if b.Name == name {
			return b, nil
		}
		names = append(names, b.Name)
	}
	return nil, fmt.Errorf("no box %q, only %s", name, strings.Join(names, ", "))
}

// Node returns the node of a name.
func (c *Cluster) Node(name string) (*Node, error) {
	for _, n := range c.Nodes {
		if n.Name == name {
			return n, nil
		}
	}
	return nil, fmt.Errorf("no node %q", name)
}

// Processes returns the processes of a box that are started with it.
func (c *Cluster) Processes(b *Box) []*Process {
	if b == c.Control {
		return c.components
	}
	for _, n := range c.Nodes {
		if n.Box == b {
			return []*Process{n.Containerd, n.Kubelet, n.KubeProxy}
		}
	}
	return nil
}

// Up makes a cluster and returns it when all nodes are ready and their kube-proxies
// have written rules. It first takes down what there is of that name. It builds
// what is not built yet. On failure nothing stays. Progress goes to out.
func Up(ctx context.Context, cfg Config, out io.Writer) (*Cluster, error) {
	var mu sync.Mutex
	start := time.Now()
	log := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintf(out, "%5.1fs  %s\n", time.Since(start).Seconds(), fmt.Sprintf(format, args...))
	}
	if err := preflight(); err != nil {
		return nil, err
	}
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	lock, err := lockName(ctx, cfg.Name)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	if err := down(ctx, cfg.Name); err != nil {
		return nil, fmt.Errorf("clearing what an earlier cluster left: %w", err)
	}
	c, err := newCluster(cfg, log)
	if err != nil {
		return nil, err
	}
	if err := c.up(ctx, cfg); err != nil {
		return nil, errors.Join(err, down(context.WithoutCancel(ctx), cfg.Name))
	}
	return c, nil
}

func (c *Cluster) up(ctx context.Context, cfg Config) error {
	versions := []string{Version}
	for _, n := range cfg.Nodes {
		if !slices.Contains(versions, n.Proxy.Version) {
			versions = append(versions, n.Proxy.Version)
		}
	}
	if err := c.cache.build(ctx, versions); err != nil {
		return err
	}
	for _, dir := range []string{"log", "run", "pause"} {
		if err := os.MkdirAll(filepath.Join(c.dir, dir), 0o755); err != nil {
			return err
		}
	}
	pause, err := buildPause(ctx, filepath.Join(c.dir, "pause"))
	if err != nil {
		return err
	}
	c.log("making the boxes and their network")
	for _, b := range c.Boxes() {
		if err := b.make(ctx, pause); err != nil {
			return err
		}
	}
	if err := c.wire(ctx); err != nil {
		return err
	}
	runtimes := make(chan error, 1) // containerd needs nothing of the others
	go func() {
		runtimes <- c.each(func(n *Node) error { return n.startRuntime(ctx, pause) })
	}()
	err = c.startControlPlane(ctx)
	if err := errors.Join(err, <-runtimes); err != nil {
		return err
	}
	if err := c.startNodes(ctx); err != nil {
		return err
	}
	if err := c.writeConfig(); err != nil { // from now on, Open finds it
		return err
	}
	c.log("the cluster is up")
	return nil
}

// writeConfig keeps for [Open] what the cluster is like.
func (c *Cluster) writeConfig() error {
	cfg := Config{Name: c.Name}
	for _, n := range c.Nodes {
		cfg.Nodes = append(cfg.Nodes, NodeConfig{Name: n.Name, Labels: n.labels, Proxy: n.Proxy})
	}
	text, err := json.Marshal(cfg)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(c.dir, "config.json"), text, 0o644)
}

// each runs f for all nodes at the same time.
func (c *Cluster) each(f func(*Node) error) error {
	errs := make([]error, len(c.Nodes))
	var all sync.WaitGroup
	for i, n := range c.Nodes {
		all.Go(func() { errs[i] = f(n) })
	}
	all.Wait()
	return errors.Join(errs...)
}

// ErrNotUp says that there is no such cluster.
var ErrNotUp = errors.New("the cluster is not up")

// Open returns a cluster that another program has brought up.
func Open(name string) (*Cluster, error) {
	cfg := Config{Name: name}
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	text, err := os.ReadFile(filepath.Join(home, cfg.Name, "config.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNotUp
	} else if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, &cfg); err != nil {
		return nil, err
	}
	c, err := newCluster(cfg, func(string, ...any) {})
	if err != nil {
		return nil, err
	}
	for _, b := range c.Boxes() {
		if b.first.PID() == 0 {
			return nil, fmt.Errorf("%w: %s has ended", ErrNotUp, b.Name)
		}
		for _, p := range c.Processes(b) {
			p.find()
		}
	}
	return c, nil
}

// Down takes a cluster down, however much of it there is. But for the cache of
// programs nothing stays.
func Down(ctx context.Context, name string) error {
	cfg := Config{Name: name}
	if err := cfg.complete(); err != nil {
		return err
	}
	lock, err := lockName(ctx, cfg.Name)
	if err != nil {
		return err
	}
	defer lock.Close()
	return down(ctx, cfg.Name)
}

// lockName keeps two programs from making and taking down a cluster at the same
// time. The lock is with what stays anyway.
func lockName(ctx context.Context, name string) (io.Closer, error) {
	c, err := openCache(nil)
	if err != nil {
		return nil, err
	}
	return lockFile(ctx, filepath.Join(c.dir, name+".lock"))
}

// Kubectl runs kubectl as the cluster's administrator, and returns what it printed.
// Files are this machine's.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) ([]byte, error) {
	return c.KubectlInput(ctx, nil, args...)
}

// KubectlInput is [Cluster.Kubectl] with something to read, for -f -.
func (c *Cluster) KubectlInput(ctx context.Context, stdin io.Reader, args ...string) ([]byte, error) {
	return output(ctx, func(cmd *exec.Cmd) error {
		cmd.Stdin = stdin
		return c.StartKubectl(cmd)
	}, c.KubectlPath(), args...)
}

// KubectlPath is the program that [Cluster.StartKubectl] wants to be started.
func (c *Cluster) KubectlPath() string { return c.cache.program(Version, "kubectl") }

// StartKubectl starts kubectl on the network of control. The caller calls cmd.Wait.
func (c *Cluster) StartKubectl(cmd *exec.Cmd) error {
	cmd.Env = append(cmd.Environ(), "KUBECONFIG="+c.kubeconfig("admin"), "KUBECACHEDIR="+filepath.Join(c.dir, "kubectl"))
	return c.Control.Netns.Start(cmd)
}

// preflight says at once what is missing.
func preflight() error {
	if os.Geteuid() != 0 {
		return errors.New("a cluster needs root: it makes namespaces, mounts and cgroups")
	}
	needs := map[string]string{
		"etcd": "etcd-server", "containerd": "containerd", "ctr": "containerd", "containerd-shim-runc-v2": "containerd", "runc": "runc",
		cniPlugins + "/ptp": "containernetworking-plugins", "iptables-nft": "iptables", "iptables-legacy": "iptables", "nft": "nftables",
		"conntrack": "conntrack", "ipset": "ipset", "ip": "iproute2", "mount": "mount", "go": "a Go toolchain",
	}
	var missing []string
	for program, from := range needs {
		if _, err := exec.LookPath(program); err != nil && !slices.Contains(missing, from) {
			missing = append(missing, from)
		}
	}
	if len(missing) > 0 {
		slices.Sort(missing)
		return fmt.Errorf("missing Debian packages: %s", strings.Join(missing, " "))
	}
	return nil
}
