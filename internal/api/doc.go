// Package api defines the JSON documents that the agent serves and the command
// line prints, and makes them from a snapshot. Their field names are what users
// script against: add, but never rename.
package api
