// Package conntrack reads connections that the kernel tracks: all whose destination
// nat has rewritten, or a single one.
//
//	Reader ──one netlink dump──▶ decode ──▶ Flow, one after the other
//	Get, Listener.Find ────────▶ decode ──▶ the Flow of one connection
//
// A table may hold a million connections. The kernel leaves out those without
// DNAT where it can (Linux 5.15), nothing is kept of a flow once it has been told
// of, and reading makes no garbage per flow. The kernel walks its whole table for a dump: how
// often that may be is the caller's to bound.
//
// It only asks: nothing is created, changed or deleted. It needs the capability
// NET_ADMIN.
package conntrack
