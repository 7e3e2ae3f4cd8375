package snapshot

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/natlens/natlens/internal/observed"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/conntrack"
	"github.com/natlens/natlens/pkg/netfilter"
)

// tracked is conntrack as a test sets it.
type tracked struct {
	mu    sync.Mutex
	flows []conntrack.Flow
	takes time.Duration
	err   error
	began []time.Time
}

func (c *tracked) Dump(_ context.Context, each func(*conntrack.Flow)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.began = append(c.began, time.Now())
	time.Sleep(c.takes)
	for i := range c.flows {
		each(&c.flows[i])
	}
	return c.err
}

func (c *tracked) set(err error, flows ...conntrack.Flow) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err, c.flows = err, flows
}

// watching runs a keeper that looks at conntrack, in a bubble with a clock of its
// own.
func watching(t *testing.T, text string, c *tracked, do func(*Keeper, *script)) {
	t.Helper()
	k, r := newKeeper(text)
	k.Flows, k.FlowPause, k.Grace = c, 10*time.Second, 30*time.Second
	during(t, k, func() { do(k, r) })
}

// staleFlows are the findings about flows among others.
func staleFlows(list []Finding) []Finding {
	return slices.DeleteFunc(list, func(f Finding) bool { return f.Code != observed.ConntrackStale })
}

var port = chain.ServicePort{Namespace: "default", Name: "app", Protocol: netfilter.TCP}

// Connections are counted from the first reading on, and a failed one takes
// nothing away.
func TestObservedConnections(t *testing.T) {
	k, r := newKeeper(dump)
	want := func(when string, total uint64) {
		t.Helper()
		if got, ok := k.Snapshot().Observed.Connections.Of(port); !ok || got.Total != total || got.NotCounted != "" {
			t.Errorf("%s: %+v (%v), want %d", when, got, ok, total)
		}
	}
	refresh := func(text string, err error) {
		r.set(text, err)
		if got := k.Refresh(t.Context()); (got == nil) != (err == nil) {
			t.Fatal(got)
		}
	}
	refresh(dump, nil)
	want("at first", 0)
	refresh(counted, nil)
	want("each has counted one", 2)
	refresh(counted, errors.New("no"))
	want("while readings fail", 2)
	refresh(moved, nil)
	want("one was set to zero and counted one, another is new", 4)

	k.Snapshot().Count()
	want("as it stands in the rules", 2)
}

// Conntrack is looked at no more often than it may be, however long a look takes.
func TestFlowPause(t *testing.T) {
	for takes, want := range map[time.Duration]time.Duration{0: 10 * time.Second, 500 * time.Microsecond: 10 * time.Second, 5 * time.Millisecond: 50 * time.Second, 20 * time.Millisecond: 200 * time.Second, 200 * time.Millisecond: 5 * time.Minute, 4 * time.Second: 404 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			c := &tracked{takes: takes}
			watching(t, dump, c, func(*Keeper, *script) { time.Sleep(4 * time.Hour) })
			if len(c.began) < 30 {
				t.Fatalf("%d looks in four hours", len(c.began))
			}
			for i := 1; i < len(c.began)-1; i++ {
				if pause := c.began[i+1].Sub(c.began[i]); pause < want || pause > want+time.Second {
					t.Errorf("a look of %v after %v, want %v", takes, pause, want)
				}
			}
		})
	}
}

// Who asks for what was seen is soon shown something newer than minutes, for the
// part of the time that a look may take.
func TestFlowsAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &tracked{takes: 200 * time.Millisecond}
		watching(t, dump, c, func(k *Keeper, _ *script) {
			time.Sleep(10 * time.Minute) // looks at 0 and 5 minutes, and so on
			synctest.Wait()
			quiet := len(c.began)
			if quiet > 3 {
				t.Errorf("%d looks in ten minutes that nobody asked for", quiet)
			}
			for range 60 {
				k.Asked()
				time.Sleep(time.Second)
			}
			synctest.Wait()
			if got := len(c.began) - quiet; got < 2 || got > 4 {
				t.Errorf("%d looks in a minute of questions, want one each 20 s", got)
			}
		})
	})
}

// A flow in use to what is gone is told of within the grace period and another pause
// after the rules were read, though conntrack is mostly looked at less often.
func TestStaleFlowInTime(t *testing.T) {
	udp := strings.NewReplacer("-p tcp", "-p udp", "-m tcp", "-m udp").Replace(dump)
	left := strings.Replace(udp, "--to-destination 10.0.0.2:80", "--to-destination 10.0.0.3:80", 1)
	flow := conntrack.Flow{
		ID: 1, Protocol: netfilter.UDP, Source: netip.MustParseAddrPort("10.0.0.9:999"), Destination: netip.MustParseAddrPort("10.96.0.1:80"),
		To: netip.MustParseAddrPort("10.0.0.2:80"), Status: conntrack.Redirected, Timeout: 100,
	}
	for _, at := range []time.Duration{0, 3 * time.Second, 7 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			c := &tracked{flows: []conntrack.Flow{flow}}
			watching(t, udp, c, func(k *Keeper, r *script) {
				time.Sleep(time.Minute + at)
				r.set(left, nil)
				for changes := k.Changes(); k.Changes() == changes; {
					time.Sleep(100 * time.Millisecond)
				}
				changed := time.Now()
				for len(staleFlows(k.Snapshot().Findings())) == 0 && time.Since(changed) < time.Hour {
					time.Sleep(100 * time.Millisecond)
				}
				if took := time.Since(changed); took < k.Grace || took > k.Grace+k.FlowPause {
					t.Errorf("found %v after the rules had changed, want at least %v and at most %v more", took, k.Grace, k.FlowPause)
				}
			})
		})
	}
}

// What conntrack tells comes with the next snapshot, and wakes who waits when it
// is a finding.
func TestObservedFlows(t *testing.T) {
	udp := strings.NewReplacer("-p tcp", "-p udp", "-m tcp", "-m udp").Replace(dump)
	left := strings.Replace(udp, "--to-destination 10.0.0.2:80", "--to-destination 10.0.0.3:80", 1)
	name := port
	name.Protocol = netfilter.UDP
	flow := conntrack.Flow{
		ID: 1, Protocol: netfilter.UDP, Source: netip.MustParseAddrPort("10.0.0.9:999"), Destination: netip.MustParseAddrPort("10.96.0.1:80"),
		To: netip.MustParseAddrPort("10.0.0.2:80"), Status: conntrack.Redirected, Timeout: 100,
	}
	synctest.Test(t, func(t *testing.T) {
		c := &tracked{flows: []conntrack.Flow{flow}}
		watching(t, udp, c, func(k *Keeper, r *script) {
			time.Sleep(time.Minute)
			if got, ok := k.Snapshot().Observed.Flows.Of(name); !ok || got.Live != 1 || got.Endpoints[1].Live != 1 {
				t.Errorf("%+v (%v), want one flow to the second endpoint", got, ok)
			}
			if list := staleFlows(k.Snapshot().Findings()); len(list) != 0 {
				t.Errorf("%+v, want none", list)
			}
			news, end := k.Subscribe()
			defer end()
			r.set(left, nil)
			time.Sleep(25 * time.Second)
			<-news
			version := k.Snapshot().Version
			time.Sleep(time.Minute)
			s := k.Snapshot()
			list := staleFlows(s.ServiceFindings(s.Programmed.Service(name)))
			if len(list) != 1 || len(list[0].Flows) != 1 || list[0].Service == nil || *list[0].Service != name {
				t.Fatalf("%+v, want the stale flow", list)
			}
			if all, node := staleFlows(s.Findings()), staleFlows(s.NodeFindings()); len(all) != 1 || len(node) != 0 {
				t.Errorf("%d findings, %d of the node, want it once", len(all), len(node))
			}
			select {
			case <-news:
			default:
				t.Error("nobody was told")
			}
			if s.Version == version {
				t.Error("the version is that of before")
			}

			// The Service goes, and its flow stays.
			r.set(gone, nil)
			time.Sleep(time.Minute)
			if list := staleFlows(k.Snapshot().NodeFindings()); len(list) != 1 || !strings.Contains(list[0].Message, "10.0.0.9:999") {
				t.Errorf("%+v, want it among those that no Service has", list)
			}

			// What was last seen stays while nothing can be read.
			c.set(errors.New("permission denied"))
			time.Sleep(time.Minute)
			if f := k.Snapshot().Observed.Flows; f.Error != "permission denied" || f.Total != 1 || len(f.Findings) != 1 {
				t.Errorf("%+v, want the last one, marked", f)
			}
			c.set(nil)
			time.Sleep(time.Minute)
			if f := k.Snapshot().Observed.Flows; f.Error != "" || f.Total != 0 || len(f.Findings) != 0 {
				t.Errorf("%+v, want nothing any more", f)
			}
		})
	})
}

// With rules or an API that may be old, nobody is said to send to the wrong place.
func TestFlowsBlind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &tracked{flows: []conntrack.Flow{{
			ID: 1, Protocol: netfilter.UDP, Source: netip.MustParseAddrPort("10.0.0.9:999"), Destination: netip.MustParseAddrPort("10.96.0.1:80"),
			To: netip.MustParseAddrPort("10.0.0.77:80"), Status: conntrack.Redirected, Timeout: 100,
		}}}
		udp := strings.NewReplacer("-p tcp", "-p udp", "-m tcp", "-m udp").Replace(dump)
		watching(t, udp, c, func(k *Keeper, r *script) {
			r.set("", errors.New("no"))
			time.Sleep(10 * time.Minute)
			if list := staleFlows(k.Snapshot().Findings()); len(list) != 0 {
				t.Errorf("%+v with rules that cannot be read", list)
			}
			r.set(udp, nil)
			time.Sleep(30 * time.Second)
			if f := k.Snapshot().Observed.Flows; len(f.Findings) != 0 {
				t.Errorf("%+v, which had no time to be deleted", f.Findings)
			}
			time.Sleep(10 * time.Minute)
			if f := k.Snapshot().Observed.Flows; len(f.Findings) != 1 {
				t.Errorf("%+v, want the flow", f.Findings)
			}
		})
	})
}
