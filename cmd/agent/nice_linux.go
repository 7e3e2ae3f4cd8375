package main

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// niceness of the agent: where processors are short, kube-proxy and the node's pods
// get ten times the time that it gets.
const niceness = 10

// giveWay makes the process nice. In Linux that is a matter of each thread, and one
// that begins is as nice as the one that began it.
func giveWay() error {
	const none = 20 // what getpriority(2) returns for niceness 0
	for again := true; again; {
		again = false
		threads, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return err
		}
		for _, t := range threads {
			id, err := strconv.Atoi(t.Name())
			if err != nil {
				continue
			}
			now, err := unix.Getpriority(unix.PRIO_PROCESS, id)
			if err != nil || now <= none-niceness {
				continue // it has ended, or is nice
			}
			if err := unix.Setpriority(unix.PRIO_PROCESS, id, niceness); err != nil {
				return os.NewSyscallError("setpriority", err)
			}
			again = true // it may have begun others meanwhile
		}
	}
	return nil
}
