//go:build linux

package main

import (
	"bufio"
	"context"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
	"github.com/natlens/natlens/pkg/nftables"
)

// refresher is what the readers have in common.
type refresher interface {
	Read(context.Context) (*netfilter.Ruleset, error)
	Refresh(context.Context) (*netfilter.Ruleset, error)
}

// worker measures one row, over and over.
type worker struct {
	reader     refresher
	rules      *netfilter.Ruleset
	view       *chain.View
	programmed *chain.Programmed
}

// sample is one measurement.
type sample struct {
	took  time.Duration
	bytes uint64 // allocated
}

// runChild answers each line of its input, which may name a chain, with how long
// the row took, in nanoseconds, and how many bytes it allocated. It answers once
// unasked, when it is ready. The line "settle" is for what nobody measures.
func runChild(ctx context.Context, row string) error {
	runtime.LockOSThread() // the namespace is that of the process, but keep to one anyway
	layout, what, _ := strings.Cut(row, "/")
	w := &worker{}
	switch layout {
	case "legacy":
		w.reader = &iptables.Legacy{}
	case "nft":
		w.reader = &iptables.NFT{}
	case "nftables":
		w.reader = &nftables.Live{}
	}
	ready, do := w.row(ctx, layout, what)
	if do == nil {
		return fmt.Errorf("no row %q", row)
	}
	if ready != nil {
		if err := ready(); err != nil {
			return err
		}
	}
	fmt.Println("ready")
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		if in.Text() == "settle" {
			if w.view != nil { // it follows
				for range 2 { // what is quick to tell comes first, the rest then
					if err := w.refresh(ctx); err != nil {
						return err
					}
				}
			} else { // the next one is as of a process that has done nothing yet
				w.programmed = nil
				debug.FreeOSMemory()
			}
			fmt.Println(0, 0)
			continue
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		start := time.Now()
		n, err := do(in.Text())
		took := time.Since(start)
		if err != nil {
			return err
		}
		runtime.ReadMemStats(&after)
		fmt.Println(int64(took)/int64(n), (after.TotalAlloc-before.TotalAlloc)/uint64(n))
	}
	return in.Err()
}

// row returns how to get ready for a row, and how to do it; do returns how many
// times it was done.
func (w *worker) row(ctx context.Context, layout, what string) (ready func() error, do func(arg string) (int, error)) {
	once := func(f func() error) func(string) (int, error) {
		return func(string) (int, error) { return 1, f() }
	}
	switch what {
	case "dump":
		switch layout {
		case "legacy":
			return nil, once(dumpLegacy)
		case "nft":
			return nil, once(func() error { return dumpChains("nat", "filter") })
		}
		return nil, once(func() error { return dumpSets("kube-proxy") })
	case "read":
		return nil, once(func() error {
			_, err := w.reader.Read(ctx)
			return err
		})
	case "resolve":
		return func() (err error) { w.rules, err = w.reader.Read(ctx); return err }, once(func() error {
			w.programmed = chain.NewView(w.rules, node()).Services()
			return nil
		})
	case "changed", "counted":
		return func() error { return w.refresh(ctx) }, once(func() error { return w.refresh(ctx) })
	case "glance":
		n := w.reader.(*iptables.NFT)
		n.First(nil)
		return func() error { return w.refresh(ctx) }, once(func() error { return w.refresh(ctx) })
	case "named":
		return func() error { return w.refresh(ctx) }, func(arg string) (int, error) {
			w.reader.(*iptables.NFT).First([]string{arg})
			return 1, w.refresh(ctx)
		}
	case "look":
		const times = 1000
		m := w.reader.(interface{ Moved() bool })
		return func() error { return w.refresh(ctx) }, func(string) (int, error) {
			for range times {
				if m.Moved() {
					return 0, fmt.Errorf("rules that stand still have moved")
				}
			}
			return times, nil
		}
	case "unchanged":
		return func() error { return w.refresh(ctx) }, once(func() error { return w.refresh(ctx) })
	}
	return nil, nil
}

// refresh reads what can have moved, and brings the Services up to date.
func (w *worker) refresh(ctx context.Context) error {
	rs, err := w.reader.Refresh(ctx)
	if err != nil || rs == w.rules {
		return err
	}
	switch {
	case w.view != nil && rs.SameRules(w.rules): // as a snapshot does
	case w.view == nil:
		w.view = chain.NewView(rs, node())
		w.programmed = w.view.Services()
	default:
		w.view = w.view.Next(rs, node())
		w.programmed = w.view.Update(w.programmed)
	}
	w.rules = rs
	return nil
}

func node() chain.Node { return chain.Node{Local: []netip.Addr{kubeproxy.SyntheticNodeIP}} }
