// Package kube brings up a real Kubernetes of several nodes on one machine: real
// kernel rules, written by real kube-proxies of several versions and modes, and
// real pods.
//
//  1. [Up] builds the programs of Kubernetes from their Go module, once
//     (binaries.go); the others are Debian's.
//  2. It makes boxes: private namespaces for the network, the processes and what
//     is mounted (box.go), and joins them (network.go).
//  3. control runs etcd, the API server and its controllers (control.go); each
//     node containerd, a kubelet (node.go) and kube-proxy (proxy.go).
//  4. [Down] takes it all down, and needs no record of it (down.go).
//
// Everything is routed. outside is a client that belongs to no node:
//
//	outside 192.0.2.10 ── 192.0.2.1 control 10.146.0.1 ──┬── 10.146.0.2 node1 ── pods 10.52.1.0/24
//	                                                     ├── 10.146.0.3 node2 ── pods 10.52.2.0/24
//	                                                     └── 10.146.0.4 node3 ── pods 10.52.3.0/24
//
// Nothing of it is on this machine's own network or among its mounts, so that
// several clusters can have the same addresses beside each other.
package kube
