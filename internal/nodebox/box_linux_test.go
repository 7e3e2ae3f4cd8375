package nodebox

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const (
	clusterIP4 = "10.96.0.10"
	clusterIP6 = "fd00:96::10"
	rejectedIP = "10.96.0.11"
	droppedIP  = "10.96.0.12"
)

// testConfig is a node with three pods, all of both families.
func testConfig() Config {
	return Config{
		NodeAddrs: []netip.Prefix{
			netip.MustParsePrefix("10.146.0.2/24"), netip.MustParsePrefix("fd00:146::2/64"),
		},
		OutsideAddrs: []netip.Prefix{
			netip.MustParsePrefix("10.146.0.100/24"), netip.MustParsePrefix("fd00:146::100/64"),
		},
		Pods: []Pod{testPod(4), testPod(5), testPod(6)},
	}
}

func testPod(n int) Pod {
	return Pod{
		Name: fmt.Sprintf("pod%d", n),
		Addrs: []netip.Addr{
			netip.MustParseAddr(fmt.Sprintf("10.52.1.%d", n)),
			netip.MustParseAddr(fmt.Sprintf("fd00:52::%d", n)),
		},
	}
}

// place is a namespace of a test box with its name and addresses.
type place struct {
	name  string
	ns    *Namespace
	addrs []string
}

func places(b *Box) []place {
	list := []place{
		{"node", b.Node, []string{"10.146.0.2", "fd00:146::2"}},
		{"outside", b.Outside, []string{"10.146.0.100", "fd00:146::100"}},
	}
	for _, p := range testConfig().Pods {
		list = append(list, place{p.Name, b.Pod(p.Name), []string{p.Addrs[0].String(), p.Addrs[1].String()}})
	}
	return list
}

// requireRoot skips a test that makes a box in the test's own user namespace.
func requireRoot(t *testing.T) {
	t.Helper()
	if err := checkCapabilities(); err != nil {
		t.Skipf("skipping: %v", err)
	}
}

func requireProgram(t *testing.T, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("skipping: %v", err)
	}
}

func newBox(t *testing.T) *Box {
	t.Helper()
	b, err := New(testConfig())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.Close(); err != nil {
			t.Errorf("closing the box: %v", err)
		}
	})
	return b
}

// serve answers every TCP connection and every UDP packet to port 8080 of a
// place with its name and the address that it sees the client at. The box's
// Close ends it.
func serve(t *testing.T, p place) {
	t.Helper()
	l, err := p.ns.Listen("tcp", ":8080")
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
				fmt.Fprintf(conn, "%s %s\n", p.name, conn.RemoteAddr())
				io.Copy(io.Discard, conn)
			}()
		}
	}()
	c, err := p.ns.ListenPacket("udp", ":8080")
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
			c.WriteTo(fmt.Appendf(nil, "%s %s\n", p.name, from), from)
		}
	}()
}

// ask returns what serve answers: who it is, and where it sees the client.
func ask(ns *Namespace, network, addr string) (name string, from netip.Addr, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	conn, err := ns.Dial(ctx, network, addr)
	if err != nil {
		return "", netip.Addr{}, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetLinger(0) // no TIME_WAIT: the ports are needed again
	} else if _, err := conn.Write([]byte("?")); err != nil {
		return "", netip.Addr{}, err
	}
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return "", netip.Addr{}, err
	}
	name, text, _ := strings.Cut(strings.TrimSpace(line), " ")
	ap, err := netip.ParseAddrPort(text)
	return name, ap.Addr().Unmap(), err
}

// TestPairs dials between all places, without any rules: nothing translates an
// address.
func TestPairs(t *testing.T) {
	requireRoot(t)
	b := newBox(t)
	all := places(b)
	for _, p := range all {
		serve(t, p)
	}
	for _, network := range []string{"tcp", "udp"} {
		for _, from := range all {
			for _, to := range all {
				for family := range 2 {
					name, seen, err := ask(from.ns, network, net.JoinHostPort(to.addrs[family], "8080"))
					if err != nil {
						t.Errorf("%s from %s to %s: %v", network, from.name, to.addrs[family], err)
						continue
					}
					// Every place has one address of each family to use.
					if want := netip.MustParseAddr(from.addrs[family]); name != to.name || seen != want {
						t.Errorf("%s from %s to %s: answered by %s, seen as %s; want %s, %s",
							network, from.name, to.addrs[family], name, seen, to.name, want)
					}
				}
			}
		}
	}
}

// rules is a Service of three endpoints, all of equal share, written as
// kube-proxy does, with a NodePort, and two addresses that answer nothing.
func rules(ipv6 bool) string {
	vip, podNet, size, node := clusterIP4, "10.52.0.0/16", "32", "10.146.0.2"
	if ipv6 {
		vip, podNet, size, node = clusterIP6, "fd00:52::/32", "128", "fd00:146::2"
	}
	var s strings.Builder
	s.WriteString("*nat\n:KUBE-SERVICES - [0:0]\n:KUBE-NODEPORTS - [0:0]\n:KUBE-SVC - [0:0]\n:KUBE-EXT - [0:0]\n")
	for i := range 3 {
		fmt.Fprintf(&s, ":KUBE-SEP-%d - [0:0]\n", i)
	}
	fmt.Fprintf(&s, `-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE
-A KUBE-SERVICES -d %[1]s/%[3]s -p tcp -m tcp --dport 80 -j KUBE-SVC
-A KUBE-SERVICES -d %[1]s/%[3]s -p udp -m udp --dport 80 -j KUBE-SVC
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m tcp --dport 30080 -j KUBE-EXT
-A KUBE-EXT -j MARK --set-xmark 0x4000/0x4000
-A KUBE-EXT -j KUBE-SVC
-A KUBE-SVC ! -s %[2]s -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SVC -m statistic --mode random --probability 0.33333333349 -j KUBE-SEP-0
-A KUBE-SVC -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-1
-A KUBE-SVC -j KUBE-SEP-2
`, vip, podNet, size)
	for i := range 3 {
		pod := testPod(4 + i).Addrs[0]
		to := netip.AddrPortFrom(pod, 8080)
		if ipv6 {
			pod = testPod(4 + i).Addrs[1]
			to = netip.AddrPortFrom(pod, 8080)
		}
		fmt.Fprintf(&s, `-A KUBE-SEP-%[1]d -s %[2]s/%[4]s -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SEP-%[1]d -p tcp -m tcp -j DNAT --to-destination %[3]s
-A KUBE-SEP-%[1]d -p udp -m udp -j DNAT --to-destination %[3]s
`, i, pod, to, size)
	}
	s.WriteString("COMMIT\n*filter\n")
	if !ipv6 {
		for _, chain := range []string{"FORWARD", "OUTPUT"} {
			fmt.Fprintf(&s, "-A %s -d %s/32 -j REJECT\n-A %s -d %s/32 -j DROP\n", chain, rejectedIP, chain, droppedIP)
		}
	}
	fmt.Fprintf(&s, "-A INPUT -d %s -p tcp -m tcp --dport 9 -j DROP\nCOMMIT\n", node)
	return s.String()
}

// checkService dials a Service in a box with both families of rules.
func checkService(t *testing.T, b *Box, backend Backend) {
	t.Helper()
	for _, ipv6 := range []bool{false, true} {
		if err := b.Restore(t.Context(), backend, ipv6, strings.NewReader(rules(ipv6))); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range places(b) {
		if strings.HasPrefix(p.name, "pod") {
			serve(t, p)
		}
	}
	for _, from := range places(b) {
		targets := []string{"10.146.0.2:30080", "[fd00:146::2]:30080"}
		if from.name == "node" {
			targets = append(targets, "127.0.0.1:30080") // needs route_localnet
		}
		for _, target := range targets {
			if _, _, err := ask(from.ns, "tcp", target); err != nil {
				t.Errorf("NodePort from %s to %s: %v", from.name, target, err)
			}
		}
		for family, vip := range []string{clusterIP4, clusterIP6} {
			for _, network := range []string{"tcp", "udp"} {
				got := make(map[string]netip.Addr)
				// (2/3)^60 per endpoint: that one stays away is as likely as
				// a broken machine.
				for range 60 {
					name, seen, err := ask(from.ns, network, net.JoinHostPort(vip, "80"))
					if err != nil {
						t.Fatalf("%s from %s to %s: %v", network, from.name, vip, err)
					}
					got[name] = seen
				}
				// Only pods are seen as themselves, and not by themselves: the
				// hairpin is masqueraded.
				want := make(map[string]netip.Addr)
				for i := range 3 {
					to := testPod(4 + i).Name
					want[to] = netip.MustParseAddr([]string{"10.146.0.2", "fd00:146::2"}[family])
					if strings.HasPrefix(from.name, "pod") && to != from.name {
						want[to] = netip.MustParseAddr(from.addrs[family])
					}
				}
				if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
					t.Errorf("%s from %s to %s: who answered, and saw which client (-want +got):\n%s", network, from.name, vip, diff)
				}
			}
		}
	}
}

func TestService(t *testing.T) {
	requireRoot(t)
	for _, backend := range []Backend{NFT, Legacy} {
		t.Run(string(backend), func(t *testing.T) {
			requireProgram(t, "iptables-"+string(backend)+"-restore")
			b := newBox(t)
			checkService(t, b, backend)
			// iptables takes one lock only: this one, or the host's.
			if _, err := os.Stat(b.lockFile()); backend == Legacy && err != nil {
				t.Errorf("the box's xtables lock was not used: %v", err)
			}
		})
	}
}

// TestRefused dials addresses whose packets are rejected or dropped.
func TestRefused(t *testing.T) {
	requireRoot(t)
	requireProgram(t, "iptables-nft-restore")
	b := newBox(t)
	if err := b.Restore(t.Context(), NFT, false, strings.NewReader(rules(false))); err != nil {
		t.Fatal(err)
	}
	serve(t, place{"pod5", b.Pod("pod5"), nil})
	for _, p := range places(b) {
		// The limit is much longer than an answer takes and much shorter than
		// the kernel's patience.
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		_, err := p.ns.Dial(ctx, "tcp", rejectedIP+":80")
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("rejected, from %s: %v", p.name, err)
		}
		_, err = p.ns.Dial(ctx, "tcp", "10.52.1.4:9999")
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("closed port, from %s: %v", p.name, err)
		}
		cancel()
	}

	// Many dials that get no answer hold no thread, and no other dial up.
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	errs := make(chan error, 200)
	for range cap(errs) {
		wg.Go(func() {
			_, err := b.Pod("pod4").Dial(ctx, "tcp", droppedIP+":80")
			errs <- err
		})
	}
	for range 100 {
		if _, _, err := ask(b.Pod("pod4"), "tcp", "10.52.1.5:8080"); err != nil {
			t.Fatal(err)
		}
	}
	if len(errs) > 0 {
		t.Errorf("a dropped dial ended: %v", <-errs)
	}
	cancel()
	wg.Wait()
	for range cap(errs) {
		if err := <-errs; !errors.Is(err, context.Canceled) {
			t.Fatalf("dropped: %v", err)
		}
	}
	ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := b.Node.Dial(ctx, "tcp", droppedIP+":80")
	var ne net.Error
	if !errors.As(err, &ne) || !ne.Timeout() {
		t.Errorf("dropped, with a deadline: %v is not a timeout", err)
	}
}

// TestRate counts who gets 3,000 connections, and tells how fast they were.
func TestRate(t *testing.T) {
	requireRoot(t)
	const n = 3000
	for _, backend := range []Backend{NFT, Legacy} {
		requireProgram(t, "iptables-"+string(backend)+"-restore")
		b := newBox(t)
		if err := b.Restore(t.Context(), backend, false, strings.NewReader(rules(false))); err != nil {
			t.Fatal(err)
		}
		for _, p := range places(b) {
			serve(t, p)
		}
		for _, from := range places(b)[:3] { // the node, the outside, a pod
			jobs := make(chan struct{}, n)
			for range n {
				jobs <- struct{}{}
			}
			close(jobs)
			var mu sync.Mutex
			counts := make(map[string]int)
			var wg sync.WaitGroup
			start := time.Now()
			for range 8 {
				wg.Go(func() {
					for range jobs {
						name, _, err := ask(from.ns, "tcp", clusterIP4+":80")
						if err != nil {
							name = err.Error()
						}
						mu.Lock()
						counts[name]++
						mu.Unlock()
					}
				})
			}
			wg.Wait()
			took := time.Since(start)
			t.Logf("%s, from %s: %d connections in %v, %.0f per second: %v",
				backend, from.name, n, took.Round(time.Millisecond), n/took.Seconds(), counts)
			for _, pod := range []string{"pod4", "pod5", "pod6"} {
				// 6 standard deviations of a binomial with p = 1/3.
				if c := counts[pod]; c < n/3-155 || c > n/3+155 {
					t.Errorf("%s, from %s: %s got %d of %d", backend, from.name, pod, c, n)
				}
			}
		}
	}
}

func TestDialFrom(t *testing.T) {
	requireRoot(t)
	b := newBox(t)
	serve(t, place{"pod4", b.Pod("pod4"), nil})
	local := netip.MustParseAddrPort("10.146.0.100:0")
	for range 3 { // the port is free again at once
		conn, err := b.Outside.DialFrom(t.Context(), "tcp4", local, "10.52.1.4:8080")
		if err != nil {
			t.Fatal(err)
		}
		got := conn.LocalAddr().(*net.TCPAddr).AddrPort()
		if got.Addr() != local.Addr() || got.Port() == 0 || local.Port() != 0 && got != local {
			t.Errorf("local address %s, want %s", got, local)
		}
		local = got
		conn.(*net.TCPConn).SetLinger(0)
		conn.Close()
	}
	for _, bad := range []struct{ network, local, addr string }{
		{"tcp", "", "localhost:80"},
		{"tcp", "", ":80"},
		{"tcp", "", "10.52.1.4"},
		{"tcp6", "", "10.52.1.4:80"},
		{"udp4", "", "[fd00:52::4]:80"},
		{"tcp", "[fd00:146::100]:0", "10.52.1.4:80"},
		{"tcp", "10.9.9.9:0", "10.52.1.4:80"},
		{"tcp46", "", "10.52.1.4:80"},
		{"unix", "", "10.52.1.4:80"},
		{"tcp", "", "10.52.1.4:http"},
	} {
		var local netip.AddrPort
		if bad.local != "" {
			local = netip.MustParseAddrPort(bad.local)
		}
		if conn, err := b.Outside.DialFrom(t.Context(), bad.network, local, bad.addr); err == nil {
			conn.Close()
			t.Errorf("dialing %+v: no error", bad)
		} else {
			t.Log(err)
		}
	}
	if _, err := b.Node.Listen("udp", ":80"); err == nil {
		t.Error("Listen for udp: no error")
	}
}

// TestDo looks at the namespace from a function and from a program.
func TestDo(t *testing.T) {
	requireRoot(t)
	requireProgram(t, "iptables-nft-restore")
	b := newBox(t)
	host := netnsOf(t, "self")
	ids := make(map[string]string)
	for _, p := range places(b) {
		err := p.ns.Do(func() error {
			ids[p.name] = netnsOf(t, "thread-self")
			forward, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
			if err != nil {
				return err
			}
			if want := map[bool]string{true: "1\n", false: "0\n"}[p.name == "node"]; string(forward) != want {
				t.Errorf("%s: ip_forward is %q", p.name, forward)
			}
			// Inside Do, everything else works too.
			return p.ns.Do(func() error { return nil })
		})
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), "readlink", "/proc/self/ns/net")
		var out strings.Builder
		cmd.Stdout = &out
		if err := p.ns.Run(cmd); err != nil {
			t.Fatal(err)
		}
		if got := strings.TrimSpace(out.String()); got != ids[p.name] || got == host {
			t.Errorf("%s: a function is in %s, a program in %s, the host in %s", p.name, ids[p.name], got, host)
		}
	}
	different := make(map[string]bool)
	for _, id := range ids {
		different[id] = true
	}
	if len(different) != len(ids) {
		t.Errorf("namespaces are shared: %v", ids)
	}
	if got := netnsOf(t, "self"); got != host {
		t.Errorf("the main thread is in %s, was in %s", got, host)
	}
	if err := b.Node.Do(func() error { return io.ErrUnexpectedEOF }); err != io.ErrUnexpectedEOF {
		t.Errorf("Do returned %v, want what its function did", err)
	}
	if err := b.Node.Do(func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("Do of a function that exits its goroutine: no error")
	}
	err := b.Restore(t.Context(), NFT, false, strings.NewReader("*nat\n-A NOWHERE -j ACCEPT\nCOMMIT\n"))
	if err == nil || !strings.Contains(err.Error(), "line") {
		t.Errorf("bad rules: %v, want what the program says", err)
	}
	if err := b.Restore(t.Context(), "ebpf", false, strings.NewReader("")); err == nil {
		t.Error("unknown backend: no error")
	}
}

func netnsOf(t *testing.T, task string) string {
	id, err := os.Readlink("/proc/" + task + "/ns/net")
	if err != nil {
		t.Error(err)
	}
	return id
}

// TestThreads wants threads that are never the main one, and never reused.
func TestThreads(t *testing.T) {
	const n = 100
	tids := make(chan int, n)
	release := make(chan struct{})
	for range n {
		onThread(func() {
			tids <- syscall.Gettid()
			<-release
		})
	}
	seen := make(map[int]bool)
	for range n {
		seen[<-tids] = true
	}
	close(release)
	if len(seen) != n || seen[os.Getpid()] {
		t.Errorf("%d functions ran on %d threads, on the main one: %t", n, len(seen), seen[os.Getpid()])
	}
}

// TestClose checks that nothing of a box is left, neither on the host nor as a
// namespace that something holds, also with the box in full use.
func TestClose(t *testing.T) {
	requireRoot(t)
	for _, program := range []string{"ip", "iptables-nft-restore", "iptables-legacy-restore"} {
		requireProgram(t, program)
	}
	before := hostState(t)
	b := newBox(t)
	checkService(t, b, NFT)
	if err := b.Restore(t.Context(), Legacy, false, strings.NewReader(rules(false))); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, hostState(t)); diff != "" {
		t.Errorf("the host changed with the box open (-before +after):\n%s", diff)
	}
	ids := make(map[string]bool)
	for _, p := range places(b) {
		if err := p.ns.Do(func() error { ids[netnsOf(t, "thread-self")] = true; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(holders(ids)); n < len(ids) {
		t.Fatalf("found %d holders of %d namespaces: this test cannot see", n, len(ids))
	}
	sleep := exec.Command("sleep", "600")
	if err := b.Node.Start(sleep); err != nil {
		t.Fatal(err)
	}
	dir := b.dir
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	var exit *exec.ExitError
	if err := sleep.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("a program in a closed box: %v, want killed", err)
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		left := holders(ids)
		if len(left) == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("held after Close: %v", left)
		}
	}
	if diff := cmp.Diff(before, hostState(t)); diff != "" {
		t.Errorf("the host changed (-before +after):\n%s", diff)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory of the box: %v, want removed", err)
	}
	if _, err := b.Node.Dial(t.Context(), "tcp", "127.0.0.1:1"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Dial in a closed box: %v", err)
	}
	if _, err := b.Node.Listen("tcp", ":1"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Listen in a closed box: %v", err)
	}
	if err := b.Node.Do(func() error { return nil }); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Do in a closed box: %v", err)
	}
}

// holders returns the files below /proc that show a thread in, or an open file
// of, one of the namespaces.
func holders(ids map[string]bool) []string {
	var found []string
	for _, pattern := range []string{"/proc/[0-9]*/task/*/ns/net", "/proc/[0-9]*/fd/*"} {
		paths, _ := filepath.Glob(pattern)
		for _, path := range paths {
			if id, err := os.Readlink(path); err == nil && ids[id] {
				found = append(found, path)
			}
		}
	}
	return found
}

// hostState returns what a box must not change, by name.
func hostState(t *testing.T) map[string]string {
	t.Helper()
	state := make(map[string]string)
	expires := regexp.MustCompile(`expires \d+sec`) // the age of what a router announced
	for _, line := range []string{
		"ip -o link", "ip -o addr show scope global", "ip route show table all", "ip -6 route", "ip rule",
		"iptables-nft-save", "ip6tables-nft-save", "cat /proc/net/ip_tables_names",
	} {
		args := strings.Fields(line)
		out, err := exec.Command(args[0], args[1:]...).Output()
		if err != nil && !errors.Is(err, exec.ErrNotFound) && args[0] != "cat" {
			t.Fatalf("%s: %v", line, err)
		}
		text := ""
		for l := range strings.Lines(string(out)) {
			if !strings.HasPrefix(l, "#") { // comments of iptables-save hold the time
				text += l
			}
		}
		state[line] = expires.ReplaceAllString(text, "")
	}
	for _, pattern := range []string{"ipv4/ip_forward", "ipv4/conf/*/*", "ipv6/conf/*/*"} {
		paths, _ := filepath.Glob("/proc/sys/net/" + pattern)
		for _, path := range paths {
			if text, err := os.ReadFile(path); err == nil {
				state[path] = string(text)
			}
		}
	}
	return state
}

// TestUserNamespace runs itself again as the root of a user namespace, which
// needs no privilege where the kernel allows it.
func TestUserNamespace(t *testing.T) {
	const marker = "NODEBOX_TEST_IN_USER_NAMESPACE"
	if os.Getenv(marker) != "" {
		for _, backend := range []Backend{NFT, Legacy} {
			b := newBox(t)
			checkService(t, b, backend)
			if err := b.Close(); err != nil {
				t.Error(err)
			}
		}
		return
	}
	requireProgram(t, "iptables-nft-restore")
	requireProgram(t, "iptables-legacy-restore")
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestUserNamespace$", "-test.v")
	cmd.Env = append(os.Environ(), marker+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Skipf("skipping: the kernel refuses a user namespace: %v", err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("inside: %v\n%s", err, &out)
	}
	if !strings.Contains(out.String(), "--- PASS: TestUserNamespace") {
		t.Errorf("inside, the test did not pass:\n%s", &out)
	}
}

// TestUnprivileged wants an error that names what is missing.
func TestUnprivileged(t *testing.T) {
	const marker = "NODEBOX_TEST_UNPRIVILEGED"
	if os.Getenv(marker) != "" {
		_, err := New(testConfig())
		if !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), "CAP_SYS_ADMIN and CAP_NET_ADMIN") {
			t.Errorf("got %v, want a permission error that names the capabilities", err)
		}
		return
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestUnprivileged$")
	cmd.Env = append(os.Environ(), marker+"=1", "TMPDIR=/tmp")
	if os.Getuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		if errors.Is(err, os.ErrPermission) {
			t.Skipf("skipping: %v", err)
		}
		t.Errorf("inside: %v\n%s", err, out)
	}
}

func TestConfig(t *testing.T) {
	prefix := netip.MustParsePrefix
	for _, tt := range []struct {
		name string
		edit func(*Config)
		want string
	}{
		{"valid", func(*Config) {}, ""},
		{"no pods", func(c *Config) { c.Pods = nil }, ""},
		{"no node", func(c *Config) { c.NodeAddrs = nil }, "the node needs an address"},
		{"no outside", func(c *Config) { c.OutsideAddrs = nil }, "the outside has no address of the family"},
		{"family of the outside", func(c *Config) { c.NodeAddrs = c.NodeAddrs[:1] }, "the node has no address of the family of the outside"},
		{"family of a pod", func(c *Config) {
			c.NodeAddrs, c.OutsideAddrs = c.NodeAddrs[:1], c.OutsideAddrs[:1]
		}, "the node has no address of the family of pod pod4"},
		{"twice", func(c *Config) { c.Pods[1].Addrs = c.Pods[0].Addrs }, "pod pod5: 10.52.1.4 is an address of pod pod4 too"},
		{"zero", func(c *Config) { c.Pods[1].Addrs = make([]netip.Addr, 1) }, "not a plain address"},
		{"mapped", func(c *Config) { c.NodeAddrs[0] = prefix("::ffff:10.0.0.1/120") }, "not a plain address"},
		{"name", func(c *Config) { c.Pods[1].Name = "pod4" }, "pods need names of their own"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := testConfig()
			tt.edit(&cfg)
			err := cfg.validate()
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

// TestIPv4Only makes a box without IPv6, and many of them: nothing runs out.
func TestIPv4Only(t *testing.T) {
	requireRoot(t)
	cfg := testConfig()
	cfg.NodeAddrs, cfg.OutsideAddrs = cfg.NodeAddrs[:1], cfg.OutsideAddrs[:1]
	for i := range cfg.Pods {
		cfg.Pods[i].Addrs = cfg.Pods[i].Addrs[:1]
	}
	for range 5 {
		start := time.Now()
		b, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("made in %v", time.Since(start).Round(time.Millisecond))
		serve(t, place{"pod5", b.Pod("pod5"), nil})
		if name, seen, err := ask(b.Pod("pod4"), "tcp4", "10.52.1.5:8080"); err != nil || name != "pod5" || seen.String() != "10.52.1.4" {
			t.Errorf("answered by %q, seen as %v: %v", name, seen, err)
		}
		start = time.Now()
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		t.Logf("closed in %v", time.Since(start).Round(time.Millisecond))
	}
}
