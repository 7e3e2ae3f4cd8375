package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Node is a machine with containerd, a kubelet and kube-proxy.
type Node struct {
	*Box
	Addrs    []netip.Addr   // one of each family
	PodCIDRs []netip.Prefix // one of each family
	Proxy    Proxy

	Containerd *Process
	Kubelet    *Process
	KubeProxy  *Process // another one after [Node.ChangeProxy]

	labels map[string]string
}

const (
	cniPlugins       = "/usr/lib/cni"
	containerdSocket = "/run/containerd/containerd.sock"
	kubeletDir       = "/var/lib/kubelet"
)

func (c *Cluster) newNode(i int, cfg NodeConfig) *Node {
	n := &Node{Box: c.boxOf(cfg.Name), Addrs: nodeAddrs(i), PodCIDRs: podCIDRs(i), Proxy: cfg.Proxy, labels: cfg.Labels}
	n.Containerd = &Process{
		Name: "containerd", box: n.Box, path: os.Getenv("PATH") + ":/usr/sbin:/sbin",
		argv: []string{"containerd", "--config=/var/lib/containerd.toml"},
		check: func(ctx context.Context) error {
			_, err := n.Exec(ctx, "ctr", "--address", containerdSocket, "--connect-timeout", "1s", "version")
			return err
		},
	}
	n.Kubelet = &Process{
		Name: "kubelet", box: n.Box, path: n.path(cfg.Proxy.Mode),
		argv: []string{
			c.cache.program(Version, "kubelet"), "--config=" + kubeletDir + "/config.yaml", "--kubeconfig=" + kubeletDir + "/kubeconfig",
			"--root-dir=" + kubeletDir, "--hostname-override=" + n.Name, "--node-ip=" + join(n.Addrs),
		},
		check: func(ctx context.Context) error {
			_, err := n.get(ctx, "http://127.0.0.1:10248/healthz")
			return err
		},
	}
	n.KubeProxy = n.kubeProxy(cfg.Proxy)
	return n
}

// startRuntime starts containerd, with the pause image in it.
func (n *Node) startRuntime(ctx context.Context, pause string) error {
	// opt.path: it would be in /opt.
	config := fmt.Sprintf(`version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
address = %q
[plugins."io.containerd.internal.v1.opt"]
path = "/var/lib/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = %q
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = %q
conf_dir = "/var/lib/cni/net.d"
`, containerdSocket, pauseImage, cniPlugins)
	if err := os.WriteFile(n.dir("lib/containerd.toml"), []byte(config), 0o644); err != nil {
		return err
	}
	if err := n.writeCNI(); err != nil {
		return err
	}
	if err := n.Containerd.Start(ctx); err != nil {
		return err
	}
	var image bytes.Buffer
	if err := PackImage(&image, pauseImage, "pause", pause); err != nil {
		return err
	}
	return n.importImage(ctx, func(cmd *exec.Cmd) error {
		cmd.Stdin = &image
		return n.Start(cmd)
	}, "-")
}

// writeCNI writes how pods get their network: one interface each, and routes. On a
// bridge, pods of a node would answer each other past its rules.
func (n *Node) writeCNI() error {
	var ranges, routes []any
	for _, p := range n.PodCIDRs {
		ranges = append(ranges, []any{map[string]any{"subnet": p}})
		all := "0.0.0.0/0"
		if p.Addr().Is6() {
			all = "::/0"
		}
		routes = append(routes, map[string]any{"dst": all})
	}
	config, err := json.Marshal(map[string]any{
		"cniVersion": "0.4.0", "name": "pods",
		"plugins": []any{map[string]any{
			"type": "ptp", "ipMasq": false,
			"ipam": map[string]any{"type": "host-local", "ranges": ranges, "routes": routes},
		}},
	})
	if err != nil {
		return err
	}
	dir := n.dir("lib/cni/net.d")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "pods.conflist"), config, 0o644)
}

// Load loads an image archive into the node, so that pods find the image there.
func (n *Node) Load(ctx context.Context, archive string) error {
	file, err := os.Open(archive) // the paths of the box are not those of this machine
	if err != nil {
		return err
	}
	defer file.Close()
	return n.importImage(ctx, func(cmd *exec.Cmd) error {
		cmd.Stdin = file
		return n.Start(cmd)
	}, "-")
}

func (n *Node) importImage(ctx context.Context, start func(*exec.Cmd) error, from string) error {
	_, err := output(ctx, start, "ctr", "--address", containerdSocket, "--namespace", "k8s.io", "images", "import", from)
	return err
}

// Load loads image archives into all nodes.
func (c *Cluster) Load(ctx context.Context, archives ...string) error {
	return c.each(func(n *Node) error {
		for _, a := range archives {
			if err := n.Load(ctx, a); err != nil {
				return err
			}
		}
		return nil
	})
}

// startNodes makes the Nodes, starts their kubelets and kube-proxies, and waits
// until all are ready.
func (c *Cluster) startNodes(ctx context.Context) error {
	var list []any
	for _, n := range c.Nodes {
		// Made here, and adopted by the kubelet, so that every node gets the range of
		// pods that the routes are for.
		list = append(list, map[string]any{
			"apiVersion": "v1", "kind": "Node",
			"metadata": map[string]any{"name": n.Name, "labels": n.labels},
			"spec":     map[string]any{"podCIDR": n.PodCIDRs[0], "podCIDRs": n.PodCIDRs},
		})
	}
	nodes, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "List", "items": list})
	if err != nil {
		return err
	}
	if _, err := c.KubectlInput(ctx, bytes.NewReader(nodes), "create", "-f", "-"); err != nil {
		return err
	}
	c.log("starting kubelets")
	if err := c.each(func(n *Node) error { return n.startKubelet(ctx) }); err != nil {
		return err
	}
	c.log("waiting until the nodes have addresses, then starting kube-proxies")
	if err := c.each(func(n *Node) error { return n.firstProxy(ctx) }); err != nil {
		return err
	}
	c.log("waiting until the nodes are ready")
	return c.each(func(n *Node) error {
		err := wait(ctx, time.Minute, func() error { return n.isReady(ctx) })
		if err != nil {
			err = fmt.Errorf("%w\n%s", err, tail(n.Kubelet.LogFile(), 25))
		}
		return err
	})
}

func (n *Node) startKubelet(ctx context.Context) error {
	// resolv.conf: this machine's may be a link to what a box does not have.
	config := fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
containerRuntimeEndpoint: unix://%s
cgroupDriver: cgroupfs
cgroupRoot: %s
cgroupsPerQOS: false
enforceNodeAllocatable: []
failCgroupV1: false
failSwapOn: false
localStorageCapacityIsolation: false
oomScoreAdj: 0
clusterDNS: [10.56.0.10] # nobody there, but none would be worth a warning per pod
resolvConf: %[3]s/resolv.conf
volumePluginDir: %[3]s/volumeplugins
evictionHard: {memory.available: 1Mi, nodefs.available: 1Mi, imagefs.available: 1Mi}
imageGCHighThresholdPercent: 100
`, containerdSocket, cgroup(n.cluster.Name)+"/"+n.Name, kubeletDir)
	err := os.MkdirAll(n.dir("lib/kubelet"), 0o755)
	err = errors.Join(err,
		n.writeProxy(), // with the iptables that the kubelet is to use as well
		os.WriteFile(n.dir("lib/kubelet/config.yaml"), []byte(config), 0o644),
		os.WriteFile(n.dir("lib/kubelet/resolv.conf"), []byte("nameserver 127.0.0.1\n"), 0o644),
		copyFile(n.cluster.kubeconfig(n.Name), n.dir("lib/kubelet/kubeconfig")),
		copyFile(n.cluster.kubeconfig("kube-proxy"), n.dir("lib/kube-proxy/kubeconfig")),
	)
	if err != nil {
		return err
	}
	return n.Kubelet.Start(ctx)
}

// firstProxy starts kube-proxy when the Node has addresses: it would end when it
// sees them appear.
func (n *Node) firstProxy(ctx context.Context) error {
	err := wait(ctx, time.Minute, func() error {
		out, err := n.cluster.Kubectl(ctx, "get", "node", n.Name, "-o", "jsonpath={.status.addresses[*].address}")
		if err == nil && !strings.Contains(string(out), n.Addrs[0].String()) {
			err = fmt.Errorf("addresses of the Node: %q", out)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("kubelet of %s: %w\n%s", n.Name, err, tail(n.Kubelet.LogFile(), 25))
	}
	return n.KubeProxy.Start(ctx)
}

func (n *Node) isReady(ctx context.Context) error {
	out, err := n.cluster.Kubectl(ctx, "get", "node", n.Name, "-o", `jsonpath={range .status.conditions[?(@.type=="Ready")]}{.status} {.message}{end}`)
	if err == nil && !strings.HasPrefix(string(out), "True") {
		err = fmt.Errorf("the Node says of being ready: %s", out)
	}
	return err
}

func copyFile(from, to string) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, content, 0o600)
}
