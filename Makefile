# Everything from a fresh clone with only Python 3.11 or newer, git and make. Nothing needs an
# activated environment: every target runs what is in .venv, and builds it first where it is missing
# or older than pyproject.toml or constraints.txt.

PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
MADE := $(VENV)/.made
DEMO := $(VENV)/.demo
TEST := $(VENV)/.test

INSTALL := PIP_NO_INPUT=1 $(BIN)/python -m pip install --quiet --disable-pip-version-check \
  -c constraints.txt
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
IN_VENV := import pip, sys; assert sys.prefix != sys.base_prefix

.DEFAULT_GOAL := help
.PHONY: help demo test lint types unit e2e-vllm bench clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo    measure a real server on this machine, without and with speculation'
	@echo 'make test    lint, types and unit tests'
	@echo 'make lint    ruff, check and format     make types   mypy     make unit   pytest'
	@echo 'make bench   the client itself, beside a bare HTTP loop (needs a C compiler)'
	@echo 'make e2e-vllm   a real vLLM on the CPU: 3.4 GB and five minutes to install, once'
	@echo 'make clean   remove .venv, caches and build output; run files stay'
	@echo
	@echo 'PYTHON=python3.12 picks the interpreter; ARGS="--quick" is passed on by demo, unit,'
	@echo 'test (to pytest) and bench.'

demo: $(DEMO)
	$(BIN)/draftload demo $(ARGS)

test: lint types unit

lint: $(TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TEST)
	$(BIN)/mypy

unit: $(TEST)
	$(BIN)/python -m pytest $(ARGS)

e2e-vllm: $(TEST)
	$(BIN)/python -m tests.vllm_cpu
	$(BIN)/python -m pytest -m vllm -s $(ARGS)

bench: $(DEMO)
	$(BIN)/python benchmarks/client.py $(ARGS)

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment that can be used is kept, whoever made it; a half-made one is made anew.
$(MADE):
	@$(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
	  echo "draftload needs Python 3.11 or newer, and '$(PYTHON)' says:" \
	    "$$($(PYTHON) --version 2>&1 || true)."; \
	  echo "Name another: make $(firstword $(MAKECMDGOALS)) PYTHON=python3.12"; exit 1; } >&2
	@if $(BIN)/python -c '$(IN_VENV); $(NEW_ENOUGH)' 2>/dev/null; then \
	  echo "using $(VENV)"; \
	else \
	  echo "making $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null && $(PYTHON) -m venv --clear $(VENV) || { \
	    rm -rf $(VENV); \
	    echo "'$(PYTHON)' could not make a virtual environment. Debian and Ubuntu keep what it"; \
	    echo "takes in a package of its own: apt-get install python3-venv, or for this version"; \
	    echo "$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')." \
	      "Then run make again."; exit 1; } >&2; \
	fi
	@touch $@

$(DEMO): $(MADE) pyproject.toml constraints.txt
	@echo 'installing draftload and the embedded engine into $(VENV): a minute, once'
	@$(INSTALL) -e '.[demo]'
	@touch $@

$(TEST): $(MADE) pyproject.toml constraints.txt
	@echo 'installing draftload, the embedded engine and the test tools into $(VENV): a minute, once'
	@$(INSTALL) -e '.[demo,test]'
	@touch $(DEMO) $@
