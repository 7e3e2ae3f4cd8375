//go:build linux

package kernel

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/internal/node"
	"github.com/natlens/natlens/internal/nodebox"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
)

// unable ends a test that cannot run here. On the project's own machines
// everything is there, so that there a silent skip would hide a broken setup.
func unable(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("not to be skipped with CI=true: "+format, args...)
	}
	t.Skipf("skipping: "+format, args...)
}

// plan is where everything in the box is, for one family.
type plan struct {
	family   kubeproxy.Family
	node     netip.Addr
	node2    netip.Addr // a second address of the node
	bits     int        // of the node's network
	inside   netip.Addr // of the outside, within the source ranges
	beyond   netip.Addr // of the outside, in no source range
	crowd    netip.Addr // first of many addresses of the outside
	podCIDR  netip.Prefix
	pods     []netip.Addr // that serve
	client   netip.Addr   // of the pod that only connects
	cluster  netip.Addr   // first cluster IP
	balancer netip.Addr   // first load balancer IP
	external netip.Addr   // first external IP
}

const (
	podPort  = 8080
	nodePort = 9000 // of the server on the node itself
	crowd    = 300  // clients for session affinity
)

func planFor(f kubeproxy.Family) plan {
	p := plan{
		family: f, bits: 16, node: ip("10.146.0.2"), node2: ip("10.146.0.3"), inside: ip("10.146.0.100"), beyond: ip("10.146.1.200"), crowd: ip("10.146.8.1"),
		podCIDR: netip.MustParsePrefix("10.52.0.0/16"), client: ip("10.52.1.20"),
		cluster: ip("10.56.0.11"), balancer: ip("203.0.113.10"), external: ip("198.51.100.10"),
	}
	first := ip("10.52.1.4")
	if f == kubeproxy.IPv6 {
		p = plan{
			family: f, bits: 64, node: ip("fd00:146::2"), node2: ip("fd00:146::3"), inside: ip("fd00:146::1:100"), beyond: ip("fd00:146::2:200"), crowd: ip("fd00:146::8:1"),
			podCIDR: netip.MustParsePrefix("fd00:52::/64"), client: ip("fd00:52::20"),
			cluster: ip("fd00:56::11"), balancer: ip("2001:db8:18::10"), external: ip("2001:db8:19::10"),
		}
		first = ip("fd00:52::4")
	}
	for range 5 {
		p.pods = append(p.pods, first)
		first = first.Next()
	}
	return p
}

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

func nth(a netip.Addr, n int) netip.Addr {
	for range n {
		a = a.Next()
	}
	return a
}

func (p *plan) netfilterFamily() netfilter.Family { return netfilter.FamilyOf(p.node) }

func (p *plan) loopback() netip.Addr {
	if p.family == kubeproxy.IPv6 {
		return netip.IPv6Loopback()
	}
	return ip("127.0.0.1")
}

// world is a box with its rules, and what natlens makes of them.
type world struct {
	plan
	box      *nodebox.Box
	backend  nodebox.Backend
	reader   *iptables.Exec
	podCIDRs []netip.Prefix // as given to the agent; none: as the rules name them

	rules    *netfilter.Ruleset // as read before any connection
	view     *chain.View
	services []chain.Service

	udpPort atomic.Uint32 // the last local port used for UDP

	waiting sync.WaitGroup // for comparisons in the background

	mu     sync.Mutex
	ledger ledger
	pool   pool
}

// newWorld makes a box whose pods answer. It has no rules yet.
func newWorld(t *testing.T, backend nodebox.Backend, family kubeproxy.Family) *world {
	t.Helper()
	for _, program := range []string{"iptables", "ip6tables"} {
		program += "-" + string(backend) + "-restore"
		if _, err := exec.LookPath(program); err != nil {
			unable(t, "%v", err)
		}
	}
	w := &world{plan: planFor(family), backend: backend, ledger: newLedger(), pool: pool{}}
	w.udpPort.Store(10000)
	cfg := nodebox.Config{
		NodeAddrs:    []netip.Prefix{netip.PrefixFrom(w.node, w.bits), netip.PrefixFrom(w.node2, w.bits)},
		OutsideAddrs: []netip.Prefix{netip.PrefixFrom(w.inside, w.bits), netip.PrefixFrom(w.beyond, w.bits)},
		Pods:         []nodebox.Pod{{Name: "client", Addrs: []netip.Addr{w.client}}},
	}
	for i, a := range w.pods {
		cfg.Pods = append(cfg.Pods, nodebox.Pod{Name: fmt.Sprint("pod", i), Addrs: []netip.Addr{a}})
	}
	for i := range crowd {
		cfg.OutsideAddrs = append(cfg.OutsideAddrs, netip.PrefixFrom(nth(w.crowd, i), w.bits))
	}
	var err error
	if w.box, err = nodebox.New(cfg); errors.Is(err, syscall.EPERM) {
		unable(t, "%v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.box.Close(); err != nil {
			t.Errorf("closing the box: %v", err)
		}
	})
	if w.reader, err = iptables.NewExec(); err != nil {
		t.Fatal(err)
	}
	// The kernel limits how often it refuses: what is over the limit would look
	// dropped.
	w.sysctl(t, "ipv4/icmp_ratelimit", "0")
	w.sysctl(t, "ipv6/icmp/ratelimit", "0")
	for i, a := range w.pods {
		serve(t, w.box.Pod(fmt.Sprint("pod", i)), netip.AddrPortFrom(a, podPort))
	}
	serve(t, w.box.Node, netip.AddrPortFrom(w.node, nodePort))
	return w
}

func (w *world) sysctl(t *testing.T, name, value string) {
	t.Helper()
	err := w.box.Node.Do(func() error { return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0) })
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
}

// write returns the rules for the Services.
func write(t *testing.T, cfg kubeproxy.Config, services []kubeproxy.Service) string {
	t.Helper()
	var b bytes.Buffer
	if err := kubeproxy.Write(&b, cfg, services); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// config is that of a usual kube-proxy on the node.
func (w *world) config() kubeproxy.Config {
	return kubeproxy.Config{Family: w.family, PodCIDR: w.podCIDR, NodeIP: w.node}
}

// load puts rules into the kernel, reads them back, and works out the Services.
func (w *world) load(t *testing.T, rules string) {
	t.Helper()
	if err := w.box.Restore(t.Context(), w.backend, w.family == kubeproxy.IPv6, strings.NewReader(rules)); err != nil {
		t.Fatal(err)
	}
	w.forget(t)
	w.resolve(t)
}

// forget makes the kernel forget all connections: one that bears the addresses
// and ports of another would be treated as the rules of then said.
func (w *world) forget(t *testing.T) {
	t.Helper()
	err := w.box.Node.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
		if err != nil {
			return err
		}
		defer h.Close()
		return h.ConntrackTableFlush(netlink.ConntrackTable)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// resolve reads the rules and works out the Services.
func (w *world) resolve(t *testing.T) {
	t.Helper()
	w.rules = w.read(t)
	var n chain.Node
	err := w.box.Node.Do(func() (err error) {
		n, err = node.Discover()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	n.PodCIDRs = w.podCIDRs
	w.view = chain.NewView(w.rules, n)
	w.services = w.view.Services().Services
}

func (w *world) read(t *testing.T) *netfilter.Ruleset {
	t.Helper()
	var rs *netfilter.Ruleset
	err := w.box.Node.Do(func() (err error) {
		rs, err = w.reader.Read(t.Context())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(rs.Unreadable) > 0 || rs.Torn {
		t.Fatalf("reading the rules: unreadable %v, torn %v", rs.Unreadable, rs.Torn)
	}
	return rs
}

// serve answers each TCP connection and each UDP packet to an address with that
// address and the one that it sees the client at. The box's Close ends it.
func serve(t *testing.T, ns *nodebox.Namespace, at netip.AddrPort) {
	t.Helper()
	l, err := ns.Listen("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				fmt.Fprintf(conn, "%s %s\n", conn.LocalAddr(), conn.RemoteAddr())
				io.Copy(io.Discard, conn) // the client closes first
			}()
		}
	}()
	c, err := ns.ListenPacket("udp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		buf := make([]byte, 64)
		for {
			_, from, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			c.WriteTo(fmt.Appendf(nil, "%s %s\n", at, from), from)
		}
	}()
}

// outcome is what a client met: an answer, or the lack of one.
type outcome struct {
	pod  netip.AddrPort // that answered
	seen netip.Addr     // what it saw as the client's address
	fate string         // without an answer: refused or silence
}

const (
	refused = "refused"
	silence = "silence"
)

func (o outcome) String() string {
	if o.fate != "" {
		return o.fate
	}
	return fmt.Sprintf("%s, which saw %s", o.pod, o.seen)
}

// client is somebody who connects.
type client struct {
	name  string
	class chain.Class
	ns    *nodebox.Namespace
	addr  netip.Addr
	bind  bool // the namespace has other addresses too
}

func (w *world) pod() client { return client{"pod", chain.Pod, w.box.Pod("client"), w.client, false} }
func (w *world) host() client {
	return client{"node", chain.Host, w.box.Node, w.node, false}
}
func (w *world) outside(a netip.Addr) client {
	return client{"outside " + a.String(), chain.External, w.box.Outside, a, true}
}

// endpointPod is one of the pods that also serve.
func (w *world) endpointPod(i int) client {
	return client{fmt.Sprint("endpoint ", i), chain.Pod, w.box.Pod(fmt.Sprint("pod", i)), w.pods[i], false}
}

// connect makes one connection and tells what came of it. It waits for an
// answer as long as limit.
func (w *world) connect(ctx context.Context, c client, p netfilter.Protocol, to netip.AddrPort, limit time.Duration) (outcome, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	network, local := "tcp", netip.AddrPort{}
	if c.bind {
		local = netip.AddrPortFrom(c.addr, 0)
	}
	if p == netfilter.UDP {
		// A port that was used a moment ago would belong to the connection of
		// then, which nat has decided on.
		network = "udp"
		any := netip.IPv4Unspecified()
		if to.Addr().Is6() {
			any = netip.IPv6Unspecified()
		}
		if c.bind {
			any = c.addr
		}
		local = netip.AddrPortFrom(any, uint16(w.udpPort.Add(1)))
	}
	conn, err := c.ns.DialFrom(ctx, network, local, to.String())
	if err != nil {
		return lack(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(limit))
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetLinger(0) // no TIME_WAIT: the ports are needed again
	} else if _, err := conn.Write([]byte("?")); err != nil && !errors.Is(err, syscall.EPERM) {
		return lack(err)
	}
	// EPERM comes from the node's own OUTPUT chain, both for dropped and for
	// rejected: the read below tells which.
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return lack(err)
	}
	pod, seen, _ := strings.Cut(strings.TrimSpace(line), " ")
	var o outcome
	if o.pod, err = netip.ParseAddrPort(pod); err != nil {
		return o, err
	}
	from, err := netip.ParseAddrPort(seen)
	o.seen = from.Addr().Unmap()
	return o, err
}

// lack tells the lack of an answer from what is wrong with the test.
func lack(err error) (outcome, error) {
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return outcome{fate: refused}, nil
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return outcome{fate: silence}, nil
	}
	return outcome{}, err
}
