package chain

import (
	"slices"
	"strings"
)

// Interfaces by which another program that handles Services is known, where it
// keeps no chains, or others keep chains of the same names.
const (
	linkIPVS       = "kube-ipvs0"    // kube-proxy's ipvs mode keeps the Services' addresses on it
	linkCilium     = "cilium_host"   // Cilium's way into the node
	linkCalico     = "bpfin.cali"    // made by Calico's eBPF dataplane alone
	linkKubeRouter = "kube-dummy-if" // kube-router's, as kube-ipvs0
	linkOVN        = "ovn-k8s-mp0"   // OVN-Kubernetes' management port
	linkAntrea     = "antrea-gw0"    // Antrea's gateway
)

// TellingLinks are the names of interfaces that tell which program handles
// Services, sorted. Others come and go with pods and tell nothing.
var TellingLinks = []string{linkAntrea, linkCalico, linkCilium, linkKubeRouter, linkIPVS, linkOVN}

// nothing says why no Service was found, as far as the rules and the interfaces
// tell.
func (f *finder) nothing() {
	has := func(match func(name string) bool) bool {
		for _, t := range f.view.rules.Tables {
			for c := range t.Chains() {
				if match(c.Name) {
					return true
				}
			}
		}
		return false
	}
	prefix := func(p string) bool {
		return has(func(name string) bool { return strings.HasPrefix(name, p) })
	}
	named := func(n string) bool { return has(func(name string) bool { return name == n }) }
	link := f.view.node.hasLink
	switch {
	case named("KUBE-NODE-PORT"), link(linkIPVS):
		f.add(ProxyModeUnsupported, Warning, nil, "kube-proxy runs in ipvs mode: the kernel's IPVS balances Services, and the shares are not in netfilter (see ipvsadm -Ln)")
	case prefix("CILIUM_"), link(linkCilium):
		f.add(ProxyModeUnsupported, Warning, nil, "Cilium handles Services in eBPF: the shares are not in netfilter (see cilium-dbg service list)")
	case prefix("OVN-KUBE-"), link(linkOVN):
		f.add(ProxyModeUnsupported, Warning, nil, "OVN-Kubernetes handles Services in OVN load balancers: the shares are not in netfilter (see ovn-nbctl lb-list)")
	case link(linkCalico):
		f.add(ProxyModeUnsupported, Warning, nil, "Calico handles Services in eBPF: the shares are not in netfilter (see calico-node -bpf nat dump)")
	case link(linkKubeRouter):
		f.add(ProxyModeUnsupported, Warning, nil, "kube-router handles Services in IPVS: the shares are not in netfilter (see ipvsadm -Ln)")
	case (prefix("ANTREA-") || link(linkAntrea)) && !named("KUBE-SERVICES"):
		f.add(ProxyModeUnsupported, Warning, nil, "Antrea handles Services in Open vSwitch: the shares are not in netfilter (see antctl get ovsflows)")
	case named("KUBE-SERVICES"), slices.ContainsFunc(f.view.rules.Tables, isNFTables):
		f.add(ProxyModeUnsupported, Error, nil, "kube-proxy's chains are there, but hold no Service: it has not finished its first sync, cannot reach the API server, or its rules were flushed; or no Service has an address of this family")
	case prefix("cali-"):
		f.add(ProxyModeUnsupported, Warning, nil, "no chain of kube-proxy is there: with Calico, the eBPF dataplane probably handles Services")
	case prefix("KUBE-ROUTER-"):
		f.add(ProxyModeUnsupported, Warning, nil, "no chain of kube-proxy is there: with kube-router, IPVS probably handles Services (see ipvsadm -Ln)")
	case prefix("KUBE-"):
		f.add(ProxyModeUnsupported, Error, nil, "only kubelet's chains are there: kube-proxy is not running, writes to the other iptables backend or in nftables mode, or something else handles Services")
	default:
		f.add(ProxyModeUnsupported, Error, nil, "no chain of Kubernetes is there: no kube-proxy writes to these tables, or this is not the network namespace of the node")
	}
}

// besides says which program may handle connections to Services before these
// rules are asked.
func (f *finder) besides() {
	chains := func(names ...string) bool {
		for _, t := range f.view.rules.Tables {
			if slices.ContainsFunc(names, func(n string) bool { return t.Lookup(n) != nil }) {
				return true
			}
		}
		return false
	}
	switch link := f.view.node.hasLink; {
	case link(linkCilium), chains("CILIUM_FORWARD", "CILIUM_PRE_nat", "CILIUM_POST_nat", "CILIUM_PRE_raw"):
		f.add(ProxyModeUnsupported, Info, nil, "Cilium is on this node too: connections that its eBPF programs balance, such as those of pods, never come to these rules (see cilium-dbg status)")
	case link(linkCalico):
		f.add(ProxyModeUnsupported, Info, nil, "Calico's eBPF dataplane is on this node too: connections that it balances never come to these rules (see calico-node -bpf nat dump)")
	}
}
