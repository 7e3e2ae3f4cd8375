package kube

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Box is a machine of the cluster: a network, a file system and processes of its
// own. Its file system is this machine's, but for what a node writes to: /run,
// /var/lib and /var/log.
//
// When its first process ends, the kernel ends all others, among them those of
// its containers, and then its mounts, interfaces and rules are gone.
type Box struct {
	Name string
	Netns
	cluster *Cluster
	first   *Process
}

// dir is a directory of this machine that is part of the box's file system: lib is
// its /var/lib, log its /var/log.
func (b *Box) dir(elem ...string) string {
	return filepath.Join(append([]string{b.cluster.dir, b.Name}, elem...)...)
}

// boxOf returns a box that is made already, or is about to be.
func (c *Cluster) boxOf(name string) *Box {
	b := &Box{Name: name, cluster: c}
	b.first = &Process{Name: "pause", box: b}
	b.first.find()
	b.Netns = Netns{path: b.namespace("net"), cluster: c.Name}
	return b
}

func (b *Box) namespace(kind string) string {
	return fmt.Sprintf("/proc/%d/ns/%s", b.first.running.PID, kind)
}

// foreign are settings of the whole machine which a kubelet makes unless they are
// so already. In a box they are.
var foreign = map[string]string{
	"vm/overcommit_memory":      "1",
	"vm/panic_on_oom":           "0",
	"kernel/panic":              "10",
	"kernel/panic_on_oops":      "1",
	"kernel/keys/root_maxkeys":  "1000000",
	"kernel/keys/root_maxbytes": "25000000",
}

// make makes the box, with nothing in it but its first process.
func (b *Box) make(ctx context.Context, pause string) error {
	for _, dir := range []string{"lib", "log", "lib/sysctl"} {
		if err := os.MkdirAll(b.dir(dir), 0o755); err != nil {
			return err
		}
	}
	cmd := exec.Command(pause)
	cmd.Env = []string{marker + "=" + b.cluster.Name}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWUTS,
		// Not a flag of clone, so that no mount gets back to this machine.
		Unshareflags: unix.CLONE_NEWNS,
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("making the namespaces of %s: %w", b.Name, err)
	}
	go func() { _ = cmd.Wait() }()
	b.first.running = identify(cmd.Process.Pid)
	if err := b.first.record(); err != nil {
		return err
	}
	b.Netns.path = b.namespace("net")
	// First, and not by the program mount, which writes to /run itself.
	err := onThread(func() error {
		if err := enter(b.namespace("mnt"), unix.CLONE_NEWNS); err != nil {
			return err
		}
		return unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755")
	})
	if err != nil {
		return fmt.Errorf("mounting /run of %s: %w", b.Name, err)
	}
	script := []string{
		"set -e",
		"hostname " + b.Name,
		"mount -t proc proc /proc",
	}
	for name, value := range foreign {
		file := b.dir("lib/sysctl", strings.ReplaceAll(name, "/", "."))
		if err := os.WriteFile(file, []byte(value+"\n"), 0o644); err != nil {
			return err
		}
		script = append(script, fmt.Sprintf("[ ! -e /proc/sys/%[1]s ] || mount --bind '%[2]s' /proc/sys/%[1]s", name, file))
	}
	script = append(script,
		fmt.Sprintf("mount --bind '%s' /var/log", b.dir("log")),
		fmt.Sprintf("mount --bind '%s' /var/lib", b.dir("lib")), // the last: it hides the cluster's directory
		"mount --make-rshared /",                                // as on a node
		"ip link set lo up",
	)
	_, err = b.Exec(ctx, "sh", "-c", strings.Join(script, "\n"))
	return err
}

// Start starts a program in the box. The caller calls cmd.Wait.
func (b *Box) Start(cmd *exec.Cmd) error {
	b.mark(cmd)
	return onThread(func() error {
		// The file system comes last: the other paths are in this machine's /proc.
		for _, ns := range []struct {
			name string
			kind int
		}{{"net", unix.CLONE_NEWNET}, {"uts", unix.CLONE_NEWUTS}, {"pid", unix.CLONE_NEWPID}, {"mnt", unix.CLONE_NEWNS}} {
			if err := enter(b.namespace(ns.name), ns.kind); err != nil {
				return fmt.Errorf("%s does not run: %w", b.Name, err)
			}
		}
		return cmd.Start()
	})
}

// Exec runs a program in the box and returns what it printed. What it says on
// standard error becomes part of the error.
func (b *Box) Exec(ctx context.Context, program string, args ...string) ([]byte, error) {
	return output(ctx, b.Start, program, args...)
}
