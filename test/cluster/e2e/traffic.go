package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/natlens/natlens/test/cluster/kube"
)

// client is somewhere where connections come from.
type client struct {
	name  string
	class string // natlens's word for such sources
	kube.Netns
	addrs []netip.Addr // to connect from, one of each family; none: what the kernel chooses
}

// What a connection can meet besides an endpoint.
const (
	refused  = "refused"
	silence  = "no answer"
	notTaken = "not taken by any rule"
)

// patience is how long an answer may take on this busy machine; one that is not
// expected to come is waited for less.
const (
	patience      = 10 * time.Second
	patienceDrops = time.Second
	soon          = 3 * time.Second // after the first repetition at the latest: a kernel may be too busy connecting to be told
)

// met is what a connection met.
type met struct {
	what   string     // an endpoint's address and port, or one of the above
	client netip.Addr // the client's address as it sees it
	remote netip.Addr // and as the endpoint does
}

// connect makes a connection, and reads the echo server's answer. It has to be
// called inside the client's namespace.
func (c *client) connect(network string, to netip.AddrPort, patience time.Duration) (met, error) {
	dialer := net.Dialer{Timeout: patience}
	if c.addrs != nil {
		from := c.addrs[0]
		if to.Addr().Is6() {
			from = c.addrs[1]
		}
		dialer.LocalAddr = localAddr(network, from)
	}
	start := time.Now()
	conn, err := dialer.Dial(network, to.String())
	if err != nil {
		return failure(err, start)
	}
	defer conn.Close()
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // leave no state behind
	}
	_ = conn.SetDeadline(start.Add(patience))
	if _, err := io.WriteString(conn, "GET /json HTTP/1.0\r\n\r\n"); err != nil {
		return failure(err, start)
	}
	var answer []byte
	if network == "tcp" {
		answer, err = io.ReadAll(conn)
	} else {
		answer = make([]byte, 2000)
		var n int
		n, err = conn.Read(answer)
		answer = answer[:n]
	}
	if err != nil {
		return failure(err, start)
	}
	if _, body, ok := strings.Cut(string(answer), "\r\n\r\n"); ok {
		answer = []byte(body)
	}
	var doc echoDoc
	if err := json.Unmarshal(answer, &doc); err != nil {
		return met{}, fmt.Errorf("no echo server's answer: %q", answer)
	}
	client := netip.MustParseAddrPort(conn.LocalAddr().String())
	return met{doc.Local.String(), client.Addr(), doc.Remote.Addr()}, nil
}

func localAddr(network string, a netip.Addr) net.Addr {
	if network == "tcp" {
		return &net.TCPAddr{IP: a.AsSlice()}
	}
	return &net.UDPAddr{IP: a.AsSlice()}
}

func failure(err error, start time.Time) (met, error) {
	var timeout net.Error
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		if took := time.Since(start); took > soon {
			return met{}, fmt.Errorf("refused, but only after %v", took)
		}
		return met{what: refused}, nil
	case errors.As(err, &timeout) && timeout.Timeout():
		return met{what: silence}, nil
	}
	return met{}, err
}

// expectation is what natlens says that connections meet.
type expectation struct {
	shares map[string]float64 // of endpoints, or of what else they meet
	masq   map[string]bool    // by endpoint: whether it sees the node's address
}

// expect reads a route.
func expect(r routeDoc) expectation {
	e := expectation{map[string]float64{}, map[string]bool{}}
	for _, ep := range r.Endpoints {
		e.shares[ep.Address] += ep.Share
		e.masq[ep.Address] = r.Masquerade
		if ep.Masquerade != nil {
			e.masq[ep.Address] = *ep.Masquerade
		}
	}
	none := r.Undelivered - r.Rejected - r.Dropped
	for what, share := range map[string]float64{refused: r.Rejected, silence: r.Dropped, notTaken: none} {
		if share > 1e-9 {
			e.shares[what] = share
		}
	}
	return e
}

// size is how many connections tell whether the expectation is true.
func (e expectation) size() int {
	switch n := len(e.shares); {
	case e.shares[silence] == 1:
		return 2
	case n == 1:
		return 5
	case n < 10:
		return 30 * n
	default:
		return 10 * n
	}
}

// sample makes n connections, one after the other, and returns how many met what.
// The error says what natlens did not foretell.
func (c *client) sample(network string, to netip.AddrPort, e expectation, n int, nodeAddrs []netip.Addr) (map[string]int, error) {
	counts := map[string]int{}
	wait := patience
	if e.shares[silence] > 0 || e.shares[notTaken] > 0 {
		wait = patienceDrops
	}
	err := c.Do(func() error {
		for range n {
			m, err := c.connect(network, to, wait)
			if err != nil {
				return err
			}
			if e.shares[m.what] == 0 && e.shares[notTaken] > 0 && (m.what == refused || m.what == silence) {
				m.what = notTaken // the node itself has nobody who listens
			}
			counts[m.what]++
			if e.shares[m.what] == 0 {
				return fmt.Errorf("met %s", m.what)
			}
			if err := e.checkSource(m, nodeAddrs); err != nil {
				return err
			}
		}
		return nil
	})
	return counts, err
}

// checkSource compares who the endpoint took for the client.
func (e expectation) checkSource(m met, nodeAddrs []netip.Addr) error {
	masq, known := e.masq[m.what]
	switch {
	case !known:
		return nil
	case masq && !slices.Contains(nodeAddrs, m.remote):
		return fmt.Errorf("%s was reached from %s, which is not the node's; masqueraded according to natlens", m.what, m.remote)
	case !masq && m.remote != m.client:
		return fmt.Errorf("%s was reached from %s, and not from the client's %s; not masqueraded according to natlens", m.what, m.remote, m.client)
	}
	return nil
}

// pValue returns how likely a sample is to be as far from the shares as this one,
// or farther, by chance (Pearson's chi-square test).
func (e expectation) pValue(counts map[string]int) float64 {
	n, x := 0, 0.0
	for _, c := range counts {
		n += c
	}
	for what, share := range e.shares {
		want := float64(n) * share
		x += math.Pow(float64(counts[what])-want, 2) / want
	}
	return chiSquareTail(x, len(e.shares)-1)
}
