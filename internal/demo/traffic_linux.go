package demo

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/natlens/natlens/internal/echo"
	"github.com/natlens/natlens/internal/nodebox"
)

// target is a way to connect: from where, to what.
type target struct {
	service string
	from    string
	to      netip.AddrPort
}

// pace is the pause between two connections. Each target then has less than one
// a second: more often, the kernel does not answer with an ICMP error, and what
// is refused would look lost (icmp_ratelimit).
const pace = 125 * time.Millisecond

// patience is how long a connection may take before it counts as lost.
const patience = time.Second

// targets are the connections that the traffic goes through, again and again.
func targets() []target {
	addr := netip.MustParseAddrPort
	app := addr("10.56.11.169:80")
	return []target{
		{"default/go-app", "pod", app},
		{"default/go-app", "node", app},
		{"default/go-app", "external", netip.AddrPortFrom(nodeAddr, 30679)},
		{"default/go-app", "external", netip.AddrPortFrom(balancerAddr, app.Port())},
		{"shop/sticky", "pod", addr("10.56.0.21:80")},
		{"shop/local", "pod", addr("10.56.0.22:80")},
		{"shop/local", "external", netip.AddrPortFrom(nodeAddr, 30081)},
		{"shop/empty", "pod", addr("10.56.0.23:80")},
		{"shop/broken", "pod", addr("10.56.0.24:80")},
	}
}

// Traffic connects to the Services until the context ends.
func (d *Demo) Traffic(ctx context.Context) {
	list := targets()
	tick := time.NewTicker(pace)
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		// A lost connection must not hold up the others.
		go d.connect(ctx, list[i%len(list)])
	}
}

// connect makes one connection and notes which pod answered.
func (d *Demo) connect(ctx context.Context, t target) {
	limited, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	who, err := ask(limited, d.namespace(t.from), t.to)
	switch {
	case err == nil:
	case ctx.Err() != nil: // the traffic ended before the connection did
		return
	case errors.Is(err, syscall.ECONNREFUSED):
		who = "(refused)"
	default:
		who = "(no answer)"
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.answers[t] == nil {
		d.answers[t] = map[string]int{}
	}
	d.answers[t][who]++
}

func (d *Demo) namespace(from string) *nodebox.Namespace {
	switch from {
	case "node":
		return d.box.Node
	case "external":
		return d.box.Outside
	}
	return d.box.Pod(clientPod)
}

// ask asks the echo server behind an address for the name of its pod.
func ask(ctx context.Context, ns *nodebox.Namespace, to netip.AddrPort) (pod string, err error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return ns.Dial(ctx, network, addr)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+to.String()+"/json", nil)
	if err != nil {
		return "", err
	}
	res, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	var answer echo.Answer
	if err := json.NewDecoder(res.Body).Decode(&answer); err != nil {
		return "", err
	}
	return answer.Pod, nil
}

// Summary prints who answered the connections so far.
func (d *Demo) Summary(out io.Writer) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "SERVICE\tFROM\tTO\tCONNECTIONS\tANSWERED BY")
	for _, t := range targets() {
		total := 0
		var names []string
		for name, n := range d.answers[t] {
			total += n
			names = append(names, name)
		}
		if total == 0 {
			continue
		}
		slices.SortFunc(names, func(a, b string) int { return cmp.Compare(a, b) })
		for i, name := range names {
			names[i] = fmt.Sprintf("%s %.0f%%", name, 100*float64(d.answers[t][name])/float64(total))
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\n", t.service, t.from, t.to, total, strings.Join(names, ", "))
	}
	return w.Flush()
}
