package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/natlens/natlens/internal/api"
	"github.com/natlens/natlens/internal/render"
)

func newServices() *cobra.Command {
	var src source
	var compare compareOptions
	var out output
	cmd := &cobra.Command{
		Use:   "services [NAMESPACE/NAME[:PORT]]",
		Short: "What each Service does on this node",
		Long: `Services prints, for every Service in the rules, where new connections to each of
its addresses go, from a pod on this node, from the node itself, and from outside.

-o wide puts three things side by side for each endpoint: the share that the rules
give it, what the Kubernetes API wants, where that is known (-k, --kubeconfig, or as
a pod), and the connections that the rules have counted. On a node it also tells
how many connections are tracked now, and how many clients session affinity binds.`,
		Example: `  agent services
  agent services default/go-app -o wide
  iptables-save -c | agent services -f - -o json
  iptables-save -c | agent services -f - -k objects.yaml --node node1 -o wide`,
		Args: exactly(0, 1, "at most one NAMESPACE/NAME[:PORT]"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := out.check(); err != nil {
				return err
			}
			if err := compare.check(&src); err != nil {
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
			snap, err := compare.mayCompare(cmd.Context(), &src, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			snap.Count()
			if len(src.files) == 0 && out.format != "table" {
				snap.Look(cmd.Context(), newFlowReader(), newPinReader())
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
	compare.addFlags(cmd.Flags(), &src)
	out.addFlags(cmd.Flags())
	return cmd
}
