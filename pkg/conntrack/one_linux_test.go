package conntrack

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/natlens/natlens/internal/nodebox"
	"github.com/natlens/natlens/pkg/netfilter"
)

// refused connects to where nobody listens, which conntrack forgets at once, and
// tells what a Listener heard of it.
func refused(t *testing.T, box *nodebox.Box, source, destination netip.AddrPort) (f Flow, err error) {
	err = box.Node.Do(func() error {
		l, err := Listen()
		if err != nil {
			return err
		}
		defer l.Close()
		if _, err := box.Node.DialFrom(t.Context(), "tcp", source, destination.String()); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("connecting: %v", err)
		}
		if _, err := Get(netfilter.TCP, source, destination); !errors.Is(err, ErrUntracked) {
			t.Errorf("conntrack remembers: %v", err)
		}
		f, err = l.Find(netfilter.TCP, source, destination)
		return err
	})
	return f, err
}

// TestGet makes a connection that nat sends elsewhere, and one that nobody tracks.
func TestGet(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("skipping: needs root, for network namespaces")
	}
	for _, test := range []struct {
		name               string
		ipv6               bool
		node, pod, service netip.Addr
	}{
		{"IPv4", false, netip.MustParseAddr("10.146.0.2"), netip.MustParseAddr("10.52.1.4"), netip.MustParseAddr("10.56.0.1")},
		{"IPv6", true, netip.MustParseAddr("fd00:146::2"), netip.MustParseAddr("fd00:52::4"), netip.MustParseAddr("fd00:56::1")},
	} {
		t.Run(test.name, func(t *testing.T) {
			bits := 24
			outside := netip.MustParseAddr("10.146.0.100")
			if test.ipv6 {
				bits, outside = 64, netip.MustParseAddr("fd00:146::100")
			}
			box, err := nodebox.New(nodebox.Config{
				NodeAddrs: []netip.Prefix{netip.PrefixFrom(test.node, bits)}, OutsideAddrs: []netip.Prefix{netip.PrefixFrom(outside, bits)},
				Pods: []nodebox.Pod{{Name: "pod", Addrs: []netip.Addr{test.pod}}},
			})
			if errors.Is(err, unix.EPERM) {
				t.Skip("skipping: ", err)
			} else if err != nil {
				t.Fatal(err)
			}
			defer box.Close()
			endpoint, service := netip.AddrPortFrom(test.pod, 8080), netip.AddrPortFrom(test.service, 80)
			rules := "*nat\n-A OUTPUT -d " + test.service.String() + " -p tcp --dport 80 -j DNAT --to-destination " + endpoint.String() + "\nCOMMIT\n"
			if err := box.Restore(t.Context(), nodebox.NFT, test.ipv6, strings.NewReader(rules)); err != nil {
				t.Fatal(err)
			}
			ln, err := box.Pod("pod").Listen("tcp", endpoint.String())
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			conn, err := box.Node.Dial(t.Context(), "tcp", service.String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			source := netip.MustParseAddrPort(conn.LocalAddr().String())
			get := func(source netip.AddrPort) (f Flow, err error) {
				err = box.Node.Do(func() error {
					f, err = Get(netfilter.TCP, source, service)
					return err
				})
				return f, err
			}
			is := func(f Flow, source netip.AddrPort) bool {
				return f.Protocol == netfilter.TCP && f.Source == source && f.Destination == service && f.To == endpoint && f.From == source
			}
			if f, err := get(source); err != nil || !is(f, source) {
				t.Errorf("%+v, %v; want it to %v", f, err, endpoint)
			}
			ln.Close()
			second := netip.AddrPortFrom(test.node, 40000)
			if f, err := refused(t, box, second, service); err != nil || !is(f, second) {
				t.Errorf("refused: %+v, %v; want it to %v", f, err, endpoint)
			}
			if _, err := get(netip.AddrPortFrom(source.Addr(), source.Port()^1)); !errors.Is(err, ErrUntracked) {
				t.Errorf("of no connection: %v, want %v", err, ErrUntracked)
			}
		})
	}
}
