package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/natlens/natlens/test/cluster/kube"
)

// echoDoc is what the echo server answers.
type echoDoc struct {
	Pod, Node     string
	Local, Remote netip.AddrPort
}

// echo connects to an echo server, or to a Service of them, from inside a
// namespace.
func echo(ctx context.Context, from kube.Netns, address string) (echoDoc, error) {
	var doc echoDoc
	body, err := httpGet(ctx, from.Client(), "http://"+address+"/json")
	if err != nil {
		return doc, err
	}
	return doc, json.Unmarshal(body, &doc)
}

// spread is how many of a number of connections each pod answered.
type spread map[string]int

// echoes makes n connections with curl, one after the other.
func echoes(ctx context.Context, from kube.Netns, address string, n int) (spread, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	out, err := from.Output(ctx, "curl", "-fsS", "--max-time", "5", "-H", "Connection: close", fmt.Sprintf("http://%s/json?[1-%d]", address, n))
	s := spread{}
	for answers := json.NewDecoder(bytes.NewReader(out)); err == nil && answers.More(); {
		var doc echoDoc
		if err = answers.Decode(&doc); err == nil {
			s[doc.Local.String()]++
		}
	}
	if err == nil && s.total() != n {
		err = fmt.Errorf("%d answers to %d connections", s.total(), n)
	}
	return s, err
}

func (s spread) total() int {
	n := 0
	for _, k := range s {
		n += k
	}
	return n
}

func (s spread) String() string {
	var counts []string
	for _, address := range slices.Sorted(maps.Keys(s)) {
		counts = append(counts, fmt.Sprint(s[address]))
	}
	return strings.Join(counts, "/") + fmt.Sprintf(" of %d", s.total())
}

// fits says why the connections cannot be a sample of the shares, if they cannot:
// one in 10,000 samples of right shares is refused (Pearson's chi-square test).
func (s spread) fits(endpoints []endpointDoc) error {
	n, x := float64(s.total()), 0.0
	known := 0
	for _, e := range endpoints {
		want := n * e.Share
		got := float64(s[e.Address])
		known += s[e.Address]
		x += (got - want) * (got - want) / want
	}
	if known != s.total() {
		return fmt.Errorf("answered by others than the endpoints: %v, not only %v", s, endpoints)
	}
	if p := chiSquareTail(x, len(endpoints)-1); p < 0.0001 {
		return fmt.Errorf("%v connections do not fit the shares %v (p = %.2g)", s, endpoints, p)
	}
	return nil
}

// chiSquareTail returns the probability that a chi-square variable of k degrees of
// freedom is greater than x: the regularized gamma function Q(k/2, x/2), which for
// whole and half first arguments is a finite sum.
func chiSquareTail(x float64, k int) float64 {
	if k < 1 {
		return 1
	}
	x /= 2
	q, a := math.Exp(-x), 1.0
	if k%2 == 1 {
		q, a = math.Erfc(math.Sqrt(x)), 0.5
	}
	for ; a < float64(k)/2; a++ {
		lg, _ := math.Lgamma(a + 1)
		q += math.Exp(a*math.Log(x) - x - lg)
	}
	return q
}
