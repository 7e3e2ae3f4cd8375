package chain_test

import (
	"regexp"
	"strings"
	"testing"

	"github.com/natlens/natlens/pkg/chain"
	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/netfilter"
	"github.com/natlens/natlens/pkg/nftables"
)

// Session affinity that is lost for one endpoint leaves all shares of new clients
// as they are. It is found, of the right Service, and nothing else is.
func TestAffinityLostForOne(t *testing.T) {
	iptablesRules := recorded(t, "v1.35.4-iptables.save")
	nftRules := recorded(t, "v1.35.4-nftables.nft.json")
	for name, tt := range map[string]struct {
		text string
		part string // of the lines or objects that are altered
		cut  string // taken out of them; the whole, if empty
		with string
		want string
	}{
		"a rule for known clients deleted": {iptablesRules, `-A KUBE-SVC-C6YCYWI3VSGSBIFB -m comment --comment "shop/sticky -> 10.52.2.22:8080" -m recent`, "", "",
			"no rule of KUBE-SVC-C6YCYWI3VSGSBIFB keeps known clients with KUBE-SEP-MFA6SWXW5DVE7MIS"},
		"clients are not noted": {iptablesRules, `"shop/sticky" -m recent --set --name KUBE-SEP-MFA6SWXW5DVE7MIS`, "-m recent --set --name KUBE-SEP-MFA6SWXW5DVE7MIS --mask 255.255.255.255 --rsource", "",
			"no rule of KUBE-SEP-MFA6SWXW5DVE7MIS notes its clients"},
		"another time": {iptablesRules, `"shop/sticky -> 10.52.2.22:8080" -m recent`, "--seconds 300", "--seconds 30",
			"of KUBE-SVC-C6YCYWI3VSGSBIFB keeps clients with KUBE-SEP-MFA6SWXW5DVE7MIS for 30 s, other rules of this Service for 300 s"},
		"a rule for known clients deleted, nftables": {nftRules, `"goto": {"target": "endpoint-6KK6KEGP-shop/sticky/tcp/__10.52.2.22/8080"}}]}}`, "", "",
			"no rule of service-QJXM4N5A-shop/sticky/tcp/ keeps known clients with endpoint-6KK6KEGP-shop/sticky/tcp/__10.52.2.22/8080"},
		"clients are not noted, nftables": {nftRules, `"set": "@affinity-6KK6KEGP-shop/sticky/tcp/__10.52.2.22/8080"}}`, "", "",
			"no rule of endpoint-6KK6KEGP-shop/sticky/tcp/__10.52.2.22/8080 notes its clients"},
	} {
		t.Run(name, func(t *testing.T) {
			parse := func(text string) *netfilter.Ruleset {
				rs, err := iptables.Parse(strings.NewReader(text), name)
				if strings.HasPrefix(text, "{") {
					rs, err = nftables.Parse(strings.NewReader(text), name)
				}
				if err != nil {
					t.Fatal(err)
				}
				return rs
			}
			var out strings.Builder
			hits := 0
			for line := range strings.Lines(oneObjectALine(tt.text)) {
				if strings.Contains(line, tt.part) {
					hits++
					if tt.cut == "" {
						continue
					}
					line = strings.Replace(line, tt.cut, tt.with, 1)
				}
				out.WriteString(line)
			}
			if hits != 1 {
				t.Fatalf("%d lines have %q, want one", hits, tt.part)
			}
			o := readObjects(t)
			found := 0
			for _, s := range chain.NewView(parse(out.String()), o.node()).Services().Services {
				for _, f := range s.Findings {
					if f.Code != chain.AffinityMismatch {
						continue
					}
					found++
					if got := s.ServicePort.String(); got != "shop/sticky" || !strings.Contains(f.Message, tt.want) || len(f.Rules) != 1 {
						t.Errorf("%s: %s, with %d rules; want %q", got, f.Message, len(f.Rules), tt.want)
					}
				}
			}
			if found != 1 {
				t.Errorf("%d findings, want one", found)
			}
		})
	}
}

// oneObjectALine breaks the output of nft -j into lines, and leaves another dump
// as it is.
func oneObjectALine(text string) string {
	if !strings.HasPrefix(text, "{") {
		return text
	}
	return regexp.MustCompile(`, (\{"(?:chain|rule|set|map|element)": )`).ReplaceAllString(text, "\n,$1")
}

// Programs look into lists of recent clients for other ends, too: those are no
// session affinity.
func TestRecentWithoutAffinity(t *testing.T) {
	const recent = " -m recent --name x --rcheck --seconds 9 --rsource -j "
	text := recorded(t, "v1.35.4-iptables.save")
	for name, tt := range map[string]struct{ ahead, rule string }{
		"in a filter":          {"*filter\n", "-A FORWARD" + recent + "ACCEPT\n"},
		"ahead of Services":    {"*nat\n", "-A PREROUTING" + recent + "OTHER\n"},
		"behind Services":      {"*nat\n", "-A POSTROUTING" + recent + "OTHER\n"},
		"instead of a Service": {"*nat\n", "-A KUBE-SERVICES" + recent + "OTHER\n"},
		"among its endpoints":  {"*nat\n", "-A KUBE-SVC-C6YCYWI3VSGSBIFB" + recent + "RETURN\n"},
	} {
		t.Run(name, func(t *testing.T) {
			at := strings.Index(text, tt.ahead)
			at += strings.Index(text[at:], "\n[") + 1 // the first rule, with its counters
			rs, err := iptables.Parse(strings.NewReader(text[:at]+":OTHER - [0:0]\n"+tt.rule+text[at:]), name)
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range chain.NewView(rs, chain.Node{}).Services().Services {
				want := 0
				switch s.Name {
				case "sticky":
					want = 300
				case "lb-local-sticky":
					want = 10800
				}
				if s.AffinitySeconds != want {
					t.Errorf("%v has an affinity of %d s, want %d", s.ServicePort, s.AffinitySeconds, want)
				}
			}
		})
	}
}
