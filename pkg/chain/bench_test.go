package chain_test

import (
	"bytes"
	"fmt"
	"net/netip"
	"runtime"
	"testing"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
)

// BenchmarkServices shows that working out all Services is linear in the rules,
// and what a rule costs in memory once it is read.
func BenchmarkServices(b *testing.B) {
	for _, services := range []int{100, 1000, 10000} {
		b.Run(fmt.Sprintf("services=%d", services), func(b *testing.B) {
			var dump bytes.Buffer
			if err := kubeproxy.Write(&dump, kubeproxy.Config{PodCIDR: kubeproxy.SyntheticPodCIDR, NodeIP: kubeproxy.SyntheticNodeIP}, kubeproxy.Synthetic(services, 10)); err != nil {
				b.Fatal(err)
			}
			before := heap()
			rs, err := iptables.Parse(bytes.NewReader(dump.Bytes()), "bench")
			if err != nil {
				b.Fatal(err)
			}
			held := heap() - before
			runtime.KeepAlive(dump.Bytes())
			node := chain.Node{Local: []netip.Addr{kubeproxy.SyntheticNodeIP}}
			b.ReportAllocs()
			b.ResetTimer()
			for range b.N {
				if got := len(chain.NewView(rs, node).Services().Services); got != services {
					b.Fatalf("%d Services, want %d", got, services)
				}
			}
			rules := float64(rs.RuleCount())
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/rules, "ns/rule")
			b.ReportMetric(float64(held)/rules, "held-B/rule")
			b.ReportMetric(rules, "rules")
		})
	}
}

// BenchmarkUpdate shows what a change of one Service costs, and one of counters
// alone.
func BenchmarkUpdate(b *testing.B) {
	node := chain.Node{Local: []netip.Addr{kubeproxy.SyntheticNodeIP}}
	for _, n := range []int{1000, 10000} {
		services := kubeproxy.Synthetic(n, 10)
		first := revise(b, &netfilter.Ruleset{}, synthetic(b, services), unedited)
		other := append([]kubeproxy.Service(nil), services...)
		other[n/2].Endpoints = other[n/2].Endpoints[:3]
		second := revise(b, first, synthetic(b, other), unedited)
		last := chain.NewView(first, node)
		programmed := last.Services()
		for name, next := range map[string]*netfilter.Ruleset{"one": second, "none": first} {
			b.Run(fmt.Sprintf("services=%d/changed=%s", n, name), func(b *testing.B) {
				b.ReportAllocs()
				for range b.N {
					last.Next(next, node).Update(programmed)
				}
			})
		}
	}
}

// heap returns the bytes that are held.
func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
