package chain

import (
	"net/netip"
	"strings"

	"github.com/natlens/natlens/pkg/netfilter"
)

// isNFTables reports whether a table is one that kube-proxy writes in nftables
// mode.
func isNFTables(t *netfilter.Table) bool {
	return t.Backend == netfilter.BackendNFTables && t.Name == "kube-proxy"
}

// maps reads the frontends of nftables mode out of its verdict maps
// (pkg/proxy/nftables/proxier.go, v1.29 to v1.37).
func (d *discovery) maps(t *netfilter.Table) {
	sets := map[string]*netfilter.Set{}
	for _, s := range t.Sets() {
		sets[s.Name] = s
	}
	if s := sets["nodeport-ips"]; s != nil {
		for _, k := range s.Keys {
			d.accepted[t.Family] = append(d.accepted[t.Family], k.Addr)
		}
	}
	nodePorts := map[ServicePort]bool{}
	for _, name := range []string{"service-nodeports", "no-endpoint-nodeports", "service-ips", "no-endpoint-services"} {
		s := sets[name]
		if s == nil {
			continue
		}
		ref := lookupRule(t, name)
		for _, k := range s.Keys {
			element, _ := s.Lookup(k)
			e := &entry{front: Frontend{Family: t.Family, Address: k.Addr, Port: k.Port}, rule: ref}
			e.service = d.mapName(t, element, k.Protocol)
			if element.Verdict.Kind == netfilter.Goto && !strings.HasPrefix(name, "no-") {
				e.target = t.ByID(netfilter.ChainID(element.Verdict.A))
			}
			if strings.HasSuffix(name, "nodeports") {
				e.front.Address, e.front.Type = netip.Addr{}, NodePort
				nodePorts[e.service] = true
			} else {
				e.front.Type = mapFrontendType(t, sets, k, element, nodePorts[e.service])
			}
			d.add(e)
		}
	}
}

// lookupRule returns the rule that asks a map: it leads to every frontend in it.
func lookupRule(t *netfilter.Table, set string) RuleRef {
	for c := range t.Chains() {
		for i := range c.Len() {
			for _, e := range c.Rule(i) {
				if e.Kind == netfilter.VerdictMap && t.Set(e.A).Name == set {
					return RuleRef{t, c, i}
				}
			}
		}
	}
	return RuleRef{}
}

// mapName tells the Service of a map's element: the name of its chain has it,
// "PREFIX-HASH-namespace/name/protocol/port", or the element's comment.
func (d *discovery) mapName(t *netfilter.Table, e netfilter.SetElement, p netfilter.Protocol) ServicePort {
	if s, ok := parseServicePort(e.Comment, p); ok {
		return s
	}
	if e.Verdict.Kind == netfilter.Goto || e.Verdict.Kind == netfilter.Jump {
		name := t.ChainName(netfilter.ChainID(e.Verdict.A))
		if s, ok := parseChainName(name); ok {
			return s
		}
		return ServicePort{Name: name, Protocol: p}
	}
	return ServicePort{Name: e.Comment, Protocol: p}
}

// parseChainName reads the name of a chain of nftables mode that belongs to a
// Service (servicePortNameBase in pkg/proxy/nftables/proxier.go).
func parseChainName(name string) (ServicePort, bool) {
	_, rest, ok := strings.Cut(name, "-") // service, local, external, endpoint, firewall
	hash, path, ok2 := strings.Cut(rest, "-")
	path, _, _ = strings.Cut(path, "__") // the endpoint
	parts := strings.Split(path, "/")
	if !ok || !ok2 || len(hash) != 8 || len(parts) != 4 {
		return ServicePort{}, false
	}
	p, err := netfilter.ParseProtocol(parts[2])
	return ServicePort{Namespace: parts[0], Name: parts[1], Port: parts[3], Protocol: p}, err == nil
}

// mapFrontendType tells the type of an address in service-ips or
// no-endpoint-services, which do not say it.
func mapFrontendType(t *netfilter.Table, sets map[string]*netfilter.Set, k netfilter.SetKey, e netfilter.SetElement, hasNodePort bool) FrontendType {
	if s := sets["cluster-ips"]; s != nil {
		if _, ok := s.Lookup(netfilter.SetKey{Addr: k.Addr}); ok {
			return ClusterIP
		}
	}
	if e.Verdict.Kind == netfilter.Goto {
		if name := t.ChainName(netfilter.ChainID(e.Verdict.A)); strings.HasPrefix(name, "service-") || strings.HasPrefix(name, "local-") {
			return ClusterIP
		}
	}
	if s := sets["firewall-ips"]; s != nil {
		if _, ok := s.Lookup(k); ok {
			return LoadBalancer
		}
	}
	// The maps do not say which. A LoadBalancer mostly has a NodePort too.
	if hasNodePort {
		return LoadBalancer
	}
	return ExternalIP
}

// nftMasquerade returns the mark bits that chain masquerading asks for.
func nftMasquerade(t *netfilter.Table) uint32 {
	c := t.Lookup("masquerading")
	if c == nil {
		return 0
	}
	for i := range c.Len() {
		for _, e := range c.Rule(i) {
			if e.Kind == netfilter.MarkIs {
				return e.B
			}
		}
	}
	return 0
}
