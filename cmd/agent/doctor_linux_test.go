package main

import (
	"bytes"
	"encoding/json"
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
	type fixture struct{ name, rules, loader string }
	var fixtures []fixture
	names, _ := filepath.Glob("../../testdata/captures/*.save*")
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		loaders := []string{"iptables-nft-restore", "iptables-legacy-restore"}
		if strings.HasSuffix(name, "6") {
			loaders = []string{"ip6tables-nft-restore", "ip6tables-legacy-restore"}
		}
		for _, loader := range loaders {
			fixtures = append(fixtures, fixture{filepath.Base(name), string(text), loader})
		}
	}
	text, err := os.ReadFile("../../testdata/flows/flow-nftables-v1.35.4.json")
	if err != nil {
		t.Fatal(err)
	}
	var flows []struct{ Test, NFT string }
	if err := json.Unmarshal(text, &flows); err != nil {
		t.Fatal(err)
	}
	for _, f := range flows {
		fixtures = append(fixtures, fixture{f.Test, f.NFT, "nft -f -"})
	}
	if len(names) == 0 || len(flows) == 0 {
		t.Fatal("no recordings")
	}
	for _, f := range fixtures {
		t.Run(f.name+" "+f.loader, func(t *testing.T) {
			box := doctorBox(t)
			for _, object := range []string{"ct_state_invalid_dropped_pkts", "localhost_nps_accepted_pkts"} {
				inBox(t, box, "", "nfacct", "add", object)
			}
			inBox(t, box, f.rules, strings.Fields(f.loader)...)
			r := doctorIn(t, box)
			if !r.Agree || len(r.Tables) == 0 || len(r.Notes) == 0 {
				t.Errorf("agree %t, tables %+v, differences %+v, problems %q, notes %q", r.Agree, r.Tables, r.Differences, r.Problems, r.Notes)
			}
		})
	}
}

// TestDoctorForeign puts a rule of nft's own into a table of iptables, which
// iptables-nft-save cannot print.
func TestDoctorForeign(t *testing.T) {
	box := doctorBox(t)
	inBox(t, box, "*filter\n-A INPUT -j ACCEPT\nCOMMIT\n", "iptables-nft-restore")
	inBox(t, box, "add rule ip filter INPUT ip saddr { 10.0.0.1, 10.0.0.2 } drop\n", "nft", "-f", "-")
	r := doctorIn(t, box)
	if r.Agree || len(r.Differences)+len(r.Problems) == 0 {
		t.Errorf("agree %t, differences %+v, problems %q", r.Agree, r.Differences, r.Problems)
	}
	if len(r.Undecoded) != 1 || r.Undecoded[0].Name != "-m nft" || !strings.Contains(r.Undecoded[0].Example, "lookup") {
		t.Errorf("undecoded are %+v, want a lookup", r.Undecoded)
	}
}

func doctorIn(t *testing.T, box *nodebox.Box) (r *doctor.Report) {
	t.Helper()
	err := box.Node.Do(func() error {
		r = examineNode(t.Context())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
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
