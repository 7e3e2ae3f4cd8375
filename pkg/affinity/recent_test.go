package affinity

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestTicks(t *testing.T) {
	for _, c := range []struct {
		resolution time.Duration
		hz         uint64
	}{{time.Millisecond, 1000}, {4 * time.Millisecond, 250}, {3333333, 300}, {10 * time.Millisecond, 100}} {
		got := ticksAt(1000*time.Second, c.resolution)
		if got.perSecond != c.hz || got.now != 1<<32+700*c.hz {
			t.Errorf("%v: %+v, want %d a second, 700 s behind 2^32", c.resolution, got, c.hz)
		}
		for _, age := range []time.Duration{0, time.Second, 900 * time.Second} {
			if a := got.age(got.now - uint64(age.Seconds())*c.hz); a != age {
				t.Errorf("%v: %v ago is %v", c.resolution, age, a)
			}
		}
		if a := got.age(got.now + 5); a != 0 {
			t.Errorf("what seems to come is %v old", a)
		}
	}
}

func TestParseRecent(t *testing.T) {
	now := ticks{250, 1<<32 + 250_000}
	line := func(ago uint64) string {
		return fmt.Sprintf("src=10.0.0.1 ttl: 64 last_seen: %d oldest_pkt: 2 %d, %d\n", now.now-ago*250, now.now-ago*250, now.now)
	}
	six := fmt.Sprintf("src=fd00:0052:0000:0000:0000:0000:0000:0009 ttl: 0 last_seen: %d oldest_pkt: 1 %d", now.now, now.now)
	for name, c := range map[string]struct {
		text string
		want List
	}{
		"nobody":                     {"", List{}},
		"one who has just come":      {line(0), List{1, false}},
		"before and after the end":   {line(9) + line(10) + line(11), List{1, false}},
		"IPv6, without an end":       {six, List{1, false}},
		"full, half of it gone":      {strings.Repeat(line(1), 2) + strings.Repeat(line(60), 2), List{2, true}},
		"what is not of the kernel":  {"src=10.0.0.1\nlast_seen: \nlast_seen: x oldest\n\n\x00", List{}},
		"a number beyond all bounds": {"last_seen: 99999999999999999999 ", List{}},
	} {
		if got := parseRecent([]byte(c.text), 4, 10*time.Second, now); got != c.want {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
	}
}

func TestListName(t *testing.T) {
	for text, want := range map[string]string{
		"--set --name KUBE-SEP-A --mask 255.255.255.255 --rsource": "KUBE-SEP-A", "--set --name KUBE-SEP-A": "KUBE-SEP-A", "--set": "DEFAULT",
	} {
		if got := listName([]byte(text)); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}
