package main

import (
	"context"
	"fmt"
	"net"
	"strings"
	"time"
)

// plain is the Service that is broken.
const plain = "faults/plain"

var faultList = []fault{
	{
		what: "an endpoint's DNAT deleted by hand",
		breaks: func(_ *faultBench, h hand) ([]want, error) {
			if h.nftables() {
				s, err := h.nftPlain()
				if err != nil {
					return nil, err
				}
				return []want{{"FallThrough", plain, ""}, {"EndpointMissing", plain, endpointOf(s.dnats[0].text)}}, h.nftDelete(s.dnats[0])
			}
			s, err := h.iptablesPlain()
			if err != nil {
				return nil, err
			}
			return []want{{"EndpointBroken", plain, ""}, {"EndpointMissing", plain, endpointOf(s.dnats[0])}}, h.change(s.dnats[0], "-D")
		},
	},
	{
		what: "an endpoint taken out of the Service's chain",
		breaks: func(_ *faultBench, h hand) ([]want, error) {
			if h.nftables() {
				s, err := h.nftPlain()
				if err != nil {
					return nil, err
				}
				return []want{{"EndpointMissing", plain, endpointOf(s.dnats[0].text)}, {"SharesUneven", plain, ""}},
					h.nftReplace(s.dispatch, strings.Replace(s.dispatch.text, s.endpoints[0], s.endpoints[1], 1))
			}
			s, err := h.iptablesPlain()
			if err != nil {
				return nil, err
			}
			return []want{{"EndpointMissing", plain, endpointOf(s.dnats[1])}, {"SharesUneven", plain, ""}}, h.change(s.dispatches[1], "-D")
		},
	},
	{
		what: "a foreign RETURN in the Service's chain",
		also: []string{"FallThrough", "EndpointMissing", "VerdictMismatch"}, // what it does
		breaks: func(_ *faultBench, h hand) ([]want, error) {
			wants := []want{{"ForeignRule", plain, ""}}
			if h.nftables() {
				s, err := h.nftPlain()
				if err != nil {
					return nil, err
				}
				_, err = h.sh("nft insert rule ip kube-proxy '%s' ip saddr 10.52.0.0/16 return", s.chain)
				return wants, err
			}
			s, err := h.iptablesPlain()
			if err != nil {
				return nil, err
			}
			return wants, h.change("-A "+s.chain+" -s 10.52.0.0/16 -j RETURN", "-I")
		},
	},
	{
		what: "a foreign DNAT of the ClusterIP in PREROUTING",
		breaks: func(f *faultBench, h hand) ([]want, error) {
			ip, err := f.clusterIP(h, plain)
			if err != nil {
				return nil, err
			}
			if h.nftables() {
				_, err := h.sh(`nft 'insert rule ip kube-proxy nat-prerouting ip daddr %s tcp dport 80 dnat to 192.0.2.10:9'`, ip)
				return []want{{"ForeignRule", plain, ""}}, err
			}
			return []want{{"ForeignRule", plain, ""}}, h.change("-A PREROUTING -d "+ip+"/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 192.0.2.10:9", "-I")
		},
		mends: func(f *faultBench, h hand) error {
			if h.nftables() {
				r, err := h.nftRules("nat-prerouting", "192.0.2.10:9")
				if err != nil {
					return err
				}
				return h.nftDelete(r[0])
			}
			rules, err := h.rules(`^-A PREROUTING .* --to-destination 192.0.2.10:9$`)
			if err != nil {
				return err
			}
			return h.change(rules[0], "-D")
		},
	},
	{
		what: "the jump from PREROUTING deleted",
		breaks: func(_ *faultBench, h hand) ([]want, error) {
			wants := []want{{"HookJumpMissing", "", "PREROUTING"}}
			if h.nftables() {
				r, err := h.nftRules("nat-prerouting", "jump services")
				if err != nil {
					return nil, err
				}
				return wants, h.nftDelete(r[0])
			}
			rules, err := h.rules(`^-A PREROUTING .*-j KUBE-SERVICES$`)
			if err != nil {
				return nil, err
			}
			return wants, h.change(rules[0], "-D")
		},
	},
	{
		what: "table nat flushed",
		breaks: func(_ *faultBench, h hand) ([]want, error) {
			wants := []want{{"ServiceMissing", plain, ""}, {"ServiceMissing", "faults/sticky", ""}, {"ServiceMissing", "default/kubernetes", ""}}
			if h.nftables() {
				_, err := h.sh("nft flush table ip kube-proxy")
				return wants, err
			}
			_, err := h.sh("%s -t nat -F", h.iptables())
			return append(wants, want{"RulesMissing", "", "KUBE-SERVICES"}), err
		},
		also: []string{"ServiceMissing", "FrontendMissing", "HookJumpMissing", "RulesMissing", "MasqueradeMissing", "ProxyModeUnsupported", "VerdictMismatch", "FallThrough"},
	},
	{
		what: "a second backend populated",
		breaks: func(f *faultBench, h hand) ([]want, error) {
			from := hand{h.ctx, f.Nodes[0]}
			if h.node == f.Nodes[0] {
				from = hand{h.ctx, f.Nodes[2]}
			}
			// nfacct's counters would have to be made as well.
			dump, err := from.sh("%s-save -t nat | grep -v -- '-m nfacct'", from.iptables())
			if err != nil {
				return nil, err
			}
			// Not into a file: the node's files are not this machine's.
			_, err = h.sh("%s-restore --noflush <<'END'\n%sEND", h.otherBackend(), dump)
			return []want{{"BackendConflict", "", ""}}, err
		},
		mends: func(f *faultBench, h hand) error {
			_, err := h.sh("%[1]s -t nat -F; %[1]s -t nat -X", h.otherBackend())
			return err
		},
		also: []string{"UnknownMatch"}, // nobody knows which backend is asked first
	},
	{
		what: "a probability edited",
		breaks: func(_ *faultBench, h hand) ([]want, error) {
			wants := []want{{"SharesUneven", plain, ""}}
			if h.nftables() {
				s, err := h.nftPlain()
				if err != nil {
					return nil, err
				}
				return wants, h.nftReplace(s.dispatch, fmt.Sprintf("numgen random mod 4 vmap { 0 : goto %[1]s, 1 : goto %[1]s, 2 : goto %[2]s, 3 : goto %[3]s }", s.endpoints[0], s.endpoints[1], s.endpoints[2]))
			}
			s, err := h.iptablesPlain()
			if err != nil {
				return nil, err
			}
			i := strings.Index(s.dispatches[0], "--probability ")
			_, rest, _ := strings.Cut(s.dispatches[0][i+len("--probability "):], " ")
			_, err = h.sh(`n=$(%[1]s -t nat -S %[2]s | grep '^-A' | grep -n -- '-j KUBE-SEP' | head -1 | cut -d: -f1); %[1]s -t nat -R %[2]s $n %[3]s`,
				h.iptables(), s.chain, strings.TrimPrefix(s.dispatches[0][:i], "-A "+s.chain+" ")+"--probability 0.9 "+rest)
			return wants, err
		},
	},
	{
		what: "the rule of the Service's ClusterIP deleted",
		breaks: func(f *faultBench, h hand) ([]want, error) {
			ip, err := f.clusterIP(h, plain)
			if err != nil {
				return nil, err
			}
			wants := []want{{"FrontendMissing", plain, ip}}
			if h.nftables() {
				_, err := h.sh("nft 'delete element ip kube-proxy service-ips { %s . tcp . 80 }'", ip)
				return wants, err
			}
			s, err := h.iptablesPlain()
			if err != nil {
				return nil, err
			}
			return wants, h.change(s.frontend, "-D")
		},
	},
	{
		what: "an endpoint that accepts no connection",
		breaks: func(f *faultBench, h hand) ([]want, error) {
			return []want{{"EndpointUnreachable", "faults/hole", deadAddress + ":8080"}}, f.hole(h, deadAddress)
		},
		mends: func(f *faultBench, h hand) error {
			_, err := f.Kubectl(h.ctx, "-n", "faults", "delete", "endpointslice", "hole", "--ignore-not-found")
			return err
		},
		// Three connections, of those that chance sends there, one in four, ten seconds
		// apart: half a minute is mostly enough, but not always.
		takes: time.Minute,
	},
	{
		what: "a UDP flow left on a pod that is gone",
		breaks: func(f *faultBench, h hand) ([]want, error) {
			return []want{{"ConntrackStale", "faults/datagram", goneAddress + ":8080"}}, f.leaveFlow(h)
		},
		mends: func(f *faultBench, h hand) error {
			f.sending()
			_, err := h.sh("conntrack -D -p udp --reply-src %s", goneAddress)
			return err
		},
		// Conntrack is looked at every 10 s: for a flow's beginning, then for a packet
		// after the grace period.
		takes: 3 * refresh,
	},
}

// otherBackend is the iptables that is not the node's.
func (h hand) otherBackend() string {
	if h.iptables() == "iptables-legacy" {
		return "iptables-nft"
	}
	return "iptables-legacy"
}

func (f *faultBench) clusterIP(h hand, service string) (string, error) {
	namespace, name, _ := strings.Cut(service, "/")
	out, err := f.Kubectl(h.ctx, "-n", namespace, "get", "service", name, "-o", "jsonpath={.spec.clusterIP}")
	return string(out), err
}

// deadAddress is that of no pod, in the range of the first node.
const deadAddress = "10.52.1.250"

// hole gives the Service hole the pods of web as endpoints, and another address.
func (f *faultBench) hole(h hand, other string) error {
	pods, err := f.Pods(h.ctx, "faults", "app=web")
	if err != nil {
		return err
	}
	endpoints := []string{"{addresses: [" + other + "]}"}
	for _, p := range pods {
		endpoints = append(endpoints, "{addresses: ["+p.IP+"]}")
	}
	return f.apply(h.ctx, fmt.Sprintf(`
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {namespace: faults, name: hole, labels: {kubernetes.io/service-name: hole}}
addressType: IPv4
ports: [{name: "", port: 8080}]
endpoints: [%s]
`, strings.Join(endpoints, ", ")))
}

// goneAddress was a pod's on a node that is no more.
const goneAddress = "10.52.9.250"

// leaveFlow makes a UDP client on the node whose flow through the ClusterIP goes to
// goneAddress: as if that had been an endpoint when the flow began. The client
// sends until f.sending is called.
func (f *faultBench) leaveFlow(h hand) error {
	ip, err := f.clusterIP(h, "faults/datagram")
	if err != nil {
		return err
	}
	client, err := f.dialUDP(h, ip+":8080")
	if err != nil {
		return err
	}
	_, port, _ := net.SplitHostPort(client.LocalAddr().String())
	if h.nftables() {
		_, err = h.sh("nft 'insert rule ip kube-proxy nat-output ip daddr %s udp sport %s udp dport 8080 dnat to %s:8080'", ip, port, goneAddress)
	} else {
		err = h.change("-A OUTPUT -d "+ip+"/32 -p udp -m udp --sport "+port+" --dport 8080 -j DNAT --to-destination "+goneAddress+":8080", "-I")
	}
	if err != nil {
		return err
	}
	_, _ = client.Write([]byte("x")) // an answer that nobody is there comes later
	if h.nftables() {
		r, err := h.nftRules("nat-output", goneAddress)
		if err != nil {
			return err
		}
		return h.nftDelete(r[0])
	}
	rules, err := h.rules("^-A OUTPUT .*" + goneAddress + ":8080$")
	if err != nil {
		return err
	}
	return h.change(rules[0], "-D")
}

// dialUDP returns a client on the node that sends once a second until f.sending is
// called.
func (f *faultBench) dialUDP(h hand, address string) (net.Conn, error) {
	client, err := h.node.Dial(h.ctx, "udp", address)
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(h.ctx)
	before := f.sending
	f.sending = func() {
		before()
		stop()
	}
	go func() {
		defer client.Close()
		for pause(ctx, time.Second); ctx.Err() == nil; pause(ctx, time.Second) {
			_, _ = client.Write([]byte("x"))
		}
	}()
	return client, nil
}
