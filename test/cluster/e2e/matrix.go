package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/natlens/natlens/test/cluster/kube"
)

// matrix compares, for every version and mode of kube-proxy and every feature of
// Services, what natlens says with what connections meet.
var matrix = suite{name: "matrix", run: runMatrix}

// proxies are the versions and modes, the node's three at a time.
func proxies() []kube.Proxy {
	var all []kube.Proxy
	for _, m := range []kube.Mode{kube.IPTablesNFT, kube.IPTablesLegacy, kube.NFTables} {
		for _, v := range kube.ProxyVersions {
			if m != kube.NFTables || v != "v1.28.15" && v != "v1.23.17" { // they have no such mode
				all = append(all, kube.Proxy{Version: v, Mode: m})
			}
		}
	}
	return all
}

func runMatrix(ctx context.Context, b *bench) error {
	agent, err := b.agentProgram()
	if err != nil {
		return err
	}
	if _, err := b.installAgent(ctx); err != nil {
		return err
	}
	fixtures, err := installFixtures(ctx, b)
	if err != nil {
		return err
	}
	crowd, err := crowdOutside(ctx, b)
	if err != nil {
		return err
	}
	todo := proxies()
	for len(todo) > 0 {
		var round []*cell
		for i, f := range fixtures[:min(len(fixtures), len(todo))] {
			c := &cell{fixture: f, bench: b, agent: agent, proxy: todo[i], crowd: crowd}
			if err := f.node.ChangeProxy(ctx, c.proxy, true); err != nil {
				return err
			}
			round = append(round, c)
		}
		todo = todo[len(round):]
		var all sync.WaitGroup
		var mu sync.Mutex
		for _, c := range round {
			all.Go(func() {
				c.run(ctx)
				mu.Lock()
				defer mu.Unlock()
				for i, r := range c.rows {
					b.results.add(r, c.took[i])
				}
			})
		}
		all.Wait()
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

// Addresses of outside besides its own: one that lb-ranges does not let in, and many
// clients that Services with session affinity have not seen.
var (
	beyond    = []netip.Addr{netip.MustParseAddr("192.0.2.200"), netip.MustParseAddr("2001:db8:2::c8")}
	crowdFrom = []netip.Addr{netip.MustParseAddr("192.0.2.20"), netip.MustParseAddr("2001:db8:2::20")}
)

const crowdSize = 64

// crowdOutside gives outside those addresses.
func crowdOutside(ctx context.Context, b *bench) ([]*client, error) {
	var crowd []*client
	lines := []string{fmt.Sprintf("ip addr replace %s/24 dev eth0; ip addr replace %s/64 dev eth0 nodad", beyond[0], beyond[1])}
	v4, v6 := crowdFrom[0], crowdFrom[1]
	for range crowdSize {
		crowd = append(crowd, &client{"outside", "external", b.Outside.Netns, []netip.Addr{v4, v6}})
		lines = append(lines, fmt.Sprintf("ip addr replace %s/24 dev eth0; ip addr replace %s/64 dev eth0 nodad", v4, v6))
		v4, v6 = v4.Next(), v6.Next()
	}
	_, err := b.Outside.Output(ctx, "sh", "-ec", strings.Join(lines, "\n"))
	return crowd, err
}

// cell is one version and mode of kube-proxy, on one node.
type cell struct {
	*fixture
	bench *bench
	agent string // the program
	proxy kube.Proxy
	crowd []*client // outside

	clients   []*client
	nodeAddrs []netip.Addr
	rows      []row
	took      []time.Duration // for each

	mu          sync.Mutex // of what follows
	connections int
	seen        map[string]int // how many connections met what
	wrong       []string
}

// run makes the checks of a cell.
func (c *cell) run(ctx context.Context) {
	var doc servicesDoc
	c.check("what agent diff finds", func() (string, error) { return c.diff(ctx) })
	c.check("agent doctor: two ways of reading agree", func() (string, error) { return c.doctor(ctx) })
	ok := c.check("agent services knows all Services", func() (seen string, err error) {
		doc, seen, err = c.read(ctx)
		return seen, err
	})
	c.check("the agent that serves says the same", func() (string, error) { return c.served(ctx) })
	if !ok {
		return
	}
	c.check("connections meet what natlens says", func() (string, error) { return c.traffic(ctx, doc) })
	c.check("sessions stay where they began", func() (string, error) { return c.sessions(doc) })
}

func (c *cell) check(what string, f func() (string, error)) bool {
	start := time.Now()
	seen, err := f()
	c.rows = append(c.rows, row{c.bench.suite, c.proxy.String() + ": " + what, seen, err})
	c.took = append(c.took, time.Since(start))
	return err == nil
}

// diff compares the rules with the API, when kube-proxy has followed it.
func (c *cell) diff(ctx context.Context) (seen string, err error) {
	err = eventually(ctx, 20*time.Second, func() error {
		seen, err = c.diffNow(ctx)
		return err
	})
	return seen, err
}

func (c *cell) diffNow(ctx context.Context) (string, error) {
	// It is an error too if there are findings.
	out, err := c.node.Exec(ctx, c.agent, "diff", "--kubeconfig=/var/lib/kube-proxy/kubeconfig", "--node="+c.node.Name, "--grace=0", "-o", "json")
	var doc struct {
		Snapshot struct{ API struct{ Compared bool } }
		Findings []findingDoc
	}
	if json.Unmarshal(out, &doc) != nil {
		return "", err
	}
	if !doc.Snapshot.API.Compared {
		return "", errors.New("not compared with the API")
	}
	excused := 0
	for _, f := range doc.Findings {
		if !c.excused(f) {
			return "", fmt.Errorf("%d findings, such as %s: %s", len(doc.Findings), f.Code, f.Message)
		}
		excused++
	}
	if excused == 0 {
		return "none", nil
	}
	return fmt.Sprintf("%d %s", excused, c.excuse()), nil
}

// excused reports whether a finding is true, and has to be there, since Kubernetes
// does not allow for so old a kube-proxy beside this cluster's kubelets.
func (c *cell) excused(f findingDoc) bool {
	if f.Service == nil {
		return false
	}
	switch c.proxy.Version {
	case "v1.28.15":
		return f.Code == "FrontendStale" && f.Service.Name == "lb-proxy"
	case "v1.23.17":
		drops := []string{"lb-ranges", "lb-local", "lb-local-sticky", "np-local", "np-local-none"}
		return f.Code == "FallThrough" && slices.Contains(drops, f.Service.Name)
	}
	return false
}

func (c *cell) excuse() string {
	if c.proxy.Version == "v1.28.15" {
		return "true ones: it does not know ipMode Proxy, and answers for the load balancer"
	}
	return "true ones: it leaves dropping to the kubelet's rules, which kubelets since v1.27 do not write"
}

func (c *cell) doctor(ctx context.Context) (string, error) {
	out, err := c.node.Exec(ctx, c.agent, "doctor")
	if err != nil {
		return "", fmt.Errorf("%w: %.600s", err, out)
	}
	if !strings.Contains(string(out), "The readers agree") {
		return "", fmt.Errorf("%.600s", out)
	}
	return lastLine(out), nil
}

// read asks natlens, and compares its Services and frontends with the fixture.
func (c *cell) read(ctx context.Context) (doc servicesDoc, seen string, err error) {
	out, err := c.node.Exec(ctx, c.agent, "services", "-o", "json")
	if err != nil {
		return doc, "", err
	}
	if err := json.Unmarshal(out, &doc); err != nil {
		return doc, "", err
	}
	if doc.Snapshot.Backend != string(c.proxy.Mode) {
		return doc, "", fmt.Errorf("backend %q", doc.Snapshot.Backend)
	}
	frontends := 0
	for _, s := range c.ready {
		for _, f := range s.frontends {
			if c.notForUs(s, f) {
				if c.find(doc, s, f) != nil {
					return doc, "", fmt.Errorf("%s: natlens knows %s, where a load balancer answers itself", s, f)
				}
				continue
			}
			if c.find(doc, s, f) == nil {
				return doc, "", fmt.Errorf("%s: natlens does not know %s %s", s, f.kind, f)
			}
			frontends++
		}
	}
	return doc, fmt.Sprintf("%d ports of Services, %d frontends", len(c.ready), frontends), nil
}

// notForUs reports whether kube-proxy leaves a frontend to the load balancer: since
// v1.30, where ipMode is Proxy.
func (c *cell) notForUs(s service, f frontend) bool {
	return s.name == "lb-proxy" && f.kind == "LoadBalancer" && c.proxy.Version >= "v1.30"
}

func (s service) String() string {
	return strings.Trim(s.namespace+"/"+s.name+":"+s.port, ":")
}

func (f frontend) String() string { return f.at.String() }

// find returns what natlens says of a frontend, nil if it does not know it.
func (c *cell) find(doc servicesDoc, s service, f frontend) *frontendDoc {
	family := "ipv4"
	if f.at.Addr().Is6() {
		family = "ipv6"
	}
	for i := range doc.Services {
		d := &doc.Services[i]
		if d.Namespace != s.namespace || d.Name != s.name || d.Port != s.port || d.Protocol != s.protocol {
			continue
		}
		for j := range d.Frontends {
			g := &d.Frontends[j]
			if g.Type != f.kind || g.Port != int(f.at.Port()) || g.Family != family {
				continue
			}
			if f.kind == "NodePort" || g.Address == f.at.Addr().String() {
				return g
			}
		}
	}
	return nil
}

// served compares the agent of the DaemonSet with the command.
func (c *cell) served(ctx context.Context) (string, error) {
	start := time.Now()
	err := eventually(ctx, 20*time.Second, func() error { return sameAsFresh(ctx, c.node, c.agent) })
	return fmt.Sprintf("after %.1fs", time.Since(start).Seconds()), err
}

// target is a frontend, and somebody who connects to it.
type target struct {
	service  service
	frontend frontend
	client   *client
	route    routeDoc
}

func (t target) String() string {
	return fmt.Sprintf("%s %s %s from %s", t.service, t.frontend.kind, t.frontend, t.client.name)
}

// targets returns all frontends from everywhere. Of the outside's clients, the one
// beyond the allowed ranges matters only where there are any.
func (c *cell) targets(doc servicesDoc) ([]target, error) {
	var all []target
	for _, s := range c.ready {
		for _, f := range s.frontends {
			if c.notForUs(s, f) {
				continue
			}
			known := c.find(doc, s, f)
			for _, cl := range c.clients {
				r, narrowed := routeFrom(known, cl.class, cl.source(f.at.Addr()))
				switch {
				case r == nil:
					return nil, fmt.Errorf("%s %s: natlens does not say what becomes of connections from %s", s, f, cl.name)
				case cl.name == "beyond" && !narrowed:
				default:
					all = append(all, target{s, f, cl, *r})
				}
			}
		}
	}
	return all, nil
}

// source returns the address from which a client connects to another.
func (c *client) source(to netip.Addr) netip.Addr {
	switch {
	case c.addrs == nil:
		return netip.Addr{}
	case to.Is6():
		return c.addrs[1]
	}
	return c.addrs[0]
}

// routeFrom returns the route of a class and source; narrowed says that the class
// has others for some sources.
func routeFrom(f *frontendDoc, class string, source netip.Addr) (found *routeDoc, narrowed bool) {
	for i := range f.Routes {
		r := &f.Routes[i]
		if !slices.Contains(r.From, class) {
			continue
		}
		if len(r.Sources) == 0 && found == nil {
			found = r
		}
		for _, p := range r.Sources {
			narrowed = true
			if source.IsValid() && p.Contains(source) {
				found = r
			}
		}
	}
	return found, narrowed
}

// traffic connects to everything from everywhere.
func (c *cell) traffic(ctx context.Context, doc servicesDoc) (string, error) {
	if err := c.findClients(ctx); err != nil {
		return "", err
	}
	targets, err := c.targets(doc)
	if err != nil {
		return "", err
	}
	c.seen = map[string]int{}
	work := make(chan target)
	var all sync.WaitGroup
	for range 6 {
		all.Go(func() {
			for t := range work {
				if err := c.compare(t); err != nil {
					c.isWrong("%s: %v", t, err)
				}
			}
		})
	}
	routes, onlyRules := 0, 0
	for _, t := range targets {
		switch {
		case ctx.Err() != nil:
		case t.service.protocol == "SCTP": // this kernel, and Go, have none
			onlyRules++
			if err := sameEndpoints(t); err != nil {
				c.isWrong("%v", err)
			}
		case !t.service.affinity: // see sessions
			routes++
			work <- t
		}
	}
	close(work)
	all.Wait()
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	seen := fmt.Sprintf("%d routes, %d connections: %d refused, %d dropped, %d not taken", routes, c.connections, c.seen[refused], c.seen[silence], c.seen[notTaken])
	if onlyRules > 0 {
		seen += fmt.Sprintf("; %d SCTP routes by their endpoints alone", onlyRules)
	}
	return seen, wrongs(c.wrong)
}

// wrongs makes one error of what was wrong.
func wrongs(list []string) error {
	if len(list) == 0 {
		return nil
	}
	slices.Sort(list)
	const most = 5
	return fmt.Errorf("%d wrong: %s", len(list), strings.Join(list[:min(len(list), most)], "; "))
}

// findClients looks up where the cell's connections come from.
func (c *cell) findClients(ctx context.Context) error {
	pod, err := c.bench.Pod(ctx, "matrix", "client-"+c.node.Name)
	if err != nil {
		return err
	}
	outside := c.bench.Outside.Netns
	c.clients = []*client{
		{"a pod", "pod", pod.Netns, nil},
		{"the node", "node", c.node.Netns, nil},
		{"outside", "external", outside, kube.OutsideAddrs},
		{"beyond", "external", outside, beyond},
	}
	return c.node.Do(func() error {
		addrs, err := net.InterfaceAddrs()
		for _, a := range addrs {
			c.nodeAddrs = append(c.nodeAddrs, netip.MustParsePrefix(a.String()).Addr())
		}
		return err
	})
}

// sameEndpoints compares a route that nobody can connect to with the fixture.
func sameEndpoints(t target) error {
	var want, got []string
	for _, e := range t.service.endpoints {
		if e.ready && e.at.Addr().Is4() == t.frontend.at.Addr().Is4() {
			want = append(want, e.at.String())
		}
	}
	for _, e := range t.route.Endpoints {
		got = append(got, e.Address)
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(want, got) {
		return fmt.Errorf("%s: endpoints %v, want %v", t, got, want)
	}
	return nil
}

// unlikely is how improbable a sample has to be to be drawn again, fourfold. If that
// one is as improbable, the shares are wrong: or one in 4 million times they are not,
// and a run has about 4000 routes.
const unlikely = 0.0005

// compare connects from a client to a frontend as often as natlens's answer can be
// told from a wrong one.
func (c *cell) compare(t target) error {
	if len(t.route.Unknown) > 0 {
		return fmt.Errorf("natlens cannot decide %q", t.route.Unknown)
	}
	e := expect(t.route)
	network := strings.ToLower(t.service.protocol)
	n := e.size()
	for try := range 2 {
		counts, err := t.client.sample(network, t.frontend.at, e, n<<(2*try), c.nodeAddrs)
		c.count(counts)
		if err != nil {
			return fmt.Errorf("%w; natlens says %s", err, e)
		}
		p := e.pValue(counts)
		if p >= unlikely {
			return nil
		}
		if try == 1 {
			return fmt.Errorf("met %v; natlens says %s (p = %.1g, twice)", counts, e, p)
		}
	}
	return nil
}

func (e expectation) String() string { return fmt.Sprint(e.shares) }

func (c *cell) count(counts map[string]int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for what, n := range counts {
		c.connections += n
		c.seen[what] += n
	}
}

// sessions connects to Services with session affinity: the first connections of many
// clients go where natlens says, each of the later ones where the first one went.
func (c *cell) sessions(doc servicesDoc) (string, error) {
	targets, err := c.targets(doc)
	if err != nil {
		return "", err
	}
	// The frontends of a Service know the same clients, so that those go one after
	// the other: several first connections at once may go apart.
	groups := map[string][]target{}
	for _, t := range targets {
		if t.service.affinity && t.client.name != "beyond" {
			key := fmt.Sprint(t.service, t.frontend.at.Addr().Is4())
			groups[key] = append(groups[key], t)
		}
	}
	c.connections, c.wrong = 0, nil
	var all sync.WaitGroup
	for _, group := range groups {
		all.Go(func() {
			for _, t := range group {
				c.session(t)
			}
		})
	}
	all.Wait()
	return fmt.Sprintf("%d clients, %d connections", c.connections/perSession, c.connections), wrongs(c.wrong)
}

// perSession is how many connections a client makes to see that it stays.
const perSession = 4

// session makes the connections of all clients to one frontend.
func (c *cell) session(t target) {
	clients := []*client{t.client}
	if t.client.class == "external" {
		clients = c.crowd
	}
	e := expect(t.route)
	firsts := map[string]int{}
	for _, cl := range clients {
		first, err := cl.sample("tcp", t.frontend.at, e, 1, c.nodeAddrs)
		later := map[string]int{}
		if err == nil {
			later, err = cl.sample("tcp", t.frontend.at, e, perSession-1, c.nodeAddrs)
		}
		c.count(first)
		c.count(later)
		if err != nil {
			c.isWrong("%s: %v; natlens says %s", t, err, e)
			return
		}
		for what := range first {
			firsts[what]++
			if later[what] != perSession-1 {
				c.isWrong("%s: first to %s, then %v", t, what, later)
			}
		}
	}
	if p := e.pValue(firsts); len(clients) > 1 && p < unlikely*unlikely {
		c.isWrong("%s: the first connections of many met %v; natlens says %s (p = %.1g)", t, firsts, e, p)
	}
}

func (c *cell) isWrong(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wrong = append(c.wrong, fmt.Sprintf(format, args...))
}
