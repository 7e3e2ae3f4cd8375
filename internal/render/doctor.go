package render

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/natlens/natlens/internal/doctor"
)

// Doctor prints a comparison of two readers.
func Doctor(w io.Writer, r *doctor.Report) error {
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tw, "READER\tRULES\tTOOK")
	for _, reader := range r.Readers {
		if reader.Error != "" {
			fmt.Fprintf(tw, "%s\t-\tfailed\n", reader.Name)
			continue
		}
		fmt.Fprintf(tw, "%s\t%d\t%.3f s\n", reader.Name, reader.Rules, reader.Seconds)
	}
	if len(r.Tables) > 0 {
		fmt.Fprintln(tw, "\nTABLE\tFAMILY\tBACKEND\tCHAINS\tRULES\tCOMPARED")
	}
	for _, t := range r.Tables {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%d\t%d\t%s\n", t.Name, t.Family, t.Backend, t.Chains, t.Rules, t.Compared)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	const most = 20 // differences, of which more tell nothing more
	for i, d := range r.Differences {
		if i == most {
			fmt.Fprintf(w, "\n… and %d more chains that differ: see -o json\n", len(r.Differences)-most)
			break
		}
		fmt.Fprintf(w, "\n%s %s, chain %s, rule %d:\n  directly: %s\n  programs: %s\n", d.Family, d.Table, d.Chain, d.Rule, orNone(d.Direct), orNone(d.Other))
	}
	if len(r.Undecoded) > 0 {
		fmt.Fprintln(w, "\nKnown by name only, so that answers that depend on them are unknown:")
	}
	for _, u := range r.Undecoded {
		fmt.Fprintf(w, "  %d × %s, such as %s\n", u.Count, u.Name, u.Example)
	}
	for _, list := range []struct {
		head  string
		lines []string
	}{{"Notes:", r.Notes}, {"Problems:", r.Problems}} {
		if len(list.lines) > 0 {
			fmt.Fprintln(w, "\n"+list.head)
		}
		for _, line := range list.lines {
			fmt.Fprintln(w, "  "+line)
		}
	}
	verdict := "\nThe readers agree."
	switch {
	case !r.Agree:
		verdict = "\nThe readers do NOT agree, or could not be compared."
	case len(r.Tables) == 0:
		verdict = "\nThe readers agree that there are no tables: nothing like kube-proxy writes here, or this is not the network namespace of the node."
	}
	_, err := fmt.Fprintln(w, verdict)
	return err
}

func orNone(s string) string {
	if s == "" {
		return "(none)"
	}
	return s
}
