package web

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/natlens/natlens/internal/access"
	"github.com/natlens/natlens/internal/api"
)

// guard lets one token get one path, as a Gate does.
func guard(goodToken, goodPath string) func(context.Context, string, string) error {
	return func(_ context.Context, token, path string) error {
		switch {
		case token == "outage":
			return errors.New("dial tcp 10.0.0.1:443: connection refused")
		case token != goodToken:
			return access.ErrUnauthenticated
		case path != goodPath:
			return &access.ForbiddenError{User: "somebody", URL: path}
		}
		return nil
	}
}

func TestAuthorize(t *testing.T) {
	seen := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "secret") })
	handler := Authorize(seen, guard("good", "/metrics"))
	for _, test := range []struct {
		path, authorization string
		code                int
		message             string
	}{
		{"/metrics", "Bearer good", 200, ""},
		{"/metrics", "bearer  good ", 200, ""},
		{"/metrics?x=1", "Bearer good", 200, ""},
		{"/livez", "", 200, ""},
		{"/readyz", "", 200, ""},
		{"/healthz", "Bearer wrong", 200, ""},

		{"/metrics", "", 401, "a bearer token is needed"},
		{"/metrics", "Bearer", 401, "a bearer token is needed"},
		{"/metrics", "Bearer ", 401, "a bearer token is needed"},
		{"/metrics", "Basic good", 401, "a bearer token is needed"},
		{"/metrics", "good", 401, "a bearer token is needed"},
		{"/metrics?access_token=good", "", 401, "a bearer token is needed"},
		{"/metrics", "Bearer wrong", 401, "not, or no longer, valid"},
		{"/", "", 401, "a bearer token is needed"},
		{"/livez/", "", 401, "a bearer token is needed"},
		{"/livez/../metrics", "", 401, "a bearer token is needed"},
		{"//livez", "", 401, "a bearer token is needed"},
		{"/LIVEZ", "", 401, "a bearer token is needed"},

		{"/api/v1/services", "Bearer good", 403, `"somebody" may not get the nonResourceURL /api/v1/services`},
		{"/metrics/", "Bearer good", 403, "may not get the nonResourceURL /metrics/"},
		{"/metrics", "Bearer outage", 503, "cannot be asked now"},
	} {
		t.Run(strings.ReplaceAll(test.path, "/", " ")+" "+test.authorization, func(t *testing.T) {
			r := httptest.NewRequest("GET", "https://node1:9753"+test.path, nil)
			if test.authorization != "" {
				r.Header.Set("Authorization", test.authorization)
			}
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, r)
			if w.Code != test.code {
				t.Fatalf("%d %s, want %d", w.Code, w.Body, test.code)
			}
			if test.code == 200 {
				return
			}
			var doc api.Error
			if err := json.Unmarshal(w.Body.Bytes(), &doc); err != nil || doc.Error.Code != test.code || !strings.Contains(doc.Error.Message, test.message) {
				t.Errorf("error document %s, want %q; %v", w.Body, test.message, err)
			}
			if strings.Contains(w.Body.String(), "10.0.0.1") {
				t.Errorf("a stranger reads where the API server is: %s", w.Body)
			}
			if got := w.Header().Get("WWW-Authenticate"); (test.code == 401) != strings.HasPrefix(got, "Bearer") {
				t.Errorf("WWW-Authenticate: %q", got)
			}
			if w.Header().Get("Connection") != "close" {
				t.Error("who may not read keeps the connection")
			}
		})
	}
}

// TestRightIsToWhatIsServed sends paths that could be one thing to the check and
// another to the routes: a right to one path must not show what is behind
// another.
func TestRightIsToWhatIsServed(t *testing.T) {
	agent := newAgent(t, capture(t, iptablesCapture))
	for _, path := range []string{
		"/livez/../metrics", "/livez%2f..%2fmetrics", "/livez/%2e%2e/metrics", "/livez;/metrics", "/livez?/../metrics", "//metrics", "/./metrics",
		"/api/v1/services/..%2f..%2f..%2fmetrics", "/%6detrics", "/metrics%00", "/metrics%2f", `/livez\..\metrics`,
	} {
		// Everything but what the path says in plain is granted: nothing may be
		// served as /metrics that was not asked for as /metrics.
		handler := Authorize(agent, func(_ context.Context, _, asked string) error {
			if asked == "/metrics" {
				return &access.ForbiddenError{User: "somebody", URL: asked}
			}
			return nil
		})
		server := httptest.NewServer(handler)
		conn, err := net.Dial("tcp", server.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer x\r\nConnection: close\r\n\r\n", path)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := resp.Header.Get("Content-Type"); strings.Contains(got, "version=0.0.4") {
			t.Errorf("%s shows the metrics", path)
		}
		conn.Close()
		server.Close()
	}
}

// TestEventsAskAgain checks that a stream ends, so that a right that was taken
// away ends too.
func TestEventsAskAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		agent := newAgent(t, capture(t, iptablesCapture))
		start := time.Now()
		r := httptest.NewRequest("GET", "https://node1:9753/api/v1/events", nil)
		r.Header.Set("Authorization", "Bearer good")
		Authorize(agent, guard("good", "/api/v1/events")).ServeHTTP(httptest.NewRecorder(), r)
		if took := time.Since(start); took != maxAuthorized {
			t.Errorf("the stream ended after %v, want %v", took, maxAuthorized)
		}
	})
}
