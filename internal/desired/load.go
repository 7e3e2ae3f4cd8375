package desired

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

// Counts are how many objects of each kind were read.
type Counts struct{ Services, EndpointSlices, Nodes int }

// Load reads objects as "kubectl get services,endpointslices,nodes -A -o yaml",
// or -o json, prints them. Objects of other kinds are passed over. The name is
// that of the file, for errors.
func (o *Objects) Load(r io.Reader, name string) (Counts, error) {
	var n Counts
	docs := utilyaml.NewYAMLReader(bufio.NewReader(r))
	for i := 1; ; i++ {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, fmt.Errorf("%s: %w", name, err)
		}
		text, err := yaml.YAMLToJSON(doc)
		if err != nil {
			return n, fmt.Errorf("%s: document %d is neither YAML nor JSON: %w", name, i, err)
		}
		if err := o.load(text, metav1.TypeMeta{}, &n); err != nil {
			return n, fmt.Errorf("%s: document %d: %w", name, i, err)
		}
	}
}

// load takes one object in, or the items of a list of them. What an item of a
// typed list, such as a ServiceList, is, only the list says.
func (o *Objects) load(text []byte, item metav1.TypeMeta, n *Counts) error {
	var head struct {
		metav1.TypeMeta `json:",inline"`
		Items           []json.RawMessage `json:"items"`
	}
	if string(text) == "null" {
		return nil // between two "---"
	}
	if err := json.Unmarshal(text, &head); err != nil {
		return fmt.Errorf("not a Kubernetes object: %w", err)
	}
	if head.Kind == "" {
		head.TypeMeta = item
	}
	switch head.Kind {
	case "List":
		return o.items(head.Items, metav1.TypeMeta{}, n)
	case "ServiceList":
		return o.items(head.Items, metav1.TypeMeta{APIVersion: "v1", Kind: "Service"}, n)
	case "NodeList":
		return o.items(head.Items, metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, n)
	case "EndpointSliceList":
		return o.items(head.Items, metav1.TypeMeta{APIVersion: head.APIVersion, Kind: "EndpointSlice"}, n)
	case "Service":
		return decode(text, head.Kind, &n.Services, func(s *corev1.Service) { o.SetService(s) })
	case "Node":
		return decode(text, head.Kind, &n.Nodes, func(s *corev1.Node) { o.SetNode(s) })
	case "EndpointSlice":
		if head.APIVersion != discoveryv1.SchemeGroupVersion.String() {
			return fmt.Errorf("an EndpointSlice of %s: expected %s", head.APIVersion, discoveryv1.SchemeGroupVersion)
		}
		return decode(text, head.Kind, &n.EndpointSlices, func(s *discoveryv1.EndpointSlice) { o.SetSlice(s) })
	case "":
		return errors.New(`no Kubernetes object: "kind" is missing`)
	}
	return nil
}

func (o *Objects) items(list []json.RawMessage, item metav1.TypeMeta, n *Counts) error {
	for i, text := range list {
		if err := o.load(text, item, n); err != nil {
			return fmt.Errorf("item %d: %w", i, err)
		}
	}
	return nil
}

// decode reads one object. Fields that this version of the API does not know
// are passed over: a cluster may be newer.
func decode[T any](text []byte, kind string, count *int, set func(*T)) error {
	var object T
	if err := json.Unmarshal(text, &object); err != nil {
		return fmt.Errorf("%s: %w", kind, err)
	}
	*count++
	set(&object)
	return nil
}
