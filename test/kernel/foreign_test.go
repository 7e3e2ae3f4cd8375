//go:build linux

package kernel

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/internal/nodebox"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
)

// first puts a rule in front of all others of its table, which it adds if need
// be. A chain that the rule jumps to, named OWN, stays empty.
func first(rules, table, rule string) string {
	own := ""
	if strings.Contains(rule, " OWN") {
		own = ":OWN - [0:0]\n"
	}
	before, after, ok := strings.Cut(rules, "*"+table+"\n")
	if !ok {
		return rules + "*" + table + "\n" + own + rule + "\nCOMMIT\n"
	}
	i := strings.Index(after, "COMMIT\n")
	if j := strings.Index(after, "-A "); j >= 0 && j < i {
		i = j
	}
	return before + "*" + table + "\n" + after[:i] + own + rule + "\n" + after[i:]
}

// without removes the only line that begins so.
func without(t *testing.T, rules, prefix string) string {
	t.Helper()
	lines := strings.SplitAfter(rules, "\n")
	i := slices.IndexFunc(lines, func(line string) bool { return strings.HasPrefix(line, prefix) })
	if i < 0 || strings.Count(rules, "\n"+prefix) != 1 {
		t.Fatalf("%d lines begin with %q", strings.Count(rules, "\n"+prefix), prefix)
	}
	return strings.Join(slices.Delete(lines, i, i+1), "")
}

func replace(t *testing.T, rules, old, by string) string {
	t.Helper()
	if !strings.Contains(rules, old) {
		t.Fatalf("no %q in the rules", old)
	}
	return strings.ReplaceAll(rules, old, by)
}

// TestForeign puts rules beside those of kube-proxy, or takes some of those
// away, and compares each client's trace with what it meets.
func TestForeign(t *testing.T) {
	for _, in := range []struct {
		backend nodebox.Backend
		family  kubeproxy.Family
	}{{nodebox.NFT, kubeproxy.IPv4}, {nodebox.Legacy, kubeproxy.IPv6}} {
		t.Run(fmt.Sprintf("%s/%s", in.backend, in.family), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, in.backend, in.family)
			app := w.plan.services()[0]
			rules := write(t, w.config(), []kubeproxy.Service{app})
			svc := chain.ServiceChain("KUBE-SVC-", chain.ServicePort{Namespace: app.Namespace, Name: app.Name, Protocol: netfilter.TCP})
			to := fmt.Sprintf("-d %s -p tcp -m tcp --dport %d ", app.ClusterIP, app.PortNumber)
			beyond := fmt.Sprintf("-s %s ", w.beyond)
			pod1 := netip.AddrPortFrom(w.pods[1], podPort)
			for _, c := range []struct {
				name  string
				rules string
			}{
				{"DNAT first", first(rules, "nat", "-A PREROUTING "+to+"-j DNAT --to-destination "+pod1.String())},
				{"DNAT of the port alone", first(first(rules, "nat", "-A PREROUTING -p tcp -m tcp --dport 30001 -j DNAT --to-destination :9000"), "nat", "-A OUTPUT -p tcp -m tcp --dport 30001 -j DNAT --to-destination :9000")},
				{"half of the connections elsewhere", first(rules, "nat", "-A PREROUTING "+to+"-m statistic --mode random --probability 0.5 -j DNAT --to-destination "+pod1.String())},
				{"all but a quarter elsewhere", first(rules, "nat", "-A PREROUTING "+to+"-m statistic --mode random ! --probability 0.25 -j DNAT --to-destination "+pod1.String())},
				{"accepted by nat", first(rules, "nat", "-A PREROUTING "+beyond+"-j ACCEPT")},
				{"returned by nat", first(rules, "nat", "-A PREROUTING "+beyond+"-j RETURN")},
				{"goto", first(rules, "nat", "-A PREROUTING "+beyond+"-g OWN")},
				{"jump", first(rules, "nat", "-A PREROUTING "+beyond+"-j OWN")},
				{"no jump from OUTPUT", without(t, rules, "-A OUTPUT -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES")},
				{"no jump from POSTROUTING", without(t, rules, "-A POSTROUTING ")},
				{"no mark", without(t, rules, "-A KUBE-MARK-MASQ ")},
				{"marked by mangle", first(rules, "mangle", "-A PREROUTING -j MARK --set-xmark 0x4000/0x4000")},
				{"marked by the connection", first(first(rules, "mangle", "-A FORWARD -j CONNMARK --restore-mark --nfmask 0x4000 --ctmask 0x4000"), "mangle", "-A PREROUTING -j CONNMARK --set-xmark 0x4000/0x4000")},
				{"mark taken away", first(rules, "mangle", "-A FORWARD -j MARK --set-xmark 0x0/0x4000")},
				{"source rewritten", first(rules, "nat", "-A POSTROUTING -d "+w.podCIDR.String()+" -j SNAT --to-source "+w.node2.String())},
				{"not tracked", first(rules, "raw", "-A PREROUTING "+to+"-j CT --notrack")},
				{"one pod refused", first(rules, "filter", fmt.Sprintf("-A FORWARD -d %s -p tcp -j REJECT --reject-with tcp-reset", w.pods[1]))},
				{"one pod dropped", first(rules, "filter", fmt.Sprintf("-A FORWARD -d %s -j DROP", w.pods[1]))},
				{"one pod dropped on the way out", first(rules, "mangle", fmt.Sprintf("-A POSTROUTING -d %s -j DROP", w.pods[1]))},
				{"clients dropped before nat", first(rules, "mangle", "-A PREROUTING "+beyond+"-j DROP")},
				{"what nat rewrote", first(rules, "filter", "-A FORWARD -m conntrack --ctstate DNAT -p tcp -j REJECT --reject-with tcp-reset")},
				{"what nat did not rewrite", first(rules, "filter", "-A FORWARD -m conntrack --ctstate NEW -m conntrack ! --ctstate DNAT -j DROP")},
				{"forwarding forbidden by policy", replace(t, rules, ":FORWARD ACCEPT", ":FORWARD DROP")},
				{"several ports", first(rules, "nat", fmt.Sprintf("-A PREROUTING -d %s -p tcp -m multiport --dports 79:81,443 -j DNAT --to-destination %s", app.ClusterIP, pod1))},
				{"a range of sources", first(rules, "nat", fmt.Sprintf("-A PREROUTING -m iprange --src-range %s-%s -j ACCEPT", w.inside, w.beyond))},
				{"not a source", first(rules, "nat", fmt.Sprintf("-A PREROUTING ! -s %s %s-j DNAT --to-destination %s", w.podCIDR, to, pod1))},
				{"no SYN", first(rules, "filter", "-A FORWARD -p tcp -m tcp ! --tcp-flags SYN,RST,ACK SYN -j ACCEPT")},
				{"SYN dropped", first(rules, "filter", "-A FORWARD "+beyond+"-p tcp -m tcp --tcp-flags SYN,RST,ACK SYN -j DROP")},
				{"each in turn", replace(t, replace(t, rules, "--mode random --probability 0.33333333349", "--mode nth --every 3 --packet 0"), "--mode random --probability 0.50000000000", "--mode nth --every 2 --packet 0")},
				{"a source of the node itself", first(rules, "nat", "-A OUTPUT -m addrtype --src-type LOCAL "+to+"-j DNAT --to-destination "+pod1.String())},
				{"a chance within the Service", first(rules, "nat", "-A "+svc+" -p tcp -m statistic --mode random --probability 0.25 -j DNAT --to-destination "+pod1.String())},
			} {
				t.Run(c.name, func(t *testing.T) {
					w.load(t, c.rules)
					defer w.waiting.Wait()
					for _, typ := range []chain.FrontendType{chain.ClusterIP, chain.NodePort} {
						for _, from := range []client{w.pod(), w.host(), w.outside(w.beyond)} {
							if cell := w.cell(t, app.Name, typ, from); typ == chain.ClusterIP || from.class == chain.External {
								w.compare(t, cell, w.byTrace(t, cell), 1)
							}
						}
					}
				})
			}
		})
	}
}

// routeLocalnet sets the sysctl of that name for all links.
func (w *world) routeLocalnet(t *testing.T, value string) {
	t.Helper()
	err := w.box.Node.Do(func() error {
		files, err := filepath.Glob("/proc/sys/net/ipv4/conf/*/route_localnet")
		for _, f := range files {
			err = errors.Join(err, os.WriteFile(f, []byte(value), 0))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestConfigs compares under other settings of kube-proxy and the node.
func TestConfigs(t *testing.T) {
	for _, in := range []struct {
		backend nodebox.Backend
		family  kubeproxy.Family
	}{{nodebox.NFT, kubeproxy.IPv4}, {nodebox.NFT, kubeproxy.IPv6}, {nodebox.Legacy, kubeproxy.IPv4}} {
		t.Run(fmt.Sprintf("%s/%s", in.backend, in.family), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, in.backend, in.family)
			usual := w.config()
			everywhere, listed, local, large, mark := usual, usual, usual, usual, usual
			everywhere.MasqueradeAll = true
			listed.NodePortAddresses = []netip.Addr{w.node2}
			local.NoLocalhostNodePorts = true
			large.LargeClusterThreshold = 1
			mark.MasqueradeMark = 1 << 31
			noDetector := usual
			noDetector.PodCIDR = netip.Prefix{}
			for _, c := range []struct {
				name         string
				cfg          kubeproxy.Config
				podCIDRs     []netip.Prefix
				routeLocal   string
				hasLocalhost bool
			}{
				{"masquerade all", everywhere, []netip.Prefix{w.podCIDR}, // no rule tells pods apart
					"1", true},
				{"listed node addresses", listed, nil, "1", false},
				{"not on localhost", local, nil, "1", false},
				{"without comments", large, nil, "1", true},
				{"another mark", mark, nil, "1", true},
				{"no pod range", noDetector, []netip.Prefix{w.podCIDR}, "1", true},
				{"route_localnet off", usual, nil, "0", false},
			} {
				t.Run(c.name, func(t *testing.T) {
					w.podCIDRs = c.podCIDRs
					w.routeLocalnet(t, c.routeLocal)
					services := slices.DeleteFunc(w.plan.services(), func(s kubeproxy.Service) bool {
						return !slices.Contains([]string{"go-app", "local", "empty", "host"}, s.Name)
					})
					w.load(t, write(t, c.cfg, services))
					defer w.waiting.Wait()
					for i := range w.services {
						s := &w.services[i]
						for _, f := range s.Frontends {
							for _, from := range []client{w.pod(), w.host(), w.outside(w.inside)} {
								cell := w.cellAt(s.ServicePort, f, from)
								if f.Type != chain.NodePort {
									w.check(t, cell, 1)
									continue
								}
								// A route speaks of the addresses that answer.
								if len(f.Accepted) > 0 {
									w.compare(t, cell, w.byTrace(t, cell), 1)
									cell.to = netip.AddrPortFrom(f.Accepted[0], f.Port)
								}
								w.check(t, cell, 1)
							}
							if f.Type != chain.NodePort || s.Name != "go-app" {
								continue
							}
							cell := w.cellAt(s.ServicePort, f, w.host())
							cell.to = netip.AddrPortFrom(w.loopback(), f.Port)
							want := w.byTrace(t, cell)
							w.compare(t, cell, want, 1)
							answered := len(want) == 3
							if answered != (c.hasLocalhost && w.family == kubeproxy.IPv4) {
								t.Errorf("%s: natlens says\n%s", cell, want)
							}
						}
					}
				})
			}
		})
	}
}

// TestBothBackends loads different Services into both backends at the same
// address. The kernel asks the one first whose nat table came last, which is not
// to be seen from the rules, so natlens must say that there is a conflict; and it
// must not lose a Service that stands in one of them alone.
func TestBothBackends(t *testing.T) {
	for _, order := range [][2]nodebox.Backend{{nodebox.NFT, nodebox.Legacy}, {nodebox.Legacy, nodebox.NFT}} {
		t.Run(fmt.Sprintf("%s, then %s", order[0], order[1]), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, order[0], kubeproxy.IPv4)
			list := w.plan.services()
			stale, fresh, only := list[2], list[0], list[1]
			stale.ClusterIP, stale.PortNumber, stale.NodePort = fresh.ClusterIP, fresh.PortNumber, 0
			stale.Endpoints = []kubeproxy.Endpoint{{Addr: netip.AddrPortFrom(w.pods[4], podPort)}}
			w.load(t, write(t, w.config(), []kubeproxy.Service{stale, only}))
			w.backend = order[1]
			w.load(t, write(t, w.config(), []kubeproxy.Service{fresh}))

			found := slices.ContainsFunc(w.view.Services().Findings, func(f chain.Finding) bool {
				return f.Code == chain.BackendConflict && f.Severity == chain.Error
			})
			if !found {
				t.Errorf("no conflict found: %v", w.view.Services().Findings)
			}
			w.check(t, w.cell(t, only.Name, chain.ClusterIP, w.pod()), 1)

			to := netip.AddrPortFrom(fresh.ClusterIP, fresh.PortNumber)
			for range 10 {
				o, err := w.connect(t.Context(), w.pod(), netfilter.TCP, to, patience)
				if err != nil || !slices.ContainsFunc(fresh.Endpoints, func(e kubeproxy.Endpoint) bool { return e.Addr == o.pod }) {
					t.Errorf("%s: %s, %v; want an endpoint of the rules that came last", to, o, err)
				}
			}
		})
	}
}
