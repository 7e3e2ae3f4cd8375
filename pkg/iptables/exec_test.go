//go:build linux

package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/natlens/natlens/internal/nodebox"
	"github.com/natlens/natlens/internal/nodebox/boxtest"
	"github.com/natlens/natlens/pkg/netfilter"
)

// nobody is a user without any privilege.
const nobody = 65534

// unable ends a test that cannot run here. On the project's own machines
// everything is there, so that there a silent skip would hide a broken setup.
func unable(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("not to be skipped with CI=true: "+format, args...)
	}
	t.Skipf("skipping: "+format, args...)
}

// newNode makes a network namespace without any rules.
func newNode(t *testing.T, programs ...string) *nodebox.Box {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			unable(t, "%v", err)
		}
	}
	b, err := nodebox.New(nodebox.Config{
		// Without IPv6 addresses, nothing is sent but what a test sends: counters
		// stand still. Rules of IPv6 can be loaded all the same.
		NodeAddrs:    []netip.Prefix{netip.MustParsePrefix("10.146.0.2/24")},
		OutsideAddrs: []netip.Prefix{netip.MustParsePrefix("10.146.0.100/24")},
	})
	if errors.Is(err, syscall.EPERM) {
		unable(t, "%v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// everyProgram are the programs of both backends and families.
var everyProgram = []string{
	"iptables-nft-save", "iptables-nft-restore", "ip6tables-nft-save", "ip6tables-nft-restore",
	"iptables-legacy-save", "iptables-legacy-restore", "ip6tables-legacy-save", "ip6tables-legacy-restore",
}

// restore loads one rule with a comment into table nat.
func restore(t *testing.T, b *nodebox.Box, backend nodebox.Backend, ipv6 bool, comment string) {
	t.Helper()
	rules := "*nat\n:OWN - [0:0]\n-A OWN -m comment --comment " + comment + " -j RETURN\nCOMMIT\n"
	if err := b.Restore(t.Context(), backend, ipv6, strings.NewReader(rules)); err != nil {
		t.Fatal(err)
	}
}

// run runs a program in the node and returns what it prints.
func run(t *testing.T, b *nodebox.Box, name string, args ...string) (stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := b.Node.Run(cmd); err != nil {
		t.Fatalf("%v: %v: %s", cmd.Args, err, &errs)
	}
	return out.String(), errs.String()
}

// readIn reads the rules of the node with a new Exec.
func readIn(t *testing.T, b *nodebox.Box) *netfilter.Ruleset {
	t.Helper()
	var rs *netfilter.Ruleset
	err := b.Node.Do(func() error {
		x, err := NewExec()
		if err != nil {
			return err
		}
		rs, err = x.Read(t.Context())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if rs.Torn {
		t.Error("the rules are said to have changed meanwhile")
	}
	return rs
}

// summary lists the tables, each with the comment of its only rule.
func summary(rs *netfilter.Ruleset) string {
	var list []string
	for _, t := range rs.Tables {
		s := fmt.Sprintf("%s %s %s", t.Family, t.Backend, t.Name)
		if c := t.Lookup("OWN"); c != nil && c.Len() > 0 {
			s += " " + c.Comment(0)
			if _, counted := c.Counter(0); !counted {
				s += " without counter"
			}
		}
		list = append(list, s)
	}
	return strings.Join(list, ", ")
}

// legacyNames returns the tables that the legacy backend has in the node.
func legacyNames(t *testing.T, b *nodebox.Box) string {
	t.Helper()
	var names []byte
	err := b.Node.Do(func() error {
		for _, f := range []string{"ip_tables_names", "ip6_tables_names"} {
			text, err := os.ReadFile("/proc/thread-self/net/" + f)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			names = append(names, text...)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(strings.Fields(string(names)), " ")
}

// TestReadBothBackends wants every table, with its backend, also where the
// programs of one warn on standard error of the other's tables.
func TestReadBothBackends(t *testing.T) {
	b := newNode(t, everyProgram...)
	restore(t, b, nodebox.NFT, false, "nft4")
	restore(t, b, nodebox.NFT, true, "nft6")
	restore(t, b, nodebox.Legacy, false, "legacy4")
	restore(t, b, nodebox.Legacy, true, "legacy6")
	if out, errs := run(t, b, "iptables-nft-save"); !strings.Contains(errs, legacyWarning) || strings.Contains(out, legacyWarning) {
		t.Logf("this iptables does not warn on standard error: %q", errs)
	}
	rs := readIn(t, b)
	want := "ipv4 iptables-nft nat nft4, ipv4 iptables-legacy nat legacy4, ipv6 iptables-nft nat nft6, ipv6 iptables-legacy nat legacy6"
	if got := summary(rs); got != want || len(rs.Unreadable) > 0 {
		t.Errorf("read %s, and not %v; want %s", got, rs.Unreadable, want)
	}
}

// TestReadCreatesNothing reads where one backend or none has tables. Looking at
// a legacy table makes it, and nothing but a reboot makes it go again, so the
// reader must not look.
func TestReadCreatesNothing(t *testing.T) {
	for _, c := range []struct {
		name    string
		backend nodebox.Backend
		want    string
		legacy  string
	}{
		{"nothing", "", "", ""},
		{"nft alone", nodebox.NFT, "ipv4 iptables-nft nat here, ipv6 iptables-nft nat here", ""},
		{"legacy alone", nodebox.Legacy, "ipv4 iptables-legacy nat here, ipv6 iptables-legacy nat here", "nat nat"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newNode(t, append(everyProgram, "nft")...)
			if c.backend != "" {
				restore(t, b, c.backend, false, "here")
				restore(t, b, c.backend, true, "here")
			}
			tables, _ := run(t, b, "nft", "list", "tables")
			for range 2 {
				rs := readIn(t, b)
				if got := summary(rs); got != c.want || len(rs.Unreadable) > 0 {
					t.Errorf("read %q, and not %v; want %q", got, rs.Unreadable, c.want)
				}
			}
			if got := legacyNames(t, b); got != c.legacy {
				t.Errorf("after reading there are the legacy tables %q, want %q", got, c.legacy)
			}
			after, _ := run(t, b, "nft", "list", "tables")
			if after != tables || c.backend != nodebox.NFT && after != "" {
				t.Errorf("nft list tables printed %q before reading, %q after", tables, after)
			}
		})
	}
}

// TestReadIncompatible puts a rule into a table that iptables-nft-save cannot
// print: it says so in a comment, and with success.
func TestReadIncompatible(t *testing.T) {
	for _, f := range []struct {
		nft    string
		family netfilter.Family
	}{{"ip", netfilter.IPv4}, {"ip6", netfilter.IPv6}} {
		t.Run(f.nft, func(t *testing.T) {
			b := newNode(t, append(everyProgram, "nft")...)
			restore(t, b, nodebox.NFT, false, "four")
			restore(t, b, nodebox.NFT, true, "six")
			restore(t, b, nodebox.Legacy, false, "legacy")
			run(t, b, "nft", "add chain "+f.nft+" nat FOREIGN; add rule "+f.nft+" nat FOREIGN numgen random mod 2 vmap { 0 : jump OWN, 1 : accept }")
			rs := readIn(t, b)
			if len(rs.Unreadable) != 1 || rs.Unreadable[0].Family != f.family || rs.Unreadable[0].Table != "nat" || !strings.Contains(rs.Unreadable[0].Reason, "nft") {
				t.Errorf("unreadable are %+v", rs.Unreadable)
			}
			want := "ipv4 iptables-legacy nat legacy, ipv6 iptables-nft nat six"
			if f.family == netfilter.IPv6 {
				want = "ipv4 iptables-nft nat four, ipv4 iptables-legacy nat legacy"
			}
			if got := summary(rs); got != want {
				t.Errorf("read %s, want %s", got, want)
			}
		})
	}
}

// TestReadBesideLock reads while another process holds the lock that writers of
// the legacy backend take.
func TestReadBesideLock(t *testing.T) {
	lock := filepath.Join(t.TempDir(), "xtables.lock")
	f, err := os.Create(lock)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := newNode(t, everyProgram...)
	restore(t, b, nodebox.Legacy, false, "here")
	// A lock belongs to the open file, so that this test's own hinders its
	// children as another process's would.
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	t.Setenv("XTABLES_LOCKFILE", lock)
	start := time.Now()
	if got, want := summary(readIn(t, b)), "ipv4 iptables-legacy nat here"; got != want {
		t.Errorf("read %q, want %q", got, want)
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("reading took %v", d)
	}
}

// TestReadUnprivileged reads as a user who may not, in a process of its own.
func TestReadUnprivileged(t *testing.T) {
	if boxtest.IsAgain() {
		x, err := NewExec()
		if err == nil {
			_, err = x.Read(context.Background())
		}
		fmt.Printf("answer: %v\n", err)
		return
	}
	b := newNode(t, everyProgram...)
	restore(t, b, nodebox.NFT, false, "nft")
	for _, legacy := range []bool{false, true} {
		if legacy {
			restore(t, b, nodebox.Legacy, false, "legacy")
		}
		if got := boxtest.Again(t, b.Node); !strings.Contains(got, "permission denied") || !strings.Contains(got, "NET_ADMIN") {
			t.Errorf("with legacy tables %v, it said %q", legacy, got)
		}
	}
}

// fake makes an Exec whose only programs are shell scripts, one per body.
func fake(t *testing.T, bodies ...string) *Exec {
	t.Helper()
	dir := t.TempDir()
	x := &Exec{seed: maphash.MakeSeed(), last: map[Program]uint64{}, worked: map[Program]bool{}}
	for i, body := range bodies {
		path := filepath.Join(dir, fmt.Sprintf("save%d", i))
		if err := os.WriteFile(path, []byte("#!/bin/sh\ncd "+dir+"\n"+body+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		x.programs = append(x.programs, Program{
			Family: []netfilter.Family{netfilter.IPv4, netfilter.IPv6}[i%2], Backend: netfilter.BackendNFT, Path: path, Version: "0",
		})
	}
	return x
}

// dump is a shell command that prints a table.
func dump(table, chain string) string {
	return "printf '# Generated by iptables-save v1.8.9 (nf_tables)\\n*" + table + "\\n:" + chain + " - [0:0]\\nCOMMIT\\n'"
}

func dump6(table, chain string) string {
	return strings.Replace(dump(table, chain), "iptables-save", "ip6tables-save", 1)
}

// TestReadFailures wants an error that names the program, and says what it
// said; and what another program did read.
func TestReadFailures(t *testing.T) {
	for _, c := range []struct {
		name, body, want string
	}{
		{"fails", "echo 'something broke' >&2; exit 3", "exit status 3: something broke"},
		{"fails with several lines", "echo one >&2; echo two >&2; exit 1", "exit status 1: one two"},
		{"fails silently", "exit 4", "exit status 4"},
		{"fails after a table", dump("nat", "A") + "; exit 1", "exit status 1"},
		{"killed", "kill -KILL $$", "signal: killed"},
		{"crashes", "kill -SEGV $$", "signal: segmentation fault"},
		{"garbage", "echo hello", `not "hello"`},
		{"binary", `printf '\000\001\377'`, ""},
		{"cut within a table", dump("nat", "A") + " | head -n 3", "COMMIT is missing"},
		{"cut behind the header", dump("nat", "A") + " | head -n 1", "holds no table"},
		{"no permission", "echo 'iptables-save: Could not fetch rule set generation id: Permission denied (you must be root)' >&2; exit 4", "permission denied: reading the kernel's rules needs root with the capability NET_ADMIN"},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := fake(t, c.body)
			_, err := x.Read(t.Context())
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), x.programs[0].Path) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error is %v; want one line with the program's name and %q", err, c.want)
			}
			// The other family's rules are not lost, nor is the failure.
			x = fake(t, c.body, dump6("nat", "B"))
			rs, err := x.Read(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if len(rs.Tables) != 1 || rs.Tables[0].Family != netfilter.IPv6 || rs.Tables[0].Lookup("B") == nil {
				t.Errorf("beside it %s was read", summary(rs))
			}
			if len(rs.Unreadable) != 1 || rs.Unreadable[0].Family != netfilter.IPv4 || !strings.Contains(rs.Unreadable[0].Reason, c.want) || !strings.Contains(rs.Unreadable[0].Reason, x.programs[0].Path) {
				t.Errorf("unreadable are %+v", rs.Unreadable)
			}
		})
	}
}

// TestReadMissing reads with a program that was removed since it was found.
func TestReadMissing(t *testing.T) {
	x := fake(t, "true")
	if err := os.Remove(x.programs[0].Path); err != nil {
		t.Fatal(err)
	}
	if _, err := x.Read(t.Context()); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), x.programs[0].Path) {
		t.Errorf("error is %v", err)
	}
}

// TestReadHanging ends a program that hangs, and does not wait for its children
// to let go of its output.
func TestReadHanging(t *testing.T) {
	x := fake(t, "sleep 30 & echo $! > child; wait")
	t.Cleanup(func() {
		text, err := os.ReadFile(filepath.Join(filepath.Dir(x.programs[0].Path), "child"))
		if err != nil {
			t.Error(err)
			return
		}
		child, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil {
			t.Error(err)
			return
		}
		syscall.Kill(child, syscall.SIGKILL)
	})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err := x.Read(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), x.programs[0].Path) {
		t.Errorf("error is %v", err)
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("Read returned after %v", d)
	}
}

// TestReadWarning wants a warning on standard error to stay out of the rules.
func TestReadWarning(t *testing.T) {
	x := fake(t, "echo '"+legacyWarning+", use iptables-legacy-save to see them' >&2; "+dump("nat", "A"))
	rs, err := x.Read(t.Context())
	if err != nil || len(rs.Tables) != 1 || len(rs.Unreadable) != 0 {
		t.Errorf("error %v, rules %+v", err, rs)
	}
}

// TestReadNothing wants the empty output of a kernel without tables to be no
// error.
func TestReadNothing(t *testing.T) {
	rs, err := fake(t, "true").Read(t.Context())
	if err != nil || len(rs.Tables) != 0 || len(rs.Unreadable) != 0 || rs.Torn {
		t.Errorf("error %v, rules %+v", err, rs)
	}
}

// runs returns how often the fake program was run that counts its runs.
func runs(t *testing.T, x *Exec) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(filepath.Dir(x.programs[0].Path), "runs"))
	if err != nil {
		t.Fatal(err)
	}
	return len(b)
}

// TestReadSettles reads rules that change between runs of the program, and
// wants as many runs as it takes for two in a row to agree, four at most.
func TestReadSettles(t *testing.T) {
	// counting prints the n-th of the given chains in its n-th run, and then
	// the last one.
	counting := func(chains ...string) string {
		body := "printf x >> runs; n=$(wc -c < runs)\n"
		for i, c := range chains[:len(chains)-1] {
			body += fmt.Sprintf("if [ $n -eq %d ]; then %s; exit; fi\n", i+1, dump("nat", c))
		}
		return body + dump("nat", chains[len(chains)-1])
	}
	for _, c := range []struct {
		name     string
		chains   []string
		runs     int
		torn     bool
		last     string
		next     int // runs of the next reading
		nextTorn bool
	}{
		{"unchanged", []string{"A"}, 2, false, "A", 1, false},
		{"settles", []string{"A", "B"}, 3, false, "B", 1, false},
		{"settles late", []string{"A", "B", "C"}, 4, false, "C", 1, false},
		{"to and fro", []string{"A", "B", "A", "B", "A"}, 4, true, "B", 2, false},
		{"does not settle", []string{"A", "B", "C", "D", "E", "F", "G", "H", "I"}, 4, true, "D", 4, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := fake(t, counting(c.chains...))
			rs, err := x.Read(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if got := runs(t, x); got != c.runs || rs.Torn != c.torn || rs.Tables[0].Lookup(c.last) == nil {
				t.Errorf("%d runs, torn %v, read %s; want %d, %v, chain %s", got, rs.Torn, summary(rs), c.runs, c.torn, c.last)
			}
			if rs, err = x.Read(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := runs(t, x) - c.runs; got != c.next || rs.Torn != c.nextTorn {
				t.Errorf("the next reading took %d runs, torn %v; want %d, %v", got, rs.Torn, c.next, c.nextTorn)
			}
		})
	}
}

// TestReadCounting wants counters that grow, and a date, not to count as a
// change of the rules.
func TestReadCounting(t *testing.T) {
	x := fake(t, `printf x >> runs; n=$(wc -c < runs)
printf "# Generated by iptables-save v1.8.9 (nf_tables) on day $n\n*nat\n:A - [$n:0]\n:PREROUTING ACCEPT [$n:$n]\n[$n:60] -A A -j ACCEPT\nCOMMIT\n# Completed on day $n\n"`)
	for i, want := range []int{2, 1, 1} {
		before := 0
		if i > 0 {
			before = runs(t, x)
		}
		rs, err := x.Read(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		n := runs(t, x)
		counter, ok := rs.Tables[0].Lookup("A").Counter(0)
		if n-before != want || rs.Torn || !ok || counter.Packets != uint64(n) {
			t.Errorf("reading %d: %d runs, torn %v, counter %v %v", i, n-before, rs.Torn, counter, ok)
		}
	}
}

// TestNewExec wants the programs of both backends and families to be found, and
// an error that helps where there are none.
func TestNewExec(t *testing.T) {
	for _, p := range everyProgram {
		if _, err := exec.LookPath(p); err != nil {
			unable(t, "%v", err)
		}
	}
	x, err := NewExec()
	if err != nil {
		t.Fatal(err)
	}
	if len(x.Programs()) != 4 {
		t.Errorf("programs are %+v", x.Programs())
	}
	for _, p := range x.Programs() {
		if !filepath.IsAbs(p.Path) || !strings.HasPrefix(p.Version, "1.") || !strings.HasSuffix(filepath.Base(p.Path), string(p.Backend[len("iptables"):])+"-save") ||
			strings.HasPrefix(filepath.Base(p.Path), "ip6") != (p.Family == netfilter.IPv6) {
			t.Errorf("program %+v", p)
		}
	}
	t.Setenv("PATH", t.TempDir())
	if _, err := NewExec(); err == nil || !strings.Contains(err.Error(), "install the package iptables") || strings.Contains(err.Error(), "\n") {
		t.Errorf("without any program: %v", err)
	}
}

// TestNewExecOld finds the only program of the years before there were two
// backends, and that of one family where the other's is missing.
func TestNewExecOld(t *testing.T) {
	dir := t.TempDir()
	script := func(name, body string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	script("iptables", "echo 'iptables v1.6.1'")
	script("iptables-save", "true")
	script("ip6tables", "echo 'ip6tables v1.6.1'") // and no ip6tables-save
	t.Setenv("PATH", dir)
	x, err := NewExec()
	if err != nil {
		t.Fatal(err)
	}
	want := Program{Family: netfilter.IPv4, Backend: netfilter.BackendLegacy, Path: filepath.Join(dir, "iptables-save"), Version: "1.6.1"}
	if len(x.Programs()) != 1 || x.Programs()[0] != want {
		t.Errorf("programs are %+v, want %+v", x.Programs(), want)
	}
}
