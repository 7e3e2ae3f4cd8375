// Package web serves the current snapshot over HTTP: the JSON documents of
// package api, the metrics, and a page. No request reads a rule of the kernel.
package web

import (
	"bytes"
	"compress/gzip"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/natlens/natlens/internal/api"
	"github.com/natlens/natlens/internal/snapshot"
)

//go:embed static
var static embed.FS

//go:embed openapi.json
var openAPI []byte

// Source gives the snapshots to serve.
type Source interface {
	Snapshot() *snapshot.Snapshot // nil before the first reading worked
	Subscribe() (news <-chan struct{}, end func())
}

// Config is what a handler serves.
type Config struct {
	Source  Source
	Asked   func() // called when somebody has asked for a snapshot; nil for nobody to tell
	Metrics http.Handler
	Version string
	Log     *slog.Logger
}

// maxTraces bounds the traces that are walked at once; others wait.
const maxTraces = 2

// maxEventStreams bounds the open /api/v1/events requests.
const maxEventStreams = 64

// server holds what the handlers share.
type server struct {
	Config
	streams chan struct{}
	tracing chan struct{}
}

// NewHandler returns the handler of all routes.
func NewHandler(cfg Config) http.Handler {
	s := &server{Config: cfg, streams: make(chan struct{}, maxEventStreams), tracing: make(chan struct{}, maxTraces)}
	files, err := fs.Sub(static, "static")
	if err != nil {
		panic(err) // the directory is embedded above
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /api/v1/services", s.snapshot(s.services))
	mux.HandleFunc("GET /api/v1/services/{namespace}/{name}", s.snapshot(s.service))
	mux.HandleFunc("GET /api/v1/trace", s.snapshot(s.trace))
	mux.HandleFunc("GET /api/v1/findings", s.snapshot(s.findings))
	mux.HandleFunc("GET /api/v1/chains/{table}/{chain}", s.snapshot(s.chain))
	mux.HandleFunc("GET /api/v1/echo", s.snapshot(s.echo))
	mux.HandleFunc("GET /api/v1/events", s.events)
	mux.Handle("GET /metrics", cfg.Metrics)
	mux.HandleFunc("GET /livez", s.alive)
	mux.HandleFunc("GET /healthz", s.alive)
	mux.HandleFunc("GET /readyz", s.ready)
	mux.HandleFunc("GET /version", s.version)
	mux.HandleFunc("GET /openapi.json", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Write(openAPI)
	})
	// One by one: a file server would list the directory, and answer 404 its own way.
	assets := page(http.StripPrefix("/static", http.FileServerFS(files)))
	mux.Handle("GET /{$}", page(http.FileServerFS(files)))
	mux.Handle("GET /static/app.js", assets)
	mux.Handle("GET /static/style.css", assets)
	mux.HandleFunc("GET /", func(w http.ResponseWriter, r *http.Request) {
		fail(w, http.StatusNotFound, "no such path: "+r.URL.Path)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Allow", "GET, HEAD")
		fail(w, http.StatusMethodNotAllowed, "only GET is allowed")
	})
	return sameSite(mux)
}

// sameSite refuses requests that a web page elsewhere can make a browser send
// to the loopback listener, by giving a name of its own to 127.0.0.1.
func sameSite(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if name, _, err := net.SplitHostPort(host); err == nil {
			host = name
		}
		host = strings.Trim(host, "[]")
		local, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
		if _, err := netip.ParseAddr(host); err != nil && host != "" && !strings.EqualFold(host, "localhost") && local != nil && local.IP.IsLoopback() {
			fail(w, http.StatusMisdirectedRequest, fmt.Sprintf("the loopback listener answers as localhost or by its address, not as %q", host))
			return
		}
		next.ServeHTTP(w, r)
	})
}

// page adds the headers that keep the page from loading or sending anything
// elsewhere, or being framed.
func page(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cache-Control", "no-cache")
		next.ServeHTTP(w, r)
	})
}

// snapshot calls a handler with the current snapshot, and answers 503 while
// there is none.
func (s *server) snapshot(next func(http.ResponseWriter, *http.Request, *snapshot.Snapshot)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		snap := s.Source.Snapshot()
		if snap == nil {
			w.Header().Set("Retry-After", "1")
			fail(w, http.StatusServiceUnavailable, "the node's rules have not been read yet; the agent's log says why")
			return
		}
		if s.Asked != nil {
			s.Asked()
		}
		next(w, r, snap)
	}
}

func (s *server) services(w http.ResponseWriter, r *http.Request, snap *snapshot.Snapshot) {
	q := r.URL.Query()
	f := api.Filter{Namespace: q.Get("namespace"), Name: q.Get("name"), Port: q.Get("port")}
	s.answer(w, r, snap, func() (any, error) { return api.ServicesOf(snap, f), nil })
}

func (s *server) service(w http.ResponseWriter, r *http.Request, snap *snapshot.Snapshot) {
	f := api.Filter{Namespace: r.PathValue("namespace"), Name: r.PathValue("name"), Port: r.URL.Query().Get("port")}
	s.answer(w, r, snap, func() (any, error) { return api.ServiceOf(snap, f) })
}

func (s *server) trace(w http.ResponseWriter, r *http.Request, snap *snapshot.Snapshot) {
	q := r.URL.Query()
	query, err := api.ParseQuery(q.Get("to"), q.Get("protocol"), q.Get("from"))
	if err != nil {
		fail(w, http.StatusBadRequest, err.Error())
		return
	}
	select { // a trace through thousands of rules is work
	case s.tracing <- struct{}{}:
		defer func() { <-s.tracing }()
	case <-r.Context().Done():
		return
	}
	s.answer(w, r, snap, func() (any, error) { return api.TraceOf(snap, query) })
}

func (s *server) findings(w http.ResponseWriter, r *http.Request, snap *snapshot.Snapshot) {
	s.answer(w, r, snap, func() (any, error) { return api.FindingsOf(snap), nil })
}

func (s *server) chain(w http.ResponseWriter, r *http.Request, snap *snapshot.Snapshot) {
	s.answer(w, r, snap, func() (any, error) { return api.ChainOf(snap, r.PathValue("table"), r.PathValue("chain")) })
}

func (s *server) echo(w http.ResponseWriter, r *http.Request, snap *snapshot.Snapshot) {
	s.answer(w, r, snap, func() (any, error) { return api.EchoOf(snap), nil })
}

// answer writes a document as JSON. Two answers to one request have the same
// ETag exactly while they would be the same.
func (s *server) answer(w http.ResponseWriter, r *http.Request, snap *snapshot.Snapshot, make func() (any, error)) {
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Vary", "Accept-Encoding")
	h.Set("Cache-Control", "no-cache")
	// A stale snapshot keeps its time, while the reason may become another.
	probed := uint64(0)
	if snap.Echo != nil {
		probed = snap.Echo.Number
	}
	tag := fmt.Sprintf(`W/"%x-%x-%x-%t-%x"`, snap.Time.UnixNano(), snap.Version, probed, snap.Stale, crc32.ChecksumIEEE([]byte(snap.Error)))
	h.Set("ETag", tag)
	match := r.Header.Get("If-None-Match")
	if strings.Contains(match, tag) {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	doc, err := make()
	if err != nil {
		h.Del("ETag")
		code := http.StatusBadRequest
		if errors.Is(err, api.ErrNotFound) {
			code = http.StatusNotFound
		}
		fail(w, code, err.Error())
		return
	}
	if strings.TrimSpace(match) == "*" { // any, of what is there
		w.WriteHeader(http.StatusNotModified)
		return
	}
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(doc); err != nil {
		s.Log.Error("encoding an answer", "path", r.URL.Path, "error", err)
		fail(w, http.StatusInternalServerError, "the answer could not be encoded")
		return
	}
	const worthwhile = 1 << 10 // bytes: less is not worth compressing
	if body.Len() < worthwhile || !acceptsGzip(r.Header.Get("Accept-Encoding")) {
		w.Write(body.Bytes())
		return
	}
	h.Set("Content-Encoding", "gzip")
	z := gzip.NewWriter(w)
	_, _ = z.Write(body.Bytes()) // a client that went away
	z.Close()
}

// acceptsGzip reads an Accept-Encoding header: gzip by name, or else "*", unless
// its weight is 0 (RFC 9110, 12.5.3).
func acceptsGzip(header string) bool {
	rest := false // what "*" says
	for coding := range strings.SplitSeq(header, ",") {
		name, weight, _ := strings.Cut(coding, ";")
		_, q, weighed := strings.Cut(weight, "=")
		f, err := strconv.ParseFloat(strings.TrimSpace(q), 64)
		accepted := !weighed || err == nil && f > 0
		switch strings.ToLower(strings.TrimSpace(name)) {
		case "gzip":
			return accepted
		case "*":
			rest = accepted
		}
	}
	return rest
}

// events streams one server-sent event per snapshot that says something new.
func (s *server) events(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	if r.Method == http.MethodHead { // which would wait for the end of the stream
		w.Header().Set("Content-Type", "text/event-stream")
		return
	}
	select {
	case s.streams <- struct{}{}:
		defer func() { <-s.streams }()
	default:
		w.Header().Set("Retry-After", "10")
		fail(w, http.StatusServiceUnavailable, fmt.Sprintf("there are already %d event streams", maxEventStreams))
		return
	}
	control := http.NewResponseController(w)
	w.Header().Set("Content-Type", "text/event-stream")
	news, end := s.Source.Subscribe()
	defer end()
	const beat = 20 * time.Second // keeps proxies from closing an idle stream
	tick := time.NewTicker(beat)
	defer tick.Stop()
	if snap := s.Source.Snapshot(); snap != nil {
		writeEvent(w, snap)
	}
	for {
		// The stream outlives the server's time limit, a client that stopped
		// reading does not.
		_ = control.SetWriteDeadline(time.Now().Add(2 * beat))
		if err := control.Flush(); err != nil {
			return
		}
		select {
		case <-r.Context().Done():
			return
		case <-news:
			if snap := s.Source.Snapshot(); snap != nil {
				writeEvent(w, snap)
			}
		case <-tick.C:
			fmt.Fprint(w, ": still here\n\n")
		}
	}
}

func writeEvent(w http.ResponseWriter, snap *snapshot.Snapshot) {
	data, err := json.Marshal(api.HeaderOf(snap))
	if err != nil {
		return
	}
	fmt.Fprintf(w, "id: %d\nevent: snapshot\ndata: %s\n\n", snap.Version, data)
}

func (s *server) alive(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") }

// ready says whether there is something to serve; a stale view is. Everybody may
// ask, and a reason can quote a rule, so it is left to the documents.
func (s *server) ready(w http.ResponseWriter, _ *http.Request) {
	snap := s.Source.Snapshot()
	switch {
	case snap == nil:
		http.Error(w, "the node's rules have not been read yet", http.StatusServiceUnavailable)
	case snap.Stale:
		fmt.Fprintln(w, "ok, but stale: /api/v1/services says why")
	default:
		fmt.Fprintln(w, "ok")
	}
}

func (s *server) version(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]string{"version": s.Version})
}

func fail(w http.ResponseWriter, code int, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(api.Error{Error: api.ErrorDetail{Code: code, Message: message}})
}
