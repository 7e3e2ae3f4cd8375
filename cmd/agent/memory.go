package main

import (
	"context"
	"time"
)

// When the rules have stood for long, the readings that follow a change are over,
// and so is what they needed. The runtime would keep that memory for the next.
const (
	stillLook = 10 * time.Second
	stillFor  = 5 // looks
)

// giveBack calls free once after each time that changes goes up, when it has stood
// still for a while: on a node whose rules keep changing never.
func giveBack(ctx context.Context, changes func() uint64, free func()) {
	tick := time.NewTicker(stillLook)
	defer tick.Stop()
	last, still := changes(), 0
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if now := changes(); now != last {
			last, still = now, 0
			continue
		}
		if still++; still == stillFor {
			free()
		}
	}
}
