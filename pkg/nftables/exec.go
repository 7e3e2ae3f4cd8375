package nftables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/natlens/natlens/pkg/netfilter"
)

// ErrNoNFT says that the program nft is not installed.
var ErrNoNFT = errors.New("no program nft: install the package nftables")

// Exec reads kube-proxy's tables with the program nft, in the network namespace
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
	for _, family := range []string{"ip", "ip6"} {
		if !bytes.Contains(tables, []byte("table "+family+" "+kubeProxyTable+"\n")) {
			continue
		}
		text, err := run(ctx, "-nn", "-j", "list", "table", family, kubeProxyTable)
		if err != nil {
			return nil, err
		}
		rs, err := Parse(bytes.NewReader(text), "nft -j list table "+family+" "+kubeProxyTable)
		if err != nil {
			return nil, err
		}
		sets = append(sets, rs)
	}
	return netfilter.Merge(sets...)
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
