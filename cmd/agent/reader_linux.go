package main

import (
	"context"
	"errors"

	"github.com/natlens/natlens/internal/observed"
	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/affinity"
	"github.com/natlens/natlens/pkg/conntrack"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
	"github.com/natlens/natlens/pkg/nftables"
)

// newReader returns the reader that --reader names.
func newReader(name string) (snapshot.Reader, error) {
	if name == "exec" {
		x, err := iptables.NewExec()
		if err != nil {
			return nil, err
		}
		return &execReader{iptables: x}, nil
	}
	return &kernelReader{}, nil
}

// newFlowReader returns what reads this node's tracked connections.
func newFlowReader() snapshot.FlowReader { return &conntrack.Reader{} }

// newPinReader returns what tells whom session affinity binds on this node.
func newPinReader() observed.PinReader { return &affinity.Reader{} }

// execReader runs programs to read what kernelReader reads. Without nft, it does
// without kube-proxy's nftables mode.
type execReader struct {
	iptables *iptables.Exec
	nftables nftables.Exec
}

// Read implements snapshot.Reader.
func (r *execReader) Read(ctx context.Context) (*netfilter.Ruleset, error) {
	a, err := r.iptables.Read(ctx)
	if err != nil {
		return nil, err
	}
	b, err := r.nftables.Read(ctx)
	if errors.Is(err, nftables.ErrNoNFT) {
		return a, nil
	}
	if err != nil {
		return nil, err
	}
	return netfilter.Merge(b, a)
}

// kernelReader reads all that kube-proxy may have written, in any of its modes.
// After the first time it reads what can have moved.
type kernelReader struct {
	iptables iptables.Kernel
	nftables nftables.Live
	last     [2]*netfilter.Ruleset // of the two
	merged   *netfilter.Ruleset
}

// Read implements snapshot.Reader.
func (r *kernelReader) Read(ctx context.Context) (*netfilter.Ruleset, error) {
	a, err := r.iptables.Refresh(ctx)
	if err != nil {
		return nil, err
	}
	b, err := r.nftables.Refresh(ctx)
	if err != nil {
		return nil, err
	}
	if now := [2]*netfilter.Ruleset{b, a}; r.merged == nil || now != r.last {
		if r.merged, err = netfilter.Merge(b, a); err != nil {
			return nil, err
		}
		r.last = now
	}
	return r.merged, nil
}

// Moved reports whether nf_tables has changed since the last Read. The legacy
// backend does not tell.
func (r *kernelReader) Moved() bool {
	if r.iptables.Moved() {
		return true
	}
	// There is one number for both, which need not be asked for twice.
	a, okA := r.iptables.AsOf()
	b, okB := r.nftables.AsOf()
	return !(okA && okB && a == b) && r.nftables.Moved()
}

// First names chains to look at before the others when rules have moved.
func (r *kernelReader) First(chains []string) { r.iptables.First(chains) }

// Close gives back what is kept for the next Read.
func (r *kernelReader) Close() error { return errors.Join(r.iptables.Close(), r.nftables.Close()) }
