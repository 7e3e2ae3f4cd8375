package cert

import (
	"bytes"
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	certutil "k8s.io/client-go/util/cert"
)

// pair is the PEM of a certificate for a name, and of its key.
type pair struct{ chain, key []byte }

func newPair(t *testing.T, name string) pair {
	t.Helper()
	chain, key, err := certutil.GenerateSelfSignedCertKey(name, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return pair{chain, key}
}

// handshake shakes hands with a server over a pipe, and returns for whom its
// certificate is.
func handshake(t *testing.T, server, client *tls.Config) (string, error) {
	t.Helper()
	far, near := net.Pipe()
	defer near.Close()
	go func() {
		defer far.Close()
		_ = tls.Server(far, server).HandshakeContext(context.Background())
	}()
	conn := tls.Client(near, client)
	if err := conn.Handshake(); err != nil {
		return "", err
	}
	state := conn.ConnectionState()
	if state.NegotiatedProtocol != "http/1.1" {
		t.Errorf("protocol %q", state.NegotiatedProtocol)
	}
	return state.PeerCertificates[0].DNSNames[0], nil
}

// journal keeps what is logged until it is taken.
type journal struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.Write(p)
}

func (j *journal) take() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	defer j.text.Reset()
	return j.text.String()
}

// anyone is a client that takes every certificate.
func anyone() *tls.Config {
	return &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2", "http/1.1"}}
}

func TestSelfSigned(t *testing.T) {
	made, err := SelfSigned("node1")
	if err != nil {
		t.Fatal(err)
	}
	server := ServerConfig(func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return made, nil })
	if name, err := handshake(t, server, anyone()); err != nil || name != "node1" {
		t.Errorf("a certificate for %q, %v", name, err)
	}
	old := anyone()
	old.MinVersion, old.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	if _, err := handshake(t, server, old); err == nil {
		t.Error("TLS 1.1 is spoken")
	}
	careful := anyone()
	careful.InsecureSkipVerify, careful.ServerName = false, "node1"
	if _, err := handshake(t, server, careful); err == nil {
		t.Error("a client verified a certificate that nobody vouches for")
	}
}

// TestReload replaces the files of a running server: by a new pair, one file
// after the other, by none, by garbage, and by links, as the kubelet does.
func TestReload(t *testing.T) {
	first, second, third := newPair(t, "first"), newPair(t, "second"), newPair(t, "third")
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	write := func(file string, data []byte) {
		t.Helper()
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		var said journal
		log := slog.New(slog.NewTextHandler(&said, nil))
		if _, err := Load(certFile, keyFile, log); err == nil || !strings.Contains(err.Error(), certFile) {
			t.Errorf("no file: %v", err)
		}
		write(certFile, first.chain)
		write(keyFile, second.key)
		if _, err := Load(certFile, keyFile, log); err == nil || !strings.Contains(err.Error(), "private key does not match") {
			t.Errorf("the key of another: %v", err)
		}
		write(keyFile, first.key)
		files, err := Load(certFile, keyFile, log)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go files.Run(ctx)
		// shows checks which certificate a client sees one check later, and what
		// was logged meanwhile.
		shows := func(want, wantSaid string) {
			t.Helper()
			time.Sleep(checkEvery)
			synctest.Wait()
			if name, err := handshake(t, ServerConfig(files.Certificate), anyone()); err != nil || name != want {
				t.Errorf("certificate for %q, want %q; %v", name, want, err)
			}
			if got := said.take(); !strings.Contains(got, wantSaid) || (wantSaid == "") != (got == "") {
				t.Errorf("logged %q, want %q", got, wantSaid)
			}
		}
		shows("first", "")
		write(certFile, second.chain)
		shows("first", "private key does not match")
		shows("first", "") // once is enough
		write(keyFile, second.key)
		shows("second", "certificate reloaded")
		if err := os.Remove(keyFile); err != nil {
			t.Fatal(err)
		}
		shows("second", "no such file")
		write(keyFile, []byte("garbage"))
		shows("second", "failed to find any PEM data")
		write(keyFile, second.key)
		shows("second", "certificate reloaded")

		other := t.TempDir()
		for file, data := range map[string][]byte{"tls.crt": third.chain, "tls.key": third.key} {
			write(filepath.Join(other, file), data)
			if err := os.Remove(filepath.Join(dir, file)); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(filepath.Join(other, file), filepath.Join(dir, file)); err != nil {
				t.Fatal(err)
			}
		}
		shows("third", "certificate reloaded")
		cancel()
	})
}
