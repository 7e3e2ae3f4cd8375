package main

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestMain lets the test binary stand in for the command, so that signals and
// exit codes are tested on a real process.
func TestMain(m *testing.M) {
	if os.Getenv("ECHO_TEST_AS_COMMAND") != "" {
		main()
	}
	os.Exit(m.Run())
}

func TestRunUsage(t *testing.T) {
	tests := []struct {
		args           []string
		code           int
		stdout, stderr string // regular expressions for the whole output
	}{
		{[]string{"-version"}, 0, `echo \S+ ` + regexp.QuoteMeta(runtime.Version()) + "\n", ""},
		{[]string{"-h"}, 0, `(?s)Usage of echo:\n.*-drain duration.*\(default 2s\).*-listen address.*\(default ":8080"\).*`, ""},
		{[]string{"-nothing"}, 2, "", "echo: flag provided but not defined: -nothing\n"},
		{[]string{"-drain", "x"}, 2, "", `echo: invalid value "x" for flag -drain: .*` + "\n"},
		{[]string{"-drain", "-1s"}, 2, "", "echo: -drain -1s is negative\n"},
		{[]string{"extra"}, 2, "", "echo: unexpected argument \"extra\"\n"},
		{[]string{"-listen", "127.0.0.1:x"}, 1, "", "echo: listen tcp: .*\n"},
	}
	for _, tt := range tests {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			var stdout, stderr strings.Builder
			if code := run(t.Context(), tt.args, &stdout, &stderr); code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			match(t, "stdout", tt.stdout, stdout.String())
			match(t, "stderr", tt.stderr, stderr.String())
		})
	}
}

func match(t *testing.T, what, pattern, got string) {
	t.Helper()
	if !regexp.MustCompile(`\A` + pattern + `\z`).MatchString(got) {
		t.Errorf("%s is %q, want %s", what, got, pattern)
	}
}

// TestSIGTERM follows one process from its start to exit code 0: it serves,
// turns unready on the signal while it still answers, and ends by itself.
func TestSIGTERM(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], "-listen", "127.0.0.1:0")
	cmd.Env = append(os.Environ(), "ECHO_TEST_AS_COMMAND=1", "POD_NAME=go-app-1")
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	log := bufio.NewScanner(stderr)
	url := "http://" + waitFor(t, log, `msg=listening address=(\S+)`)

	if code, body := get(t, url+"/json"); code != 200 || !strings.Contains(body, `"pod":"go-app-1"`) {
		t.Errorf("/json: %d %s", code, body)
	}
	if code, _ := get(t, url+"/readyz"); code != 200 {
		t.Errorf("/readyz before the signal: %d", code)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	waitFor(t, log, `msg=(stopping) drain=2s`)
	if code, _ := get(t, url+"/readyz"); code != 503 {
		t.Errorf("/readyz after the signal: %d", code)
	}
	if code, _ := get(t, url+"/json"); code != 200 {
		t.Errorf("/json after the signal: %d", code)
	}
	for log.Scan() { // to the end, before Wait closes the pipe
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("exit: %v", err)
	}
}

// waitFor reads the log up to a line that matches and returns the submatch.
func waitFor(t *testing.T, log *bufio.Scanner, pattern string) string {
	t.Helper()
	re := regexp.MustCompile(pattern)
	for log.Scan() {
		if m := re.FindStringSubmatch(log.Text()); m != nil {
			return m[1]
		}
	}
	t.Fatalf("the log ended without %s: %v", pattern, log.Err())
	return ""
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}
