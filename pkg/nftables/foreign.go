package nftables

import (
	"slices"

	"github.com/natlens/natlens/pkg/netfilter"
)

// This file tells what of a table matters that neither kube-proxy nor iptables
// writes: the chains by which it can decide where a new connection goes, ahead of
// kube-proxy's or beside them. They are nat chains at prerouting and output, and
// those ahead of conntrack that take connections out of it. The rest, filters and
// source nat, says nothing about where a Service's connections go.
//
// A table of family inet stands in the model twice, once for each family, as
// "inet NAME".

// mostForeignRules bounds how large a foreign table is read. Their nat chains are
// tiny; a table beyond this is some program's own load balancer.
const mostForeignRules = 20000

const tooManyRules = "it has too many rules to be read along, and nat chains at prerouting or output: they may send connections elsewhere before kube-proxy's rules do"

// iptablesTables are the tables that iptables-nft writes, which package iptables
// reads.
var iptablesTables = []string{"filter", "nat", "mangle", "raw", "security"}

// isForeignTable reports whether a table of that family (ip, ip6, inet) is another
// program's own.
func isForeignTable(family, name string) bool {
	return family == "inet" || name != kubeProxyTable && !slices.Contains(iptablesTables, name)
}

// foreignName returns a table's name in the model.
func foreignName(family, name string) string {
	if family == "inet" {
		return "inet " + name
	}
	return name
}

// mayDirect reports whether a base chain runs where it can decide where a
// connection goes.
func mayDirect(b *netfilter.Base) bool {
	const conntrack = -200 // NF_IP_PRI_CONNTRACK in linux/netfilter_ipv4.h
	return b != nil && (b.Hook == netfilter.Prerouting || b.Hook == netfilter.Output) && (b.Type == netfilter.TypeNAT || b.Priority < conntrack)
}

// directing leaves in a foreign table only the chains that can decide where a
// connection goes. It reports whether there are any.
func directing(t *netfilter.Table) bool {
	keep := make([]bool, t.NameCount())
	for c := range t.Chains() {
		if mayDirect(c.Base) && c.Len() > 0 {
			if within := reachable(t, c); c.Base.Type == netfilter.TypeNAT || untracks(t, within) {
				for _, id := range within {
					keep[id] = true
				}
			}
		}
	}
	var gone []netfilter.ChainID
	for c := range t.Chains() {
		if !keep[c.ID] {
			gone = append(gone, c.ID)
		}
	}
	t.Remove(gone...)
	return t.ChainCount() > 0
}

// reachable returns the chain and those that it leads to.
func reachable(t *netfilter.Table, c *netfilter.Chain) []netfilter.ChainID {
	out := []netfilter.ChainID{c.ID}
	seen := make([]bool, t.NameCount())
	seen[c.ID] = true
	follow := func(e netfilter.Expr) {
		if (e.Kind == netfilter.Jump || e.Kind == netfilter.Goto) && !seen[e.A] {
			seen[e.A] = true
			if t.ByID(netfilter.ChainID(e.A)) != nil {
				out = append(out, netfilter.ChainID(e.A))
			}
		}
	}
	for i := 0; i < len(out); i++ {
		c := t.ByID(out[i])
		for n := range c.Len() {
			for _, e := range c.Rule(n) {
				switch e.Kind {
				case netfilter.VerdictMap:
					s := t.Set(e.A)
					for _, k := range s.Keys {
						element, _ := s.Lookup(k)
						follow(element.Verdict)
					}
				case netfilter.Choose:
					for _, choice := range c.Choices(e) {
						follow(choice.Verdict)
					}
				default:
					follow(e)
				}
			}
		}
	}
	return out
}

// untracks reports whether a rule of the chains may take connections out of
// conntrack.
func untracks(t *netfilter.Table, chains []netfilter.ChainID) bool {
	for _, id := range chains {
		c := t.ByID(id)
		for i := range c.Len() {
			if slices.ContainsFunc(c.Rule(i), func(e netfilter.Expr) bool { return e.Kind == netfilter.NoTrack }) {
				return true
			}
		}
	}
	return false
}

// addFamily adds a comparison with the family of the packet: it holds always or
// never.
func addFamily(c *netfilter.Chain, name string, flags uint8, same bool) {
	if !same {
		flags ^= netfilter.Not
	}
	c.AddText(netfilter.Always, flags, 0, []byte("meta nfproto "+name))
}

// tooLarge says that a table was not read.
func tooLarge(f netfilter.Family, name string) netfilter.Unreadable {
	return netfilter.Unreadable{Family: f, Backend: netfilter.BackendNFTables, Table: name, Reason: tooManyRules}
}
