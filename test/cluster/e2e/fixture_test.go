package main

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/natlens/natlens/test/cluster/kube"
)

// TestFixtures holds what the matrix relies on: no two copies of the Services share
// an address or a port, and endpoints are where the echo servers answer.
func TestFixtures(t *testing.T) {
	b := &bench{root: "../../..", Cluster: &kube.Cluster{}}
	for i := range 3 {
		b.Nodes = append(b.Nodes, &kube.Node{
			Box:      &kube.Box{Name: fmt.Sprint("node", i+1)},
			Addrs:    []netip.Addr{netip.AddrFrom4([4]byte{10, 146, 0, byte(2 + i)}), netip.MustParseAddr(fmt.Sprint("fd00:146::", 2+i))},
			PodCIDRs: []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 52, byte(1 + i), 0}), 24), netip.MustParsePrefix(fmt.Sprintf("fd00:52:0:%d::/64", 1+i))},
		})
	}
	frontends, places := map[string]string{}, map[netip.Addr]string{}
	nodePorts := map[uint16]string{}
	for i := range b.Nodes {
		f, err := newFixture(b, i)
		if err != nil {
			t.Fatal(err)
		}
		if len(f.services) != 28 { // and there is the API server's own
			t.Errorf("%d Services", len(f.services))
		}
		routed := f.routes()
		for _, s := range f.ready {
			for _, x := range s.frontends {
				key := x.at.String() + "/" + s.protocol
				if other := frontends[key]; other != "" {
					t.Errorf("%s of %s is %s's as well", key, s, other)
				}
				frontends[key] = s.String()
				if x.kind == "NodePort" {
					who := fmt.Sprintf("%s of copy %d", s, i)
					if other := nodePorts[x.at.Port()]; other != "" && other != who {
						t.Errorf("the NodePort %d of %s is %s's as well", x.at.Port(), who, other)
					}
					if x.at.Port() >= 30086 {
						t.Errorf("the API server may give the NodePort %d of %s to another", x.at.Port(), who)
					}
					nodePorts[x.at.Port()] = who
				}
				if x.kind != "NodePort" && !covered(routed, x.at.Addr()) {
					t.Errorf("nothing routes %s of %s to the node", x.at, s)
				}
			}
		}
		for recorded, p := range f.places {
			hostNetwork := p.addrs[0] == p.node.Addrs[0]
			for _, a := range p.addrs {
				who := fmt.Sprintf("%s of copy %d", recorded, i)
				switch {
				case hostNetwork:
				case places[a] != "":
					t.Errorf("%s is %s, and so is %s", a, who, places[a])
				case !covered(endpointRanges(p.node), a):
					t.Errorf("%s, %s, is not in the ranges of %s", a, who, p.node.Name)
				}
				places[a] = who
			}
		}
	}
}

func covered(ranges []netip.Prefix, a netip.Addr) bool {
	for _, r := range ranges {
		if r.Contains(a) {
			return true
		}
	}
	return false
}

// TestVersions: answers that mix versions, or lack a part, are told from true ones.
func TestVersions(t *testing.T) {
	for v := range 3000 {
		var endpoints []string
		for _, a := range version(v) {
			endpoints = append(endpoints, a.String())
		}
		if got, err := versionOf(endpoints); err != nil || got != v {
			t.Fatalf("version %d: %d, %v", v, got, err)
		}
		if got, err := versionOf(endpoints[1:]); err == nil {
			t.Fatalf("a part of version %d is taken for version %d", v, got)
		}
	}
}

// TestExpectation: wrong shares and wrong sources are found.
func TestExpectation(t *testing.T) {
	yes := true
	e := expect(routeDoc{Endpoints: []endpointDoc{{Address: "a", Share: 0.5}, {Address: "b", Share: 0.25, Masquerade: &yes}}, Undelivered: 0.25, Rejected: 0.25})
	if p := e.pValue(map[string]int{"a": 50, "b": 25, refused: 25}); p < 0.99 {
		t.Errorf("a perfect sample has p = %v", p)
	}
	if p := e.pValue(map[string]int{"a": 100, "b": 10, refused: 10}); p > unlikely {
		t.Errorf("a wrong sample has p = %v", p)
	}
	client, node := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	for what, seen := range map[string]netip.Addr{"a": client, "b": node, refused: {}} {
		other := map[netip.Addr]netip.Addr{client: node, node: client}[seen]
		if err := e.checkSource(met{what, client, seen}, []netip.Addr{node}); err != nil {
			t.Errorf("%s from %s: %v", what, seen, err)
		}
		if err := e.checkSource(met{what, client, other}, []netip.Addr{node}); err == nil && what != refused {
			t.Errorf("%s from %s passes", what, other)
		}
	}
}
