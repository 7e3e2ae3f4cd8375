package kubeapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/selection"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/natlens/natlens/internal/desired"
	"github.com/natlens/natlens/internal/signal"
)

// Watch keeps objects as the API has them.
type Watch struct {
	objects *desired.Objects
	node    string
	core    rest.Interface
	kinds   []*kind
	changed signal.Signal
}

// kind is one kind of objects, being watched.
type kind struct {
	name   string
	store  cache.ReflectorStore
	lister *cache.ListWatch
	object runtime.Object

	tell      func()
	mu        sync.Mutex
	synced    bool
	watching  bool      // a watch is open
	turned    time.Time // when watching last changed
	confirmed time.Time
	lost      time.Time // since when nothing succeeds; zero while it does
	settled   time.Time // see desired.Status
	err       error
	complain  func(error)
}

// New prepares to watch what decides about the rules of the node of that name.
func New(config *rest.Config, nodeName string, log *slog.Logger) (*Watch, error) {
	core, discovery, err := clients(config)
	if err != nil {
		return nil, err
	}
	w := &Watch{objects: desired.NewObjects(nodeName), node: nodeName, core: core}
	add := func(name string, client rest.Interface, object runtime.Object, s store, narrow func(*metav1.ListOptions)) {
		k := &kind{name: name, object: object, tell: w.changed.Wake, complain: complainer(log, name)}
		s.watch, s.kind = w, k
		k.store = s
		k.lister = k.listWatch(cache.NewFilteredListWatchFromClient(client, name, metav1.NamespaceAll, narrow))
		w.kinds = append(w.kinds, k)
	}
	o := w.objects
	add("services", core, &corev1.Service{}, store{
		set:    func(x any) bool { return o.SetService(x.(*corev1.Service)) },
		remove: o.DeleteService,
		keys:   func() []desired.Key { keys, _ := o.Keys(); return keys },
	}, without("service.kubernetes.io/service-proxy-name"))
	add("endpointslices", discovery, &discoveryv1.EndpointSlice{}, store{
		set:    func(x any) bool { return o.SetSlice(x.(*discoveryv1.EndpointSlice)) },
		remove: o.DeleteSlice,
		keys:   func() []desired.Key { _, keys := o.Keys(); return keys },
	}, without("service.kubernetes.io/service-proxy-name", corev1.IsHeadlessService))
	add("nodes", core, &corev1.Node{}, store{
		set:    func(x any) bool { return o.SetNode(x.(*corev1.Node)) },
		remove: func(desired.Key) bool { return false }, // this agent would go with it
		keys:   func() []desired.Key { return nil },
	}, func(opts *metav1.ListOptions) {
		opts.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, nodeName).String()
	})
	return w, nil
}

// clients returns REST clients of the two groups. The typed clients would link,
// and register at start, every kind of Kubernetes: 10 MB of program for three.
func clients(config *rest.Config) (core, discovery rest.Interface, err error) {
	config = rest.CopyConfig(config)
	config.WarningHandler = rest.NoWarnings{}
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	scheme := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(scheme), discoveryv1.AddToScheme(scheme)); err != nil {
		return nil, nil, err
	}
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, nil, err
	}
	config.APIPath, config.GroupVersion = "/api", &corev1.SchemeGroupVersion
	if core, err = rest.RESTClientForConfigAndClient(config, client); err != nil {
		return nil, nil, err
	}
	config.APIPath, config.GroupVersion = "/apis", &discoveryv1.SchemeGroupVersion
	discovery, err = rest.RESTClientForConfigAndClient(config, client)
	return core, discovery, err
}

// without asks for objects that have none of the labels.
func without(names ...string) func(*metav1.ListOptions) {
	selector := labels.NewSelector()
	for _, name := range names {
		if r, err := labels.NewRequirement(name, selection.DoesNotExist, nil); err == nil {
			selector = selector.Add(*r)
		}
	}
	return func(opts *metav1.ListOptions) { opts.LabelSelector = selector.String() }
}

// Changed gets a value after objects have changed, or the status has.
func (w *Watch) Changed() <-chan struct{} { return w.changed.C() }

// Run lists and watches until the context ends, and again when that fails.
func (w *Watch) Run(ctx context.Context) {
	var wg sync.WaitGroup
	quiet := logr.Discard() // what fails is logged here
	for _, k := range w.kinds {
		pauses := retryPauses
		r := cache.NewReflectorWithOptions(k.lister, k.object, k.store, cache.ReflectorOptions{Name: "natlens", Logger: &quiet, Backoff: &pauses})
		wg.Go(func() { r.RunWithContext(ctx) })
	}
	wg.Wait()
}

// retryPauses are those of a reflector that cannot reach the API. client-go's own
// grow to 30 to 60 s; who tells what is wrong after an outage is to be back sooner.
var retryPauses = wait.Backoff{Duration: 800 * time.Millisecond, Factor: 2, Jitter: 1, Cap: 15 * time.Second, Steps: 10}

// Objects are what the API has.
func (w *Watch) Objects() *desired.Objects { return w.objects }

// Status tells how the watch stands.
func (w *Watch) Status() desired.Status {
	s := desired.Status{Synced: true}
	for i, k := range w.kinds {
		k.mu.Lock()
		s.Synced = s.Synced && k.synced
		if i == 0 || k.confirmed.Before(s.Confirmed) {
			s.Confirmed = k.confirmed
		}
		if k.settled.After(s.Settled) {
			s.Settled = k.settled
		}
		if s.Error == "" {
			s.Error = k.trouble()
		}
		k.mu.Unlock()
	}
	return s
}

// trouble says why the objects may not be those of now, with the lock held.
func (k *kind) trouble() string {
	// Between two watches there is a moment without one. It lasts when the server
	// has forgotten what there was to be told: it has to be asked for everything.
	const moment = 5 * time.Second
	switch {
	case k.err != nil:
		return k.err.Error()
	case k.synced && !k.watching && time.Since(k.turned) > moment:
		return fmt.Sprintf("the watch of %s has ended; the next is about to begin", k.name)
	}
	return ""
}

// Confirm asks the API for a sign of life. The question, one Node from the
// server's memory, goes over the connection that the watches share, so that what
// changed before it has been told, or is about to be. That is not so of a watch
// that has just begun: the server may yet tell what it missed, or that it has to
// begin anew.
func (w *Watch) Confirm(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, confirmTimeout)
	defer cancel()
	asked := time.Now()
	err := w.core.Get().Resource("nodes").Name(w.node).VersionedParams(&metav1.GetOptions{ResourceVersion: "0"}, metav1.ParameterCodec).Do(ctx).Error()
	if err != nil && !apierrors.IsNotFound(err) {
		return // the watches tell what is wrong, if it lasts
	}
	for _, k := range w.kinds {
		k.mu.Lock()
		if k.watching && asked.Sub(k.turned) >= caughtUp && k.confirmed.Before(asked) {
			k.confirmed = asked
		}
		k.mu.Unlock()
	}
}

const (
	// confirmTimeout bounds the wait for a sign of life.
	confirmTimeout = 5 * time.Second
	// caughtUp is how long a watch takes to tell what has changed before it began.
	caughtUp = 2 * time.Second
)

// listWatch notes what comes of listing and watching.
func (k *kind) listWatch(lw *cache.ListWatch) *cache.ListWatch {
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, opts metav1.ListOptions) (runtime.Object, error) {
			list, err := lw.ListWithContextFunc(ctx, opts)
			if err != nil && ctx.Err() == nil {
				k.mu.Lock()
				k.fail(fmt.Errorf("listing %s: %w", k.name, err))
				k.mu.Unlock()
			}
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
			w, err := lw.WatchFuncWithContext(ctx, opts)
			k.mu.Lock()
			defer k.mu.Unlock()
			if err != nil {
				// Servers before v1.32 do not know lists that are streamed: the
				// reflector asks in the old way then.
				if ctx.Err() == nil && !apierrors.IsInvalid(err) {
					k.fail(fmt.Errorf("watching %s: %w", k.name, err))
				}
				return nil, err
			}
			k.watching, k.turned = true, time.Now()
			k.back()
			return &watched{Interface: w, kind: k}, nil
		},
	}
}

// fail notes an error, with the lock held.
func (k *kind) fail(err error) {
	k.ended()
	if k.err = err; k.lost.IsZero() {
		k.lost = time.Now()
	}
	k.complain(err)
	k.tell()
}

// ended notes that no watch is open, with the lock held.
func (k *kind) ended() {
	if k.watching {
		k.watching, k.turned = false, time.Now()
	}
}

// back notes that the API is there, with the lock held.
func (k *kind) back() {
	if k.err != nil {
		k.err = nil
		k.tell()
	}
	if !k.lost.IsZero() {
		now := time.Now()
		k.settled = now.Add(min(outageShare*now.Sub(k.lost), longestPause))
		k.lost = time.Time{}
	}
}

// kube-proxy has lost the API too, and asks again after pauses that grow with the
// outage, up to a minute (client-go's reflectors). It may have to do so twice: for
// the watch, and then for all objects.
const (
	outageShare  = 4
	longestPause = 2 * time.Minute
)

// watched is a watch whose end is noted.
type watched struct {
	watch.Interface
	kind *kind
}

// Stop implements watch.Interface. The reflector calls it when a watch is over,
// whoever ended it.
func (w *watched) Stop() {
	w.kind.mu.Lock()
	w.kind.ended()
	w.kind.mu.Unlock()
	w.Interface.Stop()
}

// store passes on what the reflector hears; it keeps nothing itself.
type store struct {
	watch  *Watch
	kind   *kind
	set    func(any) bool
	remove func(desired.Key) bool
	keys   func() []desired.Key
}

func keyOf(x any) (desired.Key, bool) {
	m, ok := x.(metav1.ObjectMetaAccessor)
	if !ok {
		return desired.Key{}, false
	}
	return desired.Key{Namespace: m.GetObjectMeta().GetNamespace(), Name: m.GetObjectMeta().GetName()}, true
}

// alive notes a sign of life, and passes on whether anything has changed.
func (s store) alive(changed bool) error {
	s.kind.mu.Lock()
	s.kind.confirmed = time.Now()
	s.kind.mu.Unlock()
	if changed {
		s.watch.changed.Wake()
	}
	return nil
}

// Add implements cache.ReflectorStore.
func (s store) Add(x any) error { return s.alive(s.set(x)) }

// Update implements cache.ReflectorStore.
func (s store) Update(x any) error { return s.alive(s.set(x)) }

// Delete implements cache.ReflectorStore.
func (s store) Delete(x any) error {
	key, ok := keyOf(x)
	return s.alive(ok && s.remove(key))
}

// Replace implements cache.ReflectorStore.
func (s store) Replace(list []any, _ string) error {
	there := make(map[desired.Key]bool, len(list))
	for _, x := range list {
		if key, ok := keyOf(x); ok {
			there[key] = true
		}
		s.set(x)
	}
	for _, key := range s.keys() {
		if !there[key] {
			s.remove(key)
		}
	}
	s.kind.mu.Lock()
	if s.kind.synced = true; !s.kind.watching {
		s.kind.turned = time.Now() // a watch is about to begin
	}
	s.kind.back()
	s.kind.mu.Unlock()
	return s.alive(true)
}

// Bookmark implements cache.ReflectorBookmarkStore.
func (s store) Bookmark(string) error { return s.alive(false) }

// Resync implements cache.ReflectorStore.
func (s store) Resync() error { return nil }

// complainer logs an error when it is another than the last one, and once in a
// while when it stays.
func complainer(log *slog.Logger, kind string) func(error) {
	var last string
	var at time.Time
	return func(err error) {
		if text := err.Error(); text != last || time.Since(at) > 5*time.Minute {
			last, at = text, time.Now()
			log.Warn("the Kubernetes API cannot be watched; the rules are not compared with anything newer", "kind", kind, "error", err)
		}
	}
}
