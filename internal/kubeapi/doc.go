// Package kubeapi keeps [desired.Objects] as the Kubernetes API has them, with
// client-go's list and watch. It only reads.
package kubeapi
