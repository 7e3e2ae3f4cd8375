// Package monitor watches what traffic does: it connects to marked Services as a
// process of this node, again and again, and holds who answers against the shares
// that the rules give.
//
//	See (each reading of the rules) ──▶ watch, one per ClusterIP and port ──▶ State ──▶ snapshot
//	                                      ▲
//	Run ──▶ probe ──▶ sample ─────────────┘
//
// A probe is a new connection to a ClusterIP. Who answered is told by the echo
// server; where nobody did, by conntrack: the rules have chosen by then. Which
// rules a connection met is known only afterwards. So a sample waits until a later
// reading has found the same route, and is dropped where it has not.
//
// A watch counts samples in windows, asks a [Test] whether they are as programmed,
// and counts failures in a row per endpoint. A [State] never changes once it is made.
package monitor
