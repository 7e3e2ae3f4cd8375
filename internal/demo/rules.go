package demo

import (
	"bytes"
	"net/netip"
	"strings"

	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/netfilter"
)

// The addresses of the box.
var (
	nodeAddr     = netip.MustParseAddr("10.146.0.2")
	outsideAddr  = netip.MustParseAddr("10.146.0.100")
	podCIDR      = netip.MustParsePrefix("10.52.0.0/16")
	balancerAddr = netip.MustParseAddr("203.0.113.10")
)

// echoPort is where the pods listen.
const echoPort = 8080

// pod is a pod of the box.
type pod struct {
	name string
	addr netip.Addr
}

func pods() []pod {
	return []pod{
		{"go-app-1", netip.MustParseAddr("10.52.1.4")},
		{"go-app-2", netip.MustParseAddr("10.52.1.5")},
		{"go-app-3", netip.MustParseAddr("10.52.1.6")},
		{"web-1", netip.MustParseAddr("10.52.1.11")},
		{"web-2", netip.MustParseAddr("10.52.1.12")},
		{"web-3", netip.MustParseAddr("10.52.1.13")},
		{clientPod, netip.MustParseAddr("10.52.1.20")},
	}
}

// clientPod is the pod that only connects.
const clientPod = "client"

// endpoints are the pods whose name begins so. With onlyFirst, the others are
// said to be on other nodes.
func endpoints(prefix string, onlyFirst bool) []kubeproxy.Endpoint {
	var out []kubeproxy.Endpoint
	for _, p := range pods() {
		if strings.HasPrefix(p.name, prefix) {
			out = append(out, kubeproxy.Endpoint{Addr: netip.AddrPortFrom(p.addr, echoPort), Local: !onlyFirst || len(out) == 0})
		}
	}
	return out
}

// broken is the Service whose last rule is taken away.
var broken = chain.ServicePort{Namespace: "shop", Name: "broken", Protocol: netfilter.TCP}

// Services are the Services of the demo.
func Services() []kubeproxy.Service {
	return []kubeproxy.Service{
		{
			Namespace: "default", Name: "go-app", ClusterIP: netip.MustParseAddr("10.56.11.169"), PortNumber: 80, NodePort: 30679,
			LoadBalancerIPs: []netip.Addr{balancerAddr}, Endpoints: endpoints("go-app-", false),
		},
		{
			Namespace: "shop", Name: "sticky", ClusterIP: netip.MustParseAddr("10.56.0.21"), PortNumber: 80,
			AffinitySeconds: 10, Endpoints: endpoints("web-", false),
		},
		{
			Namespace: "shop", Name: "local", ClusterIP: netip.MustParseAddr("10.56.0.22"), PortNumber: 80, NodePort: 30081,
			ExternalLocal: true, Endpoints: endpoints("web-", true),
		},
		{Namespace: "shop", Name: "empty", ClusterIP: netip.MustParseAddr("10.56.0.23"), PortNumber: 80},
		{
			Namespace: broken.Namespace, Name: broken.Name, ClusterIP: netip.MustParseAddr("10.56.0.24"), PortNumber: 80,
			Endpoints: endpoints("web-", false),
		},
	}
}

// Rules returns the rules of the demo in the form of iptables-save. The last
// rule of shop/broken is missing, as after a hand that slipped: a third of its
// connections reach no pod.
func Rules() (string, error) {
	var b bytes.Buffer
	if err := kubeproxy.Write(&b, kubeproxy.Config{PodCIDR: podCIDR, NodeIP: nodeAddr}, Services()); err != nil {
		return "", err
	}
	lines := strings.SplitAfter(b.String(), "\n")
	prefix := "-A " + chain.ServiceChain("KUBE-SVC-", broken) + " "
	for i := len(lines) - 1; i >= 0; i-- {
		if strings.HasPrefix(lines[i], prefix) {
			lines = append(lines[:i], lines[i+1:]...)
			break
		}
	}
	return strings.Join(lines, ""), nil
}
