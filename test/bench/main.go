//go:build linux

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"time"
)

func main() {
	var (
		sizes   = flag.String("sizes", "1000x10,10000x10", "`SERVICESxENDPOINTS`, comma-separated; 50000x5 takes half an hour")
		layouts = flag.String("layouts", "legacy,nft,nftables", "which of legacy, nft (iptables-nft) and nftables (kube-proxy's mode)")
		rounds  = flag.Int("rounds", 5, "how many times each row is measured")
		agent   = flag.String("agent", "", "measure this `PROGRAM` as \"agent serve\", too")
		rest    = flag.Duration("rest", 10*time.Minute, "how long the agent is watched at rest; above 1,000 Services a tenth of that")
		beside  = flag.String("beside", "", "measure it beside kube-proxy, too: the `FOLDER` of kube-apiserver and kube-proxy; etcd is on the PATH")
		child   = flag.String("child", "", "for the program's own use: the `ROW` to measure")
	)
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	var err error
	if *child != "" {
		err = runChild(ctx, *child)
	} else {
		err = run(ctx, strings.Split(*sizes, ","), strings.Split(*layouts, ","), *rounds, *agent, *rest, *beside)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, sizes, names []string, rounds int, agent string, rest time.Duration, beside string) error {
	if os.Geteuid() != 0 {
		return errors.New("loading rules needs root")
	}
	fmt.Printf("%s\n\n", machine())
	for _, size := range sizes {
		services, endpoints, err := parseSize(size)
		if err != nil {
			return err
		}
		for _, l := range layouts {
			if !slices.Contains(names, l.name) {
				continue
			}
			if err := measure(ctx, l, services, endpoints, rounds); err != nil {
				return fmt.Errorf("%s %s: %w", size, l.name, err)
			}
		}
		if agent != "" {
			if err := measureAgent(ctx, agent, services, endpoints, rounds, rest); err != nil {
				return fmt.Errorf("%s agent: %w", size, err)
			}
		}
		for _, l := range layouts {
			if agent == "" || beside == "" || !slices.Contains(names, l.name) {
				continue
			}
			if err := measureBeside(ctx, agent, beside, l.name, services, endpoints); err != nil {
				return fmt.Errorf("%s beside kube-proxy with %s: %w", size, l.name, err)
			}
		}
	}
	return nil
}

func parseSize(size string) (services, endpoints int, err error) {
	a, b, ok := strings.Cut(size, "x")
	services, err = strconv.Atoi(a)
	if err == nil {
		endpoints, err = strconv.Atoi(b)
	}
	if !ok || err != nil || services < 10 || endpoints < 2 {
		return 0, 0, fmt.Errorf("-sizes %q: want SERVICESxENDPOINTS, such as 1000x10", size)
	}
	return services, endpoints, nil
}
