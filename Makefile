# Each target sets up what it lacks: a virtual environment in .venv and, as root on a Debian-like system, Debian packages.
# Options for the program behind a target go in ARGS: make demo ARGS="--backend host-gw", make test ARGS="-k subnet".

BIN = .venv/bin
ARGS =

.PHONY: help setup demo test check docs bench bake fresh clean
.DEFAULT_GOAL := help

help: ## Say what each target does
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1|\2/p' Makefile | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

setup: ## Make .venv with the programs in .venv/bin; install missing Debian packages when root
	@scripts/setup.sh test

demo: ## Three hosts in network namespaces whose containers reach each other (root)
	@scripts/setup.sh demo
	@$(BIN)/wincey lab run --hosts 3 $(ARGS)

test: ## Every test; what fails is run again, alone; what was skipped, and why, is told at the end
	@scripts/setup.sh test
	@scripts/test.sh $(ARGS)

check: ## Format, lint, types, import contracts and the tests that need neither root nor etcd
	@scripts/setup.sh check
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python -m pytest -q -n 2 -m "not root and not etcd and not slow and not vm" $(ARGS)

docs: ## Build the site from docs/ into site/; every link must lead somewhere
	@scripts/setup.sh check
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

bench: ## Measure the control plane, the CNI plugin's cost and, briefly, the data path (root)
	@scripts/setup.sh test
	@$(BIN)/python benchmarks/control_plane.py $(ARGS)
	@$(BIN)/python benchmarks/cni.py
	@$(BIN)/wincey bench data --quick

bake: ## Compile the programs of src/wincey/bpf/c anew, after a change (clang)
	@scripts/setup.sh test
	@$(BIN)/python scripts/bake.py $(ARGS)

fresh: ## Run the README's commands in a newly bootstrapped Debian (root); FRESH_ONLY=demo for the short form
	@scripts/fresh.sh

clean: ## Remove .venv and all caches
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis site .import_linter_cache build dist
	@find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
