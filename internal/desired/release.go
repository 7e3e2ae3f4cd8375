package desired

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/natlens/natlens/pkg/chain"
)

// Release is a minor release of kube-proxy: 37 for v1.37.
type Release int

// Newest is the last release whose rules are known.
const Newest Release = chain.NewestRelease

// String returns "v1.37".
func (r Release) String() string { return fmt.Sprintf("v1.%d", int(r)) }

// ParseRelease reads a version such as "v1.37.2" or "v1.31.4-gke.1".
func ParseRelease(version string) (Release, bool) {
	rest, ok := strings.CutPrefix(version, "v1.")
	minor, _, _ := strings.Cut(rest, ".")
	minor = strings.TrimRight(minor, "+")
	n, err := strconv.Atoi(minor)
	return Release(n), ok && err == nil && n > 0
}

// habits are what releases do differently with the same objects.
type habits struct {
	// An ingress address with ipMode Proxy gets no rules.
	ipMode bool
	// Zone hints count: with which annotations (see hinted).
	hints hintRule
	// Node hints count.
	nodeHints bool
	// Terminating endpoints stand in where none is ready.
	terminating bool
	// internalTrafficPolicy Local is known.
	internalLocal bool
	// It takes endpoints elsewhere out before all else, for all frontends,
	// unless externalTrafficPolicy is Local too.
	internalFirst bool
	// A frontend for other machines whose endpoints are all elsewhere is left to
	// a rule of kubelet's to drop, which may not be there.
	leavesDrops bool
	// In nftables mode the node's own connections to such a frontend are dropped
	// with those of others.
	dropsOwn bool
	// External IPs work for some sources only.
	bridgedExternal bool
}

type hintRule int

const (
	hintsIgnored   hintRule = iota
	hintsAuto               // with the annotation "Auto"
	hintsAnnotated          // with any annotation but "Disabled"
	hintsAlways
)

// habits follow the release notes and sources of kube-proxy: gates count as
// they are by default.
func (r Release) habits() habits {
	h := habits{
		ipMode:          r >= 30,
		nodeHints:       r >= 34,
		terminating:     r >= 26,
		internalLocal:   r >= 22,
		internalFirst:   r < 24,
		leavesDrops:     r < 25,
		dropsOwn:        r >= 29 && r <= 33,
		bridgedExternal: r <= 20,
	}
	switch {
	case r >= 31:
		h.hints = hintsAlways
	case r >= 27:
		h.hints = hintsAnnotated
	case r >= 24:
		h.hints = hintsAuto
	}
	return h
}

// LeavesDrops reports whether the release leaves connections that are to be
// dropped to a rule of kubelet's (KUBE-MARK-DROP, up to v1.24), so that without
// it they go on as if there were no Service.
func (r Release) LeavesDrops() bool { return r.habits().leavesDrops }

// DropsOwn reports whether the release's nftables mode drops the node's own
// connections too where externalTrafficPolicy Local finds no endpoint here: it
// asked for them ahead of nat.
func (r Release) DropsOwn() bool { return r.habits().dropsOwn }

// BridgedExternal reports whether the release balances connections to external
// IPs for some sources only (v1.20: not for pods behind a bridge).
func (r Release) BridgedExternal() bool { return r.habits().bridgedExternal }

// Candidates returns the releases that a kube-proxy may be of which do different
// things, the likeliest first: told is the version that the Node reports for it
// or for its kubelet, 0 for none, and the rules look like those of a release
// between oldest and newest. Kubernetes allows three releases between the two.
func Candidates(told, oldest, newest Release) []Release {
	if newest == 0 || newest > Newest {
		newest = max(Newest, told)
	}
	likely := min(max(told, oldest), newest)
	if told == 0 {
		likely = newest
	}
	out := []Release{likely}
	seen := map[habits]bool{likely.habits(): true}
	const skew = 3
	for step := Release(1); step <= max(newest-oldest, skew); step++ {
		for _, r := range []Release{likely - step, likely + step} {
			if r < oldest || r > newest || told != 0 && step > skew || seen[r.habits()] {
				continue
			}
			seen[r.habits()] = true
			out = append(out, r)
		}
	}
	return out
}
