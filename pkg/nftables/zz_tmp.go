//go:build linux

package nftables

import ("context";"github.com/natlens/natlens/pkg/netfilter")

func (l *Live) Refresh(ctx context.Context) (*netfilter.Ruleset, error) { return l.Read(ctx) }
func (l *Live) Moved() bool { return false }
