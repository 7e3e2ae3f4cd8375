package main

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/natlens/natlens/test/cluster/kube"
)

// hand edits the rules of one node as somebody with a shell would.
type hand struct {
	ctx  context.Context
	node *kube.Node
}

func (h hand) sh(format string, args ...any) (string, error) {
	out, err := h.node.Exec(h.ctx, "sh", "-ec", fmt.Sprintf(format, args...))
	return string(out), err
}

// nftables reports whether the node's kube-proxy is in nftables mode.
func (h hand) nftables() bool { return h.node.Proxy.Mode == kube.NFTables }

// iptables is the program of the node's backend.
func (h hand) iptables() string { return string(h.node.Proxy.Mode) }

// rules returns the rules of table nat that match, as iptables-save prints them.
func (h hand) rules(pattern string) ([]string, error) {
	out, err := h.sh("%s-save -t nat", h.iptables())
	if err != nil {
		return nil, err
	}
	found := regexp.MustCompile("(?m)"+pattern).FindAllString(out, -1)
	if len(found) == 0 {
		return nil, fmt.Errorf("%s has no rule %s", h.node.Name, pattern)
	}
	return found, nil
}

// change changes a rule "-A CHAIN …" of table nat: command is -D, -I or -R and
// what follows the chain.
func (h hand) change(rule, command string) error {
	chain, rest, _ := strings.Cut(strings.TrimPrefix(rule, "-A "), " ")
	verb, place, _ := strings.Cut(command, " ")
	_, err := h.sh("%s -t nat %s %s %s %s", h.iptables(), verb, chain, place, rest)
	return err
}

// iptablesService is what the rules of a Service are like in iptables mode.
type iptablesService struct {
	frontend   string   // the rule of its ClusterIP
	chain      string   // KUBE-SVC-…
	dispatches []string // its rules that jump to endpoints
	dnats      []string // the endpoints' rules, in the same order
}

// iptablesPlain reads those of the Service that is broken.
func (h hand) iptablesPlain() (s iptablesService, err error) {
	frontends, err := h.rules(`^-A KUBE-SERVICES .*"` + plain + ` cluster IP".* -j KUBE-SVC-.*$`)
	if err != nil {
		return s, err
	}
	s.frontend = frontends[0]
	s.chain = s.frontend[strings.LastIndex(s.frontend, " ")+1:]
	if s.dispatches, err = h.rules(`^-A ` + s.chain + ` .*-j KUBE-SEP-.*$`); err != nil {
		return s, err
	}
	for _, d := range s.dispatches {
		dnat, err := h.rules(`^-A ` + d[strings.LastIndex(d, " ")+1:] + ` .*-j DNAT .*$`)
		if err != nil {
			return s, err
		}
		s.dnats = append(s.dnats, dnat[0])
	}
	return s, nil
}

// endpoint is the address that an endpoint's rule sends to, in both modes.
func endpointOf(dnat string) string {
	_, address, _ := strings.Cut(dnat, "--to-destination ")
	if address == "" {
		_, address, _ = strings.Cut(dnat, " dnat to ")
	}
	address, _, _ = strings.Cut(strings.TrimSpace(address), " ")
	return address
}

// nftService is what the rules of a Service are like in nftables mode.
type nftService struct {
	chain     string
	dispatch  nftRule // numgen random mod N vmap { … }
	endpoints []string
	dnats     []nftRule // in the same order
}

// nftRule is a rule of kube-proxy's table that can be named.
type nftRule struct{ chain, text, handle string }

// nftRules returns the rules of a chain that match.
func (h hand) nftRules(chain, pattern string) ([]nftRule, error) {
	out, err := h.sh("nft -a list chain ip kube-proxy '%s'", chain)
	if err != nil {
		return nil, err
	}
	var rules []nftRule
	for _, line := range strings.Split(out, "\n") {
		text, handle, ok := strings.Cut(strings.TrimSpace(line), " # handle ")
		if ok && !strings.HasPrefix(text, "chain ") && regexp.MustCompile(pattern).MatchString(text) {
			rules = append(rules, nftRule{chain, text, handle})
		}
	}
	if len(rules) == 0 {
		return nil, fmt.Errorf("%s: chain %s has no rule %s", h.node.Name, chain, pattern)
	}
	return rules, nil
}

// nftPlain reads those of the Service that is broken.
func (h hand) nftPlain() (s nftService, err error) {
	out, err := h.sh("nft list chains ip")
	if err != nil {
		return s, err
	}
	s.chain = regexp.MustCompile(`service-[A-Z0-9]+-` + plain + `/tcp/\S*`).FindString(out)
	if s.chain == "" {
		return s, fmt.Errorf("%s: no chain of %s", h.node.Name, plain)
	}
	dispatch, err := h.nftRules(s.chain, `numgen random`)
	if err != nil {
		return s, err
	}
	s.dispatch = dispatch[0]
	for _, m := range regexp.MustCompile(`goto (endpoint-[^ ,]+)`).FindAllStringSubmatch(s.dispatch.text, -1) {
		dnat, err := h.nftRules(m[1], ` dnat to `)
		if err != nil {
			return s, err
		}
		s.endpoints, s.dnats = append(s.endpoints, m[1]), append(s.dnats, dnat[0])
	}
	if len(s.endpoints) < 3 {
		return s, errors.New(s.chain + " has too few endpoints")
	}
	return s, nil
}

func (h hand) nftDelete(r nftRule) error {
	_, err := h.sh("nft delete rule ip kube-proxy '%s' handle %s", r.chain, r.handle)
	return err
}

func (h hand) nftReplace(r nftRule, text string) error {
	_, err := h.sh("nft 'replace rule ip kube-proxy %s handle %s %s'", r.chain, r.handle, text)
	return err
}
