package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"os"
	"os/exec"
	"strings"
	"time"

	goiptables "github.com/coreos/go-iptables/iptables"

	"github.com/natlens/natlens/pkg/netfilter"
)

// Program is an iptables program found on this machine.
type Program struct {
	Family  netfilter.Family
	Backend netfilter.Backend
	Path    string // of the -save program
	Version string // such as "1.8.9"
}

// Exec reads the tables of the network namespace that it runs in with
// iptables-save and ip6tables-save, of both backends.
//
// It changes nothing: iptables-save takes no xtables lock, and the legacy
// program, which can create the tables that it is asked for, is never asked
// for one, nor run where the kernel has none.
type Exec struct {
	programs []Program
	seed     maphash.Seed
	last     map[Program]uint64 // what the last read returned, without counters
	worked   map[Program]bool   // which have been read before
}

// readTimeout bounds one run of a program. At 50,000 Services, iptables-nft-save
// takes some 20 seconds.
const readTimeout = 2 * time.Minute

// maxReads bounds how often a read is repeated while the rules keep changing.
const maxReads = 4

// NewExec looks for the programs of both backends and families. It fails when
// there is none at all.
func NewExec() (*Exec, error) {
	var missing []string
	x := &Exec{seed: maphash.MakeSeed(), last: map[Program]uint64{}, worked: map[Program]bool{}}
	for _, f := range []struct {
		family   netfilter.Family
		protocol goiptables.Protocol
		name     string
	}{{netfilter.IPv4, goiptables.ProtocolIPv4, "iptables"}, {netfilter.IPv6, goiptables.ProtocolIPv6, "ip6tables"}} {
		found := false
		for _, b := range []netfilter.Backend{netfilter.BackendNFT, netfilter.BackendLegacy} {
			name := f.name + strings.TrimPrefix(string(b), "iptables")
			if p, err := lookFor(name, f.protocol); errors.Is(err, exec.ErrNotFound) {
				missing = append(missing, name)
			} else if err != nil {
				missing = append(missing, err.Error())
			} else {
				p.Family, p.Backend = f.family, b
				x.programs = append(x.programs, p)
				found = true
			}
		}
		if found {
			continue
		}
		// Up to 1.8.2 there was one program only, for the legacy backend.
		if p, err := lookFor(f.name, f.protocol); err == nil {
			p.Family, p.Backend = f.family, netfilter.BackendLegacy
			x.programs = append(x.programs, p)
		}
	}
	if len(x.programs) == 0 {
		return nil, fmt.Errorf("no iptables program found (%s): install the package iptables, or read a dump with -f", strings.Join(missing, ", "))
	}
	return x, nil
}

func lookFor(name string, protocol goiptables.Protocol) (Program, error) {
	ipt, err := goiptables.New(goiptables.Path(name), goiptables.IPFamily(protocol))
	if err != nil {
		return Program{}, fmt.Errorf("%s: %w", name, err)
	}
	path, err := exec.LookPath(name + "-save")
	if err != nil {
		return Program{}, err
	}
	v1, v2, v3 := ipt.GetIptablesVersion()
	return Program{Path: path, Version: fmt.Sprintf("%d.%d.%d", v1, v2, v3)}, nil
}

// Programs returns the programs that Read runs.
func (x *Exec) Programs() []Program { return x.programs }

// Read reads all tables of both families and backends. A table that cannot be
// read is in [netfilter.Ruleset.Unreadable]; an error means that nothing could
// be read at all. Not safe for concurrent use.
func (x *Exec) Read(ctx context.Context) (*netfilter.Ruleset, error) {
	var sets []*netfilter.Ruleset
	var failed []error
	for _, p := range x.programs {
		rs, err := x.readProgram(ctx, p)
		if err != nil && x.worked[p] {
			return nil, err // half an answer would pass for the whole
		}
		if err != nil {
			failed = append(failed, err)
			sets = append(sets, &netfilter.Ruleset{Unreadable: []netfilter.Unreadable{{Family: p.Family, Table: "*", Reason: err.Error()}}})
			continue
		}
		x.worked[p] = true
		sets = append(sets, rs)
	}
	rs, err := netfilter.Merge(sets...)
	if err != nil {
		return nil, err
	}
	if len(rs.Tables) == 0 && len(failed) > 0 {
		return nil, failed[0] // the others mostly fail for the same reason
	}
	return rs, nil
}

// readProgram reads until two consecutive readings agree: between two tables
// of one dump, kube-proxy may have rewritten the second.
func (x *Exec) readProgram(ctx context.Context, p Program) (*netfilter.Ruleset, error) {
	if p.Backend == netfilter.BackendLegacy {
		if tables, err := legacyTables(p.Family); err != nil || tables == 0 {
			return &netfilter.Ruleset{}, err
		}
	}
	for try := 1; ; try++ {
		out, err := runSave(ctx, p)
		if err != nil {
			return nil, err
		}
		sum := x.sum(out)
		last, known := x.last[p]
		x.last[p] = sum
		settled := known && last == sum
		if !settled && try < maxReads {
			continue
		}
		if len(bytes.TrimSpace(out)) == 0 {
			return &netfilter.Ruleset{}, nil // no table at all
		}
		rs, err := Parse(bytes.NewReader(out), p.Path)
		if err != nil {
			return nil, err
		}
		rs.Torn = !settled
		for _, t := range rs.Tables {
			t.Backend = p.Backend
		}
		for i := range rs.Unreadable {
			rs.Unreadable[i].Family = p.Family
		}
		return rs, nil
	}
}

// legacyTables returns how many legacy tables the kernel has for a family. It
// is asked of the thread, since that may be in another network namespace than
// the process.
func legacyTables(f netfilter.Family) (int, error) {
	file := "/proc/thread-self/net/ip_tables_names"
	if f == netfilter.IPv6 {
		file = "/proc/thread-self/net/ip6_tables_names"
	}
	b, err := os.ReadFile(file)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return 0, nil // a kernel without the legacy backend
	case errors.Is(err, os.ErrPermission):
		return 0, fmt.Errorf("reading %s: permission denied: the agent must run as root with the capabilities NET_ADMIN and NET_RAW", file)
	case err != nil:
		return 0, err
	}
	return len(strings.Fields(string(b))), nil
}

// runSave returns what the program prints. Its warnings are kept apart from
// its output; what it says while it fails becomes the error.
func runSave(ctx context.Context, p Program) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	var out, warnings bytes.Buffer
	cmd := exec.CommandContext(ctx, p.Path, "-c")
	cmd.Stdout, cmd.Stderr = &out, &warnings
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	said := strings.Join(strings.Fields(warnings.String()), " ")
	switch {
	case err == nil:
		return out.Bytes(), nil
	case ctx.Err() != nil: // the error would be that the program was killed, not why
		return nil, fmt.Errorf("%s: stopped before it ended: %w", p.Path, ctx.Err())
	case strings.Contains(said, "ermission denied") || strings.Contains(said, "Operation not permitted"):
		return nil, fmt.Errorf("%s: permission denied: reading the kernel's rules needs root with the capability NET_ADMIN (for the legacy backend also NET_RAW)", p.Path)
	case said != "":
		return nil, fmt.Errorf("%s: %w: %s", p.Path, err, said)
	}
	return nil, fmt.Errorf("%s: %w", p.Path, err)
}

// sum is equal for two outputs with the same rules, whatever they counted.
func (x *Exec) sum(out []byte) uint64 {
	var h maphash.Hash
	h.SetSeed(x.seed)
	for line := range bytes.Lines(out) {
		switch line[0] {
		case '#':
			continue
		case '[':
			if _, rest, ok := bytes.Cut(line, []byte("] ")); ok {
				line = rest
			}
		case ':':
			line, _, _ = bytes.Cut(line, []byte("["))
		}
		h.Write(line)
	}
	return h.Sum64()
}
