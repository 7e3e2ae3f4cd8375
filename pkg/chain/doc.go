// Package chain walks packets through a ruleset, and tells what becomes of
// every Service.
//
// The way of the data:
//
//  1. NewView prepares a ruleset: base chains by hook and priority, an index
//     for long chains, what short ones come to that only send to one address
//     (leaf.go), and an address that stands for each source class.
//  2. A run (walk.go) sends the first packet of a connection through the hooks
//     as the kernel does: raw, then nat until one chain has decided on an
//     address, then the filters on the rewritten packet, then nat for the
//     source. A statistic rule splits the packet's share (share.go); what a
//     chain does not take goes on in its caller. Behind nat, what rules cannot
//     tell apart takes one exit (exit.go).
//  3. A match that cannot be decided (match.go) is tried both ways: the walk is
//     repeated for each combination, and the answer has bounds.
//  4. Trace shows one packet with every rule on its way (trace.go). Services
//     finds the frontends in kube-proxy's dispatch chains, walks to each from
//     each source class and from each source range that a rule on the way asks
//     for, and sums up routes (services.go).
//  5. Findings (findings.go, kubechains.go) judge what was seen.
//
// The walk never looks at a chain's name to decide what happens: names and
// comments only label the result.
package chain
