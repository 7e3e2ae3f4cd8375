// Package boxtest is what tests of several packages do in a node in a box.
package boxtest

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/natlens/natlens/internal/nodebox"
)

// helper is the environment variable that tells a test that it is the one in Again.
const helper = "NATLENS_TEST_AGAIN"

// IsAgain reports whether the calling test is the one that Again runs.
func IsAgain() bool { return os.Getenv(helper) != "" }

// Again runs the calling test once more, in a process of its own: in the
// namespace, and as a user without privileges but these capabilities. It returns
// the rest of the line that begins with "answer: " of what that prints.
func Again(t *testing.T, in *nodebox.Namespace, caps ...uintptr) string {
	t.Helper()
	const nobody = 65534
	cmd := exec.CommandContext(t.Context(), Program(t), "-test.run=^"+t.Name()+"$")
	cmd.Env, cmd.Dir = append(os.Environ(), helper+"=1"), "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}, AmbientCaps: caps}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := in.Run(cmd); err != nil {
		t.Fatalf("%v: %s", err, &out)
	}
	for line := range strings.Lines(out.String()) {
		if answer, ok := strings.CutPrefix(line, "answer: "); ok {
			return strings.TrimSpace(answer)
		}
	}
	t.Fatalf("no answer: %s", &out)
	return ""
}

// Program copies the test's program, which stands where only its owner may look, to
// where everybody may.
func Program(t *testing.T) string {
	t.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "natlens-test-") // the parent of t.TempDir is its owner's
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	exe := filepath.Join(dir, "test")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(exe, self, 0o755)); err != nil {
		t.Fatal(err)
	}
	return exe
}
