// Package doctor compares what two readers tell of the same rules.
//
//	direct ─ruleset─┐
//	                ├─▶ Compare ──▶ Report: tables, differences, what was not decoded
//	other  ─ruleset─┘
//
// The other reader runs iptables-save and nft, or is the parser on what the
// printer made of a dump. Where two ways of reading that share no code agree,
// rule by rule, neither has misread anything.
package doctor
