package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/natlens/natlens/test/cluster/kube"
)

// suite is a group of checks on a cluster of its own.
type suite struct {
	name  string
	nodes []kube.NodeConfig
	// run makes the checks. It gives up by returning an error, which counts as a
	// failed check: when what follows could not work anyway.
	run func(context.Context, *bench) error
}

// bench is a cluster with natlens's images loaded, and the results on it.
type bench struct {
	*kube.Cluster
	root    string // of the source
	suite   string
	results *results
}

// row is the result of one check.
type row struct {
	suite, what string
	seen        string
	err         error
}

// results are the rows so far.
type results struct {
	out  io.Writer
	rows []row
}

// check makes a check: what is the claim, in a few words, for people who don't know
// natlens; seen is what shows it, short and with numbers; err, why it does not
// hold.
func (b *bench) check(what string, f func() (seen string, err error)) bool {
	start := time.Now()
	seen, err := f()
	b.results.add(row{b.suite, what, seen, err}, time.Since(start))
	return err == nil
}

func (r *results) add(x row, took time.Duration) {
	r.rows = append(r.rows, x)
	fmt.Fprintf(r.out, "%-4s  %-7s %s: %s\n", verdict(x), fmt.Sprintf("%.1fs", took.Seconds()), x.what, told(x))
}

func verdict(x row) string {
	if x.err != nil {
		return "FAIL"
	}
	return "ok"
}

func told(x row) string {
	if x.err == nil {
		return x.seen
	}
	text := strings.Join(strings.Fields(x.err.Error()), " ")
	if x.seen != "" {
		text += " (" + x.seen + ")"
	}
	return text
}

// print prints the table, and returns whether all is well.
func (r *results) print() bool {
	failed := 0
	fmt.Fprintln(r.out)
	w := tabwriter.NewWriter(r.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "SUITE\tCHECK\tSEEN\t")
	for _, x := range r.rows {
		if x.err != nil {
			failed++
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", x.suite, x.what, told(x), verdict(x))
	}
	_ = w.Flush()
	fmt.Fprintf(r.out, "\n%d checks, %d failed\n", len(r.rows), failed)
	return failed == 0 && len(r.rows) > 0
}

// eventually waits until f passes, and returns its last error when patience is over.
func eventually(ctx context.Context, patience time.Duration, f func() error) error {
	over := time.After(patience)
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-over:
			return fmt.Errorf("after %v: %w", patience, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}
