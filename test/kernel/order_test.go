//go:build linux

package kernel

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"testing"

	"github.com/natlens/natlens/internal/nodebox"
)

// TestLastBackendIsAskedFirst shows what pkg/chain builds on when both backends
// have nat chains at one hook: the one that was made last is asked first, and
// nothing in the rules tells which that was.
func TestLastBackendIsAskedFirst(t *testing.T) {
	for _, order := range [][]string{{"nft", "legacy"}, {"legacy", "nft"}} {
		t.Run(order[0]+" then "+order[1], func(t *testing.T) {
			box, err := nodebox.New(nodebox.Config{
				NodeAddrs:    []netip.Prefix{netip.MustParsePrefix("10.146.0.2/24")},
				OutsideAddrs: []netip.Prefix{netip.MustParsePrefix("10.146.0.100/24")},
			})
			if err != nil {
				unable(t, "%v", err)
			}
			defer box.Close()
			answered := make(chan string, len(order))
			for i, backend := range order {
				to := fmt.Sprintf("10.146.0.2:%d", 9001+i)
				ln, err := box.Node.Listen("tcp", to)
				if err != nil {
					t.Fatal(err)
				}
				defer ln.Close()
				go func() {
					if conn, err := ln.Accept(); err == nil {
						answered <- backend
						conn.Close()
					}
				}()
				cmd := exec.Command("iptables-"+backend, "-t", "nat", "-A", "OUTPUT", "-d", "10.146.0.77", "-p", "tcp", "-j", "DNAT", "--to-destination", to)
				if err := box.Node.Run(cmd); err != nil {
					unable(t, "%v: %v", cmd.Args, err)
				}
			}
			var conn net.Conn
			if conn, err = box.Node.Dial(t.Context(), "tcp", "10.146.0.77:80"); err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if got := <-answered; got != order[1] {
				t.Errorf("%s was asked first, want %s, which was made last", got, order[1])
			}
		})
	}
}
