package main

import (
	"encoding/binary"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// newSleep returns a function that waits for so long, for one goroutine that wakes
// up many times a second, and one that ends the wait, for any other; a wait that is
// about to begin may miss it. Both are nil where the kernel refuses the timer that it
// takes.
//
// The runtime's own timers wake two threads each time, and so does a system call
// of which it is told after a rest: one of them watches. Here the thread that waits
// for the network wakes up alone, which takes less than half.
func newSleep() (sleep func(time.Duration), wake func()) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return nil, nil
	}
	timer := os.NewFile(uintptr(fd), "timerfd")
	conn, err := timer.SyscallConn()
	if err != nil {
		timer.Close()
		return nil, nil
	}
	set := func(d time.Duration) bool {
		once := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(max(d, 1)))} // 0 would disarm it
		_, _, errno := unix.RawSyscall6(unix.SYS_TIMERFD_SETTIME, uintptr(fd), 0, uintptr(unsafe.Pointer(&once)), 0, 0, 0)
		return errno == 0
	}
	sleep = func(d time.Duration) {
		if !set(d) {
			time.Sleep(d)
			return
		}
		err := conn.Read(func(fd uintptr) bool {
			var times [8]byte // the kernel tells how often it has expired
			_, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&times)), unsafe.Sizeof(times))
			return errno == 0 && binary.NativeEndian.Uint64(times[:]) > 0
		})
		if err != nil { // nobody may wake up the more often for it
			time.Sleep(d)
		}
	}
	return sleep, func() { set(0) }
}
