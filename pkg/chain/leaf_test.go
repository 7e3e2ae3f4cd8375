package chain

import (
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/natlens/natlens/pkg/iptables"
	"github.com/natlens/natlens/pkg/nftables"
)

// Walks that know what an endpoint's chain comes to must come to what those do
// that go through its rules, for chains that almost are such ones, too.
func TestLeaves(t *testing.T) {
	dumps := slices.Concat(captures(t, "*.save"), captures(t, "*.json"))
	edits := map[string]struct{ match, by string }{
		"as it is":                            {},
		"the port stays":                      {`--to-destination (\d\S+):\d+`, "--to-destination $1"},
		"the address stays":                   {`--to-destination \d\S+(:\d+)`, "--to-destination $1"},
		"one of two addresses":                {`--to-destination (\d\S+):(\d+)`, "--to-destination $1-10.99.0.9:$2"},
		"the node's own address":              {`--to-destination \d[^:]+`, "--to-destination 10.146.0.2"},
		"a neighbour is marked":               {`-A (KUBE-SEP-\S+) -s (\S+)/32`, "-A $1 -s $2/30"},
		"another is marked":                   {`-A (KUBE-SEP-\S+) -s \S+`, "-A $1 -s 10.99.0.9/32"},
		"all but the endpoint are marked":     {`-A (KUBE-SEP-\S+) -s`, "-A $1 ! -s"},
		"the endpoint itself is let go":       {`(-A KUBE-SEP-\S+ -s .*)-j KUBE-MARK-MASQ`, "${1}-j ACCEPT"},
		"a range is let go":                   {`(-A KUBE-SEP-\S+) -s \S+ (.*)-j KUBE-MARK-MASQ`, "$1 -s 10.0.0.0/8 ${2}-j RETURN"},
		"another protocol":                    {`(-A KUBE-SEP-\S+ )-p tcp`, "$1-p sctp"},
		"a port as well":                      {`(-A KUBE-SEP-.*)-j DNAT`, "${1}-m tcp --dport 80 -j DNAT"},
		"known clients only":                  {`(-A KUBE-SEP-.*)-j DNAT`, "${1}-m recent --name X --rcheck --seconds 10 --rsource -j DNAT"},
		"a chance":                            {`(-A KUBE-SEP-.*)-j DNAT`, "${1}-m statistic --mode random --probability 0.25 -j DNAT"},
		"a mark":                              {`(-A KUBE-SEP-.*)-j DNAT`, "${1}-m mark --mark 0x4000/0x4000 -j DNAT"},
		"what nobody knows":                   {`(-A KUBE-SEP-.*)-j DNAT`, "${1}-m whatever --it is -j DNAT"},
		"no DNAT":                             {`(-A KUBE-SEP-.*)-j DNAT.*`, "${1}-j MARK --set-xmark 0x1/0x1"},
		"the last rule has a chance, too":     {`(-A KUBE-SVC-\S+ -m comment --comment (?:"[^"]*"|\S+) )-j`, "$1-m statistic --mode random --probability 0.9 -j"},
		"a chance of none":                    {`--probability \S+`, "--probability 0.00000000000"},
		"a chance of all":                     {`--probability \S+`, "--probability 1.00000000000"},
		"every second":                        {`--mode random --probability \S+`, "--mode nth --every 2 --packet 0"},
		"two chances":                         {`(-m statistic --mode random --probability \S+)`, "$1 $1"},
		"endpoints for some clients":          {`(-A KUBE-SVC-\S+) (.*-j KUBE-SEP-)`, "$1 -s 10.52.0.0/16 $2"},
		"endpoints of a protocol":             {`(-A KUBE-SVC-\S+) (.*-j KUBE-SEP-)`, "$1 -p tcp $2"},
		"without coming back":                 {`(-A KUBE-SVC-.*)-j (KUBE-SEP-)`, "${1}-g $2"},
		"the DNAT stands among the endpoints": {`(-A KUBE-SVC-.*)-j KUBE-SEP-\S+`, "$1-p tcp -j DNAT --to-destination 10.99.0.9:80"},
		// nftables mode.
		"one number leads nowhere":         {`\[\[0, \{"goto": \{"target": "endpoint-[^"]+"\}\}\], `, "["},
		"one number is marked":             {`(\[0, \{"goto": \{"target": )"endpoint-[^"]+"`, `$1"mark-for-masquerade"`},
		"a choice comes back":              {`"goto"(: \{"target": "endpoint-)`, `"jump"$1`},
		"a choice for some clients":        {`\{"vmap": \{"key": \{"numgen"`, `{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": {"prefix": {"addr": "10.52.0.0", "len": 16}}}}, {"vmap": {"key": {"numgen"`},
		"a choice of the node's addresses": {`\{"dnat": \{"addr": "[0-9.]+"`, `{"dnat": {"addr": "10.146.0.2"`},
		"a choice without a DNAT":          {`\{"dnat": \{"addr": "[0-9.]+", "port": \d+\}\}`, `{"counter": {"packets": 0, "bytes": 0}}`},
	}
	dealt, together := 0, 0
	for name, edit := range edits {
		t.Run(name, func(t *testing.T) {
			changed := false
			for _, c := range dumps {
				other := c.text
				if edit.match != "" {
					other = regexp.MustCompile(edit.match).ReplaceAllString(other, edit.by)
				}
				changed = changed || other != c.text
				read := iptables.Parse
				if strings.HasSuffix(c.name, ".json") {
					read = nftables.Parse
				}
				rs, err := read(strings.NewReader(other), c.name)
				if err != nil {
					t.Fatalf("%s: %v", c.name, err)
				}
				known, whole := shortcuts(t, rs)
				if edit.match != "" {
					continue
				}
				// Those of the last frontend are forgotten, their memory is not.
				dealt += cap(whole.run.spreads)
				for _, d := range known.run.spreads[:cap(known.run.spreads)] {
					if d != nil && d.endpoints != nil {
						together++
					}
				}
			}
			if edit.match != "" && !changed {
				t.Error("no rule is another one")
			}
		})
	}
	if dealt == 0 || together == 0 {
		t.Errorf("%d chains deal connections out to leaves, %d of them to a known exit", dealt, together)
	}
}
