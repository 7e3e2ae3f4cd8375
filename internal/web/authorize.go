package web

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/natlens/natlens/internal/access"
)

// open are the paths that need no right: whether the agent lives is no secret,
// and the kubelet that asks has no token.
var open = []string{"/livez", "/readyz", "/healthz"}

// maxAuthorized ends an answer that takes longer, an event stream, so that the
// right to it is asked for again; the page reconnects by itself.
const maxAuthorized = 5 * time.Minute

// Authorize passes on the requests whose bearer token check lets get the path,
// as [access.Gate.Check] does. A token in the address would stand in logs, so it
// is looked for in the Authorization header alone.
func Authorize(next http.Handler, check func(ctx context.Context, token, path string) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// A right is to a path as the routes above see it: a segment that hides
		// a slash in %2F stays one segment there.
		if slices.Contains(open, r.URL.Path) {
			next.ServeHTTP(w, r)
			return
		}
		token := bearer(r.Header.Get("Authorization"))
		if token == "" {
			refuse(w, http.StatusUnauthorized, "a bearer token is needed: Authorization: Bearer …")
			return
		}
		var forbidden *access.ForbiddenError
		err := check(r.Context(), token, r.URL.Path)
		switch {
		case err == nil:
			ctx, cancel := context.WithTimeout(r.Context(), maxAuthorized)
			defer cancel()
			next.ServeHTTP(w, r.WithContext(ctx))
		case errors.Is(err, access.ErrUnauthenticated):
			refuse(w, http.StatusUnauthorized, err.Error())
		case errors.As(err, &forbidden):
			refuse(w, http.StatusForbidden, err.Error())
		default:
			w.Header().Set("Retry-After", "5")
			refuse(w, http.StatusServiceUnavailable, "the Kubernetes API server cannot be asked now who may read; whom it let in within the last minutes still may, and so does everybody on the node's loopback address")
		}
	})
}

// bearer returns the token of an Authorization header, empty if there is none.
func bearer(header string) string {
	scheme, token, _ := strings.Cut(header, " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return strings.TrimSpace(token)
}

// refuse answers, and gives the connection to somebody else: the number of them
// is bounded.
func refuse(w http.ResponseWriter, code int, message string) {
	if code == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", `Bearer realm="natlens"`)
	}
	w.Header().Set("Connection", "close")
	fail(w, code, message)
}
