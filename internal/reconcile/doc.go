// Package reconcile tells where the rules of a node and the Kubernetes API
// disagree.
//
//	desired.View ──┐
//	               ├─ Compare ──▶ Differences ── Tracker ──▶ Findings, latencies
//	Programmed ────┘                             (grace)
//
// [Compare] is a pure function of one moment. kube-proxy needs time to follow
// the API, so that most differences are gone in a second: a [Tracker] keeps them
// for a grace period before they count, and measures how long those took that
// went away.
//
// What the rules alone explain is not said again: where a rule of somebody
// else's decides, or the kernel never asks kube-proxy's rules, package chain has
// a finding, and the comparison leaves those connections out.
package reconcile
