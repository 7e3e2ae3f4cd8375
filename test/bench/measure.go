//go:build linux

package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/internal/nodebox"
)

// layout is one way in which rules lie in the kernel.
type layout struct {
	name  string
	rules func(services, endpoints int) (*rules, error)
	rival []string // what people run today
	rows  []row
}

// row is one line of the table.
type row struct {
	what   string  // of the child
	text   string  // for people
	target float64 // of the ratio to the rival, at most; 0 for none
	before event   // what happens before it is measured
}

// event is what happens to the rules between two measurements.
type event int

const (
	nothing event = iota
	change        // of one Service
	traffic       // to some Services
)

var layouts = []layout{
	{
		name:  "legacy",
		rules: func(s, e int) (*rules, error) { return iptablesRules("iptables-legacy-restore", s, e) },
		rival: []string{"iptables-legacy-save", "-c"},
		rows: []row{
			{what: "dump", text: "bare copy of the kernel's tables"},
			{what: "read", text: "full read", target: 0.52},
			{what: "resolve", text: "resolve all Services"},
			{what: "unchanged", text: "unchanged: counters only", target: 0.43},
			{what: "changed", text: "one Service changed: read and resolve", before: change},
		},
	},
	{
		name:  "nft",
		rules: func(s, e int) (*rules, error) { return iptablesRules("iptables-nft-restore", s, e) },
		rival: []string{"iptables-nft-save", "-c"},
		rows: []row{
			{what: "dump", text: "bare dump, chain by chain"},
			{what: "read", text: "full read", target: 0.60},
			{what: "resolve", text: "resolve all Services"},
			{what: "changed", text: "one Service changed: read and resolve", target: 0.16, before: change},
			{what: "glance", text: "the same, what a glance tells of it", before: change},
			{what: "named", text: "one Service changed that the API had named", target: 0.03, before: change},
			{what: "counted", text: fmt.Sprintf("counters, %d Services active", activeServices), target: 0.04, before: traffic},
			{what: "unchanged", text: "counters, nothing active"},
			{what: "look", text: "a look when nothing has changed", target: 0.0001},
		},
	},
	{
		name:  "nftables",
		rules: func(s, e int) (*rules, error) { return nftRules(s, e), nil },
		rival: []string{"nft", "list", "table", "ip", "kube-proxy"},
		rows: []row{
			{what: "dump", text: "bare dump of rules and sets"},
			{what: "read", text: "full read", target: 0.45},
			{what: "resolve", text: "resolve all Services"},
			{what: "changed", text: "one Service changed: read and resolve", target: 0.03, before: change},
			{what: "look", text: "a look when nothing has changed", target: 0.0001},
		},
	},
}

// activeServices is to how many Services the traffic goes.
const activeServices = 200

// resolveTarget is what resolving may take of a full read.
const resolveTarget = 0.3

// measured is what one row took.
type measured struct {
	row
	took  []time.Duration
	bytes uint64 // allocated the last time
	rss   int    // KiB, at most
}

func measure(ctx context.Context, l layout, services, endpoints, rounds int) error {
	box, err := newBox()
	if err != nil {
		return err
	}
	defer box.Close()
	rules, err := l.rules(services, endpoints)
	if err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "%s, %d x %d: loading…\n", l.name, services, endpoints)
	start := time.Now()
	if err := feed(box, rules.input, rules.load); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "%s, %d x %d: loaded in %.1f s\n", l.name, services, endpoints, time.Since(start).Seconds())

	rival := &measured{row: row{text: strings.Join(l.rival, " ")}}
	results := []*measured{rival}
	var children []*child
	for _, r := range l.rows {
		c, err := startChild(ctx, box, l.name+"/"+r.what)
		if err != nil {
			return err
		}
		defer c.stop()
		children = append(children, c)
		results = append(results, &measured{row: r})
	}
	changes := 0
	for range rounds {
		if err := rival.run(box, l.rival); err != nil {
			return err
		}
		for i, c := range children {
			m := results[i+1]
			if err := c.settle(); err != nil {
				return err
			}
			switch m.before {
			case change:
				if err := feed(box, rules.changes[changes%2], rules.change); err != nil {
					return err
				}
				changes++
			case traffic:
				connect(ctx, box, services)
			}
			s, err := c.ask(rules.chain)
			if err != nil {
				return fmt.Errorf("%s: %w", m.what, err)
			}
			m.took, m.bytes = append(m.took, s.took), s.bytes
		}
	}
	for i, c := range children {
		results[i+1].rss = c.peak()
	}
	print(l, services, endpoints, results)
	return nil
}

func newBox() (*nodebox.Box, error) {
	return nodebox.New(nodebox.Config{
		NodeAddrs:    []netip.Prefix{netip.PrefixFrom(kubeproxy.SyntheticNodeIP, 24)},
		OutsideAddrs: []netip.Prefix{netip.PrefixFrom(kubeproxy.SyntheticNodeIP.Next(), 24)},
	})
}

// run measures a program that runs anew each time.
func (m *measured) run(b *nodebox.Box, args []string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout = io.Discard
	start := time.Now()
	if err := b.Node.Run(cmd); err != nil {
		return fmt.Errorf("%v: %w", args, err)
	}
	m.took = append(m.took, time.Since(start))
	return nil // its memory is not told: the kernel counts this process's with it
}

// connect opens connections to Services, and does not wait for answers.
func connect(ctx context.Context, b *nodebox.Box, services int) {
	ctx, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	list := kubeproxy.Synthetic(services, 2)
	var all sync.WaitGroup
	for i := range activeServices {
		s := list[i*len(list)/activeServices]
		if s.Protocol != "TCP" {
			continue
		}
		all.Go(func() {
			to := netip.AddrPortFrom(s.ClusterIP, s.PortNumber)
			if conn, err := b.Node.Dial(ctx, "tcp", to.String()); err == nil {
				conn.Close()
			}
		})
	}
	all.Wait()
}

// child is a process that measures one row.
type child struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

func startChild(ctx context.Context, b *nodebox.Box, row string) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, "-child", row)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := b.Node.Start(cmd); err != nil {
		return nil, err
	}
	c := &child{cmd, in, bufio.NewScanner(out)}
	if !c.out.Scan() {
		return nil, fmt.Errorf("row %s ended: %w", row, cmd.Wait())
	}
	return c, nil
}

// settle lets the row take in what happened since it was asked last.
func (c *child) settle() error {
	_, err := c.ask("settle")
	return err
}

func (c *child) ask(what string) (s sample, err error) {
	if _, err := fmt.Fprintln(c.in, what); err != nil {
		return s, err
	}
	if !c.out.Scan() {
		return s, fmt.Errorf("it ended: %w", c.cmd.Wait())
	}
	var took int64
	_, err = fmt.Sscan(c.out.Text(), &took, &s.bytes)
	s.took = time.Duration(took)
	return s, err
}

// peak returns the largest memory of the process so far, in KiB.
func (c *child) peak() int {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	_, after, _ := strings.Cut(string(status), "VmHWM:")
	var kib int
	_, _ = fmt.Sscan(after, &kib)
	return kib
}

func (c *child) stop() {
	c.in.Close()
	_ = c.cmd.Wait()
}

func (m *measured) median() time.Duration { return median(m.took) }

// print prints the table of one ruleset, in Markdown.
func print(l layout, services, endpoints int, results []*measured) {
	rival := results[0].median()
	var read time.Duration
	for _, m := range results {
		if m.what == "read" {
			read = m.median()
		}
	}
	fmt.Printf("### %s, %d Services x %d endpoints\n\n", l.name, services, endpoints)
	fmt.Println("| | median | min–max | ratio | at most | met | peak memory | garbage |")
	fmt.Println("|---|---|---|---|---|---|---|---|")
	for i, m := range results {
		of, target, unit := rival, m.target, ""
		if m.what == "resolve" {
			of, target, unit = read, resolveTarget, " of the read"
		}
		ratio := float64(m.median()) / float64(of)
		limit, met := "", ""
		if target > 0 {
			limit, met = fmt.Sprint(target), "yes"
			if ratio > target {
				met = "**no**"
			}
		}
		memory, garbage := "", ""
		if i > 0 {
			memory, garbage = kib(m.rss), kib(int(m.bytes>>10))
		}
		fmt.Printf("| %s | %s | %s–%s | %.3g%s | %s | %s | %s | %s |\n", m.text, short(m.median()), short(slices.Min(m.took)), short(slices.Max(m.took)),
			ratio, unit, limit, met, memory, garbage)
	}
	fmt.Println()
}

func short(d time.Duration) string {
	switch {
	case d >= time.Second:
		return fmt.Sprintf("%.2f s", d.Seconds())
	case d >= time.Millisecond:
		return fmt.Sprintf("%.1f ms", float64(d)/1e6)
	}
	return fmt.Sprintf("%.1f µs", float64(d)/1e3)
}

func kib(n int) string {
	if n >= 10<<10 {
		return fmt.Sprintf("%d MB", n>>10)
	}
	return fmt.Sprintf("%d KB", n)
}

// machine tells what the figures were measured on.
func machine() string {
	cpu := "unknown processor"
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		if _, after, ok := strings.Cut(string(b), "model name\t: "); ok {
			cpu, _, _ = strings.Cut(after, "\n")
		}
	}
	var u unix.Utsname
	_ = unix.Uname(&u)
	version := func(name string, args ...string) string {
		out, err := exec.Command(name, args...).Output()
		if err != nil {
			return name + " missing"
		}
		return strings.TrimSpace(string(out))
	}
	return fmt.Sprintf("%d × %s, Linux %s, %s, %s, %s", runtime.NumCPU(), cpu, unix.ByteSliceToString(u.Release[:]),
		version("iptables", "--version"), version("nft", "--version"), runtime.Version())
}
