//go:build linux

package kernel

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/natlens/natlens/internal/nodebox"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
	"github.com/natlens/natlens/pkg/nftables"
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

// TestNATChainsTakeTurns shows what pkg/chain builds on when tables of several
// programs have nat chains at one hook, and what natlens makes of it.
func TestNATChainsTakeTurns(t *testing.T) {
	const to = "ip daddr 10.146.0.77 tcp dport 80 "
	chainAt := func(family, name string, priority int, rules string) string {
		return fmt.Sprintf("table %s %s { chain o { type nat hook output priority %d; %s; }; }\n", family, name, priority, rules)
	}
	for name, c := range map[string]struct {
		rules   []string // each of a transaction
		want    string
		unknown bool
	}{
		"the lower priority wins":       {[]string{chainAt("ip", "b", -100, to+"dnat to 10.146.0.2:9001"), chainAt("inet", "a", -101, to+"dnat ip to 10.146.0.2:9002")}, "10.146.0.2:9002", false},
		"whenever it was made":          {[]string{chainAt("inet", "a", -101, to+"dnat ip to 10.146.0.2:9002"), chainAt("ip", "b", -100, to+"dnat to 10.146.0.2:9001")}, "10.146.0.2:9002", false},
		"accepting decides nothing":     {[]string{chainAt("inet", "a", -101, to+"accept"), chainAt("ip", "b", -100, to+"dnat to 10.146.0.2:9001")}, "10.146.0.2:9001", false},
		"the last one of a priority":    {[]string{chainAt("ip", "b", -100, to+"dnat to 10.146.0.2:9001"), chainAt("inet", "a", -100, to+"dnat ip to 10.146.0.2:9002")}, "10.146.0.2:9002", true},
		"the last one, the other way":   {[]string{chainAt("inet", "a", -100, to+"dnat ip to 10.146.0.2:9002"), chainAt("ip", "b", -100, to+"dnat to 10.146.0.2:9001")}, "10.146.0.2:9001", true},
		"abreast, but of another port":  {[]string{chainAt("ip", "b", -100, to+"dnat to 10.146.0.2:9001"), chainAt("inet", "a", -100, "ip daddr 10.146.0.77 tcp dport 81 dnat ip to 10.146.0.2:9002")}, "10.146.0.2:9001", false},
		"nat runs behind mangle anyway": {[]string{chainAt("ip", "b", -170, to+"meta mark 7 dnat to 10.146.0.2:9001"), chainAt("ip", "a", -100, to+"dnat to 10.146.0.2:9002"), "table ip mangle { chain OUTPUT { type route hook output priority -150; meta mark set 7; }; }\n"}, "10.146.0.2:9001", false},
		"the other family's dnat":       {[]string{chainAt("inet", "a", -101, "tcp dport 80 dnat ip6 to [fd00::9]:80"), chainAt("ip", "b", -100, to+"dnat to 10.146.0.2:9001")}, "10.146.0.2:9001", false},
	} {
		t.Run(name, func(t *testing.T) {
			box, err := nodebox.New(nodebox.Config{
				NodeAddrs:    []netip.Prefix{netip.MustParsePrefix("10.146.0.2/24")},
				OutsideAddrs: []netip.Prefix{netip.MustParsePrefix("10.146.0.100/24")},
			})
			if err != nil {
				unable(t, "%v", err)
			}
			defer box.Close()
			for _, port := range []int{9001, 9002} {
				ln, err := box.Node.Listen("tcp", fmt.Sprintf("10.146.0.2:%d", port))
				if err != nil {
					t.Fatal(err)
				}
				defer ln.Close()
				go func() {
					if conn, err := ln.Accept(); err == nil {
						fmt.Fprint(conn, ln.Addr())
						conn.Close()
					}
				}()
			}
			for _, rules := range c.rules {
				cmd := exec.Command("nft", "-f", "-")
				cmd.Stdin = strings.NewReader(rules)
				if err := box.Node.Run(cmd); err != nil {
					unable(t, "%v: %v", cmd.Args, err)
				}
			}
			conn, err := box.Node.Dial(t.Context(), "tcp", "10.146.0.77:80")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			answer, _ := io.ReadAll(conn)
			if string(answer) != c.want {
				t.Errorf("%s answered, want %s", answer, c.want)
			}

			var rs *netfilter.Ruleset
			err = box.Node.Do(func() error {
				a, err := new(nftables.Live).Read(t.Context())
				if err != nil {
					return err
				}
				b, err := new(iptables.NFT).Read(t.Context())
				if err != nil {
					return err
				}
				rs, err = netfilter.Merge(a, b)
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			v := chain.NewView(rs, chain.Node{Local: []netip.Addr{netip.MustParseAddr("10.146.0.2")}})
			packet, class := v.PacketFrom(netip.MustParseAddr("10.146.0.2"), netip.MustParseAddrPort("10.146.0.77:80"), netfilter.TCP)
			trace, ok := v.Trace(packet, class)
			if !ok {
				t.Fatal("no table of IPv4")
			}
			if unknown := len(trace.Unknown) > 0; unknown != c.unknown {
				t.Errorf("unknown %t, want %t", unknown, c.unknown)
			}
			if !slices.ContainsFunc(trace.Outcomes, func(o chain.Outcome) bool { return o.To.String() == c.want }) || !c.unknown && len(trace.Outcomes) != 1 {
				t.Errorf("natlens says %+v", trace.Outcomes)
			}
		})
	}
}
