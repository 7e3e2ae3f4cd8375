// Command bench measures what natlens costs on large rulesets, beside the tools
// that people use today.
//
//	internal/kubeproxy ─rules─▶ a private network namespace ◀─┬─ iptables-save, nft (a process each time)
//	                                                          └─ bench -child ROW (one process for each row)
//
// Every row is asked in turn, round after round, so that whatever else the
// machine does falls on all of them alike; the ratios are of the medians. Each
// row has a process of its own, whose largest memory is told beside it.
//
// With -agent, "agent serve" is measured as a whole, and with -beside next to a real
// kube-proxy with an API server.
//
// Run it as root, on an otherwise idle machine: make bench-scale.
package main
