// Package affinity tells how many clients session affinity binds to an endpoint
// now.
//
//	iptables: -m recent ──▶ /proc/thread-self/net/xt_recent/KUBE-SEP-… ──┐
//	nftables: update @affinity-… ──netlink──▶ elements of the set ───────┴─▶ List
//
// It only reads, and needs the capability NET_ADMIN for the sets alone.
package affinity

// List is what is known of one endpoint's clients.
type List struct {
	Clients int // that come back to it: those whose timeout has not passed
	// Full says that the kernel's list has no room: whoever comes next takes the
	// place of the client that came least lately, which then may go elsewhere.
	Full bool
}
