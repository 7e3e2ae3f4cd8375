package echo

import (
	"log/slog"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// addrOpts lets cmp look at the comparable types of net/netip.
func addrOpts() cmp.Option { return cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}) }

func TestHostIdentity(t *testing.T) {
	env := map[string]string{"POD_NAME": "go-app-1", "POD_NAMESPACE": "default", "NODE_NAME": "node1"}
	id, err := HostIdentity(func(k string) string { return env[k] }, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	hostname, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	got := []string{id.Hostname, id.Pod, id.Namespace, id.Node}
	if diff := cmp.Diff([]string{hostname, "go-app-1", "default", "node1"}, got); diff != "" {
		t.Errorf("identity (-want +got)\n%s", diff)
	}
	for _, a := range id.Addresses() {
		if a.IsLoopback() {
			t.Errorf("loopback address %v in the identity", a)
		}
	}
}

func TestHostAddresses(t *testing.T) {
	ipNet := func(s string) net.Addr {
		ip, n, err := net.ParseCIDR(s)
		if err != nil {
			t.Fatal(err)
		}
		return &net.IPNet{IP: ip, Mask: n.Mask}
	}
	in := []net.Addr{
		ipNet("127.0.0.1/8"), ipNet("::1/128"),
		ipNet("10.52.1.4/24"), ipNet("fe80::1/64"), ipNet("fd00::4/64"),
		ipNet("169.254.20.10/32"), // node-local DNS: link-local, yet an address of the host
		ipNet("10.52.1.4/32"),     // on a second interface
		&net.IPNet{IP: net.IP{1, 2}},
		&net.UnixAddr{Name: "not an IP address"},
	}
	want := []netip.Addr{
		netip.MustParseAddr("10.52.1.4"), netip.MustParseAddr("fd00::4"), netip.MustParseAddr("169.254.20.10"),
	}
	if diff := cmp.Diff(want, hostAddresses(in), addrOpts()); diff != "" {
		t.Errorf("addresses (-want +got)\n%s", diff)
	}
}

func TestAnswerPrintings(t *testing.T) {
	full := Identity{
		Hostname: "h", Pod: "p", Namespace: "ns", Node: "n",
		Addresses: FixedAddresses(netip.MustParseAddr("10.52.1.4"), netip.MustParseAddr("fd00::4"), netip.MustParseAddr("10.52.1.5")),
	}
	tests := []struct {
		name          string
		id            Identity
		local, remote netip.AddrPort
		text, json    string
	}{
		{
			name: "dual stack", id: full,
			local: netip.MustParseAddrPort("[fd00::4]:8080"), remote: netip.MustParseAddrPort("[fd00::9]:40000"),
			text: "10.52.1.4\n10.52.1.5\n",
			json: `{"hostname":"h","pod":"p","namespace":"ns","node":"n","addresses":["10.52.1.4","fd00::4","10.52.1.5"],"local":"[fd00::4]:8080","remote":"[fd00::9]:40000"}` + "\n",
		},
		{
			name: "mapped IPv4", id: Identity{Addresses: FixedAddresses(netip.MustParseAddr("fd00::4"))},
			local: netip.MustParseAddrPort("[::ffff:10.52.1.4]:8080"), remote: netip.MustParseAddrPort("[::ffff:10.52.1.9]:40000"),
			json: `{"hostname":"","pod":"","namespace":"","node":"","addresses":["fd00::4"],"local":"10.52.1.4:8080","remote":"10.52.1.9:40000"}` + "\n",
		},
		{
			name: "nothing known",
			json: `{"hostname":"","pod":"","namespace":"","node":"","addresses":[],"local":"","remote":""}` + "\n",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a := tt.id.answer(tt.local, tt.remote)
			if diff := cmp.Diff(tt.text, string(a.text())); diff != "" {
				t.Errorf("text (-want +got)\n%s", diff)
			}
			b, err := a.json()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.json, string(b)); diff != "" {
				t.Errorf("JSON (-want +got)\n%s", diff)
			}
		})
	}
}
