package demo

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"syscall"
)

// listenerEnv tells a process that RunAsOwnRoot started which of its files is
// the listener of the host.
const listenerEnv = "NATLENS_DEMO_LISTENER"

// InheritedListener returns the listener that RunAsOwnRoot passed on, or nil.
func InheritedListener() (net.Listener, error) {
	text := os.Getenv(listenerEnv)
	if text == "" {
		return nil, nil
	}
	fd, err := strconv.Atoi(text)
	if err != nil {
		return nil, fmt.Errorf("%s=%q: %w", listenerEnv, text, err)
	}
	f := os.NewFile(uintptr(fd), "listener")
	defer f.Close()
	return net.FileListener(f)
}

// RunAsOwnRoot runs this program once more, with the same arguments, as root of
// a user namespace of its own: there a plain user may make network namespaces.
// The listener stays one of the host's, so that a browser reaches it.
func RunAsOwnRoot(ctx context.Context, ln net.Listener, stdout, stderr io.Writer) error {
	file, err := ln.(*net.TCPListener).File()
	if err != nil {
		return err
	}
	defer func() {
		// Passing the socket on made it blocking, for this process too, and the
		// caller may want to serve on it after all.
		_ = syscall.SetNonblock(int(file.Fd()), true)
		file.Close()
	}()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), listenerEnv+"=3")
	cmd.ExtraFiles = []*os.File{file}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	return cmd.Run()
}
