// Package access answers who may read this agent over the network, as the
// Kubernetes API server decides.
//
//  1. A caller brings a bearer token. A TokenReview says whose it is.
//  2. A SubjectAccessReview says whether that user may "get" /metrics, or
//     the path below /natlens, as a nonResourceURL of a ClusterRole.
//  3. Both answers are remembered for a while, a yes apart from a no, in a bounded
//     number. So a scrape costs the API server next to nothing, a caller with
//     many wrong tokens pushes no good one out, and callers whom it let in lately
//     keep reading while it is down.
//
// Nothing is guessed: an API server that cannot be asked lets nobody new in.
package access
