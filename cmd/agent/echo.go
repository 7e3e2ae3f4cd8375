package main

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spf13/pflag"

	"github.com/natlens/natlens/internal/api"
	"github.com/natlens/natlens/internal/kubeapi"
	"github.com/natlens/natlens/internal/monitor"
)

// echoOptions are the flags about the echo monitor.
type echoOptions struct {
	services []string
	interval time.Duration
	selected []monitor.Selector // from services
}

func (o *echoOptions) addFlags(fs *pflag.FlagSet) {
	fs.StringArrayVar(&o.services, "echo", nil, "`NAMESPACE/NAME[:PORT]` of a Service of echo servers to connect to, besides those that the API marks (repeatable)")
	fs.DurationVar(&o.interval, "echo-interval", time.Second, "pause between two connections to a ClusterIP of such a Service; 0 for none at all")
}

func (o *echoOptions) check(src *source) error {
	if o.interval != 0 && o.interval < minEchoInterval {
		return usageError{fmt.Errorf("--echo-interval %v: at least %v, or 0 for no connections", o.interval, minEchoInterval)}
	}
	for _, text := range o.services {
		f, err := api.ParseFilter(text)
		if err == nil && f == (api.Filter{}) {
			err = errors.New("the name of the Service is missing")
		}
		if err != nil {
			return usageError{fmt.Errorf("--echo: %w", err)}
		}
		if len(src.files) > 0 {
			return usageError{errors.New("--echo connects by the rules of this node's kernel, not by those of a dump: leave out one of --echo and -f")}
		}
		o.selected = append(o.selected, monitor.Selector(f))
	}
	return nil
}

const minEchoInterval = 100 * time.Millisecond

// rulesLag is how old the rules of a reading may be: legacy tables are not read
// more often.
const rulesLag = 5 * time.Second

// monitor makes the echo monitor; nil where there is nothing to connect to.
func (o *echoOptions) monitor(src *source, watch *kubeapi.Watch, grace time.Duration, log *slog.Logger) *monitor.Monitor {
	if o.interval == 0 || len(src.files) > 0 || watch == nil && len(o.selected) == 0 {
		return nil
	}
	m := &monitor.Monitor{Selected: o.selected, Interval: o.interval, Grace: grace, Lag: rulesLag, Log: log}
	if watch != nil {
		m.Marked = watch.Objects().Echoes
	}
	return m
}
