package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	certutil "k8s.io/client-go/util/cert"

	"github.com/natlens/natlens/internal/access"
	"github.com/natlens/natlens/internal/web"
)

// reviewer is an API server that knows one token, whose owner may get /metrics.
func reviewer(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	switch {
	case r.Header.Get("Authorization") != "Bearer agent's own":
		w.WriteHeader(http.StatusUnauthorized)
	case strings.HasSuffix(r.URL.Path, "/tokenreviews"):
		var review authenticationv1.TokenReview
		_ = json.NewDecoder(r.Body).Decode(&review)
		review.Status.Authenticated = review.Spec.Token == "prom"
		review.Status.User.Username = "prometheus"
		_ = json.NewEncoder(w).Encode(review)
	default:
		var review authorizationv1.SubjectAccessReview
		_ = json.NewDecoder(r.Body).Decode(&review)
		review.Status.Allowed = review.Spec.User == "prometheus" && review.Spec.NonResourceAttributes.Path == "/metrics"
		_ = json.NewEncoder(w).Encode(review)
	}
}

// TestSecureListen runs the agent as in a cluster, with both listeners, a
// certificate from files, and an API server behind TLS.
func TestSecureListen(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(reviewer))
	defer server.Close()
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	authority := write("ca.crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
	kubeconfig := write("kubeconfig", fmt.Appendf(nil, `
apiVersion: v1
kind: Config
current-context: it
contexts: [{name: it, context: {cluster: it, user: it}}]
clusters: [{name: it, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: it, user: {token: "agent's own"}}]
`, server.URL, authority))
	chain, key, err := certutil.GenerateSelfSignedCertKey("node1.example", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	address := func() string {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		return ln.Addr().String()
	}
	plain, secure := address(), address()
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan string, 1)
	go func() {
		var stderr bytes.Buffer
		code := run(ctx, []string{
			"serve", "-f", filepath.Join(root(t), "testdata/captures/v1.35.4-iptables.save"), "--listen", plain, "--secure-listen", secure,
			"--tls-cert-file", write("tls.crt", chain), "--tls-private-key-file", write("tls.key", key), "--kubeconfig", kubeconfig,
		}, nil, io.Discard, &stderr)
		ended <- fmt.Sprint(code, " ", stderr.String())
	}()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{ServerName: "node1.example"}, ForceAttemptHTTP2: true}}
	pool, err := certutil.NewPoolFromBytes(chain)
	if err != nil {
		t.Fatal(err)
	}
	client.Transport.(*http.Transport).TLSClientConfig.RootCAs = pool
	get := func(url, token string) (*http.Response, string, error) {
		req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		resp, err := client.Do(req)
		if err != nil {
			return nil, "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return resp, string(body), err
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		resp, _, err := get("https://"+secure+"/readyz", "")
		if err == nil && resp.StatusCode == 200 {
			break
		}
		select {
		case said := <-ended:
			t.Fatalf("the agent ended: %s", said)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("not ready: %v", err)
		}
	}
	for _, test := range []struct {
		url, token string
		code       int
		body       string
	}{
		{"https://" + secure + "/livez", "", 200, "ok"},
		{"https://" + secure + "/metrics", "prom", 200, "natlens_up 1"},
		{"https://" + secure + "/metrics", "", 401, `{"error":{"code":401,"message":"a bearer token is needed`},
		{"https://" + secure + "/metrics", "guess", 401, `{"error":{"code":401,"message":"the token is not`},
		{"https://" + secure + "/api/v1/services", "prom", 403, `{"error":{"code":403,"message":"\"prometheus\" may not get the nonResourceURL /natlens/api/v1/services`},
		{"https://" + secure + "/", "", 401, `"code":401`},
		{"http://" + secure + "/metrics", "prom", 400, "HTTP request to an HTTPS server"},
		{"http://" + plain + "/api/v1/services/default/go-app", "", 200, `"go-app"`},
		{"http://" + plain + "/metrics", "", 200, "natlens_up 1"},
	} {
		resp, body, err := get(test.url, test.token)
		if err != nil || resp.StatusCode != test.code || !strings.Contains(body, test.body) {
			t.Errorf("%s with token %q: %v, %.200s, want %d and %s; %v", test.url, test.token, resp, body, test.code, test.body, err)
		} else if strings.HasPrefix(test.url, "https") && (resp.TLS.Version < tls.VersionTLS12 || resp.ProtoMajor != 1) {
			t.Errorf("%s: TLS %x, HTTP/%d", test.url, resp.TLS.Version, resp.ProtoMajor)
		}
	}

	// The API server goes: who was in stays, nobody else comes in, and the
	// loopback listener does not care.
	server.Close()
	for _, test := range []struct {
		url, token string
		code       int
	}{
		{"https://" + secure + "/metrics", "prom", 200},
		{"https://" + secure + "/metrics", "late", 503},
		{"https://" + secure + "/version", "prom", 503},
		{"https://" + secure + "/metrics", "", 401},
		{"https://" + secure + "/livez", "", 200},
		{"http://" + plain + "/api/v1/services", "", 200},
	} {
		resp, body, err := get(test.url, test.token)
		if err != nil || resp.StatusCode != test.code {
			t.Errorf("without an API server, %s with token %q: %v, %s, want %d; %v", test.url, test.token, resp, body, test.code, err)
		}
	}
	stop()
	said := <-ended
	if !strings.HasPrefix(said, "0 ") || !strings.Contains(said, "nobody new is let in over the network") || strings.Contains(said, "agent's own") || strings.Contains(said, "handshake") {
		t.Errorf("the agent said: %s", said)
	}
}

// pipes is a listener of connections within the process, whose time may be fake.
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) {
	conn, ok := <-p
	if !ok {
		return nil, net.ErrClosed
	}
	return conn, nil
}

func (p pipes) Close() error   { close(p); return nil }
func (p pipes) Addr() net.Addr { return &net.UnixAddr{} }

// TestSlowClients checks how long those hold a connection who say nothing, say
// it slowly, or have been refused.
func TestSlowClients(t *testing.T) {
	for _, test := range []struct {
		name, says string
		atMost     time.Duration
	}{
		{"says nothing", "", 5 * time.Second},
		{"half a header", "GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", 5 * time.Second},
		{"half a body", "GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc", 10 * time.Second},
		{"refused", "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", time.Second},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ln := make(pipes)
				ctx, stop := context.WithCancel(t.Context())
				done := make(chan error, 1)
				nothing := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { _, _ = io.ReadAll(r.Body) })
				handler := web.Authorize(nothing, func(context.Context, string, string) error { return access.ErrUnauthenticated })
				go func() { done <- serveUntil(ctx, ln, handler, slog.New(slog.DiscardHandler)) }()
				near, far := net.Pipe()
				ln <- far
				start := time.Now()
				go io.WriteString(near, test.says)
				if _, err := io.Copy(io.Discard, near); err != nil {
					t.Error(err)
				}
				if took := time.Since(start); took > test.atMost {
					t.Errorf("the connection was held for %v, want at most %v", took, test.atMost)
				}
				near.Close()
				stop()
				if err := <-done; err != nil {
					t.Error(err)
				}
			})
		})
	}
}
