// Package observed tells what traffic was seen to do, beside what the rules make
// of it.
//
//	rules with counters ── Counter ──▶ Connections: new connections per Service port and endpoint
//	conntrack's flows ──── Watch ────▶ Flows: live ones, and those that an endpoint outlived
//	affinity lists ─────── Pinner ───▶ Pins: clients that are bound to an endpoint
//
// Nothing is sampled or sent. Nat is asked about the first packet of a
// connection only, so that what the rule that rewrites the destination has
// counted is connections.
//
// What these return does not change, so that a snapshot can hold it. All of it
// is told per Service port and endpoint, whichever frontend a connection came to.
package observed
