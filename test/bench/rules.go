//go:build linux

package main

import (
	"bytes"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/internal/nodebox"
)

// changedService is the Service that the rows about a change change.
const changedService = 7

// rules are a ruleset in which one Service takes turns between two states.
type rules struct {
	load    []string  // the program that loads, and its input
	input   string    //
	change  []string  // the program that changes the Service
	changes [2]string // its inputs: away, and back
	chain   string    // of that Service
}

// iptablesRules are those of kube-proxy's iptables mode.
func iptablesRules(program string, services, endpoints int) (*rules, error) {
	list := kubeproxy.Synthetic(services, endpoints)
	before, err := written(list)
	if err != nil {
		return nil, err
	}
	list[changedService].Endpoints = list[changedService].Endpoints[:1]
	list[changedService].Endpoints[0].Addr = netip.MustParseAddrPort("10.255.7.7:8080")
	after, err := written(list)
	if err != nil {
		return nil, err
	}
	r := &rules{load: []string{program}, input: before, change: []string{program, "--noflush"}}
	r.changes[0], r.chain = difference(before, after)
	r.changes[1], _ = difference(after, before)
	if r.chain == "" {
		return nil, fmt.Errorf("no chain of Service %d", changedService)
	}
	return r, nil
}

func written(list []kubeproxy.Service) (string, error) {
	var b bytes.Buffer
	cfg := kubeproxy.Config{PodCIDR: kubeproxy.SyntheticPodCIDR, NodeIP: kubeproxy.SyntheticNodeIP, SyncOrder: true}
	err := kubeproxy.Write(&b, cfg, list)
	return b.String(), err
}

// difference is what kube-proxy's partial sync writes in table nat to get from
// one dump to the other: the chains that differ, and KUBE-SERVICES always. It
// returns the name of the Service's chain, too.
func difference(before, after string) (input, service string) {
	old, now := chains(before), chains(after)
	var head, body, tail strings.Builder
	head.WriteString("*nat\n")
	for name, lines := range now {
		if name != "KUBE-SERVICES" && lines == old[name] {
			continue
		}
		fmt.Fprintf(&head, ":%s - [0:0]\n", name)
		body.WriteString(lines)
		if strings.HasPrefix(name, "KUBE-SVC-") {
			service = name
		}
	}
	for name := range old {
		if _, ok := now[name]; !ok {
			fmt.Fprintf(&head, ":%s - [0:0]\n", name)
			fmt.Fprintf(&tail, "-X %s\n", name)
		}
	}
	return head.String() + body.String() + tail.String() + "COMMIT\n", service
}

// chains are the rules of each of kube-proxy's chains in table nat.
func chains(dump string) map[string]string {
	out := map[string]string{}
	nat := false
	for line := range strings.Lines(dump) {
		switch {
		case line[0] == '*':
			nat = line == "*nat\n"
		case !nat:
		case strings.HasPrefix(line, ":KUBE-"):
			name, _, _ := strings.Cut(line[1:], " ")
			out[name] += ""
		case strings.HasPrefix(line, "-A KUBE-"):
			name, _, _ := strings.Cut(line[3:], " ")
			out[name] += line
		}
	}
	return out
}

// nftRules are plain Services in the layout of kube-proxy v1.37's nftables mode:
// a chain for each, with an anonymous map of its endpoints.
func nftRules(services, endpoints int) *rules {
	r := &rules{load: []string{"nft", "-f", "-"}, change: []string{"nft", "-f", "-"}}
	var s, elements, ips strings.Builder
	s.WriteString("add table ip kube-proxy\nadd set ip kube-proxy cluster-ips { type ipv4_addr ; }\n" +
		"add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict ; }\n" +
		"add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority -100 ; }\n" +
		"add chain ip kube-proxy nat-output { type nat hook output priority -100 ; }\nadd chain ip kube-proxy services\n" +
		"add rule ip kube-proxy nat-prerouting jump services\nadd rule ip kube-proxy nat-output jump services\n" +
		"add rule ip kube-proxy services ip daddr @cluster-ips ip saddr != 10.0.0.0/8 mark set mark or 0x4000\n" +
		"add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips\n")
	rule := func(i, from, to int) string {
		var b strings.Builder
		fmt.Fprintf(&b, "add rule ip kube-proxy %s meta l4proto tcp dnat ip addr . port to numgen random mod %d map {", nftChain(i), to-from)
		for j := from; j < to; j++ {
			n := i*endpoints + j
			fmt.Fprintf(&b, "%s %d : 10.%d.%d.%d . 8080", map[bool]string{true: ","}[j > from], j-from, n>>16, n>>8&255, n&255)
		}
		b.WriteString(" }\n")
		return b.String()
	}
	for i := range services {
		ip := fmt.Sprintf("172.%d.%d.%d", 16+i/62500, i/250%250, i%250+1)
		fmt.Fprintf(&s, "add chain ip kube-proxy %s\n%s", nftChain(i), rule(i, 0, endpoints))
		fmt.Fprintf(&elements, "%s . tcp . 80 comment \"team/svc%d:p80\" : goto %s,\n", ip, i, nftChain(i))
		fmt.Fprintf(&ips, "%s,\n", ip)
	}
	fmt.Fprintf(&s, "add element ip kube-proxy service-ips { %s }\nadd element ip kube-proxy cluster-ips { %s }\n", &elements, &ips)
	r.input = s.String()
	flush := fmt.Sprintf("flush chain ip kube-proxy %s\n", nftChain(changedService))
	r.changes = [2]string{flush + rule(changedService, 1, endpoints), flush + rule(changedService, 0, endpoints)}
	return r
}

func nftChain(i int) string { return fmt.Sprintf("service-%08X-team/svc%d/tcp/p80", i, i) }

// feed runs a program in the node with an input.
func feed(b *nodebox.Box, input string, args []string) error {
	var errs bytes.Buffer
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin, cmd.Stderr = strings.NewReader(input), &errs
	if err := b.Node.Run(cmd); err != nil {
		return fmt.Errorf("%v: %w: %s", args, err, &errs)
	}
	return nil
}
