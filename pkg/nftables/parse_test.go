package nftables

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/natlens/natlens/pkg/netfilter"
)

// listing puts statements into one rule of a listing that has what kube-proxy's
// rules refer to.
func listing(statements ...string) string {
	return `{"nftables": [{"metainfo": {"json_schema_version": 1}},
{"rule": {"family": "ip", "table": "kube-proxy", "chain": "c", "handle": 9, "comment": "note", "expr": [` + strings.Join(statements, ",") + `]}},
{"table": {"family": "ip", "name": "kube-proxy"}},
{"chain": {"family": "ip", "table": "kube-proxy", "name": "c", "type": "nat", "hook": "output", "prio": -100, "policy": "accept"}},
{"chain": {"family": "ip", "table": "kube-proxy", "name": "d"}},
{"set": {"family": "ip", "table": "kube-proxy", "name": "ips", "type": "ipv4_addr", "elem": ["10.0.0.1"]}},
{"map": {"family": "ip", "table": "kube-proxy", "name": "m", "type": ["ipv4_addr", "inet_proto", "inet_service"], "map": "verdict",
  "elem": [[{"concat": ["10.0.0.1", "tcp", 80]}, {"goto": {"target": "d"}}], [{"elem": {"val": {"concat": ["10.0.0.2", 17, 53]}, "comment": "ns/svc"}}, {"drop": null}]]}}]}`
}

const key = `{"concat": [{"payload": {"protocol": "ip", "field": "daddr"}}, {"meta": {"key": "l4proto"}}, {"payload": {"protocol": "th", "field": "dport"}}]}`

// The right column is how nft itself prints the statement, but for what is
// kept as JSON.
func TestStatements(t *testing.T) {
	for _, c := range []struct{ statement, want string }{
		{`{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": "10.0.0.1"}}`, `ip saddr 10.0.0.1`},
		{`{"match": {"op": "!=", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": {"prefix": {"addr": "10.0.0.0", "len": 8}}}}`, `ip saddr != 10.0.0.0/8`},
		{`{"match": {"op": "!=", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": {"set": ["10.0.0.1", {"prefix": {"addr": "10.1.0.0", "len": 16}}, {"range": ["10.2.0.0", "10.2.0.2"]}]}}}`, `ip saddr != { 10.0.0.1, 10.1.0.0/16, 10.2.0.0/31, 10.2.0.2/32 }`},
		{`{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": "@ips"}}`, `ip daddr @ips`},
		{`{"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 80}}`, `meta l4proto tcp th dport 80`},
		{`{"match": {"op": "==", "left": {"payload": {"protocol": "th", "field": "dport"}}, "right": {"range": [1, 1024]}}}`, `th dport 1-1024`},
		{`{"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": 6}}`, `meta l4proto tcp`},
		{`{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "veth*"}}`, `iifname "veth*"`},
		{`{"match": {"op": "!=", "left": {"meta": {"key": "oifname"}}, "right": "lo"}}`, `oifname != "lo"`},
		{`{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": "new"}}`, `ct state new`},
		{`{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "related"]}}`, `ct state related,established`},
		{`{"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": 9}}`, `ct state invalid,new`},
		{`{"match": {"op": "in", "left": {"ct": {"key": "status"}}, "right": "dnat"}}`, `ct status dnat`},
		{`{"match": {"op": "==", "left": {"fib": {"result": "type", "flags": ["daddr"]}}, "right": "local"}}`, `fib daddr type local`},
		{`{"match": {"op": "==", "left": {"fib": {"result": "type", "flags": ["saddr"]}}, "right": 2}}`, `fib saddr type local`},
		{`{"match": {"op": "==", "left": {"&": [{"meta": {"key": "mark"}}, 16384]}, "right": 0}}`, `meta mark & 0x00004000 == 0x00000000`},
		{`{"match": {"op": "!=", "left": {"&": [{"meta": {"key": "mark"}}, 16384]}, "right": 0}}`, `meta mark & 0x00004000 != 0x00000000`},
		{`{"mangle": {"key": {"meta": {"key": "mark"}}, "value": {"|": [{"meta": {"key": "mark"}}, 16384]}}}`, `meta mark set meta mark | 0x00004000`},
		{`{"mangle": {"key": {"meta": {"key": "mark"}}, "value": {"^": [{"meta": {"key": "mark"}}, 16384]}}}`, `meta mark set meta mark ^ 0x00004000`},
		{`{"mangle": {"key": {"meta": {"key": "mark"}}, "value": 7}}`, `meta mark set 0x00000007`},
		{`{"vmap": {"key": ` + key + `, "data": "@m"}}`, `ip daddr . meta l4proto . th dport vmap @m`},
		{`{"vmap": {"key": {"meta": {"key": "l4proto"}}, "data": {"set": [["tcp", {"drop": null}], [17, {"goto": {"target": "d"}}]]}}}`, `meta l4proto vmap { tcp : drop, udp : goto d }`},
		{`{"vmap": {"key": {"numgen": {"mode": "random", "mod": 3, "offset": 0}}, "data": {"set": [[0, {"goto": {"target": "d"}}], [2, {"goto": {"target": "d"}}]]}}}`, `numgen random mod 3 vmap { 2× goto d }`},
		{`{"dnat": {"addr": "10.0.0.9", "port": 80}}`, `dnat to 10.0.0.9:80`},
		{`{"dnat": {"family": "ip", "addr": {"map": {"key": {"numgen": {"mode": "random", "mod": 2, "offset": 0}}, "data": {"set": [[0, {"concat": ["10.0.0.1", 80]}], [1, {"concat": ["10.0.0.2", 81]}]]}}}}}`, `dnat ip to numgen random mod 2 map { 10.0.0.1:80, 10.0.0.2:81 }`},
		{`{"masquerade": {"flags": "fully-random"}}`, `masquerade fully-random`},
		{`{"reject": {"type": "icmp", "expr": "port-unreachable"}}`, `reject`},
		{`{"goto": {"target": "d"}}`, `goto d`},
		{`{"return": null}`, `return`},
		// What is not understood stays, and is never taken for a rule without it.
		{`{"match": {"op": "==", "left": {"meta": {"key": "skuid"}}, "right": 0}}`, `{"match": {"op": "==", "left": {"meta": {"key": "skuid"}}, "right": 0}}`},
		{`{"match": {"op": "<", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 80}}`, `{"match": {"op": "<", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 80}}`},
		{`{"limit": {"rate": 1, "per": "second"}}`, `{"limit": {"rate": 1, "per": "second"}}`},
		{`{"tproxy": {"port": 1}}`, `{"tproxy": {"port": 1}}`},
	} {
		rs, err := Parse(strings.NewReader(listing(c.statement)), "test")
		if err != nil {
			t.Errorf("%s: %v", c.statement, err)
			continue
		}
		table := rs.Table(netfilter.IPv4, "kube-proxy")
		got := RuleText(table, table.Lookup("c"), 0)
		if want := "c: " + c.want + ` comment "note"`; got != want {
			t.Errorf("%s:\n got %s\nwant %s", c.statement, got, want)
		}
	}
}

func TestSets(t *testing.T) {
	rs, err := Parse(strings.NewReader(listing(`{"accept": null}`)), "test")
	if err != nil {
		t.Fatal(err)
	}
	table := rs.Tables[0]
	m := table.Set(1)
	if m.Name != "m" || m.Len() != 2 {
		t.Fatalf("map %q of %d elements", m.Name, m.Len())
	}
	e, _ := m.Lookup(m.Keys[1])
	if diff := cmp.Diff("ns/svc", e.Comment); diff != "" || m.Keys[1].Protocol != netfilter.UDP || e.Verdict.Kind != netfilter.Drop {
		t.Errorf("element %+v of key %+v", e, m.Keys[1])
	}
}

func TestBadInput(t *testing.T) {
	for name, text := range map[string]string{
		"empty":                        "",
		"not JSON":                     "table ip kube-proxy {",
		"another JSON":                 `{"kind": "List"}`,
		"no table":                     `{"nftables": []}`,
		"a chain that is not there":    strings.Replace(listing(`{"accept": null}`), `"chain": "c"`, `"chain": "x"`, 1),
		"a map that is not there":      listing(`{"vmap": {"key": ` + key + `, "data": "@other"}}`),
		"a verdict without a target":   listing(`{"goto": {}}`),
		"statements behind a verdict":  listing(`{"accept": null}`, `{"masquerade": null}`),
		"numgen mod 0":                 listing(`{"vmap": {"key": {"numgen": {"mode": "random", "mod": 0, "offset": 0}}, "data": {"set": [[0, {"drop": null}]]}}}`),
		"an address that is none":      listing(`{"dnat": {"addr": "x", "port": 80}}`),
		"an address of another family": listing(`{"dnat": {"addr": "fd00::1", "port": 80}}`),
	} {
		rs, err := Parse(strings.NewReader(text), "dump.json")
		if err == nil {
			t.Errorf("%s: no error, but %d tables", name, len(rs.Tables))
			continue
		}
		if msg := err.Error(); !strings.HasPrefix(msg, "dump.json: ") || strings.Contains(msg, "\n") {
			t.Errorf("%s: %q is not one line about dump.json", name, msg)
		}
	}
}

// A listing that was cut is never a smaller ruleset.
func TestCutListing(t *testing.T) {
	b, err := os.ReadFile("../../testdata/captures/v1.37.2-nftables.nft.json")
	if err != nil {
		t.Fatal(err)
	}
	b = bytes.TrimSpace(b)
	for n := 0; n < len(b); n += 977 {
		if _, err := Parse(bytes.NewReader(b[:n]), "dump"); err == nil {
			t.Errorf("the first %d bytes pass for a listing", n)
		}
	}
}

// No rule of a real kube-proxy is left undecided.
func TestRecordingsAreUnderstood(t *testing.T) {
	files, _ := filepath.Glob("../../testdata/captures/*.nft.json")
	if len(files) != 2 {
		t.Fatalf("%d recordings", len(files))
	}
	for _, file := range files {
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		rs, err := Parse(f, file)
		if err != nil {
			t.Fatal(err)
		}
		for _, table := range rs.Tables {
			for c := range table.Chains() {
				for i := range c.Len() {
					for _, e := range c.Rule(i) {
						if e.Kind == netfilter.Unknown || e.Kind == netfilter.UnknownTarget || e.Kind == netfilter.DNATRange {
							t.Errorf("%s: %s", filepath.Base(file), RuleText(table, c, i))
						}
					}
				}
			}
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(listing(`{"accept": null}`)))
	f.Add([]byte(listing(`{"vmap": {"key": `+key+`, "data": "@m"}}`, `{"drop": null}`)))
	f.Add([]byte(listing(`{"dnat": {"family": "ip", "addr": {"map": {"key": {"numgen": {"mode": "random", "mod": 2, "offset": 0}}, "data": {"set": [[0, {"concat": ["10.0.0.1", 80]}]]}}}}}`)))
	f.Fuzz(func(t *testing.T, data []byte) {
		rs, err := Parse(bytes.NewReader(data), "fuzz")
		if err != nil {
			return
		}
		if !json.Valid(data) {
			t.Error("parsed what is not JSON")
		}
		for _, table := range rs.Tables {
			for c := range table.Chains() {
				for i := range c.Len() {
					RuleText(table, c, i)
				}
			}
		}
	})
}
