package main

import (
	"context"

	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
	"github.com/natlens/natlens/pkg/nftables"
)

// newReader returns the reader that --reader names.
func newReader(name string) (snapshot.Reader, error) {
	if name == "exec" {
		return iptables.NewExec()
	}
	return &kernelReader{}, nil
}

// kernelReader reads all that kube-proxy may have written, in any of its modes.
type kernelReader struct {
	iptables iptables.Kernel
	nftables nftables.Live
}

// Read implements snapshot.Reader.
func (r *kernelReader) Read(ctx context.Context) (*netfilter.Ruleset, error) {
	a, err := r.iptables.Read(ctx)
	if err != nil {
		return nil, err
	}
	b, err := r.nftables.Read(ctx)
	if err != nil {
		return nil, err
	}
	return netfilter.Merge(b, a)
}
