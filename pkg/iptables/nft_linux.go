package iptables

import (
	"context"

	"github.com/natlens/natlens/pkg/internal/nfnetlink"
	"github.com/natlens/natlens/pkg/netfilter"
)

// NFT reads the tables of both families that iptables-nft has written, straight
// from the kernel's nf_tables over netlink. It runs no program, takes no lock,
// creates nothing and zeroes no counter. It needs the capability NET_ADMIN, and
// nothing else.
//
// It returns what Parse makes of iptables-nft-save -c, but for the order of the
// chains, and reads what iptables-nft-save refuses to print: rules that another
// program put into a table of iptables-nft. What it does not understand of
// those is netfilter.Unknown or netfilter.UnknownTarget, with a name.
//
// The zero value is ready for use; not safe for concurrent use.
type NFT struct {
	follower nfnetlink.Follower
	stepper  nftStepper
}

// Read reads the tables in the network namespace of the calling thread. A table
// with the name of one of iptables', but of another layout, is in
// [netfilter.Ruleset.Unreadable]. Read repeats what was changed meanwhile; if
// the rules keep changing, the result is Torn. An error means that nothing
// could be read, and wraps the kernel's error number.
func (n *NFT) Read(ctx context.Context) (*netfilter.Ruleset, error) {
	var once NFT
	defer once.Close()
	return once.Refresh(ctx)
}

// Refresh returns what Read would, but reads only what can have moved since the
// last Refresh; see nftStepper for what that is. It returns the very ruleset of
// the last time when nothing has. The first call ties it to the network
// namespace of the calling thread.
//
// In a large table an endpoint's chain is taken to be as before while the chains
// that lead to it are: kube-proxy's name for it says where it sends to. All are
// read again within a minute of any change.
func (n *NFT) Refresh(ctx context.Context) (*netfilter.Ruleset, error) {
	n.follower.Stepper = &n.stepper
	return n.follower.Refresh(ctx)
}

// First has Refresh return early what is quick to tell, when the rules have
// changed; the one after it returns the rest, and until then Moved stays true. That is,
// if they have changed, the chains of table nat that it names, and the chains of their
// endpoints. Otherwise, in a large table, it is all chains but endpoints' that have
// more or fewer rules than before or another last one, and the endpoints behind them:
// nearly always all that has changed. Chains that no jump leads to any more may be left
// over then. Names of chains that do not exist do no harm.
func (n *NFT) First(chains []string) { n.stepper.first, n.stepper.early = chains, true }

// Moved reports whether the rules have changed since the last Refresh, or could
// not be asked for. It takes some three microseconds. Counters are no rules.
func (n *NFT) Moved() bool { return n.follower.Moved() }

// AsOf returns the generation of nf_tables that the last Refresh returned as a whole,
// which is the same for all its tables; ok is false when there was none.
func (n *NFT) AsOf() (generation uint32, ok bool) { return n.follower.AsOf() }

// Close gives back what Refresh keeps for the next time.
func (n *NFT) Close() error {
	n.follower.Stepper = &n.stepper
	return n.follower.Close()
}
