package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/natlens/natlens/test/cluster/kube"
)

// gauge follows what an agent tells of itself in its metrics.
type gauge struct {
	node *kube.Node

	mu            sync.Mutex
	first, last   *scrape
	busy, scrapes int // scrapes with a pending difference, and all
	mostPending   float64
	mostResident  float64
	failed        error
}

// scrape is an agent's metrics at one moment, by name and labels as printed.
type scrape struct {
	at     time.Time
	values map[string]float64
}

// watchMetrics scrapes each second until the context ends.
func watchMetrics(ctx context.Context, n *kube.Node) *gauge {
	g := &gauge{node: n}
	go func() {
		for ctx.Err() == nil {
			g.scrape(ctx)
			pause(ctx, time.Second)
		}
	}()
	return g
}

func (g *gauge) scrape(ctx context.Context) {
	body, err := httpGet(ctx, g.node.Client(), "http://127.0.0.1:9754/metrics")
	g.mu.Lock()
	defer g.mu.Unlock()
	if err != nil {
		if ctx.Err() == nil {
			g.failed = err
		}
		return
	}
	s := &scrape{time.Now(), map[string]float64{}}
	lines := bufio.NewScanner(bytes.NewReader(body))
	for lines.Scan() {
		if i := strings.LastIndexByte(lines.Text(), ' '); i > 0 && lines.Text()[0] != '#' {
			if v, err := strconv.ParseFloat(lines.Text()[i+1:], 64); err == nil {
				s.values[lines.Text()[:i]] = v
			}
		}
	}
	if g.first == nil {
		g.first = s
	}
	g.last = s
	g.scrapes++
	pending := s.values["natlens_api_pending_differences"]
	if pending > 0 {
		g.busy++
	}
	g.mostPending = max(g.mostPending, pending)
	g.mostResident = max(g.mostResident, s.values["process_resident_memory_bytes"])
}

// summary tells how quickly kube-proxy followed, as the agent saw it, and what the
// agent took.
func (g *gauge) summary() (string, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.first == nil || g.first == g.last {
		return "", errors.Join(errors.New("no metrics"), g.failed)
	}
	const latency = "natlens_programming_latency_seconds"
	delta := func(name string) float64 { return g.last.values[name] - g.first.values[name] }
	cpu := delta("process_cpu_seconds_total") / g.last.at.Sub(g.first.at).Seconds()
	seen := fmt.Sprintf("%.0f changes of the API followed, half within %s, 99%% within %s; differences pending in %d of %d looks, at most %.0f; rules changed %.0f times; %.0f MB, at most %.0f MB; %.1f%% of a CPU",
		delta(latency+"_count"), seconds(g.quantile(latency, 0.5)), seconds(g.quantile(latency, 0.99)), g.busy, g.scrapes, g.mostPending,
		delta("natlens_rules_changes_total"), g.first.values["process_resident_memory_bytes"]/1e6, g.mostResident/1e6, 100*cpu)
	switch {
	case g.failed != nil:
		return seen, g.failed
	case delta(latency+"_count") == 0:
		return seen, errors.New("no change was followed")
	}
	return seen, nil
}

func seconds(v float64) string {
	if math.IsInf(v, 1) {
		return "more than the last bucket"
	}
	return fmt.Sprintf("%gs", v)
}

// quantile returns the bound of the histogram's bucket that holds it.
func (g *gauge) quantile(name string, q float64) float64 {
	least := math.Inf(1)
	all := g.last.values[name+"_count"] - g.first.values[name+"_count"]
	for key, v := range g.last.values {
		bound, ok := strings.CutPrefix(key, name+`_bucket{le="`)
		if !ok || v-g.first.values[key] < q*all {
			continue
		}
		if b, err := strconv.ParseFloat(strings.TrimSuffix(bound, `"}`), 64); err == nil {
			least = min(least, b)
		}
	}
	return least
}
