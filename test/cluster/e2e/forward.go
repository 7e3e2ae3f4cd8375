package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"
)

// portForward runs kubectl port-forward in control, and returns when it listens.
func (b *bench) portForward(ctx context.Context, args ...string) (stop func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	cmd := exec.CommandContext(ctx, b.KubectlPath(), append([]string{"port-forward"}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = b.StartKubectl(cmd)
	}
	if err != nil {
		cancel()
		return nil, err
	}
	listens, ended := make(chan bool, 1), make(chan struct{})
	go func() {
		defer close(ended)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if strings.HasPrefix(lines.Text(), "Forwarding from") {
				listens <- true
				break
			}
		}
		_, _ = io.Copy(io.Discard, out)
		_ = cmd.Wait()
	}()
	stop = func() {
		cancel()
		<-ended
	}
	select {
	case <-listens:
		return stop, nil
	case <-ended:
		cancel()
	case <-time.After(20 * time.Second):
		stop()
	}
	return nil, fmt.Errorf("kubectl port-forward %s: %s", strings.Join(args, " "), strings.TrimSpace(stderr.String()))
}
