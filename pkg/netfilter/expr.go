package netfilter

// Kind tells what an [Expr] does, and so what its fields mean. The comment of
// each kind names them; "text" means that [Chain.Text] returns the options as
// iptables-save prints them.
type Kind uint8

// Matches. A rule goes on to its next expression only when the match holds.
const (
	// Source and Destination compare an address: A and B are address and mask
	// of IPv4, or A is the index of a pair that [Chain.Prefix] returns.
	Source Kind = iota + 1
	Destination
	// InInterface and OutInterface compare an interface name (text); a
	// trailing "+" makes it a prefix.
	InInterface
	OutInterface
	// ProtocolIs compares the transport protocol, A.
	ProtocolIs
	// Fragment holds for the second and later fragments of a datagram only.
	Fragment
	// SourcePort and DestinationPort compare a port with the range A to B.
	SourcePort
	DestinationPort
	// TCPFlags compares the TCP flags: those in A must be exactly those in B.
	TCPFlags
	// Multiport compares ports with a list (text); N is one of the Multiport
	// constants.
	Multiport
	// AddrRange compares an address with a range (text, "from-to"); N is 0 for
	// the source and 1 for the destination.
	AddrRange
	// Random holds for A of every 2^31 packets that reach it
	// (struct xt_statistic_info, mode random).
	Random
	// Nth holds for one of every A packets that reach it, the B-th, counted
	// over all connections.
	Nth
	// SourceType and DestinationType compare the routing type of an address:
	// A has bit n set for the kernel's RTN type n; see [AddrLocal].
	SourceType
	DestinationType
	// MarkIs and ConnMarkIs compare the packet's or the connection's mark:
	// mark & B == A.
	MarkIs
	ConnMarkIs
	// CTState compares the conntrack state: A holds one of the CT bits per
	// accepted state; N is 1 when the rule says it with the old match "state".
	CTState
	// BridgePort holds for a packet that came in through a port of a bridge
	// (physdev --physdev-is-in), which br_netfilter alone makes visible.
	BridgePort
	// Recent is a look into, or an entry in, a list of recent source addresses
	// (text); N holds Recent bits. Not inverts what the match says.
	Recent
	// InSet holds when the fields N of the packet are in the set with the number
	// A; see [Table.Set].
	InSet
	// Comment is a note (text). It always holds.
	Comment
	// Always is a match that holds for every packet asked about here: nfacct,
	// "-m tcp" without options behind "-p tcp", and rpfilter, since a packet
	// that comes in on the wrong interface belongs to no Service's traffic
	// (text, with "-m" and the name).
	Always
	// Unknown is a match that this program cannot decide (text, with "-m" and
	// the name).
	Unknown
)

// Statements. They act on the packet, and the walk goes on behind the rule.
const (
	// SetMark and SetConnMark write a mark: mark = mark &^ B ^ A.
	SetMark Kind = iota + 64
	SetConnMark
	// SaveMark writes the packet's mark to the connection, RestoreMark the
	// other way: A is the mask of the packet's mark, B that of the connection's.
	SaveMark
	RestoreMark
	// NoTrack takes the packet out of conntrack, and so out of nat (text:
	// target and options).
	NoTrack
	// NoEffect is a target that changes nothing a Service depends on, such as
	// LOG (text: target and options).
	NoEffect
)

// Verdicts. They end the walk of their rule's chain, or of the hook.
const (
	// Jump and Goto enter another chain: A is its [ChainID]. What falls off the
	// end of the target comes back behind a jump, but skips the rest of the
	// goto's own chain.
	Jump Kind = iota + 128
	Goto
	Return
	Accept
	Drop
	// Queue hands the packet to a program (text: target and options).
	Queue
	// Reject answers with an error (text: options).
	Reject
	// DNAT rewrites the destination to one address: [Chain.Target] returns it.
	DNAT
	// DNATRange rewrites the destination to one of several (text: options).
	DNATRange
	// Redirect rewrites the destination to an address of the node itself
	// (text: options); N is the port, 0 when it stays.
	Redirect
	// SNAT and Masquerade rewrite the source (text: options).
	SNAT
	Masquerade
	// VerdictMap does what the map with the number A says for the fields N of the
	// packet; without an element, the rule does not match.
	VerdictMap
	// Choose draws a number from 0 to B-1 and does what stands for it; see
	// [Chain.Choices]. For a number without a choice, the rule does not match.
	Choose
	// UnknownTarget is a target that this program does not know (text: target
	// and options): it may end the walk or not.
	UnknownTarget
)

// Bits of Expr.Flags.
const (
	// Not inverts a match ("!").
	Not = 1 << iota
	// Joined means that the options belong to the same "-m" as those of the
	// expression before: a printer does not write the module's name again.
	Joined
)

// Values of Expr.N for [Multiport].
const (
	MultiportSource = iota
	MultiportDestination
	MultiportEither
)

// AddrLocal is the bit of RTN_LOCAL in a SourceType or DestinationType
// (enum rtn_type in linux/rtnetlink.h, counted as xt_addrtype does).
const AddrLocal = 1 << 2

// Conntrack states, as bits of Expr.A for [CTState]. DNATed and SNATed are
// states for iptables, though conntrack keeps them as a status. The order is
// the one in which iptables prints them.
const (
	CTInvalid = 1 << iota
	CTNew
	CTRelated
	CTEstablished
	CTUntracked
	CTSNATed
	CTDNATed
)

// Bits of Expr.N for [Recent]: what the match does with the list.
const (
	RecentSet = 1 << iota
	RecentCheck
	RecentUpdate
	RecentRemove
)

// Expr is one expression of a rule: a match, a statement or a verdict. The
// meaning of N, A and B depends on the Kind.
type Expr struct {
	Kind  Kind
	Flags uint8
	N     uint16
	A, B  uint32
}

// Negated reports whether the match is inverted.
func (e Expr) Negated() bool { return e.Flags&Not != 0 }

// IsMatch reports whether the expression is a match, not a target.
func (e Expr) IsMatch() bool { return e.Kind < SetMark }

// HasText reports whether the expression has a text, which [Chain.Text] returns.
func (e Expr) HasText() bool { return hasText(e.Kind) }
