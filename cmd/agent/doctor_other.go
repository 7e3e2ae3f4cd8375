//go:build !linux

package main

import (
	"context"
	"runtime"

	"github.com/natlens/natlens/internal/doctor"
)

func examineNode(context.Context) *doctor.Report {
	return &doctor.Report{Problems: []string{"there is no netfilter on " + runtime.GOOS + ": examine a dump with -f"}}
}
