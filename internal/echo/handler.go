package echo

import (
	"io"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
)

// NewHandler returns every HTTP route of the server. The answers come from id
// and are counted in m. While ready returns false /readyz says 503 and all
// other routes go on as before, because packets still arrive until every node
// has withdrawn the endpoint.
func NewHandler(id Identity, m *Metrics, ready func() bool) http.Handler {
	h := &handler{id: id, metrics: m, ready: ready}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", h.root)
	mux.HandleFunc("GET /json", h.json)
	mux.HandleFunc("GET /healthz", h.healthz)
	mux.HandleFunc("GET /readyz", h.readyz)
	mux.Handle("GET /metrics", m.handler())
	return mux
}

type handler struct {
	id      Identity
	metrics *Metrics
	ready   func() bool
}

func (h *handler) root(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Vary", "Accept")
	if prefersJSON(r.Header.Values("Accept")) {
		h.json(w, r)
		return
	}
	h.send(w, "text/plain; charset=utf-8", h.answer(r).text())
}

func (h *handler) json(w http.ResponseWriter, r *http.Request) {
	b, err := h.answer(r).json()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	h.send(w, "application/json", b)
}

// answer counts the request before the work, so that a scrape during a slow
// answer already sees it.
func (h *handler) answer(r *http.Request) Answer {
	h.metrics.httpRequests.Inc()
	remote, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		remote = netip.AddrPort{} // not an IP socket; see Answer.Remote
	}
	return h.id.answer(localAddr(r), remote)
}

// send writes one echo answer.
//
// Connection: close is the point of the server rather than a detail of it. The
// kernel chooses an endpoint once per connection, so a client that keeps its
// connection alive gets every answer from one pod and takes a fair Service for
// a broken one. The server has to end the connection, as few clients think of
// it. A cached answer would mislead in the same way, hence no-store.
func (h *handler) send(w http.ResponseWriter, contentType string, body []byte) {
	w.Header().Set("Connection", "close")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Content-Type", contentType)
	// An error means that the client has gone, and nobody is left to tell.
	_, _ = w.Write(body)
}

func (h *handler) healthz(w http.ResponseWriter, _ *http.Request) {
	status(w, http.StatusOK, "ok\n")
}

func (h *handler) readyz(w http.ResponseWriter, _ *http.Request) {
	if !h.ready() {
		status(w, http.StatusServiceUnavailable, "stopping\n")
		return
	}
	status(w, http.StatusOK, "ok\n")
}

func status(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(code)
	// As in send: the client has gone.
	_, _ = io.WriteString(w, text)
}

// localAddr returns the address that the connection was accepted on, which on a
// wildcard listener only the connection knows. It is zero for a request that
// did not come through an IP socket.
func localAddr(r *http.Request) netip.AddrPort {
	addr, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	return addr.AddrPort()
}

// prefersJSON reports whether the values of the Accept header ask for JSON
// rather than text. Plain text is for those who state no preference, such as
// curl with its */*; who names JSON and likes nothing better gets JSON, even if
// text/plain stands beside it with the same weight. A header that accepts
// neither gets text too, since an answer helps more than 406 here.
func prefersJSON(accept []string) bool {
	var json, text preference
	for r := range strings.SplitSeq(strings.Join(accept, ","), ",") {
		mediaRange, params, err := mime.ParseMediaType(r)
		if err != nil {
			continue
		}
		q := 1.0
		if s, ok := params["q"]; ok {
			q, err = strconv.ParseFloat(s, 64)
			if err != nil || !(q >= 0 && q <= 1) { // written so that NaN fails too
				continue
			}
		}
		json.consider("application/json", mediaRange, q)
		text.consider("text/plain", mediaRange, q)
	}
	return json.specificity > wildcard && json.q > 0 && json.q >= text.q
}

// How closely a media range names a type; RFC 9110 section 12.5.1 lets the
// closest range decide, whatever the order.
const (
	unnamed  = iota
	wildcard // */*
	subtypes // application/*
	exact    // application/json
)

// preference is the weight of one media type in an Accept header.
type preference struct {
	specificity int
	q           float64 // 0 to 1
}

func (p *preference) consider(mediaType, mediaRange string, q float64) {
	major, _, _ := strings.Cut(mediaType, "/")
	specificity := unnamed
	switch mediaRange {
	case mediaType:
		specificity = exact
	case major + "/*":
		specificity = subtypes
	case "*/*":
		specificity = wildcard
	}
	if specificity > p.specificity {
		*p = preference{specificity, q}
	}
}
