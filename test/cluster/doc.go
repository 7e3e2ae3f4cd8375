// Cluster brings up a real Kubernetes of three nodes on one machine, as root:
//
//	go run . up
//	go run . kubectl get nodes
//	go run . down
//
// Package kube does it, and tells how. The flag -name makes clusters beside each
// other.
package main
