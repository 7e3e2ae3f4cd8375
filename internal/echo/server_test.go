package echo

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// pipeListener hands out in-memory connections. A synctest bubble can tell when
// everybody waits on those, which it cannot with sockets; that makes time in
// these tests a value instead of a hope.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error   { close(l.closed); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "pipe"} }

// request returns a client's whole exchange on a connection of its own.
func (l *pipeListener) request(path string) (code int, body string, err error) {
	client, server := net.Pipe()
	defer client.Close()
	select {
	case l.conns <- server:
	case <-l.closed:
		return 0, "", errors.New("connection refused")
	}
	if _, err := fmt.Fprintf(client, "GET %s HTTP/1.1\r\nHost: echo\r\nConnection: close\r\n\r\n", path); err != nil {
		return 0, "", err
	}
	resp, err := http.ReadResponse(bufio.NewReader(client), nil)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// slowIdentity answers only once release is closed; the first request to wait
// closes entered.
func slowIdentity(entered chan<- struct{}, release <-chan struct{}) Identity {
	return Identity{Addresses: func() []netip.Addr {
		close(entered)
		<-release
		return []netip.Addr{netip.MustParseAddr("10.52.1.4")}
	}}
}

func TestRunStopsGracefully(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const drain = 2 * time.Second
		ln := newPipeListener()
		entered, release := make(chan struct{}), make(chan struct{})
		ctx, cancel := context.WithCancel(t.Context())
		stopped := make(chan error, 1)
		go func() {
			stopped <- Run(ctx, Config{Listener: ln, Identity: slowIdentity(entered, release), Drain: drain})
		}()
		expect := func(path string, want int) {
			t.Helper()
			code, _, err := ln.request(path)
			if err != nil || code != want {
				t.Errorf("GET %s at %v: %d, %v, want %d", path, time.Now(), code, err, want)
			}
		}
		expect("/readyz", 200)

		type result struct {
			code int
			body string
			err  error
		}
		slow := make(chan result, 1)
		go func() {
			code, body, err := ln.request("/")
			slow <- result{code, body, err}
		}()
		<-entered

		cancel()
		begin := time.Now()
		synctest.Wait()
		expect("/readyz", 503)
		expect("/healthz", 200)
		expect("/metrics", 200) // not an echo answer, but served as one would be

		<-ln.closed
		if got := time.Since(begin); got != drain {
			t.Errorf("stopped to accept after %v, want %v", got, drain)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		select {
		case err := <-stopped:
			t.Errorf("stopped with a request in flight: %v", err)
		default:
		}

		close(release)
		if got, want := <-slow, (result{code: 200, body: "10.52.1.4\n"}); got != want {
			t.Errorf("request in flight: %+v, want %+v", got, want)
		}
		if err := <-stopped; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestRunGivesUpOnStuckRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newPipeListener()
		entered, release := make(chan struct{}), make(chan struct{})
		defer close(release)
		ctx, cancel := context.WithCancel(t.Context())
		stopped := make(chan error, 1)
		go func() {
			stopped <- Run(ctx, Config{Listener: ln, Identity: slowIdentity(entered, release), ShutdownTimeout: 3 * time.Second})
		}()
		go ln.request("/") //nolint:errcheck // never answered
		<-entered
		begin := time.Now()
		cancel()
		err := <-stopped
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Run: %v, want a deadline error", err)
		}
		if got := time.Since(begin); got != 3*time.Second {
			t.Errorf("gave up after %v, want 3s", got)
		}
	})
}

// failingListener is a socket that dies.
type failingListener struct{ *pipeListener }

func (failingListener) Accept() (net.Conn, error) { return nil, errors.New("accept failed") }

func TestRunEndsWithItsSockets(t *testing.T) {
	conn := listenUDP(t, "udp4", "127.0.0.1:0")
	err := Run(t.Context(), Config{Listener: failingListener{newPipeListener()}, Packets: conn, Drain: time.Hour})
	if err == nil || !strings.Contains(err.Error(), "accept failed") {
		t.Errorf("Run: %v, want the error of the listener", err)
	}
	if err := conn.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the UDP socket was left open: %v", err)
	}

	closed := listenUDP(t, "udp4", "127.0.0.1:0")
	closed.Close()
	ln := newPipeListener()
	err = Run(t.Context(), Config{Listener: ln, Packets: closed, Drain: time.Hour})
	if err == nil || !strings.HasPrefix(err.Error(), "serving UDP: ") {
		t.Errorf("Run: %v, want the error of the UDP socket", err)
	}
	<-ln.closed
}

// TestRunOnSockets is the whole server: both protocols on one port, both
// families.
func TestRunOnSockets(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "::1"} {
		t.Run(host, func(t *testing.T) {
			listenUDP(t, "udp", netip.AddrPortFrom(netip.MustParseAddr(host), 0).String()).Close()
			ln, conn, err := Listen(t.Context(), net.JoinHostPort(host, "0"))
			if err != nil {
				t.Fatal(err)
			}
			server := boundAddr(conn)
			if server.String() != ln.Addr().String() {
				t.Fatalf("UDP on %v, TCP on %v", server, ln.Addr())
			}
			ctx, cancel := context.WithCancel(t.Context())
			stopped := make(chan error, 1)
			go func() {
				stopped <- Run(ctx, Config{Listener: ln, Packets: conn, Identity: testIdentity(), Version: "v1"})
			}()

			tcp := overHTTP(t, server)
			client := listenUDP(t, "udp", netip.AddrPortFrom(server.Addr(), 0).String())
			defer client.Close()
			b, _ := exchange(t, client, server, nil)
			var udp Answer
			if err := json.Unmarshal(b, &udp); err != nil {
				t.Fatal(err)
			}
			udp.Remote = tcp.Remote // another socket
			if diff := cmp.Diff(tcp, udp, addrOpts()); diff != "" {
				t.Errorf("answers of the two protocols differ (-HTTP +UDP)\n%s", diff)
			}

			cancel()
			if err := <-stopped; err != nil {
				t.Errorf("Run: %v", err)
			}
		})
	}
}

func overHTTP(t *testing.T, server netip.AddrPort) Answer {
	t.Helper()
	resp, err := http.Get("http://" + server.String() + "/json")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var a Answer
	if err := json.NewDecoder(resp.Body).Decode(&a); err != nil {
		t.Fatal(err)
	}
	return a
}

func TestListenReportsPortInUse(t *testing.T) {
	ln, conn, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if _, _, err := Listen(t.Context(), ln.Addr().String()); err == nil {
		t.Error("the same address twice, want an error")
	}
	// Also when only the UDP half is taken; the TCP half must be free again.
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Listen(t.Context(), ln.Addr().String()); err == nil {
		t.Error("the UDP port is taken, want an error")
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	ln, conn, err = Listen(t.Context(), ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	ln.Close()
}
