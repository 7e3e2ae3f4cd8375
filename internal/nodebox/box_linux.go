package nodebox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Config describes a box. IPv6 is on if the node has an IPv6 address.
type Config struct {
	// NodeAddrs are the addresses of the node's eth0, at least one. The first
	// of each family is the gateway of the pods and of the outside, and the
	// source of what the node sends to a pod.
	NodeAddrs []netip.Prefix

	// OutsideAddrs are the addresses of the client outside the cluster, in
	// the subnets of NodeAddrs, at least one for each of the node's families:
	// the first of each is the node's default gateway, without which the node
	// could not send to a ClusterIP. The outside forwards nothing, so what no
	// rule redirects dies there, unanswered.
	OutsideAddrs []netip.Prefix

	// Pods are the pods of the node; none is fine.
	Pods []Pod
}

// Pod is one pod of the node.
type Pod struct {
	// Name is what [Box.Pod] finds it by. It is not seen by the kernel.
	Name string
	// Addrs are its addresses, at most one of each family usually, and of
	// families that the node has too.
	Addrs []netip.Addr
}

// Backend says which of the two iptables implementations to use.
type Backend string

// The two backends, named as in the names of their programs.
const (
	NFT    Backend = "nft"
	Legacy Backend = "legacy"
)

// Box is a node with its pods and its outside. Its methods and those of its
// namespaces may be called from several goroutines.
type Box struct {
	Node    *Namespace
	Outside *Namespace

	pods map[string]*Namespace
	dir  string // holds the lock file of iptables-legacy
	ipv6 bool

	closed  chan struct{}  // closed by Close
	workers sync.WaitGroup // the threads of all namespaces

	mu      sync.Mutex
	sockets []io.Closer // listening sockets, closed by Close; nil after it
}

// New makes a box. It needs CAP_SYS_ADMIN and CAP_NET_ADMIN in the user
// namespace it runs in; if they are missing, the error says so and wraps
// EPERM. The caller closes the box.
func New(cfg Config) (*Box, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if err := checkCapabilities(); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "nodebox-")
	if err != nil {
		return nil, fmt.Errorf("making a directory for the xtables lock: %w", err)
	}
	b := &Box{
		pods:   make(map[string]*Namespace),
		dir:    dir,
		ipv6:   hasFamily(cfg.NodeAddrs, true),
		closed: make(chan struct{}),
	}
	if err := b.build(cfg); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

// Pod returns the namespace of the pod with that name, or nil if there is
// none.
func (b *Box) Pod(name string) *Namespace { return b.pods[name] }

// Restore feeds rules, in the format of iptables-save, to the node's
// iptables-restore (ip6tables-restore if ipv6 is true) of that backend. Tables
// that rules names are replaced, others are left alone. What the program says
// on standard error becomes part of the error.
func (b *Box) Restore(ctx context.Context, backend Backend, ipv6 bool, rules io.Reader) error {
	if backend != NFT && backend != Legacy {
		return fmt.Errorf("unknown iptables backend %q", backend)
	}
	name := "iptables-" + string(backend) + "-restore"
	if ipv6 {
		name = "ip6tables-" + string(backend) + "-restore"
	}
	// Two restores of the legacy backend take turns instead of failing.
	cmd := exec.CommandContext(ctx, name, "--wait")
	var stderr bytes.Buffer
	cmd.Stdin, cmd.Stderr = rules, &stderr
	if err := b.Node.Run(cmd); err != nil {
		if msg := strings.TrimSpace(stderr.String()); msg != "" {
			return fmt.Errorf("running %s: %w: %s", name, err, msg)
		}
		return fmt.Errorf("running %s: %w", name, err)
	}
	return nil
}

// Close ends the box: it closes the listening sockets, kills the programs that
// [Namespace.Start] started, and lets go of the namespaces, which the kernel
// then removes with all that is in them, a moment later. A connection, a
// running [Namespace.Do] and a grandchild process each keep their own
// namespace until they end: they are the caller's. A second Close does nothing.
func (b *Box) Close() error {
	b.mu.Lock()
	select {
	case <-b.closed:
		b.mu.Unlock()
		return nil
	default:
	}
	close(b.closed)
	sockets := b.sockets
	b.sockets = nil
	b.mu.Unlock()

	for _, s := range sockets {
		s.Close() // the caller may have closed it: not an error
	}
	b.workers.Wait()
	var errs []error
	for _, ns := range b.namespaces() {
		errs = append(errs, ns.file.Close())
	}
	errs = append(errs, os.RemoveAll(b.dir))
	return errors.Join(errs...)
}

// own makes Close close a socket. It refuses after Close.
func (b *Box) own(s io.Closer) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	select {
	case <-b.closed:
		return net.ErrClosed
	default:
		b.sockets = append(b.sockets, s)
		return nil
	}
}

// namespaces returns those that exist: a build that failed has not made all.
func (b *Box) namespaces() []*Namespace {
	var all []*Namespace
	for _, ns := range b.pods {
		all = append(all, ns)
	}
	for _, ns := range []*Namespace{b.Node, b.Outside} {
		if ns != nil {
			all = append(all, ns)
		}
	}
	return all
}

func (b *Box) lockFile() string { return filepath.Join(b.dir, "xtables.lock") }

// build makes and joins the namespaces. What it made before an error is left
// to Close.
func (b *Box) build(cfg Config) error {
	var err error
	if b.Node, err = b.newNamespace(); err != nil {
		return fmt.Errorf("making the node: %w", err)
	}
	if b.Outside, err = b.newNamespace(); err != nil {
		return fmt.Errorf("making the outside: %w", err)
	}
	for _, pod := range cfg.Pods {
		if b.pods[pod.Name], err = b.newNamespace(); err != nil {
			delete(b.pods, pod.Name)
			return fmt.Errorf("making pod %s: %w", pod.Name, err)
		}
	}
	// Settings come first, because a new link copies the defaults.
	for _, ns := range b.namespaces() {
		if err := ns.prepare(ns == b.Node, b.ipv6); err != nil {
			return err
		}
	}
	if err := b.joinOutside(cfg); err != nil {
		return fmt.Errorf("joining the outside: %w", err)
	}
	for i, pod := range cfg.Pods {
		if err := b.joinPod(cfg, pod, "veth"+strconv.Itoa(i)); err != nil {
			return fmt.Errorf("joining pod %s: %w", pod.Name, err)
		}
	}
	return nil
}

// prepare writes the settings of a namespace and turns lo on.
func (ns *Namespace) prepare(node, ipv6 bool) error {
	return ns.configure(func(h *netlink.Handle) error {
		for _, s := range settings(node, ipv6) {
			// /proc/sys/net is the one of the thread that opens the file: this
			// one, not the process's.
			if err := os.WriteFile("/proc/sys/net/"+s.path, []byte(s.value), 0); err != nil {
				return fmt.Errorf("setting %s: %w", s.path, err)
			}
		}
		lo, err := h.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("finding lo: %w", err)
		}
		if err := h.LinkSetUp(lo); err != nil {
			return fmt.Errorf("setting lo up: %w", err)
		}
		return nil
	})
}

// setting is one file below /proc/sys/net.
type setting struct{ path, value string }

// settings returns what a namespace needs, in order. Most are the kernel's own
// defaults; but a new namespace copies its IPv4 settings from the host, so they
// are written out. ip_forward is first because changing it resets others.
func settings(node, ipv6 bool) []setting {
	forward := "0"
	if node {
		forward = "1"
	}
	list := []setting{{"ipv4/ip_forward", forward}}
	both := func(family, name, value string) {
		for _, dev := range []string{"all", "default"} {
			list = append(list, setting{family + "/conf/" + dev + "/" + name, value})
		}
	}
	both("ipv4", "rp_filter", "0")
	// A packet that a hairpin sends back where it came from is meant to: no
	// redirects, neither sent nor believed.
	both("ipv4", "send_redirects", "0")
	both("ipv4", "accept_redirects", "0")
	// The node answers for its address on the pods' veths too: it is their
	// gateway.
	both("ipv4", "arp_ignore", "0")
	both("ipv4", "arp_filter", "0")
	both("ipv4", "arp_announce", "0")
	if node {
		// As kube-proxy sets it, for NodePorts on 127.0.0.1.
		both("ipv4", "route_localnet", "1")
	}
	if ipv6 {
		list = append(list, setting{"ipv6/conf/all/forwarding", forward})
		both("ipv6", "disable_ipv6", "0")
		both("ipv6", "accept_redirects", "0")
		both("ipv6", "accept_ra", "0")
		// Addresses, the link-local ones too, are usable at once.
		both("ipv6", "accept_dad", "0")
	} else if _, err := os.Stat("/proc/sys/net/ipv6"); err == nil {
		// Otherwise the kernel announces itself to its neighbours now and then,
		// and rules count that.
		both("ipv6", "disable_ipv6", "1")
	}
	return list
}

// joinOutside joins the node's eth0 to the outside's eth0.
func (b *Box) joinOutside(cfg Config) error {
	err := b.Node.configure(func(h *netlink.Handle) error {
		return addVeth(h, "eth0", b.Outside)
	})
	if err != nil {
		return err
	}
	// Both ends are up before any address is added: an IPv6 route needs it.
	if err := b.Outside.configure(setUp("eth0")); err != nil {
		return err
	}
	ends := []struct {
		ns          *Namespace
		addrs, peer []netip.Prefix
	}{
		{b.Node, cfg.NodeAddrs, cfg.OutsideAddrs},
		{b.Outside, cfg.OutsideAddrs, cfg.NodeAddrs},
	}
	for _, end := range ends {
		err := end.ns.configure(func(h *netlink.Handle) error {
			for _, addr := range end.addrs {
				if err := addAddr(h, "eth0", addr); err != nil {
					return err
				}
			}
			for _, v6 := range []bool{false, true} {
				if !hasFamily(end.addrs, v6) || !hasFamily(end.peer, v6) {
					continue
				}
				gw := firstOf(end.peer, v6)
				if err := addRoute(h, "eth0", route{dst: everywhere(v6), via: gw}); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// linkLocalGateway is on the node's end of every pod's veth. The IPv4 gateway
// needs no address there, since ARP answers for any address of the node on any
// of its links; neighbour discovery only does for those of the link asked.
func linkLocalGateway() netip.Prefix { return netip.MustParsePrefix("fe80::1/64") }

// joinPod joins the node's link name to the pod's eth0.
func (b *Box) joinPod(cfg Config, pod Pod, name string) error {
	ns := b.pods[pod.Name]
	err := b.Node.configure(func(h *netlink.Handle) error {
		return addVeth(h, name, ns)
	})
	if err != nil {
		return err
	}
	if err := ns.configure(setUp("eth0")); err != nil {
		return err
	}
	err = b.Node.configure(func(h *netlink.Handle) error {
		if b.ipv6 {
			if err := addAddr(h, name, linkLocalGateway()); err != nil {
				return err
			}
		}
		for _, addr := range pod.Addrs {
			r := route{dst: single(addr)}
			if addr.Is4() {
				// The link has no IPv4 address to choose as the source. (The
				// IPv6 choice passes over a link-local one by itself.)
				r.src = firstOf(cfg.NodeAddrs, false)
			}
			if err := addRoute(h, name, r); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return ns.configure(func(h *netlink.Handle) error {
		var has4, has6 bool
		for _, addr := range pod.Addrs {
			if err := addAddr(h, "eth0", single(addr)); err != nil {
				return err
			}
			has4, has6 = has4 || addr.Is4(), has6 || addr.Is6()
		}
		if has4 {
			gw := firstOf(cfg.NodeAddrs, false)
			if err := addRoute(h, "eth0", route{dst: single(gw)}); err != nil {
				return err
			}
			if err := addRoute(h, "eth0", route{dst: everywhere(false), via: gw}); err != nil {
				return err
			}
		}
		if has6 {
			return addRoute(h, "eth0", route{dst: everywhere(true), via: linkLocalGateway().Addr()})
		}
		return nil
	})
}

// addVeth adds a link that is up and whose other end is eth0 in peer. The pair
// is born in its two namespaces: it never is in the host's.
func addVeth(h *netlink.Handle, name string, peer *Namespace) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	veth := netlink.NewVeth(attrs)
	veth.PeerName = "eth0"
	err := peer.withFD(func(fd int) error {
		veth.PeerNamespace = netlink.NsFd(fd)
		return h.LinkAdd(veth)
	})
	if err != nil {
		return fmt.Errorf("adding the veth %s: %w", name, err)
	}
	return setUp(name)(h)
}

// setUp returns a function that sets a link up.
func setUp(name string) func(*netlink.Handle) error {
	return func(h *netlink.Handle) error {
		link, err := h.LinkByName(name)
		if err != nil {
			return fmt.Errorf("finding %s: %w", name, err)
		}
		if err := h.LinkSetUp(link); err != nil {
			return fmt.Errorf("setting %s up: %w", name, err)
		}
		return nil
	}
}

func addAddr(h *netlink.Handle, name string, p netip.Prefix) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("finding %s: %w", name, err)
	}
	addr := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := h.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("adding the address %s to %s: %w", p, name, err)
	}
	return nil
}

// route is a route on a link. Without via, dst is on the link itself; without
// src, the kernel chooses.
type route struct {
	dst      netip.Prefix
	via, src netip.Addr
}

func addRoute(h *netlink.Handle, name string, r route) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("finding %s: %w", name, err)
	}
	nr := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(r.dst), Scope: netlink.SCOPE_LINK}
	if r.via.IsValid() {
		nr.Gw, nr.Scope = r.via.AsSlice(), netlink.SCOPE_UNIVERSE
	}
	if r.src.IsValid() {
		nr.Src = r.src.AsSlice()
	}
	if err := h.RouteAdd(nr); err != nil {
		return fmt.Errorf("adding the route to %s on %s: %w", r.dst, name, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func everywhere(ipv6 bool) netip.Prefix {
	if ipv6 {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
}

// firstOf returns the first address of a family, or the invalid address.
func firstOf(list []netip.Prefix, ipv6 bool) netip.Addr {
	for _, p := range list {
		if p.Addr().Is6() == ipv6 {
			return p.Addr()
		}
	}
	return netip.Addr{}
}

func hasFamily(list []netip.Prefix, ipv6 bool) bool { return firstOf(list, ipv6).IsValid() }

// validate finds what the kernel would refuse less clearly, or not at all.
func (cfg Config) validate() error {
	if len(cfg.NodeAddrs) == 0 {
		return errors.New("the node needs an address")
	}
	seen := make(map[netip.Addr]string)
	claim := func(owner string, a netip.Addr) error {
		switch other, taken := seen[a]; {
		case !a.IsValid() || a.Is4In6() || a.Zone() != "":
			return fmt.Errorf("%s: not a plain address: %s", owner, a)
		case taken:
			return fmt.Errorf("%s: %s is an address of %s too", owner, a, other)
		}
		seen[a] = owner
		return nil
	}
	for _, p := range cfg.NodeAddrs {
		if err := claim("the node", p.Addr()); err != nil {
			return err
		}
		if !hasFamily(cfg.OutsideAddrs, p.Addr().Is6()) {
			return fmt.Errorf("the outside has no address of the family of the node's %s", p)
		}
	}
	for _, p := range cfg.OutsideAddrs {
		if err := claim("the outside", p.Addr()); err != nil {
			return err
		}
		if !hasFamily(cfg.NodeAddrs, p.Addr().Is6()) {
			return fmt.Errorf("the node has no address of the family of the outside's %s", p)
		}
	}
	names := make(map[string]bool)
	for _, pod := range cfg.Pods {
		if pod.Name == "" || names[pod.Name] {
			return fmt.Errorf("pods need names of their own: %q", pod.Name)
		}
		names[pod.Name] = true
		for _, a := range pod.Addrs {
			if err := claim("pod "+pod.Name, a); err != nil {
				return err
			}
			if !hasFamily(cfg.NodeAddrs, a.Is6()) {
				return fmt.Errorf("the node has no address of the family of pod %s's %s", pod.Name, a)
			}
		}
	}
	return nil
}

// checkCapabilities says which capability is missing. It looks at this thread;
// Go keeps those of all threads equal.
func checkCapabilities() error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData // 64 bits, the lower 32 first
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Errorf("reading this process's capabilities: %w", err)
	}
	var missing []string
	for _, c := range []struct {
		bit  uint
		name string
	}{{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"}, {unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"}} {
		if data[0].Effective&(1<<c.bit) == 0 {
			missing = append(missing, c.name)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("making network namespaces needs %s (be root, or the root of a user namespace): %w",
			strings.Join(missing, " and "), unix.EPERM)
	}
	return nil
}
