package access

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	"k8s.io/client-go/rest"
)

// fakeAPI is the part of an API server that reviews.
type fakeAPI struct {
	mu     sync.Mutex
	users  map[string]authenticationv1.UserInfo // by token
	rights map[string][]string                  // paths by user
	broken bool                                 // answers 500
	asked  []string                             // what came in
	last   authorizationv1.SubjectAccessReviewSpec
	hold   chan struct{} // when set, no answer before it is closed
}

func newFakeAPI() *fakeAPI {
	return &fakeAPI{
		users: map[string]authenticationv1.UserInfo{
			"prom":  {Username: "prometheus", UID: "42", Groups: []string{"system:authenticated"}, Extra: map[string]authenticationv1.ExtraValue{"pod": {"p"}}},
			"debug": {Username: "debugger"},
			"none":  {},
		},
		rights: map[string][]string{"prometheus": {"/metrics"}, "debugger": {"/metrics", "/natlens/api/v1/services"}},
	}
}

func (f *fakeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if hold := f.hold; hold != nil {
		f.mu.Unlock()
		select {
		case <-hold:
		case <-r.Context().Done():
		}
		f.mu.Lock()
	}
	f.asked = append(f.asked, r.URL.Path)
	w.Header().Set("Content-Type", "application/json")
	if f.broken {
		http.Error(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"etcd is gone","code":500}`, http.StatusInternalServerError)
		return
	}
	var kind struct{ APIVersion, Kind string }
	var body bytes.Buffer
	_, _ = body.ReadFrom(r.Body)
	_ = json.Unmarshal(body.Bytes(), &kind)
	switch r.Method + " " + r.URL.Path + " " + kind.APIVersion + " " + kind.Kind {
	case "POST /apis/authentication.k8s.io/v1/tokenreviews authentication.k8s.io/v1 TokenReview":
		var review authenticationv1.TokenReview
		_ = json.Unmarshal(body.Bytes(), &review)
		user, known := f.users[review.Spec.Token]
		review.Status = authenticationv1.TokenReviewStatus{Authenticated: known, User: user}
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(review)
	case "POST /apis/authorization.k8s.io/v1/subjectaccessreviews authorization.k8s.io/v1 SubjectAccessReview":
		var review authorizationv1.SubjectAccessReview
		_ = json.Unmarshal(body.Bytes(), &review)
		f.last = review.Spec
		review.Status.Allowed = slices.Contains(f.rights[review.Spec.User], review.Spec.NonResourceAttributes.Path)
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(review)
	default:
		http.Error(w, "not a review: "+r.Method+" "+r.URL.Path+" "+body.String(), http.StatusNotFound)
	}
}

// do changes the server, or looks at it, between two requests.
func (f *fakeAPI) do(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// questions returns how many token reviews and access reviews came since the
// last call.
func (f *fakeAPI) questions() (tokens, rights int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, path := range f.asked {
		if strings.HasSuffix(path, "/tokenreviews") {
			tokens++
		} else {
			rights++
		}
	}
	f.asked = nil
	return tokens, rights
}

// RoundTrip answers without a network, for tests whose time is fake.
func (f *fakeAPI) RoundTrip(r *http.Request) (*http.Response, error) {
	rec := httptest.NewRecorder()
	f.ServeHTTP(rec, r)
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	return rec.Result(), nil
}

func newGate(t *testing.T, config *rest.Config) (*Gate, *bytes.Buffer) {
	t.Helper()
	var said bytes.Buffer
	g, err := New(config, slog.New(slog.NewTextHandler(&said, nil)))
	if err != nil {
		t.Fatal(err)
	}
	return g, &said
}

// outcome is what Check said, in a word.
func outcome(err error) string {
	var forbidden *ForbiddenError
	switch {
	case err == nil:
		return "yes"
	case errors.Is(err, ErrUnauthenticated):
		return "who?"
	case errors.As(err, &forbidden):
		return "no"
	default:
		return "unknown"
	}
}

func expect(t *testing.T, g *Gate, token, path, want string) {
	t.Helper()
	if err := g.Check(t.Context(), token, path); outcome(err) != want {
		t.Errorf("token %s, path %s: %v, want %q", token, path, err, want)
	}
}

// TestCheck asks a server over the network.
func TestCheck(t *testing.T) {
	api := newFakeAPI()
	server := httptest.NewServer(api)
	defer server.Close()
	g, _ := newGate(t, &rest.Config{Host: server.URL})
	expect(t, g, "prom", "/metrics", "yes")
	want := authorizationv1.SubjectAccessReviewSpec{
		User: "prometheus", UID: "42", Groups: []string{"system:authenticated"}, Extra: map[string]authorizationv1.ExtraValue{"pod": {"p"}},
		NonResourceAttributes: &authorizationv1.NonResourceAttributes{Path: "/metrics", Verb: "get"},
	}
	if diff := cmp.Diff(want, api.last); diff != "" {
		t.Errorf("asked about (-want +got):\n%s", diff)
	}
	expect(t, g, "prom", "/api/v1/services", "no")
	expect(t, g, "debug", "/api/v1/services", "yes")
	expect(t, g, "stolen", "/metrics", "who?")
	expect(t, g, "none", "/metrics", "who?") // a yes without a name
	err := g.Check(t.Context(), "prom", "/version")
	if err == nil || !strings.Contains(err.Error(), `"prometheus" may not get the nonResourceURL /natlens/version`) {
		t.Errorf("the error does not say who may not get what: %v", err)
	}
}

// TestNothingGrantedByDefault checks that what every user of a cluster may get
// from the API server, by the ClusterRoles system:discovery and
// system:public-info-viewer, is nothing here.
func TestNothingGrantedByDefault(t *testing.T) {
	granted := []string{"/api", "/api/*", "/apis", "/apis/*", "/healthz", "/livez", "/openapi", "/openapi/*", "/readyz", "/version", "/version/", "/.well-known/openid-configuration"}
	for _, path := range []string{"/", "/api", "/api/v1/services", "/api/v1/services/default/go-app", "/api/v1/trace", "/api/v1/events", "/metrics", "/version", "/openapi.json", "/static/app.js"} {
		for _, url := range granted {
			if prefix, all := strings.CutSuffix(url, "*"); nonResourceURL(path) == url || all && strings.HasPrefix(nonResourceURL(path), prefix) {
				t.Errorf("everybody may get %s, by %s", path, url)
			}
		}
	}
}

// TestRemembered counts what the API server is asked.
func TestRemembered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newFakeAPI()
		g, _ := newGate(t, &rest.Config{Host: "http://api", Transport: api})
		step := func(token, path, want string, tokens, rights int) {
			t.Helper()
			expect(t, g, token, path, want)
			if gotTokens, gotRights := api.questions(); gotTokens != tokens || gotRights != rights {
				t.Errorf("token %s, path %s: %d token reviews and %d access reviews, want %d and %d", token, path, gotTokens, gotRights, tokens, rights)
			}
		}
		step("prom", "/metrics", "yes", 1, 1)
		step("prom", "/metrics", "yes", 0, 0)
		step("prom", "/version", "no", 0, 1)
		step("prom", "/version", "no", 0, 0)
		step("stolen", "/metrics", "who?", 1, 0)
		step("stolen", "/version", "who?", 0, 0)

		const past = time.Nanosecond // an answer holds to its last moment
		time.Sleep(noFor + past)
		step("prom", "/metrics", "yes", 0, 0)
		step("prom", "/version", "no", 0, 1)
		step("stolen", "/metrics", "who?", 1, 0)

		time.Sleep(userFor - noFor)
		step("prom", "/metrics", "yes", 1, 0)
		time.Sleep(rightFor - userFor)
		step("prom", "/metrics", "yes", 1, 1)
	})
}

// TestTakenAway checks how long a token and a right outlive their end.
func TestTakenAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newFakeAPI()
		g, _ := newGate(t, &rest.Config{Host: "http://api", Transport: api})
		expect(t, g, "prom", "/metrics", "yes")
		expect(t, g, "debug", "/metrics", "yes")
		expect(t, g, "debug", "/version", "no")
		api.do(func() {
			delete(api.users, "prom")
			api.rights["debugger"] = []string{"/natlens/version"}
		})
		time.Sleep(noFor + time.Nanosecond)
		expect(t, g, "debug", "/version", "yes") // granted
		time.Sleep(userFor - noFor - time.Nanosecond)
		expect(t, g, "prom", "/metrics", "yes")
		time.Sleep(time.Nanosecond)
		expect(t, g, "prom", "/metrics", "who?")
		expect(t, g, "debug", "/metrics", "yes")
		time.Sleep(rightFor - userFor)
		expect(t, g, "debug", "/metrics", "no")
	})
}

// TestOutage checks that known callers keep reading for their time while the API
// server fails, and that nobody else gets in.
func TestOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newFakeAPI()
		g, said := newGate(t, &rest.Config{Host: "http://api", Transport: api})
		expect(t, g, "prom", "/metrics", "yes")
		api.do(func() { api.broken = true })
		for range 100 {
			expect(t, g, "debug", "/metrics", "unknown")
			expect(t, g, "prom", "/metrics", "yes")
			expect(t, g, "prom", "/version", "unknown")
			time.Sleep(time.Second)
		}
		if n := strings.Count(said.String(), "etcd is gone"); n != 2 { // at 0 s and 60 s
			t.Errorf("logged %d times, want 2:\n%s", n, said)
		}
		time.Sleep(userFor - 100*time.Second + time.Nanosecond)
		expect(t, g, "prom", "/metrics", "unknown")
		api.do(func() { api.broken = false })
		expect(t, g, "prom", "/metrics", "yes")
		expect(t, g, "debug", "/metrics", "yes")
	})
}

// TestSilence checks that a server that does not answer holds nobody for long,
// and that an answer that comes late is not lost.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newFakeAPI()
		api.hold = make(chan struct{})
		g, _ := newGate(t, &rest.Config{Host: "http://api", Transport: api})
		check := func(path, want string, most time.Duration) {
			t.Helper()
			start := time.Now()
			expect(t, g, "prom", path, want)
			if took := time.Since(start); took > most {
				t.Errorf("%s took %v, want %v at most", path, took, most)
			}
		}
		check("/metrics", "unknown", reviewTimeout)
		synctest.Wait()                    // for that question to end
		const slow = reviewTimeout * 3 / 4 // for each of two questions
		go func() {
			for range 2 {
				time.Sleep(slow)
				api.do(func() { close(api.hold); api.hold = make(chan struct{}) })
			}
		}()
		check("/metrics", "unknown", reviewTimeout)
		time.Sleep(reviewTimeout)
		check("/metrics", "yes", 0)
	})
}

// TestFlood checks that a flood of wrong tokens neither floods the API server,
// nor fills the memory, nor keeps those out who were in before.
func TestFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newFakeAPI()
		g, _ := newGate(t, &rest.Config{Host: "http://api", Transport: api})
		expect(t, g, "prom", "/metrics", "yes")
		time.Sleep(userFor + time.Nanosecond) // prom has to be asked about again
		api.questions()
		const seconds, perSecond = 100, 50
		refused := make(chan time.Duration, seconds*perSecond)
		for i := range seconds * perSecond {
			go func() {
				start := time.Now()
				_ = g.Check(t.Context(), fmt.Sprint("wrong ", i), "/metrics")
				refused <- time.Since(start)
			}()
			time.Sleep(time.Second / perSecond)
		}
		if tokens, _ := api.questions(); tokens > seconds*newcomerRate+newcomerBurst || tokens < seconds*newcomerRate {
			t.Errorf("%d wrong tokens brought %d questions", seconds*perSecond, tokens)
		}
		start := time.Now()
		expect(t, g, "prom", "/metrics", "yes")
		if took := time.Since(start); took != 0 {
			t.Errorf("who was in before waits for %v", took)
		}
		for range cap(refused) {
			if took := <-refused; took > reviewTimeout {
				t.Errorf("a stranger was held for %v", took)
			}
		}
		if n := len(g.strangers.Keys()); n > maxAnswers {
			t.Errorf("%d wrong tokens are remembered", n)
		}
	})
}

// TestManyPaths lets a script that may read ask for one path after the other: it
// may be slowed down, not refused.
func TestManyPaths(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newFakeAPI()
		g, _ := newGate(t, &rest.Config{Host: "http://api", Transport: api})
		const paths = 2000
		start := time.Now()
		for i := range paths {
			path := fmt.Sprint("/api/v1/services/default/", i)
			api.do(func() { api.rights["debugger"] = []string{"/natlens" + path} })
			expect(t, g, "debug", path, "yes")
		}
		if took, most := time.Since(start), paths/familiarRate*time.Second; took > most {
			t.Errorf("took %v, want %v at most", took, most)
		}
	})
}

// TestOneQuestion lets many callers ask the same at once, one of whom leaves.
func TestOneQuestion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		api := newFakeAPI()
		hold := make(chan struct{})
		api.hold = hold
		g, _ := newGate(t, &rest.Config{Host: "http://api", Transport: api})
		leaving, leave := context.WithCancel(t.Context())
		gone := make(chan error, 1)
		go func() { gone <- g.Check(leaving, "prom", "/metrics") }()
		synctest.Wait() // his is the question on its way
		results := make(chan error, 100)
		for range cap(results) {
			go func() { results <- g.Check(t.Context(), "prom", "/metrics") }()
		}
		synctest.Wait()
		leave()
		if err := <-gone; !errors.Is(err, context.Canceled) {
			t.Errorf("who leaves gets %v", err)
		}
		close(hold)
		for range cap(results) {
			if err := <-results; err != nil {
				t.Errorf("who stays gets %v", err)
			}
		}
		if tokens, rights := api.questions(); tokens != 1 || rights != 1 {
			t.Errorf("%d token reviews and %d access reviews, want one of each", tokens, rights)
		}
	})
}
