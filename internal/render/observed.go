package render

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"

	"github.com/natlens/natlens/internal/api"
)

// none stands for what nobody knows or has looked at.
const none = "—"

// sideBySide prints, for each endpoint of a Service port, what the rules do from a
// pod to the first frontend, what the API wants there, and what all traffic to the
// port did. It prints nothing where the rules alone are known.
func sideBySide(w io.Writer, s api.Service) {
	o := s.Observed
	if o == nil {
		o = &api.Observed{}
	}
	if s.Desired == nil && o.Connections == nil && o.Flows == nil {
		if o.NotCounted != "" {
			fmt.Fprintf(w, "  not counted: %s\n", o.NotCounted)
		}
		return
	}
	seen := "CONNECTIONS"
	if o.Since != nil {
		seen += " SINCE " + o.Since.Format(time.RFC3339)
	}
	head := []string{"ENDPOINT", "PROGRAMMED", "DESIRED", "OBSERVED", seen}
	if o.Flows != nil {
		head = append(head, "FLOWS")
	}
	pins := slices.ContainsFunc(o.Endpoints, func(e api.ObservedEndpoint) bool { return e.Pinned != nil })
	if pins {
		head = append(head, "BOUND CLIENTS")
	}
	rows := [][]string{head}
	for _, a := range endpointsOf(s, o) {
		rows = append(rows, append([]string{a, programmed(s, a), desired(s.Desired, a)}, observed(o, a)...))
		if last := len(rows) - 1; pins {
			rows[last] = append(rows[last], bound(o, a))
		}
	}
	if len(rows) > 1 {
		table(w, "  ", rows)
	}
	if o.NotCounted != "" {
		fmt.Fprintf(w, "  not counted: %s\n", o.NotCounted)
	}
	if o.FlowsError != "" {
		fmt.Fprintf(w, "  flows: %s\n", o.FlowsError)
	}
	if o.StaleFlows != nil && *o.StaleFlows > 0 {
		fmt.Fprintf(w, "  %d flows to what is no endpoint any more\n", *o.StaleFlows)
	}
}

// mainRoute is the way of a pod to the first frontend; nil without any.
func mainRoute(s api.Service) *api.Route {
	if len(s.Frontends) == 0 || len(s.Frontends[0].Routes) == 0 {
		return nil
	}
	return &s.Frontends[0].Routes[0]
}

// endpointsOf lists those that anybody knows of, as they come.
func endpointsOf(s api.Service, o *api.Observed) []string {
	var out []string
	add := func(a string) {
		if !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	if r := mainRoute(s); r != nil {
		for _, e := range r.Endpoints {
			add(e.Address)
		}
	}
	if s.Desired != nil {
		for _, a := range s.Desired.Endpoints {
			add(a.String())
		}
	}
	for _, e := range o.Endpoints {
		add(e.Address)
	}
	return out
}

func programmed(s api.Service, address string) string {
	if r := mainRoute(s); r != nil {
		for _, e := range r.Endpoints {
			if e.Address == address {
				return shareText(e.Share, e.MaxShare)
			}
		}
	}
	return "no"
}

func desired(d *api.Desired, address string) string {
	if d == nil {
		return none
	}
	for _, a := range d.Endpoints {
		if a.String() == address {
			return Percent(1 / float64(len(d.Endpoints)))
		}
	}
	return "no"
}

// observed returns the observed share, the connections, and the flows if anybody
// looked at them.
func observed(o *api.Observed, address string) []string {
	out := []string{none, none}
	if o.Flows != nil {
		out = append(out, none)
	}
	for _, e := range o.Endpoints {
		if e.Address != address {
			continue
		}
		if e.Share != nil {
			out[0] = Percent(*e.Share)
		}
		if e.Connections != nil {
			out[1] = strconv.FormatUint(*e.Connections, 10)
		} else {
			out[1] = "not counted"
		}
		if e.Flows != nil && o.Flows != nil {
			out[2] = strconv.Itoa(*e.Flows)
		}
	}
	return out
}

// bound tells how many clients session affinity binds to an endpoint.
func bound(o *api.Observed, address string) string {
	for _, e := range o.Endpoints {
		if e.Address == address && e.Pinned != nil {
			if e.PinnedFull {
				return strconv.Itoa(*e.Pinned) + " (the list is full)"
			}
			return strconv.Itoa(*e.Pinned)
		}
	}
	return none
}
