package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/natlens/natlens/test/cluster/kube"
)

// frozen stops every kube-proxy as a hang does, while Deployments and Services
// go on changing.
func (f *faultBench) frozen(ctx context.Context) {
	const young, old = "faults/young", "faults/old"
	start := time.Now()
	wants, err := f.change(ctx, young, old)
	changed := time.Now()
	found := map[*lookout]time.Duration{}
	errs := map[*lookout]error{}
	for _, l := range f.looks {
		if errs[l] = err; err == nil {
			found[l], errs[l] = awaitFindings(ctx, l, changed, wants, faultGrace+refresh+slack)
		}
	}
	pause(ctx, faultGrace)
	for _, n := range f.Nodes {
		if err := n.KubeProxy.Continue(); err != nil {
			f.check("kube-proxy goes on", func() (string, error) { return "", err })
		}
	}
	mended := time.Now()
	for _, l := range f.looks {
		f.check(fmt.Sprintf("kube-proxy frozen during a rollout, %v", l.node.Proxy), func() (string, error) {
			err := eventually(ctx, refresh+3*slack, l.quiet)
			if err != nil {
				err = fmt.Errorf("not withdrawn: %w", err)
			}
			return fmt.Sprintf("%s after %.1fs, withdrawn %.1fs after it goes on", counts(wants), found[l].Seconds(), time.Since(mended).Seconds()),
				errors.Join(errs[l], unexpectedButEndpoints(l, start, wants), err)
		})
	}
	_, _ = f.Kubectl(ctx, "-n", "faults", "delete", "service", "young")
}

// change freezes all kube-proxies, replaces all pods of web, makes the Service
// young and deletes old. It returns what each node is to tell.
func (f *faultBench) change(ctx context.Context, young, old string) ([]want, error) {
	if err := f.apply(ctx, serviceOfWeb("old")); err != nil {
		return nil, err
	}
	pause(ctx, 3*time.Second) // kube-proxies write it
	before, err := f.Pods(ctx, "faults", "app=web")
	if err != nil {
		return nil, err
	}
	for _, n := range f.Nodes {
		if err := n.KubeProxy.Freeze(); err != nil {
			return nil, err
		}
	}
	if err := f.apply(ctx, serviceOfWeb("young")); err != nil {
		return nil, err
	}
	if _, err := f.Kubectl(ctx, "-n", "faults", "delete", "service", "old"); err != nil {
		return nil, err
	}
	if _, err := f.Kubectl(ctx, "-n", "faults", "rollout", "restart", "deployment/web"); err != nil {
		return nil, err
	}
	if err := f.rollout(ctx, "faults", "deployment/web"); err != nil {
		return nil, err
	}
	after, err := f.replaced(ctx, before)
	if err != nil {
		return nil, err
	}
	wants := []want{{"ServiceMissing", young, ""}, {"ServiceStale", old, ""}}
	for _, s := range []string{"plain", "local", "sticky", "datagram"} {
		for _, p := range before {
			wants = append(wants, want{"EndpointStale", "faults/" + s, p.IP + ":8080"})
		}
		for _, p := range after {
			wants = append(wants, want{"EndpointMissing", "faults/" + s, p.IP + ":8080"})
		}
	}
	return wants, nil
}

// replaced waits until none of the pods of web is one of those.
func (f *faultBench) replaced(ctx context.Context, before []*kube.Pod) (after []*kube.Pod, err error) {
	err = eventually(ctx, 30*time.Second, func() error {
		if after, err = f.Pods(ctx, "faults", "app=web"); err != nil {
			return err
		}
		if len(after) != len(before) || slices.ContainsFunc(after, func(p *kube.Pod) bool {
			return slices.ContainsFunc(before, func(q *kube.Pod) bool { return p.Name == q.Name })
		}) {
			return errors.New("pods of before still run")
		}
		return nil
	})
	return after, err
}

func serviceOfWeb(name string) string {
	return fmt.Sprintf("{apiVersion: v1, kind: Service, metadata: {namespace: faults, name: %s}, spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}}", name)
}

// unexpectedButEndpoints lets endpoints be told that came and went during the
// rollout, or that local sees from another side.
func unexpectedButEndpoints(l *lookout, since time.Time, wants []want) error {
	var errs []error
	for _, s := range l.since(since) {
		rollout := strings.HasPrefix(s.service(), "faults/") && (s.Code == "EndpointMissing" || s.Code == "EndpointStale" || s.Code == "VerdictMismatch" && s.service() == "faults/local")
		if !rollout && !slices.ContainsFunc(wants, func(w want) bool { return w.is(&s.toldFinding) }) {
			errs = append(errs, fmt.Errorf("%s told %v, which is not so: %s", l.node.Name, &s.toldFinding, s.Message))
		}
	}
	return errors.Join(errs...)
}

// counts says how many findings of each code are wanted.
func counts(wants []want) string {
	var codes []string
	n := map[string]int{}
	for _, w := range wants {
		if n[w.code]++; n[w.code] == 1 {
			codes = append(codes, w.code)
		}
	}
	for i, c := range codes {
		codes[i] = fmt.Sprintf("%d %s", n[c], c)
	}
	return strings.Join(codes, ", ")
}

// hangNoticed is how long a client of Kubernetes takes to notice that the server
// does not answer: 45 s.
const hangNoticed = 55 * time.Second

// backAgain is how long it takes at most until all agents compare again. An API
// server that ends takes its endpoint away, so that the agents' way to it is closed
// until kube-proxy has come back, which may need two pauses of a minute each; then
// the agents' own begin to count.
const backAgain = 3 * time.Minute

// withoutAPI takes the API server away for a while: by an end and by a hang.
func (f *faultBench) withoutAPI(ctx context.Context) {
	server := f.Processes(f.Control)[1]
	for _, way := range []struct {
		what       string
		lasts      time.Duration
		take, back func() error
	}{
		{"ended", *outage, func() error { return server.Stop(ctx) }, func() error { return server.Start(ctx) }},
		{"frozen", *outage + hangNoticed, server.Freeze, server.Continue},
	} {
		start := time.Now()
		if err := way.take(); err != nil {
			f.check("the API server can be taken away", func() (string, error) { return "", err })
			continue
		}
		taken := time.Now()
		pause(ctx, way.lasts)
		states := map[*lookout]apiState{}
		for _, l := range f.looks {
			states[l] = l.state()
		}
		f.check(fmt.Sprintf("the API server %s for %v", way.what, way.lasts), func() (string, error) {
			var errs []error
			aged := 0
			for _, l := range f.looks {
				s := states[l]
				if s.Error != "" && s.AsOf != nil && s.AsOf.Before(taken.Add(slack)) {
					aged++
				} else {
					errs = append(errs, fmt.Errorf("%s does not say that its view has aged: %+v", l.node.Name, s))
				}
				errs = append(errs, unexpected(l, start, nil, nil))
			}
			return fmt.Sprintf("no finding; %d of %d agents say that what they know of the API is from before", aged, len(f.looks)), errors.Join(errs...)
		})
		back := time.Now()
		err := way.back()
		f.check(fmt.Sprintf("the API server is back after it %s", way.what), func() (string, error) {
			err := errors.Join(err, eventually(ctx, backAgain, func() error {
				for _, l := range f.looks {
					if s := l.state(); !s.Compared || s.Error != "" {
						return fmt.Errorf("%s: %s", l.node.Name, s.Error)
					}
				}
				return nil
			}))
			took := time.Since(back)
			pause(ctx, faultGrace+refresh)
			for _, l := range f.looks {
				err = errors.Join(err, unexpected(l, start, nil, nil))
			}
			return fmt.Sprintf("all agents compare again after %.1fs; no finding", took.Seconds()), err
		})
	}
}
