package web

import (
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/natlens/natlens/internal/api"
	"github.com/natlens/natlens/internal/kubeproxy"
	"github.com/natlens/natlens/pkg/chain"
)

// schema is the part of JSON Schema that openapi.json uses.
type schema struct {
	Ref         string             `json:"$ref"`
	Type        string             `json:"type"`
	Description string             `json:"description"`
	Format      string             `json:"format"`
	Enum        []string           `json:"enum"`
	Examples    []string           `json:"examples"`
	Default     any                `json:"default"`
	Minimum     *float64           `json:"minimum"`
	Maximum     *float64           `json:"maximum"`
	Required    []string           `json:"required"`
	Properties  map[string]*schema `json:"properties"`
	Items       *schema            `json:"items"`
}

type content map[string]struct{ Schema *schema }

// spec is the part of OpenAPI that openapi.json uses.
type spec struct {
	OpenAPI string
	Paths   map[string]map[string]struct {
		OperationID string
		Parameters  []struct {
			Name, In, Description, Example string
			Required                       bool
			Schema                         *schema
		}
		Responses map[string]struct {
			Ref     string `json:"$ref"`
			Content content
		}
	}
	Components struct {
		Schemas   map[string]*schema
		Responses map[string]struct{ Content content }
	}
}

func readSpec(t *testing.T) *spec {
	t.Helper()
	var s spec
	if err := json.Unmarshal(openAPI, &s); err != nil {
		t.Fatal(err)
	}
	return &s
}

// check says what of a document is not as its schema has it.
func (s *spec) check(sch *schema, at string, v any) []string {
	if name, ok := strings.CutPrefix(sch.Ref, "#/components/schemas/"); ok {
		target := s.Components.Schemas[name]
		if target == nil {
			return []string{at + ": there is no schema " + name}
		}
		return s.check(target, at, v)
	}
	wrong := func(format string, args ...any) []string { return []string{at + ": " + fmt.Sprintf(format, args...)} }
	switch v := v.(type) {
	case map[string]any:
		return s.checkObject(sch, at, v)
	case []any:
		if sch.Type != "array" {
			return wrong("is an array, want %s", sch.Type)
		}
		var out []string
		for i, item := range v {
			out = append(out, s.check(sch.Items, fmt.Sprintf("%s[%d]", at, i), item)...)
		}
		return out
	case string:
		if sch.Type != "string" {
			return wrong("is a string, want %s", sch.Type)
		}
		if len(sch.Enum) > 0 && !slices.Contains(sch.Enum, v) {
			return wrong("%q is none of %q", v, sch.Enum)
		}
		if _, err := time.Parse(time.RFC3339, v); sch.Format == "date-time" && err != nil {
			return wrong("%v", err)
		}
	case bool:
		if sch.Type != "boolean" {
			return wrong("is a boolean, want %s", sch.Type)
		}
	case float64:
		if sch.Type != "number" && (sch.Type != "integer" || v != float64(int64(v))) {
			return wrong("%v is no %s", v, sch.Type)
		}
		if sch.Minimum != nil && v < *sch.Minimum || sch.Maximum != nil && v > *sch.Maximum {
			return wrong("%v is out of range", v)
		}
	default:
		return wrong("%v is not expected", v)
	}
	return nil
}

func (s *spec) checkObject(sch *schema, at string, v map[string]any) []string {
	if sch.Type != "object" {
		return []string{at + ": is an object, want " + sch.Type}
	}
	var out []string
	for _, name := range sch.Required {
		if _, ok := v[name]; !ok {
			out = append(out, at+"."+name+": is missing")
		}
	}
	for name, value := range v {
		property := sch.Properties[name]
		if property == nil {
			out = append(out, at+"."+name+": is not in the schema")
			continue
		}
		out = append(out, s.check(property, at+"."+name, value)...)
	}
	return out
}

// answerSchema returns the schema of a response, by path and status.
func (s *spec) answerSchema(path, code, contentType string) *schema {
	response, ok := s.Paths[path]["get"].Responses[code]
	if !ok {
		return nil
	}
	c := response.Content
	if name, ok := strings.CutPrefix(response.Ref, "#/components/responses/"); ok {
		c = s.Components.Responses[name].Content
	}
	return c[contentType].Schema
}

// routes returns the patterns that NewHandler registers, from its source: a
// ServeMux does not tell.
func routes(t *testing.T) []string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "web.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	ast.Inspect(file, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok || len(call.Args) == 0 {
			return true
		}
		if f, ok := call.Fun.(*ast.SelectorExpr); !ok || f.Sel.Name != "Handle" && f.Sel.Name != "HandleFunc" {
			return true
		}
		lit, ok := call.Args[0].(*ast.BasicLit)
		if !ok {
			t.Fatal("a route is not written as one string")
		}
		pattern, err := strconv.Unquote(lit.Value)
		if err != nil {
			t.Fatal(err)
		}
		if pattern != "/" && pattern != "GET /" { // what no route answers
			out = append(out, strings.TrimSuffix(strings.TrimPrefix(pattern, "GET "), "{$}"))
		}
		return true
	})
	slices.Sort(out)
	return out
}

func TestOpenAPIRoutes(t *testing.T) {
	s := readSpec(t)
	if s.OpenAPI != "3.1.0" {
		t.Errorf("openapi %q", s.OpenAPI)
	}
	if diff := cmp.Diff(routes(t), slices.Sorted(maps.Keys(s.Paths))); diff != "" {
		t.Errorf("paths (-handler +openapi.json):\n%s", diff)
	}
	a := newAgent(t, capture(t, iptablesCapture))
	ids := map[string]bool{}
	for path, item := range s.Paths {
		get, ok := item["get"]
		if !ok || len(item) != 1 {
			t.Errorf("%s: want get alone", path)
		}
		if get.OperationID == "" || ids[get.OperationID] {
			t.Errorf("%s: operationId %q is not unique", path, get.OperationID)
		}
		ids[get.OperationID] = true
		url, query := path, ""
		for _, p := range get.Parameters {
			if p.Description == "" || p.Example == "" || p.Schema == nil {
				t.Errorf("%s: parameter %s lacks a description, an example or a schema", path, p.Name)
			}
			if p.In == "path" {
				url = strings.ReplaceAll(url, "{"+p.Name+"}", p.Example)
			} else {
				query += "&" + p.Name + "=" + p.Example
			}
		}
		if strings.Contains(url, "{") {
			t.Errorf("%s: a parameter of the path is not described", path)
		}
		method := "GET"
		if path == "/api/v1/events" { // which does not end
			method = "HEAD"
		}
		got := a.do(method, url+"?"+query)
		if got.Code != 200 {
			t.Errorf("%s: the example %s?%s answers %d: %s", path, url, query, got.Code, got.Body)
		}
		contentType, _, _ := strings.Cut(got.Header().Get("Content-Type"), ";")
		if s.answerSchema(path, "200", contentType) == nil {
			t.Errorf("%s: no schema for %s", path, contentType)
		}
		if post := a.do("POST", url); post.Code != http.StatusMethodNotAllowed || s.answerSchema(path, "405", jsonType) == nil {
			t.Errorf("%s: POST answers %d; in the description: %t", path, post.Code, s.answerSchema(path, "405", jsonType) != nil)
		}
	}
}

// TestOpenAPIFields compares the schemas with the types that the documents are
// made of: no field may be forgotten, even one that is seldom there.
func TestOpenAPIFields(t *testing.T) {
	s := readSpec(t)
	seen := map[string]bool{"Version": true} // made of no type
	var compare func(reflect.Type)
	compare = func(typ reflect.Type) {
		for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Slice {
			typ = typ.Elem()
		}
		if typ == reflect.TypeFor[chain.Class]() {
			seen["Class"] = true
		}
		if typ.Kind() != reflect.Struct || typ.PkgPath() != reflect.TypeFor[api.Header]().PkgPath() || seen[typ.Name()] {
			return
		}
		seen[typ.Name()] = true
		sch := s.Components.Schemas[typ.Name()]
		if sch == nil {
			t.Errorf("no schema %s", typ.Name())
			return
		}
		fields, required := []string{}, []string{}
		for i := range typ.NumField() {
			name, options, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
			fields = append(fields, name)
			if options != "omitempty" {
				required = append(required, name)
			}
			compare(typ.Field(i).Type)
		}
		slices.Sort(fields)
		slices.Sort(required)
		if diff := cmp.Diff(fields, slices.Sorted(maps.Keys(sch.Properties))); diff != "" {
			t.Errorf("%s: properties (-type +schema):\n%s", typ.Name(), diff)
		}
		slices.Sort(sch.Required)
		if diff := cmp.Diff(required, sch.Required); diff != "" {
			t.Errorf("%s: required (-type +schema):\n%s", typ.Name(), diff)
		}
		for name, p := range sch.Properties {
			if p.Description == "" && p.Ref == "" {
				t.Errorf("%s.%s has no description", typ.Name(), name)
			}
		}
	}
	for _, doc := range []any{api.Services{}, api.Findings{}, api.Trace{}, api.Chain{}, api.Echo{}, api.Error{}} {
		compare(reflect.TypeOf(doc))
	}
	if diff := cmp.Diff(slices.Sorted(maps.Keys(seen)), slices.Sorted(maps.Keys(s.Components.Schemas))); diff != "" {
		t.Errorf("schemas (-types +openapi.json):\n%s", diff)
	}
}

// TestOpenAPICodes: each kind of finding that the rules give is named.
func TestOpenAPICodes(t *testing.T) {
	s := readSpec(t)
	examples := s.Components.Schemas["Finding"].Properties["code"].Examples
	source, err := os.ReadFile("../../pkg/chain/findings.go")
	if err != nil {
		t.Fatal(err)
	}
	file, err := parser.ParseFile(token.NewFileSet(), "findings.go", source, 0)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	ast.Inspect(file, func(node ast.Node) bool {
		v, ok := node.(*ast.ValueSpec)
		if !ok || len(v.Values) != 1 {
			return true
		}
		if id, ok := v.Type.(*ast.Ident); !ok || id.Name != "Code" {
			return true
		}
		n++
		if !slices.Contains(examples, v.Names[0].Name) {
			t.Errorf("the code %s is not described", v.Names[0].Name)
		}
		return true
	})
	if n == 0 {
		t.Error("no codes found")
	}
}

// nodePorts is a dump in which NodePorts answer on one address.
func nodePorts(t *testing.T) string {
	t.Helper()
	var text strings.Builder
	cfg := kubeproxy.Config{
		PodCIDR: kubeproxy.SyntheticPodCIDR, NodeIP: kubeproxy.SyntheticNodeIP,
		NodePortAddresses: []netip.Addr{kubeproxy.SyntheticNodeIP},
	}
	if err := kubeproxy.Write(&text, cfg, kubeproxy.Synthetic(20, 2)); err != nil {
		t.Fatal(err)
	}
	return text.String()
}

// TestOpenAPIDocuments checks real answers, whole and damaged, against the
// schemas.
func TestOpenAPIDocuments(t *testing.T) {
	const (
		hook  = `[0:0] -A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES`
		first = "[0:0] -A KUBE-SVC-7WFRCR3BAURI7IH5 -m comment"
	)
	s := readSpec(t)
	capt := capture(t, iptablesCapture)
	stale := newAgent(t, capt)
	stale.fail(t, "no such table")
	for name, a := range map[string]*agent{
		"capture":    newAgent(t, capt),
		"v1.23":      newAgent(t, capture(t, "v1.23.17-iptables.save")),
		"dual-stack": newAgent(t, capt, capture(t, "v1.35.4-iptables.save6")),
		"no hook":    newAgent(t, capture(t, iptablesCapture, hook, "")),
		"undecided":  newAgent(t, capture(t, iptablesCapture, first, "[0:0] -A KUBE-SVC-7WFRCR3BAURI7IH5 -m made-up --option -j RETURN\n"+first)),
		"returns":    newAgent(t, capture(t, iptablesCapture, first, "[0:0] -A KUBE-SVC-7WFRCR3BAURI7IH5 -m statistic --mode random --probability 0.5 -j RETURN\n"+first)),
		"node ports": newAgent(t, nodePorts(t)),
		"no names":   newAgent(t, strings.ReplaceAll(capt, "-m comment --comment", "-m comment --comment x")),
		"stale":      stale,
		"probing":    newProbing(t, capt),
		"starting":   newAgent(t),
	} {
		for _, url := range []string{
			"/api/v1/services", "/api/v1/services?namespace=shop", "/api/v1/services/default/go-app", "/api/v1/services/default/nobody",
			"/api/v1/trace?to=10.56.15.149:80", "/api/v1/trace?to=10.56.1.2:80&from=node", "/api/v1/trace?to=[fd00::1]:80", "/api/v1/trace?to=here", "/api/v1/trace?to=10.146.0.2:30679&from=external",
			"/api/v1/findings", "/api/v1/echo", "/api/v1/chains/nat/KUBE-SERVICES", "/api/v1/chains/nat/NOTHING", "/version",
		} {
			answer := a.do("GET", url)
			path, _, _ := strings.Cut(url, "?")
			if rest, ok := strings.CutPrefix(path, "/api/v1/services/"); ok && rest != "" {
				path = "/api/v1/services/{namespace}/{name}"
			} else if strings.HasPrefix(path, "/api/v1/chains/") {
				path = "/api/v1/chains/{table}/{chain}"
			}
			sch := s.answerSchema(path, strconv.Itoa(answer.Code), jsonType)
			if sch == nil {
				t.Errorf("%s: %s answers %d, which is not described", name, url, answer.Code)
				continue
			}
			var doc any
			if err := json.Unmarshal(answer.Body.Bytes(), &doc); err != nil {
				t.Errorf("%s: %s: %v", name, url, err)
				continue
			}
			for _, problem := range s.check(sch, "", doc) {
				t.Errorf("%s: %s: %s", name, url, problem)
			}
		}
		tag := a.do("GET", "/api/v1/services").Header().Get("ETag")
		if got := a.do("GET", "/api/v1/services", "If-None-Match", tag).Code; tag != "" && (got != 304 || s.Paths["/api/v1/services"]["get"].Responses["304"].Ref == "") {
			t.Errorf("%s: %d, or it is not described", name, got)
		}
	}
}
