//go:build race

package monitor

// slowdown is how many times as long the race detector lets arithmetic take, about.
const slowdown = 10
