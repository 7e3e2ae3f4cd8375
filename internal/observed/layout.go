package observed

import (
	"net/netip"
	"slices"

	"github.com/natlens/natlens/pkg/chain"
)

// layout numbers the Service ports of a ruleset, and their endpoints. It does not
// change.
type layout struct {
	ports     []chain.ServicePort // sorted
	starts    []int32             // of each port's endpoints; one more than ports
	endpoints []netip.AddrPort    // of each port, sorted
}

// spot is a chain whose rule sends to an endpoint.
type spot struct {
	endpoint int32
	chain    string
}

// newLayout numbers what the rules have. The layout before it tells how much that
// takes in memory, if there is one.
func newLayout(p *chain.Programmed, before *layout) *layout {
	n := newNumbering(len(p.Services), before)
	var spots []spot // reused
	for i := range p.Services {
		spots = n.add(&p.Services[i], spots[:0])
	}
	return n.layout
}

// numbering makes a layout, port by port.
type numbering struct {
	*layout
	all []chain.Endpoint // of a port; reused
}

// spare is for how many endpoints more than before there is room.
const spare = 64

func newNumbering(ports int, before *layout) numbering {
	n := numbering{layout: &layout{ports: make([]chain.ServicePort, 0, ports), starts: make([]int32, 1, ports+1)}}
	if before != nil {
		n.endpoints = make([]netip.AddrPort, 0, len(before.endpoints)+spare)
	}
	return n
}

// add numbers the endpoints of the next port, and appends the chains that send there
// to spots.
func (l *numbering) add(s *chain.Service, spots []spot) []spot {
	first := int32(len(l.endpoints))
	l.all = endpointsOf(l.all[:0], s)
	for _, e := range l.all {
		if !e.Address.IsValid() {
			continue // one of a range
		}
		n := int32(len(l.endpoints)) - 1
		if n < first || l.endpoints[n] != e.Address {
			l.endpoints = append(l.endpoints, e.Address)
			n++
		}
		if len(spots) == 0 || spots[len(spots)-1] != (spot{n, e.Chain}) {
			spots = append(spots, spot{n, e.Chain})
		}
	}
	l.end(s.ServicePort)
	return spots
}

// end ends the endpoints of a port.
func (l *layout) end(p chain.ServicePort) {
	l.ports, l.starts = append(l.ports, p), append(l.starts, int32(len(l.endpoints)))
}

// port returns the number of a Service port; -1 when it is not there.
func (l *layout) port(p chain.ServicePort) int {
	i, ok := slices.BinarySearchFunc(l.ports, p, chain.ServicePort.Compare)
	if !ok {
		return -1
	}
	return i
}

// of returns the endpoints of a port.
func (l *layout) of(port int) []netip.AddrPort { return l.endpoints[l.starts[port]:l.starts[port+1]] }

// endpoint returns the number of a port's endpoint; -1 when it is not there.
func (l *layout) endpoint(port int, a netip.AddrPort) int {
	i, ok := slices.BinarySearchFunc(l.of(port), a, netip.AddrPort.Compare)
	if !ok {
		return -1
	}
	return int(l.starts[port]) + i
}

// endpointsOf appends the endpoints of all routes of a Service port, sorted. Most
// routes have the same.
func endpointsOf(all []chain.Endpoint, s *chain.Service) []chain.Endpoint {
	first, mixed := []chain.Endpoint(nil), false
	for j := range s.Frontends {
		for k := range s.Frontends[j].Routes {
			list := s.Frontends[j].Routes[k].Endpoints
			switch {
			case len(list) == 0:
			case first == nil:
				first, all = list, append(all, list...)
			case &list[0] == &first[0] && len(list) == len(first):
			case !slices.EqualFunc(list, first, func(a, b chain.Endpoint) bool { return a.Address == b.Address && a.Chain == b.Chain }):
				mixed, all = true, append(all, list...)
			}
		}
	}
	if mixed {
		slices.SortFunc(all, func(a, b chain.Endpoint) int { return a.Address.Compare(b.Address) })
	}
	return all
}

// eachEndpoint calls do with every endpoint and where next has it, -1 for nowhere.
func (l *layout) eachEndpoint(next *layout, do func(port, endpoint, nextEndpoint int)) {
	j := 0
	for i := range l.ports {
		for j < len(next.ports) && next.ports[j].Compare(l.ports[i]) < 0 {
			j++
		}
		same := j < len(next.ports) && next.ports[j] == l.ports[i]
		n, end := int32(0), int32(0)
		if same {
			n, end = next.starts[j], next.starts[j+1]
		}
		for k := l.starts[i]; k < l.starts[i+1]; k++ {
			for n < end && next.endpoints[n].Compare(l.endpoints[k]) < 0 {
				n++
			}
			if n < end && next.endpoints[n] == l.endpoints[k] {
				do(i, int(k), int(n))
			} else {
				do(i, int(k), -1)
			}
		}
	}
}
