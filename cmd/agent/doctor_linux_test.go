package main

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/natlens/natlens/internal/doctor"
	"github.com/natlens/natlens/internal/nodebox"
)

// TestDoctorOnFixtures loads every recording into a kernel, with each backend
// that it may have come from, and wants doctor to find that the readers agree.
func TestDoctorOnFixtures(t *testing.T) {
	names, _ := filepath.Glob("../../testdata/captures/v*")
	if len(names) == 0 {
		t.Fatal("no recordings")
	}
	for _, name := range names {
		loaders := []string{"iptables-nft-restore", "iptables-legacy-restore"}
		switch {
		case strings.HasSuffix(name, ".save6"):
			loaders = []string{"ip6tables-nft-restore", "ip6tables-legacy-restore"}
		case strings.HasSuffix(name, ".json"):
			loaders = []string{"nft -f -"}
		}
		for _, loader := range loaders {
			t.Run(filepath.Base(name)+" "+loader, func(t *testing.T) {
				box := doctorBox(t)
				args := strings.Fields(loader)
				text, err := os.ReadFile(name)
				if err != nil {
					t.Fatal(err)
				}
				if strings.HasSuffix(name, ".json") {
					args = []string{"nft", "-j", "-f", "-"}
				}
				for _, object := range []string{"ct_state_invalid_dropped_pkts", "localhost_nps_accepted_pkts"} {
					_ = box.Node.Run(exec.Command("nfacct", "add", object))
				}
				inBox(t, box, string(text), args...)
				var r *doctor.Report
				err = box.Node.Do(func() error {
					r = examineNode(t.Context())
					return nil
				})
				if err != nil {
					t.Fatal(err)
				}
				if !r.Agree || len(r.Tables) == 0 || len(r.Notes) == 0 {
					t.Errorf("agree %t, tables %+v, differences %+v, problems %q, notes %q", r.Agree, r.Tables, r.Differences, r.Problems, r.Notes)
				}
			})
		}
	}
}

func doctorBox(t *testing.T) *nodebox.Box {
	t.Helper()
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
	t.Cleanup(func() { box.Close() })
	return box
}

func inBox(t *testing.T, box *nodebox.Box, input string, args ...string) {
	t.Helper()
	var errs bytes.Buffer
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stderr = strings.NewReader(input), &errs
	if err := box.Node.Run(cmd); err != nil {
		if errors.Is(err, exec.ErrNotFound) && os.Getenv("CI") != "true" {
			t.Skipf("skipping: %v", err)
		}
		t.Fatalf("%v: %v: %s", args, err, &errs)
	}
}
