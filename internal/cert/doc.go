// Package cert gives the network listener its certificate: one from files, which
// whoever renews them may replace at any time, or one made at start.
package cert
