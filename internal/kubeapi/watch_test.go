package kubeapi_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/natlens/natlens/internal/desired"
	"github.com/natlens/natlens/internal/kubeapi"
)

// server is as much of an API server as lists and watches need. It speaks JSON,
// and no streaming lists, as servers before v1.32 do.
type server struct {
	mu      sync.Mutex
	version int
	objects map[string]map[string]any // by resource and name
	watches map[chan event]string     // to their resource
	told    []told                    // all that has changed, for watches that begin later
	refuse  int                       // a status for all requests, 0 for none
	oldest  int                       // the version of the first change that watches can be told of
	asked   []string                  // the selectors of lists
}

type event struct {
	Type   string `json:"type"`
	Object any    `json:"object"`
}

// told is an event, of which resource, and which version it made.
type told struct {
	resource string
	version  int
	event
}

var kinds = map[string]metav1.TypeMeta{
	"services":       {APIVersion: "v1", Kind: "ServiceList"},
	"nodes":          {APIVersion: "v1", Kind: "NodeList"},
	"endpointslices": {APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSliceList"},
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	resource, q := parts[len(parts)-1], r.URL.Query()
	s.mu.Lock()
	if refuse := s.refuse; refuse != 0 {
		s.mu.Unlock()
		http.Error(w, "no", refuse)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	switch {
	case kinds[resource].Kind == "": // one Node
		s.mu.Unlock()
		w.WriteHeader(http.StatusNotFound)
		json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: "Failure", Reason: metav1.StatusReasonNotFound, Code: 404})
	case q.Get("sendInitialEvents") != "":
		s.mu.Unlock()
		w.WriteHeader(http.StatusUnprocessableEntity)
		json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: "Failure", Reason: metav1.StatusReasonInvalid, Code: 422})
	case q.Get("watch") != "":
		ch := make(chan event, 64)
		since, _ := strconv.Atoi(q.Get("resourceVersion"))
		if since < s.oldest {
			s.mu.Unlock()
			json.NewEncoder(w).Encode(event{"ERROR", metav1.Status{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: "Failure", Reason: metav1.StatusReasonExpired, Code: http.StatusGone}})
			return
		}
		for _, e := range s.told {
			if e.resource == resource && e.version > since {
				ch <- e.event
			}
		}
		s.watches[ch] = resource
		s.mu.Unlock()
		w.(http.Flusher).Flush()
		for e := range ch {
			json.NewEncoder(w).Encode(e)
			w.(http.Flusher).Flush()
		}
	default:
		s.asked = append(s.asked, resource+" "+q.Get("labelSelector")+q.Get("fieldSelector"))
		items := []any{}
		for _, o := range s.objects[resource] {
			items = append(items, o)
		}
		list := map[string]any{"kind": kinds[resource].Kind, "apiVersion": kinds[resource].APIVersion, "metadata": map[string]any{"resourceVersion": fmt.Sprint(s.version)}, "items": items}
		s.mu.Unlock()
		json.NewEncoder(w).Encode(list)
	}
}

// set stores an object, and tells the watches; nil deletes it.
func (s *server) set(resource, name string, object any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	kind := "MODIFIED"
	if s.objects[resource] == nil {
		s.objects[resource] = map[string]any{}
	}
	switch old := s.objects[resource][name]; {
	case object == nil:
		kind, object = "DELETED", old
		delete(s.objects[resource], name)
	default:
		if old == nil {
			kind = "ADDED"
		}
		s.objects[resource][name] = object
	}
	s.told = append(s.told, told{resource, s.version, event{kind, object}})
	for ch, of := range s.watches {
		if of == resource {
			ch <- event{kind, object}
		}
	}
}

// hangUp ends all watches, and refuses from now on what refuse says.
func (s *server) hangUp(refuse int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refuse = refuse
	for ch := range s.watches {
		close(ch)
		delete(s.watches, ch)
	}
}

func (s *server) service(name, ip string) {
	s.set("services", name, &corev1.Service{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Service"}, ObjectMeta: metav1.ObjectMeta{Namespace: "d", Name: name, ResourceVersion: fmt.Sprint(s.version + 1)},
		Spec: corev1.ServiceSpec{ClusterIP: ip, Ports: []corev1.ServicePort{{Port: 80, Protocol: "TCP"}}},
	})
}

func (s *server) node(name string) {
	s.set("nodes", name, &corev1.Node{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: name, ResourceVersion: fmt.Sprint(s.version + 1)}})
}

// slice stores the EndpointSlice of Service a.
func (s *server) slice(addresses ...string) {
	port, empty := int32(8080), ""
	sl := &discoveryv1.EndpointSlice{
		TypeMeta:   metav1.TypeMeta{APIVersion: "discovery.k8s.io/v1", Kind: "EndpointSlice"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "d", Name: "a-1", ResourceVersion: fmt.Sprint(s.version + 1), Labels: map[string]string{discoveryv1.LabelServiceName: "a"}},
		Ports:      []discoveryv1.EndpointPort{{Name: &empty, Port: &port}}, AddressType: discoveryv1.AddressTypeIPv4,
	}
	for _, a := range addresses {
		sl.Endpoints = append(sl.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}})
	}
	s.set("endpointslices", "a-1", sl)
}

// start runs a watch on a server.
func start(t *testing.T) (*server, *kubeapi.Watch) {
	t.Helper()
	s := &server{objects: map[string]map[string]any{}, watches: map[chan event]string{}}
	s.node("n1")
	s.service("a", "10.96.0.1")
	s.slice("10.0.0.1")
	web := httptest.NewServer(s)
	t.Cleanup(web.Close)
	t.Cleanup(func() { s.hangUp(http.StatusServiceUnavailable) })
	w, err := kubeapi.New(&rest.Config{Host: web.URL}, "n1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		w.Run(ctx)
		close(done)
	}()
	t.Cleanup(func() {
		stop()
		<-done
	})
	return s, w
}

// tell tells what is desired, by the ClusterIPs and endpoints.
func tell(w *kubeapi.Watch) string {
	var parts []string
	for _, p := range w.Objects().View(37).Ports {
		parts = append(parts, fmt.Sprint(p.Name, " ", p.Frontends[0].Address, " ", p.Frontends[0].Fates[0].Endpoints))
	}
	return strings.Join(parts, ", ")
}

// want waits until the objects of the watch are these, as tell tells them.
func want(t *testing.T, w *kubeapi.Watch, what string) {
	t.Helper()
	var got string
	patience := time.After(30 * time.Second)
	for {
		if got = tell(w); got == what && w.Status().Synced {
			return
		}
		select {
		case <-w.Changed():
		case <-patience:
			t.Fatalf("desired: %s; want %s", got, what)
		}
	}
}

func TestWatch(t *testing.T) {
	s, w := start(t)
	want(t, w, "a 10.96.0.1 [10.0.0.1:8080]")
	if node, ok := w.Objects().Node(); !ok || node.Name != "n1" {
		t.Errorf("Node %+v, %v", node, ok)
	}
	s.service("b", "10.96.0.2")
	want(t, w, "a 10.96.0.1 [10.0.0.1:8080], b 10.96.0.2 []")
	s.slice("10.0.0.1", "10.0.0.2")
	want(t, w, "a 10.96.0.1 [10.0.0.1:8080 10.0.0.2:8080], b 10.96.0.2 []")
	s.set("services", "b", nil)
	s.set("endpointslices", "a-1", nil)
	want(t, w, "a 10.96.0.1 []")

	s.mu.Lock()
	defer s.mu.Unlock()
	for _, asked := range []string{
		"services !service.kubernetes.io/service-proxy-name", "nodes metadata.name=n1",
		"endpointslices !service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name",
	} {
		if !strings.Contains(strings.Join(s.asked, "\n"), asked) {
			t.Errorf("asked for %q, want also %q", s.asked, asked)
		}
	}
}

// When the API server is gone, objects stay as they were and the status says so;
// when it is back, what changed meanwhile is heard, also what was deleted.
func TestOutage(t *testing.T) {
	s, w := start(t)
	want(t, w, "a 10.96.0.1 [10.0.0.1:8080]")
	healthy := w.Status()
	if healthy.Error != "" || healthy.Confirmed.IsZero() {
		t.Errorf("status %+v, want a sign of life and no error", healthy)
	}

	s.hangUp(http.StatusServiceUnavailable)
	status(t, w, func(st desired.Status) bool { return st.Error != "" })
	gone := w.Status()
	w.Confirm(t.Context())
	if st := w.Status(); !st.Synced || st.Confirmed != gone.Confirmed {
		t.Errorf("status %+v after an unanswered question, want that of before: %+v", st, gone)
	}
	want(t, w, "a 10.96.0.1 [10.0.0.1:8080]")

	s.mu.Lock()
	s.refuse = 0
	s.mu.Unlock()
	s.set("services", "a", nil)
	s.service("c", "10.96.0.3")
	want(t, w, "c 10.96.0.3 []")
	status(t, w, func(st desired.Status) bool { return st.Error == "" && st.Confirmed.After(gone.Confirmed) })
	if !healthy.Settled.IsZero() || !w.Status().Settled.After(time.Now()) {
		t.Errorf("kube-proxy has until %v, and before the outage until %v", w.Status().Settled, healthy.Settled)
	}
}

// A server that was restarted lets watches begin, and then says that they have to
// begin anew. Until everything was listed, nothing is a sign that the objects are
// those of now.
func TestExpired(t *testing.T) {
	s, w := start(t)
	const before, after = "a 10.96.0.1 [10.0.0.1:8080 10.0.0.3:8080]", "a 10.96.0.1 [10.0.0.2:8080]"
	want(t, w, "a 10.96.0.1 [10.0.0.1:8080]")
	// A watch that has told something is begun anew from there.
	sent := time.Now()
	s.service("a", "10.96.0.1")
	s.node("n1")
	s.slice("10.0.0.1", "10.0.0.3")
	want(t, w, before)
	status(t, w, func(st desired.Status) bool { return st.Confirmed.After(sent) })
	s.mu.Lock()
	s.oldest = s.version + 1
	s.told = nil
	s.mu.Unlock()
	changed := time.Now()
	s.hangUp(0)
	s.slice("10.0.0.2")
	s.mu.Lock()
	s.told = nil
	s.mu.Unlock()
	status(t, w, func(st desired.Status) bool {
		w.Confirm(t.Context())
		st, text := w.Status(), tell(w)
		if st.Confirmed.After(changed) && text == before {
			t.Fatalf("the objects were confirmed %v after a change, which they lack", st.Confirmed.Sub(changed))
		}
		return text == after && st.Confirmed.After(changed)
	})
}

// A question is a sign of life also when nothing changes.
func TestConfirm(t *testing.T) {
	_, w := start(t)
	want(t, w, "a 10.96.0.1 [10.0.0.1:8080]")
	before := time.Now()
	status(t, w, func(st desired.Status) bool {
		w.Confirm(t.Context())
		return !st.Confirmed.Before(before)
	})
}

func TestForbidden(t *testing.T) {
	s, w := start(t)
	want(t, w, "a 10.96.0.1 [10.0.0.1:8080]")
	s.hangUp(http.StatusForbidden)
	status(t, w, func(st desired.Status) bool { return strings.Contains(st.Error, "ing services: ") })
}

// status waits until the status is as it should be.
func status(t *testing.T, w *kubeapi.Watch, ok func(desired.Status) bool) {
	t.Helper()
	patience := time.After(45 * time.Second) // client-go waits longer with each failure
	for !ok(w.Status()) {
		select {
		case <-w.Changed():
		case <-time.After(20 * time.Millisecond):
		case <-patience:
			t.Fatalf("status %+v", w.Status())
		}
	}
}
