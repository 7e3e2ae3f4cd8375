package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"

	"github.com/spf13/pflag"
	"golang.org/x/net/netutil"

	"github.com/natlens/natlens/internal/access"
	"github.com/natlens/natlens/internal/cert"
)

// maxConnections bounds the open connections from the network, also of those
// who may not read: each costs some 50 kB. More wait in the kernel's queue.
const maxConnections = 256

// secureOptions are the flags of serve about the network.
type secureOptions struct {
	listen   string
	certFile string
	keyFile  string
}

func (o *secureOptions) addFlags(fs *pflag.FlagSet) {
	fs.StringVar(&o.listen, "secure-listen", "", "`ADDRESS:PORT` to serve on for the network, with TLS, to whom Kubernetes lets; the port by custom is 9753")
	fs.StringVar(&o.certFile, "tls-cert-file", "", "PEM `FILE` with the certificate for --secure-listen, reloaded when it changes; without it one is made at start, which nobody can verify")
	fs.StringVar(&o.keyFile, "tls-private-key-file", "", "PEM `FILE` with the key of --tls-cert-file")
}

func (o *secureOptions) check() error {
	if o.listen == "" {
		if o.certFile != "" || o.keyFile != "" {
			return usageError{errors.New("--tls-cert-file and --tls-private-key-file are for --secure-listen, which is missing")}
		}
		return nil
	}
	if (o.certFile == "") != (o.keyFile == "") {
		return usageError{errors.New("--tls-cert-file and --tls-private-key-file go together")}
	}
	return checkListen("--secure-listen", o.listen)
}

// secureListener accepts TLS connections from the network.
type secureListener struct {
	net.Listener
	gate  *access.Gate
	files *cert.Files // nil for a certificate that was made at start
}

// open starts to listen; node is the name for a certificate made at start.
func (o *secureOptions) open(kube *kubeOptions, node string, log *slog.Logger) (*secureListener, error) {
	config, err := kube.config()
	if err != nil {
		return nil, fmt.Errorf("--secure-listen has to ask the API server who may read: %w", err)
	}
	gate, err := access.New(config, log)
	if err != nil {
		return nil, err
	}
	l := &secureListener{gate: gate}
	var certificate func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	if o.certFile != "" {
		if l.files, err = cert.Load(o.certFile, o.keyFile, log); err != nil {
			return nil, err
		}
		certificate = l.files.Certificate
	} else {
		made, err := cert.SelfSigned(node)
		if err != nil {
			return nil, err
		}
		certificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return made, nil }
	}
	ln, err := net.Listen("tcp", o.listen)
	if err != nil {
		return nil, fmt.Errorf("%w: choose another with --secure-listen", err)
	}
	l.Listener = tls.NewListener(netutil.LimitListener(ln, maxConnections), cert.ServerConfig(certificate))
	return l, nil
}

// keepCertificate reloads the certificate until the context ends.
func (l *secureListener) keepCertificate(ctx context.Context) {
	if l.files != nil {
		l.files.Run(ctx)
	}
}
