package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

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

// nftTimeout bounds one run of nft, which needs minutes for a large table.
const nftTimeout = 2 * time.Minute

// readWithPrograms reads with iptables-save of both backends, and kube-proxy's
// nftables mode with nft.
func readWithPrograms(ctx context.Context) (*netfilter.Ruleset, error) {
	sets := []*netfilter.Ruleset{{}}
	x, err := iptables.NewExec()
	if err != nil {
		return nil, err
	}
	rs, err := x.Read(ctx)
	if err != nil {
		return nil, err
	}
	sets = append(sets, rs)
	for _, family := range []string{"ip", "ip6"} {
		rs, err := listWithNFT(ctx, family)
		if err != nil {
			return nil, err
		}
		sets = append(sets, rs)
	}
	return netfilter.Merge(sets...)
}

// listWithNFT returns kube-proxy's own table of a family, if there is one.
func listWithNFT(ctx context.Context, family string) (*netfilter.Ruleset, error) {
	ctx, cancel := context.WithTimeout(ctx, nftTimeout)
	defer cancel()
	run := func(args ...string) ([]byte, error) {
		var out, errs bytes.Buffer
		cmd := exec.CommandContext(ctx, "nft", args...)
		cmd.Stdout, cmd.Stderr = &out, &errs
		if err := cmd.Run(); err != nil {
			return nil, fmt.Errorf("nft %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
		}
		return out.Bytes(), nil
	}
	tables, err := run("list", "tables")
	if errors.Is(err, exec.ErrNotFound) {
		return nil, fmt.Errorf("%w: install the package nftables", err)
	}
	if err != nil {
		return nil, err
	}
	if !bytes.Contains(tables, []byte("table "+family+" kube-proxy\n")) {
		return &netfilter.Ruleset{}, nil
	}
	text, err := run("-nn", "-j", "list", "table", family, "kube-proxy")
	if err != nil {
		return nil, err
	}
	return nftables.Parse(bytes.NewReader(text), "nft")
}
