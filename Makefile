# natlens needs only Go. The tests that load rules into a kernel also need root
# and Debian's iptables, nftables and nfacct; without them they are skipped.

VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
REVISION := $(shell git rev-parse HEAD 2>/dev/null)
ARGS     ?= demo
BENCH    ?= .
FUZZTIME ?= 60s
SIZES    ?= 1000x10,10000x10
ROUNDS   ?= 5
REST     ?= 10m
BESIDE   ?=

# The time that images bear, in seconds since 1970.
SOURCE_DATE_EPOCH ?= $(or $(shell git log -1 --format=%ct 2>/dev/null),0)

LDFLAGS := -s -w -X github.com/natlens/natlens/internal/version.version=$(VERSION)
BUILD   := CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)'
# -race needs a C compiler; without one the go command turns cgo off.
RACE     = $(if $(filter 0,$(shell go env CGO_ENABLED)),,-race)
# The linters have a module of their own, so that they weigh on nobody else's.
TOOL    := go tool -modfile=$(CURDIR)/tools/go.mod
# Programs that have one for the same reason.
MODULES := tools/image test/cluster

# Where iptables lives; an ordinary user's PATH leaves it out.
export PATH := $(PATH):/usr/sbin:/sbin

.DEFAULT_GOAL := help

.PHONY: help
help: ## Print this help
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build bin/agent and bin/echo, static (VERSION=v1.2.3 sets the version)
	$(BUILD) -o bin/ ./cmd/agent ./cmd/echo

.PHONY: image
image: ## Build bin/image/*.tar, OCI archives of both programs for amd64 and arm64, and their SBOMs
	for arch in amd64 arm64; do GOOS=linux GOARCH=$$arch $(BUILD) -o bin/image/$$arch/ ./cmd/agent ./cmd/echo || exit 1; done
	go -C tools/image run . -version '$(VERSION)' -revision '$(REVISION)' -created $(SOURCE_DATE_EPOCH) '$(CURDIR)/bin/image'

.PHONY: repeat
repeat: image ## Prove that images are reproducible: build them again elsewhere, without a cache
	tools/image/repeat.sh '$(VERSION)'

.PHONY: run
run: build ## Run the demo, best as root; with ARGS, the agent: make run ARGS='services -o wide'
	bin/agent $(ARGS)

.PHONY: test
test: ## Run all tests, with the race detector (TESTFLAGS='-run TestX -v')
	$(if $(RACE),,@echo 'make test: no C compiler here, so no race detector')
	go test $(RACE) $(TESTFLAGS) ./...
	for m in $(MODULES); do go -C $$m test $(TESTFLAGS) ./... || exit 1; done

.PHONY: lint
lint: ## Check format, modules, vet, linters and which package imports what
	@files=$$(gofmt -l .); [ -z "$$files" ] || { echo "not formatted by gofmt:"; echo "$$files"; exit 1; }
	for m in . $(MODULES); do (cd $$m && go mod tidy -diff && go vet ./... && $(TOOL) golangci-lint run) || exit 1; done

.PHONY: cluster
cluster: ## Bring up a real Kubernetes of three nodes on this machine, as root (the first time builds it)
	go -C test/cluster build -o '$(CURDIR)/bin/cluster' .
	bin/cluster up
	@echo 'Use it: bin/cluster kubectl get nodes; bin/cluster exec node1 iptables -t nat -nL; make cluster-down'

.PHONY: cluster-down
cluster-down: ## Take it down
	go -C test/cluster run . down

.PHONY: e2e
e2e: image ## Prove on such a cluster what the README promises, as root (E2EFLAGS='-run walk -keep')
	go -C test/cluster build -o '$(CURDIR)/bin/e2e' ./e2e
	bin/e2e -root . $(E2EFLAGS)

.PHONY: bench
bench: ## Run the benchmarks (BENCH=regexp picks some)
	go test -run '^$$' -bench '$(BENCH)' -benchmem ./...

.PHONY: bench-scale
bench-scale: build ## Measure large rulesets beside iptables-save and nft (SIZES=1000x10,… REST=10m, as root)
	go run ./test/bench -sizes '$(SIZES)' -rounds '$(ROUNDS)' -rest '$(REST)' -agent bin/agent -beside '$(BESIDE)'

.PHONY: fuzz
fuzz: ## Fuzz the parsers, the kernel readers' decoders and the walk (FUZZTIME=60s each)
	set -e; for f in iptables/FuzzParse iptables/FuzzLegacyDecode iptables/FuzzNFTDecode nftables/FuzzParse nftables/FuzzLiveDecode nftables/FuzzForeign conntrack/FuzzDecode chain/FuzzWalk; do \
		go test -run '^$$' -fuzz "^$${f#*/}$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 50x ./pkg/$${f%/*}; \
	done

.PHONY: clean
clean: ## Remove bin/
	rm -rf bin
