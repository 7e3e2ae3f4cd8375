// Package demo is a node in a box to try natlens on: real kernel rules, exactly
// as kube-proxy writes them, echo servers that really listen on the pod
// addresses, and steady light traffic through the Services.
//
//  1. Services says what the node is to serve, and Rules what kube-proxy would
//     write for it, with one Service broken on purpose.
//  2. Start makes private network namespaces, loads the rules and starts the
//     pods. Traffic then connects to the Services, and counts who answered.
//  3. Reader and Node let the agent read that node instead of the host.
//
// Nothing of it is visible on the host, and all of it ends with the process.
package demo
