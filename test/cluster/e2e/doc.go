// E2e proves on a real Kubernetes of three nodes what the README promises, with
// natlens's own manifests and images. Run it as root: make e2e.
//
//		go run ./e2e [-run REGEXP] [-name NAME] [-keep]
//
//	 1. The suites are listed in main.go. Each has a cluster of its own, whose
//	    nodes it may break.
//	 2. A suite is a function that makes checks (check.go): each is a row of the
//	    table that is printed at the end, with what was seen. The exit code is 0 if
//	    all are ok.
//	 3. What the suites share is what a user has: kubectl, curl, the kernel's tools,
//	    and the agent's JSON (agent.go).
//
// Suite faults breaks what natlens is to notice (faultlist.go, frozen.go), and
// looks at all findings of all agents meanwhile (lookout.go): only what is broken
// may be told. Suite soak breaks nothing, and wants silence; -soak 20m for longer
// than the three minutes of a usual run.
//
// -keep leaves the cluster up, and takes it as it is the next time: to work on a
// suite, or to look at what went wrong, with "go run . -name e2e …".
package main
