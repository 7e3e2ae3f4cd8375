package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/natlens/natlens/test/cluster/kube"
)

// faults breaks what natlens is to notice, and mends it. On each node another
// kube-proxy writes the rules.
var faults = suite{
	name: "faults",
	nodes: kube.ThreeNodes(
		kube.Proxy{Version: "v1.37.2", Mode: kube.IPTablesNFT},
		kube.Proxy{Version: "v1.35.4", Mode: kube.NFTables},
		kube.Proxy{Version: "v1.28.15", Mode: kube.IPTablesLegacy},
	),
	run: runFaults,
}

// faultGrace is shorter than what the agent is shipped with, so that a run is
// quick. Quiet kube-proxies follow the API in a second.
const faultGrace = 5 * time.Second

// refresh is the agent's default pause between two readings.
const refresh = 10 * time.Second

// slack is for looking, on a machine that does all the nodes' work.
const slack = 4 * time.Second

// outage is how long the API server is gone.
var outage = flag.Duration("outage", 20*time.Second, "for how long the API server is gone, in suite faults")

// want is a finding that is to be told: of a code, about a Service ("" for the
// node), which names an endpoint or address ("" for any).
type want struct{ code, service, names string }

func (w want) is(f *toldFinding) bool {
	return f.Code == w.code && f.service() == w.service && (w.names == "" || slices.Contains(f.Evidence.Addresses, w.names) || strings.Contains(f.Message, w.names))
}

func (w want) String() string { return strings.TrimSpace(w.code + " " + w.service + " " + w.names) }

// fault is something that is broken, found, mended and withdrawn.
type fault struct {
	what string
	// breaks breaks one node, and returns what is to be found there.
	breaks func(*faultBench, hand) ([]want, error)
	// mends undoes it; nil for a restart of kube-proxy, which writes everything anew.
	mends func(*faultBench, hand) error
	// also are codes that tell the same fault from another side.
	also []string
	// takes is how much longer than a grace period and a reading it may take.
	takes time.Duration
}

// faultBench is what the faults have in common.
type faultBench struct {
	*bench
	looks   []*lookout
	sending func() // ends the clients that send, see dialUDP
}

func runFaults(ctx context.Context, b *bench) error {
	if err := b.install(ctx, faultObjects); err != nil {
		return err
	}
	if err := b.configureAgent(ctx, "--grace="+faultGrace.String()); err != nil {
		return err
	}
	if err := b.rollout(ctx, "faults", "deployment/web"); err != nil {
		return err
	}
	ctx, end := context.WithCancel(ctx)
	defer end()
	pause(ctx, refresh) // kube-proxies write what was made just now
	f := &faultBench{bench: b, looks: watchFindings(ctx, b.Nodes), sending: func() {}}
	if !b.check("nothing is broken yet, and nothing is found", func() (string, error) { return f.nothing(ctx, faultGrace+refresh) }) {
		return errors.New("there is no use in breaking more")
	}
	for _, x := range faultList {
		f.fault(ctx, x)
	}
	f.frozen(ctx)
	f.withoutAPI(ctx)
	return nil
}

// nothing wants silence that lasts.
func (f *faultBench) nothing(ctx context.Context, lasts time.Duration) (string, error) {
	if err := allQuiet(ctx, f.looks, 30*time.Second); err != nil {
		return "", err
	}
	start := time.Now()
	pause(ctx, lasts)
	for _, l := range f.looks {
		if err := unexpected(l, start, nil, nil); err != nil {
			return "", err
		}
		if s := l.state(); !s.Compared || s.Error != "" {
			return "", fmt.Errorf("%s does not compare with the API: %s", l.node.Name, s.Error)
		}
	}
	return fmt.Sprintf("no finding on %d nodes for %v", len(f.looks), lasts), nil
}

// fault makes one on all nodes at once, and a row of each.
func (f *faultBench) fault(ctx context.Context, x fault) {
	start := time.Now()
	type outcome struct {
		wants []want
		at    time.Time
		err   error
	}
	outcomes := map[*lookout]outcome{}
	for _, l := range f.looks {
		quiet := eventually(ctx, refresh, l.quiet)
		wants, err := x.breaks(f, hand{ctx, l.node})
		outcomes[l] = outcome{wants, time.Now(), errors.Join(quiet, err)}
	}
	found := map[*lookout]time.Duration{}
	for _, l := range f.looks {
		o := outcomes[l]
		if o.err == nil && o.wants != nil {
			found[l], o.err = awaitFindings(ctx, l, o.at, o.wants, faultGrace+refresh+slack+x.takes)
		}
		outcomes[l] = o
	}
	pause(ctx, faultGrace) // something else may take its time
	mended := time.Now()
	for _, l := range f.looks {
		mend := x.mends
		if mend == nil {
			mend = restartProxy
		}
		if o := outcomes[l]; o.wants != nil || o.err != nil {
			o.err = errors.Join(o.err, mend(f, hand{ctx, l.node}))
			outcomes[l] = o
		}
	}
	for _, l := range f.looks {
		o := outcomes[l]
		if o.wants == nil && o.err == nil {
			continue // not in this mode
		}
		f.check(fmt.Sprintf("%s, %v", x.what, l.node.Proxy), func() (string, error) {
			err := eventually(ctx, refresh+3*slack, l.quiet)
			took := time.Since(mended)
			if err != nil {
				err = fmt.Errorf("not withdrawn: %w", err)
			}
			also := x.also
			if x.mends == nil && l.node.Proxy.Mode == kube.NFTables {
				also = append(slices.Clip(also), "ProxyModeUnsupported") // the table is gone for a moment
			}
			return fmt.Sprintf("%s after %.1fs, withdrawn %.1fs after mending", namesOf(o.wants), found[l].Seconds(), took.Seconds()),
				errors.Join(o.err, unexpected(l, start, o.wants, also), err)
		})
	}
}

func namesOf(wants []want) string {
	var list []string
	for _, w := range wants {
		list = append(list, w.String())
	}
	return strings.Join(list, ", ")
}

// awaitFindings waits until all is told that is wanted, and returns how long that took.
func awaitFindings(ctx context.Context, l *lookout, from time.Time, wants []want, patience time.Duration) (time.Duration, error) {
	var last time.Time
	err := eventually(ctx, time.Until(from.Add(patience)), func() error {
		var errs []error
		list := l.since(from)
		for _, w := range wants {
			i := slices.IndexFunc(list, func(s sighting) bool { return w.is(&s.toldFinding) })
			if i < 0 {
				errs = append(errs, fmt.Errorf("%s has not told %v", l.node.Name, w))
			} else if list[i].first.After(last) {
				last = list[i].first
			}
		}
		return errors.Join(errs...)
	})
	return max(0, last.Sub(from)), err
}

// unexpected says what was told since then that is not wanted.
func unexpected(l *lookout, since time.Time, wants []want, also []string) error {
	errs := []error{l.lostSince(since)}
	for _, s := range l.since(since) {
		if !slices.Contains(also, s.Code) && !slices.ContainsFunc(wants, func(w want) bool { return w.is(&s.toldFinding) }) {
			errs = append(errs, fmt.Errorf("%s told %v for %v, which is not so: %s", l.node.Name, &s.toldFinding, s.last.Sub(s.first).Round(lookoutPause), s.Message))
		}
	}
	return errors.Join(errs...)
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// restartProxy has kube-proxy write everything anew. In nftables mode it leaves
// chains of endpoints alone that are there already, whatever is in them.
func restartProxy(_ *faultBench, h hand) error {
	if err := h.node.KubeProxy.Stop(h.ctx); err != nil {
		return err
	}
	if h.nftables() {
		if _, err := h.sh("nft delete table ip kube-proxy"); err != nil {
			return err
		}
	}
	return h.node.KubeProxy.Start(h.ctx)
}

// configureAgent gives the agents more arguments than the shipped DaemonSet does.
func (b *bench) configureAgent(ctx context.Context, args ...string) error {
	ops := []string{`{"op":"replace","path":"/spec/updateStrategy/rollingUpdate/maxUnavailable","value":"100%"}`}
	for _, a := range args {
		ops = append(ops, fmt.Sprintf(`{"op":"add","path":"/spec/template/spec/containers/0/args/-","value":%q}`, a))
	}
	if _, err := b.Kubectl(ctx, "-n", "natlens-system", "patch", "daemonset", "natlens-agent", "--type=json", "-p", "["+strings.Join(ops, ",")+"]"); err != nil {
		return err
	}
	return b.rollout(ctx, "natlens-system", "daemonset/natlens-agent")
}

// install installs natlens as it is shipped, and objects of a suite.
func (b *bench) install(ctx context.Context, objects string) error {
	if _, err := b.installAgent(ctx); err != nil {
		return err
	}
	if _, err := b.installEcho(ctx); err != nil {
		return err
	}
	return b.apply(ctx, objects)
}

func (b *bench) apply(ctx context.Context, objects string) error {
	_, err := b.KubectlInput(ctx, strings.NewReader(objects), "apply", "-f", "-")
	return err
}

// echoDeployment is an echo server of some replicas on all nodes.
func echoDeployment(namespace, name string, replicas int) string {
	return fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {namespace: %[1]s, name: %[2]s}
spec:
  replicas: %[3]d
  selector: {matchLabels: {app: %[2]s}}
  template:
    metadata: {labels: {app: %[2]s}}
    spec:
      terminationGracePeriodSeconds: 5
      automountServiceAccountToken: false
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: ScheduleAnyway, labelSelector: {matchLabels: {app: %[2]s}}}
      containers:
      - name: echo
        image: ghcr.io/natlens/echo:latest
        imagePullPolicy: IfNotPresent
        ports: [{name: http, containerPort: 8080}, {name: udp, containerPort: 8080, protocol: UDP}]
        args: [-drain=1s]
        readinessProbe: {httpGet: {path: /readyz, port: 8080}, periodSeconds: 1, failureThreshold: 1}
---
`, namespace, name, replicas)
}

var faultObjects = `
apiVersion: v1
kind: Namespace
metadata: {name: faults}
---
` + echoDeployment("faults", "web", 3) + `
apiVersion: v1
kind: Service
metadata: {namespace: faults, name: plain}
spec: {type: NodePort, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {namespace: faults, name: local}
spec: {type: NodePort, externalTrafficPolicy: Local, selector: {app: web}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {namespace: faults, name: sticky}
spec: {sessionAffinity: ClientIP, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {namespace: faults, name: datagram}
spec: {selector: {app: web}, ports: [{port: 8080, protocol: UDP}]}
---
apiVersion: v1
kind: Service
metadata: {namespace: faults, name: hole, labels: {natlens.io/echo: "true"}}
spec: {ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {namespace: faults, name: nobody}
spec: {selector: {app: nobody}, ports: [{port: 80}]}
`
