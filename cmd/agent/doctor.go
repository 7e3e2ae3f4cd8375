package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/natlens/natlens/internal/doctor"
	"github.com/natlens/natlens/internal/render"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
)

func newDoctor() *cobra.Command {
	var src source
	var out output
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Can this node be read, and do two readers agree?",
		Long: `Doctor reads the rules twice, straight from the kernel and with iptables-save
and nft, and compares what both tell, rule by rule. With -f it prints a dump
from what was understood of it, and wants to understand the same again.

It exits with 1 when they differ, or when something cannot be read.`,
		Args: exactly(0, 0, "no argument"),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := out.check(); err != nil {
				return err
			}
			if err := src.check(cmd); err != nil {
				return err
			}
			report, err := examine(cmd.Context(), src)
			if err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			if err := out.print(w, report, func() error { return render.Doctor(w, report) }); err != nil {
				return err
			}
			if !report.Agree {
				return errors.New("the readers do not agree, or could not be compared: see above")
			}
			return nil
		},
	}
	src.addFlags(cmd.Flags())
	out.addFlags(cmd.Flags())
	return cmd
}

func examine(ctx context.Context, src source) (*doctor.Report, error) {
	if len(src.files) > 0 {
		return examineFiles(ctx, src)
	}
	return examineNode(ctx), nil
}

// examineFiles compares a dump with what the printer makes of it.
func examineFiles(ctx context.Context, src source) (*doctor.Report, error) {
	r := &doctor.Report{}
	start := time.Now()
	direct, err := fileReader{src.files, src.stdin}.Read(ctx)
	if err != nil {
		return nil, err
	}
	r.Readers = append(r.Readers, doctor.Reader{Name: strings.Join(src.files, ", "), Seconds: time.Since(start).Seconds(), Rules: direct.RuleCount()})
	// The printer writes iptables-save's text, which nftables mode has none of.
	sets := []*netfilter.Ruleset{{}}
	for _, b := range []netfilter.Backend{netfilter.BackendLegacy, netfilter.BackendNFT} {
		for _, f := range []netfilter.Family{netfilter.IPv4, netfilter.IPv6} {
			part := &netfilter.Ruleset{}
			for _, t := range direct.Tables {
				if t.Backend == b && t.Family == f {
					part.Tables = append(part.Tables, t)
				}
			}
			if len(part.Tables) == 0 {
				continue
			}
			var text bytes.Buffer
			if err := iptables.Write(&text, part, true); err != nil {
				return nil, err
			}
			again, err := iptables.Parse(&text, "what was printed")
			if err != nil {
				return nil, err
			}
			sets = append(sets, again)
		}
	}
	for _, t := range direct.Tables {
		if t.Backend == netfilter.BackendNFTables {
			sets = append(sets, &netfilter.Ruleset{Tables: []*netfilter.Table{t}})
			r.Notes = append(r.Notes, fmt.Sprintf("table %s of %v is not of iptables: what was parsed cannot be printed as nft -j, and is not compared", t.Name, t.Family))
		}
	}
	other, err := netfilter.Merge(sets...)
	if err != nil {
		return nil, err
	}
	r.Readers = append(r.Readers, doctor.Reader{Name: "printed, and parsed again", Rules: other.RuleCount()})
	r.Compare(direct, other)
	return r, nil
}

// mostTries bounds the readings while the rules keep changing.
const mostTries = 5

// read reads once, and notes how that went; nil means that it failed.
func read(ctx context.Context, r *doctor.Report, name string, how func(context.Context) (*netfilter.Ruleset, error)) *netfilter.Ruleset {
	start := time.Now()
	rs, err := how(ctx)
	row := doctor.Reader{Name: name, Seconds: time.Since(start).Seconds()}
	if err != nil {
		row.Error = err.Error()
		r.Problems = append(r.Problems, "reading with "+name+" failed: "+err.Error())
		rs = nil
	} else {
		row.Rules = rs.RuleCount()
	}
	r.Readers = append(r.Readers, row)
	return rs
}

// compareReaders reads with both until the rules stood still meanwhile.
func compareReaders(ctx context.Context, direct, other func(context.Context) (*netfilter.Ruleset, error)) *doctor.Report {
	var r *doctor.Report
	for range mostTries {
		r = &doctor.Report{}
		before := read(ctx, r, "the kernel, directly", direct)
		second := read(ctx, r, "iptables-save and nft", other)
		if before == nil || second == nil {
			return r
		}
		after, err := direct(ctx)
		if err == nil && before.SameRules(after) && !before.Torn {
			r.Compare(before, second)
			return r
		}
	}
	r.Problems = append(r.Problems, fmt.Sprintf("the rules changed during each of %d readings: nothing to compare; try again when kube-proxy rests", mostTries))
	return r
}
