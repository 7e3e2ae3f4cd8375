package monitor

import (
	"net/netip"
	"time"

	"github.com/natlens/natlens/pkg/chain"
)

// The kinds of findings that probes give. They are described in docs/findings.md.
const (
	ObservedSkew        chain.Code = "ObservedSkew"        // connections go elsewhere than the rules say
	EndpointUnreachable chain.Code = "EndpointUnreachable" // the rules choose an endpoint that does not answer
)

// Finding is what probes found, and when it began.
type Finding struct {
	chain.Finding
	Addresses []netip.AddrPort
	Since     time.Time
}

// State is what probes have told so far. It does not change.
type State struct {
	Number   uint64 // of this state
	News     uint64 // counts the states that said something else than the one before
	Ports    []Port // by Service port, then frontend
	Left     int    // frontends that are marked, but too many to be probed
	Findings []Finding
}

// Port is one probed ClusterIP and port.
type Port struct {
	Service  chain.ServicePort
	Frontend netip.AddrPort
	// AffinitySeconds is the timeout of session affinity, 0 for none. With it, all
	// connections of this node go to the Pin, which has changed Moves times.
	AffinitySeconds int
	Pin             netip.AddrPort
	Moves           int

	Verdict Verdict
	Reason  string  // of a verdict about nothing; one line
	Window  Window  // that is being filled
	Last    *Window // that was closed last, under these rules; nil for none

	Endpoints []Endpoint
	Probes    []Count // since the agent began
	Dropped   int     // samples that met rules which changed
	Duration  Histogram
	Probed    time.Time // when the last probe ended; zero before
	Took      time.Duration
}

// Verdict is what observed shares are, beside the programmed ones.
type Verdict string

// The verdicts.
const (
	NotEnough   Verdict = "not-enough"   // samples yet
	Consistent  Verdict = "consistent"   // nothing speaks against the programmed shares
	Skewed      Verdict = "skewed"       // other shares than programmed
	Unknown     Verdict = "unknown"      // too many connections of which the endpoint is not known, or rules that leave shares open
	Pinned      Verdict = "affinity"     // session affinity: this node's connections have no shares
	NoEndpoints Verdict = "no-endpoints" // the rules send connections nowhere, so there are none to make
)

// Window is a series of samples under the same route.
type Window struct {
	Start, End   time.Time // End is zero while it is being filled
	Size, Enough int       // samples until it closes, and until it tells something
	Samples      int       // of the Ways and Strangers
	Unknown      int       // samples of which the endpoint is not known
	Ways         []Way
	Strangers    []Count // endpoints that the route does not have
	Evidence     float64 // the e-value; 1/Alpha is enough to call it skewed
	Verdict      Verdict // once closed
}

// Way is an endpoint of a route, or, without an address, the share that reaches
// none.
type Way struct {
	Address netip.AddrPort
	Share   float64 // programmed
	Samples int
}

// Endpoint is an endpoint of the present route and how it answers.
type Endpoint struct {
	Address  netip.AddrPort
	Answered time.Time // last; zero for never
	// Failures are those in a row, from First to Last; Result is how the last one
	// failed.
	Failures    int
	First, Last time.Time
	Result      Result
	Unreachable bool
}

// Result is what became of a probe.
type Result string

// The results. All but the first are failures, but for OtherAnswer.
const (
	Answered    Result = "success"     // by an echo server
	OtherAnswer Result = "other"       // answered, but not as an echo server does
	Refused     Result = "refused"     // by a reset, or an ICMP error
	TimedOut    Result = "timeout"     // no answer in time
	Reset       Result = "reset"       // ended before the answer
	NoRoute     Result = "unreachable" // no way to the host
	Failed      Result = "error"       // otherwise; the connection may not have left the node
)

func (r Result) failed() bool { return r != Answered && r != OtherAnswer }

// Count counts probes.
type Count struct {
	Endpoint netip.AddrPort // invalid where it is not known
	Result   Result         // "" for all
	Probes   uint64
}

// Buckets are the upper bounds of the histogram, in seconds.
var Buckets = [...]float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2}

// Histogram is how long answered probes took, from the first packet to the end of
// the answer.
type Histogram struct {
	Counts [len(Buckets)]uint64 // of those up to each bound, not cumulative
	Count  uint64
	Sum    float64 // seconds
}

func (h *Histogram) add(d time.Duration) {
	h.Count++
	h.Sum += d.Seconds()
	for i, b := range Buckets {
		if d.Seconds() <= b {
			h.Counts[i]++
			return
		}
	}
}
