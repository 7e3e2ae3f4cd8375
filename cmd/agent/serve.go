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
	"runtime/debug"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"github.com/natlens/natlens/internal/kubeapi"
	"github.com/natlens/natlens/internal/metrics"
	"github.com/natlens/natlens/internal/monitor"
	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/internal/version"
	"github.com/natlens/natlens/internal/web"
)

// serveOptions are the flags of serve.
type serveOptions struct {
	listen          string
	secure          secureOptions
	kube            kubeOptions
	interval        time.Duration
	conntrack       time.Duration
	grace           time.Duration
	echo            echoOptions
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
nonResourceURL /metrics, or on the path below /natlens.

In a pod, or with --kubeconfig, it also watches Services, EndpointSlices and its
Node, and tells where the rules differ from what the API wants.

It connects, once a second, to the ClusterIPs of Services with the label
natlens.io/echo: "true", and of those that --echo names, and tells whether the
answers are shared out as the rules say. Their pods are to be echo servers.`,
		Args: exactly(0, 0, "no argument"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := src.check(cmd); err != nil {
				return err
			}
			log, err := newLog(cmd.ErrOrStderr(), opts.logFormat)
			if err != nil {
				return err
			}
			if err := opts.check(&src); err != nil {
				return err
			}
			return serve(cmd.Context(), src, opts, log)
		},
	}
	opts.addFlags(cmd.Flags())
	src.addFlags(cmd.Flags())
	return cmd
}

func (o *serveOptions) addFlags(fs *pflag.FlagSet) {
	fs.StringVar(&o.listen, "listen", "127.0.0.1:9754", "`ADDRESS:PORT` to serve on, in plain HTTP")
	o.secure.addFlags(fs)
	o.kube.addFlags(fs)
	o.echo.addFlags(fs)
	fs.DurationVar(&o.grace, "grace", defaultGrace, "how long the rules may differ from what the API wants before that is a finding; longer than kube-proxy needs to follow")
	fs.DurationVar(&o.interval, "interval", 10*time.Second, "least pause between two readings of counters, which take a five-thousandth of the time at most, but are a minute old at most where somebody reads them, and else four, and of legacy tables; other changes are read at once")
	fs.DurationVar(&o.conntrack, "conntrack-interval", leastConntrack, "least pause between two looks at the tracked connections, and at whom session affinity binds, of which a fifth is enough after endpoints have gone; they take at most a hundredth of the time, and far less while nobody asks for the JSON or the page; 0 for none")
	fs.BoolVar(&o.endpointMetrics, "endpoint-metrics", false, "a metric series for each endpoint: very many on a large cluster")
	fs.StringVar(&o.logFormat, "log-format", "text", "text or json")
}

// check says what is wrong with the flags, before anything is read.
func (o *serveOptions) check(src *source) error {
	if o.interval < time.Second {
		return usageError{fmt.Errorf("--interval %v: at least 1s", o.interval)}
	}
	if o.conntrack < 0 || o.conntrack > 0 && o.conntrack < leastConntrack {
		return usageError{fmt.Errorf("--conntrack-interval %v: at least %v, or 0 for never", o.conntrack, leastConntrack)}
	}
	if o.grace < 0 {
		return usageError{fmt.Errorf("--grace %v: must not be negative", o.grace)}
	}
	if err := checkListen("--listen", o.listen); err != nil {
		return err
	}
	if err := o.secure.check(); err != nil {
		return err
	}
	if err := o.echo.check(src); err != nil {
		return err
	}
	for _, f := range src.files {
		if f == "-" {
			return usageError{errors.New("serve reads its files again and again, which stdin does not allow")}
		}
	}
	return nil
}

// leastConntrack bounds how often conntrack is looked at, which the kernel has to
// walk as a whole for that.
const leastConntrack = 10 * time.Second

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
	if err := giveWay(); err != nil {
		log.Warn("other programs have to wait for this one where processors are short", "error", err)
	}
	keeper := &snapshot.Keeper{Reader: reader, Node: about, Name: src.name, Backend: backend, Interval: opts.interval, Log: log}
	if r, ok := reader.(interface{ Moved() bool }); ok {
		keeper.Moved = r.Moved
		keeper.Sleep, keeper.Wake = newSleep()
	}
	if r, ok := reader.(interface{ First(chains []string) }); ok {
		keeper.First = r.First
	}
	keeper.Grace = opts.grace
	if len(src.files) == 0 && opts.conntrack > 0 {
		keeper.Flows, keeper.Pins, keeper.FlowPause = newFlowReader(), newPinReader(), opts.conntrack
	}
	watch, err := opts.compare(&src, keeper, log)
	if err != nil {
		return err
	}
	echo := opts.echo.monitor(&src, watch, opts.grace, log)
	if echo != nil {
		keeper.Echo = echo
	}
	ln, err := net.Listen("tcp", opts.listen)
	if err != nil {
		return fmt.Errorf("%w: choose another with --listen", err)
	}
	defer ln.Close()
	var secure *secureListener
	if opts.secure.listen != "" {
		if secure, err = opts.secure.open(&opts.kube, keeper.Name, log); err != nil {
			return err
		}
		defer secure.Close()
		log.Info("serving to whom Kubernetes lets", "address", secure.Addr().String())
	}
	log.Info("serving", "address", ln.Addr().String(), "version", version.Text())
	return serveOn(ctx, ln, secure, keeper, watch, echo, opts.endpointMetrics, log)
}

// defaultGrace is longer than kube-proxy waits after a sync that failed, and than
// a sync of a large cluster takes.
const defaultGrace = 30 * time.Second

// compare has the keeper compare with the API, where there is one to compare the
// kernel with. It returns what is to run for that; nil for nothing.
func (o *serveOptions) compare(src *source, keeper *snapshot.Keeper, log *slog.Logger) (*kubeapi.Watch, error) {
	if len(src.files) > 0 {
		return nil, nil
	}
	config, err := o.kube.config()
	if errors.Is(err, errNoAPI) {
		log.Info("not comparing with the Kubernetes API", "reason", err)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	watch, err := kubeapi.New(config, src.name, log)
	if err != nil {
		return nil, err
	}
	keeper.API = watch
	return watch, nil
}

// serveOn keeps the snapshot fresh and answers requests until the context
// ends; requests in flight finish. Whoever comes through the plain listener may
// read everything; secure, watch and echo, the keeper's monitor, may be nil.
func serveOn(ctx context.Context, plain net.Listener, secure *secureListener, keeper *snapshot.Keeper, watch *kubeapi.Watch, echo *monitor.Monitor, endpointMetrics bool, log *slog.Logger) error {
	registry := prometheus.NewPedanticRegistry()
	if watch != nil {
		latency := metrics.NewLatency()
		registry.MustRegister(latency)
		keeper.Followed = func(d time.Duration) { latency.Observe(d.Seconds()) }
	}
	registry.MustRegister(metrics.New(keeper, version.Text(), endpointMetrics),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	handler := web.NewHandler(web.Config{
		Source: keeper, Asked: keeper.Asked, Version: version.Text(), Log: log,
		Metrics: promhttp.HandlerFor(registry, promhttp.HandlerOpts{EnableOpenMetrics: true, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelError)}),
	})
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		keeper.Run(ctx)
		return nil
	})
	g.Go(func() error {
		giveBack(ctx, keeper.Changes, debug.FreeOSMemory)
		return nil
	})
	if watch != nil {
		g.Go(func() error {
			watch.Run(ctx)
			return nil
		})
	}
	if echo != nil {
		g.Go(func() error {
			echo.Run(ctx)
			return nil
		})
	}
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
