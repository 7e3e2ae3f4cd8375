package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/natlens/natlens/internal/nodebox"
	"github.com/natlens/natlens/internal/nodebox/boxtest"
	"github.com/natlens/natlens/pkg/netfilter"
)

// newNode makes a node that nothing connects to.
func newNode(t testing.TB) *nodebox.Box {
	t.Helper()
	b, err := nodebox.New(nodebox.Config{
		NodeAddrs:    []netip.Prefix{netip.MustParsePrefix("10.146.0.2/16"), netip.MustParsePrefix("fd00:146::2/64")},
		OutsideAddrs: []netip.Prefix{netip.MustParsePrefix("10.146.0.100/16"), netip.MustParsePrefix("fd00:146::100/64")},
	})
	if errors.Is(err, syscall.EPERM) && os.Getenv("CI") != "true" {
		t.Skipf("skipping: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// create has the kernel track connections, as if nat had sent each to the endpoint;
// an empty endpoint leaves it as it is. ctnetlink does it without a packet.
func create(t testing.TB, b *nodebox.Box, n int, entry func(int) (protocol netfilter.Protocol, from, to, endpoint netip.AddrPort)) {
	t.Helper()
	err := b.Node.Do(func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		answer := make([]byte, 4096)
		var batch []byte
		for i := range n {
			protocol, from, to, endpoint := entry(i)
			last := i == n-1 || i%256 == 255
			batch = append(batch, newMessage(protocol, from, to, endpoint, last)...)
			if !last {
				continue
			}
			if err := unix.Sendto(fd, batch, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
				return err
			}
			batch = batch[:0]
			// The acknowledgement of the last, or the first error.
			m, err := unix.Read(fd, answer)
			if err != nil {
				return err
			}
			if code := int32(binary.NativeEndian.Uint32(answer[16:m])); code != 0 {
				return fmt.Errorf("entry %d: %w", i, syscall.Errno(-code))
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func newMessage(protocol netfilter.Protocol, from, to, endpoint netip.AddrPort, ack bool) []byte {
	const create = 0 // IPCTNL_MSG_CT_NEW
	const attrNAT, attrNATPort = 13, 3
	const assured, confirmed = 1 << 2, 1 << 3
	family, low := byte(unix.AF_INET), uint16(1) // CTA_NAT_V4_MINIP
	if to.Addr().Is6() {
		family, low = unix.AF_INET6, 4 // CTA_NAT_V6_MINIP
	}
	body := slices.Concat([]byte{family, 0, 0, 0}, tuple(attrOriginal, protocol, from, to), tuple(attrReply, protocol, to, from),
		attr(attrTimeout, number32(600)...), attr(attrStatus, number32(SeenReply|assured|confirmed)...))
	if endpoint.IsValid() {
		body = append(body, nest(attrNAT, attr(low, endpoint.Addr().AsSlice()...), attr(low+1, endpoint.Addr().AsSlice()...),
			nest(attrNATPort, attr(1, number16(endpoint.Port())...), attr(2, number16(endpoint.Port())...)))...)
	}
	if protocol == netfilter.TCP {
		body = append(body, nest(attrProto, nest(attrTCP, attr(attrState, 3)))...)
	}
	flags := uint16(unix.NLM_F_REQUEST | unix.NLM_F_CREATE)
	if ack {
		flags |= unix.NLM_F_ACK
	}
	native := binary.NativeEndian
	b := native.AppendUint32(nil, uint32(16+len(body)))
	b = native.AppendUint16(b, unix.NFNL_SUBSYS_CTNETLINK<<8|create)
	b = native.AppendUint16(b, flags)
	return append(append(b, make([]byte, 8)...), body...)
}

// numbered is one of many connections, each tenth of which has no DNAT.
func numbered(i int) (netfilter.Protocol, netip.AddrPort, netip.AddrPort, netip.AddrPort) {
	from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 52, byte(i >> 14), byte(i >> 6)}), uint16(40000+i&63))
	to, endpoint := netip.MustParseAddrPort("10.96.0.10:80"), netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 53, 0, byte(i % 10)}), 8080)
	if i%10 == 0 {
		endpoint = netip.AddrPort{}
	}
	return netfilter.TCP, from, to, endpoint
}

func dump(t testing.TB, b *nodebox.Box, r *Reader) []string {
	t.Helper()
	var out []string
	err := b.Node.Do(func() error {
		return r.Dump(t.Context(), func(f *Flow) {
			out = append(out, fmt.Sprintf("%v %v %v %v %v %d", f.Protocol, f.Source, f.Destination, f.To, f.From, f.State))
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(out)
	return out
}

// The kernel's entries come back as they are, with and without its help in
// leaving out what is not asked for.
func TestDump(t *testing.T) {
	b := newNode(t)
	entries := []struct {
		protocol           netfilter.Protocol
		from, to, endpoint netip.AddrPort
	}{
		{netfilter.TCP, at("10.52.1.9:40000"), at("10.96.0.10:80"), at("10.52.1.4:8080")},
		{netfilter.UDP, at("10.52.1.9:40000"), at("10.96.0.10:53"), at("10.52.1.4:5353")},
		{netfilter.UDP, at("10.52.1.9:40001"), at("10.96.0.10:53"), netip.AddrPort{}},
		{netfilter.UDP, at("[fd00:52::9]:40000"), at("[fd00:96::10]:53"), at("[fd00:52::4]:53")},
	}
	want := []string{
		"TCP 10.52.1.9:40000 10.96.0.10:80 10.52.1.4:8080 10.52.1.9:40000 3",
		"UDP 10.52.1.9:40000 10.96.0.10:53 10.52.1.4:5353 10.52.1.9:40000 0",
		"UDP [fd00:52::9]:40000 [fd00:96::10]:53 [fd00:52::4]:53 [fd00:52::9]:40000 0",
	}
	create(t, b, len(entries), func(i int) (netfilter.Protocol, netip.AddrPort, netip.AddrPort, netip.AddrPort) {
		e := entries[i]
		return e.protocol, e.from, e.to, e.endpoint
	})
	for name, r := range map[string]*Reader{"the kernel leaves out": {}, "the reader leaves out": {all: true}} {
		for range 2 {
			if got := dump(t, b, r); !slices.Equal(got, want) {
				t.Errorf("%s:\n%s\nwant\n%s", name, strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		}
		r.Close()
	}
}

func TestDumpMany(t *testing.T) {
	b := newNode(t)
	const n = 20000
	create(t, b, n, numbered)
	var r Reader
	defer r.Close()
	seen := map[netip.AddrPort]int{}
	if err := b.Node.Do(func() error { return r.Dump(t.Context(), func(f *Flow) { seen[f.To]++ }) }); err != nil {
		t.Fatal(err)
	}
	for i := 1; i < 10; i++ {
		if e := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 53, 0, byte(i)}), 8080); seen[e] != n/10 {
			t.Errorf("%d flows to %v, want %d", seen[e], e, n/10)
		}
	}
	if len(seen) != 9 {
		t.Errorf("flows to %d endpoints, want 9", len(seen))
	}
	ctx, cancel := context.WithCancel(t.Context())
	flows := 0
	if err := r.Dump(ctx, func(*Flow) { flows++; cancel() }); err != context.Canceled || flows > 1 {
		t.Errorf("%d flows after the end of the context (%v)", flows, err)
	}
}

// TestCapability reads as a user with the capability NET_ADMIN alone, and as one
// without any.
func TestCapability(t *testing.T) {
	if boxtest.IsAgain() {
		n := 0
		err := new(Reader).Dump(context.Background(), func(*Flow) { n++ })
		fmt.Printf("answer: %d flows, %v (%v)\n", n, err, errors.Is(err, os.ErrPermission))
		return
	}
	b := newNode(t)
	create(t, b, 10, numbered)
	for _, c := range []struct {
		caps []uintptr
		want string
	}{
		{[]uintptr{unix.CAP_NET_ADMIN}, "9 flows, <nil> (false)"},
		{nil, "0 flows, reading the kernel's conntrack: permission denied: it needs the capability NET_ADMIN: operation not permitted (true)"},
	} {
		if got := boxtest.Again(t, b.Node, c.caps...); got != c.want {
			t.Errorf("with capabilities %v, it said %q, want %q", c.caps, got, c.want)
		}
	}
}

// BenchmarkDump reads a table of 500,000 connections, or of as many as this
// machine's kernel allows in one (net.netfilter.nf_conntrack_max).
func BenchmarkDump(b *testing.B) {
	box := newNode(b)
	n := 500_000
	text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max")
	if err != nil {
		b.Fatal(err)
	}
	if most, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil && most > 0 {
		n = min(n, most*9/10)
	}
	create(b, box, n, numbered)
	var r Reader
	defer r.Close()
	err = box.Node.Do(func() error {
		b.ReportAllocs()
		for b.Loop() {
			flows := 0
			if err := r.Dump(b.Context(), func(*Flow) { flows++ }); err != nil {
				return err
			}
			if want := n - (n+9)/10; flows != want {
				return fmt.Errorf("%d flows, want %d", flows, want)
			}
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(n), "connections")
}
