package snapshot

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/natlens/natlens/internal/monitor"
	"github.com/natlens/natlens/pkg/chain"
)

// probes is an Echo whose states are set by the test.
type probes struct {
	seen    []time.Time
	state   *monitor.State
	changed chan struct{}
}

func (p *probes) See(_ *chain.Programmed, began time.Time) { p.seen = append(p.seen, began) }
func (p *probes) State() *monitor.State                    { return p.state }
func (p *probes) Changed() <-chan struct{}                 { return p.changed }

func TestEcho(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		k, r := newKeeper(dump)
		p := &probes{state: &monitor.State{Number: 1}, changed: make(chan struct{})}
		k.Echo = p
		if err := k.Refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		first := k.Snapshot()
		if first.Echo != p.state || len(p.seen) != 1 || !p.seen[0].Equal(first.Time) {
			t.Fatalf("echo %+v, told of readings at %v", first.Echo, p.seen)
		}
		news, end := k.Subscribe()
		defer end()
		go k.Run(t.Context())
		synctest.Wait()

		// A number more is published, and is no news.
		p.state = &monitor.State{Number: 2}
		p.changed <- struct{}{}
		synctest.Wait()
		if s := k.Snapshot(); s.Echo.Number != 2 || s.Version != first.Version || len(news) != 0 {
			t.Errorf("echo %+v, version %d, %d news", s.Echo, s.Version, len(news))
		}

		// A finding is news, and stands at its Service.
		sv := first.Programmed.Services[0].ServicePort
		since := time.Now().Add(-time.Minute)
		found := chain.Finding{Code: monitor.EndpointUnreachable, Severity: chain.Error, Service: &sv, About: "10.0.0.1:80"}
		p.state = &monitor.State{Number: 3, News: 1, Findings: []monitor.Finding{{Finding: found, Since: since}}}
		p.changed <- struct{}{}
		synctest.Wait()
		s := k.Snapshot()
		if s.Version != first.Version+1 || len(news) != 1 {
			t.Errorf("version %d, %d news", s.Version, len(news))
		}
		for where, list := range map[string][]Finding{"all": s.Findings(), "the Service": s.ServiceFindings(&s.Programmed.Services[0])} {
			if last := list[len(list)-1]; last.Code != monitor.EndpointUnreachable || !last.Since.Equal(since) {
				t.Errorf("findings of %s: %+v", where, list)
			}
		}
		if list := s.NodeFindings(); len(list) != 0 {
			t.Errorf("findings of the node: %+v", list)
		}

		// A reading that failed says nothing of the rules, and takes nothing away.
		n := len(p.seen)
		r.set("", errors.New("no such table"))
		time.Sleep(2 * k.Interval)
		synctest.Wait()
		if s := k.Snapshot(); !s.Stale || len(p.seen) != n || !slices.Contains(codes(s), string(monitor.EndpointUnreachable)) {
			t.Errorf("stale %t, told of %d readings more, findings %+v", s.Stale, len(p.seen)-n, s.Findings())
		}
	})
}
