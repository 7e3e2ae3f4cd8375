package nodebox

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// workersPerNamespace is how many threads wait in each namespace to make
// sockets. They never wait for the network, so a few keep all cores busy.
const workersPerNamespace = 2

// Namespace is one network namespace of a [Box]. It ends with the box; after
// that its methods return [net.ErrClosed].
type Namespace struct {
	box  *Box
	file *os.File // of /proc/…/ns/net: keeps the namespace alive and is the way in
	jobs chan func()
}

// newNamespace makes an empty namespace with its worker threads.
func (b *Box) newNamespace() (*Namespace, error) {
	ns := &Namespace{box: b, jobs: make(chan func())}
	errc := make(chan error)
	onThread(func() {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			errc <- fmt.Errorf("making a network namespace: %w", err)
			return
		}
		// Not /proc/self, which is the main thread.
		var err error
		ns.file, err = os.Open("/proc/thread-self/ns/net")
		errc <- err
	})
	if err := <-errc; err != nil {
		return nil, err
	}
	for range workersPerNamespace {
		b.workers.Add(1)
		onThread(func() {
			defer b.workers.Done()
			err := ns.enter()
			errc <- err
			if err == nil {
				ns.work()
			}
		})
		if err := <-errc; err != nil {
			return nil, errors.Join(err, ns.file.Close())
		}
	}
	return ns, nil
}

// work runs jobs until the box is closed.
func (ns *Namespace) work() {
	for {
		select {
		case job := <-ns.jobs:
			job()
		case <-ns.box.closed:
			return
		}
	}
}

// onWorker runs f, which must be short, on a worker thread.
func (ns *Namespace) onWorker(f func() error) error {
	errc := make(chan error, 1)
	select {
	case ns.jobs <- func() { errc <- f() }:
		return <-errc
	case <-ns.box.closed:
		return net.ErrClosed
	}
}

// Do runs f in the namespace, on a thread of its own, and returns f's error.
// What f opens there, such as a netlink socket or a file below /proc/sys/net,
// belongs to the namespace for good, also when used elsewhere later; a
// goroutine that f starts does not. In /proc, the thread is thread-self: self,
// and so /proc/net, are the host's. f may take its time, and may call other
// methods.
func (ns *Namespace) Do(f func() error) error {
	errc := make(chan error, 1)
	onThread(func() {
		err := errors.New("the function ended its goroutine")
		defer func() { errc <- err }()
		if e := ns.enter(); e != nil {
			err = e
			return
		}
		e := f()
		err = e
	})
	return <-errc
}

// Start starts a program in the namespace: cmd.Start and what belongs to it.
// It sets XTABLES_LOCKFILE in the program's environment, so that
// iptables-legacy does not take the lock of the host, and unless
// cmd.SysProcAttr.Pdeathsig is set, the program is killed when the box is
// closed. The caller calls cmd.Wait.
func (ns *Namespace) Start(cmd *exec.Cmd) error {
	cmd.Env = append(cmd.Environ(), "XTABLES_LOCKFILE="+ns.box.lockFile())
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	if cmd.SysProcAttr.Pdeathsig == 0 {
		// Sent when the thread that started the program ends: the worker,
		// which lives as long as the box.
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	return ns.onWorker(cmd.Start)
}

// Run is [Namespace.Start] followed by cmd.Wait.
func (ns *Namespace) Run(cmd *exec.Cmd) error {
	if err := ns.Start(cmd); err != nil {
		return err
	}
	return cmd.Wait()
}

// configure runs f in the namespace with a netlink handle of it.
func (ns *Namespace) configure(f func(*netlink.Handle) error) error {
	return ns.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("opening a netlink socket: %w", err)
		}
		defer h.Close()
		return f(h)
	})
}

// enter moves the calling thread into the namespace. The thread never leaves:
// the caller is on one of onThread's.
func (ns *Namespace) enter() error {
	select {
	case <-ns.box.closed:
		return net.ErrClosed
	default:
	}
	return ns.withFD(func(fd int) error {
		if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("entering a network namespace: %w", err)
		}
		return nil
	})
}

// withFD lends the namespace's file descriptor, which stays open meanwhile
// even if the box is closed.
func (ns *Namespace) withFD(f func(fd int) error) error {
	conn, err := ns.file.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := conn.Control(func(fd uintptr) { ferr = f(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

// onThread starts f on an OS thread that nothing else uses, and that ends with
// f: f may move it into a namespace and need not move it back. Threads that
// the runtime starts later are not copies of it.
func onThread(f func()) {
	go func() {
		runtime.LockOSThread() // and no unlock: the runtime ends such a thread
		if unix.Gettid() != unix.Getpid() {
			f()
			return
		}
		// This is the main thread, which the runtime cannot end; it would keep
		// the namespace, and would change what /proc/self shows. Hold it
		// until another thread is taken.
		taken := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(taken)
			f()
		}()
		<-taken
		runtime.UnlockOSThread()
	}()
}
