package iptables

import (
	"context"
	"errors"
	"time"

	"github.com/natlens/natlens/pkg/netfilter"
)

// Kernel reads the iptables tables of both backends and families straight from
// the kernel: with [NFT] and [Legacy]. The zero value is ready for use; not safe
// for concurrent use.
type Kernel struct {
	nft    NFT
	legacy Legacy
	// worked says which have been read before: when one fails then, half an
	// answer would pass for the whole.
	worked [2]bool

	last   [2]*netfilter.Ruleset // of the two
	merged *netfilter.Ruleset

	// The last reading of the legacy tables, and when the next may be.
	legacyRules *netfilter.Ruleset
	legacyErr   error
	legacyDue   time.Time
}

// Reading the legacy tables holds up whoever writes to them. So the pause after
// a reading is a multiple of what it took, and at least some seconds; kube-proxy
// then does not notice.
const (
	legacyRest  = 10
	legacyPause = 5 * time.Second
)

// Refresh returns the tables of the network namespace of the calling thread, and
// the very ruleset of the last time when nothing has moved. It reads of nf_tables
// what can have moved since the last time, and the legacy tables not more often
// than every five seconds; all calls must be of one namespace. Where one backend
// has never been readable, it is in [netfilter.Ruleset.Unreadable]; an error
// means that neither could be read, or one no longer can.
func (k *Kernel) Refresh(ctx context.Context) (*netfilter.Ruleset, error) {
	nft, nftErr := k.nft.Refresh(ctx)
	legacy, legacyErr := k.refreshLegacy(ctx)
	k.worked[0], k.worked[1] = k.worked[0] || nftErr == nil, k.worked[1] || legacyErr == nil
	switch {
	case nftErr != nil && (legacyErr != nil || k.worked[0]):
		return nil, nftErr
	case legacyErr != nil && k.worked[1]:
		return nil, legacyErr
	case nftErr != nil:
		nft = unread(netfilter.BackendNFT, nftErr)
	case legacyErr != nil:
		legacy = unread(netfilter.BackendLegacy, legacyErr)
	}
	if now := [2]*netfilter.Ruleset{nft, legacy}; k.merged == nil || now != k.last {
		merged, err := netfilter.Merge(nft, legacy)
		if err != nil {
			return nil, err
		}
		k.merged, k.last = merged, now
	}
	return k.merged, nil
}

func (k *Kernel) refreshLegacy(ctx context.Context) (*netfilter.Ruleset, error) {
	if start := time.Now(); !start.Before(k.legacyDue) {
		k.legacyRules, k.legacyErr = k.legacy.Refresh(ctx)
		k.legacyDue = time.Now().Add(max(legacyPause, legacyRest*time.Since(start)))
	}
	return k.legacyRules, k.legacyErr
}

// Moved reports whether tables of nf_tables have changed since the last Refresh.
// Legacy tables do not tell.
func (k *Kernel) Moved() bool { return k.nft.Moved() }

// AsOf is [NFT.AsOf].
func (k *Kernel) AsOf() (generation uint32, ok bool) { return k.nft.AsOf() }

// First names chains to look at before the others; see [NFT.First]. Legacy tables
// are read as a whole.
func (k *Kernel) First(chains []string) { k.nft.First(chains) }

// Read returns what Refresh does, once.
func (k *Kernel) Read(ctx context.Context) (*netfilter.Ruleset, error) {
	var once Kernel
	defer once.Close()
	return once.Refresh(ctx)
}

func unread(b netfilter.Backend, err error) *netfilter.Ruleset {
	return &netfilter.Ruleset{Unreadable: []netfilter.Unreadable{
		{Family: netfilter.IPv4, Table: string(b), Reason: err.Error()},
		{Family: netfilter.IPv6, Table: string(b), Reason: err.Error()},
	}}
}

// Close gives back what Refresh keeps for the next time.
func (k *Kernel) Close() error { return errors.Join(k.nft.Close(), k.legacy.Close()) }
