package kube

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
	"time"

	"golang.org/x/sys/unix"
)

// down leaves nothing of a cluster. It relies on no record: whoever started the
// cluster may have been killed at any moment.
func down(ctx context.Context, name string) error {
	for {
		n, err := kill(ctx, name)
		if err != nil {
			return err
		}
		if n == 0 { // else, they may have started others meanwhile
			break
		}
	}
	if err := removeCgroups(ctx, name); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(home, name)); err != nil {
		return err
	}
	_ = os.Remove(home) // unless there are other clusters
	return nil
}

// kill kills all processes that bear the cluster's mark, waits for their end, and
// returns how many there were. Those in containers do not bear it: they die with
// the first process of their box, which ends after them.
func kill(ctx context.Context, name string) (int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, err
	}
	var killed []int // pidfds
	defer func() {
		for _, fd := range killed {
			_ = unix.Close(fd)
		}
	}()
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		fd, err := unix.PidfdOpen(pid, 0) // first: now the number cannot pass to another
		if err != nil {
			continue
		}
		if !marked(pid, name) {
			_ = unix.Close(fd)
			continue
		}
		killed = append(killed, fd)
		if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return 0, fmt.Errorf("killing process %d: %w", pid, err)
		}
	}
	return len(killed), wait(ctx, 30*time.Second, func() error {
		left := 0
		for _, fd := range killed {
			poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			if n, err := unix.Poll(poll, 0); n == 0 || err != nil {
				left++
			}
		}
		if left > 0 {
			return fmt.Errorf("%d killed processes are still there", left)
		}
		return nil
	})
}

func marked(pid int, name string) bool {
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)) // empty for one that has ended
	return err == nil && slices.Contains(strings.Split(string(env), "\x00"), marker+"="+name)
}

// Left lists what is left of a cluster, after [Down] or a crash.
func Left(name string) ([]string, error) {
	var left []string
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	for _, dir := range processes {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		groups, _ := os.ReadFile(dir + "/cgroup") // those in containers bear no mark
		if marked(pid, name) || strings.Contains(string(groups), cgroup(name)+"/") {
			program, _ := os.Readlink(dir + "/exe")
			left = append(left, fmt.Sprintf("process %d %s", pid, program))
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, filepath.Join(home, name)+"/") {
			left = append(left, "mount "+strings.TrimSpace(line))
		}
	}
	for _, pattern := range append(cgroupPatterns(name), filepath.Join(home, name)) {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		left = append(left, found...)
	}
	return left, nil
}

// cgroup is the path of a cluster's cgroups, in every hierarchy.
func cgroup(name string) string { return "/natlens-cluster-" + name }

// cgroupPatterns are the directories of a cluster's cgroups: one in all for cgroup
// v2, one for each controller for v1.
func cgroupPatterns(name string) []string {
	return []string{"/sys/fs/cgroup" + cgroup(name), "/sys/fs/cgroup/*" + cgroup(name)}
}

// removeCgroups removes the cluster's cgroups, which the kernel lets go of only
// when it has cleared away the last process.
func removeCgroups(ctx context.Context, name string) error {
	return wait(ctx, 10*time.Second, func() error {
		var errs []error
		for _, pattern := range cgroupPatterns(name) {
			tops, err := filepath.Glob(pattern)
			if err != nil {
				return err
			}
			for _, top := range tops {
				errs = append(errs, removeTree(top))
			}
		}
		return errors.Join(errs...)
	})
}

// removeTree removes a tree of cgroups. The files in them are none.
func removeTree(top string) error {
	var dirs []string
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	slices.Reverse(dirs) // the deepest first
	for _, dir := range dirs {
		if err := unix.Rmdir(dir); err != nil {
			return fmt.Errorf("removing cgroup %s: %w", dir, err)
		}
	}
	return nil
}
