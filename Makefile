# One command for each job; `make help` lists them. Variables:
#   PYTHON  interpreter that makes the virtual environment (3.11 or later)
#   VENV    folder of the virtual environment
#   PIP_ARGS  further options of `pip install`, e.g. --extra-index-url https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
BASE := $(VENV)/.stamp-base
DEV := $(VENV)/.stamp-dev

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast soak lint format types bench build clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(BASE) ## detect ships in the committed scene (base installation, no torch): ships.gpkg, ships.png
	@$(BIN)/python tests/demo/run_demo.py

test: $(DEV) ## all tests but the long loops (under 10 minutes)
	$(BIN)/python -m pytest -m "not soak" -n logical --maxprocesses 4 --dist worksteal

test-fast: $(DEV) ## the quick tests (under a minute)
	$(BIN)/python -m pytest -m "not slow and not soak and not gpu and not network" -q

soak: $(DEV) ## the long loops in full
	$(BIN)/python -m pytest -m soak

lint: $(DEV) ## style, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

format: $(DEV) ## put the code into the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV) ## static types (strict outside torch code)
	$(BIN)/mypy

bench: $(DEV) ## benchmarks; prints numbers with versions and hardware
	@set -e; for script in tests/benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

build: $(DEV) ## sdist and wheel in dist/
	$(BIN)/python -m build --no-isolation

clean: ## remove what the other targets made, the virtual environment excepted
	rm -rf dist build ships.gpkg ships.png .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is missing or older than 3.11; run: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; \
	  rm -rf $(VENV); exit 1; }

$(BASE): pyproject.toml constraints.txt | $(BIN)/python
	@if [ ! -e $(DEV) ]; then echo "installing the base packages into $(VENV)"; fi
	$(PIP_INSTALL) -e .
	@touch $@

# The development installation contains the base one.
$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the development packages into $(VENV) (torch among them: this takes minutes)"
	$(PIP_INSTALL) -e '.[dev]'
	@touch $(BASE) $@
