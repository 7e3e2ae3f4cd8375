package kube

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// Netns is a network namespace: a node's, a pod's, or that of the outside. It
// lives as long as whoever it belongs to.
type Netns struct {
	path    string // of a file in /proc/…/ns
	cluster string
}

// Do runs f on a thread of its own inside the namespace, and returns f's error.
// Sockets that f opens belong to the namespace for good; a goroutine that f
// starts is not inside.
func (n Netns) Do(f func() error) error {
	return onThread(func() error {
		if err := enter(n.path, unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	})
}

// Dial connects from inside the namespace; address is a literal IP address and
// a port.
func (n Netns) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = n.Do(func() error {
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Client returns an HTTP client inside the namespace, which takes any
// certificate and makes a new connection for each request.
func (n Netns) Client() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext:       n.Dial,
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true},
	}}
}

// get asks for a URL, with little patience, and returns the body. A status other
// than 200 is an error.
func (n Netns) get(ctx context.Context, url string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	client := n.Client()
	client.Timeout = 5 * time.Second
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %.300s", url, res.Status, body)
	}
	return body, err
}

// Start starts a program whose network is the namespace; the file system, and
// so the paths of files, are the caller's. The caller calls cmd.Wait.
func (n Netns) Start(cmd *exec.Cmd) error {
	n.mark(cmd)
	return n.Do(cmd.Start)
}

// mark lets a program be found when the cluster is taken down.
func (n Netns) mark(cmd *exec.Cmd) { cmd.Env = append(cmd.Environ(), marker+"="+n.cluster) }

// Output runs a program as [Netns.Start] does, and returns what it printed. What
// it says on standard error becomes part of the error.
func (n Netns) Output(ctx context.Context, program string, args ...string) ([]byte, error) {
	return output(ctx, n.Start, program, args...)
}

// enter moves the calling thread into a namespace. A thread that has once been
// moved is no good for anything else: see [onThread].
func enter(path string, kind int) error {
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("entering a namespace: %w", err)
	}
	defer file.Close()
	if kind == unix.CLONE_NEWNS {
		// The kernel refuses a thread that shares its root with others.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("entering %s: %w", path, err)
		}
	}
	if err := unix.Setns(int(file.Fd()), kind); err != nil {
		return fmt.Errorf("entering %s: %w", path, err)
	}
	return nil
}

// onThread runs f on a thread that nothing else uses, and that ends with f.
func onThread(f func() error) error {
	errc := make(chan error, 1)
	run := func() {
		err := errors.New("the function ended its goroutine") // t.Fatal does
		defer func() { errc <- err }()
		err = f()
	}
	go func() {
		runtime.LockOSThread() // and no unlock: the runtime ends such a thread
		if unix.Gettid() != unix.Getpid() {
			run()
			return
		}
		// The main thread cannot end. Hold it until another one is taken.
		taken := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(taken)
			run()
		}()
		<-taken
		runtime.UnlockOSThread()
	}()
	return <-errc
}
