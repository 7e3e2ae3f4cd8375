package main

import (
	"errors"
	"fmt"

	"github.com/spf13/pflag"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// kubeOptions are the flags about the API server.
type kubeOptions struct{ kubeconfig string }

func (o *kubeOptions) addFlags(fs *pflag.FlagSet) {
	fs.StringVar(&o.kubeconfig, "kubeconfig", "", "`FILE` that says how to reach the API server, where the agent does not run as a pod")
}

// errNoAPI is returned where nothing says how to reach the API server.
var errNoAPI = errors.New("this is no pod: name a --kubeconfig")

// config returns how to reach the API server.
func (o *kubeOptions) config() (*rest.Config, error) {
	if o.kubeconfig != "" {
		config, err := clientcmd.BuildConfigFromFlags("", o.kubeconfig)
		if err != nil {
			return nil, fmt.Errorf("--kubeconfig %s: %w", o.kubeconfig, err)
		}
		return config, nil
	}
	config, err := rest.InClusterConfig()
	if errors.Is(err, rest.ErrNotInCluster) {
		return nil, errNoAPI
	}
	return config, err
}
