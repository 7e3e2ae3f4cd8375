package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// platforms are the directories of programs, by their GOARCH. All are for linux.
var platforms = []string{"amd64", "arm64"}

func main() {
	var of source
	flag.StringVar(&of.version, "version", "dev", "version of the source")
	flag.StringVar(&of.revision, "revision", "", "commit of the source, if there is one")
	created := flag.Int64("created", 0, "time of the source in seconds since 1970: a time of packing could not be repeated")
	flag.Parse()
	of.created = time.Unix(*created, 0).UTC()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "image: want one directory; see -h")
		os.Exit(2)
	}
	for _, p := range programs {
		if err := pack(flag.Arg(0), p, of, os.Stdout); err != nil {
			fmt.Fprintf(os.Stderr, "image: packing %s: %v\n", p.name, err)
			os.Exit(1)
		}
	}
}

// pack writes the archives and SBOMs of one program into the directory that
// holds it, and prints a line for each.
func pack(dir string, p program, of source, out io.Writer) error {
	var images []v1.Image
	for _, arch := range platforms {
		bin, err := readBinary(filepath.Join(dir, arch, p.name), arch, of)
		if err != nil {
			return err
		}
		if err := writeSBOM(filepath.Join(dir, p.name+"-"+arch+".cdx.json"), bin); err != nil {
			return err
		}
		img, err := newImage(p, bin)
		if err != nil {
			return err
		}
		index, err := newIndex(img)
		if err != nil {
			return err
		}
		file := filepath.Join(dir, p.name+"-"+arch+".tar")
		if err := writeArchive(file, p.reference(), index, img); err != nil {
			return err
		}
		images = append(images, img)
	}
	index, err := newIndex(images...)
	if err != nil {
		return err
	}
	file := filepath.Join(dir, p.name+".tar")
	if err := writeArchive(file, p.reference(), index); err != nil {
		return err
	}
	digest, err := index.Digest()
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%s  %s@%s\n", file, p.reference(), digest)
	return nil
}
