package kubeproxy

import (
	"crypto/sha256"
	"encoding/base32"
	"math"
	"strconv"
)

// hashLen is the number of base32 characters kept of a SHA-256: with the
// longest prefix, "KUBE-SVC-", a chain name stays below the 28 characters
// iptables allows.
const hashLen = 16

// hash is kube-proxy's name hash (portProtoHash and servicePortEndpointChainName
// in proxier.go): the parts are concatenated without a separator.
func hash(servicePort, protocol, endpoint string) string {
	sum := sha256.Sum256([]byte(servicePort + protocol + endpoint))
	return base32.StdEncoding.EncodeToString(sum[:hashLen*5/8])
}

// servicePortName is ServicePortName.String of pkg/proxy/types.go: an unnamed
// port leaves no colon behind.
func servicePortName(namespace, name, port string) string {
	if port == "" {
		return namespace + "/" + name
	}
	return namespace + "/" + name + ":" + port
}

// probability is the text iptables-save prints for the rule of an endpoint
// when left endpoints, this one included, are still to be chosen from.
//
// kube-proxy writes 1/left with ten decimals (computeProbability). iptables
// keeps that as a multiple of 2^-31, and prints the multiple with eleven. Both
// roundings are visible: a third is 0.33333333349.
func probability(left int) string {
	const decimals, steps = 1e10, 1 << 31
	written := math.RoundToEven(decimals/float64(left)) / decimals
	return strconv.FormatFloat(math.Round(written*steps)/steps, 'f', 11, 64)
}

// probabilities keeps the texts already worked out: a cluster has few distinct
// endpoint counts and very many rules.
type probabilities []string

func (p *probabilities) of(left int) string {
	for len(*p) <= left {
		*p = append(*p, "")
	}
	if (*p)[left] == "" {
		(*p)[left] = probability(left)
	}
	return (*p)[left]
}
