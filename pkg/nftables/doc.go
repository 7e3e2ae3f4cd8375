// Package nftables turns kube-proxy's nftables mode into the model of package
// netfilter, and rules of that model back into nft's own language.
//
// The way of the data:
//
//	nft -j list ruleset ──Parse──▶ netfilter.Ruleset ──RuleText──▶ text as nft prints it
//	this node's kernel ──Live.Read (netlink)──▶ netfilter.Ruleset
//
// kube-proxy writes tables of its own, "ip kube-proxy" and "ip6 kube-proxy",
// in a layout that changed with v1.30, v1.33, v1.36 and v1.37. Parse knows
// nft's language as far as any of them uses it, not the layouts: what is
// in the tables is for the walk to find out. An expression that it does not
// know is kept as [netfilter.Unknown] with its JSON text.
//
// Tables that iptables-nft wrote are left out: nft does not print what is in
// their matches and targets. Package iptables reads those.
package nftables
