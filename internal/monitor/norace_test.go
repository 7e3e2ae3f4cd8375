//go:build !race

package monitor

const slowdown = 1
