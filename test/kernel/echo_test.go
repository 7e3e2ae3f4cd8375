//go:build linux

package kernel

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/natlens/natlens/internal/echo"
	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/internal/monitor"
	"github.com/natlens/natlens/internal/node"
	"github.com/natlens/natlens/internal/nodebox"
	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
)

const echoPort = 8081

// echoes are echo servers in the first three pods of a world, behind a Service.
type echoes struct {
	*world
	t       *testing.T
	rules   string // even thirds
	cluster netip.AddrPort
	running sync.WaitGroup
}

func newEchoes(t *testing.T, family kubeproxy.Family) *echoes {
	e := &echoes{world: newWorld(t, nodebox.NFT, family), t: t}
	t.Cleanup(e.running.Wait)
	sv := kubeproxy.Service{Namespace: "test", Name: "echo", PortNumber: 80, ClusterIP: e.plan.cluster}
	for i := range 3 {
		e.serveIn(e.box.Pod(fmt.Sprint("pod", i)), fmt.Sprint("pod", i), e.endpoint(i))
		sv.Endpoints = append(sv.Endpoints, kubeproxy.Endpoint{Addr: e.endpoint(i), Local: true})
	}
	e.cluster = netip.AddrPortFrom(sv.ClusterIP, sv.PortNumber)
	e.rules = write(t, e.config(), []kubeproxy.Service{sv})
	e.load(t, e.rules)
	return e
}

func (e *echoes) endpoint(i int) netip.AddrPort { return netip.AddrPortFrom(e.pods[i], echoPort) }

// serveIn runs an echo server until the test ends.
func (e *echoes) serveIn(ns *nodebox.Namespace, name string, at netip.AddrPort) {
	e.t.Helper()
	ln, err := ns.Listen("tcp", at.String())
	if err != nil {
		e.t.Fatal(err)
	}
	packets, err := ns.ListenPacket("udp", at.String())
	if err != nil {
		e.t.Fatal(err)
	}
	cfg := echo.Config{
		Listener: ln, Packets: packets.(*net.UDPConn),
		Identity: echo.Identity{Pod: name, Addresses: echo.FixedAddresses(at.Addr())},
	}
	e.running.Go(func() {
		if err := echo.Run(e.t.Context(), cfg); err != nil {
			e.t.Errorf("%s: %v", name, err)
		}
	})
}

// skewed are the rules with half of the connections for the first endpoint.
func (e *echoes) skewed() string {
	const third, half = "--probability 0.33333333349", "--probability 0.50000000000"
	if !strings.Contains(e.rules, third) {
		e.t.Fatalf("no third in\n%s", e.rules)
	}
	i := strings.Index(e.rules, third)
	j := i + strings.Index(e.rules[i:], " -j ")
	return e.rules[:i] + half + e.rules[j:]
}

func (e *echoes) restore(rules string) {
	e.t.Helper()
	if err := e.box.Restore(e.t.Context(), e.backend, e.family == kubeproxy.IPv6, strings.NewReader(rules)); err != nil {
		e.t.Fatal(err)
	}
}

// live reads the kernel as the agent does.
type live struct {
	ns     *nodebox.Namespace
	kernel iptables.Kernel
}

// Read implements snapshot.Reader.
func (l *live) Read(ctx context.Context) (rs *netfilter.Ruleset, err error) {
	err = l.ns.Do(func() error {
		rs, err = l.kernel.Refresh(ctx)
		return err
	})
	return rs, err
}

// watch runs the monitor as the agent does.
func (e *echoes) watch() *snapshot.Keeper {
	m := &monitor.Monitor{
		Selected: []monitor.Selector{{Namespace: "test", Name: "echo"}}, Interval: 5 * time.Millisecond, Grace: time.Second,
		Within: e.box.Node.Do, Log: slog.New(slog.DiscardHandler),
	}
	reader := &live{ns: e.box.Node}
	k := &snapshot.Keeper{
		Reader: reader, Moved: reader.kernel.Moved, Name: "node", Interval: 200 * time.Millisecond, Log: slog.New(slog.DiscardHandler), Echo: m,
		Node: func() (n chain.Node, err error) {
			err = e.box.Node.Do(func() error {
				n, err = node.Discover()
				return err
			})
			return n, err
		},
	}
	if err := k.Refresh(e.t.Context()); err != nil {
		e.t.Fatal(err)
	}
	ctx, end := context.WithCancel(e.t.Context())
	var running sync.WaitGroup
	running.Go(func() { k.Run(ctx) })
	running.Go(func() { m.Run(ctx) })
	e.t.Cleanup(func() {
		end()
		running.Wait()
		reader.kernel.Close()
	})
	return k
}

// await waits until the port is as told, and returns its findings by code and
// address.
func (e *echoes) await(k *snapshot.Keeper, what string, is func(*monitor.Port, []string) bool) {
	e.t.Helper()
	deadline := time.Now().Add(60 * time.Second)
	for {
		s := k.Snapshot()
		var found []string
		for _, f := range s.Findings() {
			if f.Code == monitor.ObservedSkew || f.Code == monitor.EndpointUnreachable {
				found = append(found, fmt.Sprint(f.Code, " ", f.About))
			}
		}
		slices.Sort(found)
		if len(s.Echo.Ports) == 1 && is(&s.Echo.Ports[0], found) {
			return
		}
		if time.Now().After(deadline) {
			e.t.Fatalf("not %s within a minute: findings %q, %+v", what, found, s.Echo.Ports)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// TestEcho has the monitor watch real connections through real rules.
func TestEcho(t *testing.T) {
	for _, family := range []kubeproxy.Family{kubeproxy.IPv4, kubeproxy.IPv6} {
		t.Run(family.String(), func(t *testing.T) {
			t.Parallel()
			e := newEchoes(t, family)
			k := e.watch()
			consistent := func(first float64) func(*monitor.Port, []string) bool {
				return func(p *monitor.Port, found []string) bool {
					i := slices.IndexFunc(p.Window.Ways, func(w monitor.Way) bool { return w.Address == e.endpoint(0) })
					if len(found) > 0 || p.Verdict == monitor.Skewed {
						t.Fatalf("findings %q, port %+v", found, p)
					}
					return i >= 0 && near(p.Window.Ways[i].Share, first) && p.Verdict == monitor.Consistent && p.Window.Samples > 300
				}
			}
			e.await(k, "consistent", consistent(1./3))
			e.restore(e.skewed())
			e.await(k, "consistent with other shares", consistent(.5))
			e.restore(e.rules)
			e.await(k, "consistent again", consistent(1./3))
		})
	}
}

// TestEchoUnreachable: a pod without a listener, and one that never answers.
func TestEchoUnreachable(t *testing.T) {
	for _, family := range []kubeproxy.Family{kubeproxy.IPv4, kubeproxy.IPv6} {
		t.Run(family.String(), func(t *testing.T) {
			t.Parallel()
			e := newEchoes(t, family)
			silence := "iptables-nft"
			if family == kubeproxy.IPv6 {
				silence = "ip6tables-nft"
			}
			filter := func(action string) {
				cmd := exec.Command(silence, "--wait", action, "INPUT", "-p", "tcp", "-j", "DROP")
				if err := e.box.Pod("pod2").Run(cmd); err != nil {
					t.Fatal(err)
				}
			}
			refuse := exec.Command(silence, "--wait", "-A", "INPUT", "-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset")
			if err := e.box.Pod("pod1").Run(refuse); err != nil {
				t.Fatal(err)
			}
			filter("-A")
			k := e.watch()
			unreachable := func(i int) string { return fmt.Sprint(monitor.EndpointUnreachable, " ", e.endpoint(i)) }
			want := []string{unreachable(1), unreachable(2)}
			e.await(k, "unreachable", func(_ *monitor.Port, found []string) bool {
				for _, f := range found {
					if !slices.Contains(want, f) {
						t.Fatalf("found %q", found)
					}
				}
				return slices.Equal(found, want)
			})
			filter("-D")
			e.await(k, "healed in part", func(_ *monitor.Port, found []string) bool { return slices.Equal(found, want[:1]) })
		})
	}
}

// TestEchoHost: one of the endpoints is a process of the node that probes.
func TestEchoHost(t *testing.T) {
	e := newEchoes(t, kubeproxy.IPv4)
	host := netip.AddrPortFrom(e.node, echoPort)
	e.serveIn(e.box.Node, "host", host)
	rules := strings.ReplaceAll(e.rules, e.endpoint(2).String(), host.String())
	e.restore(strings.ReplaceAll(rules, e.pods[2].String()+"/32", e.node.String()+"/32"))
	e.await(e.watch(), "consistent", func(p *monitor.Port, found []string) bool {
		i := slices.IndexFunc(p.Window.Ways, func(w monitor.Way) bool { return w.Address == host })
		if i < 0 || len(found) > 0 {
			t.Fatalf("findings %q, port %+v", found, p)
		}
		return p.Verdict == monitor.Consistent && p.Window.Ways[i].Samples > 50
	})
}

// TestEchoSkew gives the monitor other rules than those that the kernel has.
func TestEchoSkew(t *testing.T) {
	e := newEchoes(t, kubeproxy.IPv4)
	believed := e.view.Services()
	e.restore(e.skewed())
	m := &monitor.Monitor{
		Selected: []monitor.Selector{{Namespace: "test", Name: "echo", Port: "80"}}, Interval: 5 * time.Millisecond,
		Within: e.box.Node.Do, Log: slog.New(slog.DiscardHandler),
	}
	m.See(believed, time.Now())
	ctx, end := context.WithTimeout(t.Context(), 60*time.Second)
	defer end()
	var running sync.WaitGroup
	defer running.Wait()
	running.Go(func() { m.Run(ctx) })
	for ctx.Err() == nil && m.State().Ports[0].Verdict != monitor.Skewed {
		select {
		case <-m.Changed():
			m.See(believed, time.Now())
		case <-ctx.Done():
		}
	}
	end()
	s := m.State()
	if len(s.Findings) != 1 || s.Findings[0].Code != monitor.ObservedSkew || s.Findings[0].Addresses[0] != e.endpoint(0) {
		t.Fatalf("findings %+v, port %+v", s.Findings, s.Ports)
	}
	t.Log(s.Findings[0].Message)
	if n := s.Ports[0].Last.Samples; n > 1000 {
		t.Errorf("found after %d samples", n)
	}
}
