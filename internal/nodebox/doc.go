// Package nodebox makes a Kubernetes-like node in a box: a node, its pods and
// a client outside the cluster, each in a private, anonymous Linux network
// namespace, so that real rules can meet real connections without touching
// the machine they run on.
//
//  1. [New] makes the namespaces and joins them: every pod to the node, the
//     node to the outside.
//  2. [Box.Restore] loads rules into the node, as kube-proxy would.
//  3. [Namespace.Listen] and [Namespace.Dial] make ordinary Go sockets that
//     live inside; [Namespace.Do] and [Namespace.Run] bring in a function or a
//     program.
//  4. [Box.Close] lets everything vanish.
//
// It works as root, and as the root of a user namespace. It has no names
// under /run/netns and mounts nothing.
//
// The network is plain routing:
//
//	pod eth0 ── veth0 ┐
//	pod eth0 ── veth1 ┤ node eth0 ── eth0 outside
//	pod eth0 ── veth2 ┘
//
// There is no bridge. Pods on one bridge answer each other on layer 2, past
// the node's netfilter, which then cannot undo the DNAT of a ClusterIP (unless
// br_netfilter is loaded, a setting of the whole machine). With one veth per
// pod, and only host routes, every packet between two pods, or from a pod back
// to itself, is forwarded by the node.
//
// The package is for Linux; elsewhere it is empty.
package nodebox
