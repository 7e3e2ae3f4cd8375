package echo

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// answerTimeout only bounds a failing test; a passing one never waits for it.
const answerTimeout = 10 * time.Second

// listenUDP skips the test where the address family is missing.
func listenUDP(t *testing.T, network, address string) *net.UDPConn {
	t.Helper()
	conn, err := net.ListenUDP(network, net.UDPAddrFromAddrPort(netip.MustParseAddrPort(address)))
	if err != nil {
		t.Skipf("no such socket here: %v", err)
	}
	return conn
}

// startUDP serves on conn until the test ends and returns the port.
func startUDP(t *testing.T, conn *net.UDPConn, id Identity, m *Metrics) uint16 {
	t.Helper()
	port := boundAddr(conn).Port()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- ServeUDP(ctx, conn, id, m) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("ServeUDP: %v", err)
		}
	})
	return port
}

// exchange sends payload to a server and returns the answer and its source.
func exchange(t *testing.T, client *net.UDPConn, server netip.AddrPort, payload []byte) ([]byte, netip.AddrPort) {
	t.Helper()
	if err := client.SetDeadline(time.Now().Add(answerTimeout)); err != nil {
		t.Fatal(err)
	}
	if _, err := client.WriteToUDPAddrPort(payload, server); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<16)
	n, from, err := client.ReadFromUDPAddrPort(buf)
	if err != nil {
		t.Fatalf("no answer from %v: %v", server, err)
	}
	return buf[:n], unmap(from)
}

func TestServeUDP(t *testing.T) {
	tests := []struct {
		name, network, listen string
		client, target        string // addresses
	}{
		{"bound IPv4", "udp4", "127.0.0.1:0", "127.0.0.1", "127.0.0.1"},
		{"bound IPv6", "udp6", "[::1]:0", "::1", "::1"},
		{"IPv4 wildcard", "udp4", "0.0.0.0:0", "127.0.0.1", "127.0.0.1"},
		// Left to itself the kernel answers these from 127.0.0.1.
		{"IPv4 wildcard, other address", "udp4", "0.0.0.0:0", "127.0.0.1", "127.0.0.2"},
		{"dual-stack wildcard, other address", "udp", "[::]:0", "127.0.0.1", "127.0.0.2"},
		{"dual-stack wildcard, IPv6", "udp", "[::]:0", "::1", "::1"},
		{"IPv6 wildcard", "udp6", "[::]:0", "::1", "::1"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := NewMetrics("v1")
			port := startUDP(t, listenUDP(t, tt.network, tt.listen), testIdentity(), m)
			client := listenUDP(t, "udp", netip.AddrPortFrom(netip.MustParseAddr(tt.client), 0).String())
			defer client.Close()
			server := netip.AddrPortFrom(netip.MustParseAddr(tt.target), port)

			for _, payload := range [][]byte{nil, []byte("hello"), bytes.Repeat([]byte("x"), 2*maxDatagram)} {
				b, from := exchange(t, client, server, payload)
				if from != server {
					t.Errorf("answer from %v, want %v", from, server)
				}
				var got Answer
				if err := json.Unmarshal(b, &got); err != nil {
					t.Fatal(err)
				}
				want := testIdentity().answer(server, boundAddr(client))
				if diff := cmp.Diff(want, got, addrOpts()); diff != "" {
					t.Errorf("answer (-want +got)\n%s", diff)
				}
			}
			if got := testutil.ToFloat64(m.udpRequests); got != 3 {
				t.Errorf("%v requests counted, want 3", got)
			}
			if got := testutil.ToFloat64(m.udpSendErrors); got != 0 {
				t.Errorf("%v send errors counted, want 0", got)
			}
		})
	}
}

// A client may be quicker than the server: what the socket holds when ServeUDP
// begins was received before anyone asked for destinations.
func TestServeUDPAnswersEarlyDatagram(t *testing.T) {
	for _, network := range []string{"udp4", "udp"} {
		t.Run(network, func(t *testing.T) {
			listen := "0.0.0.0:0"
			if network == "udp" {
				listen = "[::]:0"
			}
			conn := listenUDP(t, network, listen)
			client := listenUDP(t, "udp4", "127.0.0.1:0")
			defer client.Close()
			server := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.2"), boundAddr(conn).Port())
			if _, err := client.WriteToUDPAddrPort([]byte("early"), server); err != nil {
				t.Fatal(err)
			}
			startUDP(t, conn, testIdentity(), NewMetrics("v1"))

			if err := client.SetDeadline(time.Now().Add(answerTimeout)); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, maxDatagram)
			n, from, err := client.ReadFromUDPAddrPort(buf)
			if err != nil {
				t.Fatal(err)
			}
			var got Answer
			if err := json.Unmarshal(buf[:n], &got); err != nil {
				t.Fatal(err)
			}
			if unmap(from) != server || got.Local != server {
				t.Errorf("answer from %v, local %v, want %v", from, got.Local, server)
			}
		})
	}
}

// Two servers must not answer each other's answers for ever. Datagrams between
// the same two sockets of a loopback interface arrive in order, so that the
// count after the second shows that the first was dropped.
func TestServeUDPIgnoresAnswers(t *testing.T) {
	m := NewMetrics("v1")
	port := startUDP(t, listenUDP(t, "udp4", "127.0.0.1:0"), testIdentity(), m)
	client := listenUDP(t, "udp4", "127.0.0.1:0")
	defer client.Close()
	server := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)

	answer, _ := exchange(t, client, server, []byte("hello"))
	if _, err := client.WriteToUDPAddrPort(answer, server); err != nil {
		t.Fatal(err)
	}
	exchange(t, client, server, []byte("hello"))
	if got := testutil.ToFloat64(m.udpRequests); got != 2 {
		t.Errorf("%v requests counted, want 2: the answer was answered", got)
	}
}

func TestServeUDPReportsFailure(t *testing.T) {
	conn := listenUDP(t, "udp4", "127.0.0.1:0")
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	if err := ServeUDP(t.Context(), conn, Identity{}, NewMetrics("v1")); err == nil {
		t.Error("no error from a closed socket")
	}
}

func TestDatagramIsBounded(t *testing.T) {
	var addrs []netip.Addr
	for i := range 5000 { // a node that carries its Service addresses on an interface
		addrs = append(addrs, netip.MustParseAddr(fmt.Sprintf("10.56.%d.%d", i/250, i%250)))
	}
	a := Identity{Hostname: "node1", Addresses: FixedAddresses(addrs...)}.answer(netip.AddrPort{}, netip.AddrPort{})
	b, err := datagram(a)
	if err != nil {
		t.Fatal(err)
	}
	var got Answer
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if len(b) > maxDatagram || len(got.Addresses) == 0 {
		t.Errorf("%d bytes with %d addresses, want some addresses in at most %d", len(b), len(got.Addresses), maxDatagram)
	}
}
