// Command echo answers HTTP and UDP requests with who it is and which addresses
// it has, so that a client can see where a Service sends its connections.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/natlens/natlens/internal/echo"
	"github.com/natlens/natlens/internal/version"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the drain at once
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run is the command without the process: it returns 0, 1 for a failure or 2
// for wrong usage, and an error is one line on stderr.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	opts, err := parse(args, stdout)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintf(stderr, "echo: %v\n", err)
		return 2
	case opts.version:
		fmt.Fprintf(stdout, "echo %s %s\n", version.Text(), runtime.Version())
		return 0
	}
	if err := serve(ctx, opts.listen, opts.drain, slog.New(slog.NewTextHandler(stderr, nil))); err != nil {
		fmt.Fprintf(stderr, "echo: %v\n", err)
		return 1
	}
	return 0
}

func serve(ctx context.Context, listen string, drain time.Duration, log *slog.Logger) error {
	id, err := echo.HostIdentity(os.Getenv, log)
	if err != nil {
		return err
	}
	ln, packets, err := echo.Listen(ctx, listen)
	if err != nil {
		return err
	}
	log.Info("listening", "address", ln.Addr().String(), "version", version.Text())
	return echo.Run(ctx, echo.Config{Listener: ln, Packets: packets, Identity: id, Version: version.Text(), Drain: drain, Log: log})
}
