package echo

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
)

// Identity says who a replica is. The zero value is legal and answers with
// empty fields.
type Identity struct {
	Hostname  string
	Pod       string // empty outside Kubernetes, as are Namespace and Node
	Namespace string
	Node      string

	// Addresses returns the replica's addresses of all families. It is asked
	// for every answer, because a pod can gain an address after its start, and
	// must be safe for concurrent use. Nil means that there are none.
	Addresses func() []netip.Addr
}

// FixedAddresses returns an [Identity.Addresses] that always gives addrs.
func FixedAddresses(addrs ...netip.Addr) func() []netip.Addr {
	addrs = slices.Clone(addrs)
	return func() []netip.Addr { return slices.Clone(addrs) }
}

// HostIdentity returns the identity of the host that the process runs on:
// hostname and interface addresses from the kernel, the rest from the variables
// POD_NAME, POD_NAMESPACE and NODE_NAME, which getenv looks up. An error means
// that the hostname could not be read. Interfaces that cannot be read later are
// reported to log; the answer then has no addresses but still says which pod
// gave it.
func HostIdentity(getenv func(string) string, log *slog.Logger) (Identity, error) {
	hostname, err := os.Hostname()
	if err != nil {
		return Identity{}, fmt.Errorf("reading the hostname: %w", err)
	}
	return Identity{
		Hostname:  hostname,
		Pod:       getenv("POD_NAME"),
		Namespace: getenv("POD_NAMESPACE"),
		Node:      getenv("NODE_NAME"),
		Addresses: func() []netip.Addr {
			addrs, err := net.InterfaceAddrs()
			if err != nil {
				log.Warn("reading interface addresses", "err", err)
				return nil
			}
			return hostAddresses(addrs)
		},
	}, nil
}

// hostAddresses keeps what tells one host from another, in interface order.
// Loopback addresses are the same everywhere. IPv6 link-local ones mean nothing
// without an interface of the reader's own, and every interface has one.
func hostAddresses(addrs []net.Addr) []netip.Addr {
	var kept []netip.Addr
	for _, a := range addrs {
		ipNet, ok := a.(*net.IPNet)
		if !ok {
			continue
		}
		ip, ok := netip.AddrFromSlice(ipNet.IP)
		if !ok {
			continue
		}
		ip = ip.Unmap()
		if ip.IsLoopback() || (ip.Is6() && ip.IsLinkLocalUnicast()) || slices.Contains(kept, ip) {
			continue
		}
		kept = append(kept, ip)
	}
	return kept
}

// Answer is what the server says about itself and about the connection.
type Answer struct {
	Hostname  string       `json:"hostname"`
	Pod       string       `json:"pod"`
	Namespace string       `json:"namespace"`
	Node      string       `json:"node"`
	Addresses []netip.Addr `json:"addresses"` // never null in JSON

	// Local and Remote are the two ends as the server sees them, which is
	// after any address translation on the way: Local tells which address was
	// chosen, Remote shows whether the source was masqueraded. An end that is
	// not an IP socket is printed as "".
	Local  netip.AddrPort `json:"local"`
	Remote netip.AddrPort `json:"remote"`
}

// answer states id for one connection.
func (id Identity) answer(local, remote netip.AddrPort) Answer {
	addrs := []netip.Addr{}
	if id.Addresses != nil {
		addrs = append(addrs, id.Addresses()...)
	}
	return Answer{
		Hostname:  id.Hostname,
		Pod:       id.Pod,
		Namespace: id.Namespace,
		Node:      id.Node,
		Addresses: addrs,
		Local:     unmap(local),
		Remote:    unmap(remote),
	}
}

// text prints the IPv4 addresses, one a line; nothing on a host that has none.
func (a Answer) text() []byte {
	var b []byte
	for _, ip := range a.Addresses {
		if ip.Is4() {
			b = append(ip.AppendTo(b), '\n')
		}
	}
	return b
}

// json prints the whole document on one line.
func (a Answer) json() ([]byte, error) {
	b, err := json.Marshal(a)
	if err != nil {
		return nil, fmt.Errorf("encoding the answer: %w", err)
	}
	return append(b, '\n'), nil
}

// unmap turns the ::ffff:a.b.c.d that a dual-stack socket reports into the IPv4
// address that the peer used, so that answers compare equal to endpoints.
func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
