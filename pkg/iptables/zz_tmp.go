//go:build linux

package iptables

import ("context";"github.com/natlens/natlens/pkg/netfilter")

func (l *Legacy) Refresh(ctx context.Context) (*netfilter.Ruleset, error) { return l.Read(ctx) }
