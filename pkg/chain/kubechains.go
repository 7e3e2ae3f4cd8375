package chain

import (
	"slices"
	"strings"

	"github.com/natlens/natlens/pkg/netfilter"
)

// own says what kube-proxy and kubelet write into a kind of chain: the prefixes
// of the chains that its rules jump to, and the other targets it uses. It
// covers v1.20 to v1.37 in iptables mode.
type own struct {
	jumps   []string
	targets []netfilter.Kind
	balance bool // its jumps to KUBE-SEP choose an endpoint
}

// kubeChains is the catalogue, by table and by name or name prefix.
var kubeChains = map[string]map[string]own{
	"nat": {
		"KUBE-SERVICES":  {jumps: []string{"KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-", "KUBE-MARK-MASQ", "KUBE-NODEPORTS"}},
		"KUBE-NODEPORTS": {jumps: []string{"KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-XLB-", "KUBE-MARK-MASQ"}},
		"KUBE-SVC-":      {jumps: []string{"KUBE-SEP-", "KUBE-MARK-MASQ"}, balance: true},
		"KUBE-SVL-":      {jumps: []string{"KUBE-SEP-", "KUBE-MARK-MASQ", "KUBE-MARK-DROP"}, balance: true},
		"KUBE-XLB-":      {jumps: []string{"KUBE-SVC-", "KUBE-SEP-", "KUBE-MARK-MASQ", "KUBE-MARK-DROP"}, balance: true},
		"KUBE-EXT-":      {jumps: []string{"KUBE-SVC-", "KUBE-SVL-", "KUBE-MARK-MASQ"}},
		"KUBE-FW-":       {jumps: []string{"KUBE-EXT-", "KUBE-SVC-", "KUBE-XLB-", "KUBE-MARK-MASQ", "KUBE-MARK-DROP"}},
		"KUBE-SEP-":      {jumps: []string{"KUBE-MARK-MASQ"}, targets: []netfilter.Kind{netfilter.DNAT}},
	},
	"filter": {
		"KUBE-SERVICES":          {targets: []netfilter.Kind{netfilter.Reject, netfilter.Drop}},
		"KUBE-EXTERNAL-SERVICES": {targets: []netfilter.Kind{netfilter.Reject, netfilter.Drop}},
		"KUBE-PROXY-FIREWALL":    {targets: []netfilter.Kind{netfilter.Drop}},
	},
	// nftables mode, v1.29 to v1.37.
	"kube-proxy": {
		"services":  {targets: []netfilter.Kind{netfilter.VerdictMap, netfilter.SetMark}},
		"service-":  {jumps: []string{"endpoint-", "mark-for-masquerade"}, targets: []netfilter.Kind{netfilter.Choose, netfilter.DNAT}},
		"local-":    {jumps: []string{"endpoint-", "mark-for-masquerade"}, targets: []netfilter.Kind{netfilter.Choose, netfilter.DNAT}},
		"external-": {jumps: []string{"service-", "local-", "mark-for-masquerade"}, targets: []netfilter.Kind{netfilter.SetMark}},
		"endpoint-": {jumps: []string{"mark-for-masquerade"}, targets: []netfilter.Kind{netfilter.DNAT, netfilter.NoEffect}},
		"firewall-": {targets: []netfilter.Kind{netfilter.Drop}},
	},
}

// kind returns the catalogue's entry for a chain.
func kind(table, chain string) (own, bool) {
	if o, ok := kubeChains[table][chain]; ok {
		return o, true
	}
	prefix, rest, _ := strings.Cut(chain, "-")
	if table == "kube-proxy" && !strings.Contains(rest, "/") {
		return own{}, false // not of a Service
	}
	if prefix == "KUBE" {
		more, _, _ := strings.Cut(rest, "-")
		prefix += "-" + more
	}
	o, ok := kubeChains[table][prefix+"-"]
	return o, ok
}

// owners tells which Service a chain belongs to.
type owners struct {
	node       *finder // for chains of no Service
	programmed *Programmed
	byHash     map[string]*Service
	endpoints  map[string]*Service // by the name of a KUBE-SEP chain; made when first needed
}

// finder returns what collects findings about a chain.
func (o *owners) finder(c *netfilter.Chain) *finder {
	s := o.byHash[chainHash(c.Name)]
	if s == nil {
		s = o.sender(c.Name)
	}
	if s == nil {
		return &finder{view: o.node.view, out: o.node.out, about: c.Name}
	}
	return &finder{view: o.node.view, out: &s.Findings, service: &s.ServicePort, about: c.Name}
}

// sender returns the Service that sends to an endpoint's chain, or nil.
func (o *owners) sender(chain string) *Service {
	if o.endpoints == nil {
		o.endpoints = map[string]*Service{}
		for i := range o.programmed.Services {
			s := &o.programmed.Services[i]
			for _, f := range s.Frontends {
				for _, r := range f.Routes {
					for _, e := range r.Endpoints {
						o.endpoints[e.Chain] = s
					}
				}
			}
		}
	}
	return o.endpoints[chain]
}

// scanChains looks at every chain of kube-proxy for rules that it does not
// write, and for endpoint rules that nothing can reach.
func (v *View) scanChains(owners *owners) {
	for _, t := range v.rules.Tables {
		if t.Lookup("KUBE-NODE-PORT") != nil {
			continue // ipvs mode, which writes other rules into chains of the same names
		}
		for _, c := range t.Chains() {
			o, ok := kind(t.Name, c.Name)
			if !ok || (t.Name == "kube-proxy") != isNFTables(t) {
				continue
			}
			o.foreign(owners, t, c)
			if o.balance {
				unreachable(owners, t, c)
			}
			if strings.HasPrefix(c.Name, "KUBE-SEP-") {
				hairpin(owners, t, c)
			}
		}
	}
}

// foreign reports rules that the owner of a chain does not write.
func (o own) foreign(owners *owners, t *netfilter.Table, c *netfilter.Chain) {
	for i := range c.Len() {
		if !o.writes(t, c.Rule(i)) {
			owners.finder(c).add(ForeignRule, Warning, []RuleRef{{t, c, i}}, "rule %d of %s is none that kube-proxy writes; it stays until kube-proxy rewrites the chain, which may be never", i+1, c.Name)
		}
	}
}

// writes reports whether the owner of a chain writes such a rule.
func (o own) writes(t *netfilter.Table, rule []netfilter.Expr) bool {
	if len(rule) == 0 {
		return false
	}
	e := rule[len(rule)-1]
	if e.IsMatch() { // KUBE-FW ends with a note
		return true
	}
	for _, k := range o.targets {
		if e.Kind == k {
			return true
		}
	}
	if e.Kind != netfilter.Jump && e.Kind != netfilter.Goto {
		return false
	}
	name := t.ChainName(netfilter.ChainID(e.A))
	for _, prefix := range o.jumps {
		if strings.HasPrefix(name, prefix) {
			return !o.balance || !strings.HasPrefix(name, "KUBE-SEP-") || onlyBalances(rule)
		}
	}
	return false
}

// onlyBalances reports whether a jump to an endpoint depends on nothing but
// chance and session affinity.
func onlyBalances(rule []netfilter.Expr) bool {
	for _, e := range rule[:len(rule)-1] {
		switch e.Kind {
		case netfilter.Random, netfilter.Recent, netfilter.Comment:
			if e.Negated() {
				return false
			}
		default:
			return false
		}
	}
	return true
}

// unreachable reports endpoint rules behind one that takes every packet.
func unreachable(owners *owners, t *netfilter.Table, c *netfilter.Chain) {
	taken := -1
	for i := range c.Len() {
		rule := c.Rule(i)
		if len(rule) == 0 || rule[len(rule)-1].Kind != netfilter.Jump {
			continue
		}
		target := t.ByID(netfilter.ChainID(rule[len(rule)-1].A))
		if target == nil || !strings.HasPrefix(target.Name, "KUBE-SEP-") {
			continue
		}
		if taken >= 0 {
			owners.finder(c).add(RuleUnreachable, Warning, []RuleRef{{t, c, taken}, {t, c, i}}, "rule %d of %s is never reached: rule %d takes every packet", i+1, c.Name, taken+1)
			continue
		}
		if unconditional(rule) && deliversAll(target) {
			taken = i
		}
	}
}

// unconditional reports whether a rule matches every packet.
func unconditional(rule []netfilter.Expr) bool {
	for _, e := range rule {
		if e.IsMatch() && e.Kind != netfilter.Comment {
			return false
		}
	}
	return true
}

// deliversAll reports whether an endpoint's chain has its DNAT: without it,
// packets come back to the caller.
func deliversAll(c *netfilter.Chain) bool {
	for i := range c.Len() {
		if rule := c.Rule(i); len(rule) > 0 && rule[len(rule)-1].Kind == netfilter.DNAT {
			return true
		}
	}
	return false
}

// hairpin reports an endpoint that could not reach itself through its Service.
func hairpin(owners *owners, t *netfilter.Table, c *netfilter.Chain) {
	masquerades := false
	for i := range c.Len() {
		rule := c.Rule(i)
		if len(rule) == 0 {
			continue
		}
		switch e := rule[len(rule)-1]; e.Kind {
		case netfilter.Jump:
			masquerades = masquerades || t.ChainName(netfilter.ChainID(e.A)) == "KUBE-MARK-MASQ"
		case netfilter.DNAT:
			if !masquerades {
				owners.finder(c).add(MasqueradeMissing, Warning, []RuleRef{{t, c, i}}, "%s does not masquerade %s when it connects to itself through the Service: such connections hang", c.Name, c.Target(e))
			}
			return
		}
	}
}

// nothing says why no Service was found, as far as the rules tell.
func (f *finder) nothing() {
	has := func(match func(name string) bool) bool {
		for _, t := range f.view.rules.Tables {
			for _, c := range t.Chains() {
				if match(c.Name) {
					return true
				}
			}
		}
		return false
	}
	prefix := func(p string) bool {
		return has(func(name string) bool { return strings.HasPrefix(name, p) })
	}
	named := func(n string) bool { return has(func(name string) bool { return name == n }) }
	switch {
	case named("KUBE-NODE-PORT"):
		f.add(ProxyModeUnsupported, Warning, nil, "kube-proxy runs in ipvs mode: the kernel's IPVS balances Services, and the shares are not in netfilter (see ipvsadm -Ln)")
	case prefix("CILIUM_"):
		f.add(ProxyModeUnsupported, Warning, nil, "Cilium handles Services in eBPF: the shares are not in netfilter (see cilium-dbg service list)")
	case prefix("OVN-KUBE-"):
		f.add(ProxyModeUnsupported, Warning, nil, "OVN-Kubernetes handles Services in OVN load balancers: the shares are not in netfilter (see ovn-nbctl lb-list)")
	case prefix("ANTREA-") && !named("KUBE-SERVICES"):
		f.add(ProxyModeUnsupported, Warning, nil, "Antrea handles Services in Open vSwitch: the shares are not in netfilter (see antctl get ovsflows)")
	case named("KUBE-SERVICES"), slices.ContainsFunc(f.view.rules.Tables, isNFTables):
		f.add(ProxyModeUnsupported, Error, nil, "kube-proxy's chains are there, but hold no Service: it has not finished its first sync, cannot reach the API server, or its rules were flushed; or no Service has an address of this family")
	case prefix("cali-"):
		f.add(ProxyModeUnsupported, Warning, nil, "no chain of kube-proxy is there: with Calico, the eBPF dataplane probably handles Services")
	case prefix("KUBE-ROUTER-"):
		f.add(ProxyModeUnsupported, Warning, nil, "no chain of kube-proxy is there: with kube-router, IPVS probably handles Services (see ipvsadm -Ln)")
	case prefix("KUBE-"):
		f.add(ProxyModeUnsupported, Error, nil, "only kubelet's chains are there: kube-proxy is not running, writes to the other iptables backend or in nftables mode, or something else handles Services")
	default:
		f.add(ProxyModeUnsupported, Error, nil, "no chain of Kubernetes is there: no kube-proxy writes to these tables, or this is not the network namespace of the node")
	}
}
