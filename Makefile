# Every target that needs the environment creates it first (tools/setup); nothing has to be activated.
# ARGS is handed on to the command, for example: make test ARGS="-k equations"

PYTHON := .venv/bin/python
SOURCES := perfusion eval experiments benchmarks tests
# Small tensors: one thread per process and several processes are faster than many threads.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PYTHON) -m pytest -q -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder --timeout 300

# Some containers set this; without compiled bytecode every start of Python would compile PyTorch and diffusers anew,
# 20 seconds of CPU each time.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo studio test test-slow trust lint format toyland toyland-report bench paper constraints clean

help: ## Show this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

setup: ## Create .venv and install the pinned packages (the targets below do it by themselves)
	@tools/setup

demo: setup ## From one photo of a cat to pictures of it in new places
	$(PYTHON) -m perfusion.demo $(ARGS)

studio: setup ## Teach and draw concepts in the browser
	$(PYTHON) -m perfusion.studio $(ARGS)

test: setup ## Run the tests
	$(PYTEST) $(ARGS)

test-slow: setup ## Run the tests that `make test` leaves out because they take long
	$(PYTEST) -m "slow and not gpu" $(ARGS)

trust: setup ## Kill trainings, read hostile files, soak, ... and write docs/reliability.md (long; it goes on)
	$(PYTHON) -m tests.trust $(ARGS)

lint: setup ## Check style, formatting, imports and types
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m ruff format --check $(SOURCES)
	.venv/bin/lint-imports --no-cache --no-logo
	$(PYTHON) -m pyright

format: setup ## Mend style and formatting where that is safe
	$(PYTHON) -m ruff check --fix $(SOURCES)
	$(PYTHON) -m ruff format $(SOURCES)

toyland: setup ## Build the Toyland weights from nothing
	$(PYTHON) -m perfusion.toyland.build $(ARGS)

toyland-report: setup ## Measure the Toyland weights against their bars
	$(PYTHON) -m perfusion.toyland.build.report $(ARGS)

bench: setup ## Measure speed as ratios and write benchmarks/latest.json and docs/performance.md
	$(PYTHON) -m benchmarks page=docs/performance.md $(ARGS)

paper: setup ## Try every claim of the paper on Toyland and write docs/results.md (hours; ARGS=quick: less)
	$(PYTHON) -m experiments.paper $(ARGS)

constraints: ## Pin the newest versions that work together in constraints.txt
	@tools/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --upgrade --quiet \
		--no-header --no-annotate --no-emit-index-url --no-emit-find-links --output-file constraints.txt

clean: ## Remove the environment and all caches; runs/ stays
	rm -rf .venv .cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
