package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/natlens/natlens/internal/api"
	"github.com/natlens/natlens/internal/render"
)

func newServices() *cobra.Command {
	var src source
	var out output
	cmd := &cobra.Command{
		Use:   "services [NAMESPACE/NAME[:PORT]]",
		Short: "What each Service does on this node",
		Long: `Services prints, for every Service in the rules, where new connections to each of
its addresses go, from a pod on this node, from the node itself, and from outside.`,
		Example: `  agent services
  agent services default/go-app -o wide
  iptables-save -c | agent services -f - -o json`,
		Args: exactly(0, 1, "at most one NAMESPACE/NAME[:PORT]"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := out.check(); err != nil {
				return err
			}
			if err := src.check(cmd); err != nil {
				return err
			}
			var filter api.Filter
			if len(args) == 1 {
				var err error
				if filter, err = api.ParseFilter(args[0]); err != nil {
					return usageError{err}
				}
			}
			snap, err := src.snapshot(cmd.Context())
			if err != nil {
				return err
			}
			doc := api.ServicesOf(snap, filter)
			if len(doc.Services) == 0 && len(args) == 1 {
				return fmt.Errorf("the rules hold no Service %s", args[0])
			}
			w := cmd.OutOrStdout()
			return out.print(w, doc, func() error {
				if out.format == "wide" {
					return render.ServicesWide(w, doc)
				}
				return render.Services(w, doc)
			})
		},
	}
	src.addFlags(cmd.Flags())
	out.addFlags(cmd.Flags())
	return cmd
}
