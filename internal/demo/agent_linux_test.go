package demo

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// nobody is a user without any privilege.
const nobody = 65534

// agent is a built agent, in a directory where everybody may run it.
type agent struct {
	path string
	tmp  string // its TMPDIR, where everybody may write
}

// newAgent builds the agent.
func newAgent(t *testing.T) agent {
	t.Helper()
	if os.Geteuid() != 0 {
		unable(t, "running the demo as root and as another user needs root")
	}
	if _, err := findBackend(); err != nil {
		unable(t, "%v", err)
	}
	goTool, err := exec.LookPath("go")
	if err != nil {
		unable(t, "%v", err)
	}
	dir, err := os.MkdirTemp("", "natlens-test-") // t.TempDir's parent is for the owner only
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	a := agent{filepath.Join(dir, "agent"), filepath.Join(dir, "tmp")}
	if out, err := exec.CommandContext(t.Context(), goTool, "build", "-o", a.path, "github.com/natlens/natlens/cmd/agent").CombinedOutput(); err != nil {
		t.Fatalf("building the agent: %v\n%s", err, out)
	}
	if err := errors.Join(os.Chmod(dir, 0o755), os.Mkdir(a.tmp, 0o700), os.Chmod(a.tmp, 0o777)); err != nil {
		t.Fatal(err)
	}
	return a
}

// command returns the agent's command line, to be run as a user.
func (a agent) command(t *testing.T, uid uint32, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), a.path, args...)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "TMPDIR="+a.tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if uid != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uid, Gid: uid}
	}
	return cmd
}

// processes returns the numbers of the processes that run the agent, but not of
// those that have ended and are not waited for.
func (a agent) processes(t *testing.T) []int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		t.Fatal(err)
	}
	var list []int
	for _, f := range files {
		if to, err := os.Readlink(f); err == nil && to == a.path {
			if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f))); err == nil {
				list = append(list, pid)
			}
		}
	}
	return list
}

// namedNamespaces are those that outlive their processes: what is mounted.
func namedNamespaces(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, " nsfs ") {
			list = append(list, line)
		}
	}
	return strings.Join(list, "")
}

// gone wants nothing of the agent to be left.
func (a agent) gone(t *testing.T, namedBefore string) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for len(a.processes(t)) > 0 && time.Now().Before(deadline) {
		time.Sleep(20 * time.Millisecond)
	}
	// Without a process and without a mount, a namespace is no more.
	if left := a.processes(t); len(left) > 0 {
		t.Errorf("processes left behind: %v", left)
	}
	if after := namedNamespaces(t); after != namedBefore {
		t.Errorf("namespaces were %q and are %q", namedBefore, after)
	}
	if left, err := os.ReadDir(a.tmp); err != nil || len(left) > 0 {
		t.Errorf("left behind in TMPDIR: %v, %v", left, err)
	}
}

// running is an agent that serves.
type running struct {
	cmd    *exec.Cmd
	url    string
	stderr *bytes.Buffer

	reader sync.WaitGroup
	mu     sync.Mutex
	stdout bytes.Buffer
}

// startAgent starts the agent and waits for its address.
func startAgent(t *testing.T, cmd *exec.Cmd) *running {
	t.Helper()
	r := &running{cmd: cmd, stderr: new(bytes.Buffer)}
	cmd.Stderr = r.stderr
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	url := make(chan string, 1)
	r.reader.Go(func() {
		found := regexp.MustCompile(`^  (http://\S+)/$`)
		lines := bufio.NewScanner(pipe)
		for lines.Scan() {
			r.mu.Lock()
			fmt.Fprintln(&r.stdout, lines.Text())
			r.mu.Unlock()
			if m := found.FindStringSubmatch(lines.Text()); m != nil {
				url <- m[1]
			}
		}
		close(url)
	})
	select {
	case r.url = <-url:
	case <-time.After(20 * time.Second):
	}
	if r.url == "" {
		cmd.Process.Kill()
		code := r.wait(t)
		t.Fatalf("no address; exit code %d\nstdout: %s\nstderr: %s", code, r.output(), r.stderr)
	}
	return r
}

func (r *running) output() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stdout.String()
}

// wait returns the exit code.
func (r *running) wait(t *testing.T) int {
	t.Helper()
	timer := time.AfterFunc(20*time.Second, func() {
		t.Error("the agent does not end")
		r.cmd.Process.Kill()
	})
	defer timer.Stop()
	r.reader.Wait() // before Wait, which closes the pipe
	r.cmd.Wait()
	return r.cmd.ProcessState.ExitCode()
}

func (r *running) fetch(t *testing.T, path string) string {
	t.Helper()
	client := http.Client{Timeout: 10 * time.Second}
	res, err := client.Get(r.url + path)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s, %v\n%s", path, res.Status, err, body)
	}
	client.CloseIdleConnections()
	return string(body)
}

// TestAgentDemo runs the agent's demo as a person would, as root and as a user.
func TestAgentDemo(t *testing.T) {
	a := newAgent(t)
	for _, c := range []struct {
		name   string
		uid    uint32
		signal syscall.Signal
		args   []string
		live   bool
	}{
		{"root", 0, syscall.SIGINT, nil, true},
		{"user", nobody, syscall.SIGINT, nil, true},
		{"user, SIGTERM", nobody, syscall.SIGTERM, nil, true},
		{"recorded, user", nobody, syscall.SIGINT, []string{"--recorded"}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			named := namedNamespaces(t)
			cmd := a.command(t, c.uid, append([]string{"demo", "--listen", "127.0.0.1:0"}, c.args...)...)
			if !c.live {
				cmd.Env = append(cmd.Env, "PATH=/nonexistent")
			}
			r := startAgent(t, cmd)
			checkAPI(t, r, c.live)
			if want := map[bool]int{true: 2, false: 1}[c.live && c.uid != 0]; len(a.processes(t)) != want {
				t.Errorf("the agent runs as %d processes, want %d", len(a.processes(t)), want)
			}
			if c.live {
				time.Sleep(1500 * time.Millisecond) // some traffic
			}
			if err := cmd.Process.Signal(c.signal); err != nil {
				t.Fatal(err)
			}
			if code := r.wait(t); code != 0 || r.stderr.Len() > 0 {
				t.Errorf("exit code %d, stderr %q", code, r.stderr)
			}
			_, summary, ok := strings.Cut(r.output(), "What the traffic did:\n")
			if ok != c.live || c.live && !regexp.MustCompile(`(?m)^default/go-app +pod .* go-app-\d`).MatchString(summary) {
				t.Errorf("stdout is:\n%s", r.output())
			}
			a.gone(t, named)
		})
	}
}

// checkAPI fetches what the demo tells people to look at.
func checkAPI(t *testing.T, r *running, live bool) {
	t.Helper()
	var doc struct {
		Snapshot struct {
			Node, Backend string
			Stale         bool
		}
		Services []struct {
			Name      string
			Frontends []struct {
				Routes []struct {
					Endpoints []struct{ Share float64 }
				}
			}
		}
	}
	if err := json.Unmarshal([]byte(r.fetch(t, "/api/v1/services/default/go-app")), &doc); err != nil {
		t.Fatal(err)
	}
	if len(doc.Services) != 1 || doc.Services[0].Name != "go-app" || doc.Snapshot.Stale || doc.Snapshot.Node != "demo" {
		t.Fatalf("the API says %+v", doc)
	}
	if file := doc.Snapshot.Backend == "file"; file == live {
		t.Errorf("the backend is %q", doc.Snapshot.Backend)
	}
	for _, f := range doc.Services[0].Frontends {
		for _, route := range f.Routes {
			if len(route.Endpoints) != 3 {
				t.Errorf("a route of default/go-app has %d endpoints", len(route.Endpoints))
			}
			for _, e := range route.Endpoints {
				if !near(e.Share, 1.0/3) {
					t.Errorf("an endpoint of default/go-app has %v", e.Share)
				}
			}
		}
	}
	if text := r.fetch(t, "/metrics"); !strings.Contains(text, "\nnatlens_") || !strings.Contains(text, `"go-app"`) {
		t.Errorf("/metrics says nothing of go-app:\n%s", text)
	}
	if text := r.fetch(t, "/api/v1/echo"); strings.Contains(text, `"probing":true`) != live || strings.Contains(text, `"frontend":"10.56.11.169:80"`) != live {
		t.Errorf("/api/v1/echo says %s", text)
	}
	if text := r.fetch(t, "/"); !strings.Contains(strings.ToLower(text), "<html") {
		t.Errorf("/ is no page:\n%.300s", text)
	}
}

// TestAgentDemoKilled wants nothing to survive an agent that has no chance to
// clean up, but for an empty directory.
func TestAgentDemoKilled(t *testing.T) {
	a := newAgent(t)
	named := namedNamespaces(t)
	cmd := a.command(t, nobody, "demo", "--listen", "127.0.0.1:0")
	r := startAgent(t, cmd)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	r.wait(t)
	left, err := os.ReadDir(a.tmp)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range left {
		if err := os.Remove(filepath.Join(a.tmp, d.Name())); err != nil {
			t.Errorf("left behind, and not an empty directory: %v", err)
		}
	}
	a.gone(t, named)
}

// TestAgentDemoDuration wants the demo to end by itself.
func TestAgentDemoDuration(t *testing.T) {
	a := newAgent(t)
	for _, uid := range []uint32{0, nobody} {
		named := namedNamespaces(t)
		r := startAgent(t, a.command(t, uid, "demo", "--listen", "127.0.0.1:0", "--duration", "1500ms"))
		if code := r.wait(t); code != 0 || r.stderr.Len() > 0 || !strings.Contains(r.output(), "What the traffic did:") {
			t.Errorf("as user %d: exit code %d, stderr %q, stdout\n%s", uid, code, r.stderr, r.output())
		}
		a.gone(t, named)
	}
}

// failing runs an agent that is to fail, and returns its one line on stderr.
func failing(t *testing.T, cmd *exec.Cmd, code int) string {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.Run()
	if got := cmd.ProcessState.ExitCode(); got != code || stdout.Len() > 0 {
		t.Errorf("exit code %d, stdout %q; want code %d and nothing", got, &stdout, code)
	}
	if strings.Count(stderr.String(), "\n") != 1 || !strings.HasPrefix(stderr.String(), "agent: ") {
		t.Errorf("stderr is %q, want one line", &stderr)
	}
	return stderr.String()
}

// TestAgentDemoPortBusy wants one clear line for a port that is taken.
func TestAgentDemoPortBusy(t *testing.T) {
	a := newAgent(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for _, uid := range []uint32{0, nobody} {
		line := failing(t, a.command(t, uid, "demo", "--listen", ln.Addr().String()), 1)
		if !strings.Contains(line, "--listen") || !strings.Contains(line, ln.Addr().String()) {
			t.Errorf("as user %d, it says %q", uid, line)
		}
	}
}

// TestAgentDemoForbidden wants the recorded rules where users may not make user
// namespaces. A namespace with a limit of its own is such a place.
func TestAgentDemoForbidden(t *testing.T) {
	a := newAgent(t)
	setpriv, err := exec.LookPath("setpriv")
	if err != nil {
		unable(t, "%v", err)
	}
	script := fmt.Sprintf("echo 0 > /proc/sys/user/max_user_namespaces && exec %s --reuid %d --regid %d --clear-groups %s demo --listen 127.0.0.1:0", setpriv, nobody, nobody, a.path)
	cmd := exec.CommandContext(t.Context(), "sh", "-c", script)
	cmd.Dir = "/"
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: nobody + 1}}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids, GidMappingsEnableSetgroups: true,
		Pdeathsig: syscall.SIGKILL,
	}
	recordedInstead(t, cmd, "user namespace", "root")
}

// recordedInstead wants the agent to say in one line why it cannot run the
// demo, and to show the recorded rules.
func recordedInstead(t *testing.T, cmd *exec.Cmd, reasons ...string) {
	t.Helper()
	r := startAgent(t, cmd)
	if !strings.Contains(r.fetch(t, "/api/v1/services/default/go-app"), "10.52.1.4:8080") {
		t.Error("it does not serve the recorded rules")
	}
	if err := r.cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if code := r.wait(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	line := strings.TrimSuffix(r.stderr.String(), "\n")
	for _, reason := range append(reasons, "agent: ", "--recorded") {
		if !strings.Contains(line, reason) || strings.Contains(line, "\n") {
			t.Errorf("it says %q, which is not one line about %q", line, reason)
		}
	}
	if !strings.Contains(r.output(), "A node from a dump") {
		t.Errorf("stdout: %s", r.output())
	}
}

// TestAgentDemoNoIptables wants the recorded rules where there is no iptables.
func TestAgentDemoNoIptables(t *testing.T) {
	a := newAgent(t)
	// The agent adds the usual directories to PATH, so they must be empty: in a
	// mount namespace of its own, they are hidden.
	script := "for d in /usr/local/sbin /usr/sbin /sbin; do [ -L $d ] || [ ! -d $d ] || mount -t tmpfs none $d || exit 9; done; exec " + a.path + " demo --listen 127.0.0.1:0"
	cmd := exec.CommandContext(t.Context(), "sh", "-c", script)
	cmd.Dir = "/"
	cmd.Env = append(os.Environ(), "PATH=/usr/bin:/bin", "TMPDIR="+a.tmp)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	recordedInstead(t, cmd, "install the package iptables")
}
