package chain

import (
	"cmp"
	"crypto/sha256"
	"encoding/base32"
	"net/netip"
	"strings"

	"github.com/natlens/natlens/pkg/netfilter"
)

// ServicePort names one port of a Service.
type ServicePort struct {
	Namespace string
	Name      string
	Port      string // the port's name, "" when it has none
	Protocol  netfilter.Protocol
}

// String returns "namespace/name" or "namespace/name:port", as kube-proxy
// writes it into comments (ServicePortName.String in pkg/proxy/types.go).
func (s ServicePort) String() string {
	if s.Port == "" {
		return s.Namespace + "/" + s.Name
	}
	return s.Namespace + "/" + s.Name + ":" + s.Port
}

// Compare orders Service ports as [Programmed] lists them.
func (s ServicePort) Compare(o ServicePort) int {
	return cmp.Or(cmp.Compare(s.Namespace, o.Namespace), cmp.Compare(s.Name, o.Name), cmp.Compare(s.Port, o.Port), cmp.Compare(s.Protocol, o.Protocol))
}

// hash is the part of a chain's name behind its prefix
// (portProtoHash in pkg/proxy/iptables/proxier.go; the same from v1.20 on).
func (s ServicePort) hash(more string) string {
	sum := sha256.Sum256([]byte(s.String() + strings.ToLower(s.Protocol.String()) + more))
	return base32.StdEncoding.EncodeToString(sum[:])[:16]
}

// ServiceChain returns the name of one of the chains that kube-proxy writes for
// a Service port; the prefix is such as "KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-",
// "KUBE-FW-" or "KUBE-XLB-".
func ServiceChain(prefix string, s ServicePort) string { return prefix + s.hash("") }

// EndpointChain returns the name of the KUBE-SEP chain that kube-proxy writes
// for an endpoint of a Service port.
func EndpointChain(s ServicePort, endpoint netip.AddrPort) string {
	return "KUBE-SEP-" + s.hash(endpoint.String())
}

// parseServicePort reads "namespace/name" or "namespace/name:port" at the
// beginning of a comment.
func parseServicePort(word string, p netfilter.Protocol) (ServicePort, bool) {
	ns, rest, ok := strings.Cut(word, "/")
	name, port, _ := strings.Cut(rest, ":")
	if !ok || ns == "" || name == "" || strings.ContainsAny(rest, "/>") {
		return ServicePort{}, false
	}
	return ServicePort{Namespace: ns, Name: name, Port: port, Protocol: p}, true
}
