package main

import (
	"os"
	"runtime"
	"strconv"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// All threads are nice, those that began before and those that begin now.
func TestGiveWay(t *testing.T) {
	if err := giveWay(); err != nil {
		t.Fatal(err)
	}
	var begun, ended sync.WaitGroup
	checked := make(chan struct{})
	for range 8 {
		begun.Add(1)
		ended.Go(func() {
			runtime.LockOSThread() // which each needs for itself then
			defer runtime.UnlockOSThread()
			begun.Done()
			<-checked
		})
	}
	begun.Wait()
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	if len(threads) < 8 {
		t.Errorf("%d threads, want 8 and more", len(threads))
	}
	for _, thread := range threads {
		id, err := strconv.Atoi(thread.Name())
		if err != nil {
			t.Fatal(err)
		}
		if got, err := unix.Getpriority(unix.PRIO_PROCESS, id); err == nil && got > 20-niceness {
			t.Errorf("thread %d has niceness %d, want %d", id, 20-got, niceness)
		}
	}
	close(checked)
	ended.Wait()
}
