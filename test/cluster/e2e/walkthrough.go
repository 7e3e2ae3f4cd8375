package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/natlens/natlens/test/cluster/kube"
)

// walkthrough does what a new user does.
var walkthrough = suite{
	name: "walkthrough",
	nodes: kube.ThreeNodes(
		kube.Proxy{Mode: kube.IPTablesNFT},
		kube.Proxy{Mode: kube.IPTablesLegacy},
		kube.Proxy{Version: "v1.35.4", Mode: kube.IPTablesNFT},
	),
	run: func(ctx context.Context, b *bench) error {
		w := &walk{bench: b}
		if err := w.deploy(ctx); err != nil {
			return err
		}
		w.traffic(ctx)
		w.agents(ctx)
		w.access(ctx)
		w.prometheus(ctx)
		w.image(ctx)
		return nil
	},
}

// walk is what the user of the walkthrough knows.
type walk struct {
	*bench
	pods      []*kube.Pod // of the echo server
	clusterIP string
	nodePort  string
	balancer  string
}

// The chain of default/go-app, on every node of every cluster: the name is a hash
// of the Service's.
const goAppChain = "KUBE-SVC-7WFRCR3BAURI7IH5"

// deploy deploys everything. The last node takes no pod of the echo server, so that
// there is a node without one.
func (w *walk) deploy(ctx context.Context) error {
	if !w.check("kubectl apply -f deploy/daemonset.yaml brings an agent to every node", func() (string, error) {
		return w.installAgent(ctx)
	}) {
		return errors.New("there is nothing to see without agents")
	}
	last := w.Nodes[len(w.Nodes)-1].Name
	if _, err := w.Kubectl(ctx, "cordon", last); err != nil {
		return err
	}
	w.check("kubectl apply -f deploy/echo.yaml starts the echo server", func() (string, error) {
		return w.installEcho(ctx)
	})
	// From here by hand, as in the README's first example.
	if _, err := w.Kubectl(ctx, "delete", "service", "go-app"); err != nil {
		return err
	}
	if _, err := w.Kubectl(ctx, "scale", "deployment/go-app", "--replicas=1"); err != nil {
		return err
	}
	ok := w.check("kubectl scale --replicas 3", func() (string, error) {
		if _, err := w.Kubectl(ctx, "scale", "deployment/go-app", "--replicas", "3"); err != nil {
			return "", err
		}
		if err := w.rollout(ctx, "default", "deployment/go-app"); err != nil {
			return "", err
		}
		return w.findPods(ctx, 3)
	})
	ok = w.check("kubectl expose --type=LoadBalancer --port 80 --target-port 8080", func() (string, error) {
		if _, err := w.Kubectl(ctx, "expose", "deployment/go-app", "--type=LoadBalancer", "--port", "80", "--target-port", "8080"); err != nil {
			return "", err
		}
		return w.findService(ctx, "203.0.113.80")
	}) && ok
	if !ok {
		return errors.New("there is no traffic without the echo server")
	}
	w.check("every agent knows the Service soon", func() (string, error) { return w.known(ctx) })
	return nil
}

// findPods finds the echo server's pods.
func (w *walk) findPods(ctx context.Context, want int) (string, error) {
	err := eventually(ctx, 30*time.Second, func() (err error) {
		if w.pods, err = w.Pods(ctx, "default", "app=go-app"); err == nil && len(w.pods) != want {
			err = fmt.Errorf("%d pods, want %d", len(w.pods), want)
		}
		return err
	})
	var where []string
	for _, p := range w.pods {
		where = append(where, p.IP+" on "+p.Node.Name)
	}
	return strings.Join(where, ", "), err
}

// findService finds the Service's addresses, and gives it that of a load balancer,
// which a cloud would.
func (w *walk) findService(ctx context.Context, balancer string) (string, error) {
	status := fmt.Sprintf(`{"status":{"loadBalancer":{"ingress":[{"ip":%q}]}}}`, balancer)
	if _, err := w.Kubectl(ctx, "patch", "service", "go-app", "--subresource=status", "--type=merge", "--patch", status); err != nil {
		return "", err
	}
	out, err := w.Kubectl(ctx, "get", "service", "go-app", "-o", "jsonpath={.spec.clusterIP} {.spec.ports[0].nodePort} {.status.loadBalancer.ingress[0].ip}")
	if err != nil {
		return "", err
	}
	_, err = fmt.Sscan(string(out), &w.clusterIP, &w.nodePort, &w.balancer)
	return fmt.Sprintf("ClusterIP %s, NodePort %s, load balancer %s", w.clusterIP, w.nodePort, w.balancer), err
}

// known waits until all agents see all endpoints behind all frontends. kube-proxy
// takes up to a second to write rules; an agent reads iptables-legacy every ten.
func (w *walk) known(ctx context.Context) (string, error) {
	start := time.Now()
	var seen []string
	for _, n := range w.Nodes {
		err := eventually(ctx, 13*time.Second, func() error {
			frontends, err := w.frontends(ctx, n)
			if err != nil {
				return err
			}
			for _, want := range []string{"ClusterIP", "NodePort", "LoadBalancer"} {
				f, ok := frontends[want]
				if !ok || len(f.Routes) == 0 || len(f.Routes[0].Endpoints) != len(w.pods) {
					return fmt.Errorf("agent of %s does not know all endpoints of the %s: %+v", n.Name, want, f)
				}
			}
			return nil
		})
		if err != nil {
			return "", err
		}
		seen = append(seen, fmt.Sprintf("%s after %.1fs", n.Name, time.Since(start).Seconds()))
	}
	return strings.Join(seen, ", "), nil
}

// frontends returns the frontends of the Service, by type, as a node's agent knows
// them.
func (w *walk) frontends(ctx context.Context, n *kube.Node) (map[string]frontendDoc, error) {
	services, err := agentService(ctx, n, "default", "go-app")
	if err != nil {
		return nil, err
	}
	out := map[string]frontendDoc{}
	for _, s := range services {
		for _, f := range s.Frontends {
			out[f.Type] = f
		}
	}
	return out, nil
}

// traffic makes real connections, and holds them against the agents' shares.
func (w *walk) traffic(ctx context.Context) {
	const connections = 300
	pod := w.pods[0]
	sample := func(what string, from kube.Netns, address string, n *kube.Node, frontend string) {
		w.check(what, func() (string, error) {
			s, err := echoes(ctx, from, address, connections)
			if err != nil {
				return s.String(), err
			}
			frontends, err := w.frontends(ctx, n)
			if err != nil {
				return s.String(), err
			}
			return s.String(), s.fits(frontends[frontend].Routes[0].Endpoints)
		})
	}
	sample("curl the ClusterIP from a pod: the answers spread as the agent says", pod.Netns, w.clusterIP+":80", pod.Node, "ClusterIP")
	sample("curl the ClusterIP from a node", w.Nodes[2].Netns, w.clusterIP+":80", w.Nodes[2], "ClusterIP")
	w.check("curl each pod directly, from a pod and from every node", func() (string, error) { return w.direct(ctx) })
	for _, n := range w.Nodes {
		pods := 0
		for _, p := range w.pods {
			if p.Node == n {
				pods++
			}
		}
		what := fmt.Sprintf("curl the NodePort of %s (%v, %s) from outside", n.Name, n.Proxy, plural(pods, "pod"))
		sample(what, w.Outside.Netns, netip.AddrPortFrom(n.Addrs[0], 0).Addr().String()+":"+w.nodePort, n, "NodePort")
	}
	sample("curl the load balancer from outside", w.Outside.Netns, w.balancer+":80", w.Nodes[0], "LoadBalancer")
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprint(n, " ", what, "s")
}

func (w *walk) direct(ctx context.Context) (string, error) {
	from := []kube.Netns{w.pods[0].Netns}
	for _, n := range w.Nodes {
		from = append(from, n.Netns)
	}
	n := 0
	for _, f := range from {
		for _, p := range w.pods {
			doc, err := echo(ctx, f, p.IP+":8080")
			if err != nil {
				return "", err
			}
			if doc.Pod != p.Name || doc.Node != p.Node.Name {
				return "", fmt.Errorf("%s on %s answered for %s on %s", doc.Pod, doc.Node, p.Name, p.Node.Name)
			}
			n++
		}
	}
	return fmt.Sprintf("%d connections, each answered by its pod", n), nil
}

// agents holds each agent's JSON against what iptables prints on its node.
func (w *walk) agents(ctx context.Context) {
	for _, n := range w.Nodes {
		w.check(fmt.Sprintf("agent of %s (%v): the same chains, addresses and shares as iptables -t nat -nL", n.Name, n.Proxy), func() (string, error) {
			return w.compare(ctx, n)
		})
	}
	w.check("no agent has a finding", func() (string, error) {
		for _, n := range w.Nodes {
			var doc struct{ Findings []findingDoc }
			if err := agentGet(ctx, n, "/api/v1/findings", &doc); err != nil {
				return "", err
			}
			if len(doc.Findings) > 0 {
				return "", fmt.Errorf("%s: %+v", n.Name, doc.Findings)
			}
		}
		return fmt.Sprintf("0 on %d nodes", len(w.Nodes)), nil
	})
}

func (w *walk) compare(ctx context.Context, n *kube.Node) (string, error) {
	printed, err := printedEndpoints(ctx, n, goAppChain)
	if err != nil {
		return "", err
	}
	frontends, err := w.frontends(ctx, n)
	if err != nil {
		return "", err
	}
	if len(printed) != len(w.pods) {
		return "", fmt.Errorf("iptables prints %v, want %d endpoints", printed, len(w.pods))
	}
	for _, kind := range slices.Sorted(maps.Keys(frontends)) {
		for _, r := range frontends[kind].Routes {
			same := slices.EqualFunc(r.Endpoints, printed, func(a, b endpointDoc) bool {
				return a.Address == b.Address && a.Chain == b.Chain && math.Abs(a.Share-b.Share) < 1e-9 // iptables prints 11 digits
			})
			if !same {
				return "", fmt.Errorf("%s: iptables prints %v, the agent says %v", kind, printed, r.Endpoints)
			}
		}
	}
	var seen []string
	for _, e := range printed {
		seen = append(seen, fmt.Sprintf("%.1f%% %s %s", 100*e.Share, strings.TrimPrefix(e.Chain, "KUBE-"), e.Address))
	}
	return strings.Join(seen, ", "), nil
}

var (
	sepLine  = regexp.MustCompile(`(?m)^(KUBE-SEP-\w+)\s.*?(?:probability ([\d.]+))?$`)
	dnatLine = regexp.MustCompile(`(?m)^DNAT\s.* to:(\S+)$`)
)

// printedEndpoints works out by hand what iptables -t nat -nL says of a Service:
// each rule takes its part of what the rules before have left.
func printedEndpoints(ctx context.Context, n *kube.Node, chain string) ([]endpointDoc, error) {
	list := func(chain string) (string, error) {
		program := "iptables-nft"
		if n.Proxy.Mode == kube.IPTablesLegacy {
			program = "iptables-legacy"
		}
		out, err := n.Exec(ctx, program, "-t", "nat", "-nL", chain)
		return string(out), err
	}
	rules, err := list(chain)
	if err != nil {
		return nil, err
	}
	var out []endpointDoc
	left := 1.0
	for _, m := range sepLine.FindAllStringSubmatch(rules, -1) {
		p := 1.0
		if m[2] != "" {
			if p, err = strconv.ParseFloat(m[2], 64); err != nil {
				return nil, err
			}
		}
		endpoint, err := list(m[1])
		if err != nil {
			return nil, err
		}
		to := dnatLine.FindStringSubmatch(endpoint)
		if to == nil {
			return nil, fmt.Errorf("no DNAT in\n%s", endpoint)
		}
		out = append(out, endpointDoc{Address: to[1], Share: left * p, Chain: m[1]})
		left *= 1 - p
	}
	return out, nil
}

// access asks the agents in the ways that the README tells.
func (w *walk) access(ctx context.Context) {
	const path = "/api/v1/services/default/go-app"
	n := w.Nodes[2]
	w.check("HTTP on the node: curl http://127.0.0.1:9754"+path, func() (string, error) {
		out, err := n.Exec(ctx, "curl", "-fsS", "http://127.0.0.1:9754"+path)
		return w.endpointsIn(out, err)
	})
	w.check("kubectl port-forward ds/natlens-agent 9754, and curl", func() (string, error) {
		stop, err := w.portForward(ctx, "-n", "natlens-system", "ds/natlens-agent", "9754")
		if err != nil {
			return "", err
		}
		defer stop()
		out, err := w.Control.Output(ctx, "curl", "-fsS", "http://localhost:9754"+path)
		return w.endpointsIn(out, err)
	})
	w.check("HTTPS over the network, with a token of a reader", func() (string, error) {
		token, err := w.reader(ctx)
		if err != nil {
			return "", err
		}
		out, err := w.Outside.Output(ctx, "curl", "-fsSk", "-H", "Authorization: Bearer "+token, "https://"+n.Addrs[0].String()+":9753"+path)
		return w.endpointsIn(out, err)
	})
	w.check("the page, through the same port", func() (string, error) {
		out, err := n.Exec(ctx, "curl", "-fsS", "http://127.0.0.1:9754/")
		if err == nil && !strings.Contains(string(out), "<title>") {
			err = fmt.Errorf("no page: %.100s", out)
		}
		return fmt.Sprintf("%d bytes of HTML", len(out)), err
	})
}

// endpointsIn decodes the JSON of the Service, and checks that all pods are in it.
func (w *walk) endpointsIn(body []byte, err error) (string, error) {
	if err != nil {
		return "", err
	}
	var doc servicesDoc
	if err := json.Unmarshal(body, &doc); err != nil {
		return "", err
	}
	if len(doc.Services) != 1 || len(doc.Services[0].Frontends) == 0 {
		return "", fmt.Errorf("want one Service: %.300s", body)
	}
	n := len(doc.Services[0].Frontends[0].Routes[0].Endpoints)
	seen := fmt.Sprintf("%d endpoints, by the agent of %s", n, doc.Snapshot.Node)
	if n != len(w.pods) {
		return seen, fmt.Errorf("want %d endpoints", len(w.pods))
	}
	return seen, nil
}

// reader makes a ServiceAccount that may read from agents, as the README does, and
// returns a token of it.
func (w *walk) reader(ctx context.Context) (string, error) {
	for _, args := range [][]string{
		{"create", "serviceaccount", "-n", "default", "debugger"},
		{"create", "clusterrolebinding", "debugger", "--clusterrole=natlens-reader", "--serviceaccount=default:debugger"},
	} {
		if _, err := w.Kubectl(ctx, args...); err != nil && !strings.Contains(err.Error(), "already exists") {
			return "", err
		}
	}
	token, err := w.Kubectl(ctx, "create", "token", "-n", "default", "debugger")
	return strings.TrimSpace(string(token)), err
}
