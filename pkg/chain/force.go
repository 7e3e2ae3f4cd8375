package chain

import (
	"fmt"

	"github.com/natlens/natlens/pkg/netfilter"
)

// InForce tells, a sentence each, which tables hold kube-proxy's Services, and
// which hold only what kubelet leaves there.
func InForce(rs *netfilter.Ruleset) []string {
	var out []string
	for _, t := range rs.Tables {
		services := t.Lookup("KUBE-SERVICES")
		switch {
		case isNFTables(t) && t.Lookup("services") != nil:
			out = append(out, fmt.Sprintf("kube-proxy's nftables mode has its Services of %v in table %s", t.Family, t.Name))
		case t.Name != "nat":
		case services != nil && services.Len() > 0:
			out = append(out, fmt.Sprintf("kube-proxy's iptables mode has its Services of %v in table nat of %s", t.Family, t.Backend))
		case t.Lookup("KUBE-KUBELET-CANARY") != nil:
			out = append(out, fmt.Sprintf("table nat of %s, %v, has only what kubelet leaves there: kube-proxy does not write to it", t.Backend, t.Family))
		}
	}
	return out
}
