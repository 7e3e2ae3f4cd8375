//go:build linux

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/internal/nodebox"
)

// measureAgent measures "agent serve" as a whole on a node of iptables-nft: how
// long a change takes to its JSON, what the agent needs at rest, and what it
// costs whoever writes rules beside it.
func measureAgent(ctx context.Context, program string, services, endpoints, rounds int, rest time.Duration) error {
	box, err := newBox()
	if err != nil {
		return err
	}
	defer box.Close()
	rules, err := iptablesRules("iptables-nft-restore", services, endpoints)
	if err != nil {
		return err
	}
	if err := feed(box, rules.input, rules.load); err != nil {
		return err
	}
	changes := 0
	write := func() (time.Duration, error) {
		start := time.Now()
		err := feed(box, rules.changes[changes%2], rules.change)
		changes++
		return time.Since(start), err
	}
	var alone, beside, latencies []time.Duration
	a := &agent{box: box}
	for range rounds {
		// Behind the same pause as the others: a write right after another is quicker.
		time.Sleep(pause)
		took, err := write()
		if err != nil {
			return err
		}
		alone = append(alone, took)
		if err := a.start(ctx, program); err != nil {
			return err
		}
		err = func() error {
			defer a.stop()
			// Twice, so that there is the first state again for the next round;
			// and each behind a pause, so that the agent is at rest before.
			for range 2 {
				// Not at a moment that the agent's own clock has chosen.
				time.Sleep(pause + rand.N(time.Second))
				before, err := a.version(ctx)
				if err != nil {
					return err
				}
				took, err := write()
				if err != nil {
					return err
				}
				beside = append(beside, took)
				written := time.Now()
				for {
					now, err := a.version(ctx)
					if err != nil {
						return err
					}
					if now != before {
						break
					}
					if time.Since(written) > patience {
						return fmt.Errorf("%v after a write, the agent does not show it", patience)
					}
					time.Sleep(2 * time.Millisecond) // the questions are not to slow the answer down
				}
				latencies = append(latencies, time.Since(written))
			}
			_, err := write()
			return err
		}()
		if err != nil {
			return err
		}
	}
	if err := a.start(ctx, program); err != nil {
		return err
	}
	defer a.stop()
	// Some limits are for a thousand Services; beyond, a look is enough.
	limited := services <= 1000
	if !limited {
		rest /= 10
	}
	time.Sleep(settled)
	before, began := a.cpu(), time.Now()
	for time.Since(began) < rest {
		connect(ctx, box, services) // light traffic
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
	}
	busy := float64(a.cpu()-before) / float64(time.Since(began))
	memory := a.memory()
	if err := a.cmd.Process.Signal(syscall.SIGSTOP); err != nil { // so that it does not keep the processor warm
		return err
	}
	least, err := bareLooks(30 * time.Second)
	if err != nil {
		return err
	}

	fmt.Printf("### agent serve, iptables-nft, %d Services x %d endpoints\n\n", services, endpoints)
	fmt.Println("| | | at most | met |\n|---|---|---|---|")
	limit := func(text string) string {
		if !limited {
			return ""
		}
		return text
	}
	line := func(text, value string, limit string, met bool) {
		verdict := map[bool]string{true: "yes", false: "**no**"}[met]
		if limit == "" {
			verdict = ""
		}
		fmt.Printf("| %s | %s | %s | %s |\n", text, value, limit, verdict)
	}
	line("from the end of a write to the JSON that shows it, median", short(median(latencies)), limit("100 ms"), median(latencies) <= 100*time.Millisecond)
	line("the same, longest of "+fmt.Sprint(len(latencies)), short(slices.Max(latencies)), "", true)
	ratio := float64(median(beside)) / float64(median(alone))
	line(fmt.Sprintf("a write of one Service beside the agent (%s alone)", short(median(alone))), fmt.Sprintf("%.3f of that", ratio), "1.05", ratio <= 1.05)
	line(fmt.Sprintf("processor over %v of light traffic", rest), fmt.Sprintf("%.2f %% of a core", 100*busy), limit("0.2 %"), busy <= 0.002)
	line("a thread that only asks for the generation, seven times a second", fmt.Sprintf("%.2f %% of a core", 100*least), "", true)
	line("memory, steady", kib(memory), "", true)
	fmt.Println()
	return nil
}

// pause is how long nothing has happened ahead of a write that is measured: longer
// than an agent looks often after a change.
const pause = 12 * time.Second

// settled is when an agent is at rest: it looks up often after its start and after
// a change, and reads everything once more.
const settled = 75 * time.Second

// patience is longer than a first reading of fifty thousand Services takes.
const patience = 5 * time.Minute

// agent is a running "agent serve".
type agent struct {
	box    *nodebox.Box
	listen string // where; "" for the default
	cmd    *exec.Cmd
	web    http.Client
}

func (a *agent) address() string { return cmp.Or(a.listen, "127.0.0.1:9754") }

func (a *agent) start(ctx context.Context, program string, args ...string) error {
	a.cmd = exec.CommandContext(ctx, program, append([]string{"serve", "--local", kubeproxy.SyntheticNodeIP.String()}, args...)...)
	if err := a.box.Node.Start(a.cmd); err != nil {
		return err
	}
	a.web = http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		return a.box.Node.Dial(ctx, network, addr)
	}}}
	for start := time.Now(); time.Since(start) < patience; time.Sleep(50 * time.Millisecond) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+a.address()+"/readyz", nil)
		if err != nil {
			return err
		}
		if res, err := a.web.Do(req); err == nil {
			res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return nil
			}
		}
	}
	a.stop()
	return fmt.Errorf("%s serve did not get ready", program)
}

// version returns what the agent's JSON says of the Service that changes.
func (a *agent) version(ctx context.Context) (string, error) {
	s := kubeproxy.Synthetic(changedService+1, 2)[changedService]
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+a.address()+"/api/v1/services/"+s.Namespace+"/"+s.Name, nil)
	if err != nil {
		return "", err
	}
	res, err := a.web.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	var doc struct {
		Services []struct{ Frontends json.RawMessage }
	}
	if err := json.NewDecoder(res.Body).Decode(&doc); err != nil || len(doc.Services) == 0 {
		return "", fmt.Errorf("status %s, %w", res.Status, err)
	}
	return string(doc.Services[0].Frontends), nil
}

// cpu returns the time that the agent has run on a processor: exactly, where
// utime and stime are guesses by the tick.
func (a *agent) cpu() time.Duration {
	var sum time.Duration
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", a.cmd.Process.Pid))
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil {
			var ns int64
			_, _ = fmt.Sscan(string(b), &ns)
			sum += time.Duration(ns)
		}
	}
	return sum
}

func (a *agent) memory() int { return memoryOf(a.cmd.Process.Pid) }

// memoryOf returns the resident memory of a process, in KiB.
func memoryOf(pid int) int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	_, after, _ := strings.Cut(string(b), "VmRSS:")
	var kib int
	_, _ = fmt.Sscan(after, &kib)
	return kib
}

func (a *agent) stop() {
	_ = a.cmd.Process.Signal(syscall.SIGCONT) // a stopped process hears of no end
	_ = a.cmd.Process.Signal(os.Interrupt)
	_ = a.cmd.Wait()
	a.web.CloseIdleConnections()
}

func median(list []time.Duration) time.Duration {
	sorted := slices.Sorted(slices.Values(list))
	return sorted[len(sorted)/2]
}
