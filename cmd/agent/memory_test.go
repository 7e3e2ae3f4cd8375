package main

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// Memory is given back once after the start and once after each burst of changes,
// and not while they go on.
func TestGiveBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var changes, freed atomic.Uint64
		ctx, stop := context.WithCancel(t.Context())
		go giveBack(ctx, changes.Load, func() { freed.Add(1) })
		want := func(when string, n uint64) {
			t.Helper()
			synctest.Wait()
			if got := freed.Load(); got != n {
				t.Errorf("%s: given back %d times, want %d", when, got, n)
			}
		}
		time.Sleep(stillFor*stillLook - time.Second)
		want("at the start", 0)
		time.Sleep(2 * time.Second)
		want("a while after it", 1)
		for range 100 {
			changes.Add(1)
			time.Sleep(stillFor * stillLook / 2)
		}
		want("while rules change", 1)
		time.Sleep(time.Hour)
		want("when they have stopped", 2)
		stop()
		synctest.Wait()
	})
}
