//go:build linux

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// This file has the bare dumps that no reader can be faster than: the kernel's
// work, and nothing done with its answers.

// dumpLegacy copies the tables that a node of kube-proxy has.
func dumpLegacy() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for _, table := range []string{"nat", "filter"} {
		var info [84]byte // struct ipt_getinfo
		copy(info[:], table)
		if err := getsockopt(fd, 64, info[:]); err != nil {
			return err
		}
		size := binary.NativeEndian.Uint32(info[80:])
		buffer, err := legacyBuffer(40 + int(size))
		if err != nil {
			return err
		}
		clear(buffer[:40])
		copy(buffer, table)
		binary.NativeEndian.PutUint32(buffer[32:], size)
		if err := getsockopt(fd, 65, buffer); err != nil {
			return err
		}
	}
	return nil
}

var legacyPages []byte

// legacyBuffer returns memory that is there already, as a reader keeps it.
func legacyBuffer(size int) ([]byte, error) {
	if len(legacyPages) < size {
		b, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
		if err != nil {
			return nil, err
		}
		legacyPages = b
	}
	return legacyPages[:size], nil
}

func getsockopt(fd, option int, b []byte) error {
	size := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_IP, uintptr(option),
		uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return fmt.Errorf("getsockopt %d: %w", option, errno)
	}
	return nil
}

// dumper asks nf_tables for lists of IPv4.
type dumper struct {
	fd  int
	buf []byte
}

func newDumper() (*dumper, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	return &dumper{fd, make([]byte, 32<<10)}, nil
}

// dump asks for a list, and calls each, if there is one, with every message.
func (d *dumper) dump(kind int, attrs []byte, each func(attrs []byte)) error {
	native := binary.NativeEndian
	b := native.AppendUint32(nil, uint32(20+len(attrs)))
	b = native.AppendUint16(b, uint16(unix.NFNL_SUBSYS_NFTABLES<<8|kind))
	b = native.AppendUint16(b, unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	b = append(b, 1, 0, 0, 0, 0, 0, 0, 0, unix.NFPROTO_IPV4, 0, 0, 0)
	if _, err := unix.Write(d.fd, append(b, attrs...)); err != nil {
		return err
	}
	for {
		n, err := unix.Read(d.fd, d.buf)
		if err != nil {
			return err
		}
		for part := d.buf[:n]; len(part) >= 20; {
			size := int(native.Uint32(part))
			switch native.Uint16(part[4:]) {
			case unix.NLMSG_DONE:
				return nil
			case unix.NLMSG_ERROR:
				return syscall.Errno(-int32(native.Uint32(part[16:])))
			}
			if each != nil {
				each(part[20:size])
			}
			part = part[min((size+3)&^3, len(part)):]
		}
	}
}

// bareLooks returns the part of a core that a thread takes that asks for the
// generation of nf_tables seven times a second, as the agent does, and sleeps in between.
func bareLooks(d time.Duration) (float64, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	k, err := newDumper()
	if err != nil {
		return 0, err
	}
	defer unix.Close(k.fd)
	native := binary.NativeEndian
	ask := native.AppendUint32(nil, 20)
	ask = native.AppendUint16(ask, unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETGEN)
	ask = native.AppendUint16(ask, unix.NLM_F_REQUEST)
	ask = append(ask, 1, 0, 0, 0, 0, 0, 0, 0, unix.NFPROTO_UNSPEC, 0, 0, 0)
	nap := unix.NsecToTimespec(int64(140 * time.Millisecond))
	before, start := threadTime(), time.Now()
	for time.Since(start) < d {
		if err := unix.Nanosleep(&nap, nil); err != nil && !errors.Is(err, unix.EINTR) {
			return 0, err
		}
		if _, err := unix.Write(k.fd, ask); err != nil {
			return 0, err
		}
		if _, err := unix.Read(k.fd, k.buf); err != nil {
			return 0, err
		}
	}
	return float64(threadTime()-before) / float64(time.Since(start)), nil
}

// threadTime returns how long the calling thread has run on a processor.
func threadTime() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t)
	return time.Duration(t.Nano())
}

func attr(b []byte, kind uint16, name string) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(name)+1))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(append(b, name...), 0)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// find returns the text of an attribute.
func find(attrs []byte, kind uint16) string {
	for len(attrs) >= 4 {
		size := int(binary.NativeEndian.Uint16(attrs))
		if binary.NativeEndian.Uint16(attrs[2:]) == kind {
			return string(attrs[4 : size-1])
		}
		attrs = attrs[min((size+3)&^3, len(attrs)):]
	}
	return ""
}

// dumpChains dumps the rules of every chain of some tables.
func dumpChains(tables ...string) error {
	d, err := newDumper()
	if err != nil {
		return err
	}
	defer unix.Close(d.fd)
	var requests [][]byte
	err = d.dump(unix.NFT_MSG_GETCHAIN, nil, func(b []byte) {
		for _, t := range tables {
			if find(b, 1) == t {
				requests = append(requests, attr(attr(nil, 1, t), 2, find(b, 3)))
			}
		}
	})
	for _, r := range requests {
		err = errors.Join(err, d.dump(unix.NFT_MSG_GETRULE, r, nil))
	}
	return err
}

// dumpSets dumps the rules of a table, and the elements of every set.
func dumpSets(table string) error {
	d, err := newDumper()
	if err != nil {
		return err
	}
	defer unix.Close(d.fd)
	var requests [][]byte
	err = errors.Join(
		d.dump(unix.NFT_MSG_GETRULE, attr(nil, 1, table), nil),
		d.dump(unix.NFT_MSG_GETSET, attr(nil, 1, table), func(b []byte) {
			requests = append(requests, attr(attr(nil, 1, table), 2, find(b, 2)))
		}))
	for _, r := range requests {
		err = errors.Join(err, d.dump(unix.NFT_MSG_GETSETELEM, r, nil))
	}
	return err
}
