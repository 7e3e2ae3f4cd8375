#!/usr/bin/env bash
# Builds the images again, in a copy of the tree under another path and with an
# empty build cache, and compares every byte with those in bin/image.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
tar -c --exclude=./bin . | tar -x -C "$copy"
GOCACHE="$copy/.cache" make -s -C "$copy" image VERSION="$1" >/dev/null

for file in bin/image/*.tar bin/image/*.json; do
	cmp "$file" "$copy/$file"
	sha256sum "$file"
done
echo "reproducible: the second build gave the same bytes"
