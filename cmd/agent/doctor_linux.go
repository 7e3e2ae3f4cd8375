package main

import (
	"context"

	"github.com/natlens/natlens/internal/doctor"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
	"github.com/natlens/natlens/pkg/nftables"
)

// examineNode compares what the kernel tells with what programs print of it.
func examineNode(ctx context.Context) *doctor.Report {
	var direct kernelReader
	defer direct.Close()
	r := compareReaders(ctx, direct.Read, readWithPrograms)
	if rs, err := direct.Read(ctx); err == nil {
		r.Notes = append(r.Notes, chain.InForce(rs)...)
	}
	return r
}

// readWithPrograms reads with iptables-save of both backends, and kube-proxy's
// nftables mode with nft.
func readWithPrograms(ctx context.Context) (*netfilter.Ruleset, error) {
	x, err := iptables.NewExec()
	if err != nil {
		return nil, err
	}
	a, err := x.Read(ctx)
	if err != nil {
		return nil, err
	}
	b, err := nftables.Exec{}.Read(ctx)
	if err != nil {
		return nil, err
	}
	return netfilter.Merge(b, a)
}
