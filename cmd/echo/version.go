package main

import "runtime/debug"

// version is set by the release build: -ldflags "-X main.version=v1.2.3".
var version string

// buildVersion returns that version, else the one that the go command recorded
// in the binary, else "(devel)".
func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
