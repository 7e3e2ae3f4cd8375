package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/natlens/natlens/test/cluster/kube"
)

// toldFinding is a finding as an agent tells it, with what it rests on.
type toldFinding struct {
	findingDoc
	Evidence struct{ Addresses []string }
	Since    time.Time
}

func (f *toldFinding) service() string {
	if f.Service == nil {
		return ""
	}
	return f.Service.Namespace + "/" + f.Service.Name
}

func (f *toldFinding) String() string {
	return strings.TrimSpace(f.Code + " " + f.service() + " " + strings.Join(f.Evidence.Addresses, ","))
}

// key tells it from others: a message may change while the finding stays.
func (f *toldFinding) key() string {
	key := f.String()
	if f.Service != nil {
		key += " " + f.Service.Port + " " + f.Service.Protocol
	}
	return key
}

// sighting is a finding over the time that an agent told it without a break.
type sighting struct {
	toldFinding
	first, last time.Time // when it was first and last seen
	gone        bool
}

// lookout sees every finding of one node's agent.
type lookout struct {
	node *kube.Node

	mu    sync.Mutex
	now   map[string]*sighting
	all   []*sighting
	polls int
	blind int    // polls that told of no comparison with the API
	lost  []lost // polls without an answer
	last  time.Time
	api   apiState
}

// lost is a look without an answer.
type lost struct {
	at  time.Time
	err error
}

// lostSince says which looks since then were without an answer, as an error.
func (l *lookout) lostSince(t time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	list := slices.DeleteFunc(slices.Clone(l.lost), func(x lost) bool { return x.at.Before(t) })
	if len(list) == 0 {
		return nil
	}
	return fmt.Errorf("%d looks without an answer, the last: %w", len(list), list[len(list)-1].err)
}

// apiState is what an agent says of its view of the Kubernetes API.
type apiState struct {
	Compared bool
	Error    string
	AsOf     *time.Time
}

// lookoutPause is the time between two looks, and so how exactly times are known.
const lookoutPause = 500 * time.Millisecond

// watchFindings looks at all agents until the context ends.
func watchFindings(ctx context.Context, nodes []*kube.Node) []*lookout {
	var out []*lookout
	for _, n := range nodes {
		l := &lookout{node: n, now: map[string]*sighting{}}
		out = append(out, l)
		go func() {
			for ctx.Err() == nil {
				l.look(ctx)
				select {
				case <-ctx.Done():
				case <-time.After(lookoutPause):
				}
			}
		}()
	}
	return out
}

func (l *lookout) look(ctx context.Context) {
	var doc struct {
		Snapshot struct{ API apiState }
		Findings []toldFinding
	}
	err := agentGet(ctx, l.node, "/api/v1/findings", &doc)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.polls++; err != nil {
		if ctx.Err() == nil {
			l.lost = append(l.lost, lost{time.Now(), err})
		}
		return
	}
	if l.last, l.api = time.Now(), doc.Snapshot.API; !l.api.Compared {
		l.blind++
	}
	there := map[string]bool{}
	for _, f := range doc.Findings {
		key := f.key()
		there[key] = true
		if l.now[key] == nil {
			l.now[key] = &sighting{toldFinding: f, first: l.last}
			l.all = append(l.all, l.now[key])
		}
		l.now[key].last = l.last
	}
	for key, s := range l.now {
		if !there[key] {
			s.gone = true
			delete(l.now, key)
		}
	}
}

// since returns what was told at that moment or later.
func (l *lookout) since(t time.Time) []sighting {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []sighting
	for _, s := range l.all {
		if !s.last.Before(t) {
			out = append(out, *s)
		}
	}
	return out
}

// state returns what the agent said last of the Kubernetes API.
func (l *lookout) state() apiState {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.api
}

// quiet says what is told now, as an error.
func (l *lookout) quiet() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case time.Since(l.last) > 5*time.Second:
		return fmt.Errorf("%s: no answer for %v", l.node.Name, time.Since(l.last))
	case len(l.now) > 0:
		var list []string
		for _, s := range l.now {
			list = append(list, s.String()+": "+s.Message)
		}
		slices.Sort(list)
		return fmt.Errorf("%s: %s", l.node.Name, strings.Join(list, "; "))
	}
	return nil
}

// allQuiet waits until no agent tells any finding.
func allQuiet(ctx context.Context, looks []*lookout, patience time.Duration) error {
	return eventually(ctx, patience, func() error {
		var errs []error
		for _, l := range looks {
			errs = append(errs, l.quiet())
		}
		return errors.Join(errs...)
	})
}
