// Package desired tells what kube-proxy is to program on one node: the objects
// of the Kubernetes API, and what each release of kube-proxy makes of them.
//
//	Services, EndpointSlices, this Node ──▶ Objects ──▶ View: every Service port,
//	                                                    its frontends and their fates
//
// Objects keeps of each API object only what decides about rules. It is filled
// from files ([Objects.Load]) or by who watches the API. A [View] is made of it
// without I/O, does not change, and shares with the view before what stayed as
// it was.
//
// What is desired follows kube-proxy's own choice (CategorizeEndpoints in
// pkg/proxy/topology.go, newBaseServiceInfo in pkg/proxy/serviceport.go),
// including where releases differ, see [Release].
package desired
