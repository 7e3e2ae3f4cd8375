package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/natlens/natlens/test/cluster/kube"
)

// Endpoints change as fast as the API server can be told, and kube-proxies write
// rules as often as they do. Each version of a Service's endpoints is known by their
// addresses, so that an answer which mixes two of them, or lacks a part of one, shows.
const (
	churnTime     = time.Minute
	churnServices = 5
)

// version returns the endpoints of a version: one to five.
func version(v int) []netip.AddrPort {
	var all []netip.AddrPort
	for i := range 1 + v%5 {
		all = append(all, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(200 + i), byte(v >> 8), byte(v)}), 8080))
	}
	return all
}

// versionOf returns the version that endpoints are.
func versionOf(endpoints []string) (int, error) {
	if len(endpoints) == 0 {
		return 0, errors.New("no endpoints")
	}
	first, err := netip.ParseAddrPort(endpoints[0])
	if err != nil {
		return 0, err
	}
	b := first.Addr().As4()
	v := int(b[2])<<8 | int(b[3])
	var want []string
	for _, a := range version(v) {
		want = append(want, a.String())
	}
	if !slices.Equal(endpoints, want) {
		return 0, fmt.Errorf("the endpoints %v, which the API never had: version %d is %v", endpoints, v, want)
	}
	return v, nil
}

// churn checks what the agents say in the meantime, and at the end.
func (c *changes) churn(ctx context.Context) {
	watchers := make([]*watcher, 0, len(c.Nodes))
	c.check(fmt.Sprintf("endpoints change for %v: every answer is one that was true", churnTime), func() (string, error) {
		seen, all, err := c.churned(ctx)
		watchers = all
		return seen, err
	})
	for _, w := range watchers {
		c.check(fmt.Sprintf("the agent's memory on %s (%s) does not grow", w.node.Name, w.node.Proxy.Mode), func() (string, error) {
			seen := fmt.Sprintf("%d MB before, %d MB after", w.before>>20, w.after>>20)
			if w.after > w.before+w.before/2+8<<20 {
				return seen, errors.New("it grew")
			}
			return seen, nil
		})
	}
	c.check("at the end, the agents say what a fresh reading says", func() (string, error) { return c.fresh(ctx) })
}

func (c *changes) churned(ctx context.Context) (string, []*watcher, error) {
	put, stop, err := c.apiWriter(ctx)
	if err != nil {
		return "", nil, err
	}
	defer stop()
	if err := c.makeChurn(ctx); err != nil {
		return "", nil, err
	}
	var watchers []*watcher
	for _, n := range c.Nodes {
		if _, err := c.awaitChurn(ctx, n); err != nil {
			return "", nil, err
		}
		agent, err := c.agent(ctx, n)
		if err != nil {
			return "", nil, err
		}
		watchers = append(watchers, &watcher{node: n, agent: agent, versions: map[string]int{}})
	}
	var last atomic.Int64 // version that the API server may have
	ctx, cancel := context.WithTimeout(ctx, churnTime)
	defer cancel()
	var all sync.WaitGroup
	for _, w := range watchers {
		all.Go(func() { w.watch(ctx, &last) })
	}
	writes := 0
	for v := 1; ctx.Err() == nil && v < 1<<16; v++ {
		last.Store(int64(v))
		if err = put(ctx, churnSlice(v%churnServices, v)); err != nil {
			break
		}
		writes++
		time.Sleep(10 * time.Millisecond) // leave the machine to those who are tested
	}
	if ctx.Err() != nil {
		err = nil
	}
	all.Wait()
	seen := fmt.Sprintf("%d changes", writes)
	for _, w := range watchers {
		seen += fmt.Sprintf("; %s: %d answers, %d different", w.node.Proxy.Mode, w.answers, len(w.versions))
		err = errors.Join(err, w.err)
	}
	return seen, watchers, err
}

// churnSlice returns a version of the EndpointSlice of a Service.
func churnSlice(service, v int) object {
	name := fmt.Sprint("churn-", service)
	var endpoints []any
	for _, a := range version(v) {
		endpoints = append(endpoints, object{"addresses": []any{a.Addr()}, "conditions": object{"ready": true}})
	}
	return object{
		"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
		"metadata":  object{"name": name, "namespace": "churn", "labels": object{"kubernetes.io/service-name": name}},
		"ports":     []any{object{"name": "", "port": 8080, "protocol": "TCP"}},
		"endpoints": endpoints,
	}
}

// makeChurn makes the Services, all with version 0.
func (c *changes) makeChurn(ctx context.Context) error {
	objects := []object{namespace("churn")}
	for i := range churnServices {
		objects = append(objects, churnSlice(i, 0), object{
			"apiVersion": "v1", "kind": "Service",
			"metadata": object{"name": fmt.Sprint("churn-", i), "namespace": "churn"},
			"spec":     object{"ports": []any{object{"port": 80, "targetPort": 8080}}},
		})
	}
	return c.create(ctx, objects)
}

// awaitChurn waits until the agent of a node knows the Services.
func (c *changes) awaitChurn(ctx context.Context, n *kube.Node) (doc servicesDoc, err error) {
	err = eventually(ctx, 30*time.Second, func() error {
		if err := agentGet(ctx, n, "/api/v1/services?namespace=churn", &doc); err != nil {
			return err
		}
		if len(doc.Services) != churnServices {
			return fmt.Errorf("the agent of %s knows %d Services", n.Name, len(doc.Services))
		}
		return nil
	})
	return doc, err
}

// apiWriter returns a function that writes EndpointSlices, faster than kubectl starts.
func (c *changes) apiWriter(ctx context.Context) (put func(context.Context, object) error, stop func(), err error) {
	const address = "127.0.0.1:8901"
	proxy := exec.CommandContext(ctx, c.KubectlPath(), "proxy", "--port=8901")
	if err := c.StartKubectl(proxy); err != nil {
		return nil, nil, err
	}
	stop = func() {
		_ = proxy.Process.Kill()
		_ = proxy.Wait()
	}
	client := &http.Client{Transport: &http.Transport{DialContext: c.Control.Dial}, Timeout: 10 * time.Second}
	put = func(ctx context.Context, o object) error {
		body, err := json.Marshal(o)
		if err != nil {
			return err
		}
		url := "http://" + address + "/apis/discovery.k8s.io/v1/namespaces/churn/endpointslices/" + text(o, "metadata", "name")
		req, err := http.NewRequestWithContext(ctx, http.MethodPut, url, bytes.NewReader(body))
		if err != nil {
			return err
		}
		req.Header.Set("Content-Type", "application/json")
		res, err := client.Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if res.StatusCode != http.StatusOK {
			return fmt.Errorf("writing an EndpointSlice: %s", res.Status)
		}
		return nil
	}
	err = eventually(ctx, 10*time.Second, func() error {
		_, err := httpGet(ctx, client, "http://"+address+"/readyz")
		return err
	})
	if err != nil {
		stop()
	}
	return put, stop, err
}

// watcher asks an agent again and again.
type watcher struct {
	node          *kube.Node
	agent         *kube.Pod
	answers       int
	versions      map[string]int // how often each answer was given
	before, after int64          // memory, in bytes
	err           error
}

// watch asks until the time is over, or an answer was never true.
func (w *watcher) watch(ctx context.Context, last *atomic.Int64) {
	start := time.Now()
	for ctx.Err() == nil && w.err == nil {
		w.err = w.look(ctx, last)
		// A program's memory has its size after a few readings.
		if w.before == 0 && time.Since(start) > churnTime/4 {
			w.before = residentMemory(w.agent)
		}
		time.Sleep(50 * time.Millisecond)
	}
	if ctx.Err() != nil {
		w.err = nil
	}
	w.after = residentMemory(w.agent)
}

func (w *watcher) look(ctx context.Context, last *atomic.Int64) error {
	var doc servicesDoc
	if err := agentGet(ctx, w.node, "/api/v1/services?namespace=churn", &doc); err != nil {
		return err
	}
	highest := int(last.Load())
	if len(doc.Services) != churnServices {
		return fmt.Errorf("%s: %d Services", w.node.Name, len(doc.Services))
	}
	var answer strings.Builder
	for _, s := range doc.Services {
		v, err := versionOf(endpointsIn(servicesDoc{Services: []serviceDoc{s}}))
		if err != nil {
			return fmt.Errorf("%s: %s: %w", w.node.Name, s.Name, err)
		}
		if v > highest || v != 0 && fmt.Sprint("churn-", v%churnServices) != s.Name {
			return fmt.Errorf("%s: %s has version %d, of another Service or of the future", w.node.Name, s.Name, v)
		}
		fmt.Fprint(&answer, v, " ")
	}
	w.answers++
	w.versions[answer.String()]++
	return nil
}

// residentMemory returns how much memory a pod's process has, in bytes; 0 if it
// cannot be read.
func residentMemory(p *kube.Pod) int64 {
	status, _ := os.ReadFile(filepath.Join(p.Proc, "status"))
	_, rest, _ := strings.Cut(string(status), "VmRSS:")
	var kB int64
	_, _ = fmt.Sscan(rest, &kB)
	return kB << 10
}

// fresh compares the answers with those of the command, which reads everything.
func (c *changes) fresh(ctx context.Context) (string, error) {
	start := time.Now()
	for _, n := range c.Nodes {
		err := eventually(ctx, 2*mostLag, func() error { return sameAsFresh(ctx, n, c.program) })
		if err != nil {
			return "", fmt.Errorf("%s (%s): %w", n.Name, n.Proxy.Mode, err)
		}
	}
	return fmt.Sprintf("after %.1fs", time.Since(start).Seconds()), nil
}

// sameAsFresh compares what the agent of a node serves with what the command reads,
// of what is programmed: the command observes no traffic, and has not watched for how
// long a finding lasts.
func sameAsFresh(ctx context.Context, n *kube.Node, program string) error {
	var served, now struct{ Services []object }
	if err := agentGet(ctx, n, "/api/v1/services", &served); err != nil {
		return err
	}
	out, err := n.Exec(ctx, program, "services", "-o", "json")
	if err != nil {
		return err
	}
	if err := json.Unmarshal(out, &now); err != nil {
		return err
	}
	for _, s := range slices.Concat(served.Services, now.Services) {
		for _, key := range []string{"desired", "observed", "findings"} {
			delete(s, key)
		}
	}
	if len(served.Services) != len(now.Services) {
		return fmt.Errorf("%d ports of Services are served, %d are read", len(served.Services), len(now.Services))
	}
	for i, s := range served.Services {
		if !reflect.DeepEqual(s, now.Services[i]) {
			return fmt.Errorf("served: %v; read: %v", s, now.Services[i])
		}
	}
	return nil
}
