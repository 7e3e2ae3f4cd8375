package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/testscript"
)

// TestMain puts the program itself into the PATH of all tests, as agent.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"agent": main})
}

// goRace keeps a program that was built with -race from sleeping for a second
// whenever it ends.
const goRace = "atexit_sleep_ms=0"

// root is the root of the repository.
func root(t testing.TB) string {
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestScripts(t *testing.T) {
	captures := filepath.Join(root(t), "testdata", "captures")
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			env.Setenv("GORACE", goRace)
			env.Setenv("CAPTURES", captures)
			env.Setenv("RULES", filepath.Join(captures, "v1.35.4-iptables.save"))
			env.Setenv("RULES6", filepath.Join(captures, "v1.35.4-iptables.save6"))
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"usage":     refuses(exitUsage),
			"failure":   refuses(exitFailure),
			"json":      isJSON,
			"freeport":  freePort,
			"busyport":  busyPort,
			"get":       get,
			"until":     until,
			"terminate": terminate,
		},
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
	})
}

// refuses returns a script command, REGEXP ARGUMENT…, that runs the agent and
// checks how it fails: the exit code, nothing on stdout, and one line on stderr
// that the expression matches.
func refuses(code int) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		if neg || len(args) < 1 {
			ts.Fatalf("want REGEXP [ARGUMENT]…")
		}
		err := ts.Exec("agent", args[1:]...)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != code {
			ts.Fatalf("want exit code %d, got: %v", code, err)
		}
		if out := ts.ReadFile("stdout"); out != "" {
			ts.Fatalf("a failure prints to stdout: %q", out)
		}
		said := ts.ReadFile("stderr")
		line, ok := strings.CutSuffix(said, "\n")
		if !ok || !strings.HasPrefix(line, "agent: ") || strings.ContainsAny(line, "\n\r") {
			ts.Fatalf("stderr is not one line that begins with \"agent: \": %q", said)
		}
		if !regexp.MustCompile(args[0]).MatchString(line) {
			ts.Fatalf("stderr does not match %q: %q", args[0], line)
		}
	}
}

// isJSON checks that what the last command printed is one JSON document.
func isJSON(ts *testscript.TestScript, _ bool, _ []string) {
	dec := json.NewDecoder(strings.NewReader(ts.ReadFile("stdout")))
	var doc map[string]any
	ts.Check(dec.Decode(&doc))
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		ts.Fatalf("something follows the document")
	}
}

// freePort sets a variable to a port of loopback that nothing listens on.
func freePort(ts *testscript.TestScript, _ bool, args []string) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Check(ln.Close())
	ts.Setenv(args[0], strconv.Itoa(ln.Addr().(*net.TCPAddr).Port))
}

// busyPort sets a variable to a port of loopback that is taken.
func busyPort(ts *testscript.TestScript, _ bool, args []string) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Defer(func() { ln.Close() })
	ts.Setenv(args[0], strconv.Itoa(ln.Addr().(*net.TCPAddr).Port))
}

// patience bounds how long a script waits for a server: long, since it is
// only spent when the test fails.
const patience = 30 * time.Second

// get STATUS URL prints the answer; while nothing listens yet it tries again.
func get(ts *testscript.TestScript, _ bool, args []string) {
	status, body := fetch(ts, args[1], func(int, string) bool { return true })
	if strconv.Itoa(status) != args[0] {
		ts.Fatalf("GET %s: status %d, want %s: %s", args[1], status, args[0], body)
	}
	fmt.Fprint(ts.Stdout(), body)
}

// until URL REGEXP asks again until the answer matches, and prints it.
func until(ts *testscript.TestScript, _ bool, args []string) {
	want := regexp.MustCompile(args[1])
	_, body := fetch(ts, args[0], func(_ int, body string) bool { return want.MatchString(body) })
	fmt.Fprint(ts.Stdout(), body)
}

func fetch(ts *testscript.TestScript, url string, enough func(int, string) bool) (status int, body string) {
	var last error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		resp, err := http.Get(url)
		if err != nil {
			last = err
			continue
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		ts.Check(err)
		if enough(resp.StatusCode, string(b)) {
			return resp.StatusCode, string(b)
		}
		last = fmt.Errorf("status %d: %s", resp.StatusCode, b)
	}
	ts.Fatalf("GET %s: waited in vain; last: %v", url, last)
	return 0, ""
}

// terminate sends SIGTERM to the background commands, which kill cannot.
func terminate(ts *testscript.TestScript, _ bool, _ []string) {
	for _, cmd := range ts.BackgroundCmds() {
		ts.Check(cmd.Process.Signal(syscall.SIGTERM))
	}
}

// TestReadme runs the examples of README.md: in a ```console block, a line
// "$ agent … -f testdata/…" is run in the root of the repository, and the lines
// below it, up to the next "$ " or the end of the block, are what it prints. A
// line "…" stands for any number of lines.
func TestReadme(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root(t), "README.md"))
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("there is no README.md")
	} else if err != nil {
		t.Fatal(err)
	}
	for _, ex := range examples(string(text)) {
		t.Run(ex.command, func(t *testing.T) {
			cmd := exec.Command("sh", "-c", ex.command)
			cmd.Dir = root(t)
			cmd.Env = append(cmd.Environ(), "GORACE="+goRace)
			got, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) { // a failing command may be what it shows
				t.Fatal(err)
			}
			if !fits(ex.output, lines(string(got))) {
				t.Errorf("README.md line %d (-want +got):\n%s", ex.line, cmp.Diff(strings.Join(ex.output, "\n"), strings.TrimSuffix(string(got), "\n")))
			}
		})
	}
}

// example is a command in README.md with the output it shows.
type example struct {
	line    int
	command string
	output  []string
}

func examples(text string) []example {
	var out []example
	inside, wanted := false, false
	for i, line := range strings.Split(text, "\n") {
		fence := strings.HasPrefix(line, "```")
		command, isCommand := strings.CutPrefix(line, "$ ")
		switch {
		case fence:
			inside, wanted = !inside && line == "```console", false
		case inside && isCommand:
			wanted = strings.HasPrefix(command, "agent ") && strings.Contains(command, "-f testdata/")
			if wanted {
				out = append(out, example{line: i + 1, command: command})
			}
		case inside && wanted:
			ex := &out[len(out)-1]
			ex.output = append(ex.output, line)
		}
	}
	for i := range out { // blank lines set commands apart
		for n := len(out[i].output); n > 0 && out[i].output[n-1] == ""; n-- {
			out[i].output = out[i].output[:n-1]
		}
	}
	return out
}

func lines(s string) []string {
	s = strings.TrimRight(s, "\n")
	if s == "" {
		return nil
	}
	return strings.Split(s, "\n")
}

// fits reports whether lines are as wanted, where "…" fits any number of them.
func fits(want, got []string) bool {
	for i, line := range want {
		if line != "…" {
			continue
		}
		if len(got) < i || !slices.Equal(want[:i], got[:i]) {
			return false
		}
		for skip := i; skip <= len(got); skip++ {
			if fits(want[i+1:], got[skip:]) {
				return true
			}
		}
		return false
	}
	return slices.Equal(want, got)
}

func TestExamples(t *testing.T) {
	text := strings.Join([]string{
		"$ agent services -f testdata/outside", "```console", "$ agent services -f testdata/a", "one", "…", "four", "",
		"$ agent serve", "not run", "```", "```console", "$ agent trace x -f testdata/b", "```", "```sh", "$ agent version -f testdata/c", "```",
	}, "\n")
	want := []example{
		{3, "agent services -f testdata/a", []string{"one", "…", "four"}},
		{12, "agent trace x -f testdata/b", nil},
	}
	if diff := cmp.Diff(want, examples(text), cmp.AllowUnexported(example{})); diff != "" {
		t.Errorf("examples (-want +got):\n%s", diff)
	}
	for _, tt := range []struct {
		want, got string
		fits      bool
	}{
		{"one\n…\nfour", "one\ntwo\nthree\nfour", true},
		{"one\n…\nfour", "one\nfour", true},
		{"one\n…\nfour", "one\ntwo", false},
		{"one\n…", "one", true},
		{"…\ntwo", "one\n", false},
		{"", "one", false},
		{"", "", true},
	} {
		if got := fits(lines(tt.want), lines(tt.got)); got != tt.fits {
			t.Errorf("fits(%q, %q) = %t", tt.want, tt.got, got)
		}
	}
}

// failingWriter is a stdout that is full.
type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errors.New("no space left") }

// TestStdoutFails checks that an answer that cannot be printed in full is a
// failure in every format.
func TestStdoutFails(t *testing.T) {
	rules := filepath.Join(root(t), "testdata", "captures", "v1.35.4-iptables.save")
	for _, args := range [][]string{
		{"services", "-f", rules}, {"services", "-f", rules, "-o", "wide"}, {"services", "-f", rules, "-o", "json"}, {"services", "-f", rules, "-o", "yaml"},
		{"trace", "10.56.15.149:80", "-f", rules}, {"version"},
	} {
		var stderr bytes.Buffer
		if code := run(t.Context(), args, strings.NewReader(""), failingWriter{}, &stderr); code != exitFailure || stderr.String() != "agent: no space left\n" {
			t.Errorf("%v: exit code %d, stderr %q", args, code, stderr.String())
		}
	}
}
