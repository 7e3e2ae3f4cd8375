package affinity

import (
	"bytes"
	"strconv"
	"time"
)

// listSize is how many clients xt_recent keeps in a list, unless its parameter
// ip_list_tot says otherwise.
const listSize = 100

// ticks is the kernel's clock in which xt_recent notes when a client was seen:
// jiffies. They began five minutes before they overflow 32 bits
// (INITIAL_JIFFIES in include/linux/jiffies.h), and go as CLOCK_MONOTONIC does.
type ticks struct {
	perSecond uint64 // CONFIG_HZ
	now       uint64
}

// ticksAt returns the jiffies at a time since boot, where the kernel's coarse clocks
// have a resolution, which is one jiffy.
func ticksAt(sinceBoot, resolution time.Duration) ticks {
	const before = 300 // seconds
	hz := uint64((time.Second + resolution/2) / resolution)
	return ticks{hz, 1<<32 - before*hz + uint64(sinceBoot.Seconds()*float64(hz))}
}

// age is how long ago a client was seen. What seems to come is now: the two clocks
// may be a moment apart.
func (t ticks) age(seen uint64) time.Duration {
	if seen >= t.now {
		return 0
	}
	return time.Duration(float64(t.now-seen) / float64(t.perSecond) * float64(time.Second))
}

// parseRecent counts the clients in a list of xt_recent that were seen within the
// timeout (recent_seq_show in net/netfilter/xt_recent.c). Full compares with all
// that stand there.
func parseRecent(b []byte, size int, timeout time.Duration, t ticks) List {
	var out List
	all := 0
	for len(b) > 0 {
		line, rest, _ := bytes.Cut(b, []byte("\n"))
		b = rest
		_, seen, ok := bytes.Cut(line, []byte("last_seen: "))
		if !ok {
			continue
		}
		if i := bytes.IndexByte(seen, ' '); i >= 0 {
			seen = seen[:i]
		}
		at, err := strconv.ParseUint(string(seen), 10, 64)
		if err != nil {
			continue
		}
		if all++; t.age(at) < timeout {
			out.Clients++
		}
	}
	out.Full = all >= size
	return out
}

// listName returns the name of the list in the options of a recent match.
func listName(text []byte) string {
	_, rest, ok := bytes.Cut(text, []byte("--name "))
	if !ok {
		return "DEFAULT"
	}
	name, _, _ := bytes.Cut(rest, []byte(" "))
	return string(name)
}
