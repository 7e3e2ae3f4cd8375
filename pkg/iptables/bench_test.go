package iptables_test

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/pkg/iptables"
)

// BenchmarkParse shows that the cost of a rule does not grow with their number.
func BenchmarkParse(b *testing.B) {
	for _, services := range []int{100, 1000, 10000} {
		b.Run(fmt.Sprintf("services=%d", services), func(b *testing.B) {
			var dump bytes.Buffer
			if err := kubeproxy.Write(&dump, kubeproxy.Config{PodCIDR: kubeproxy.SyntheticPodCIDR, NodeIP: kubeproxy.SyntheticNodeIP, Counters: true}, kubeproxy.Synthetic(services, 10)); err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			b.ResetTimer()
			rules := 0
			for range b.N {
				rs, err := iptables.Parse(bytes.NewReader(dump.Bytes()), "bench")
				if err != nil {
					b.Fatal(err)
				}
				rules = rs.RuleCount()
			}
			perRule(b, rules)
		})
	}
}

func perRule(b *testing.B, rules int) {
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(rules), "ns/rule")
	b.ReportMetric(float64(rules), "rules")
}
