//go:build !linux

package monitor

import (
	"context"
	"errors"
	"net"
	"net/netip"
)

type dialed struct {
	net.Conn
	local, chosen netip.AddrPort
}

func dial(context.Context, netip.AddrPort, bool) (dialed, error) {
	return dialed{}, errors.ErrUnsupported
}

func chosen(_, _ netip.AddrPort) (netip.AddrPort, error) {
	return netip.AddrPort{}, errors.ErrUnsupported
}
