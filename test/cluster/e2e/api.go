package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strings"
	"time"
)

// kubeAPI speaks to the API server through "kubectl proxy": a kubectl for each of
// many changes would take the machine's time from what is looked at.
type kubeAPI struct {
	client *http.Client
	port   int
}

const apiProxyPort = 8901

// openAPI starts the proxy, which ends with the context.
func (b *bench) openAPI(ctx context.Context) (*kubeAPI, error) {
	cmd := exec.CommandContext(ctx, b.KubectlPath(), "proxy", fmt.Sprint("--port=", apiProxyPort))
	if err := b.StartKubectl(cmd); err != nil {
		return nil, err
	}
	go func() { _ = cmd.Wait() }()
	a := &kubeAPI{b.Control.Client(), apiProxyPort}
	return a, eventually(ctx, 10*time.Second, func() error { return a.do(ctx, http.MethodGet, "/version", nil, nil) })
}

// do makes one request with a JSON body, if there is one, and decodes the answer
// into a value, if one is given. A patch is a merge patch; for status a strategic
// one, which merges conditions by type.
func (a *kubeAPI) do(ctx context.Context, method, path string, body, into any) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, fmt.Sprintf("http://127.0.0.1:%d%s", a.port, path), bytes.NewReader(text))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	if method == http.MethodPatch {
		req.Header.Set("Content-Type", "application/merge-patch+json")
		if strings.HasSuffix(path, "/status") {
			req.Header.Set("Content-Type", "application/strategic-merge-patch+json")
		}
	}
	res, err := a.client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode >= 300 {
		return fmt.Errorf("%s %s: %s: %.300s", method, path, res.Status, answer)
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(answer, into)
}
