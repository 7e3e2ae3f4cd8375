package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/natlens/natlens/internal/metrics"
	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/internal/version"
	"github.com/natlens/natlens/internal/web"
)

// serveOptions are the flags of serve.
type serveOptions struct {
	listen          string
	secure          secureOptions
	interval        time.Duration
	endpointMetrics bool
	logFormat       string
}

func newServe() *cobra.Command {
	var src source
	var opts serveOptions
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "The node agent: JSON, metrics and a page over HTTP",
		Long: `Serve reads the rules again and again, and serves what they mean over HTTP. It
listens on loopback unless told otherwise: the rules map the whole cluster.

With --secure-listen it also listens for the network: with TLS, and for callers
alone who bring a bearer token to whose owner a ClusterRole grants "get" on the
nonResourceURL /metrics, or on the path below /natlens.`,
		Args: exactly(0, 0, "no argument"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := src.check(cmd); err != nil {
				return err
			}
			log, err := newLog(cmd.ErrOrStderr(), opts.logFormat)
			if err != nil {
				return err
			}
			if opts.interval < time.Second {
				return usageError{fmt.Errorf("--interval %v: at least 1s", opts.interval)}
			}
			if err := checkListen("--listen", opts.listen); err != nil {
				return err
			}
			if err := opts.secure.check(); err != nil {
				return err
			}
			for _, f := range src.files {
				if f == "-" {
					return usageError{errors.New("serve reads its files again and again, which stdin does not allow")}
				}
			}
			return serve(cmd.Context(), src, opts, log)
		},
	}
	fs := cmd.Flags()
	fs.StringVar(&opts.listen, "listen", "127.0.0.1:9754", "`ADDRESS:PORT` to serve on, in plain HTTP")
	opts.secure.addFlags(fs)
	fs.DurationVar(&opts.interval, "interval", 10*time.Second, "pause between two readings of counters, and of legacy tables; other changes are read at once")
	fs.BoolVar(&opts.endpointMetrics, "endpoint-metrics", false, "a metric series for each endpoint: very many on a large cluster")
	fs.StringVar(&opts.logFormat, "log-format", "text", "text or json")
	src.addFlags(fs)
	return cmd
}

// checkListen tells a wrong address from one that is only taken.
func checkListen(flag, address string) error {
	_, port, err := net.SplitHostPort(address)
	if err == nil {
		_, err = net.LookupPort("tcp", port)
	}
	if err != nil {
		return usageError{fmt.Errorf("%s %q: want ADDRESS:PORT", flag, address)}
	}
	return nil
}

func newLog(w io.Writer, format string) (*slog.Logger, error) {
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w, nil)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, nil)), nil
	}
	return nil, usageError{fmt.Errorf("--log-format %q: want text or json", format)}
}

func serve(ctx context.Context, src source, opts serveOptions, log *slog.Logger) error {
	reader, backend, about, err := src.open()
	if err != nil {
		return err
	}
	if len(src.files) > 0 {
		// A dump that cannot be read now is a slip on the command line, so say
		// it at once. The kernel may be readable in a moment: there, readiness
		// and the log tell, and the agent keeps trying.
		if _, err := reader.Read(ctx); err != nil {
			return err
		}
	}
	keeper := &snapshot.Keeper{Reader: reader, Node: about, Name: src.name, Backend: backend, Interval: opts.interval, Log: log}
	if r, ok := reader.(interface{ Moved() bool }); ok {
		keeper.Moved = r.Moved
	}
	ln, err := net.Listen("tcp", opts.listen)
	if err != nil {
		return fmt.Errorf("%w: choose another with --listen", err)
	}
	defer ln.Close()
	var secure *secureListener
	if opts.secure.listen != "" {
		if secure, err = opts.secure.open(keeper.Name, log); err != nil {
			return err
		}
		defer secure.Close()
		log.Info("serving to whom Kubernetes lets", "address", secure.Addr().String())
	}
	log.Info("serving", "address", ln.Addr().String(), "version", version.Text())
	return serveOn(ctx, ln, secure, keeper, opts.endpointMetrics, log)
}

// serveOn keeps the snapshot fresh and answers requests until the context
// ends; requests in flight finish. Whoever comes through the plain listener may
// read everything; secure may be nil.
func serveOn(ctx context.Context, plain net.Listener, secure *secureListener, keeper *snapshot.Keeper, endpointMetrics bool, log *slog.Logger) error {
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(metrics.New(keeper, version.Text(), endpointMetrics),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	handler := web.NewHandler(web.Config{
		Source: keeper, Version: version.Text(), Log: log,
		Metrics: promhttp.HandlerFor(registry, promhttp.HandlerOpts{EnableOpenMetrics: true, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelError)}),
	})
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		keeper.Run(ctx)
		return nil
	})
	g.Go(func() error { return serveUntil(ctx, plain, handler, log) })
	if secure != nil {
		g.Go(func() error { return serveUntil(ctx, secure, web.Authorize(handler, secure.gate.Check), log) })
		g.Go(func() error {
			secure.keepCertificate(ctx)
			return nil
		})
	}
	g.Go(func() error {
		<-ctx.Done()
		log.Info("stopping")
		return nil
	})
	return g.Wait()
}

// serveUntil answers requests until the context ends; those in flight finish.
func serveUntil(ctx context.Context, ln net.Listener, handler http.Handler, log *slog.Logger) error {
	// base ends the event streams, which Shutdown would wait for.
	base, end := context.WithCancel(context.Background())
	defer end()
	server := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 5 * time.Second, // and a TLS handshake
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      time.Minute,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		BaseContext:       func(net.Listener) context.Context { return base },
		ErrorLog:          newServerLog(log),
	}
	stopped := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		end()
		const patience = 5 * time.Second
		last, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		err := server.Shutdown(last)
		if err != nil {
			err = server.Close() // a client that does not read its answer
		}
		stopped <- err
	})
	if err := server.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		stop()
		return err
	}
	return <-stopped
}

// newServerLog returns the log of a server. Anybody can fail a TLS handshake as
// often as he likes, so those are not warned of.
func newServerLog(to *slog.Logger) *log.Logger {
	return log.New(serverLog{to}, "", 0)
}

type serverLog struct{ to *slog.Logger }

// Write implements [io.Writer]; the server writes a line at a time.
func (l serverLog) Write(line []byte) (int, error) {
	level := slog.LevelWarn
	if bytes.Contains(line, []byte("TLS handshake error")) {
		level = slog.LevelDebug
	}
	l.to.Log(context.Background(), level, strings.TrimSpace(string(line)))
	return len(line), nil
}
