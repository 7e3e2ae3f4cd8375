package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/natlens/natlens/internal/api"
	"github.com/natlens/natlens/internal/render"
	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
)

func newTrace() *cobra.Command {
	var src source
	var out output
	var from string
	cmd := &cobra.Command{
		Use:   "trace ADDRESS:PORT[/tcp|udp|sctp]",
		Short: "Where one packet goes, rule by rule",
		Long: `Trace walks the first packet of a new connection through the rules, and prints
every rule that it matches, up to each end that it can come to.`,
		Example: `  agent trace 10.56.11.169:80
  agent trace 10.56.0.10:53/udp --from node
  agent trace '[fd00:10:96::1]:443' -f rules.save6 --from fd00:10:52::7`,
		Args: exactly(1, 1, "one ADDRESS:PORT[/tcp|udp|sctp]"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := out.check(); err != nil {
				return err
			}
			if err := src.check(cmd); err != nil {
				return err
			}
			query, err := api.ParseQuery(args[0], "", from)
			if err != nil {
				return usageError{err}
			}
			snap, err := src.snapshot(cmd.Context())
			if err != nil {
				return err
			}
			doc, err := api.TraceOf(snap, query)
			if errors.Is(err, api.ErrNotFound) {
				return err
			} else if err != nil {
				return usageError{err}
			}
			if len(src.files) > 0 && len(src.local) == 0 {
				noteNodePort(cmd.ErrOrStderr(), snap, query, doc)
			}
			w := cmd.OutOrStdout()
			return out.print(w, doc, func() error { return render.Trace(w, doc) })
		},
	}
	cmd.Flags().StringVar(&from, "from", "pod", "`SOURCE`: an address, or pod, node or external")
	src.addFlags(cmd.Flags())
	out.addFlags(cmd.Flags())
	return cmd
}

// noteNodePort says what a dump leaves open: NodePorts answer on the node's own
// addresses, which only --local tells. Without it, a question about one of them
// gets the answer "no rule applies", which is right and misleading.
func noteNodePort(w io.Writer, snap *snapshot.Snapshot, q api.Query, doc api.Trace) {
	for _, o := range doc.Outcomes {
		if o.Verdict != chain.None {
			return
		}
	}
	for _, s := range snap.Programmed.Services {
		for _, f := range s.Frontends {
			if f.Type == chain.NodePort && f.Port == q.To.Port() && s.Protocol == q.Protocol && f.Family == netfilter.FamilyOf(q.To.Addr()) {
				fmt.Fprintf(w, "agent: note: %v has NodePort %d: if %v is this node's, say so with --local %[3]v\n", s.ServicePort, f.Port, q.To.Addr())
				return
			}
		}
	}
}
