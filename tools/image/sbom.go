package main

import (
	"os"
	"time"

	cdx "github.com/CycloneDX/cyclonedx-go"
	"github.com/CycloneDX/cyclonedx-gomod/pkg/generate/bin"
	"github.com/rs/zerolog"
)

// writeSBOM writes the modules that a program is made of, from the build
// information in it, with the hashes of go.sum.
func writeSBOM(file string, b binary) error {
	generator, err := bin.NewGenerator(b.path, bin.WithIncludeStdlib(true), bin.WithVersionOverride(b.version), bin.WithLogger(zerolog.Nop()))
	if err != nil {
		return err
	}
	bom, err := generator.Generate()
	if err != nil {
		return err
	}
	bom.Metadata.Timestamp = b.created.Format(time.RFC3339)
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	defer out.Close() // a second Close fails, which does not matter
	if err := cdx.NewBOMEncoder(out, cdx.BOMFileFormatJSON).SetPretty(true).Encode(bom); err != nil {
		return err
	}
	return out.Close()
}
