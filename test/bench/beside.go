//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/internal/nodebox"
)

// This file measures "agent serve" beside a real kube-proxy, on the same Services
// of a real API server:
//
//	etcd ◀── kube-apiserver ◀─┬─ Services and EndpointSlices, made here
//	                          ├─ kube-proxy ──▶ the rules of the box
//	                          └─ agent serve ◀──┘

// Where the API server answers in the box, and to whom.
const (
	apiURL   = "https://127.0.0.1:6443"
	apiToken = "bench"
	nodeName = "bench"
)

// besidePatience is longer than iptables-nft-restore takes for the first rules of
// kube-proxy, which it adds to others: with the square of the chains.
const besidePatience = time.Hour

// besideChanges is how many changes of a Service are measured.
const besideChanges = 3

// measureBeside measures memory, and what a change of one Service costs the agent.
// programs is the folder of kube-apiserver and kube-proxy.
func measureBeside(ctx context.Context, program, programs, layout string, services, endpoints int) error {
	box, err := newBox()
	if err != nil {
		return err
	}
	defer box.Close()
	dir, err := os.MkdirTemp("", "natlens-bench-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	c := &control{box: box, dir: dir, programs: programs}
	defer c.stop()
	if err := c.up(ctx); err != nil {
		return err
	}
	progress := func(what string) {
		fmt.Fprintf(os.Stderr, "beside kube-proxy, %s, %d x %d: %s\n", layout, services, endpoints, what)
	}
	progress("making Services…")
	if err := c.fill(ctx, services, endpoints); err != nil {
		return err
	}
	progress("waiting for kube-proxy…")
	proxy, err := c.proxy(layout)
	if err != nil {
		return err
	}
	whole, alone := &agent{box: box}, &agent{box: box, listen: "127.0.0.1:9755"}
	for _, a := range []*agent{whole, alone} {
		args := []string{"--listen", a.address()}
		if a == whole {
			args = append(args, "--kubeconfig", c.kubeconfig(), "--node-name", nodeName)
		}
		if err := a.start(ctx, program, args...); err != nil {
			return err
		}
		defer a.stop()
		if err := a.await(ctx, services); err != nil {
			return err
		}
	}
	if err := sleep(ctx, settled); err != nil {
		return err
	}
	memory := memoryOf(proxy.Process.Pid)
	const atRest = 2 * time.Minute
	before, began := whole.cpu(), time.Now()
	if err := sleep(ctx, atRest); err != nil {
		return err
	}
	busy := float64(whole.cpu()-before) / float64(time.Since(began))
	watch := func() (time.Duration, error) { // the rules follow meanwhile
		const watched = 15 * time.Second
		before := whole.cpu()
		err := sleep(ctx, watched)
		return whole.cpu() - before, err
	}
	rest, err := watch()
	if err != nil {
		return err
	}
	var costs []time.Duration
	for i := range besideChanges {
		if err := c.change(ctx, i, endpoints); err != nil {
			return err
		}
		cost, err := watch()
		if err != nil {
			return err
		}
		costs = append(costs, max(0, cost-rest))
		if err := sleep(ctx, settled); err != nil {
			return err
		}
	}
	fmt.Printf("### beside kube-proxy, %s, %d Services x %d endpoints\n\n", layout, services, endpoints)
	fmt.Println("| | | ratio | at most |\n|---|---|---|---|")
	fmt.Printf("| kube-proxy, memory | %s | 1 |  |\n", kib(memory))
	fmt.Printf("| agent serve, memory | %s | %.2f | 1.0 |\n", kib(whole.memory()), float64(whole.memory())/float64(memory))
	fmt.Printf("| agent serve without the API, memory | %s | %.2f |  |\n", kib(alone.memory()), float64(alone.memory())/float64(memory))
	fmt.Printf("| agent serve, processor over %v at rest | %.2f %% of a core |  |  |\n", atRest, 100*busy)
	fmt.Printf("| agent serve, processor for one change of the API and of the rules | %s |  |  |\n", short(median(costs)))
	alone.stop()
	without, with, err := c.syncTimes(ctx, whole, endpoints)
	if err != nil {
		return err
	}
	fmt.Printf("| a sync of kube-proxy while the agent is stopped, median of %d changes | %s | 1 |  |\n", len(without), short(median(without)))
	fmt.Printf("| the same beside the agent | %s | %.3f | 1.05 |\n\n", short(median(with)), float64(median(with))/float64(median(without)))
	return nil
}

// syncTimes measures how long kube-proxy takes to write a change, in turns: while
// the agent is stopped, and while it reads what was written.
func (c *control) syncTimes(ctx context.Context, a *agent, endpoints int) (without, with []time.Duration, err error) {
	const (
		rounds = 3
		writes = 6 // in a round
		pause  = 3 * time.Second
	)
	n := besideChanges
	for i := range 2 * rounds {
		to, sig := &without, syscall.SIGSTOP
		if i%2 == 1 {
			to, sig = &with, syscall.SIGCONT
		}
		if err := a.cmd.Process.Signal(sig); err != nil {
			return nil, nil, err
		}
		for range writes {
			took, err := c.sync(ctx, n, endpoints)
			if err != nil {
				return nil, nil, err
			}
			*to = append(*to, took)
			n++
			if err := sleep(ctx, pause); err != nil {
				return nil, nil, err
			}
		}
	}
	return without, with, nil
}

// sync changes a Service, and returns how long kube-proxy says that it took to
// write that.
func (c *control) sync(ctx context.Context, i, endpoints int) (time.Duration, error) {
	before, syncs, err := c.synced(ctx)
	if err != nil {
		return 0, err
	}
	if err := c.change(ctx, i, endpoints); err != nil {
		return 0, err
	}
	for start := time.Now(); time.Since(start) < patience; {
		after, now, err := c.synced(ctx)
		if err != nil {
			return 0, err
		}
		if now > syncs {
			return time.Duration((after - before) / (now - syncs) * float64(time.Second)), nil
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return 0, err
		}
	}
	return 0, fmt.Errorf("kube-proxy has not written a change after %v", patience)
}

// synced returns the seconds that kube-proxy's syncs took so far, and their number.
func (c *control) synced(ctx context.Context) (seconds, syncs float64, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:10249/metrics", nil)
	if err != nil {
		return 0, 0, err
	}
	res, err := c.web.Do(req)
	if err != nil {
		return 0, 0, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	for _, m := range syncMetric.FindAllSubmatch(text, -1) {
		value, _ := strconv.ParseFloat(string(m[2]), 64)
		if string(m[1]) == "sum" {
			seconds += value
		} else {
			syncs += value
		}
	}
	return seconds, syncs, err
}

// syncMetric finds both in kube-proxy's metrics, for either IP family.
var syncMetric = regexp.MustCompile(`(?m)^kubeproxy_sync_proxy_rules_duration_seconds_(sum|count)(?:{[^}]*})? ([0-9.e+-]+)$`)

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// await waits until the agent sees as many Service ports.
func (a *agent) await(ctx context.Context, services int) error {
	pattern := regexp.MustCompile(`(?m)^natlens_services ([0-9.e+]+)$`)
	seen := 0.0
	for start := time.Now(); time.Since(start) < besidePatience; {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+a.address()+"/metrics", nil)
		if err != nil {
			return err
		}
		if res, err := a.web.Do(req); err == nil {
			text, _ := io.ReadAll(res.Body)
			res.Body.Close()
			if m := pattern.FindSubmatch(text); m != nil {
				if seen, _ = strconv.ParseFloat(string(m[1]), 64); int(seen) >= services {
					return nil
				}
			}
		}
		if err := sleep(ctx, time.Second); err != nil {
			return err
		}
	}
	return fmt.Errorf("kube-proxy has written %v of %d Services", seen, services)
}

// control is an API server with an etcd, in a box.
type control struct {
	box      *nodebox.Box
	dir      string
	programs string
	running  []*exec.Cmd
	web      http.Client
}

func (c *control) path(name string) string { return filepath.Join(c.dir, name) }
func (c *control) kubeconfig() string      { return c.path("kubeconfig") }

// run starts a program; what it prints is kept in the folder.
func (c *control) run(program string, args ...string) (*exec.Cmd, error) {
	log, err := os.Create(c.path(filepath.Base(program) + ".log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = log, log, c.dir
	if err := c.box.Node.Start(cmd); err != nil {
		return nil, err
	}
	c.running = append(c.running, cmd)
	return cmd, nil
}

// up starts etcd and the API server.
func (c *control) up(ctx context.Context) error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	files := map[string]string{
		"sa.key":     string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})),
		"tokens.csv": apiToken + ",bench,bench,system:masters\n",
		"kubeconfig": fmt.Sprintf(`{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],
"clusters":[{"name":"c","cluster":{"server":%q,"insecure-skip-tls-verify":true}}],"users":[{"name":"u","user":{"token":%q}}]}`, apiURL, apiToken),
	}
	for name, text := range files {
		if err := os.WriteFile(c.path(name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	if _, err := c.run("etcd", "--data-dir", c.path("etcd"), "--unsafe-no-fsync"); err != nil {
		return err
	}
	_, err = c.run(filepath.Join(c.programs, "kube-apiserver"), "--etcd-servers=http://127.0.0.1:2379", "--secure-port=6443",
		"--advertise-address="+kubeproxy.SyntheticNodeIP.String(), "--cert-dir="+c.path("cert"), "--service-cluster-ip-range="+kubeproxy.SyntheticServiceCIDR.String(),
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+c.path("sa.key"), "--service-account-signing-key-file="+c.path("sa.key"),
		"--authorization-mode=RBAC", "--token-auth-file="+c.path("tokens.csv"))
	if err != nil {
		return err
	}
	c.web = http.Client{Timeout: time.Minute, Transport: &http.Transport{
		MaxIdleConnsPerHost: 16,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return c.box.Node.Dial(ctx, network, addr)
		},
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // of loopback in a box
	}}
	for start := time.Now(); ; {
		err := c.send(ctx, http.MethodGet, "/readyz", "", nil)
		if err == nil {
			return nil
		}
		if time.Since(start) > patience {
			return fmt.Errorf("the API server does not get ready: %w", err)
		}
		if err := sleep(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
}

func (c *control) send(ctx context.Context, method, path, kind string, body any) error {
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, apiURL+path, bytes.NewReader(text))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+apiToken)
	req.Header.Set("Content-Type", kind)
	res, err := c.web.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	answer, _ := io.ReadAll(res.Body)
	if res.StatusCode >= http.StatusMultipleChoices {
		return fmt.Errorf("%s %s: %s: %s", method, path, res.Status, answer)
	}
	return nil
}

func (c *control) create(ctx context.Context, path string, object any) error {
	return c.send(ctx, http.MethodPost, path, "application/json", object)
}

const slicesPath = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"

// fill makes the node, and Services with a cluster IP each.
func (c *control) fill(ctx context.Context, services, endpoints int) error {
	err := c.create(ctx, "/api/v1/nodes", &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: nodeName},
		Status:     corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: kubeproxy.SyntheticNodeIP.String()}}},
	})
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for i, s := range kubeproxy.Synthetic(services, endpoints) {
		g.Go(func() error {
			name := fmt.Sprint("s", i)
			err := c.create(ctx, "/api/v1/namespaces/default/services", &corev1.Service{
				ObjectMeta: metav1.ObjectMeta{Name: name},
				Spec:       corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: int32(s.PortNumber), Protocol: corev1.ProtocolTCP}}},
			})
			if err != nil {
				return err
			}
			slice := discoveryv1.EndpointSlice{
				ObjectMeta:  metav1.ObjectMeta{Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: name}},
				AddressType: discoveryv1.AddressTypeIPv4, Endpoints: []discoveryv1.Endpoint{},
			}
			for _, e := range s.Endpoints {
				slice.Endpoints = append(slice.Endpoints, discoveryv1.Endpoint{Addresses: []string{e.Addr.Addr().String()}})
				port, none, tcp := int32(e.Addr.Port()), "", corev1.ProtocolTCP
				slice.Ports = []discoveryv1.EndpointPort{{Name: &none, Port: &port, Protocol: &tcp}}
			}
			return c.create(ctx, slicesPath, &slice)
		})
	}
	return g.Wait()
}

// change gives one Service other endpoints.
func (c *control) change(ctx context.Context, i, endpoints int) error {
	var list []discoveryv1.Endpoint
	for k := range endpoints {
		list = append(list, discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("10.255.%d.%d", i, k+1)}})
	}
	return c.send(ctx, http.MethodPatch, fmt.Sprint(slicesPath, "/s", changedService), "application/merge-patch+json", map[string]any{"endpoints": list})
}

// proxy starts kube-proxy, with the backend of the layout for its iptables mode.
func (c *control) proxy(layout string) (*exec.Cmd, error) {
	mode := layout
	if layout != "nftables" {
		mode = "iptables"
		if err := c.iptables(layout); err != nil {
			return nil, err
		}
	}
	config := fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: %q}
hostnameOverride: %s
clusterCIDR: %q
mode: %s
conntrack: {maxPerCore: 0, min: 0}
`, c.kubeconfig(), nodeName, kubeproxy.SyntheticPodCIDR, mode)
	if err := os.WriteFile(c.path("proxy.yaml"), []byte(config), 0o600); err != nil {
		return nil, err
	}
	proxy := filepath.Join(c.programs, "kube-proxy")
	return c.run("/usr/bin/env", "PATH="+c.path("bin")+":"+os.Getenv("PATH"), proxy, "--config", c.path("proxy.yaml"))
}

// iptables makes the names that kube-proxy runs those of a backend.
func (c *control) iptables(backend string) error {
	if err := os.MkdirAll(c.path("bin"), 0o755); err != nil {
		return err
	}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, does := range []string{"", "-save", "-restore"} {
			program, err := exec.LookPath(family + "-" + backend + does)
			if err != nil {
				return err
			}
			if err := os.Symlink(program, filepath.Join(c.path("bin"), family+does)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *control) stop() {
	for i := len(c.running) - 1; i >= 0; i-- {
		_ = c.running[i].Process.Signal(os.Interrupt)
		_ = c.running[i].Wait()
	}
}
