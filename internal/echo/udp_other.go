//go:build !linux

package echo

import (
	"net"
	"net/netip"
)

// controlSpace is not needed where nothing is asked for.
const controlSpace = 0

// receiveDestination does nothing: the cluster runs Linux, and elsewhere the
// server is for trying things out on one address.
func receiveDestination(*net.UDPConn) error { return nil }

// destination returns bound and lets the kernel choose the source.
func destination(_ []byte, bound netip.AddrPort) (netip.AddrPort, []byte) { return bound, nil }
