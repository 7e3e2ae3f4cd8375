// Package iptables turns iptables rules into the model of package netfilter,
// and the model back into the text that iptables-save prints.
//
// The way of the data:
//
//	iptables-save text ──Parse──▶ netfilter.Ruleset ──AppendRule, Write──▶ text
//	this node's kernel ──Kernel.Read──▶ netfilter.Ruleset
//	                   (NFT: netlink; Legacy: getsockopt; no program is run)
//	this node's kernel ──Exec.Read (iptables-save -c)──▶ netfilter.Ruleset
//
// Parse understands what iptables-save and ip6tables-save print, with and
// without counters, and the lines of iptables -S. It never guesses: a match
// that it does not know is kept word for word as [netfilter.Unknown], and text
// that no iptables program prints is an error that names file and line. The readers of
// the kernel give what Parse makes of iptables-save's output, rule for rule.
package iptables
