package kube

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
)

// Mode is how kube-proxy writes its rules.
type Mode string

// The modes. kube-proxy calls the first two iptables: which backend it writes to
// depends on the iptables that it finds.
const (
	IPTablesNFT    Mode = "iptables-nft"
	IPTablesLegacy Mode = "iptables-legacy"
	NFTables       Mode = "nftables"
)

// Proxy is a kube-proxy.
type Proxy struct {
	Version string // [Version] if empty; one of [ProxyVersions]
	Mode    Mode   // [IPTablesNFT] if empty
}

func (p Proxy) String() string { return p.Version + " " + string(p.Mode) }

func (p *Proxy) complete() error {
	if p.Version == "" {
		p.Version = Version
	}
	if p.Mode == "" {
		p.Mode = IPTablesNFT
	}
	if !slices.Contains([]Mode{IPTablesNFT, IPTablesLegacy, NFTables}, p.Mode) {
		return fmt.Errorf("no kube-proxy mode %q, only %s, %s, %s", p.Mode, IPTablesNFT, IPTablesLegacy, NFTables)
	}
	if !slices.Contains(ProxyVersions, p.Version) {
		return fmt.Errorf("no kube-proxy %s, only %s", p.Version, strings.Join(ProxyVersions, ", "))
	}
	if p.Mode == NFTables && (p.Version == "v1.28.15" || p.Version == "v1.23.17") {
		return fmt.Errorf("kube-proxy %s has no nftables mode", p.Version)
	}
	return nil
}

// kubeProxy returns the process of a kube-proxy.
func (n *Node) kubeProxy(p Proxy) *Process {
	return &Process{
		Name: "kube-proxy", box: n.Box, path: n.path(p.Mode),
		argv:  []string{n.cluster.cache.program(p.Version, "kube-proxy"), "--config=" + proxyDir + "/config.yaml"},
		check: n.synced,
	}
}

const proxyDir = "/var/lib/kube-proxy"

// path returns a PATH with the iptables of a mode in front. Kubelets write a few
// chains as well, with the same iptables as on a real node.
func (n *Node) path(m Mode) string {
	backend := "nft"
	if m == IPTablesLegacy {
		backend = "legacy"
	}
	return proxyDir + "/" + backend + ":" + os.Getenv("PATH") + ":/usr/sbin:/sbin"
}

// writeProxy writes the configuration of kube-proxy, and the directories of path.
func (n *Node) writeProxy() error {
	for _, backend := range []string{"nft", "legacy"} {
		dir := n.dir("lib/kube-proxy", backend)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		for _, family := range []string{"iptables", "ip6tables"} {
			for _, program := range []string{"", "-save", "-restore"} {
				target, err := exec.LookPath(family + "-" + backend + program)
				if err != nil {
					return err
				}
				if err := os.Symlink(target, dir+"/"+family+program); err != nil && !errors.Is(err, os.ErrExist) {
					return err
				}
			}
		}
	}
	mode := "iptables"
	if n.Proxy.Mode == NFTables {
		mode = "nftables"
	}
	config := fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: %s/kubeconfig}
hostnameOverride: %s
mode: %s
clusterCIDR: %q
oomScoreAdj: 0
# The table of connections is this machine's.
conntrack: {maxPerCore: 0, min: 0}
`, proxyDir, n.Name, mode, join(PodRanges))
	return os.WriteFile(n.dir("lib/kube-proxy/config.yaml"), []byte(config), 0o644)
}

// synced fails until kube-proxy has written its rules. Its healthz is content
// before that.
func (n *Node) synced(ctx context.Context) error {
	metrics, err := n.get(ctx, "http://127.0.0.1:10249/metrics")
	if err != nil {
		return err
	}
	return lastSync(string(metrics))
}

// lastSync fails unless the metrics of a kube-proxy say that it has written rules,
// of both families. Before v1.33 they did not tell the families apart.
func lastSync(metrics string) error {
	const last, count = "kubeproxy_sync_proxy_rules_last_timestamp_seconds", "kubeproxy_sync_proxy_rules_duration_seconds_count"
	families, syncs := 0, 0
	for line := range strings.Lines(metrics) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		switch {
		case name == count:
			syncs, _ = strconv.Atoi(value)
		case name == last && value != "0":
			families = min(syncs, 2) // metrics are in alphabetical order
		case strings.HasPrefix(name, last+"{") && value != "0":
			families++
		}
	}
	if families < 2 {
		return errors.New("it has not written its rules yet")
	}
	return nil
}

// ChangeProxy stops the node's kube-proxy and starts another one. Rules that are
// there stay, as on a node that is upgraded; with clear they are removed before,
// and so are the kubelet's and everybody's.
func (n *Node) ChangeProxy(ctx context.Context, p Proxy, clear bool) error {
	if err := p.complete(); err != nil {
		return err
	}
	if err := n.cluster.cache.build(ctx, []string{p.Version}); err != nil {
		return err
	}
	if err := n.KubeProxy.Stop(ctx); err != nil {
		return err
	}
	if clear {
		if err := n.ClearRules(ctx); err != nil {
			return err
		}
	}
	n.Proxy = p
	if err := n.writeProxy(); err != nil {
		return err
	}
	// The kubelet notices that its chains are gone after a minute or so.
	n.Kubelet.path = n.path(p.Mode)
	if err := n.Kubelet.Restart(ctx); err != nil {
		return err
	}
	n.KubeProxy = n.kubeProxy(p)
	if err := n.KubeProxy.Start(ctx); err != nil {
		return err
	}
	return n.cluster.writeConfig()
}

// ClearRules removes all rules of the node, of both backends.
func (n *Node) ClearRules(ctx context.Context) error {
	_, err := n.Exec(ctx, "sh", "-ec", `
nft flush ruleset
for family in ip ip6; do
	[ -e /proc/net/${family}_tables_names ] || continue
	for table in $(cat /proc/net/${family}_tables_names); do
		iptables=iptables-legacy; [ $family = ip ] || iptables=ip6tables-legacy
		for chain in $($iptables -t $table -S | sed -n 's/^-P \([^ ]*\) .*/\1/p'); do $iptables -t $table -P $chain ACCEPT; done
		$iptables -t $table -F
		$iptables -t $table -X
	done
done`)
	return err
}
