//go:build linux

package nftables

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
)

// Tables as other programs on a node have them: that they are there says nothing
// about any Service.
const (
	hostPorts = `table inet cni_hostport {
	map hostip_hostports { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; elements = { 10.146.0.2 . tcp . 8081 : 10.9.9.9 . 80 } }
	chain hostports { tcp dport 8080 dnat ip to 10.9.9.9:80 comment "id"; tcp dport 8080 dnat ip6 to [fd00::9]:80; }
	chain prerouting { type nat hook prerouting priority dstnat; fib daddr type local jump hostports; dnat ip to ip daddr . meta l4proto . th dport map @hostip_hostports; }
	chain output { type nat hook output priority -100; fib daddr type local jump hostports; }
	chain postrouting { type nat hook postrouting priority srcnat; ip saddr 10.9.9.0/24 masquerade; }
}
`
	zones = `table inet firewalld {
	chain raw_PREROUTING { type filter hook prerouting priority -290; icmpv6 type { nd-router-advert, nd-neighbor-solicit } accept; meta nfproto ipv6 fib saddr . mark . iif oif missing drop; }
	chain nat_PREROUTING { type nat hook prerouting priority dstnat + 10; jump nat_PREROUTING_ZONES; }
	chain nat_PREROUTING_ZONES { ` +
		`iifname "eth0" goto nat_PRE_public; iifname "eth1" goto nat_PRE_public; iifname "eth2" goto nat_PRE_public; iifname "eth3" goto nat_PRE_public; ` +
		`iifname "eth4" goto nat_PRE_public; iifname "eth5" goto nat_PRE_public; iifname "eth6" goto nat_PRE_public; goto nat_PRE_public; }
	chain nat_PRE_public { jump nat_PRE_public_allow; }
	chain nat_PRE_public_allow { tcp dport 8443 redirect to :443; ip saddr 192.168.0.0/16 tcp dport 8444 redirect to :443; }
	chain nat_OUTPUT { type nat hook output priority -100; ip daddr 192.168.0.0/16 accept; jump nat_PRE_public; }
	chain filter_INPUT { type filter hook input priority filter; tcp dport 22 drop; }
}
`
	bridges = `table ip docker-bridges {
	chain nat { tcp dport 9999 counter dnat to 172.17.0.2:80; }
	chain prerouting { type nat hook prerouting priority dstnat; fib daddr type local counter jump nat; }
	chain output { type nat hook output priority -100; ip daddr != 127.0.0.0/8 fib daddr type local counter jump nat; }
}
`
)

// TestForeignTables reads tables of other programs beside kube-proxy's, live and
// from a listing, and wants both to tell the same about a Service.
func TestForeignTables(t *testing.T) {
	const toService = "ip daddr 172.30.0.1 tcp dport 80 "
	output := func(family string, priority int, rules string) string {
		return fmt.Sprintf("table %s other { chain o { type nat hook output priority %d; %s; }; }\n", family, priority, rules)
	}
	const own, others = "10.0.0.0:8080 1/1", "10.9.9.9:80 1/1"
	for name, c := range map[string]struct {
		rules   string
		want    string // of connections from the node
		unknown bool
		finding chain.Code
		tables  []string
	}{
		"host ports":      {rules: hostPorts, want: own, tables: []string{"inet cni_hostport", "inet cni_hostport"}},
		"zones":           {rules: zones, want: own, tables: []string{"inet firewalld", "inet firewalld"}},
		"bridges":         {rules: bridges, want: own, tables: []string{"docker-bridges"}},
		"all of them":     {rules: hostPorts + zones + bridges, want: own, tables: []string{"docker-bridges", "inet cni_hostport", "inet cni_hostport", "inet firewalld", "inet firewalld"}},
		"filters":         {rules: "table inet filter { chain i { type filter hook output priority 0; drop; }; }\n", want: own},
		"switched off":    {rules: "table ip other { flags dormant; chain o { type nat hook output priority -101; dnat to 10.9.9.9; }; }\n", want: own},
		"ahead":           {rules: output("inet", -101, toService+"dnat ip to 10.9.9.9:80"), want: others, finding: chain.ForeignRule, tables: []string{"inet other", "inet other"}},
		"ahead, of ip":    {rules: output("ip", -150, toService+"dnat to 10.9.9.9:80"), want: others, finding: chain.ForeignRule, tables: []string{"other"}},
		"behind":          {rules: output("inet", -99, toService+"dnat ip to 10.9.9.9:80"), want: own, tables: []string{"inet other", "inet other"}},
		"abreast":         {rules: output("inet", -100, toService+"dnat ip to 10.9.9.9:80"), want: "10.0.0.0:8080 0/1 10.9.9.9:80 0/1", unknown: true, finding: chain.UnknownMatch, tables: []string{"inet other", "inet other"}},
		"another port":    {rules: output("inet", -101, "ip daddr 172.30.0.1 tcp dport 81 dnat ip to 10.9.9.9:80"), want: own, tables: []string{"inet other", "inet other"}},
		"undecided":       {rules: output("ip", -101, toService+"meta skuid 1337 dnat to 10.9.9.9:80"), want: "10.0.0.0:8080 0/1 10.9.9.9:80 0/1", unknown: true, finding: chain.UnknownMatch, tables: []string{"other"}},
		"undecided, else": {rules: output("ip", -101, "ip daddr 172.30.0.2 meta skuid 1337 tcp dport 80 dnat to 10.9.9.9:80"), want: own, tables: []string{"other"}},
		"only accepts":    {rules: output("ip", -101, "meta skuid 1337 accept; meta skuid 1 return; meta skuid 2 accept; meta skuid 3 accept; meta skuid 4 accept; meta skuid 5 accept; meta skuid 6 accept; accept"), want: own, tables: []string{"other"}},
		"other family":    {rules: output("inet", -101, "ip6 daddr fd00::1 tcp dport 80 dnat ip6 to [fd00::9]:80; meta nfproto ipv6 tcp dport 80 redirect to :1"), want: own, tables: []string{"inet other", "inet other"}},
		"by a map": {rules: "table inet other { chain to { meta l4proto tcp dnat ip to 10.9.9.9:80; }; map m { type ipv4_addr . inet_proto . inet_service : verdict; elements = { 172.30.0.1 . tcp . 80 : goto to } ; }; " +
			"chain o { type nat hook output priority -101; ip daddr . meta l4proto . th dport vmap @m; }; }\n", want: others, finding: chain.ForeignRule, tables: []string{"inet other", "inet other"}},
		"not tracked": {rules: "table inet other { chain o { type filter hook output priority raw; " + toService + "notrack; }; }\n", want: "", finding: chain.NotTracked, tables: []string{"inet other", "inet other"}},
	} {
		t.Run(name, func(t *testing.T) {
			b := newNode(t)
			load(t, b, layout37(3, 1, "ns")+c.rules)
			node := chain.Node{Local: []netip.Addr{netip.MustParseAddr("10.146.0.2")}, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
			for how, rs := range map[string]*netfilter.Ruleset{"live": readLive(t, b), "listing": readListing(t, b)} {
				if name == "switched off" && how == "listing" {
					continue // nft 1.0.6 does not print that
				}
				if len(rs.Unreadable) > 0 {
					t.Errorf("%s: unreadable: %v", how, rs.Unreadable)
				}
				var tables []string
				for _, table := range rs.Tables {
					if table.Name != kubeProxyTable {
						tables = append(tables, table.Name)
					}
				}
				if slices.Sort(tables); !slices.Equal(tables, c.tables) {
					t.Errorf("%s: tables %q, want %q", how, tables, c.tables)
				}
				found := chain.NewView(rs, node).Services()
				for _, s := range found.Services {
					if s.Name != "svc0" {
						continue
					}
					got, unknown := fromHost(s)
					if got != c.want || unknown != c.unknown {
						t.Errorf("%s: from the node to %q, unknown %t; want %q, %t", how, got, unknown, c.want, c.unknown)
					}
					var codes []chain.Code
					for _, f := range s.Findings {
						if f.Code != chain.FallThrough { // there is no hook for others than the node
							codes = append(codes, f.Code)
						}
					}
					if want := []chain.Code{c.finding}; c.finding != "" && !slices.Equal(codes, want) || c.finding == "" && len(codes) > 0 {
						t.Errorf("%s: findings %v, want %q", how, codes, c.finding)
					}
				}
			}
		})
	}
}

// fromHost tells where connections of the node go.
func fromHost(s chain.Service) (ways string, unknown bool) {
	var list []string
	for _, r := range s.Frontends[0].Routes {
		if !slices.Contains(r.From, chain.Host) || len(r.Sources) > 0 {
			continue
		}
		for _, e := range r.Endpoints {
			list = append(list, e.Address.String()+" "+e.Share.Exact())
		}
		unknown = unknown || len(r.Unknown) > 0
	}
	slices.Sort(list)
	return strings.Join(list, " "), unknown
}

// TestForeignTablesRefresh wants tables that have not changed to be the very same
// ones, whatever their rules have counted, and changes to be seen.
func TestForeignTablesRefresh(t *testing.T) {
	b := newNode(t)
	load(t, b, layout37(2, 1, "ns")+hostPorts+bridges+"table inet sets { set s { type ipv4_addr; }; chain o { type nat hook output priority -101; ip daddr @s tcp dport 80 dnat ip to 10.9.9.9:80; }; }\n")
	var l Live
	defer l.Close()
	change := func(rules string) *netfilter.Ruleset {
		t.Helper()
		if _, err := nft(b, rules, "-f", "-"); err != nil {
			t.Fatal(err)
		}
		return refreshLive(t, b, &l)
	}
	first := refreshLive(t, b, &l)
	if again := change("add table inet nothing\n"); again != first {
		t.Error("a change elsewhere made another ruleset")
	}
	more := change("add rule ip docker-bridges nat tcp dport 9998 dnat to 172.17.0.3:80\n")
	for i, table := range more.Tables {
		if changed := table != first.Tables[i]; changed != (table.Name == "docker-bridges") {
			t.Errorf("table %s changed: %t", table.Name, changed)
		}
	}
	if set := change("add element inet sets s { 172.30.0.1 }\n"); set == more {
		t.Error("an element of a set has not been seen")
	} else if s := set.Tables[len(set.Tables)-1].Sets()[0]; s.Len() != 1 {
		t.Errorf("the set has %d elements", s.Len())
	}
	if less := change("delete table inet cni_hostport\n"); len(less.Tables) != len(more.Tables)-2 {
		t.Errorf("%d tables of %d are left", len(less.Tables), len(more.Tables))
	}
}

// TestLargeForeignTable has a table with too many rules: it is named when it may
// direct connections, and no matter when it does not.
func TestLargeForeignTable(t *testing.T) {
	b := newNode(t)
	for hook, want := range map[string]int{"nat hook output priority -100": 2, "filter hook output priority 0": 0} {
		load(t, b, layout37(1, 1, "ns")+"table inet other { chain c { type "+hook+"; }; }\n"+strings.Repeat("add rule inet other c ip daddr 10.7.7.7 accept\n", mostForeignRules+1))
		for how, rs := range map[string]*netfilter.Ruleset{"live": readLive(t, b), "listing": readListing(t, b)} {
			if len(rs.Unreadable) != want || len(rs.Tables) != 1 {
				t.Errorf("%s, %s: %d tables, unreadable %v; want %d", hook, how, len(rs.Tables), rs.Unreadable, want)
			}
		}
	}
}
