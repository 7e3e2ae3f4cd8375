// Package kubeproxy writes the netfilter rules that kube-proxy v1.35 writes in
// iptables mode, as input for iptables-restore or ip6tables-restore.
//
// It exists so that demonstrations, benchmarks and kernel tests can have the
// rules of any number of Services without a cluster. What it writes goes
// through three steps:
//
//  1. The caller describes Service ports (Service, or Synthetic for a made-up
//     cluster) with the endpoints that kube-proxy would have selected.
//     Selecting them from API objects (readiness, topology, terminating
//     fallback) is not done here.
//  2. Write derives from each Service port which chains exist: KUBE-SVC and
//     KUBE-SVL for the two traffic policies, KUBE-EXT for what comes from
//     outside, KUBE-FW for source ranges, KUBE-SEP per endpoint, or only a
//     REJECT or DROP in the filter table.
//  3. The tables are printed in the order and the normal form of iptables-save:
//     chains sorted, addresses with their prefix length, probabilities as the
//     kernel holds them. A reader therefore sees what a node prints, and
//     printing the rules again after loading them changes nothing.
//
// The output contains the built-in chains and all jumps from them, so it makes
// up a whole node's tables when it is loaded without --noflush. It replaces
// what was there: load it in a private network namespace.
//
// The form is that of pkg/proxy/iptables/proxier.go in kube-proxy v1.35; the
// tests hold it against rules recorded from a real one. The differences are
// deliberate and few:
//
//   - Services keep the order in which they are given, where kube-proxy has the
//     order of a Go map.
//   - The local detector is a pod CIDR or none; kube-proxy's detection by
//     bridge or interface name is not offered.
//   - The nfacct matches are left out unless asked for: they need objects in
//     the kernel which must exist before the rules are loaded.
//   - Chains are declared sorted, as iptables-save prints them, unless
//     Config.SyncOrder asks for kube-proxy's order.
//   - All counters are zero.
package kubeproxy
