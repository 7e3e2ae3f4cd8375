//go:build linux

package kernel

import (
	"net/netip"
	"testing"

	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
)

// ledger counts the connections made, for the comparison with the counters of
// the rules. nat rules see one packet of each connection.
type ledger struct {
	front  map[frontKey]int
	answer map[answerKey]int
	// unsure counts connections that rules may count once more than the ledger:
	// those that took so long that TCP may have sent its SYN twice, and those
	// that a pod was sent to itself by, in vain.
	unsure map[chain.ServicePort]int
}

type frontKey struct {
	service  chain.ServicePort
	frontend chain.FrontendType
	addr     netip.Addr
}

type answerKey struct {
	service chain.ServicePort
	pod     netip.AddrPort
}

func newLedger() ledger {
	return ledger{map[frontKey]int{}, map[answerKey]int{}, map[chain.ServicePort]int{}}
}

func (l *ledger) note(c cell, o outcome, unsure bool) {
	if !c.beside {
		l.front[frontKey{c.service, c.frontend.Type, c.frontend.Address}]++
	}
	if o.fate == "" {
		l.answer[answerKey{c.service, o.pod}]++
	}
	if unsure {
		l.unsure[c.service]++
	}
}

// checkCounters reads the rules again: those that dispatch to a Service, and
// those that lead to its endpoints, must have counted exactly the connections
// made.
func (w *world) checkCounters(t *testing.T) {
	t.Helper()
	after := w.read(t)
	grown := w.growth(t, after)
	checked := 0
	for i := range w.services {
		s := &w.services[i]
		unsure := w.ledger.unsure[s.ServicePort]
		agree := func(what string, got uint64, want int) {
			checked++
			if got < uint64(want) || got > uint64(want+unsure) {
				t.Errorf("%s: %s counted %d packets more, for %d connections and at most %d", s.ServicePort, what, got, want, want+unsure)
			}
		}
		for _, f := range s.Frontends {
			made := w.ledger.front[frontKey{s.ServicePort, f.Type, f.Address}]
			if got, ok := grown.dispatch(f, s.Protocol); ok {
				agree(string(f.Type)+"'s rule", got, made)
			} else if f.Type == chain.ClusterIP && len(f.Routes) == 1 {
				agree("REJECT's rule", grown.refusal(f, s.Protocol), made)
			}
		}
		// Two chains may lead to one pod, so the counters are summed up.
		jumps, rewrites := map[netip.AddrPort]uint64{}, map[netip.AddrPort]uint64{}
		for name, pod := range grown.endpoints(s.ServicePort) {
			jumps[pod] += grown.jumps[name]
			rewrites[pod] += grown.dnats[name]
		}
		for pod := range jumps {
			made := w.ledger.answer[answerKey{s.ServicePort, pod}]
			agree("the rules that jump to the chain of "+pod.String(), jumps[pod], made)
			agree("the rule that rewrites to "+pod.String(), rewrites[pod], made)
		}
	}
	if checked < 5*len(w.services)/2 {
		t.Errorf("only %d counters were compared for %d Services", checked, len(w.services))
	}
}

// growth is by how much the counters of a ruleset have grown.
type growth struct {
	nat, filter *netfilter.Table
	by          map[*netfilter.Chain][]uint64
	jumps       map[string]uint64 // to chains, by name
	dnats       map[string]uint64 // of the DNAT rules in a chain
}

func (w *world) growth(t *testing.T, after *netfilter.Ruleset) *growth {
	t.Helper()
	g := &growth{by: map[*netfilter.Chain][]uint64{}, jumps: map[string]uint64{}, dnats: map[string]uint64{}}
	for _, table := range after.Tables {
		before := w.rules.Table(table.Family, table.Name)
		if table.Family != w.netfilterFamily() || before == nil {
			continue
		}
		switch table.Name {
		case "nat":
			g.nat = table
		case "filter":
			g.filter = table
		}
		for c := range table.Chains() {
			old := before.Lookup(c.Name)
			if old == nil || old.Len() != c.Len() {
				t.Fatalf("chain %s changed", c.Name)
			}
			for i := range c.Len() {
				was, ok1 := old.Counter(i)
				is, ok2 := c.Counter(i)
				if !ok1 || !ok2 || is.Packets < was.Packets {
					t.Fatalf("rule %d of chain %s: counters %v, then %v", i, c.Name, was, is)
				}
				n := is.Packets - was.Packets
				g.by[c] = append(g.by[c], n)
				rule := c.Rule(i)
				switch last := rule[len(rule)-1]; last.Kind {
				case netfilter.Jump:
					g.jumps[table.ChainName(netfilter.ChainID(last.A))] += n
				case netfilter.DNAT:
					g.dnats[c.Name] += n
				}
			}
		}
	}
	return g
}

// endpoints returns the chains that a Service chooses from, and the address that
// each rewrites to.
func (g *growth) endpoints(s chain.ServicePort) map[string]netip.AddrPort {
	list := map[string]netip.AddrPort{}
	for _, prefix := range []string{"KUBE-SVC-", "KUBE-SVL-"} {
		c := g.nat.Lookup(chain.ServiceChain(prefix, s))
		if c == nil {
			continue
		}
		for i := range c.Len() {
			rule := c.Rule(i)
			if rule[len(rule)-1].Kind != netfilter.Jump {
				continue
			}
			sep := g.nat.ByID(netfilter.ChainID(rule[len(rule)-1].A))
			for j := range sep.Len() {
				rule := sep.Rule(j)
				if last := rule[len(rule)-1]; last.Kind == netfilter.DNAT {
					list[sep.Name] = sep.Target(last)
				}
			}
		}
	}
	return list
}

// dispatch returns the growth of the nat rule for a frontend.
func (g *growth) dispatch(f chain.Frontend, p netfilter.Protocol) (uint64, bool) {
	name := "KUBE-SERVICES"
	if f.Type == chain.NodePort {
		name = "KUBE-NODEPORTS"
	}
	return g.rule(g.nat, name, f, p)
}

// refusal returns the growth of the filter rule for a cluster IP without
// endpoints.
func (g *growth) refusal(f chain.Frontend, p netfilter.Protocol) uint64 {
	n, _ := g.rule(g.filter, "KUBE-SERVICES", f, p)
	return n
}

func (g *growth) rule(t *netfilter.Table, name string, f chain.Frontend, p netfilter.Protocol) (uint64, bool) {
	c := t.Lookup(name)
	if c == nil {
		return 0, false
	}
	for i := range c.Len() {
		addr, port, protocol := netip.Addr{}, uint32(0), uint32(0)
		for _, e := range c.Rule(i) {
			switch e.Kind {
			case netfilter.Destination:
				addr, _ = c.Prefix(e)
			case netfilter.DestinationPort:
				port = e.A
			case netfilter.ProtocolIs:
				protocol = e.A
			}
		}
		if addr == f.Address && port == uint32(f.Port) && protocol == uint32(p) {
			return g.by[c][i], true
		}
	}
	return 0, false
}
