//go:build linux

package nfnetlink_test

import (
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/natlens/natlens/internal/nodebox"
	"github.com/natlens/natlens/pkg/internal/nfnetlink"
)

// TestAwait waits for transactions many times over, while there are some and
// while there are none: it never makes one.
func TestAwait(t *testing.T) {
	box, err := nodebox.New(nodebox.Config{
		NodeAddrs:    []netip.Prefix{netip.MustParsePrefix("10.146.0.2/24")},
		OutsideAddrs: []netip.Prefix{netip.MustParsePrefix("10.146.0.100/24")},
	})
	if errors.Is(err, syscall.EPERM) {
		if os.Getenv("CI") == "true" {
			t.Fatalf("not to be skipped with CI=true: %v", err)
		}
		t.Skipf("skipping: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer box.Close()
	var conn *nfnetlink.Conn
	err = box.Node.Do(func() (err error) {
		conn, err = nfnetlink.Open()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	generation := func() uint32 {
		t.Helper()
		g, err := conn.Generation()
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	before := generation()
	for range 100 {
		if err := conn.Await(generation()); err != nil {
			t.Fatal(err)
		}
	}
	if after := generation(); after != before {
		t.Errorf("waiting made generation %d of %d", after, before)
	}

	const transactions = 50
	done := make(chan error, 1)
	go func() {
		for range transactions {
			cmd := exec.Command("nft", "-f", "-")
			cmd.Stdin = strings.NewReader("add table ip t\nflush table ip t\nadd chain ip t c\n" + strings.Repeat("add rule ip t c accept\n", 500))
			if err := box.Node.Run(cmd); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	for running := true; running; {
		select {
		case err := <-done:
			if err != nil {
				t.Skipf("skipping: %v", err)
			}
			running = false
		default:
			if err := conn.Await(generation()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if after := generation(); after != before+transactions {
		t.Errorf("%d transactions made %d generations", transactions, after-before)
	}
}
