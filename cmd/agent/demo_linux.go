package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/natlens/natlens/internal/api"
	"github.com/natlens/natlens/internal/demo"
	"github.com/natlens/natlens/internal/render"
	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/netfilter"
)

// demoOptions are the flags of demo.
type demoOptions struct {
	listen   string
	duration time.Duration
	recorded bool
}

func newDemo() *cobra.Command {
	var opts demoOptions
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "A node in a box: real kernel rules, echo pods and traffic in a private network namespace",
		Long: `Demo makes a node in private network namespaces: the rules that kube-proxy would
write for a handful of Services, echo servers on the pod addresses, steady light
traffic, and the agent that reads it all. Nothing of the host changes, and all of
it ends with the program. It needs root, or a kernel that lets users make
namespaces, and the iptables programs. Where that is missing it says so, and shows
its rules as once recorded.`,
		Args: exactly(0, 0, "no argument"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			if opts.duration > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, opts.duration)
				defer cancel()
			}
			return runDemo(ctx, opts, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().StringVar(&opts.listen, "listen", "127.0.0.1:9754", "`ADDRESS:PORT` to serve on")
	cmd.Flags().DurationVar(&opts.duration, "duration", 0, "end after this time (default: at Ctrl-C)")
	cmd.Flags().BoolVar(&opts.recorded, "recorded", false, "show the demo's rules from a dump, without a kernel and without traffic")
	return cmd
}

func runDemo(ctx context.Context, opts demoOptions, stdout, stderr io.Writer) error {
	ln, err := demo.InheritedListener()
	if err != nil {
		return err
	}
	if ln == nil {
		if ln, err = net.Listen("tcp", opts.listen); err != nil {
			return fmt.Errorf("%w: choose another address with --listen", err)
		}
	}
	defer ln.Close()
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	if opts.recorded {
		return demoRecorded(ctx, ln, stdout, log)
	}
	if os.Geteuid() == 0 {
		err = demoLive(ctx, ln, stdout, log)
	} else {
		err = demo.RunAsOwnRoot(ctx, ln, stdout, stderr)
	}
	var cannot cannotRun
	switch {
	case ctx.Err() != nil:
		return nil
	case errors.As(err, &cannot):
	case err != nil && os.Geteuid() != 0:
		var exit interface{ ExitCode() int }
		if errors.As(err, &exit) {
			return errors.New("the demo ended: see above")
		}
		cannot = cannotRun{fmt.Errorf("a user namespace cannot be made (%w): run it as root", err)}
	default:
		return err
	}
	// Something to look at is better than nothing.
	fmt.Fprintf(stderr, "agent: the demo cannot run in this kernel: %v; here are its rules as once recorded, as with --recorded\n", cannot.error)
	return demoRecorded(ctx, ln, stdout, log)
}

// cannotRun is a reason why the demo cannot run on this machine.
type cannotRun struct{ error }

// Unwrap returns the reason.
func (c cannotRun) Unwrap() error { return c.error }

// demoLive runs the node in a box until the context ends.
func demoLive(ctx context.Context, ln net.Listener, stdout io.Writer, log *slog.Logger) error {
	// The pods end after the agent, so they have a context of their own.
	d, err := demo.Start(context.WithoutCancel(ctx))
	if err != nil {
		return cannotRun{err}
	}
	defer d.Close()
	reader := &kernelReader{}
	keeper := &snapshot.Keeper{Reader: d.Reader(reader), Moved: reader.Moved, Node: d.Node, Name: "demo", Interval: 2 * time.Second, Log: log}
	keeper.Flows, keeper.FlowPause, keeper.Grace = d.Flows(newFlowReader()), leastConntrack, defaultGrace
	echo := d.Echo(log)
	keeper.Echo = echo // before the first reading, which is served
	if err := keeper.Refresh(ctx); err != nil {
		return cannotRun{err}
	}
	fmt.Fprintf(stdout, "A node in a box: real rules in this machine's kernel (iptables-%s), pods that answer, and %s\n", d.Backend, "steady light traffic.")
	if err := demoIntro(stdout, ln, keeper.Snapshot()); err != nil {
		return err
	}
	go d.Traffic(ctx)
	if err := serveOn(ctx, ln, nil, keeper, nil, echo, true, log); err != nil {
		return err
	}
	fmt.Fprintln(stdout, "\nWhat the traffic did:")
	return d.Summary(stdout)
}

// demoRecorded serves the demo's rules as a dump.
func demoRecorded(ctx context.Context, ln net.Listener, stdout io.Writer, log *slog.Logger) error {
	keeper := &snapshot.Keeper{Reader: recorded{}, Node: demo.RecordedNode, Name: "demo", Backend: snapshot.BackendFile, Interval: 2 * time.Second, Log: log}
	if err := keeper.Refresh(ctx); err != nil {
		return err
	}
	fmt.Fprintln(stdout, "A node from a dump: the rules of the demo as recorded, without a kernel and without traffic.")
	if err := demoIntro(stdout, ln, keeper.Snapshot()); err != nil {
		return err
	}
	return serveOn(ctx, ln, nil, keeper, nil, nil, true, log)
}

type recorded struct{}

// Read implements snapshot.Reader.
func (recorded) Read(context.Context) (*netfilter.Ruleset, error) { return demo.Recorded() }

// demoIntro prints what there is to see, and what to try next.
func demoIntro(w io.Writer, ln net.Listener, s *snapshot.Snapshot) error {
	fmt.Fprintln(w)
	if err := render.Services(w, api.ServicesOf(s, api.Filter{})); err != nil {
		return err
	}
	base := "http://" + ln.Addr().String()
	_, err := fmt.Fprintf(w, `
Try next, in a browser or another terminal:
  %[1]s/
  curl -s %[1]s/api/v1/services/default/go-app
  curl -s '%[1]s/api/v1/trace?to=10.56.11.169:80&from=pod'
  curl -s %[1]s/api/v1/findings
  curl -s %[1]s/api/v1/echo
  curl -s %[1]s/metrics | grep ^natlens_
Ctrl-C ends it; nothing stays behind.
`, base)
	return err
}
