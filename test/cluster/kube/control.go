package kube

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
)

// apiServer is the API server's address for everyone.
var apiServer = netip.AddrPortFrom(controlAddrs[0], 6443)

// kubernetes holds the control plane's files, as its box sees them.
const kubernetes = "/var/lib/kubernetes"

// controlPlane returns the processes of control, in the order of their start.
func (c *Cluster) controlPlane() []*Process {
	process := func(name, program, health string, args ...string) *Process {
		return &Process{
			Name: name, box: c.Control, path: os.Getenv("PATH"), argv: append([]string{program}, args...),
			check: func(ctx context.Context) error {
				_, err := c.Control.get(ctx, health)
				return err
			},
		}
	}
	component := func(name, health string, args ...string) *Process {
		return process(name, c.cache.program(Version, name), health, args...)
	}
	return []*Process{
		process("etcd", "etcd", "http://127.0.0.1:2379/health", "--data-dir=/var/lib/etcd"),
		component("kube-apiserver", fmt.Sprintf("https://%s/readyz", apiServer),
			"--etcd-servers=http://127.0.0.1:2379",
			"--bind-address=0.0.0.0", fmt.Sprint("--secure-port=", apiServer.Port()), "--advertise-address="+apiServer.Addr().String(),
			"--cert-dir="+kubernetes, // the certificate is made at start
			"--service-cluster-ip-range="+join(ServiceRanges),
			"--service-account-issuer=https://kubernetes.default.svc",
			"--service-account-key-file="+kubernetes+"/sa.key", "--service-account-signing-key-file="+kubernetes+"/sa.key",
			"--authorization-mode=Node,RBAC", "--token-auth-file="+kubernetes+"/tokens.csv",
			"--kubelet-preferred-address-types=InternalIP", // names of nodes are in no DNS
		),
		component("kube-controller-manager", "https://127.0.0.1:10257/healthz",
			"--kubeconfig="+kubernetes+"/kube-controller-manager.kubeconfig", "--leader-elect=false", "--bind-address=127.0.0.1",
			"--use-service-account-credentials", "--service-account-private-key-file="+kubernetes+"/sa.key",
			"--root-ca-file="+kubernetes+"/apiserver.crt",
			"--service-cluster-ip-range="+join(ServiceRanges), "--cluster-cidr="+join(PodRanges), "--allocate-node-cidrs=false",
			"--flex-volume-plugin-dir="+kubernetes+"/volumeplugins", // it would be in /usr
		),
		component("kube-scheduler", "https://127.0.0.1:10259/healthz",
			"--kubeconfig="+kubernetes+"/kube-scheduler.kubeconfig", "--leader-elect=false", "--bind-address=127.0.0.1"),
	}
}

func join[T fmt.Stringer](list []T) string {
	var texts []string
	for _, x := range list {
		texts = append(texts, x.String())
	}
	return strings.Join(texts, ",")
}

// startControlPlane starts etcd, the API server and its controllers.
func (c *Cluster) startControlPlane(ctx context.Context) error {
	dir := c.Control.dir("lib/kubernetes")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := writeKey(filepath.Join(dir, "sa.key")); err != nil {
		return err
	}
	tokens, err := c.writeTokens(filepath.Join(dir, "tokens.csv"))
	if err != nil {
		return err
	}
	c.log("starting etcd and the API server")
	for _, p := range c.components[:2] {
		if err := p.Start(ctx); err != nil {
			return err
		}
	}
	// Now there is a certificate.
	ca, err := os.ReadFile(filepath.Join(dir, "apiserver.crt"))
	if err != nil {
		return err
	}
	for user, token := range tokens {
		if err := os.WriteFile(c.kubeconfig(user), kubeconfig(ca, user, token), 0o600); err != nil {
			return err
		}
	}
	c.log("starting the controller-manager and the scheduler")
	for _, p := range c.components[2:] {
		if err := p.Start(ctx); err != nil {
			return err
		}
	}
	return nil
}

// writeKey writes the key that signs ServiceAccounts' tokens.
func writeKey(file string) error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	block := &pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}
	return os.WriteFile(file, pem.EncodeToMemory(block), 0o600)
}

// writeTokens writes who may come, and returns their tokens. Their rights are those
// that Kubernetes grants users of these names.
func (c *Cluster) writeTokens(file string) (map[string]string, error) {
	tokens := map[string]string{}
	var lines strings.Builder
	add := func(name, user, group string) {
		tokens[name] = rand.Text()
		fmt.Fprintf(&lines, "%s,%s,%s,%s\n", tokens[name], user, user, group)
	}
	add("admin", "admin", "system:masters")
	for _, name := range []string{"kube-controller-manager", "kube-scheduler", "kube-proxy"} {
		add(name, "system:"+name, "")
	}
	for _, n := range c.Nodes {
		add(n.Name, "system:node:"+n.Name, "system:nodes")
	}
	return tokens, os.WriteFile(file, []byte(lines.String()), 0o600)
}

// kubeconfig returns the kubeconfig file of a user, as this machine sees it.
func (c *Cluster) kubeconfig(user string) string {
	return c.Control.dir("lib/kubernetes", user+".kubeconfig")
}

func kubeconfig(ca []byte, user, token string) []byte {
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: cluster, cluster: {server: "https://%s", certificate-authority-data: %s}}]
users: [{name: %s, user: {token: %s}}]
contexts: [{name: cluster, context: {cluster: cluster, user: %s}}]
current-context: cluster
`, apiServer, base64.StdEncoding.EncodeToString(ca), user, token, user)
}
