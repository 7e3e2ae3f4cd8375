// Package snapshot keeps the agent's view of the node.
//
//	Reader ──rules──▶ Build ──▶ *Snapshot ──▶ Keeper (one atomic pointer) ──▶ JSON, metrics, page, text
//	                              ▲
//	API (compare.go) ─────────────┤
//	Flows, pins (observe.go) ─────┤
//	Echo (echo.go) ───────────────┘
//
// A Snapshot never changes once it is made, and every output prints the same
// one, so that a page, a scrape and a curl never disagree. When a reading
// fails, the last good one stays and is marked stale.
package snapshot
