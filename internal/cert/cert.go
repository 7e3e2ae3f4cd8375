package cert

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"time"

	certutil "k8s.io/client-go/util/cert"
)

// checkEvery is how often files are looked at. The kubelet itself takes up to a
// minute or so to bring a changed Secret into a pod.
const checkEvery = 10 * time.Second

// ServerConfig returns what a server speaks: TLS 1.2 at least, with the standard
// library's choice of ciphers, and HTTP/1.1 alone. There a connection is one
// request at a time, so that a bound on connections bounds the requests.
func ServerConfig(certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"http/1.1"}, GetCertificate: certificate}
}

// SelfSigned makes a certificate for a host, with a key that never leaves the
// memory of this process. Nobody can verify it: it keeps listeners out, not an
// impostor.
func SelfSigned(host string) (*tls.Certificate, error) {
	const longerThanAnyProcess = 10 * 365 * 24 * time.Hour
	chain, key, err := certutil.GenerateSelfSignedCertKeyWithOptions(certutil.SelfSignedCertKeyOptions{Host: host, MaxAge: longerThanAnyProcess})
	if err != nil {
		return nil, fmt.Errorf("making a certificate: %w", err)
	}
	pair, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return nil, fmt.Errorf("making a certificate: %w", err)
	}
	return &pair, nil
}

// Files is a certificate and its key in PEM files, reloaded when they change.
type Files struct {
	certFile, keyFile string
	log               *slog.Logger

	chain, key []byte // of the pair in use; Run's own
	current    atomic.Pointer[tls.Certificate]
}

// Load reads the certificate, followed by those that lead to its authority if
// there are any, and the key. Run keeps them fresh.
func Load(certFile, keyFile string, log *slog.Logger) (*Files, error) {
	f := &Files{certFile: certFile, keyFile: keyFile, log: log}
	if _, err := f.reload(); err != nil {
		return nil, err
	}
	return f, nil
}

// Certificate returns the last pair that was whole, in the form of
// [tls.Config.GetCertificate].
func (f *Files) Certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return f.current.Load(), nil
}

// Run looks at the files until the context ends. While they cannot be read, or
// do not fit each other because only one is new, the last good pair stays.
func (f *Files) Run(ctx context.Context) {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	said := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		changed, err := f.reload()
		switch {
		case err != nil && err.Error() != said:
			said = err.Error()
			f.log.Warn("the last good certificate stays in use", "error", err)
		case err == nil && (changed || said != ""):
			said = ""
			f.log.Info("certificate reloaded", "file", f.certFile)
		}
	}
}

// reload reads both files, and takes them into use if they are another pair.
func (f *Files) reload() (changed bool, err error) {
	chain, err := os.ReadFile(f.certFile)
	if err != nil {
		return false, err
	}
	key, err := os.ReadFile(f.keyFile)
	if err != nil {
		return false, err
	}
	if bytes.Equal(chain, f.chain) && bytes.Equal(key, f.key) {
		return false, nil
	}
	pair, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return false, fmt.Errorf("%s and %s: %w", f.certFile, f.keyFile, err)
	}
	f.chain, f.key = chain, key
	f.current.Store(&pair)
	return true, nil
}
