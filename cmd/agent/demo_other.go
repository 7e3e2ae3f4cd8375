//go:build !linux

package main

import (
	"errors"

	"github.com/spf13/cobra"
)

func newDemo() *cobra.Command {
	return &cobra.Command{
		Use: "demo", Short: "A node in a box (on Linux only)", Args: exactly(0, 0, "no argument"),
		RunE: func(*cobra.Command, []string) error {
			return errors.New("the demo needs the network namespaces of a Linux kernel")
		},
	}
}
