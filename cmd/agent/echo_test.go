package main

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/natlens/natlens/internal/monitor"
)

func TestEchoOptions(t *testing.T) {
	o := echoOptions{services: []string{"default/go-app", "shop/web:http"}, interval: time.Second}
	if err := o.check(&source{}); err != nil {
		t.Fatal(err)
	}
	m := o.monitor(&source{}, nil, time.Minute, slog.New(slog.DiscardHandler))
	want := []monitor.Selector{{Namespace: "default", Name: "go-app"}, {Namespace: "shop", Name: "web", Port: "http"}}
	if m == nil || m.Interval != time.Second || m.Grace != time.Minute || !cmp.Equal(m.Selected, want) {
		t.Fatalf("monitor %+v, want %v", m, want)
	}
	for _, o := range []echoOptions{{interval: time.Second}, {services: o.services}} {
		if m := o.monitor(&source{}, nil, 0, nil); m != nil {
			t.Errorf("%+v: a monitor without anything to connect to", o)
		}
	}
}

// TestEchoUsage: a wrong flag is told in one line, with what would be right.
func TestEchoUsage(t *testing.T) {
	for _, test := range []struct{ args, want string }{
		{"--echo go-app", `"go-app" is not NAMESPACE/NAME[:PORT]`},
		{"--echo=", "the name of the Service is missing"},
		{"--echo a/b -f x.save", "leave out one of --echo and -f"},
		{"--echo-interval 1ms", "at least 100ms, or 0"},
	} {
		var stdout, stderr bytes.Buffer
		args := append([]string{"serve", "--listen", "127.0.0.1:0"}, strings.Fields(test.args)...)
		code := run(t.Context(), args, strings.NewReader(""), &stdout, &stderr)
		if code != exitUsage || !strings.Contains(stderr.String(), test.want) || strings.Count(stderr.String(), "\n") != 1 {
			t.Errorf("%s: exit code %d, stderr %q", test.args, code, &stderr)
		}
	}
}
