package observed

import (
	"bytes"
	"testing"
	"time"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
)

// BenchmarkCounter takes readings of 2,000 Services with 10 endpoints each: one in
// which a single rule has counted, and one with other rules.
func BenchmarkCounter(b *testing.B) {
	var text bytes.Buffer
	if err := kubeproxy.Write(&text, kubeproxy.Config{Family: kubeproxy.IPv4}, kubeproxy.Synthetic(2000, 10)); err != nil {
		b.Fatal(err)
	}
	rs, err := iptables.Parse(&text, "rules")
	if err != nil {
		b.Fatal(err)
	}
	for _, t := range rs.Tables { // as if it had counters
		for c := range t.Chains() {
			t.Recount(c.ID, make([]netfilter.Counter, c.Len()), netfilter.Counter{})
		}
	}
	p := chain.NewView(rs, chain.Node{}).Services()
	var c Counter
	now := time.Now()
	first := c.Update(rs, p, now)
	if got, ok := first.Of(p.Services[0].ServicePort); !ok || got.NotCounted != "" {
		b.Fatalf("%+v", got)
	}
	moved := first.plan.rules[len(first.plan.rules)/2]
	b.Run("one rule has counted", func(b *testing.B) {
		b.ReportAllocs()
		n := uint64(0)
		for b.Loop() {
			b.StopTimer()
			next := &netfilter.Ruleset{Tables: append([]*netfilter.Table{}, rs.Tables...)}
			t := next.Tables[moved.table].Revise()
			counts := make([]netfilter.Counter, t.ByID(moved.chain).Len())
			n++
			counts[moved.index].Packets = n
			t.Recount(moved.chain, counts, netfilter.Counter{})
			next.Tables[moved.table], rs = t, next
			b.StartTimer()
			c.Update(rs, p, now)
		}
		if got := c.now.counts[moved.endpoint]; got != n {
			b.Errorf("%d connections, want %d", got, n)
		}
	})
	b.Run("other rules", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			other, again := *p, *rs
			c.Update(&again, &other, now)
		}
	})
}
