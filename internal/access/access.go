package access

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/cache"
	"k8s.io/client-go/rest"
)

// How long an answer of the API server is believed; the kubelet's defaults. A
// right that was taken away ends after rightFor at the latest, a token after
// userFor. A no is asked about again sooner, since somebody may be waiting.
const (
	userFor  = 2 * time.Minute
	rightFor = 5 * time.Minute
	noFor    = 30 * time.Second
)

const (
	// maxAnswers bounds each of the four kinds of answers that are remembered.
	maxAnswers = 1024
	// reviewTimeout bounds a question to the API server.
	reviewTimeout = 5 * time.Second
	// Questions per second, and how many at once after a quiet time. Whoever was
	// let in within familiarFor has a rate of his own, so that a flood of wrong
	// tokens does not keep him out.
	reviewRate, reviewBurst = 20, 40
	familiarFor             = time.Hour
)

// ErrUnauthenticated is returned for a token that the API server does not know.
var ErrUnauthenticated = errors.New("the token is not, or no longer, valid in this cluster")

// A ForbiddenError is returned for a user who lacks a right.
type ForbiddenError struct {
	User string
	URL  string // the nonResourceURL that he may not get
}

// Error implements error.
func (e *ForbiddenError) Error() string {
	return fmt.Sprintf("%q may not get the nonResourceURL %s: bind a ClusterRole to it that grants so, such as natlens-reader or natlens-metrics-reader", e.User, e.URL)
}

// nonResourceURL is what a right to a path of the agent is called in a
// ClusterRole. By default, Kubernetes grants /api/*, /version and more to whoever
// has a token at all (system:discovery), which is meant for the API server; so
// the agent's paths stand below /natlens. Only /metrics means the same
// everywhere, and monitoring has the right to it already.
func nonResourceURL(path string) string {
	if path == "/metrics" {
		return path
	}
	return "/natlens" + path
}

// errBusy is returned when there are more questions than the API server is
// bothered with.
var errBusy = errors.New("too many callers ask at once who may read")

// key stands for a token, or for a token and a path: neither is kept.
type key [sha256.Size]byte

// Gate decides who may read. Its methods may be called at the same time.
type Gate struct {
	tokens, rights rest.Interface // of the API groups that TokenReview and SubjectAccessReview are in
	log            *slog.Logger

	users, strangers *cache.LRUExpireCache // by token: owner, struct{}
	allowed, denied  *cache.LRUExpireCache // by token and path: struct{}

	flight              singleflight.Group // the same question is asked once
	newcomers, familiar *rate.Limiter      // bound the questions, and so those on their way
	complain            rate.Sometimes     // bounds the log
}

// owner is whose a token was.
type owner struct {
	authenticationv1.UserInfo
	until time.Time // then it is time to ask again
}

// New returns a gate that asks the API server of a configuration.
func New(config *rest.Config, log *slog.Logger) (*Gate, error) {
	config = rest.CopyConfig(config)
	config.QPS = -1 // the gate's own limits refuse at once, where this would queue
	config.WarningHandler = rest.NoWarnings{}
	config.APIPath = "/apis"
	config.ContentType = runtime.ContentTypeJSON
	// The typed clients would link, and register at start, every kind of
	// Kubernetes: 10 MB of program for two of them.
	scheme := runtime.NewScheme()
	if err := errors.Join(authenticationv1.AddToScheme(scheme), authorizationv1.AddToScheme(scheme)); err != nil {
		return nil, err
	}
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, err
	}
	config.GroupVersion = &authenticationv1.SchemeGroupVersion
	tokens, err := rest.RESTClientForConfigAndClient(config, client)
	if err != nil {
		return nil, err
	}
	config.GroupVersion = &authorizationv1.SchemeGroupVersion
	rights, err := rest.RESTClientForConfigAndClient(config, client)
	if err != nil {
		return nil, err
	}
	return &Gate{
		tokens:    tokens,
		rights:    rights,
		log:       log,
		users:     cache.NewLRUExpireCache(maxAnswers),
		strangers: cache.NewLRUExpireCache(maxAnswers),
		allowed:   cache.NewLRUExpireCache(maxAnswers),
		denied:    cache.NewLRUExpireCache(maxAnswers),
		newcomers: rate.NewLimiter(reviewRate, reviewBurst),
		familiar:  rate.NewLimiter(reviewRate, reviewBurst),
		complain:  rate.Sometimes{Interval: time.Minute},
	}, nil
}

// Check reports whether the owner of a token may get a path: nil,
// [ErrUnauthenticated], a [*ForbiddenError], or another error when nobody could
// say. That last one is for the log; it may name what a stranger need not know.
func (g *Gate) Check(ctx context.Context, token, path string) error {
	who := key(sha256.Sum256([]byte(token)))
	user, err := g.user(ctx, who, token)
	if err != nil {
		return err
	}
	// The digest has a fixed length, so no other token and path give the same.
	return g.mayGet(ctx, key(sha256.Sum256(append(who[:], path...))), user, nonResourceURL(path))
}

// user returns the owner of a token.
func (g *Gate) user(ctx context.Context, who key, token string) (authenticationv1.UserInfo, error) {
	limit := g.newcomers
	if known, ok := g.users.Get(who); ok {
		if o := known.(owner); !time.Now().After(o.until) {
			return o.UserInfo, nil
		}
		limit = g.familiar
	}
	if _, ok := g.strangers.Get(who); ok {
		return authenticationv1.UserInfo{}, ErrUnauthenticated
	}
	answer, err := g.ask(ctx, limit, "token "+string(who[:]), func(ctx context.Context) (any, error) {
		asked := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token}}
		var review authenticationv1.TokenReview
		if err := g.tokens.Post().Resource("tokenreviews").Body(asked).Do(ctx).Into(&review); err != nil {
			return nil, g.unanswered(fmt.Errorf("asking the API server whose token it is: %w", err))
		}
		// A token that nobody owns would be anybody's.
		if !review.Status.Authenticated || review.Status.User.Username == "" {
			g.users.Remove(who)
			g.strangers.Add(who, struct{}{}, noFor)
			return nil, ErrUnauthenticated
		}
		g.users.Add(who, owner{review.Status.User, time.Now().Add(userFor)}, familiarFor)
		return review.Status.User, nil
	})
	if err != nil {
		return authenticationv1.UserInfo{}, err
	}
	return answer.(authenticationv1.UserInfo), nil
}

// mayGet asks for the right to get a URL.
func (g *Gate) mayGet(ctx context.Context, what key, user authenticationv1.UserInfo, url string) error {
	forbidden := &ForbiddenError{User: user.Username, URL: url}
	if _, ok := g.allowed.Get(what); ok {
		return nil
	}
	if _, ok := g.denied.Get(what); ok {
		return forbidden
	}
	_, err := g.ask(ctx, g.familiar, "right "+string(what[:]), func(ctx context.Context) (any, error) {
		asked := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
			User: user.Username, UID: user.UID, Groups: user.Groups, Extra: extra(user),
			NonResourceAttributes: &authorizationv1.NonResourceAttributes{Path: url, Verb: "get"},
		}}
		var review authorizationv1.SubjectAccessReview
		if err := g.rights.Post().Resource("subjectaccessreviews").Body(asked).Do(ctx).Into(&review); err != nil {
			return nil, g.unanswered(fmt.Errorf("asking the API server whether %q may get %s: %w", user.Username, url, err))
		}
		if !review.Status.Allowed {
			g.denied.Add(what, struct{}{}, noFor)
			return nil, forbidden
		}
		g.allowed.Add(what, struct{}{}, rightFor)
		return nil, nil
	})
	return err
}

// extra says in the words of one API what the other said.
func extra(user authenticationv1.UserInfo) map[string]authorizationv1.ExtraValue {
	out := make(map[string]authorizationv1.ExtraValue, len(user.Extra))
	for k, v := range user.Extra {
		out[k] = authorizationv1.ExtraValue(v)
	}
	return out
}

// ask puts a question to the API server, unless the same one is on its way: then
// it waits for that answer. A caller that leaves takes nobody's answer with it.
func (g *Gate) ask(ctx context.Context, limit *rate.Limiter, question string, put func(context.Context) (any, error)) (any, error) {
	answer := g.flight.DoChan(question, func() (any, error) {
		if !limit.Allow() {
			return nil, errBusy
		}
		ctx, cancel := context.WithTimeout(context.Background(), reviewTimeout)
		defer cancel()
		return put(ctx)
	})
	select {
	case a := <-answer:
		return a.Val, a.Err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// unanswered logs that the API server did not answer, now and then.
func (g *Gate) unanswered(err error) error {
	g.complain.Do(func() {
		g.log.Warn("nobody new is let in over the network: the API server does not say who may read", "error", err)
	})
	return err
}
