// Image packs the static programs of natlens into OCI image archives, without
// docker, a registry or a base image:
//
//		go run . -version v1.2.3 DIRECTORY
//
//	 1. The directory holds DIRECTORY/amd64/agent, DIRECTORY/arm64/echo and so on,
//	    as make image builds them. What a program was built for is in
//	    it, and is checked.
//	 2. An image is one layer with one file, and its configuration (image.go).
//	 3. An archive is an OCI image layout in a tar file (archive.go): agent.tar for
//	    all platforms, agent-amd64.tar for one, which older versions of docker load
//	    as well.
//	 4. Beside each stands what the program is made of, as a CycloneDX document:
//	    agent-amd64.cdx.json (sbom.go).
//
// The same programs give the same bytes, whenever and wherever they are packed.
package main
