package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// marker is the environment variable of all processes of a cluster but those in
// containers. Its value is the name of the cluster. By it they are found again,
// whatever became of the program that started them.
const marker = "NATLENS_CLUSTER"

// Process is a program that runs in a box until it is stopped.
type Process struct {
	Name    string // kubelet, kube-proxy, …
	box     *Box
	argv    []string
	path    string                      // PATH
	check   func(context.Context) error // passes when it does its work
	running identity                    // zero: not started
}

// identity tells a process from all that ever bear its number.
type identity struct {
	PID   int
	Start uint64 // ticks since the machine started
}

// LogFile is where the process writes to, over all its runs.
func (p *Process) LogFile() string {
	return filepath.Join(p.box.cluster.dir, "log", p.box.Name+"-"+p.Name+".log")
}

func (p *Process) recordFile() string {
	return filepath.Join(p.box.cluster.dir, "run", p.box.Name+"-"+p.Name)
}

// Start starts the process, which outlives the caller, and waits until it does its
// work: a kube-proxy has written its rules then. If it does not get there, the
// error holds the end of its log.
func (p *Process) Start(ctx context.Context) error {
	if err := p.launch(); err != nil {
		return fmt.Errorf("starting %s of %s: %w", p.Name, p.box.Name, err)
	}
	const patience = 2 * time.Minute
	err := wait(ctx, patience, func() error {
		if p.PID() == 0 {
			return permanent{errors.New("it ended")}
		}
		return p.check(ctx)
	})
	if err == nil || ctx.Err() != nil {
		return err
	}
	return fmt.Errorf("%s of %s did not get ready: %w\nThe end of %s:\n%s", p.Name, p.box.Name, err, p.LogFile(), tail(p.LogFile(), 25))
}

func (p *Process) launch() error {
	log, err := os.OpenFile(p.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	fmt.Fprintf(log, "--- %s %s\n", time.Now().Format(time.RFC3339), strings.Join(p.argv, " "))
	cmd := exec.Command(p.argv[0], p.argv[1:]...)
	cmd.Env = []string{"PATH=" + p.path, "HOME=/root"}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := p.box.Start(cmd); err != nil {
		return err
	}
	p.running = identify(cmd.Process.Pid)
	go func() { _ = cmd.Wait() }() // so that it leaves no zombie while we live
	return p.record()
}

// record lets other programs find the process.
func (p *Process) record() error {
	text, err := json.Marshal(p.running)
	if err != nil {
		return err
	}
	return os.WriteFile(p.recordFile(), text, 0o644)
}

// find looks up the process that an earlier program started.
func (p *Process) find() {
	p.running = identity{}
	if text, err := os.ReadFile(p.recordFile()); err == nil {
		_ = json.Unmarshal(text, &p.running) // half a record is no process
	}
}

// PID returns the number of the process on this machine, or 0 if it does not run.
func (p *Process) PID() int {
	if p.running.PID == 0 || identify(p.running.PID) != p.running {
		return 0
	}
	return p.running.PID
}

// identify returns the identity of the process that has a number now; it is zero
// if there is none, or if it has ended and waits for its parent to notice.
func identify(pid int) identity {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return identity{}
	}
	// proc(5) numbers fields from 1; the second is the program's name, in
	// parentheses, and can hold anything.
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const state, start = 0, 22 - 3
	if len(fields) <= start || fields[state] == "Z" || fields[state] == "X" {
		return identity{}
	}
	ticks, _ := strconv.ParseUint(fields[start], 10, 64)
	return identity{PID: pid, Start: ticks}
}

// Signal sends a signal, such as SIGSTOP to freeze the process and SIGCONT to let
// it go on.
func (p *Process) Signal(s syscall.Signal) error {
	fd, err := unix.PidfdOpen(p.running.PID, 0)
	if err == nil {
		defer func() { _ = unix.Close(fd) }()
	}
	if err != nil || p.PID() == 0 { // asked again, now that the number cannot pass to another
		return fmt.Errorf("%s of %s does not run", p.Name, p.box.Name)
	}
	return unix.PidfdSendSignal(fd, s, nil, 0)
}

// Freeze stops the process from running, as a hang does; Continue lets it go on.
func (p *Process) Freeze() error { return p.Signal(syscall.SIGSTOP) }

// Continue undoes [Process.Freeze].
func (p *Process) Continue() error { return p.Signal(syscall.SIGCONT) }

// Stop ends the process, by force if it does not end by itself. What it did, such
// as kube-proxy's rules, stays.
func (p *Process) Stop(ctx context.Context) error {
	if p.PID() == 0 {
		return nil
	}
	_ = p.Signal(syscall.SIGTERM)
	_ = p.Signal(syscall.SIGCONT)
	gone := func() error {
		if p.PID() != 0 {
			return errors.New("still runs")
		}
		return nil
	}
	if wait(ctx, 10*time.Second, gone) == nil {
		return nil
	}
	_ = p.Signal(syscall.SIGKILL)
	return wait(ctx, 10*time.Second, gone)
}

// Restart is Stop and Start.
func (p *Process) Restart(ctx context.Context) error {
	if err := p.Stop(ctx); err != nil {
		return err
	}
	return p.Start(ctx)
}

// permanent is an error that waiting does not cure.
type permanent struct{ error }

// wait calls check until it passes, and returns its last error when patience is
// over.
func wait(ctx context.Context, patience time.Duration, check func() error) error {
	over := time.After(patience)
	for {
		err := check()
		if err == nil || errors.As(err, &permanent{}) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		case <-over:
			return fmt.Errorf("waited %v: %w", patience, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// tail returns the last lines of a file, each cut to a length that can be read.
func tail(file string, lines int) string {
	f, err := os.Open(file)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	const most = 64 << 10
	if info, err := f.Stat(); err == nil && info.Size() > most {
		_, _ = f.Seek(-most, io.SeekEnd)
	}
	text, _ := io.ReadAll(f)
	all := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	all = all[max(0, len(all)-lines):]
	for i, line := range all {
		all[i] = "  " + line[:min(len(line), 400)]
	}
	return strings.Join(all, "\n")
}

// output runs a program by start, and returns what it printed.
func output(ctx context.Context, start func(*exec.Cmd) error, program string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, program, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return stdout.Bytes(), fmt.Errorf("%s %s: %w: %s", filepath.Base(program), strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.Bytes(), nil
}
