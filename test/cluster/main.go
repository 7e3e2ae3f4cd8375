package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/natlens/natlens/test/cluster/kube"
)

const usage = `Usage: cluster [-name NAME] COMMAND

  up [NODE=VERSION,MODE]…      bring the cluster up; a node can have a kube-proxy of its own
  down                         take it down, however much of it there is
  status                       what runs
  kubectl ARGUMENT…            kubectl, as administrator
  logs [BOX] PROCESS           what a process printed: kubelet of node1, kube-apiserver of control
  exec BOX COMMAND…            run a command in a box: control, outside, node1 …
  exec pod/NAMESPACE/NAME COMMAND…
                               run a command on the network of a pod
  load IMAGE.tar…              load image archives into all nodes
  proxy [-clear] NODE VERSION MODE
                               give a node another kube-proxy; -clear removes all rules before

Modes are iptables-nft, iptables-legacy and nftables; versions %s.
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:])
	stop()
	os.Exit(code)
}

// errUsage asks for the usage to be printed.
var errUsage = errors.New("usage")

// exitCode is the exit code of a command that has said itself what was wrong.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprint("exit code ", int(e)) }

func run(ctx context.Context, args []string) int {
	flags := flag.NewFlagSet("cluster", flag.ContinueOnError)
	flags.Usage = func() { fmt.Fprintf(os.Stderr, usage, strings.Join(kube.ProxyVersions, " ")) }
	name := flags.String("name", "natlens", "")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	err := errUsage
	if flags.NArg() > 0 {
		err = command(ctx, *name, flags.Arg(0), flags.Args()[1:])
	}
	var code exitCode
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errUsage):
		flags.Usage()
		return 2
	case errors.As(err, &code):
		return int(code)
	}
	fmt.Fprintln(os.Stderr, "cluster:", err)
	return 1
}

func command(ctx context.Context, name, verb string, args []string) error {
	switch verb {
	case "up":
		return up(ctx, name, args)
	case "down":
		return kube.Down(ctx, name)
	}
	do, ok := map[string]func(context.Context, *kube.Cluster, []string) error{
		"status": status, "kubectl": kubectl, "logs": logs, "exec": execute, "load": load, "proxy": proxy,
	}[verb]
	if !ok {
		return errUsage
	}
	c, err := kube.Open(name)
	if err != nil {
		return err
	}
	return do(ctx, c, args)
}

func up(ctx context.Context, name string, args []string) error {
	if _, err := kube.Open(name); err == nil {
		return errors.New("the cluster is up already; take it down first")
	}
	cfg := kube.Config{Name: name, Nodes: kube.ThreeNodes()}
	for _, arg := range args {
		node, proxy, _ := strings.Cut(arg, "=")
		version, mode, ok := strings.Cut(proxy, ",")
		i := slices.IndexFunc(cfg.Nodes, func(n kube.NodeConfig) bool { return n.Name == node })
		if !ok || i < 0 {
			return errUsage
		}
		cfg.Nodes[i].Proxy = kube.Proxy{Version: version, Mode: kube.Mode(mode)}
	}
	_, err := kube.Up(ctx, cfg, os.Stderr)
	return err
}

func status(_ context.Context, c *kube.Cluster, _ []string) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "BOX\tPROCESS\tPID\tWHAT")
	for _, b := range c.Boxes() {
		for _, p := range c.Processes(b) {
			what := ""
			if n, err := c.Node(b.Name); err == nil && p == n.KubeProxy {
				what = n.Proxy.String()
			}
			pid := "ended"
			if p.PID() != 0 {
				pid = fmt.Sprint(p.PID())
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", b.Name, p.Name, pid, what)
		}
	}
	return w.Flush()
}

func kubectl(ctx context.Context, c *kube.Cluster, args []string) error {
	return interactive(exec.CommandContext(ctx, c.KubectlPath(), args...), c.StartKubectl)
}

func execute(ctx context.Context, c *kube.Cluster, args []string) error {
	if len(args) < 2 {
		return errUsage
	}
	cmd := exec.CommandContext(ctx, args[1], args[2:]...)
	if pod, ok := strings.CutPrefix(args[0], "pod/"); ok {
		namespace, name, _ := strings.Cut(pod, "/")
		p, err := c.Pod(ctx, namespace, name)
		if err != nil {
			return err
		}
		return interactive(cmd, p.Start)
	}
	b, err := c.Box(args[0])
	if err != nil {
		return err
	}
	return interactive(cmd, b.Start)
}

// interactive runs a command as if it had been started from the shell.
func interactive(cmd *exec.Cmd, start func(*exec.Cmd) error) error {
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Cancel = func() error { return nil } // Ctrl-C reaches it as well
	err := start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exitCode(exit.ExitCode())
	}
	return err
}

func logs(_ context.Context, c *kube.Cluster, args []string) error {
	found := false
	for _, b := range c.Boxes() {
		for _, p := range c.Processes(b) {
			switch {
			case len(args) == 1 && args[0] == p.Name:
			case len(args) == 2 && args[0] == b.Name && args[1] == p.Name:
			default:
				continue
			}
			found = true
			if err := printFile(p.LogFile()); err != nil {
				return err
			}
		}
	}
	if !found {
		return errUsage
	}
	return nil
}

func printFile(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(os.Stdout, f)
	return err
}

func load(ctx context.Context, c *kube.Cluster, args []string) error {
	if len(args) == 0 {
		return errUsage
	}
	return c.Load(ctx, args...)
}

func proxy(ctx context.Context, c *kube.Cluster, args []string) error {
	clear := len(args) == 4 && args[0] == "-clear"
	if clear {
		args = args[1:]
	}
	if len(args) != 3 {
		return errUsage
	}
	n, err := c.Node(args[0])
	if err != nil {
		return err
	}
	return n.ChangeProxy(ctx, kube.Proxy{Version: args[1], Mode: kube.Mode(args[2])}, clear)
}
