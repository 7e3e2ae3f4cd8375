package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/natlens/natlens/test/cluster/kube"
)

// change proves that the agents follow the kernel, whatever happens. Each node has
// its rules in another backend.
var change = suite{
	name: "change",
	nodes: kube.ThreeNodes(
		kube.Proxy{Mode: kube.IPTablesNFT}, kube.Proxy{Mode: kube.IPTablesLegacy}, kube.Proxy{Mode: kube.NFTables},
	),
	run: runChange,
}

// mostLag is how long an agent may take: it reads iptables-legacy with each refresh,
// the others within a second.
const mostLag = refresh + slack

func runChange(ctx context.Context, b *bench) error {
	if _, err := b.installAgent(ctx); err != nil {
		return err
	}
	if _, err := b.installEcho(ctx); err != nil {
		return err
	}
	program, err := b.agentProgram()
	if err != nil {
		return err
	}
	c := &changes{b, program}
	kubectl := func(args ...string) func() error {
		return func() error {
			_, err := b.Kubectl(ctx, args...)
			return err
		}
	}
	for _, n := range []string{"5", "1", "0", "3"} {
		c.after(ctx, "kubectl scale --replicas "+n, kubectl("scale", "deployment/go-app", "--replicas", n))
	}
	c.after(ctx, "a rolling update", func() error {
		if err := kubectl("rollout", "restart", "deployment/go-app")(); err != nil {
			return err
		}
		return b.rollout(ctx, "default", "deployment/go-app")
	})
	c.after(ctx, "a pod is killed", func() error {
		pods, err := b.Pods(ctx, "default", "app=go-app")
		if err != nil || len(pods) == 0 {
			return errors.Join(err, errors.New("no pod"))
		}
		return kubectl("delete", "pod", pods[0].Name, "--grace-period=0", "--force")()
	})
	c.after(ctx, "kube-proxy is restarted", func() error {
		return c.eachProxy(func(p *kube.Process) error { return p.Restart(ctx) })
	})
	c.failingRead(ctx)
	c.check("kube-proxy is stopped: its rules stay, and so do the answers", func() (string, error) {
		before, err := c.readyEndpoints(ctx)
		if err != nil {
			return "", err
		}
		if err := c.eachProxy(func(p *kube.Process) error { return p.Stop(ctx) }); err != nil {
			return "", err
		}
		if err := kubectl("scale", "deployment/go-app", "--replicas", "5")(); err != nil {
			return "", err
		}
		if err := b.rollout(ctx, "default", "deployment/go-app"); err != nil {
			return "", err
		}
		return c.follow(ctx, before)
	})
	c.check("meanwhile the API has 5 endpoints: EndpointMissing on every node", func() (string, error) { return c.finding(ctx, "EndpointMissing", true) })
	c.check("the nat table is flushed by hand: no answer", func() (string, error) {
		if err := c.flush(ctx); err != nil {
			return "", err
		}
		return c.follow(ctx, nil)
	})
	c.after(ctx, "kube-proxy is back", func() error {
		return c.eachProxy(func(p *kube.Process) error { return p.Start(ctx) })
	})
	c.check("and the findings are gone", func() (string, error) { return c.finding(ctx, "", false) })
	c.check("the Service is deleted", func() (string, error) {
		if err := kubectl("delete", "service", "go-app")(); err != nil {
			return "", err
		}
		return c.follow(ctx, nil)
	})
	c.churn(ctx)
	return nil
}

// changes are the checks of the suite.
type changes struct {
	*bench
	program string // the agent
}

func (c *changes) eachProxy(f func(*kube.Process) error) error {
	for _, n := range c.Nodes {
		if err := f(n.KubeProxy); err != nil {
			return err
		}
	}
	return nil
}

// after checks that the agents follow something that happens to the Service until
// they know all the endpoints that the API has.
func (c *changes) after(ctx context.Context, what string, happens func() error) {
	c.check(what, func() (string, error) {
		if err := happens(); err != nil {
			return "", err
		}
		var ready []string
		// The deployment gets there when all its pods are ready.
		err := eventually(ctx, time.Minute, func() error {
			replicas, err := c.Kubectl(ctx, "get", "deployment/go-app", "-o", "jsonpath={.spec.replicas}")
			if err != nil {
				return err
			}
			ready, err = c.readyEndpoints(ctx)
			if err == nil && fmt.Sprint(len(ready)) != string(replicas) {
				err = fmt.Errorf("endpoints in the API: %v, want %s", ready, replicas)
			}
			return err
		})
		if err != nil {
			return "", err
		}
		return c.follow(ctx, ready)
	})
}

// readyEndpoints returns the addresses of the endpoints that the API has.
func (c *changes) readyEndpoints(ctx context.Context) ([]string, error) {
	out, err := c.Kubectl(ctx, "get", "endpointslices", "-l", "kubernetes.io/service-name=go-app", "-o", "json")
	if err != nil {
		return nil, err
	}
	var list struct {
		Items []struct {
			Endpoints []struct {
				Addresses  []string
				Conditions struct{ Ready bool }
			}
		}
	}
	if err := json.Unmarshal(out, &list); err != nil {
		return nil, err
	}
	var ready []string
	for _, s := range list.Items {
		for _, e := range s.Endpoints {
			if e.Conditions.Ready {
				ready = append(ready, e.Addresses[0]+":8080")
			}
		}
	}
	slices.Sort(ready)
	return ready, nil
}

// follow waits on all nodes until the kernel holds these endpoints of the Service, and
// then for the agent to say the same, as long as that may take. What the kernel
// holds is read without natlens, from what iptables-save and nft print.
func (c *changes) follow(ctx context.Context, want []string) (string, error) {
	seen := make([]string, len(c.Nodes))
	errs := make([]error, len(c.Nodes))
	var all sync.WaitGroup
	for i, n := range c.Nodes {
		all.Go(func() {
			took, err := c.followOn(ctx, n, want)
			seen[i] = fmt.Sprintf("%.1fs", took.Seconds())
			if err != nil {
				errs[i] = fmt.Errorf("%s (%s): %w", n.Name, n.Proxy.Mode, err)
			}
		})
	}
	all.Wait()
	return fmt.Sprintf("%d endpoints in the kernel; the agents know after %s", len(want), strings.Join(seen, ", ")), errors.Join(errs...)
}

func (c *changes) followOn(ctx context.Context, n *kube.Node, want []string) (time.Duration, error) {
	holds := func() error {
		kernel, err := kernelTargets(ctx, n)
		if err == nil && !slices.Equal(kernel, want) {
			err = fmt.Errorf("the kernel has %v, want %v", kernel, want)
		}
		return err
	}
	err := eventually(ctx, 30*time.Second, holds)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	err = eventually(ctx, mostLag, func() error {
		served, err := c.served(ctx, n)
		if err != nil {
			return err
		}
		if !slices.Equal(served, want) {
			return fmt.Errorf("the agent says %v, the kernel has %v", served, want)
		}
		return nil
	})
	took := time.Since(start)
	if err == nil {
		err = c.dumped(ctx, n, want)
	}
	if err == nil {
		err = holds() // still
	}
	return took, err
}

// dumped reads with natlens what the kernel's tools print.
func (c *changes) dumped(ctx context.Context, n *kube.Node, want []string) error {
	dump := string(n.Proxy.Mode) + "-save"
	if n.Proxy.Mode == kube.NFTables {
		dump = "nft -j list ruleset"
	}
	out, err := n.Exec(ctx, "sh", "-c", dump+" | "+c.program+" services -f - -o json")
	if err != nil {
		return err
	}
	var doc servicesDoc
	if err := json.Unmarshal(out, &doc); err != nil {
		return err
	}
	doc.Services = slices.DeleteFunc(doc.Services, func(s serviceDoc) bool { return s.Namespace != "default" || s.Name != "go-app" })
	if got := endpointsIn(doc); !slices.Equal(got, want) {
		return fmt.Errorf("from %s natlens reads %v, the kernel has %v", dump, got, want)
	}
	return nil
}

// served returns the endpoints that the agent names for pods' connections to the
// ClusterIP; none if it does not know the Service. The answer must be a good one.
func (c *changes) served(ctx context.Context, n *kube.Node) ([]string, error) {
	var doc servicesDoc
	if err := agentGet(ctx, n, "/api/v1/services?namespace=default&name=go-app", &doc); err != nil {
		return nil, err
	}
	if doc.Snapshot.Stale {
		return nil, fmt.Errorf("stale: %s", doc.Snapshot.Error)
	}
	return endpointsIn(doc), nil
}

// endpointsIn returns the endpoints for pods' connections to an IPv4 ClusterIP.
func endpointsIn(doc servicesDoc) []string {
	var out []string
	for _, s := range doc.Services {
		for _, f := range s.Frontends {
			if f.Type != "ClusterIP" || f.Family != "ipv4" {
				continue
			}
			for _, r := range f.Routes {
				if slices.Contains(r.From, "pod") {
					for _, e := range r.Endpoints {
						out = append(out, e.Address)
					}
				}
			}
		}
	}
	slices.Sort(out)
	return out
}

var (
	// -A KUBE-SVC-… -m comment --comment "default/go-app -> 10.52.1.2:8080" …
	iptablesTarget = regexp.MustCompile(`(?m)^-A KUBE-SVC-\S+ .*"default/go-app -> ([0-9.]+:\d+)"`)
	// … dnat to 10.52.1.2:8080, or: dnat ip to numgen random mod 3 map { 0 : 10.52.1.2 . 8080, …
	nftablesChain  = regexp.MustCompile(`(?s)chain service-\w+-default/go-app/tcp/ \{.*?\n\t\}`)
	nftablesTarget = regexp.MustCompile(`([0-9]+\.[0-9]+\.[0-9]+\.[0-9]+)(?::| \. )(\d+)`)
)

// kernelTargets returns the endpoints that the rules of the node choose from for the
// Service, by the text of iptables-save or nft.
func kernelTargets(ctx context.Context, n *kube.Node) ([]string, error) {
	var out []string
	if n.Proxy.Mode == kube.NFTables {
		text, err := n.Exec(ctx, "nft", "list", "ruleset", "ip")
		if err != nil {
			return nil, err
		}
		for _, m := range nftablesTarget.FindAllSubmatch(nftablesChain.Find(text), -1) {
			out = append(out, string(m[1])+":"+string(m[2]))
		}
	} else {
		text, err := n.Exec(ctx, string(n.Proxy.Mode)+"-save", "-t", "nat")
		if err != nil {
			return nil, err
		}
		for _, m := range iptablesTarget.FindAllSubmatch(text, -1) {
			out = append(out, string(m[1]))
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// finding waits until all agents have a finding about the Service, or none.
func (c *changes) finding(ctx context.Context, code string, there bool) (string, error) {
	start := time.Now()
	for _, n := range c.Nodes {
		err := eventually(ctx, 75*time.Second, func() error { // the grace is 30 s
			var doc servicesDoc
			if err := agentGet(ctx, n, "/api/v1/findings", &doc); err != nil {
				return err
			}
			about := slices.DeleteFunc(doc.Findings, func(f findingDoc) bool { return f.Service == nil || f.Service.Name != "go-app" })
			has := slices.ContainsFunc(about, func(f findingDoc) bool { return f.Code == code })
			if there && !has || !there && len(about) > 0 {
				return fmt.Errorf("%s: %+v", n.Name, about)
			}
			return nil
		})
		if err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("after %.1fs", time.Since(start).Seconds()), nil
}

// flush empties the tables of kube-proxy.
func (c *changes) flush(ctx context.Context) error {
	for _, n := range c.Nodes {
		command := []string{"nft", "flush table ip kube-proxy; flush table ip6 kube-proxy"}
		if n.Proxy.Mode != kube.NFTables {
			command = []string{string(n.Proxy.Mode), "-t", "nat", "-F"}
		}
		if _, err := n.Exec(ctx, command[0], command[1:]...); err != nil {
			return err
		}
	}
	return nil
}

// failingRead makes the agents' readings fail, by taking their right to open another
// socket or file, while a connection to them is open already.
func (c *changes) failingRead(ctx context.Context) {
	for _, n := range c.Nodes {
		c.check(fmt.Sprintf("readings fail on %s (%s): the last answer stays, marked stale", n.Name, n.Proxy.Mode), func() (string, error) {
			return c.failOn(ctx, n)
		})
	}
}

func (c *changes) failOn(ctx context.Context, n *kube.Node) (seen string, err error) {
	agent, err := c.agent(ctx, n)
	if err != nil {
		return "", err
	}
	client := &http.Client{Transport: &http.Transport{DialContext: n.Dial, MaxConnsPerHost: 1}, Timeout: 5 * time.Second}
	defer client.CloseIdleConnections()
	ask := func() (doc servicesDoc, err error) {
		body, err := httpGet(ctx, client, "http://127.0.0.1:9754/api/v1/services/default/go-app")
		if err == nil {
			err = json.Unmarshal(body, &doc)
		}
		return doc, err
	}
	before, err := ask()
	if err != nil {
		return "", err
	}
	limit, err := setFiles(ctx, agent, "1")
	if err != nil {
		return "", err
	}
	defer func() {
		_, failed := setFiles(context.WithoutCancel(ctx), agent, limit)
		err = errors.Join(err, failed)
	}()
	start := time.Now()
	var stale time.Duration
	err = eventually(ctx, 2*mostLag, func() error {
		// Something to read.
		if err := touchRules(ctx, n); err != nil {
			return err
		}
		doc, err := ask()
		if err != nil {
			return err
		}
		if !slices.Equal(endpointsIn(doc), endpointsIn(before)) {
			return fmt.Errorf("the answer was %v and is %v", endpointsIn(before), endpointsIn(doc))
		}
		if !doc.Snapshot.Stale || doc.Snapshot.Error == "" {
			return errors.New("not stale yet")
		}
		stale, seen = time.Since(start), doc.Snapshot.Error
		return nil
	})
	if err != nil {
		return "", err
	}
	seen = fmt.Sprintf("stale after %.1fs (%s)", stale.Seconds(), seen)
	if _, err := setFiles(ctx, agent, limit); err != nil {
		return seen, err
	}
	start = time.Now()
	err = eventually(ctx, 2*mostLag, func() error {
		doc, err := ask()
		if err == nil && doc.Snapshot.Stale {
			err = fmt.Errorf("still stale: %s", doc.Snapshot.Error)
		}
		return err
	})
	return fmt.Sprintf("%s, fresh again after %.1fs", seen, time.Since(start).Seconds()), err
}

// setFiles sets how many files a pod's process may have open, and returns what it was.
func setFiles(ctx context.Context, p *kube.Pod, limit string) (before string, err error) {
	out, err := p.Node.Exec(ctx, "prlimit", "--pid", filepath.Base(p.Proc), "--nofile", "--noheadings", "--raw", "--output", "SOFT")
	if err != nil {
		return "", err
	}
	_, err = p.Node.Exec(ctx, "prlimit", "--pid", filepath.Base(p.Proc), "--nofile="+limit+":")
	return strings.TrimSpace(string(out)), err
}

// touchRules changes rules that mean nothing.
func touchRules(ctx context.Context, n *kube.Node) error {
	_, err := n.Exec(ctx, "nft", "add table inet e2e; delete table inet e2e")
	return err
}

// agent returns the agent of a node.
func (c *changes) agent(ctx context.Context, n *kube.Node) (*kube.Pod, error) {
	pods, err := c.Pods(ctx, "natlens-system", "app.kubernetes.io/name=natlens-agent")
	if err != nil {
		return nil, err
	}
	for _, p := range pods {
		if p.Node == n {
			return p, nil
		}
	}
	return nil, fmt.Errorf("no agent on %s", n.Name)
}
