package main

import (
	"context"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// installAgent installs the agents with the manifest that users apply, and waits
// until one is ready on every node.
func (b *bench) installAgent(ctx context.Context) (string, error) {
	start := time.Now()
	if _, err := b.Kubectl(ctx, "apply", "-f", b.file("deploy/daemonset.yaml")); err != nil {
		return "", err
	}
	if err := b.rollout(ctx, "natlens-system", "daemonset/natlens-agent"); err != nil {
		return "", err
	}
	took := time.Since(start)
	pods, err := b.Pods(ctx, "natlens-system", "app.kubernetes.io/name=natlens-agent")
	if err != nil {
		return "", err
	}
	var nodes []string
	for _, p := range pods {
		nodes = append(nodes, p.Node.Name)
	}
	seen := fmt.Sprintf("%d ready after %.1fs", len(pods), took.Seconds())
	if len(pods) != len(b.Nodes) {
		return seen, fmt.Errorf("agents on %v, want one on each of %d nodes", nodes, len(b.Nodes))
	}
	return seen, nil
}

// agentProgram returns the path of the agent's program, for nodes to run.
func (b *bench) agentProgram() (string, error) {
	return filepath.Abs(b.file("bin/image/" + runtime.GOARCH + "/agent"))
}

// installEcho installs the echo server and its Service, with the manifest that
// users apply, and waits until its pods are ready.
func (b *bench) installEcho(ctx context.Context) (string, error) {
	start := time.Now()
	if _, err := b.Kubectl(ctx, "apply", "-f", b.file("deploy/echo.yaml")); err != nil {
		return "", err
	}
	if err := b.rollout(ctx, "default", "deployment/go-app"); err != nil {
		return "", err
	}
	return fmt.Sprintf("ready after %.1fs", time.Since(start).Seconds()), nil
}

// rollout waits until a workload is as its object says.
func (b *bench) rollout(ctx context.Context, namespace, workload string) error {
	out, err := b.Kubectl(ctx, "rollout", "status", "-n", namespace, workload, "--timeout=90s")
	if err != nil {
		events, _ := b.Kubectl(ctx, "get", "events", "-n", namespace, "--field-selector=type=Warning", "-o", `jsonpath={range .items[-3:]}{.message}{"; "}{end}`)
		return fmt.Errorf("%w: %s; warnings: %s", err, lastLine(out), events)
	}
	return nil
}

func lastLine(text []byte) string {
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return lines[len(lines)-1]
}
