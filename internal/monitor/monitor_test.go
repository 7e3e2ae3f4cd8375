package monitor

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/natlens/natlens/internal/desired"
	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/pkg/chain"
)

// many are the rules of so many Services, default/app0 and on.
func many(t *testing.T, n int) *chain.Programmed {
	t.Helper()
	var list []kubeproxy.Service
	addr := clusterIP
	for i := range n {
		list = append(list, kubeproxy.Service{
			Namespace: "default", Name: fmt.Sprintf("app%02d", i), ClusterIP: addr, PortNumber: 80,
			Endpoints: []kubeproxy.Endpoint{{Addr: endpoint(0)}, {Addr: endpoint(1)}},
		})
		addr = addr.Next()
	}
	var text strings.Builder
	if err := kubeproxy.Write(&text, kubeproxy.Config{PodCIDR: netip.MustParsePrefix("10.52.0.0/16"), NodeIP: nodeIP}, list); err != nil {
		t.Fatal(err)
	}
	return programmed(t, text.String())
}

// TestRun: each ClusterIP is probed once an interval, never twice at once, and no
// more at once than are allowed.
func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		underWay, most, total := map[netip.AddrPort]bool{}, 0, map[netip.AddrPort]int{}
		var log bytes.Buffer
		m := &Monitor{
			Interval: time.Second, Log: slog.New(slog.NewTextHandler(&log, nil)),
			Marked: func() []desired.Key {
				var out []desired.Key
				for i := range 40 {
					out = append(out, desired.Key{Namespace: "default", Name: fmt.Sprintf("app%02d", i)})
				}
				return out
			},
		}
		takes := time.Duration(0)
		m.probe = func(ctx context.Context, to netip.AddrPort, knows func(netip.AddrPort) bool, _ bool) sample {
			m.mu.Lock()
			if underWay[to] {
				t.Errorf("two probes of %s at once", to)
			}
			underWay[to] = true
			most = max(most, len(underWay))
			total[to]++
			m.mu.Unlock()
			start := time.Now()
			time.Sleep(takes)
			m.mu.Lock()
			delete(underWay, to)
			m.mu.Unlock()
			if !knows(endpoint(0)) || knows(endpoint(7)) || knows(netip.AddrPort{}) {
				t.Error("not the route's endpoints")
			}
			return sample{start: start, end: time.Now(), source: nodeIP, result: Answered, endpoint: endpoint(0)}
		}
		p := many(t, 40)
		m.See(p, time.Now())
		ctx, end := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			m.Run(ctx)
			close(done)
		}()
		time.Sleep(100 * time.Second)
		synctest.Wait()
		m.mu.Lock()
		if len(total) != MostFrontends || m.State().Left != 40-MostFrontends || !strings.Contains(log.String(), "more Services are marked") {
			t.Errorf("%d ClusterIPs probed, %d left; log %s", len(total), m.State().Left, &log)
		}
		for to, n := range total {
			if n < 90 || n > 110 {
				t.Errorf("%d probes of %s in 100 intervals", n, to)
			}
		}
		clear(total)
		takes = 500 * time.Millisecond
		m.mu.Unlock()
		time.Sleep(100 * time.Second)
		synctest.Wait()
		if most != mostAtOnce {
			t.Errorf("%d probes at once, want %d", most, mostAtOnce)
		}
		// A Service that is gone is no longer probed; a reading settles samples.
		m.See(many(t, 1), time.Now())
		if n := len(m.State().Ports); n != 1 {
			t.Errorf("%d ports are left", n)
		}
		end()
		<-done
		s := m.State()
		if n := s.Ports[0].Probes; len(n) != 1 || n[0].Endpoint != endpoint(0) || n[0].Result != Answered || n[0].Probes < 100 {
			t.Errorf("counted %+v", n)
		}
		// A window that has told of the skew gives way to an empty one.
		if s.Ports[0].Window.Samples == 0 && s.Ports[0].Last == nil || s.Ports[0].Duration.Count != s.Ports[0].Probes[0].Probes {
			t.Errorf("port %+v", s.Ports[0])
		}
	})
}

// TestMarks: who is probed follows the label and the flags.
func TestMarks(t *testing.T) {
	var marked []desired.Key
	var log bytes.Buffer
	m := &Monitor{Interval: time.Second, Log: slog.New(slog.NewTextHandler(&log, nil)), Marked: func() []desired.Key { return marked }}
	p := many(t, 3)
	count := func() string {
		m.See(p, time.Now())
		var names []string
		for _, port := range m.State().Ports {
			names = append(names, port.Service.Name)
		}
		return strings.Join(names, " ")
	}
	if got := count(); got != "" {
		t.Errorf("probed without a mark: %s", got)
	}
	marked = []desired.Key{{Namespace: "default", Name: "app01"}, {Namespace: "default", Name: "none"}}
	if got := count(); got != "app01" {
		t.Errorf("probed %s", got)
	}
	m.Selected = []Selector{{Namespace: "default", Name: "app02", Port: "80"}, {Namespace: "default", Name: "app00", Port: "81"}}
	marked = nil
	if got := count(); got != "app02" {
		t.Errorf("probed %s", got)
	}
	// The log names what is not there, once for each time that it goes.
	p = many(t, 3)
	count()
	const absent = "has no TCP ClusterIP"
	if n := strings.Count(log.String(), absent); n != 1 || !strings.Contains(log.String(), "service=default/app00:81") {
		t.Errorf("want default/app00:81 named once: %s", &log)
	}
	for _, services := range []int{2, 3, 2} {
		p = many(t, services)
		count()
	}
	if n := strings.Count(log.String(), absent); n != 3 {
		t.Errorf("app02 went twice, and was named %d times: %s", n-1, &log)
	}
}

// TestNews: a new verdict is news, another number is not.
func TestNews(t *testing.T) {
	m := &Monitor{Interval: time.Second, Log: slog.New(slog.DiscardHandler), Selected: []Selector{{Namespace: "default", Name: "app00"}}}
	p := many(t, 1)
	m.See(p, time.Now())
	before := m.State()
	w := m.watches[key{before.Ports[0].Service, front}]
	for i := range 100 {
		now := time.Now()
		w.add(sample{start: now, end: now, result: Answered, endpoint: endpoint(i % 2)})
		m.See(p, now)
		if i == 50 && (m.State().News != before.News || m.State().Number == before.Number) {
			t.Errorf("states %+v, then %+v", before, m.State())
		}
	}
	if s := m.State(); s.News != before.News+1 || s.Ports[0].Verdict != Consistent || before.Ports[0].Window.Samples != 0 {
		t.Errorf("states %+v, then %+v", before, s)
	}
}
