package iptables

import (
	"context"
	"fmt"

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
}

// Read reads the network namespace of the calling thread. Where one backend
// has never been readable, it is in [netfilter.Ruleset.Unreadable]; an error means that
// neither could, or one no longer can.
func (k *Kernel) Read(ctx context.Context) (*netfilter.Ruleset, error) {
	nft, nftErr := k.nft.Read(ctx)
	legacy, legacyErr := k.legacy.Read(ctx)
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
	return netfilter.Merge(nft, legacy)
}

func unread(b netfilter.Backend, err error) *netfilter.Ruleset {
	return &netfilter.Ruleset{Unreadable: []netfilter.Unreadable{
		{Family: netfilter.IPv4, Table: string(b), Reason: err.Error()},
		{Family: netfilter.IPv6, Table: string(b), Reason: err.Error()},
	}}
}

// Close gives back the memory that reading keeps for the next time.
func (k *Kernel) Close() error {
	if err := k.legacy.Close(); err != nil {
		return fmt.Errorf("closing the legacy reader: %w", err)
	}
	return nil
}
