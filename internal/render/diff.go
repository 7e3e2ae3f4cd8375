package render

import (
	"fmt"
	"io"

	"github.com/natlens/natlens/internal/api"
)

// Diff prints all findings; with wide, what they rest on too.
func Diff(out io.Writer, doc api.Findings, wide bool) error {
	w := &errWriter{w: out}
	header(w, doc.Snapshot)
	if wide {
		wideFindings(w, doc.Findings, "")
	} else {
		findings(w, doc.Findings, "")
	}
	if a := doc.Snapshot.API; len(doc.Findings) == 0 && a != nil && a.Compared {
		fmt.Fprintf(w, "no difference: the rules are what a kube-proxy %s makes of the API's objects, and consistent\n", a.Release)
	}
	return w.err
}
