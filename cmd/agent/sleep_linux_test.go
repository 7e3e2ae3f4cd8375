package main

import (
	"testing"
	"time"
)

// It waits for as long as it should, time after time, and other goroutines go on.
func TestSleep(t *testing.T) {
	sleep, _ := newSleep()
	if sleep == nil {
		t.Fatal("the kernel refuses a timer")
	}
	ticks := time.NewTicker(time.Millisecond)
	defer ticks.Stop()
	for _, d := range []time.Duration{0, 20 * time.Millisecond, time.Millisecond, 50 * time.Millisecond} {
		start := time.Now()
		sleep(d)
		if took := time.Since(start); took < d {
			t.Errorf("a sleep of %v took %v", d, took)
		}
	}
	select {
	case <-ticks.C:
	default:
		t.Error("no other timer has fired in 71 ms")
	}
}

// Another goroutine ends it.
func TestSleepEnded(t *testing.T) {
	sleep, wake := newSleep()
	over := make(chan struct{})
	go func() {
		sleep(time.Hour)
		close(over)
	}()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for giveUp := time.After(time.Minute); ; {
		wake() // the first may come too early
		select {
		case <-over:
			return
		case <-giveUp:
			t.Fatal("the sleep goes on")
		case <-tick.C:
		}
	}
}
