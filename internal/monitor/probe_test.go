package monitor

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/natlens/natlens/internal/echo"
)

// server answers each connection with a text, then closes it; "" waits.
func server(t *testing.T, text string) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				if text == "" {
					io.Copy(io.Discard, conn)
					return
				}
				conn.Read(make([]byte, 4096))
				io.WriteString(conn, text)
			}()
		}
	}()
	return netip.MustParseAddrPort(ln.Addr().String())
}

func here(f func() error) error { return f() }

func TestProbeResults(t *testing.T) {
	closed := func() netip.AddrPort {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		return netip.MustParseAddrPort(ln.Addr().String())
	}()
	for _, test := range []struct {
		name string
		to   netip.AddrPort
		want Result
	}{
		{"refused", closed, Refused},
		{"timeout", server(t, ""), TimedOut},
		{"another protocol", server(t, "SSH-2.0-OpenSSH_9.2\r\n"), OtherAnswer},
		{"not found", server(t, "HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}"), OtherAnswer},
		{"other JSON", server(t, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"), OtherAnswer},
		{"no JSON", server(t, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"), OtherAnswer},
		{"redirect", server(t, "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"), OtherAnswer},
		{"cut short", server(t, "HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n{"), Reset},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
			defer cancel()
			s := prober{here}.probe(ctx, test.to, func(netip.AddrPort) bool { return false }, false)
			if s.result != test.want || !s.source.IsLoopback() || s.end.Before(s.start) {
				t.Errorf("sample %+v, want %s", s, test.want)
			}
		})
	}
}

// TestProbeEcho asks the real echo server.
func TestProbeEcho(t *testing.T) {
	id := echo.Identity{Pod: "pod", Addresses: echo.FixedAddresses(netip.MustParseAddr("10.52.1.4"))}
	ts := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/json" || !r.Close {
			t.Errorf("request %s, close %t", r.URL, r.Close)
		}
		echo.NewHandler(id, echo.NewMetrics("test"), func() bool { return true }).ServeHTTP(w, r)
	}))
	defer ts.Close()
	to := netip.MustParseAddrPort(strings.TrimPrefix(ts.URL, "http://"))
	s := prober{here}.probe(t.Context(), to, func(a netip.AddrPort) bool { return a == to }, false)
	if s.result != Answered || s.endpoint != to {
		t.Errorf("sample %+v", s)
	}
}

func TestEndpointOf(t *testing.T) {
	port := func(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }
	route := []netip.AddrPort{port("10.52.1.4:8080"), port("10.52.1.5:8080"), port("[fd00::4]:8080")}
	knows := func(a netip.AddrPort) bool {
		for _, e := range route {
			if a == e {
				return true
			}
		}
		return false
	}
	addrs := []netip.Addr{netip.MustParseAddr("10.52.1.4"), netip.MustParseAddr("192.0.2.1")}
	for _, test := range []struct {
		answer echo.Answer
		want   netip.AddrPort
	}{
		{echo.Answer{Local: port("10.52.1.5:8080"), Addresses: addrs}, port("10.52.1.5:8080")},
		{echo.Answer{Local: port("127.0.0.6:8080"), Addresses: addrs}, port("10.52.1.4:8080")},
		{echo.Answer{Local: port("127.0.0.6:9999"), Addresses: addrs}, netip.AddrPort{}},
		{echo.Answer{Local: port("127.0.0.6:8080"), Addresses: append(addrs, netip.MustParseAddr("10.52.1.5"))}, netip.AddrPort{}},
	} {
		if got := endpointOf(test.answer, knows); got != test.want {
			t.Errorf("%+v is of %v, want %v", test.answer, got, test.want)
		}
	}
}

// TestWithin: what cannot be done is no answer.
func TestWithin(t *testing.T) {
	s := prober{func(func() error) error { return errors.New("no such namespace") }}.probe(t.Context(), front, func(netip.AddrPort) bool { return false }, true)
	if s.result != Failed || s.endpoint.IsValid() || s.nowhere {
		t.Errorf("sample %+v", s)
	}
}
