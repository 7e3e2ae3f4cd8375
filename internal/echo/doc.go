// Package echo is the server whose load-balancing natlens watches: it tells
// every caller which replica answered, over HTTP and over UDP.
//
// The way of one answer:
//
//  1. [Identity] says who this replica is. It comes from the host and the
//     downward API ([HostIdentity]) or is fixed by a caller that runs several
//     replicas in one process.
//  2. A request arrives at the handler ([NewHandler]) or at the datagram loop
//     ([ServeUDP]), which add the two ends of the connection as the server
//     sees them.
//  3. [Answer] is the result, one document for both protocols. The plain text
//     of GET / is a second printing of the same document.
//
// [Run] wires both protocols on sockets that are already open, and stops them
// in the order that loses no request: readiness first, then the drain delay,
// then the requests in flight.
//
// A probe that counts answers per replica relies on two properties that are
// easy to lose. A connection carries one answer only, since a connection that
// is kept alive stays with the replica it was first sent to. And a datagram is
// answered from the address that it was sent to, since connection tracking and
// connected sockets drop an answer from any other.
package echo
