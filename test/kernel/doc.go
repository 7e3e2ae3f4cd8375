// Package kernel holds natlens against a real kernel: it has only tests.
//
//  1. A node in a box gets rules as kube-proxy writes them, some of them broken
//     on purpose.
//  2. natlens reads them back, with the programs and the code that the agent
//     uses, and works out where connections go.
//  3. Thousands of real connections are made, from a pod, from the node and from
//     outside, and who answered, and what the server saw of the client, is
//     compared with what was worked out; so are the counters of the rules.
//
// A test draws samples, so it can fail by chance. A sample that is less likely
// than 1 in 2,000 is followed by a second, independent one, and only when both
// are that unlikely does the test fail: by chance, that happens to one comparison
// in four million. There are some 1,000, so that one run in 4,000 fails for
// nothing. An answer that natlens holds to be impossible fails at once.
package kernel
