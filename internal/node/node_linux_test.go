package node

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/natlens/natlens/internal/nodebox"
	"github.com/natlens/natlens/pkg/chain"
)

// newBox makes a node with a pod, without which no route leads past eth0.
func newBox(t *testing.T, node, outside []string) *nodebox.Box {
	t.Helper()
	cfg := nodebox.Config{Pods: []nodebox.Pod{{Name: "pod", Addrs: []netip.Addr{netip.MustParseAddr("10.52.1.4")}}}}
	for _, s := range node {
		cfg.NodeAddrs = append(cfg.NodeAddrs, netip.MustParsePrefix(s))
	}
	for _, s := range outside {
		cfg.OutsideAddrs = append(cfg.OutsideAddrs, netip.MustParsePrefix(s))
	}
	b, err := nodebox.New(cfg)
	if errors.Is(err, syscall.EPERM) {
		// On the project's own machines a silent skip would hide a broken setup.
		if os.Getenv("CI") == "true" {
			t.Fatalf("not to be skipped with CI=true: %v", err)
		}
		t.Skipf("skipping: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func discover(t *testing.T, ns *nodebox.Namespace) chain.Node {
	t.Helper()
	var n chain.Node
	err := ns.Do(func() (err error) {
		n, err = Discover()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// sendWith makes an address the one that a node sends with, beyond its subnets.
func sendWith(t *testing.T, ns *nodebox.Namespace, src, gateway netip.Addr) {
	t.Helper()
	err := ns.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		eth0, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		return h.RouteReplace(&netlink.Route{
			LinkIndex: eth0.Attrs().Index, Gw: gateway.AsSlice(), Src: src.AsSlice(),
			Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)},
		})
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestDiscover wants the node's addresses, the one that it sends with first,
// and nothing that is not the node's own: the pods' links have link-local
// addresses, and lo has loopback ones.
func TestDiscover(t *testing.T) {
	for _, c := range []struct {
		name          string
		node, outside []string
		main          []string // of each family
	}{
		{"IPv4", []string{"10.146.0.2/24"}, []string{"10.146.0.100/24"}, []string{"10.146.0.2"}},
		{"both", []string{"10.146.0.2/24", "fd00:146::2/64"}, []string{"10.146.0.100/24", "fd00:146::100/64"}, []string{"10.146.0.2", "fd00:146::2"}},
		{"several", []string{"10.146.0.2/24", "10.146.0.3/24", "10.146.0.4/24"}, []string{"10.146.0.100/24"}, []string{"10.146.0.3"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBox(t, c.node, c.outside)
			sendWith(t, b.Node, netip.MustParseAddr(c.main[0]), netip.MustParsePrefix(c.outside[0]).Addr())
			n := discover(t, b.Node)
			var want []netip.Addr
			for _, s := range c.node {
				want = append(want, netip.MustParsePrefix(s).Addr())
			}
			got := slices.Clone(n.Local)
			slices.SortFunc(got, netip.Addr.Compare)
			slices.SortFunc(want, netip.Addr.Compare)
			if !slices.Equal(got, want) {
				t.Errorf("Local is %v, want %v in any order", n.Local, want)
			}
			for _, s := range c.main {
				a := netip.MustParseAddr(s)
				i := slices.IndexFunc(n.Local, func(l netip.Addr) bool { return l.Is4() == a.Is4() })
				if i < 0 || n.Local[i] != a {
					t.Errorf("Local is %v, want %v to be the first of its family", n.Local, a)
				}
			}
			if len(n.PodCIDRs) > 0 || len(n.PodInterfaces) > 0 {
				t.Errorf("pods are at %v, %v", n.PodCIDRs, n.PodInterfaces)
			}
		})
	}
}

// TestDiscoverElsewhere asks another namespace than the process is in.
func TestDiscoverElsewhere(t *testing.T) {
	b := newBox(t, []string{"10.146.0.2/24"}, []string{"10.146.0.100/24"})
	n := discover(t, b.Outside)
	if want := netip.MustParseAddr("10.146.0.100"); len(n.Local) != 1 || n.Local[0] != want {
		t.Errorf("Local is %v, want %v", n.Local, want)
	}
	if !n.NoRouteLocalnet {
		t.Error("outside routes 127.0.0.0/8")
	}
}

// TestDiscoverRouteLocalnet sets the sysctl off everywhere, then for one link.
func TestDiscoverRouteLocalnet(t *testing.T) {
	b := newBox(t, []string{"10.146.0.2/24"}, []string{"10.146.0.100/24"})
	if discover(t, b.Node).NoRouteLocalnet {
		t.Error("the sysctl is on, but not seen")
	}
	set := func(pattern, value string) {
		t.Helper()
		err := b.Node.Do(func() error {
			files, err := filepath.Glob("/proc/sys/net/ipv4/conf/" + pattern + "/route_localnet")
			if len(files) == 0 {
				t.Errorf("no link %s", pattern)
			}
			for _, f := range files {
				err = errors.Join(err, os.WriteFile(f, []byte(value), 0))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	set("*", "0")
	if !discover(t, b.Node).NoRouteLocalnet {
		t.Error("the sysctl is off, but not seen")
	}
	set("veth0", "1")
	if discover(t, b.Node).NoRouteLocalnet {
		t.Error("the sysctl is on for one link, but not seen")
	}
}
