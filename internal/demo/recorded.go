package demo

import (
	_ "embed"
	"net/netip"
	"strings"

	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
)

// recording is what iptables-save -c printed in the box, after some of its
// traffic.
//
//go:embed recorded.save
var recording string

// Recorded returns the rules of the demo as they once stood in a kernel.
func Recorded() (*netfilter.Ruleset, error) {
	return iptables.Parse(strings.NewReader(recording), "recorded.save")
}

// RecordedNode tells about the node of the recording.
func RecordedNode() (chain.Node, error) {
	return chain.Node{Local: []netip.Addr{nodeAddr}}, nil
}
