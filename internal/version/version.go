// Package version says which build of natlens a program is.
package version

import "runtime/debug"

// version is set by the release build:
// -ldflags "-X github.com/natlens/natlens/internal/version.version=v1.2.3".
var version string

// Text returns that version, else the one that the go command recorded in the
// binary, else "(devel)".
func Text() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
