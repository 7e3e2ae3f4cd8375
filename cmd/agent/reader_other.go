//go:build !linux

package main

import (
	"time"

	"github.com/natlens/natlens/internal/observed"
	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/iptables"
)

// newReader returns the only reader that there is elsewhere than on Linux,
// which finds no program there and says so.
func newReader(string) (snapshot.Reader, error) { return iptables.NewExec() }

// newFlowReader returns nil: there are no tracked connections elsewhere.
func newFlowReader() snapshot.FlowReader { return nil }

// newSleep returns nil: only who reads Linux's kernel wakes up so often.
func newSleep() (sleep func(time.Duration), wake func()) { return nil, nil }

// giveWay does nothing: the agent runs on nodes, which run Linux.
func giveWay() error { return nil }

// newPinReader returns nil: session affinity binds nobody elsewhere.
func newPinReader() observed.PinReader { return nil }
