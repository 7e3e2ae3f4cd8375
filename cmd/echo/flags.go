package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"time"
)

type options struct {
	listen  string
	drain   time.Duration
	version bool
}

// parse reads the command line. On -h it prints the flags to stdout and returns
// [flag.ErrHelp]; every other error is the user's, in one line.
func parse(args []string, stdout io.Writer) (options, error) {
	var opts options
	fs := flag.NewFlagSet("echo", flag.ContinueOnError)
	fs.SetOutput(io.Discard) // the flag package would print the usage below each error
	fs.StringVar(&opts.listen, "listen", ":8080", "serve HTTP (TCP) and UDP on this `address`")
	fs.DurationVar(&opts.drain, "drain", 2*time.Second, "keep serving this long after SIGTERM, not ready, so that endpoints are withdrawn first")
	fs.BoolVar(&opts.version, "version", false, "print the version and exit")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			fs.SetOutput(stdout)
			fs.Usage()
		}
		return options{}, err
	}
	if fs.NArg() > 0 {
		return options{}, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	if opts.drain < 0 {
		return options{}, fmt.Errorf("-drain %v is negative", opts.drain)
	}
	return opts, nil
}
