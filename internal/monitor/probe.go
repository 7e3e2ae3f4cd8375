package monitor

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/natlens/natlens/internal/echo"
)

// probeTimeout bounds a probe as a whole: long enough for a first packet that is
// lost and sent again after a second.
const probeTimeout = 2 * time.Second

// mostAnswer bounds what is read of an answer.
const mostAnswer = 64 << 10

// prober makes probes from a network namespace, into which within brings a function.
type prober struct{ within func(func() error) error }

// probe makes one connection and tells what became of it. With listen, it hears
// which endpoint was chosen also where that refuses.
func (p prober) probe(ctx context.Context, to netip.AddrPort, knows func(netip.AddrPort) bool, listen bool) sample {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	s := sample{start: time.Now()}
	var d dialed
	answer, err := ask(ctx, to, func(ctx context.Context) (net.Conn, error) {
		err := p.within(func() (err error) {
			d, err = dial(ctx, to, listen)
			return err
		})
		return d.Conn, err
	})
	s.end = time.Now()
	s.took, s.source, s.result = s.end.Sub(s.start), d.local.Addr(), resultOf(err)
	if s.result == Answered {
		if s.endpoint = endpointOf(answer, knows); knows(s.endpoint) {
			return s
		}
	}
	// Nobody told, or somebody whom the rules do not choose: a proxy in the pod
	// would have the answer say so. What nat did is what counts.
	s.endpoint = d.chosen
	if !s.endpoint.IsValid() && d.local.IsValid() {
		_ = p.within(func() (err error) { // an error: it stays unknown
			s.endpoint, err = chosen(d.local, to)
			return err
		})
	}
	if s.endpoint == to { // nat did nothing
		s.endpoint, s.nowhere = netip.AddrPort{}, true
	}
	return s
}

// endpointOf tells which endpoint an answer is from: the address that the server
// was reached at, or, where that is not one of the route's, as with a proxy in the
// pod, the only one of the route's that the pod has.
func endpointOf(a echo.Answer, knows func(netip.AddrPort) bool) netip.AddrPort {
	if knows(a.Local) {
		return a.Local
	}
	var found netip.AddrPort
	for _, addr := range a.Addresses {
		if e := netip.AddrPortFrom(addr, a.Local.Port()); knows(e) && e != found {
			if found.IsValid() {
				return netip.AddrPort{}
			}
			found = e
		}
	}
	return found
}

// errNotEcho says that an answer is not one of an echo server.
var errNotEcho = errors.New("not an echo server's answer")

// ask sends one request over one new connection. It is no http.Client, whose errors
// do not tell a server that hangs up from one that speaks another protocol.
func ask(ctx context.Context, to netip.AddrPort, dial func(context.Context) (net.Conn, error)) (answer echo.Answer, err error) {
	conn, err := dial(ctx)
	if err != nil {
		return answer, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })() // in the past: wakes what waits
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+to.String()+"/json", nil)
	if err != nil {
		return answer, err
	}
	req.Close = true // the connection carries one answer
	req.Header.Set("User-Agent", "natlens")
	if err := req.Write(conn); err != nil {
		return answer, err
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), req)
	if err != nil {
		return answer, ended(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, mostAnswer))
	if err != nil {
		return answer, ended(err)
	}
	if err := json.Unmarshal(body, &answer); err != nil || res.StatusCode != http.StatusOK || !answer.Local.IsValid() {
		return answer, errNotEcho
	}
	return answer, nil
}

// ended tells a connection that ended early from an answer that is not HTTP.
func ended(err error) error {
	var op *net.OpError
	if errors.As(err, &op) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return err
	}
	return errNotEcho
}

// resultOf classifies what went wrong.
func resultOf(err error) Result {
	switch {
	case err == nil:
		return Answered
	case errors.Is(err, errNotEcho):
		return OtherAnswer
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT):
		return TimedOut
	case errors.Is(err, syscall.ECONNREFUSED):
		return Refused
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return Reset
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return NoRoute
	}
	return Failed
}
