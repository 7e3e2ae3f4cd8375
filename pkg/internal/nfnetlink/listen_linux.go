package nfnetlink

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// eventSize is more than one event has: a few hundred bytes.
const eventSize = 8 << 10

// Listener hears of what the kernel does by itself, as it happens. It costs the
// kernel a message for each, whether somebody reads it or not.
type Listener struct {
	fd  int
	buf []byte // reused
}

// Listen listens to a group (NFNLGRP_* of linux/netfilter/nfnetlink.h) in the
// network namespace of the calling thread.
func Listen(group int) (*Listener, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1 << (group - 1)}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("listening on a netlink socket: %w", err)
	}
	return &Listener{fd: fd, buf: make([]byte, eventSize)}, nil
}

// Receive returns the attributes of the next event that has happened already; ok
// is false when there is none. They are valid until the next call. What did not fit
// the socket's buffer the kernel has dropped, unsaid.
func (l *Listener) Receive() (attrs []byte, ok bool, err error) {
	for {
		n, from, err := unix.Recvfrom(l.fd, l.buf, unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil, false, nil
		case errors.Is(err, unix.ENOBUFS), errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return nil, false, fmt.Errorf("listening on netlink: %w", err)
		}
		if sender, ok := from.(*unix.SockaddrNetlink); !ok || sender.Pid != 0 {
			continue // not the kernel
		}
		m, _, err := cutMessage(l.buf[:n])
		if err != nil {
			return nil, false, err
		}
		if m.typ >= unix.NLMSG_MIN_TYPE {
			attrs, err := m.attrs()
			return attrs, err == nil, err
		}
	}
}

// Close ends the listening.
func (l *Listener) Close() error { return unix.Close(l.fd) }
