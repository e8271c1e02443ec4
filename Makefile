# Each target sets up what it lacks: a virtual environment in .venv and, as root on a Debian-like system, Debian packages.
# Options for the program behind a target go in ARGS: make demo ARGS="--backend host-gw", make test ARGS="-k subnet".

BIN = .venv/bin
ARGS =

.PHONY: help setup demo test check sim chaos docs bench soak bake fuzz audit sbom fresh clean
.DEFAULT_GOAL := help

help: ## Say what each target does
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

setup: ## Make .venv with the programs in .venv/bin; install missing Debian packages when root
	@scripts/setup.sh test

demo: ## Three hosts in network namespaces whose containers reach each other (root)
	@scripts/setup.sh demo
	@$(BIN)/wincey lab run --hosts 3 $(ARGS)

chaos: ## Every fault of wincey lab chaos, some minutes (root); ARGS="NAME..." for some, ARGS=--list to name them
	@scripts/setup.sh test
	@$(BIN)/wincey lab chaos $(or $(ARGS),all)

test: ## Every test; what fails is run again, alone; what was skipped, and why, is told at the end
	@scripts/setup.sh test
	@scripts/test.sh $(ARGS)

check: ## Format, lint, types, import contracts and the tests that need neither root nor etcd
	@scripts/setup.sh check
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python -m pytest -q -n 4 -m "not root and not etcd and not slow and not vm" $(ARGS)

fuzz: ## Fuzz what comes from outside: make fuzz ARGS="--seconds 60 [TARGET...]"; ARGS=--list says which there are
	@scripts/setup.sh check
	@$(BIN)/python -m fuzz $(ARGS)

audit: ## Look over the dependencies: lock files, installed files, licences, vulnerabilities where they can be asked for
	@scripts/setup.sh check
	@$(BIN)/python scripts/audit.py $(ARGS)

sbom: ## Write what Wincey is made of to dist/sbom.cdx.json (CycloneDX)
	@scripts/setup.sh check
	@$(BIN)/python scripts/sbom.py dist/sbom.cdx.json

docs: ## Build the site from docs/ into site/; every link must lead somewhere
	@scripts/setup.sh check
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

bench: ## Measure control plane (100 to 10,000 leases), the CNI plugin's cost and, briefly, the data path (root); ARGS=--quick
	@scripts/setup.sh test
	@$(BIN)/python benchmarks/control_plane.py $(ARGS)
	@$(BIN)/python benchmarks/cni.py
	@$(BIN)/wincey bench data --quick

soak: ## Half an hour at 10,000 leases with churn: memory flat, kernel as the store (root); ARGS="--minutes 5" for less
	@scripts/setup.sh test
	@$(BIN)/python benchmarks/soak.py $(ARGS)

bake: ## Compile the programs of src/wincey/bpf/c anew, after a change (clang)
	@scripts/setup.sh test
	@$(BIN)/python scripts/bake.py $(ARGS)

sim: ## Simulate bad days: many agents, faults from fresh seeds, invariants; ARGS="--runs 100000", "--seed N", "--mutants"
	@scripts/setup.sh check
	@$(BIN)/python -m simulator $(ARGS)

fresh: ## Run the README's commands in a newly bootstrapped Debian (root); FRESH_ONLY=demo for the short form
	@scripts/fresh.sh

clean: ## Remove .venv and all caches
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis site .import_linter_cache build dist
	@find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
