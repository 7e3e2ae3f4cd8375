package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/natlens/natlens/test/cluster/kube"
)

// image checks what the images are, and as what they run.
func (w *walk) image(ctx context.Context) {
	agents, err := w.Pods(ctx, "natlens-system", "app.kubernetes.io/name=natlens-agent")
	if err == nil && len(agents) == 0 {
		err = errors.New("there are none")
	}
	if err != nil {
		w.check("the agents' pods", func() (string, error) { return "", err })
		return
	}
	agent, echo := agents[0], w.pods[0]
	w.check("the agent has the manifest's capability, and no other", func() (string, error) {
		const netAdmin = 1 << 12
		return privileges(agent, "0", netAdmin)
	})
	w.check("the echo server has no capability, and is not root", func() (string, error) { return privileges(echo, "65532", 0) })
	for name, p := range map[string]*kube.Pod{"agent": agent, "echo": echo} {
		w.check("the image of "+name+" is one program: no shell, no file beside it", func() (string, error) { return files(p, name) })
		w.check("the root of "+name+" cannot be written to", func() (string, error) { return readOnly(p) })
	}
	w.check("kubectl exec finds no shell in the agent", func() (string, error) {
		_, err := w.Kubectl(ctx, "exec", "-n", "natlens-system", agent.Name, "--", "sh", "-c", "true")
		if err == nil {
			return "", errors.New("it ran one")
		}
		if !strings.Contains(err.Error(), `exec: "sh"`) {
			return "", err
		}
		return `exec: "sh": not found`, nil
	})
	const rest = 20 * time.Second
	w.check(fmt.Sprintf("memory and processor of an agent at rest, over %v", rest), func() (string, error) { return atRest(ctx, agent, rest) })
}

// status returns the lines of a process's /proc/…/status.
func status(p *kube.Pod) (map[string]string, error) {
	text, err := os.ReadFile(p.Proc + "/status")
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		out[name] = strings.TrimSpace(value)
	}
	return out, nil
}

// privileges checks as whom a pod's process runs, and what it may.
func privileges(p *kube.Pod, uid string, capabilities uint64) (string, error) {
	s, err := status(p)
	if err != nil {
		return "", err
	}
	want := fmt.Sprintf("%016x", capabilities)
	for _, set := range []string{"CapPrm", "CapEff", "CapBnd"} {
		if s[set] != want {
			return "", fmt.Errorf("%s is %s, want %s", set, s[set], want)
		}
	}
	for name, want := range map[string]string{"CapInh": "0000000000000000", "CapAmb": "0000000000000000", "NoNewPrivs": "1", "Seccomp": "2"} {
		if s[name] != want {
			return "", fmt.Errorf("%s is %s, want %s", name, s[name], want)
		}
	}
	ids := strings.Fields(s["Uid"])
	if slices.ContainsFunc(ids, func(id string) bool { return id != uid }) {
		return "", fmt.Errorf("runs as uid %v, want %s", ids, uid)
	}
	return fmt.Sprintf("uid %s, CapEff %s, NoNewPrivs, seccomp filter", ids[0], s["CapEff"]), nil
}

// files lists what is in a container besides what the runtime mounts there.
func files(p *kube.Pod, program string) (string, error) {
	root := filepath.Join(p.Proc, "root") + "/"                         // through the link
	mounted := []string{"dev", "proc", "sys", "etc", "var/run/secrets"} // /etc/hosts and the like
	var found []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path, root)
		if d.IsDir() && slices.Contains(mounted, name) {
			return fs.SkipDir
		}
		if !d.IsDir() {
			found = append(found, "/"+name)
		}
		return nil
	})
	if err == nil && !slices.Equal(found, []string{"/" + program}) {
		err = fmt.Errorf("found %v", found)
	}
	return strings.Join(found, " "), err
}

// readOnly tries to write into a container's root.
func readOnly(p *kube.Pod) (string, error) {
	name := filepath.Join(p.Proc, "root", "written")
	file, err := os.Create(name)
	if err == nil {
		return "", errors.Join(errors.New("a file could be written"), file.Close(), os.Remove(name))
	}
	if !errors.Is(err, syscall.EROFS) {
		return "", err
	}
	return syscall.EROFS.Error(), nil
}

// atRest measures what an agent costs while nothing happens. The limits are there to
// catch a blunder: the numbers are the result.
func atRest(ctx context.Context, p *kube.Pod, rest time.Duration) (string, error) {
	before, err := processor(p)
	if err != nil {
		return "", err
	}
	select {
	case <-ctx.Done():
		return "", ctx.Err()
	case <-time.After(rest):
	}
	after, err := processor(p)
	if err != nil {
		return "", err
	}
	s, err := status(p)
	if err != nil {
		return "", err
	}
	kib, err := strconv.Atoi(strings.TrimSuffix(s["VmRSS"], " kB"))
	if err != nil {
		return "", err
	}
	busy := 100 * float64(after-before) / float64(rest)
	seen := fmt.Sprintf("%.1f MiB resident, %.2f %% of a core", float64(kib)/1024, busy)
	if kib > 100<<10 || busy > 5 {
		return seen, errors.New("want less than 100 MiB and 5 %")
	}
	return seen, nil
}

// processor returns the time that a pod's process has run, to the nanosecond.
func processor(p *kube.Pod) (time.Duration, error) {
	tasks, err := filepath.Glob(p.Proc + "/task/*/schedstat")
	if err != nil {
		return 0, err
	}
	var sum time.Duration
	for _, t := range tasks {
		text, err := os.ReadFile(t)
		if err != nil {
			continue // a thread that has ended
		}
		var ns int64
		if _, err := fmt.Sscan(string(text), &ns); err != nil {
			return 0, err
		}
		sum += time.Duration(ns)
	}
	return sum, nil
}
