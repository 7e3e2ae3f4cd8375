package echo

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// Limits on one connection. A request is a line and a few headers, so all of
// them are far above what an honest client needs and exist to bound what the
// others can hold.
const (
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 10 * time.Second
	writeTimeout      = 10 * time.Second
	idleTimeout       = 30 * time.Second
	maxHeaderBytes    = 8 << 10

	defaultShutdownTimeout = 10 * time.Second
)

// Config is what [Run] needs.
type Config struct {
	Listener net.Listener // HTTP; closed by Run
	Packets  *net.UDPConn // UDP; closed by Run. Nil: HTTP only
	Identity Identity
	Version  string // label of natlens_echo_build_info

	// Drain is how long the server goes on after it stopped being ready, so
	// that every node can withdraw the endpoint first. Zero: not at all.
	Drain time.Duration

	// ShutdownTimeout bounds the wait for requests in flight after Drain.
	// Zero: 10 s.
	ShutdownTimeout time.Duration

	Log *slog.Logger // nil: no log
}

// Listen opens the two sockets of a server on address, as in ":8080". Both get
// the same port, also if the address asks for port 0. The caller closes them,
// or hands them to [Run].
func Listen(ctx context.Context, address string) (net.Listener, *net.UDPConn, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, nil, err
	}
	tcp, ok := ln.Addr().(*net.TCPAddr)
	if !ok {
		_ = ln.Close() // nothing was accepted on it
		return nil, nil, fmt.Errorf("listening on %s: unexpected address type %T", address, ln.Addr())
	}
	conn, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(tcp.AddrPort()))
	if err != nil {
		_ = ln.Close() // the caller needs to hear of the port, not of this
		return nil, nil, err
	}
	return ln, conn, nil
}

// Run serves until ctx is done and then stops gracefully: /readyz turns to 503
// at once, everything else goes on for cfg.Drain, then no more connections or
// datagrams are taken and Run returns when the requests in flight have their
// answer. The result is nil, unless a socket failed or a request outlived
// cfg.ShutdownTimeout. A socket that fails ends the whole server, since a
// replica that answers on one protocol only would look like an uneven Service.
func Run(ctx context.Context, cfg Config) error {
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	metrics := NewMetrics(cfg.Version)
	var stopping atomic.Bool
	srv := &http.Server{
		Handler:           NewHandler(cfg.Identity, metrics, func() bool { return !stopping.Load() }),
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}

	// The end of ctx starts the stop and must not cut it short, so the group
	// has a context that only the failure of a socket ends.
	g, failed := errgroup.WithContext(context.WithoutCancel(ctx))
	serving, stopPackets := context.WithCancel(failed)
	defer stopPackets()

	g.Go(func() error {
		if err := srv.Serve(cfg.Listener); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serving HTTP: %w", err)
		}
		return nil
	})
	if cfg.Packets != nil {
		g.Go(func() error {
			if err := ServeUDP(serving, cfg.Packets, cfg.Identity, metrics); err != nil {
				return fmt.Errorf("serving UDP: %w", err)
			}
			return nil
		})
	}
	g.Go(func() error {
		select {
		case <-ctx.Done():
			stopping.Store(true)
			log.Info("stopping", "drain", cfg.Drain)
			wait(failed, cfg.Drain)
		case <-failed.Done():
			stopping.Store(true)
		}
		stopPackets()
		return shutdown(context.WithoutCancel(ctx), srv, cfg.ShutdownTimeout)
	})
	return g.Wait()
}

// shutdown lets the requests in flight finish, for at most timeout.
func shutdown(ctx context.Context, srv *http.Server, timeout time.Duration) error {
	if timeout <= 0 {
		timeout = defaultShutdownTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil {
		_ = srv.Close() // cuts the connections that the error is about
		return fmt.Errorf("waiting for requests in flight: %w", err)
	}
	return nil
}

// wait returns after d, or earlier if ctx ends.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
