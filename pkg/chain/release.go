package chain

import (
	"slices"

	"github.com/natlens/natlens/pkg/netfilter"
)

// NewestRelease is the minor release of the last kube-proxy whose rules are
// known: 37 for v1.37.
const NewestRelease = 37

// Releases tells which minor releases of kube-proxy, at least and at most, write
// such rules: 25 and 37 for v1.25 to v1.37. It looks at few chains that are
// there whatever Services there are. The walk does not depend on it.
func (v *View) Releases() (oldest, newest int) {
	oldest, newest = 1, NewestRelease
	since := func(minor int, yes bool) {
		if yes {
			oldest = max(oldest, minor)
		}
	}
	for _, t := range v.rules.Tables {
		has := func(name string) bool { return t.Lookup(name) != nil }
		switch {
		case isNFTables(t):
			since(29, true)
			since(33, has("filter-output-pre-dnat"))
			since(36, hasSet(t, "hairpin-connections"))
			switch {
			case has("endpoints-check"):
				newest = min(newest, 29)
			case has("filter-output-post-dnat"):
				oldest, newest = max(oldest, 30), min(newest, 33)
			case has("filter-output-pre-dnat") && !hasSet(t, "hairpin-connections"):
				newest = min(newest, 35)
			}
		case t.Name == "filter" && has("KUBE-SERVICES"):
			since(21, has("KUBE-NODEPORTS"))
			since(25, has("KUBE-PROXY-FIREWALL"))
			if !has("KUBE-NODEPORTS") {
				newest = min(newest, 20)
			} else if !has("KUBE-PROXY-FIREWALL") {
				newest = min(newest, 24)
			}
		}
	}
	if oldest > newest { // leftovers of another
		return oldest, NewestRelease
	}
	return oldest, newest
}

func hasSet(t *netfilter.Table, name string) bool {
	return slices.ContainsFunc(t.Sets(), func(s *netfilter.Set) bool { return s != nil && s.Name == name })
}
