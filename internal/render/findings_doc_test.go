package render_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestFindingsDocumented checks that docs/findings.md has a section with an
// anchor for every code of pkg/chain, and that its links lead somewhere.
func TestFindingsDocumented(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "../../pkg/chain/findings.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var codes []string
	ast.Inspect(file, func(n ast.Node) bool {
		v, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		if id, ok := v.Type.(*ast.Ident); ok && id.Name == "Code" {
			for _, value := range v.Values {
				code, err := strconv.Unquote(value.(*ast.BasicLit).Value)
				if err != nil {
					t.Fatal(err)
				}
				codes = append(codes, code)
			}
		}
		return true
	})
	if len(codes) == 0 {
		t.Fatal("no code found: has the declaration changed?")
	}
	text, err := os.ReadFile("../../docs/findings.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(text)
	for _, code := range codes {
		_, section, ok := strings.Cut(doc, "<a id=\""+code+"\"></a>\n## "+code+"\n")
		if !ok {
			t.Errorf("docs/findings.md has no section %q with its anchor", code)
			continue
		}
		section, _, _ = strings.Cut(section, "\n## ")
		for _, part := range []string{"**What it means.**", "**How it comes about", "**Check.**", "**Do.**", "**Harmless when**"} {
			if !strings.Contains(section, part) {
				t.Errorf("section %q has no %q", code, part)
			}
		}
		if !strings.Contains(doc, "| ["+code+"](#"+code+") |") {
			t.Errorf("%q is not in the table on top", code)
		}
	}
	for _, m := range regexp.MustCompile(`\]\(#(\w+)\)`).FindAllStringSubmatch(doc, -1) {
		if !strings.Contains(doc, `<a id="`+m[1]+`"></a>`) {
			t.Errorf("a link leads to #%s, which is not there", m[1])
		}
	}
}
