package demo

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync"

	"github.com/natlens/natlens/internal/echo"
	"github.com/natlens/natlens/internal/node"
	"github.com/natlens/natlens/internal/nodebox"
	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/conntrack"
	"github.com/natlens/natlens/pkg/netfilter"
)

// Demo is a running node in a box.
type Demo struct {
	Backend nodebox.Backend
	box     *nodebox.Box
	stop    context.CancelFunc
	pods    sync.WaitGroup

	mu      sync.Mutex
	answers map[target]map[string]int // who answered how often
}

// Start makes the box. It needs the right to make network namespaces, and an
// iptables program. The caller closes it.
func Start(ctx context.Context) (*Demo, error) {
	backend, err := findBackend()
	if err != nil {
		return nil, err
	}
	rules, err := Rules()
	if err != nil {
		return nil, err
	}
	cfg := nodebox.Config{
		NodeAddrs:    []netip.Prefix{netip.PrefixFrom(nodeAddr, 24)},
		OutsideAddrs: []netip.Prefix{netip.PrefixFrom(outsideAddr, 24)},
	}
	for _, p := range pods() {
		cfg.Pods = append(cfg.Pods, nodebox.Pod{Name: p.name, Addrs: []netip.Addr{p.addr}})
	}
	box, err := nodebox.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("making private network namespaces: %w", err)
	}
	ctx, stop := context.WithCancel(ctx)
	d := &Demo{Backend: backend, box: box, stop: stop, answers: map[target]map[string]int{}}
	if err := box.Restore(ctx, backend, false, strings.NewReader(rules)); err != nil {
		d.Close()
		return nil, fmt.Errorf("loading the rules: %w", err)
	}
	for _, p := range pods() {
		if p.name == clientPod {
			continue
		}
		if err := d.startPod(ctx, p); err != nil {
			d.Close()
			return nil, fmt.Errorf("starting pod %s: %w", p.name, err)
		}
	}
	return d, nil
}

func findBackend() (nodebox.Backend, error) {
	for _, b := range []nodebox.Backend{nodebox.NFT, nodebox.Legacy} {
		if _, err := exec.LookPath("iptables-" + string(b) + "-restore"); err == nil {
			return b, nil
		}
	}
	return "", errors.New("no iptables-nft-restore or iptables-legacy-restore found: install the package iptables")
}

func (d *Demo) startPod(ctx context.Context, p pod) error {
	address := netip.AddrPortFrom(p.addr, echoPort).String()
	ns := d.box.Pod(p.name)
	ln, err := ns.Listen("tcp", address)
	if err != nil {
		return err
	}
	packets, err := ns.ListenPacket("udp", address)
	if err != nil {
		return err
	}
	udp, ok := packets.(*net.UDPConn)
	if !ok {
		return fmt.Errorf("socket of type %T is not a UDP socket", packets)
	}
	cfg := echo.Config{
		Listener: ln, Packets: udp,
		Identity: echo.Identity{Hostname: p.name, Pod: p.name, Namespace: "default", Node: "demo", Addresses: echo.FixedAddresses(p.addr)},
	}
	d.pods.Add(1)
	go func() {
		defer d.pods.Done()
		if err := echo.Run(ctx, cfg); err != nil {
			slog.Warn("a pod of the demo ended", "pod", p.name, "error", err)
		}
	}()
	return nil
}

// Close ends the pods, and with the box all that is in it.
func (d *Demo) Close() {
	d.stop()
	d.pods.Wait()
	d.box.Close()
}

// Reader lets a reader read the node in the box.
func (d *Demo) Reader(r snapshot.Reader) snapshot.Reader { return boxReader{d.box.Node, r} }

type boxReader struct {
	node *nodebox.Namespace
	snapshot.Reader
}

// Read implements snapshot.Reader.
func (b boxReader) Read(ctx context.Context) (rs *netfilter.Ruleset, err error) {
	err = b.node.Do(func() error {
		var err error
		rs, err = b.Reader.Read(ctx)
		return err
	})
	return rs, err
}

// Flows lets a reader of tracked connections read those of the node in the box.
func (d *Demo) Flows(r snapshot.FlowReader) snapshot.FlowReader { return boxFlows{d.box.Node, r} }

type boxFlows struct {
	node *nodebox.Namespace
	snapshot.FlowReader
}

// Dump implements snapshot.FlowReader.
func (b boxFlows) Dump(ctx context.Context, each func(*conntrack.Flow)) error {
	return b.node.Do(func() error { return b.FlowReader.Dump(ctx, each) })
}

// Node tells about the node in the box.
func (d *Demo) Node() (n chain.Node, err error) {
	err = d.box.Node.Do(func() error {
		var err error
		n, err = node.Discover()
		return err
	})
	return n, err
}
