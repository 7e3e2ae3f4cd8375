package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/natlens/natlens/test/cluster/kube"
)

// access proves with curl who may read from the agents.
var access = suite{name: "access", run: runAccess}

func runAccess(ctx context.Context, b *bench) error {
	if _, err := b.installAgent(ctx); err != nil {
		return err
	}
	a := &accesses{bench: b, node: b.Nodes[0]}
	if err := a.makeCallers(ctx); err != nil {
		return err
	}
	a.rights(ctx)
	a.withoutAPI(ctx)
	a.files(ctx)
	return nil
}

// accesses are the checks of the suite.
type accesses struct {
	*bench
	node                             *kube.Node
	reader, metrics, nobody, unknown string // tokens
}

// makeCallers makes ServiceAccounts, with the ClusterRoles that come with the agent.
func (a *accesses) makeCallers(ctx context.Context) error {
	if err := a.create(ctx, []object{namespace("callers")}); err != nil {
		return err
	}
	for name, token := range map[string]*string{"reader": &a.reader, "metrics": &a.metrics, "nobody": &a.nobody} {
		if _, err := a.Kubectl(ctx, "create", "serviceaccount", "-n", "callers", name); err != nil {
			return err
		}
		var err error
		if *token, err = a.token(ctx, name); err != nil {
			return err
		}
	}
	for name, role := range map[string]string{"reader": "natlens-reader", "metrics": "natlens-metrics-reader"} {
		if _, err := a.Kubectl(ctx, "create", "clusterrolebinding", "callers-"+name, "--clusterrole="+role, "--serviceaccount=callers:"+name); err != nil {
			return err
		}
	}
	a.unknown = "nobody-gave-this-token"
	return nil
}

// token returns a new token of a ServiceAccount.
func (a *accesses) token(ctx context.Context, name string) (string, error) {
	out, err := a.Kubectl(ctx, "create", "token", "-n", "callers", name)
	return strings.TrimSpace(string(out)), err
}

// answer is what curl got.
type answer struct {
	code int
	body string
}

// curl asks the agent of the node, from outside the cluster.
func (a *accesses) curl(ctx context.Context, path, token string, more ...string) (answer, error) {
	return curl(ctx, a.Outside.Netns, "https://"+a.node.Addrs[0].String()+":9753"+path, token, append(more, "--insecure")...)
}

// curl runs curl in a namespace.
func curl(ctx context.Context, from kube.Netns, url, token string, more ...string) (answer, error) {
	args := append([]string{"--silent", "--show-error", "--max-time", "15", "--write-out", "\n%{http_code}", url}, more...)
	if token != "" {
		args = append(args, "--header", "Authorization: Bearer "+token)
	}
	out, err := from.Output(ctx, "curl", args...)
	if err != nil {
		return answer{}, errors.New(strings.ReplaceAll(err.Error(), token, "…"))
	}
	text := string(out)
	i := strings.LastIndexByte(text, '\n')
	code, err := strconv.Atoi(text[i+1:])
	return answer{code, text[:i]}, err
}

// wants checks the status of an answer, and that a refusal is in the form of all
// errors.
func (got answer) wants(code int) error {
	if got.code != code {
		return fmt.Errorf("status %d, want %d: %.200s", got.code, code, got.body)
	}
	if code < 400 {
		return nil
	}
	var doc struct {
		Error struct {
			Code    int
			Message string
		}
	}
	if err := json.Unmarshal([]byte(got.body), &doc); err != nil || doc.Error.Code != code || doc.Error.Message == "" {
		return fmt.Errorf("status %d without the JSON of an error: %.200s", code, got.body)
	}
	return nil
}

// ask checks that all paths answer a token with a status.
func (a *accesses) ask(ctx context.Context, token string, code int, paths ...string) error {
	for _, path := range paths {
		got, err := a.curl(ctx, path, token)
		if err == nil {
			err = got.wants(code)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

// Paths of the agent, by who may get them.
var (
	apiPaths   = []string{"/api/v1/services", "/api/v1/findings", "/api/v1/trace?to=10.56.0.1:443", "/"}
	probePaths = []string{"/livez", "/readyz", "/healthz"}
)

// expectCodes is ask for several groups of paths, as a check.
func (a *accesses) expectCodes(ctx context.Context, what, token string, codes map[int][]string) {
	a.check(what, func() (string, error) {
		var seen []string
		for _, code := range []int{200, 401, 403, 503} {
			if paths := codes[code]; len(paths) > 0 {
				if err := a.ask(ctx, token, code, paths...); err != nil {
					return strings.Join(seen, "; "), err
				}
				seen = append(seen, fmt.Sprintf("%d: %s", code, strings.Join(paths, " ")))
			}
		}
		return strings.Join(seen, "; "), nil
	})
}

func (a *accesses) rights(ctx context.Context) {
	everything := append([]string{"/metrics"}, apiPaths...)
	a.expectCodes(ctx, "network, no token: refused, but for probes", "", map[int][]string{401: everything, 200: probePaths})
	a.expectCodes(ctx, "network, a token that the cluster does not know: refused", a.unknown, map[int][]string{401: everything})
	a.expectCodes(ctx, "network, a ServiceAccount without the right: refused", a.nobody, map[int][]string{403: everything})
	a.expectCodes(ctx, "network, natlens-reader: everything", a.reader, map[int][]string{200: everything})
	a.expectCodes(ctx, "network, natlens-metrics-reader: metrics alone", a.metrics, map[int][]string{200: {"/metrics"}, 403: apiPaths})
	a.check("network: no plain HTTP", func() (string, error) {
		got, err := curl(ctx, a.Outside.Netns, "http://"+a.node.Addrs[0].String()+":9753/api/v1/services", "")
		if err == nil && got.code != 400 {
			err = fmt.Errorf("status %d: %.100s", got.code, got.body)
		}
		return fmt.Sprint("status ", got.code), err
	})
	a.check("loopback: open on the node, closed to the network", func() (string, error) {
		got, err := curl(ctx, a.node.Netns, "http://127.0.0.1:9754/api/v1/services", "")
		if err == nil {
			err = got.wants(200)
		}
		if err != nil {
			return "", err
		}
		if _, err := curl(ctx, a.Outside.Netns, "http://"+a.node.Addrs[0].String()+":9754/livez", ""); err == nil {
			return "", errors.New("port 9754 answers outside")
		}
		return "200 on 127.0.0.1, no connection from outside", nil
	})
}

// withoutAPI stops the API server.
func (a *accesses) withoutAPI(ctx context.Context) {
	late, err := a.token(ctx, "reader") // a right one that no agent has seen
	if err != nil {
		a.check("a token", func() (string, error) { return "", err })
		return
	}
	// Just now, so that it is remembered for a while.
	a.expectCodes(ctx, "before the API server stops", a.reader, map[int][]string{200: {"/api/v1/services", "/metrics"}})
	api := a.apiServer()
	if err := api.Stop(ctx); err != nil {
		a.check("stop the API server", func() (string, error) { return "", err })
		return
	}
	a.expectCodes(ctx, "API server down: who was let in a moment ago still is", a.reader, map[int][]string{200: {"/api/v1/services", "/metrics"}})
	a.expectCodes(ctx, "API server down: nobody new gets in", late, map[int][]string{503: {"/api/v1/services", "/metrics"}})
	a.expectCodes(ctx, "API server down: probes go on", "", map[int][]string{200: probePaths})
	a.check("API server down: loopback goes on, with fresh rules", func() (string, error) {
		var doc servicesDoc
		if err := agentGet(ctx, a.node, "/api/v1/services", &doc); err != nil {
			return "", err
		}
		if doc.Snapshot.Stale || len(doc.Services) == 0 {
			return "", fmt.Errorf("%d Services, stale: %v", len(doc.Services), doc.Snapshot.Stale)
		}
		return fmt.Sprintf("%d port of a Service", len(doc.Services)), nil
	})
	a.check("API server back: the new one gets in", func() (string, error) {
		if err := api.Start(ctx); err != nil {
			return "", err
		}
		start := time.Now()
		err := eventually(ctx, 30*time.Second, func() error { return a.ask(ctx, late, 200, "/api/v1/services") })
		return fmt.Sprintf("after %.1fs", time.Since(start).Seconds()), err
	})
}

// apiServer returns the process of the API server.
func (a *accesses) apiServer() *kube.Process {
	for _, p := range a.Processes(a.Control) {
		if p.Name == "kube-apiserver" {
			return p
		}
	}
	panic("the control plane has no API server")
}

// tlsDir is where the certificates are, on each node.
const tlsDir = "/var/lib/natlens-tls"

// files gives the agents a certificate, and then another one.
func (a *accesses) files(ctx context.Context) {
	scratch, err := os.MkdirTemp("", "natlens-e2e-")
	if err != nil {
		a.check("a directory", func() (string, error) { return "", err })
		return
	}
	defer func() { _ = os.RemoveAll(scratch) }()
	ca := filepath.Join(scratch, "ca.pem")
	a.check("TLS from files: curl verifies the agent's certificate", func() (string, error) {
		if err := a.newCertificate(ctx, ca); err != nil {
			return "", err
		}
		if err := a.mountFiles(ctx); err != nil {
			return "", err
		}
		return a.verified(ctx, ca)
	})
	a.check("new files: taken without a restart", func() (string, error) {
		if err := a.newCertificate(ctx, ca); err != nil {
			return "", err
		}
		start := time.Now()
		err := eventually(ctx, 20*time.Second, func() error {
			_, err := a.verified(ctx, ca)
			return err
		})
		if err != nil {
			return "", err
		}
		out, err := a.Kubectl(ctx, "get", "pods", "-n", "natlens-system", "-o", "jsonpath={.items[*].status.containerStatuses[*].restartCount}")
		return fmt.Sprintf("after %.1fs, restarts of the agents: %s", time.Since(start).Seconds(), out), err
	})
}

// verified asks with curl, which takes only certificates of the authority.
func (a *accesses) verified(ctx context.Context, ca string) (string, error) {
	got, err := curl(ctx, a.Outside.Netns, "https://"+a.node.Addrs[0].String()+":9753/api/v1/services", a.reader, "--cacert", ca)
	if err == nil {
		err = got.wants(200)
	}
	return fmt.Sprint("status ", got.code), err
}

// mountFiles tells the agents of the files.
func (a *accesses) mountFiles(ctx context.Context) error {
	patch, err := json.Marshal([]object{
		{"op": "add", "path": "/spec/updateStrategy/rollingUpdate/maxUnavailable", "value": "100%"},
		{"op": "add", "path": "/spec/template/spec/volumes", "value": []object{{"name": "tls", "hostPath": object{"path": tlsDir}}}},
		{"op": "add", "path": "/spec/template/spec/containers/0/volumeMounts", "value": []object{{"name": "tls", "mountPath": "/tls", "readOnly": true}}},
		{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--tls-cert-file=/tls/tls.crt"},
		{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": "--tls-private-key-file=/tls/tls.key"},
	})
	if err != nil {
		return err
	}
	if _, err := a.Kubectl(ctx, "patch", "-n", "natlens-system", "daemonset/natlens-agent", "--type=json", "--patch", string(patch)); err != nil {
		return err
	}
	return a.rollout(ctx, "natlens-system", "daemonset/natlens-agent")
}

// newCertificate writes a certificate for the node's address, and its key, on all
// nodes, and here that of the authority: itself.
func (a *accesses) newCertificate(ctx context.Context, ca string) error {
	cert, key, err := selfSigned(a.node.Addrs[0].AsSlice())
	if err != nil {
		return err
	}
	if err := os.WriteFile(ca, cert, 0o644); err != nil {
		return err
	}
	for _, n := range a.Nodes {
		script := fmt.Sprintf("umask 077; mkdir -p %[1]s; printf '%%s' '%[2]s' >%[1]s/tls.crt; printf '%%s' '%[3]s' >%[1]s/tls.key", tlsDir, cert, key)
		if _, err := n.Exec(ctx, "sh", "-ec", script); err != nil {
			return fmt.Errorf("writing the certificate on %s failed", n.Name) // err holds the key
		}
	}
	return nil
}

// selfSigned makes a certificate for an address.
func selfSigned(ip net.IP) (cert, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: fmt.Sprint("natlens e2e ", time.Now().UnixNano())},
		NotBefore:    time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IPAddresses: []net.IP{ip},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		return nil, nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, err
	}
	cert = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	key = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
	return cert, key, nil
}
