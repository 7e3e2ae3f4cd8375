package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"github.com/natlens/natlens/test/cluster/kube"
)

// suites are what is proven, in the order of running.
var suites = []suite{walkthrough, access, change, matrix, faults, soak}

func main() {
	only := flag.String("run", "", "run only the suites whose name matches this regular expression")
	keep := flag.Bool("keep", false, "leave the cluster up, and use it if it is")
	name := flag.String("name", "e2e", "name of the cluster; a second program beside this one needs another")
	root := flag.String("root", "../..", "the source of natlens, with its images in bin/image, as make image builds them")
	flag.Parse()
	pattern, err := regexp.Compile(*only)
	if err != nil || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	r := &results{out: os.Stdout}
	for _, s := range suites {
		if ctx.Err() == nil && pattern.MatchString(s.name) {
			start := time.Now()
			if err := r.run(ctx, s, *name, *root, *keep); err != nil {
				r.add(row{suite: s.name, what: "the suite runs to its end", err: err}, time.Since(start))
			}
		}
	}
	if !r.print() {
		os.Exit(1)
	}
}

// run runs a suite, and leaves nothing of its cluster.
func (r *results) run(ctx context.Context, s suite, name, root string, keep bool) error {
	fmt.Fprintf(r.out, "\n%s\n", s.name)
	b := &bench{root: root, suite: s.name, results: r}
	if keep {
		return b.runOn(ctx, s, name, true)
	}
	before, err := footprint(ctx)
	if err != nil {
		return err
	}
	err = b.runOn(ctx, s, name, false)
	ctx = context.WithoutCancel(ctx)
	b.check("nothing of the cluster stays on this machine", func() (string, error) {
		if err := kube.Down(ctx, name); err != nil {
			return "", err
		}
		return untouched(ctx, name, before)
	})
	return err
}

// runOn runs a suite on a new cluster, or on the present one.
func (b *bench) runOn(ctx context.Context, s suite, name string, present bool) error {
	err := kube.ErrNotUp
	if present {
		b.Cluster, err = kube.Open(name)
	}
	if errors.Is(err, kube.ErrNotUp) {
		b.Cluster, err = kube.Up(ctx, kube.Config{Name: name, Nodes: s.nodes}, indent{b.results.out})
	}
	if err != nil {
		return err
	}
	if err := b.Load(ctx, b.file("bin/image/agent.tar"), b.file("bin/image/echo.tar")); err != nil {
		return err
	}
	return s.run(ctx, b)
}

// file returns the path of a file of natlens's source.
func (b *bench) file(name string) string { return filepath.Join(b.root, name) }

// indent keeps progress apart from results.
type indent struct{ io.Writer }

func (w indent) Write(p []byte) (int, error) {
	if _, err := w.Writer.Write(append([]byte("      "), p...)); err != nil {
		return 0, err
	}
	return len(p), nil
}
