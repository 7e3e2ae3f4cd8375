package web

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/natlens/natlens/internal/api"
	"github.com/natlens/natlens/internal/metrics"
	"github.com/natlens/natlens/internal/snapshot"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
)

// capture returns a dump of a real node; edits are pairs of old and new text.
func capture(t *testing.T, name string, edits ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../../testdata/captures", name))
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for i := 0; i < len(edits); i += 2 {
		if !strings.Contains(text, edits[i]) {
			t.Fatalf("%s does not hold %q", name, edits[i])
		}
		text = strings.Replace(text, edits[i], edits[i+1], 1)
	}
	return text
}

const iptablesCapture = "v1.35.4-iptables.save"

// dumps is a Reader whose readings are set by the test.
type dumps struct {
	mu    sync.Mutex
	texts []string
	err   error
}

func (d *dumps) set(err error, texts ...string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.texts, d.err = texts, err
}

func (d *dumps) Read(context.Context) (*netfilter.Ruleset, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err != nil {
		return nil, d.err
	}
	var sets []*netfilter.Ruleset
	for _, text := range d.texts {
		rs, err := iptables.Parse(strings.NewReader(text), "dump")
		if err != nil {
			return nil, err
		}
		sets = append(sets, rs)
	}
	return netfilter.Merge(sets...)
}

// agent is a handler with what it serves.
type agent struct {
	http.Handler
	keeper *snapshot.Keeper
	dumps  *dumps
}

// newAgent reads the dumps once; without any, no reading has worked yet.
func newAgent(t *testing.T, texts ...string) *agent {
	t.Helper()
	d := &dumps{}
	log := slog.New(slog.DiscardHandler)
	keeper := &snapshot.Keeper{
		Reader: d, Name: "node1", Log: log,
		Node: func() (chain.Node, error) {
			return chain.Node{Local: []netip.Addr{netip.MustParseAddr("10.146.0.2")}}, nil
		},
	}
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(metrics.New(keeper, "v1.2.3", false))
	a := &agent{NewHandler(Config{
		Source: keeper, Version: "v1.2.3", Log: log, Metrics: promhttp.HandlerFor(registry, promhttp.HandlerOpts{}),
	}), keeper, d}
	if len(texts) > 0 {
		a.read(t, texts...)
	}
	return a
}

func (a *agent) read(t *testing.T, texts ...string) {
	t.Helper()
	a.dumps.set(nil, texts...)
	if err := a.keeper.Refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func (a *agent) fail(t *testing.T, reason string) {
	t.Helper()
	a.dumps.set(errors.New(reason))
	if err := a.keeper.Refresh(t.Context()); err == nil {
		t.Fatal("the reading did not fail")
	}
}

// do asks with headers given as pairs.
func (a *agent) do(method, path string, headers ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, path, nil)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	w := httptest.NewRecorder()
	a.ServeHTTP(w, r)
	return w
}

const (
	jsonType = "application/json"
	textType = "text/plain; charset=utf-8"
	htmlType = "text/html; charset=utf-8"
)

func TestRoutes(t *testing.T) {
	running, starting := newAgent(t, capture(t, iptablesCapture)), newAgent(t)
	stale := newAgent(t, capture(t, iptablesCapture))
	stale.fail(t, "no such table")
	const services, service = "/api/v1/services", "/api/v1/services/default/go-app"
	for _, test := range []struct {
		agent        *agent
		method, path string
		code         int
		contentType  string
		body         string // part of it
	}{
		{running, "GET", services, 200, jsonType, `"name":"go-app"`},
		{running, "GET", services + "?namespace=dns", 200, jsonType, `"name":"kube-dns","port":"dns-tcp"`},
		{running, "GET", services + "?namespace=dns&name=kube-dns&port=dns", 200, jsonType, `"port":"dns"`},
		{running, "GET", services + "?name=nobody", 200, jsonType, `"services":[],"findings":[]`},
		{running, "GET", service, 200, jsonType, `"exact":"715827883/2147483648"`},
		{running, "GET", service + "?port=80", 200, jsonType, `"name":"go-app"`},
		{running, "GET", service + "?port=81", 404, jsonType, "the rules hold no Service default/go-app"},
		{running, "GET", "/api/v1/services/default/nobody", 404, jsonType, "the rules hold no Service default/nobody"},
		{running, "GET", "/api/v1/services/default", 404, jsonType, "no such path"},
		{running, "GET", "/api/v1/trace?to=10.56.15.149:80", 200, jsonType, `"class":"pod"`},
		{running, "GET", "/api/v1/trace?to=10.56.0.10:53&protocol=udp&from=external", 200, jsonType, `"protocol":"UDP","class":"external"`},
		{running, "GET", "/api/v1/trace?to=10.56.0.10:53/udp&from=10.52.1.9", 200, jsonType, `"from":"10.52.1.9"`},
		{running, "GET", "/api/v1/trace", 400, jsonType, "is not ADDRESS:PORT"},
		{running, "GET", "/api/v1/trace?to=10.56.15.149", 400, jsonType, "is not ADDRESS:PORT"},
		{running, "GET", "/api/v1/trace?to=10.56.15.149:80&protocol=icmp", 400, jsonType, "unknown protocol"},
		{running, "GET", "/api/v1/trace?to=10.56.15.149:80&from=mars", 400, jsonType, "neither an address nor one of"},
		{running, "GET", "/api/v1/trace?to=10.56.15.149:80&from=fd00::1", 400, jsonType, "different families"},
		{running, "GET", "/api/v1/trace?to=[fd00::1]:80", 404, jsonType, "no table of ipv6"},
		{running, "GET", "/api/v1/findings", 200, jsonType, `"findings":[]`},
		{running, "GET", "/api/v1/chains/nat/KUBE-SERVICES", 200, jsonType, `"family":"ipv4","backend":"iptables-nft"`},
		{running, "GET", "/api/v1/chains/nat/KUBE-NOTHING", 404, jsonType, `no chain \"KUBE-NOTHING\" in a table \"nat\"`},
		{running, "GET", "/api/v1/chains/nat", 404, jsonType, "no such path"},
		{running, "GET", "/metrics", 200, "text/plain; version=0.0.4; charset=utf-8; escaping=underscores", "natlens_up 1"},
		{running, "GET", "/livez", 200, textType, "ok\n"},
		{running, "GET", "/healthz", 200, textType, "ok\n"},
		{running, "GET", "/readyz", 200, textType, "ok\n"},
		{running, "GET", "/version", 200, jsonType, `{"version":"v1.2.3"}`},
		{running, "GET", "/openapi.json", 200, jsonType, `"openapi": "3.1.0"`},
		{running, "GET", "/", 200, htmlType, "<!doctype html>"},
		{running, "GET", "/static/app.js", 200, "text/javascript; charset=utf-8", "api/v1/events"},
		{running, "GET", "/static/style.css", 200, "text/css; charset=utf-8", "prefers-color-scheme"},

		{running, "GET", "/nothing", 404, jsonType, "no such path: /nothing"},
		{running, "GET", "/api", 404, jsonType, "no such path: /api"},
		{running, "GET", "/api/v1/services/", 404, jsonType, "no such path"},
		{running, "GET", "/static/", 404, jsonType, "no such path"},
		{running, "GET", "/static/web.go", 404, jsonType, "no such path"},
		{running, "GET", "/index.html", 404, jsonType, "no such path"},

		{running, "HEAD", services, 200, jsonType, ""},
		{running, "HEAD", "/", 200, htmlType, ""},
		{running, "HEAD", "/metrics", 200, "text/plain; version=0.0.4; charset=utf-8; escaping=underscores", ""},
		{running, "HEAD", "/api/v1/events", 200, "text/event-stream", ""}, // and comes to an end

		{running, "POST", services, 405, jsonType, "only GET is allowed"},
		{running, "PUT", "/", 405, jsonType, "only GET is allowed"},
		{running, "DELETE", service, 405, jsonType, "only GET is allowed"},
		{running, "PATCH", "/nothing", 405, jsonType, "only GET is allowed"},
		{running, "OPTIONS", "/metrics", 405, jsonType, "only GET is allowed"},
		{running, "POST", "/static/app.js", 405, jsonType, "only GET is allowed"},
		{running, "POST", "/api/v1/events", 405, jsonType, "only GET is allowed"},

		{starting, "GET", services, 503, jsonType, "have not been read yet"},
		{starting, "GET", service, 503, jsonType, "have not been read yet"},
		{starting, "GET", "/api/v1/trace?to=10.56.15.149:80", 503, jsonType, "have not been read yet"},
		{starting, "GET", "/api/v1/findings", 503, jsonType, "have not been read yet"},
		{starting, "GET", "/api/v1/chains/nat/KUBE-SERVICES", 503, jsonType, "have not been read yet"},
		{starting, "GET", "/readyz", 503, textType, "have not been read yet"},
		{starting, "GET", "/livez", 200, textType, "ok\n"},
		{starting, "GET", "/metrics", 200, "text/plain; version=0.0.4; charset=utf-8; escaping=underscores", "natlens_up 0"},
		{starting, "GET", "/", 200, htmlType, "<!doctype html>"},

		{stale, "GET", service, 200, jsonType, `"stale":true,"error":"no such table"`},
		{stale, "GET", "/readyz", 200, textType, "ok, but stale: /api/v1/services says why"},
		{stale, "GET", "/metrics", 200, "text/plain; version=0.0.4; charset=utf-8; escaping=underscores", "natlens_up 0"},
	} {
		t.Run(test.method+" "+strings.ReplaceAll(test.path, "/", " ")+" "+fmt.Sprint(test.code), func(t *testing.T) {
			got := test.agent.do(test.method, test.path)
			if got.Code != test.code || got.Header().Get("Content-Type") != test.contentType || !strings.Contains(got.Body.String(), test.body) {
				t.Errorf("%d %s, want %d %s with %q; body: %.300s", got.Code, got.Header().Get("Content-Type"), test.code, test.contentType, test.body, got.Body)
			}
			if allow := got.Header().Get("Allow"); (test.code == 405) != (allow == "GET, HEAD") {
				t.Errorf("Allow: %q", allow)
			}
			if test.code >= 400 && test.contentType == jsonType {
				var doc api.Error
				dec := json.NewDecoder(got.Body)
				dec.DisallowUnknownFields()
				if err := dec.Decode(&doc); err != nil || doc.Error.Code != test.code || doc.Error.Message == "" {
					t.Errorf("error document %+v, %v", doc, err)
				}
			}
			if test.code == 503 && test.contentType == jsonType && got.Header().Get("Retry-After") == "" {
				t.Error("no Retry-After")
			}
		})
	}
}

// TestETag: two answers have the same tag exactly while they are the same.
func TestETag(t *testing.T) {
	a := newAgent(t, capture(t, iptablesCapture))
	const path = "/api/v1/findings"
	seen := map[string]string{}
	for _, step := range []struct {
		name string
		do   func()
		same bool // as the step before
	}{
		{"first", func() {}, false},
		{"asked again", func() {}, true},
		{"stale", func() { a.fail(t, "no such table") }, false},
		{"still stale", func() { a.fail(t, "no such table") }, true},
		{"stale for another reason", func() { a.fail(t, "permission denied") }, false},
		{"read again", func() { a.read(t, capture(t, iptablesCapture)) }, false},
		{"changed", func() { a.read(t, capture(t, "v1.23.17-iptables.save")) }, false},
	} {
		step.do()
		got := a.do("GET", path)
		tag, body := got.Header().Get("ETag"), got.Body.String()
		if other, ok := seen[tag]; tag == "" || ok != step.same || ok && other != body {
			t.Errorf("%s: tag %s, seen before %t, want %t, with the same body", step.name, tag, ok, step.same)
		}
		seen[tag] = body
		for _, match := range []string{tag, `"old", ` + tag, "*"} {
			again := a.do("GET", path, "If-None-Match", match)
			if again.Code != 304 || again.Body.Len() != 0 || again.Header().Get("ETag") != tag {
				t.Errorf("%s: If-None-Match: %s: %d, %d bytes, tag %s; want 304 and nothing", step.name, match, again.Code, again.Body.Len(), again.Header().Get("ETag"))
			}
		}
	}
	if got := a.do("GET", "/api/v1/services/default/nope", "If-None-Match", "*"); got.Code != 404 {
		t.Errorf("what is not there, with If-None-Match: *: %d, want 404", got.Code)
	}
	if got := a.do("GET", path, "If-None-Match", `W/"old"`); got.Code != 200 || got.Header().Get("Cache-Control") != "no-cache" {
		t.Errorf("another tag: %d, Cache-Control %q", got.Code, got.Header().Get("Cache-Control"))
	}
}

func TestGzip(t *testing.T) {
	a := newAgent(t, capture(t, iptablesCapture))
	plain := a.do("GET", "/api/v1/services")
	packed := a.do("GET", "/api/v1/services", "Accept-Encoding", "br, gzip")
	if plain.Header().Get("Content-Encoding") != "" || packed.Header().Get("Content-Encoding") != "gzip" {
		t.Fatalf("Content-Encoding %q without, %q with Accept-Encoding", plain.Header().Get("Content-Encoding"), packed.Header().Get("Content-Encoding"))
	}
	for _, got := range []*httptest.ResponseRecorder{plain, packed} {
		if got.Header().Get("Vary") != "Accept-Encoding" {
			t.Errorf("Vary: %q", got.Header().Get("Vary"))
		}
	}
	size := packed.Body.Len()
	z, err := gzip.NewReader(packed.Body)
	if err != nil {
		t.Fatal(err)
	}
	unpacked, err := io.ReadAll(z)
	if err != nil || !bytes.Equal(unpacked, plain.Body.Bytes()) {
		t.Errorf("unpacked %d bytes (%v), want the same %d as without", len(unpacked), err, plain.Body.Len())
	}
	if size > len(unpacked)/3 {
		t.Errorf("%d bytes became %d", len(unpacked), size)
	}
	for header, want := range map[string]string{
		"gzip;q=0": "", "gzip; q=0.0": "", "identity": "", "x-gzipped": "", "*": "gzip", "*, gzip;q=0": "", "*;q=0": "", "*;q=0, GZIP;q=0.5": "gzip",
	} {
		if got := a.do("GET", "/api/v1/services", "Accept-Encoding", header).Header().Get("Content-Encoding"); got != want {
			t.Errorf("Accept-Encoding %s: Content-Encoding %q, want %q", header, got, want)
		}
	}
	if small := a.do("GET", "/api/v1/findings", "Accept-Encoding", "gzip"); small.Header().Get("Content-Encoding") != "" {
		t.Error("a document of a few bytes is packed")
	}
}

// TestPage holds the page to its promise: it loads nothing from elsewhere,
// works behind any prefix, and makes no markup of what it reads.
func TestPage(t *testing.T) {
	a := newAgent(t)
	for _, path := range []string{"/", "/static/app.js", "/static/style.css"} {
		h := a.do("GET", path).Header()
		policy := h.Get("Content-Security-Policy")
		for _, part := range []string{"default-src 'none'", "script-src 'self';", "style-src 'self';", "connect-src 'self';", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"} {
			if !strings.Contains(policy, part) {
				t.Errorf("%s: Content-Security-Policy %q lacks %q", path, policy, part)
			}
		}
		if h.Get("X-Content-Type-Options") != "nosniff" || h.Get("Referrer-Policy") != "no-referrer" {
			t.Errorf("%s: X-Content-Type-Options %q, Referrer-Policy %q", path, h.Get("X-Content-Type-Options"), h.Get("Referrer-Policy"))
		}
	}
	html, script := a.do("GET", "/").Body.String(), a.do("GET", "/static/app.js").Body.String()
	for _, m := range regexp.MustCompile(`(?:src|href)="([^"]*)"`).FindAllStringSubmatch(html, -1) {
		switch link := m[1]; {
		case strings.HasPrefix(link, "#"), strings.HasPrefix(link, "data:"):
		case strings.HasPrefix(link, "/"), strings.Contains(link, ":"):
			t.Errorf("%q is not a relative link", link)
		case a.do("GET", "/"+link).Code == 404:
			t.Errorf("%q leads nowhere", link)
		}
	}
	if bad := regexp.MustCompile(`(?i)<style|\sstyle=|\son[a-z]+="|<script(?:>|[^>]*>[^<])`).FindString(html); bad != "" {
		t.Errorf("the page holds %q, which the policy forbids", bad)
	}
	if bad := regexp.MustCompile(`innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc|cssText|DOMParser`).FindString(script); bad != "" {
		t.Errorf("the script uses %s", bad)
	}
	if bad := regexp.MustCompile(`(?:get|fetch|EventSource)\(["'` + "`" + `](?:/|https?:)`).FindString(script); bad != "" {
		t.Errorf("the script asks for an absolute path: %s", bad)
	}
	ids := map[string]bool{}
	for _, m := range regexp.MustCompile(`id="([^"]*)"`).FindAllStringSubmatch(html, -1) {
		if ids[m[1]] {
			t.Errorf("id %q twice", m[1])
		}
		ids[m[1]] = true
	}
	for _, m := range regexp.MustCompile(`\$\("([^"]*)"\)|(?:for|aria-labelledby|aria-describedby)="([^"]*)"`).FindAllStringSubmatch(script+html, -1) {
		if id := m[1] + m[2]; !ids[id] {
			t.Errorf("there is no element with the id %q", id)
		}
	}
}

// event is one server-sent event.
type event struct {
	id, name string
	header   api.Header
}

// readEvent returns the next event of a stream, without comments.
func readEvent(r *bufio.Scanner) (event, error) {
	var e event
	for r.Scan() {
		field, value, _ := strings.Cut(r.Text(), ": ")
		switch field {
		case "id":
			e.id = value
		case "event":
			e.name = value
		case "data":
			if err := json.Unmarshal([]byte(value), &e.header); err != nil {
				return e, err
			}
		case "":
			if e.name != "" {
				return e, nil
			}
		}
	}
	return e, errors.Join(io.ErrUnexpectedEOF, r.Err())
}

func TestEvents(t *testing.T) {
	a := newAgent(t)
	returned := make(chan struct{}, 1)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.ServeHTTP(w, r)
		returned <- struct{}{}
	}))
	defer server.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, "GET", server.URL+"/api/v1/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := http.DefaultClient.Do(r) // the header comes before the first snapshot does
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if answer.StatusCode != 200 || answer.Header.Get("Content-Type") != "text/event-stream" || answer.Header.Get("Cache-Control") != "no-store" {
		t.Errorf("%s, %v", answer.Status, answer.Header)
	}
	lines := bufio.NewScanner(answer.Body)
	for _, step := range []struct {
		name  string
		do    func()
		id    string
		stale bool
	}{
		{"the first snapshot", func() { a.read(t, capture(t, iptablesCapture)) }, "1", false},
		{"a change, behind a reading without one", func() {
			a.read(t, capture(t, iptablesCapture))
			a.read(t, capture(t, "v1.23.17-iptables.save"))
		}, "2", false},
		{"a failure", func() { a.fail(t, "no such table") }, "2", true},
		{"recovery", func() { a.read(t, capture(t, "v1.23.17-iptables.save")) }, "2", false},
	} {
		step.do()
		got, err := readEvent(lines)
		if err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if got.name != "snapshot" || got.id != step.id || got.header.Node != "node1" || got.header.Stale != step.stale {
			t.Errorf("%s: event %+v, want a snapshot with id %s, stale %t", step.name, got, step.id, step.stale)
		}
	}
	cancel()
	select {
	case <-returned:
	case <-time.After(10 * time.Second):
		t.Error("the handler goes on without a client")
	}
}

// TestEventsAtOnce: who comes later is told of the present snapshot first.
func TestEventsAtOnce(t *testing.T) {
	a := newAgent(t, capture(t, iptablesCapture))
	server := httptest.NewServer(a)
	defer server.Close()
	answer, err := http.Get(server.URL + "/api/v1/events")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if got, err := readEvent(bufio.NewScanner(answer.Body)); err != nil || got.id != "1" || !got.header.Time.Equal(a.keeper.Snapshot().Time) {
		t.Errorf("event %+v, %v", got, err)
	}
}

// TestEventsEnd checks that a server that stops ends the streams, by the
// context of all its requests.
func TestEventsEnd(t *testing.T) {
	a := newAgent(t, capture(t, iptablesCapture))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	w := httptest.NewRecorder()
	a.ServeHTTP(w, httptest.NewRequest("GET", "/api/v1/events", nil).WithContext(ctx))
	if !strings.HasPrefix(w.Body.String(), "id: 1\nevent: snapshot\ndata: {") {
		t.Errorf("stream: %q", w.Body)
	}
}

func TestEventsLimit(t *testing.T) {
	a := newAgent(t, capture(t, iptablesCapture))
	server := httptest.NewServer(a)
	t.Cleanup(server.Close) // behind those of the streams, for which it waits
	open := func() *http.Response {
		answer, err := http.Get(server.URL + "/api/v1/events")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { answer.Body.Close() })
		return answer
	}
	first := open()
	for range maxEventStreams - 1 {
		if answer := open(); answer.StatusCode != 200 {
			t.Fatal(answer.Status)
		}
	}
	over := open()
	var doc api.Error
	if err := json.NewDecoder(over.Body).Decode(&doc); err != nil || over.StatusCode != 503 || doc.Error.Code != 503 || over.Header.Get("Retry-After") == "" {
		t.Errorf("one stream too many: %s, %+v, %v", over.Status, doc, err)
	}
	first.Body.Close()
	for deadline := time.Now().Add(10 * time.Second); open().StatusCode != 200; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the place of a stream that ended stays taken")
		}
	}
}

// A page on the web can give a name of its own to 127.0.0.1, and then read
// what the browser gets from there. Requests for another name are refused.
func TestOtherNamesForLoopback(t *testing.T) {
	for local, hosts := range map[string]map[string]int{
		"127.0.0.1": {"localhost:9754": 200, "127.0.0.1:9754": 200, "[::1]:9754": 200, "LOCALHOST": 200, "": 200, "evil.example:9754": 421},
		"10.0.0.1":  {"node1.example:9754": 200, "10.0.0.1": 200},
	} {
		for host, want := range hosts {
			r := httptest.NewRequest(http.MethodGet, "/livez", nil)
			r.Host = host
			r = r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, &net.TCPAddr{IP: net.ParseIP(local), Port: 9754}))
			w := httptest.NewRecorder()
			sameSite(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})).ServeHTTP(w, r)
			if w.Code != want {
				t.Errorf("Host %q on %s: %d, want %d", host, local, w.Code, want)
			}
		}
	}
}
