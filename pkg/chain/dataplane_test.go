package chain_test

import (
	"strings"
	"testing"

	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
)

// Who handles Services where these rules do not, or do not alone.
func TestDataplane(t *testing.T) {
	const (
		kubelet = ":KUBE-KUBELET-CANARY - [0:0]\n:KUBE-FIREWALL - [0:0]\n"
		empty   = kubelet + ":KUBE-SERVICES - [0:0]\n-A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\n"
		service = empty + ":KUBE-SVC-AAAAAAAAAAAAAAAA - [0:0]\n:KUBE-SEP-AAAAAAAAAAAAAAAA - [0:0]\n" +
			"-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m comment --comment \"default/app cluster IP\" -m tcp --dport 80 -j KUBE-SVC-AAAAAAAAAAAAAAAA\n" +
			"-A KUBE-SVC-AAAAAAAAAAAAAAAA -j KUBE-SEP-AAAAAAAAAAAAAAAA\n-A KUBE-SEP-AAAAAAAAAAAAAAAA -p tcp -m tcp -j DNAT --to-destination 10.0.0.1:80\n"
	)
	for _, c := range []struct {
		name, rules string
		links       []string
		severity    chain.Severity // "" for no finding
		says        string
	}{
		{"kubelet alone", kubelet, nil, chain.Error, "only kubelet's chains"},
		{"kube-proxy without Services", empty, nil, chain.Error, "hold no Service"},
		{"ipvs by its chain", empty + ":KUBE-NODE-PORT - [0:0]\n", nil, chain.Warning, "ipvs mode"},
		{"ipvs by its interface", empty, []string{"kube-ipvs0"}, chain.Warning, "ipvs mode"},
		{"Cilium by its chains", kubelet + ":CILIUM_POST_nat - [0:0]\n", nil, chain.Warning, "Cilium handles"},
		{"Cilium without chains", kubelet, []string{"cilium_host"}, chain.Warning, "Cilium handles"},
		{"Calico, perhaps in eBPF", kubelet + ":cali-PREROUTING - [0:0]\n", nil, chain.Warning, "probably"},
		{"Calico in eBPF", empty + ":cali-PREROUTING - [0:0]\n", []string{"bpfin.cali"}, chain.Warning, "Calico handles"},
		{"kube-router", kubelet, []string{"kube-dummy-if"}, chain.Warning, "kube-router handles"},
		{"kube-router's policies beside kube-proxy", empty + ":KUBE-ROUTER-INPUT - [0:0]\n", nil, chain.Error, "hold no Service"},
		{"OVN-Kubernetes", kubelet, []string{"ovn-k8s-mp0"}, chain.Warning, "OVN-Kubernetes handles"},
		{"Antrea", kubelet, []string{"antrea-gw0"}, chain.Warning, "Antrea handles"},
		{"Antrea beside kube-proxy", empty, []string{"antrea-gw0"}, chain.Error, "hold no Service"},
		{"kube-proxy alone", service, nil, "", ""},
		{"kube-proxy beside Antrea", service, []string{"antrea-gw0"}, "", ""},
		{"kube-proxy beside Cilium", service + ":CILIUM_FORWARD - [0:0]\n", nil, chain.Info, "Cilium is on this node too"},
		{"left over beside Cilium", service, []string{"cilium_host"}, chain.Info, "Cilium is on this node too"},
		{"left over beside Calico in eBPF", service, []string{"bpfin.cali"}, chain.Info, "Calico's eBPF dataplane is on this node too"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dump := "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n*nat\n" + ":PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n" + c.rules + "COMMIT\n"
			rs, err := iptables.Parse(strings.NewReader(dump), "dump")
			if err != nil {
				t.Fatal(err)
			}
			var got []chain.Finding
			for _, f := range chain.NewView(rs, chain.Node{Links: c.links}).Services().Findings {
				if f.Code == chain.ProxyModeUnsupported {
					got = append(got, f)
				}
			}
			switch {
			case c.severity == "" && len(got) > 0:
				t.Errorf("found %q, want nothing", got[0].Message)
			case c.severity != "" && (len(got) != 1 || got[0].Severity != c.severity || !strings.Contains(got[0].Message, c.says)):
				t.Errorf("found %+v, want one %s that says %q", got, c.severity, c.says)
			}
		})
	}
}
