package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"

	"github.com/natlens/natlens/internal/node"
	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
	"github.com/natlens/natlens/pkg/nftables"
)

// source is where the rules come from, as the shared flags say.
type source struct {
	files    []string
	reader   string
	local    []string
	podCIDRs []string
	name     string
	stdin    io.Reader

	node chain.Node // from --local and --pod-cidr
}

func (s *source) addFlags(fs *pflag.FlagSet) {
	fs.StringArrayVarP(&s.files, "file", "f", nil, "read the rules from a `FILE` that iptables-save or nft -j wrote, not from the kernel (repeatable; - is stdin)")
	fs.StringVar(&s.reader, "reader", "auto", "how to read the kernel: auto (directly), kernel (directly), or exec (with iptables-save)")
	fs.StringSliceVar(&s.local, "local", nil, "this node's own `IP`s, the main one first (default: of its interfaces)")
	fs.StringSliceVar(&s.podCIDRs, "pod-cidr", nil, "`CIDR`s of the pods on this node (default: those that the rules name)")
	fs.StringVar(&s.name, "node-name", "", "the node's name (default: the host's)")
}

// check parses what the flags say, before anything is read.
func (s *source) check(cmd *cobra.Command) error {
	s.stdin = cmd.InOrStdin()
	if !slices.Contains([]string{"auto", "kernel", "exec"}, s.reader) {
		return usageError{fmt.Errorf("--reader %q: want auto, kernel or exec", s.reader)}
	}
	for _, text := range s.local {
		a, err := netip.ParseAddr(strings.TrimSpace(text))
		if err != nil {
			return usageError{fmt.Errorf("--local %q is not an address", text)}
		}
		s.node.Local = append(s.node.Local, a.Unmap())
	}
	for _, text := range s.podCIDRs {
		p, err := netip.ParsePrefix(strings.TrimSpace(text))
		if err != nil {
			return usageError{fmt.Errorf("--pod-cidr %q is not a CIDR", text)}
		}
		s.node.PodCIDRs = append(s.node.PodCIDRs, p.Masked())
	}
	if i := slices.Index(s.files, "-"); i >= 0 && slices.Contains(s.files[i+1:], "-") {
		return usageError{errors.New("-f -: stdin can be read only once")}
	}
	if s.name == "" && len(s.files) == 0 {
		s.name, _ = os.Hostname()
	}
	return nil
}

// open returns what reads the rules, the backend's name for snapshots ("" for
// the kernel's own), and what tells about the node.
func (s *source) open() (snapshot.Reader, string, func() (chain.Node, error), error) {
	if len(s.files) > 0 {
		return fileReader{s.files, s.stdin}, snapshot.BackendFile, func() (chain.Node, error) { return s.node, nil }, nil
	}
	r, err := newReader(s.reader)
	if err != nil {
		return nil, "", nil, err
	}
	return r, "", s.liveNode, nil
}

func (s *source) liveNode() (chain.Node, error) {
	n, err := node.Discover()
	if err != nil {
		return n, err
	}
	if len(s.node.Local) > 0 {
		n.Local = s.node.Local
	}
	n.PodCIDRs = s.node.PodCIDRs
	return n, nil
}

// snapshot reads once.
func (s *source) snapshot(ctx context.Context) (*snapshot.Snapshot, error) {
	reader, backend, about, err := s.open()
	if err != nil {
		return nil, err
	}
	rs, err := reader.Read(ctx)
	if err != nil {
		return nil, err
	}
	n, err := about()
	if err != nil {
		return nil, err
	}
	return snapshot.Build(rs, n, s.name, backend, time.Now()), nil
}

// fileReader reads dumps. "-" is read from stdin, once.
type fileReader struct {
	files []string
	stdin io.Reader
}

// Read implements snapshot.Reader.
func (r fileReader) Read(context.Context) (*netfilter.Ruleset, error) {
	var sets []*netfilter.Ruleset
	for _, name := range r.files {
		rs, err := r.one(name)
		if err != nil {
			return nil, err
		}
		sets = append(sets, rs)
	}
	return netfilter.Merge(sets...)
}

func (r fileReader) one(name string) (*netfilter.Ruleset, error) {
	if name == "-" {
		return parse(r.stdin, "stdin")
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.IsDir() {
		return nil, fmt.Errorf("%s: is a directory", name)
	}
	return parse(f, name)
}

// parse recognises what is easily taken for a dump of iptables-save, and says
// so: the parser would speak of some detail in its first line.
func parse(r io.Reader, name string) (*netfilter.Ruleset, error) {
	const enough = 512
	b := bufio.NewReaderSize(r, enough)
	start, err := b.Peek(enough)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	if mark := []byte("\ufeff"); bytes.HasPrefix(start, mark) { // an editor of Windows was here
		_, _ = b.Discard(len(mark)) // peeked at above
		start = start[len(mark):]
	}
	switch start = bytes.TrimSpace(start); {
	case bytes.HasPrefix(start, []byte("{")):
		return nftables.Parse(b, name)
	case bytes.HasPrefix(start, []byte("table ")):
		return nil, fmt.Errorf("%s: is the text that nft prints: expected the JSON of nft -j list ruleset, or the text of iptables-save", name)
	}
	return iptables.Parse(b, name)
}

// output is the -o flag.
type output struct{ format string }

func (o *output) addFlags(fs *pflag.FlagSet) {
	fs.StringVarP(&o.format, "output", "o", "table", "`FORMAT` of the answer: table, wide, json or yaml")
}

func (o *output) check() error {
	if !slices.Contains([]string{"table", "wide", "json", "yaml"}, o.format) {
		return usageError{fmt.Errorf("-o %q: want table, wide, json or yaml", o.format)}
	}
	return nil
}

// print writes a document in the chosen format; text prints it for people.
func (o *output) print(w io.Writer, doc any, text func() error) error {
	switch o.format {
	case "json":
		enc := json.NewEncoder(w)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", "  ")
		return enc.Encode(doc)
	case "yaml":
		b, err := yaml.Marshal(doc)
		if err != nil {
			return err
		}
		_, err = w.Write(b)
		return err
	}
	return text()
}
