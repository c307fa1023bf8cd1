# Everything runs from a fresh clone: `make quickstart`, `make test`. No root, no GPU.
# .venv is made from constraints.txt when it is missing or when the packaging files changed.

SHELL := /bin/bash
VENV := .venv
PYTHON ?=
WORKERS ?= 2
PYTEST_ARGS ?=
QUICKSTART_ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
AOT := $(VENV)/.aot
TORCH := .cache/torch
METAWORLD := .cache/metaworld
CLIENTS := .cache/clients
CODE := wallwm_jax data kernels experiments benchmarks tests

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast test-metaworld lint fixtures clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(STAMP)  ## collect data, train, evaluate and write runs/quickstart/report.html (QUICKSTART_ARGS=...)
	$(BIN)/wallwm quickstart $(QUICKSTART_ARGS)

test: $(AOT) $(CLIENTS)/.installed  ## the whole test suite on CPU (PYTEST_ARGS=..., WORKERS=2)
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -n $(WORKERS) $(PYTEST_ARGS)

test-fast: $(AOT) $(CLIENTS)/.installed  ## the tests that take seconds
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -n $(WORKERS) -m 'not slow' $(PYTEST_ARGS)

test-metaworld: $(METAWORLD)/.installed  ## the tests in Meta-World (draws with the Debian package libosmesa6)
	JAX_PLATFORMS=cpu MUJOCO_GL=osmesa $(METAWORLD)/bin/python -m pytest -q tests/metaworld_env $(PYTEST_ARGS)

lint: $(STAMP)  ## ruff, and every file parses
	$(BIN)/ruff check .
	$(BIN)/python -m compileall -q $(CODE)

fixtures: $(TORCH)/.installed $(STAMP)  ## make the parity fixtures anew with the public torch models, and compare
	rm -rf .cache/fixtures
	for family in wan_dit wan_vae umt5 qwen qwen_chat samplers; do \
	  HF_HUB_OFFLINE=1 $(TORCH)/bin/python tests/fixtures/$$family.py --out .cache/fixtures || exit 1; \
	done
	$(BIN)/python tests/fixtures/compare.py .cache/fixtures

clean:  ## remove .venv, caches and build output (runs/ stays)
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# Tests compile for TPUs, which needs no TPU but its compiler.
$(AOT): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[aot]'
	@touch $@

# The published clients that the policy server is tested with, apart from .venv and without what they
# ask for: openpi-client pins NumPy 1, and runs with what .venv has.
$(CLIENTS)/.installed: $(STAMP)
	rm -rf $(CLIENTS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
	  --target $(CLIENTS) openpi-client msgpack-numpy
	@touch $@

# Apart from .venv: nothing of this project needs torch.
$(TORCH)/.installed: $(STAMP)
	$(BIN)/python -m venv $(TORCH)
	$(TORCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  $$($(BIN)/python -c "import configparser; c = configparser.ConfigParser(); c.read('setup.cfg'); \
	  print(*c['options.extras_require']['torch-parity'].split())")
	@touch $@

# Apart from .venv: metaworld needs mujoco 3.3.0, everything else is as pinned.
$(METAWORLD)/.installed: $(STAMP)
	$(BIN)/python -m venv $(METAWORLD)
	grep -v '^mujoco' constraints.txt > $(METAWORLD)/constraints.txt
	$(METAWORLD)/bin/python -m pip install --quiet --disable-pip-version-check -c $(METAWORLD)/constraints.txt setuptools wheel
	$(METAWORLD)/bin/python -m pip install --quiet --disable-pip-version-check -c $(METAWORLD)/constraints.txt \
	  --no-build-isolation -e '.[metaworld]' pytest
	@touch $@

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@set -e; \
	for python in $(PYTHON) $(BIN)/python python3.11 python3.12 python3.13 python3; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "make: expected Python 3.11 or newer, got $$(python3 --version 2>&1 || echo none)." >&2; \
	  echo "      Install it, or name it: make $(or $(MAKECMDGOALS),test) PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	if [ ! -x $(BIN)/python ]; then \
	  echo "creating $(VENV) with $$found"; \
	  $$found -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "make: '$$found -m venv' failed; on Debian or Ubuntu install python3-venv." >&2; exit 1; }; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
