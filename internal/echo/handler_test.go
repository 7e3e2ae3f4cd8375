package echo

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func testIdentity() Identity {
	return Identity{
		Hostname: "host1", Pod: "go-app-1", Namespace: "default", Node: "node1",
		Addresses: FixedAddresses(netip.MustParseAddr("10.52.1.4"), netip.MustParseAddr("fd00::4")),
	}
}

func yes() bool { return true }
func no() bool  { return false }

func TestHandlerRoutes(t *testing.T) {
	const text, jsonType = "text/plain; charset=utf-8", "application/json"
	tests := []struct {
		method, path, accept string
		notReady             bool
		code                 int
		contentType          string
		body                 string // the start of it; empty: not compared
		echo                 bool   // an echo answer: closes the connection and is counted
	}{
		{method: "GET", path: "/", code: 200, contentType: text, body: "10.52.1.4\n", echo: true},
		{method: "GET", path: "/?x=1", code: 200, contentType: text, body: "10.52.1.4\n", echo: true},
		{method: "GET", path: "/", accept: "application/json", code: 200, contentType: jsonType, body: answerPrefix, echo: true},
		{method: "GET", path: "/json", code: 200, contentType: jsonType, body: answerPrefix, echo: true},
		{method: "GET", path: "/json", accept: "text/plain", code: 200, contentType: jsonType, body: answerPrefix, echo: true},
		{method: "HEAD", path: "/", code: 200, contentType: text, echo: true},
		{method: "HEAD", path: "/json", code: 200, contentType: jsonType, echo: true},
		{method: "GET", path: "/", notReady: true, code: 200, contentType: text, echo: true},

		{method: "GET", path: "/healthz", code: 200, contentType: text, body: "ok\n"},
		{method: "GET", path: "/healthz", notReady: true, code: 200, contentType: text, body: "ok\n"},
		{method: "GET", path: "/readyz", code: 200, contentType: text, body: "ok\n"},
		{method: "GET", path: "/readyz", notReady: true, code: 503, contentType: text, body: "stopping\n"},
		{method: "HEAD", path: "/readyz", notReady: true, code: 503, contentType: text},
		{method: "GET", path: "/metrics", code: 200, contentType: "text/plain; version=0.0.4; charset=utf-8; escaping=underscores"},
		{method: "GET", path: "/metrics", accept: "application/openmetrics-text; version=1.0.0", code: 200,
			contentType: "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping=underscores"},

		{method: "POST", path: "/", code: 405, contentType: text},
		{method: "PUT", path: "/json", code: 405, contentType: text},
		{method: "DELETE", path: "/healthz", code: 405, contentType: text},
		{method: "OPTIONS", path: "/", code: 405, contentType: text},
		{method: "POST", path: "/metrics", code: 405, contentType: text},

		{method: "GET", path: "/nothing", code: 404, contentType: text},
		{method: "GET", path: "/json/", code: 404, contentType: text},
		{method: "POST", path: "/nothing", code: 404, contentType: text},
	}
	for _, tt := range tests {
		t.Run(strings.Join([]string{tt.method, tt.path, tt.accept}, " "), func(t *testing.T) {
			m := NewMetrics("v1")
			ready := yes
			if tt.notReady {
				ready = no
			}
			srv := httptest.NewServer(NewHandler(testIdentity(), m, ready))
			defer srv.Close()
			resp, body := do(t, srv, tt.method, tt.path, tt.accept)

			if resp.StatusCode != tt.code {
				t.Errorf("status %d, want %d", resp.StatusCode, tt.code)
			}
			if got := resp.Header.Get("Content-Type"); got != tt.contentType {
				t.Errorf("Content-Type %q, want %q", got, tt.contentType)
			}
			if !strings.HasPrefix(body, tt.body) {
				t.Errorf("body %q, want a start of %q", body, tt.body)
			}
			if resp.Close != tt.echo {
				t.Errorf("Connection: close is %v, want %v", resp.Close, tt.echo)
			}
			if tt.code == 405 && resp.Header.Get("Allow") != "GET, HEAD" {
				t.Errorf("Allow %q", resp.Header.Get("Allow"))
			}
			want := 0.0
			if tt.echo {
				want = 1
			}
			if got := testutil.ToFloat64(m.httpRequests); got != want {
				t.Errorf("%v requests counted, want %v", got, want)
			}
		})
	}
}

// do sends one request and returns the response with its body read.
func do(t *testing.T, srv *httptest.Server, method, path, accept string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, srv.URL+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if accept != "" {
		req.Header.Set("Accept", accept)
	}
	resp, err := srv.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

// TestHandlerEnds also shows that each answer takes a new connection: were the
// first kept alive, both would come from the same remote port.
func TestHandlerEnds(t *testing.T) {
	srv := httptest.NewServer(NewHandler(testIdentity(), NewMetrics("v1"), yes))
	defer srv.Close()
	var seen []Answer
	for range 2 {
		_, body := do(t, srv, "GET", "/json", "")
		var a Answer
		if err := json.Unmarshal([]byte(body), &a); err != nil {
			t.Fatal(err)
		}
		seen = append(seen, a)
	}
	got := seen[0]
	want := testIdentity().answer(netip.MustParseAddrPort(srv.Listener.Addr().String()), got.Remote)
	if diff := cmp.Diff(want, got, addrOpts()); diff != "" {
		t.Errorf("answer (-want +got)\n%s", diff)
	}
	if got.Remote.Addr() != netip.MustParseAddr("127.0.0.1") || got.Remote == seen[1].Remote {
		t.Errorf("remotes %v and %v, want two ports of 127.0.0.1", got.Remote, seen[1].Remote)
	}
}

func TestHandlerWithoutSocket(t *testing.T) {
	r := httptest.NewRequest("GET", "/json", nil)
	r.RemoteAddr = "pipe"
	w := httptest.NewRecorder()
	NewHandler(Identity{}, NewMetrics("v1"), yes).ServeHTTP(w, r)
	if !strings.Contains(w.Body.String(), `"local":"","remote":""`) {
		t.Errorf("body %s", w.Body)
	}
}

func TestPrefersJSON(t *testing.T) {
	tests := []struct {
		accept []string
		want   bool
	}{
		{nil, false},
		{[]string{""}, false},
		{[]string{"*/*"}, false}, // curl
		{[]string{"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}, false}, // browsers
		{[]string{"application/json"}, true},
		{[]string{"Application/JSON"}, true},
		{[]string{"application/json; charset=utf-8"}, true},
		{[]string{"application/*"}, true},
		{[]string{"application/json, text/plain, */*"}, true}, // axios
		{[]string{"application/json, */*;q=0.5"}, true},
		{[]string{"*/*;q=0.5, application/json"}, true},
		{[]string{"text/plain, application/json"}, true},
		{[]string{"text/plain", "application/json"}, true},
		{[]string{"text/plain", "application/json;q=0.5"}, false},
		{[]string{"text/plain;q=0.4, application/json;q=0.5"}, true},
		{[]string{"text/*;q=0.6, application/json;q=0.5"}, false},
		{[]string{"text/*, text/plain;q=0.1, application/json;q=0.5"}, true},
		{[]string{"application/json;q=0"}, false},
		{[]string{"application/*, application/json;q=0"}, false},
		{[]string{"application/json;q=2"}, false},
		{[]string{"application/json;q=NaN"}, false},
		{[]string{"application/json;q=x"}, false},
		{[]string{"image/png"}, false},
		{[]string{";;,/,=,application/json"}, true},
	}
	for _, tt := range tests {
		if got := prefersJSON(tt.accept); got != tt.want {
			t.Errorf("prefersJSON(%q) = %v, want %v", tt.accept, got, tt.want)
		}
	}
}
