package nftables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/natlens/natlens/pkg/netfilter"
)

// ErrNoNFT says that the program nft is not installed.
var ErrNoNFT = errors.New("no program nft: install the package nftables")

// Exec reads what [Live] does with the program nft, in the network namespace
// that it runs in. It is the cross-check for [Live], and slower by far.
type Exec struct{}

// readTimeout bounds one run of nft. At 10,000 Services it takes some six seconds.
const readTimeout = 2 * time.Minute

// Read returns what nft prints of the tables that exist. Where there is
// no nft, the error is ErrNoNFT.
func (Exec) Read(ctx context.Context) (*netfilter.Ruleset, error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	tables, err := run(ctx, "list", "tables")
	if errors.Is(err, exec.ErrNotFound) {
		return nil, ErrNoNFT
	}
	if err != nil {
		return nil, err
	}
	sets := []*netfilter.Ruleset{{}}
	for line := range strings.Lines(string(tables)) {
		words := strings.Fields(line)
		if len(words) < 3 || families[words[1]] == nil || slices.Contains(iptablesTables, words[2]) && words[1] != "inet" {
			continue
		}
		rs, err := list(ctx, words[1], words[2])
		if err != nil && isForeignTable(words[1], words[2]) {
			rs, err = unlisted(words[1], words[2], err), nil
		}
		if err != nil {
			return nil, err
		}
		sets = append(sets, rs)
	}
	return netfilter.Merge(sets...)
}

// list reads one table.
func list(ctx context.Context, family, name string) (*netfilter.Ruleset, error) {
	text, err := run(ctx, "-nn", "-j", "list", "table", family, name)
	if err != nil {
		return nil, err
	}
	return Parse(bytes.NewReader(text), "nft -j list table "+family+" "+name)
}

// unlisted says that another program's table could not be read. That is no reason
// to read nothing at all.
func unlisted(family, name string, err error) *netfilter.Ruleset {
	out := &netfilter.Ruleset{}
	for _, f := range families[family] {
		out.Unreadable = append(out.Unreadable, netfilter.Unreadable{Family: f, Backend: netfilter.BackendNFTables, Table: foreignName(family, name), Reason: err.Error()})
	}
	return out
}

func run(ctx context.Context, args ...string) ([]byte, error) {
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, "nft", args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("nft %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.Bytes(), nil
}
