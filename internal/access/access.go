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
	// Questions per second, and how many at once after a quiet time; more wait,
	// those refused that would wait for longer than reviewTimeout. Whoever was let
	// in within familiarFor does not stand in the queue of newcomers, so that a
	// flood of wrong tokens does not keep him out.
	newcomerRate, newcomerBurst = 20, 40
	familiarRate, familiarBurst = 100, 200
	familiarFor                 = time.Hour
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
	user  *authenticationv1.UserInfo
	until time.Time // then it is time to ask again
}

// New returns a gate that asks the API server of a configuration.
func New(config *rest.Config, log *slog.Logger) (*Gate, error) {
	config = rest.CopyConfig(config)
	config.QPS = -1 // the gate has limits of its own, for two kinds of callers
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
		newcomers: rate.NewLimiter(newcomerRate, newcomerBurst),
		familiar:  rate.NewLimiter(familiarRate, familiarBurst),
		complain:  rate.Sometimes{Interval: time.Minute},
	}, nil
}

// Check reports whether the owner of a token may get a path: nil,
// [ErrUnauthenticated], a [*ForbiddenError], or another error when nobody could
// say. That last one is for the log; it may name what a stranger need not know.
func (g *Gate) Check(ctx context.Context, token, path string) error {
	// For both questions together; the answer to the second is remembered all the
	// same, for the next try.
	ctx, cancel := context.WithTimeout(ctx, reviewTimeout)
	defer cancel()
	who := key(sha256.Sum256([]byte(token)))
	user, err := g.user(ctx, who, token)
	if err != nil {
		return err
	}
	if user == nil {
		return ErrUnauthenticated
	}
	url := nonResourceURL(path)
	// The digest has a fixed length, so no other token and URL give the same.
	allowed, err := g.mayGet(ctx, key(sha256.Sum256(append(who[:], url...))), user, url)
	if err == nil && !allowed {
		err = &ForbiddenError{User: user.Username, URL: url}
	}
	return err
}

// user returns the owner of a token, nil if nobody is.
func (g *Gate) user(ctx context.Context, who key, token string) (*authenticationv1.UserInfo, error) {
	user, known := g.recallUser(who)
	if known {
		return user, nil
	}
	limit := g.newcomers
	if _, ok := g.users.Get(who); ok {
		limit = g.familiar
	}
	answer, err := g.ask(ctx, limit, "token "+string(who[:]), func(ctx context.Context) (any, error) {
		if user, known := g.recallUser(who); known { // answered a moment ago
			return user, nil
		}
		asked := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token}}
		var review authenticationv1.TokenReview
		if err := g.tokens.Post().Resource("tokenreviews").Body(asked).Do(ctx).Into(&review); err != nil {
			return nil, g.unanswered(fmt.Errorf("asking the API server whose token it is: %w", err))
		}
		// A token that nobody owns would be anybody's.
		if !review.Status.Authenticated || review.Status.User.Username == "" {
			g.users.Remove(who)
			g.strangers.Add(who, struct{}{}, noFor)
			return (*authenticationv1.UserInfo)(nil), nil
		}
		user := &review.Status.User
		g.users.Add(who, owner{user, time.Now().Add(userFor)}, familiarFor)
		return user, nil
	})
	if err != nil {
		return nil, err
	}
	return answer.(*authenticationv1.UserInfo), nil
}

// recallUser returns the owner of a token, nil if nobody is, as last answered.
func (g *Gate) recallUser(who key) (user *authenticationv1.UserInfo, known bool) {
	if v, ok := g.users.Get(who); ok {
		if o := v.(owner); !time.Now().After(o.until) {
			return o.user, true
		}
	}
	_, known = g.strangers.Get(who)
	return nil, known
}

// mayGet reports whether a user has the right to get a URL; what stands for the
// user's token and the URL.
func (g *Gate) mayGet(ctx context.Context, what key, user *authenticationv1.UserInfo, url string) (bool, error) {
	allowed, known := g.recallRight(what)
	if known {
		return allowed, nil
	}
	answer, err := g.ask(ctx, g.familiar, "right "+string(what[:]), func(ctx context.Context) (any, error) {
		if allowed, known := g.recallRight(what); known { // answered a moment ago
			return allowed, nil
		}
		asked := &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
			User: user.Username, UID: user.UID, Groups: user.Groups, Extra: extra(user),
			NonResourceAttributes: &authorizationv1.NonResourceAttributes{Path: url, Verb: "get"},
		}}
		var review authorizationv1.SubjectAccessReview
		if err := g.rights.Post().Resource("subjectaccessreviews").Body(asked).Do(ctx).Into(&review); err != nil {
			return nil, g.unanswered(fmt.Errorf("asking the API server whether %q may get %s: %w", user.Username, url, err))
		}
		if review.Status.Allowed {
			g.allowed.Add(what, struct{}{}, rightFor)
		} else {
			g.denied.Add(what, struct{}{}, noFor)
		}
		return review.Status.Allowed, nil
	})
	if err != nil {
		return false, err
	}
	return answer.(bool), nil
}

// recallRight returns what was last answered about a right.
func (g *Gate) recallRight(what key) (allowed, known bool) {
	if _, allowed = g.allowed.Get(what); allowed {
		return true, true
	}
	_, known = g.denied.Get(what)
	return false, known
}

// extra says in the words of one API what the other said.
func extra(user *authenticationv1.UserInfo) map[string]authorizationv1.ExtraValue {
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
		ctx, cancel := context.WithTimeout(context.Background(), reviewTimeout)
		defer cancel()
		if err := limit.Wait(ctx); err != nil {
			return nil, errBusy
		}
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
