// Package netfilter is the model of a node's packet filter that every reader
// fills and the walk evaluates. It does no I/O and knows nothing of Kubernetes.
//
// The way of the data:
//
//	dump or kernel ──reader──▶ Table ─┐
//	dump or kernel ──reader──▶ Table ─┼─▶ Ruleset ──▶ package chain
//	                                  ┘
//
// A [Ruleset] holds tables of both families and of every backend. A [Table]
// holds chains, a [Chain] holds rules, and a rule is a list of [Expr], as in
// nf_tables: matches that must all hold, then at most one target. An iptables
// rule and an nftables rule have the same shape here, so one walk serves both.
//
// A large node has hundreds of thousands of rules, so the model is also the
// agent's memory. An Expr is twelve bytes without a pointer; what does not fit
// stands in a pool of its chain and is read through an accessor such as
// [Chain.Text]. Chains are immutable once their table is published: a later
// snapshot may share those that did not change.
package netfilter
