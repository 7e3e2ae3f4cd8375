package demo

import (
	"log/slog"
	"time"

	"github.com/natlens/natlens/internal/monitor"
)

// Echo returns a monitor that connects to the Services from the node in the box.
func (d *Demo) Echo(log *slog.Logger) *monitor.Monitor {
	return &monitor.Monitor{
		Selected: []monitor.Selector{{Namespace: "default", Name: "go-app"}, {Namespace: broken.Namespace, Name: broken.Name}, {Namespace: "shop", Name: "sticky"}},
		// Quick, so that there is a verdict within a minute.
		Interval: 250 * time.Millisecond, Grace: 10 * time.Second, Within: d.box.Node.Do, Log: log,
	}
}
