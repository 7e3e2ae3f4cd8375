package main

import (
	"bytes"
	"context"
	"encoding/json"
)

// object is an object of the Kubernetes API, or a patch of one.
type object = map[string]any

// namespace returns a Namespace.
func namespace(name string) object {
	return object{"apiVersion": "v1", "kind": "Namespace", "metadata": object{"name": name}}
}

// create makes objects.
func (b *bench) create(ctx context.Context, objects []object) error {
	return b.kubectlObjects(ctx, objects, "create")
}

// kubectlObjects passes objects to a command of kubectl.
func (b *bench) kubectlObjects(ctx context.Context, objects []object, args ...string) error {
	content, err := json.Marshal(object{"apiVersion": "v1", "kind": "List", "items": objects})
	if err != nil {
		return err
	}
	_, err = b.KubectlInput(ctx, bytes.NewReader(content), append(args, "-f", "-")...)
	return err
}

// field returns what is at a path in an object, nil if nothing is.
func field(o object, path ...string) any {
	var v any = o
	for _, p := range path {
		m, _ := v.(object)
		v = m[p]
	}
	return v
}

// text returns a string in an object.
func text(o object, path ...string) string {
	s, _ := field(o, path...).(string)
	return s
}
