package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"time"
)

// Pod is a pod that runs. The network is the pod's, so that [Netns.Dial] and
// [Netns.Output] connect from its address; its image need not hold a program for
// that.
type Pod struct {
	Netns
	Namespace, Name string
	Node            *Node
	IP              string
	Proc            string // its first process's directory in /proc, as this machine sees it
}

// Pod returns a pod whose first container runs.
func (c *Cluster) Pod(ctx context.Context, namespace, name string) (*Pod, error) {
	out, err := c.Kubectl(ctx, "get", "pod", "-n", namespace, name, "-o", "json")
	if err != nil {
		return nil, err
	}
	var p podObject
	if err := json.Unmarshal(out, &p); err != nil {
		return nil, err
	}
	return c.pod(p)
}

// Pods returns the pods of a namespace that match a label selector, and run.
func (c *Cluster) Pods(ctx context.Context, namespace, selector string) ([]*Pod, error) {
	out, err := c.Kubectl(ctx, "get", "pods", "-n", namespace, "-l", selector, "--field-selector=status.phase=Running", "-o", "json")
	if err != nil {
		return nil, err
	}
	var list struct{ Items []podObject }
	if err := json.Unmarshal(out, &list); err != nil {
		return nil, err
	}
	var pods []*Pod
	for _, p := range list.Items {
		if p.Metadata.DeletionTimestamp != nil {
			continue
		}
		pod, err := c.pod(p)
		if err != nil {
			return nil, err
		}
		pods = append(pods, pod)
	}
	return pods, nil
}

type podObject struct {
	Metadata struct {
		Namespace, Name   string
		DeletionTimestamp *time.Time
	}
	Spec   struct{ NodeName string }
	Status struct {
		PodIP             string
		ContainerStatuses []struct{ ContainerID string }
	}
}

func (c *Cluster) pod(p podObject) (*Pod, error) {
	node, err := c.Node(p.Spec.NodeName)
	if err != nil {
		return nil, fmt.Errorf("pod %s/%s: %w", p.Metadata.Namespace, p.Metadata.Name, err)
	}
	if len(p.Status.ContainerStatuses) == 0 {
		return nil, fmt.Errorf("pod %s/%s has no container yet", p.Metadata.Namespace, p.Metadata.Name)
	}
	proc, err := node.procOf(strings.TrimPrefix(p.Status.ContainerStatuses[0].ContainerID, "containerd://"))
	if err != nil {
		return nil, fmt.Errorf("pod %s/%s: %w", p.Metadata.Namespace, p.Metadata.Name, err)
	}
	return &Pod{
		Netns:     Netns{path: proc + "/ns/net", cluster: c.Name},
		Namespace: p.Metadata.Namespace, Name: p.Metadata.Name, Node: node, IP: p.Status.PodIP, Proc: proc,
	}, nil
}

// procOf returns the directory in /proc of a container's first process. Its number
// is the one it has in the box.
func (b *Box) procOf(container string) (string, error) {
	root := fmt.Sprintf("/proc/%d/root", b.first.PID())
	pid, err := os.ReadFile(root + "/run/containerd/io.containerd.runtime.v2.task/k8s.io/" + container + "/init.pid")
	if err != nil {
		return "", fmt.Errorf("container %q does not run: %w", container, err)
	}
	return root + "/proc/" + strings.TrimSpace(string(pid)), nil
}
