package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/natlens/natlens/internal/api"
	"github.com/natlens/natlens/internal/desired"
	"github.com/natlens/natlens/internal/kubeapi"
	"github.com/natlens/natlens/internal/render"
	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/chain"
)

// compareOptions are the flags about what rules are compared with.
type compareOptions struct {
	objects []string
	kube    kubeOptions
	grace   time.Duration
}

func (o *compareOptions) addFlags(fs *pflag.FlagSet, src *source) {
	fs.StringArrayVarP(&o.objects, "objects", "k", nil, "read the API's objects from a `FILE` that kubectl get services,endpointslices,nodes -A -o yaml (or json) wrote (repeatable)")
	fs.DurationVar(&o.grace, "grace", defaultGrace, "how long a difference has to last, live")
	o.kube.addFlags(fs)
	src.addFlags(fs)
	fs.StringVar(&src.name, "node", "", "the node's `NAME` in the API (default: the host's)")
	_ = fs.MarkHidden("node-name") // the same
}

func newDiff() *cobra.Command {
	var src source
	var opts compareOptions
	var out output
	cmd := &cobra.Command{
		Use:   "diff",
		Short: "The rules against the Kubernetes API",
		Long: `Diff compares the rules with what the Services, EndpointSlices and the Node of the
Kubernetes API want on this node, and prints what differs, with all that is odd
in the rules alone. It exits with 1 when there is any error or warning.

kube-proxy needs a moment to follow the API. So live, a difference has to last
for --grace; without any, the answer is there at once. Objects in files, of -k,
are compared as they are.`,
		Example: `  agent diff --kubeconfig ~/.kube/config
  kubectl get services,endpointslices,nodes -A -o yaml > objects.yaml
  iptables-save -c | agent diff -f - -k objects.yaml --node node1`,
		Args: exactly(0, 0, "no argument"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			if len(src.files) > 0 && len(opts.objects) == 0 {
				return errOtherTime
			}
			if err := opts.check(&src); err != nil {
				return err
			}
			if err := src.check(cmd); err != nil {
				return err
			}
			snap, err := opts.compare(cmd.Context(), &src, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			doc := api.FindingsOf(snap)
			w := cmd.OutOrStdout()
			if err := out.print(w, doc, func() error { return render.Diff(w, doc, out.format == "wide") }); err != nil {
				return err
			}
			return verdict(snap, doc)
		},
	}
	opts.addFlags(cmd.Flags(), &src)
	out.addFlags(cmd.Flags())
	return cmd
}

var errOtherTime = usageError{errors.New("rules of another time or node (-f) are compared with objects in files: name them with -k")}

func (o *compareOptions) check(src *source) error {
	switch {
	case len(src.files) > 0 && len(o.objects) == 0 && o.kube.kubeconfig != "":
		return errOtherTime
	case len(src.files) > 0 && len(o.objects) > 0 && src.name == "":
		return usageError{errors.New("--node is missing: whose rules are these?")}
	case slices.Contains(o.objects, "-"):
		return usageError{errors.New("-k -: objects are read from files only")}
	case o.grace < 0:
		return usageError{fmt.Errorf("--grace %v: must not be negative", o.grace)}
	}
	return nil
}

// verdict makes findings a failure. Infos explain, nothing is wrong with them.
func verdict(s *snapshot.Snapshot, doc api.Findings) error {
	wrong := 0
	for _, f := range doc.Findings {
		if f.Severity != chain.Info {
			wrong++
		}
	}
	switch {
	case wrong == 1:
		return errors.New("1 finding")
	case wrong > 1:
		return fmt.Errorf("%d findings", wrong)
	case !s.API.Known:
		return fmt.Errorf("the rules could not be compared with the API: %s", s.API.Error)
	}
	return nil
}

func (o *compareOptions) compare(ctx context.Context, src *source, progress io.Writer) (*snapshot.Snapshot, error) {
	if len(o.objects) > 0 {
		return o.compareFiles(ctx, src)
	}
	return o.compareLive(ctx, src, progress)
}

// mayCompare reads once, and compares where anything is named to compare with, or
// the agent is a pod.
func (o *compareOptions) mayCompare(ctx context.Context, src *source, progress io.Writer) (*snapshot.Snapshot, error) {
	switch _, err := o.kube.config(); {
	case len(o.objects) > 0, len(src.files) == 0 && o.kube.kubeconfig != "":
		return o.compare(ctx, src, progress)
	case len(src.files) == 0 && err == nil:
		snap, err := o.compare(ctx, src, progress)
		if err == nil {
			return snap, nil
		}
		fmt.Fprintf(progress, "agent: note: not compared with the Kubernetes API: %v\n", err)
	}
	return src.snapshot(ctx)
}

// compareFiles compares with objects in files.
func (o *compareOptions) compareFiles(ctx context.Context, src *source) (*snapshot.Snapshot, error) {
	objects := desired.NewObjects(src.name)
	var sum desired.Counts
	for _, name := range o.objects {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		n, err := objects.Load(f, name)
		f.Close()
		if err != nil {
			return nil, err
		}
		sum.Services, sum.EndpointSlices, sum.Nodes = sum.Services+n.Services, sum.EndpointSlices+n.EndpointSlices, sum.Nodes+n.Nodes
	}
	node, ok := objects.Node()
	switch {
	case sum.Services == 0 || sum.EndpointSlices == 0:
		return nil, fmt.Errorf("-k: %d Services and %d EndpointSlices: expected what kubectl get services,endpointslices,nodes -A -o yaml prints", sum.Services, sum.EndpointSlices)
	case !ok:
		return nil, fmt.Errorf("-k: no Node %q among %d: name one of them with --node, and print nodes too", src.name, sum.Nodes)
	}
	if len(src.files) > 0 && len(src.node.Local) == 0 {
		src.node.Local = node.Local
	}
	snap, err := src.snapshot(ctx)
	if err != nil {
		return nil, err
	}
	snap.Compare(objects)
	return snap, nil
}

// compareLive compares the kernel with the API until what differs has lasted, or
// is gone.
func (o *compareOptions) compareLive(ctx context.Context, src *source, progress io.Writer) (*snapshot.Snapshot, error) {
	config, err := o.kube.config()
	if err != nil {
		return nil, err
	}
	log := slog.New(slog.NewTextHandler(progress, &slog.HandlerOptions{Level: slog.LevelWarn}))
	watch, err := kubeapi.New(config, src.name, log)
	if err != nil {
		return nil, err
	}
	reader, backend, about, err := src.open()
	if err != nil {
		return nil, err
	}
	keeper := &snapshot.Keeper{Reader: reader, Node: about, Name: src.name, Backend: backend, Interval: time.Second, Log: log, API: watch, Grace: o.grace}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { watch.Run(ctx) })
	if err := synced(ctx, watch); err != nil {
		return nil, err
	}
	if err := keeper.Refresh(ctx); err != nil {
		return nil, err
	}
	if keeper.Snapshot().API.Pending == 0 {
		return keeper.Snapshot(), nil
	}
	news, end := keeper.Subscribe()
	defer end()
	wg.Go(func() { keeper.Run(ctx) })
	// What began now counts by then; what begins later is for another run.
	const look = 12 * time.Second
	last := time.After(o.grace + look)
	for {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-last:
			return keeper.Snapshot(), nil
		case <-news:
		case <-time.After(time.Second):
		}
		if s := keeper.Snapshot(); s.API.Pending == 0 && !s.Stale {
			return s, nil
		}
	}
}

// synced waits until the API has told everything.
func synced(ctx context.Context, watch *kubeapi.Watch) error {
	const patience = 30 * time.Second
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		s := watch.Status()
		switch {
		case s.Synced:
			return nil
		case s.Error != "":
			return errors.New(s.Error)
		}
		select {
		case <-watch.Changed():
		case <-ctx.Done():
			return fmt.Errorf("the API server has not told everything within %v", patience)
		}
	}
}
