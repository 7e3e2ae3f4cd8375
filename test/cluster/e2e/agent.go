package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/natlens/natlens/test/cluster/kube"
)

// The agent's JSON, as far as the suites look at it, and as a script of a user
// does: by the names in its OpenAPI document.
type (
	servicesDoc struct {
		Snapshot struct {
			Node, Backend, Error string
			Stale                bool
			Time                 time.Time
			API                  struct {
				Compared bool
				Error    string
			}
		}
		Services []serviceDoc
		Findings []findingDoc
	}
	serviceDoc struct {
		Namespace, Name, Port, Protocol string
		Frontends                       []frontendDoc
		Findings                        []findingDoc
	}
	frontendDoc struct {
		Type, Family, Address string
		Port                  int
		Routes                []routeDoc
	}
	routeDoc struct {
		From                           []string
		Sources                        []netip.Prefix
		Verdict                        string
		Masquerade                     bool
		Endpoints                      []endpointDoc
		Undelivered, Rejected, Dropped float64
		Unknown                        []string
	}
	endpointDoc struct {
		Address    string
		Share      float64
		Chain      string
		Masquerade *bool // where it is not the route's
	}
	findingDoc struct {
		Code, Severity, Message string
		Service                 *struct{ Namespace, Name, Port, Protocol string }
	}
)

// agentGet asks the agent of a node on its loopback address, and decodes its JSON.
func agentGet(ctx context.Context, n *kube.Node, path string, into any) error {
	body, err := httpGet(ctx, n.Client(), "http://127.0.0.1:9754"+path)
	if err != nil {
		return fmt.Errorf("agent of %s: %w", n.Name, err)
	}
	return json.Unmarshal(body, into)
}

// agentService returns what the agent of a node says of one Service.
func agentService(ctx context.Context, n *kube.Node, namespace, name string) ([]serviceDoc, error) {
	var doc servicesDoc
	if err := agentGet(ctx, n, "/api/v1/services/"+namespace+"/"+name, &doc); err != nil {
		return nil, err
	}
	return doc.Services, nil
}

// httpGet returns the body of an answer with status 200; any other is an error.
func httpGet(ctx context.Context, client *http.Client, url string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, res.Status, strings.TrimSpace(string(body)))
	}
	return body, err
}
