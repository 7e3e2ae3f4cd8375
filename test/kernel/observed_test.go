//go:build linux

package kernel

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/internal/nodebox"
	"github.com/natlens/natlens/internal/observed"
	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/affinity"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/conntrack"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
)

// boxReader reads the rules of the box's node.
type boxReader struct {
	node *nodebox.Namespace
	read func(context.Context) (*netfilter.Ruleset, error)
}

func (r boxReader) Read(ctx context.Context) (rs *netfilter.Ruleset, err error) {
	err2 := r.node.Do(func() error {
		rs, err = r.read(ctx)
		return err
	})
	return rs, err2
}

// on returns a Service of all pods that serve.
func (w *world) on(name, protocol string, pods ...netip.Addr) kubeproxy.Service {
	s := kubeproxy.Service{Namespace: "default", Name: name, Protocol: protocol, ClusterIP: w.cluster, PortNumber: 80, NodePort: 30080}
	for _, a := range pods {
		s.Endpoints = append(s.Endpoints, kubeproxy.Endpoint{Addr: netip.AddrPortFrom(a, podPort)})
	}
	return s
}

// restore puts rules into the kernel, as kube-proxy does: all counters begin anew,
// and connections go on.
func (w *world) restore(t *testing.T, services ...kubeproxy.Service) {
	t.Helper()
	rules := write(t, w.config(), services)
	if err := w.box.Restore(t.Context(), w.backend, w.family == kubeproxy.IPv6, strings.NewReader(rules)); err != nil {
		t.Fatal(err)
	}
}

// TestObservedConnections wants each connection counted once, for the endpoint
// that answered, over new rules and endpoints that come and go.
func TestObservedConnections(t *testing.T) {
	for _, backend := range []nodebox.Backend{nodebox.NFT, nodebox.Legacy} {
		for _, family := range []kubeproxy.Family{kubeproxy.IPv4, kubeproxy.IPv6} {
			t.Run(fmt.Sprint(backend, " family ", int(family)), func(t *testing.T) { observeConnections(t, newWorld(t, backend, family)) })
		}
	}
}

func observeConnections(t *testing.T, w *world) {
	read := w.reader.Read
	if w.backend == nodebox.NFT {
		kernel := &iptables.Kernel{}
		defer kernel.Close()
		read = kernel.Refresh
	}
	keeper := &snapshot.Keeper{
		Reader: boxReader{w.box.Node, read}, Log: slog.New(slog.DiscardHandler),
		Node: func() (chain.Node, error) { return chain.Node{Local: []netip.Addr{w.node, w.node2}}, nil },
	}
	refresh := func() {
		t.Helper()
		if err := keeper.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	made := map[netip.AddrPort]uint64{}
	total := uint64(0)
	connect := func(n int) {
		t.Helper()
		for i := range n {
			c, to := w.pod(), netip.AddrPortFrom(w.cluster, 80)
			switch i % 3 {
			case 1:
				c = w.host()
			case 2:
				c, to = w.outside(w.inside), netip.AddrPortFrom(w.node, 30080)
			}
			o, err := w.connect(t.Context(), c, netfilter.TCP, to, 5*time.Second)
			if err != nil || o.fate != "" {
				t.Fatalf("%s to %v: %v %v", c.name, to, o, err)
			}
			made[o.pod]++
			total++
		}
	}
	want := func(when string) {
		t.Helper()
		refresh()
		got, ok := keeper.Snapshot().Observed.Connections.Of(chain.ServicePort{Namespace: "default", Name: "app", Protocol: netfilter.TCP})
		if !ok || got.NotCounted != "" || got.Total != total {
			t.Errorf("%s: %+v (%v), want %d", when, got, ok, total)
		}
		for _, e := range got.Endpoints {
			if e.Count != made[e.Address] {
				t.Errorf("%s: %v has %d, want %d", when, e.Address, e.Count, made[e.Address])
			}
		}
	}
	w.restore(t, w.on("app", "TCP", w.pods[:3]...))
	connect(10)
	clear(made)
	refresh() // what was before counts for nothing
	total = 0
	connect(30)
	want("counted")
	want("counted again")
	// What a chain counts before it is written anew shows as soon as that is read,
	// at once by who follows the rules.
	for when, pods := range map[string][]netip.Addr{"the rules written anew": w.pods[:3], "an endpoint by another": w.pods[1:4], "some are back": w.pods[:2]} {
		w.restore(t, w.on("app", "TCP", pods...))
		want(when)
		connect(15)
		want(when + ", and used")
	}
}

// TestObservedFlows wants the tracked connections per endpoint as they are, and
// those to a dead pod found while they are used.
func TestObservedFlows(t *testing.T) {
	for _, family := range []kubeproxy.Family{kubeproxy.IPv4, kubeproxy.IPv6} {
		t.Run(fmt.Sprint("family ", int(family)), func(t *testing.T) {
			t.Parallel()
			observeFlows(t, newWorld(t, nodebox.NFT, family))
		})
	}
}

func observeFlows(t *testing.T, w *world) {
	const grace, between = time.Second, 4 * time.Second // the kernel's timeouts are whole seconds
	var reader conntrack.Reader
	defer reader.Close()
	watch := observed.Watch{Grace: grace}
	look := func() *observed.Flows {
		t.Helper()
		p := watch.Begin(observed.Moment{Time: time.Now(), Programmed: w.view.Services(), Local: []netip.Addr{w.node, w.node2}})
		if err := w.box.Node.Do(func() error { return reader.Dump(t.Context(), p.Add) }); err != nil {
			t.Fatal(err)
		}
		return p.End(0)
	}
	udp := chain.ServicePort{Namespace: "default", Name: "udp", Protocol: netfilter.UDP}
	tcp := chain.ServicePort{Namespace: "default", Name: "tcp", Protocol: netfilter.TCP}
	w.restore(t, w.on("udp", "UDP", w.pods[:2]...), w.on("tcp", "TCP", w.pods[2:4]...))
	w.resolve(t)

	// Connections of every kind: from a pod, the node and outside, and from a pod to
	// itself.
	made := map[netip.AddrPort]int{}
	var chats []*chat
	for _, c := range []client{w.pod(), w.pod(), w.pod(), w.pod(), w.pod(), w.host(), w.host(), w.outside(w.inside), w.endpointPod(0), w.endpointPod(0)} {
		to := netip.AddrPortFrom(w.cluster, 80)
		if c.class == chain.External {
			to = netip.AddrPortFrom(w.node, 30080)
		}
		a := w.chat(t, c, "udp", to)
		chats = append(chats, a)
		made[a.pod]++
		made[w.chat(t, c, "tcp", to).pod]++
	}
	flows := look()
	for _, p := range []chain.ServicePort{udp, tcp} {
		got, ok := flows.Of(p)
		sum := 0
		for _, e := range got.Endpoints {
			if sum += e.Live; e.Live != made[e.Address] {
				t.Errorf("%v: %d flows to %v, want %d", p, e.Live, e.Address, made[e.Address])
			}
		}
		if !ok || got.Live != sum || sum != len(chats) || got.Stale != 0 {
			t.Errorf("%v: %+v (%v), want %d flows", p, got, ok, len(chats))
		}
	}

	// All UDP endpoints go. The rules reject now, but nobody asks them for a flow
	// that is tracked.
	w.restore(t, w.on("udp", "UDP"), w.on("tcp", "TCP", w.pods[2]))
	w.resolve(t)
	pass := func(when string, talk []*chat, want int) {
		t.Helper()
		for _, c := range talk {
			c.talk(t)
		}
		got, n := look(), 0
		var about []string
		for _, f := range got.Findings {
			if f.Code != observed.ConntrackStale || f.Service != udp {
				t.Errorf("%s: %+v", when, f)
			}
			about, n = append(about, f.About), n+len(f.Flows)
		}
		if n != want {
			t.Errorf("%s: %d flows found (%q), want %d", when, n, about, want)
		}
		time.Sleep(between)
	}
	pass("within the grace period", chats, 0)
	pass("not used after the grace period yet", chats, 0)
	pass("after it", chats, len(chats))
	one := chats[:1]
	pass("others may pause", one, len(chats))
	one[0].talk(t)
	look()
	time.Sleep(between)
	pass("the others have stopped", one, 1)
	if got, _ := look().Of(tcp); got.Stale != made[netip.AddrPortFrom(w.pods[3], podPort)] {
		t.Errorf("TCP: %+v, want %d stale", got, made[netip.AddrPortFrom(w.pods[3], podPort)])
	}
	w.forget(t)
	pass("the flows are deleted", nil, 0)
}

// chat is a connection that stays.
type chat struct {
	conn net.Conn
	pod  netip.AddrPort
}

// chat connects, and asks who answers.
func (w *world) chat(t *testing.T, c client, network string, to netip.AddrPort) *chat {
	t.Helper()
	local := netip.AddrPort{}
	if c.bind {
		local = netip.AddrPortFrom(c.addr, 0)
	}
	conn, err := c.ns.DialFrom(t.Context(), network, local, to.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	ch := &chat{conn: conn}
	ch.talk(t)
	return ch
}

// talk sends a packet and takes the answer.
func (c *chat) talk(t *testing.T) {
	t.Helper()
	c.conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := c.conn.Write([]byte("?")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 128)
	n, err := c.conn.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	words := slices.Collect(strings.FieldsSeq(string(buf[:n])))
	if c.pod, err = netip.ParseAddrPort(words[0]); err != nil {
		t.Fatal(err)
	}
}

// TestObservedPins wants the clients that session affinity binds to each endpoint
// as many as were answered by it, and none when their time has passed.
func TestObservedPins(t *testing.T) {
	for _, backend := range []nodebox.Backend{nodebox.NFT, nodebox.Legacy} {
		for _, family := range []kubeproxy.Family{kubeproxy.IPv4, kubeproxy.IPv6} {
			t.Run(fmt.Sprint(backend, " family ", int(family)), func(t *testing.T) { observePins(t, newWorld(t, backend, family)) })
		}
	}
}

func observePins(t *testing.T, w *world) {
	sticky := chain.ServicePort{Namespace: "default", Name: "sticky", Protocol: netfilter.TCP}
	service := w.on("sticky", "TCP", w.pods[0])
	service.AffinitySeconds = 2
	other := w.on("other", "TCP", w.pods[0])
	other.ClusterIP, other.NodePort = w.cluster.Next(), 0
	w.restore(t, service, other)
	w.resolve(t)
	var reader affinity.Reader
	defer reader.Close()
	pinner := observed.Pinner{Reader: &reader}
	look := func() []observed.EndpointPins {
		t.Helper()
		var out *observed.Pins
		_ = w.box.Node.Do(func() error {
			out = pinner.Look(t.Context(), w.rules, w.view.Services())
			return nil
		})
		if out.Error != "" {
			t.Fatal(out.Error)
		}
		if list := out.Of(chain.ServicePort{Namespace: "default", Name: "other", Protocol: netfilter.TCP}); len(list) != 0 {
			t.Errorf("%+v, though that Service has no affinity", list)
		}
		return out.Of(sticky)
	}
	want := func(when string, clients int, full bool) {
		t.Helper()
		at := netip.AddrPortFrom(w.pods[0], podPort)
		if got := look(); len(got) != 1 || got[0] != (observed.EndpointPins{Address: at, List: affinity.List{Clients: clients, Full: full}}) {
			t.Errorf("%s: %+v, want %d clients", when, got, clients)
		}
	}
	connect := func(c client) {
		t.Helper()
		if o, err := w.connect(t.Context(), c, netfilter.TCP, netip.AddrPortFrom(w.node, 30080), 5*time.Second); err != nil || o.fate != "" {
			t.Fatalf("%v %v", o, err)
		}
	}
	want("before anybody came", 0, false)
	connect(w.outside(w.inside))
	connect(w.outside(w.beyond))
	connect(w.outside(w.inside))
	want("two came", 2, false)
	time.Sleep(time.Duration(service.AffinitySeconds)*time.Second + 500*time.Millisecond)
	want("their time has passed", 0, false)
	for i := range 100 {
		connect(w.outside(nth(w.crowd, i)))
	}
	if got := look(); len(got) != 1 || !got[0].Full || got[0].Clients < 90 {
		t.Errorf("%+v behind a crowd, want a full list", got)
	}
}

// TestObservedPinsNFTables is the same for the sets of kube-proxy's nftables mode.
func TestObservedPinsNFTables(t *testing.T) {
	w := newWorld(t, nodebox.NFT, kubeproxy.IPv4)
	const name = "ABCDEFGH-default/sticky/tcp/__10.52.1.4/8080"
	load := exec.CommandContext(t.Context(), "nft", "-f", "-")
	load.Stdin = strings.NewReader(`table ip kube-proxy {
		set affinity-` + name + ` { type ipv4_addr; flags dynamic,timeout; timeout 2s; }
		chain endpoint-` + name + ` { update @affinity-` + name + ` { ip saddr }; }
	}
	add element ip kube-proxy affinity-` + name + ` { 10.0.0.1, 10.0.0.2, 10.0.0.3 timeout 1h }
	`)
	if err := w.box.Node.Run(load); err != nil {
		t.Skipf("skipping: nft: %v", err)
	}
	table := netfilter.NewTable(netfilter.IPv4, "kube-proxy", netfilter.BackendNFTables)
	bound, none := table.Declare("endpoint-"+name), table.Declare("endpoint-none")
	var reader affinity.Reader
	defer reader.Close()
	want := func(when string, c *netfilter.Chain, clients int, there bool) {
		t.Helper()
		err := w.box.Node.Do(func() error {
			got, ok, err := reader.Read(table, c, time.Hour)
			if got.Clients != clients || ok != there {
				t.Errorf("%s: %+v (%v), want %d", when, got, ok, clients)
			}
			return err
		})
		if err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}
	want("three came", bound, 3, true)
	want("no set", none, 0, false)
	time.Sleep(2500 * time.Millisecond)
	want("the time of two has passed", bound, 1, true)
}

// TestObservedFollows changes some Services among others, and rules by hand, and wants
// the counter to count for the same endpoints as one that sees the rules for the first
// time.
func TestObservedFollows(t *testing.T) {
	const seed = 3
	r := rand.New(rand.NewPCG(seed, 1))
	w := newWorld(t, nodebox.NFT, kubeproxy.IPv4)
	var kernel iptables.NFT
	defer kernel.Close()
	reader := boxReader{w.box.Node, kernel.Refresh}
	services := kubeproxy.Synthetic(60, 4)
	var counter observed.Counter
	var view *chain.View
	var programmed *chain.Programmed
	for i := range 40 {
		services = slices.Clone(services)
		for range r.IntN(4) {
			s := &services[r.IntN(len(services))]
			s.Endpoints = nil
			for e := range r.IntN(5) {
				s.Endpoints = append(s.Endpoints, kubeproxy.Endpoint{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 200, byte(r.IntN(3)), byte(e)}), 8080)})
			}
		}
		if r.IntN(3) == 0 {
			services = slices.Delete(services, 0, 1)
		}
		w.restore(t, services...)
		rs, err := reader.Read(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		// By hand: a rule ahead of an endpoint's, or two that one endpoint shares.
		var seps []string
		for c := range rs.Table(netfilter.IPv4, "nat").Chains() {
			if strings.HasPrefix(c.Name, "KUBE-SEP-") {
				seps = append(seps, c.Name)
			}
		}
		args := []string{"-t", "nat", "-I", seps[r.IntN(len(seps))], "-s", "192.0.2.1"}
		if r.IntN(2) == 0 {
			args = append(args, "-j", seps[r.IntN(len(seps))])
		}
		if args[3] != args[len(args)-1] {
			if err := w.box.Node.Run(exec.Command("iptables-nft", args...)); err != nil {
				t.Fatal(err)
			}
		}
		if rs, err = reader.Read(t.Context()); err != nil {
			t.Fatal(err)
		}
		if node := (chain.Node{Local: []netip.Addr{w.node}}); view == nil {
			view = chain.NewView(rs, node)
			programmed = view.Services()
		} else {
			view = view.Next(rs, node)
			programmed = view.Update(programmed)
		}
		got, want := counter.Update(rs, programmed, time.Now()), observed.Count(rs, programmed)
		for _, s := range programmed.Services {
			a, okA := got.Of(s.ServicePort)
			b, okB := want.Of(s.ServicePort)
			same := slices.EqualFunc(a.Endpoints, b.Endpoints, func(x, y observed.EndpointConnections) bool { return x.Address == y.Address && x.Counted == y.Counted })
			if okA != okB || a.NotCounted != b.NotCounted || !same {
				t.Fatalf("change %d, %v: %+v, want %+v", i, s.ServicePort, a, b)
			}
		}
	}
}
