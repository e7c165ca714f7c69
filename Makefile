# Every target sets itself up: on a fresh machine it needs Python >= 3.11, bash and a package index.
# It finds or installs uv, makes .venv and installs everything; when pyproject.toml has not changed
# since, that costs nothing. Nothing outside this folder is touched.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
ARGS ?=

# Python keeps its compiled files: without them every process would compile torch and friends anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test lint format docs docs-serve bench coverage api clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(READY) ## make .venv with everything that the other targets need
	@echo "setup: .venv is ready"

$(READY): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: no '$(PYTHON)' found. Install Python 3.11 or newer, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: lightning_meansparse needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@uv="$$(command -v uv || true)"; \
	if [ -z "$$uv" ] || ! "$$uv" --version >/dev/null 2>&1; then \
	  uv=.tools/bin/uv; \
	  if ! "$$uv" --version >/dev/null 2>&1; then \
	    echo "setup: installing uv into .tools"; \
	    $(PYTHON) -m venv .tools || { \
	      echo "make: '$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt-get install python3-venv; or install uv yourself."; exit 1; }; \
	    .tools/bin/python -m pip install --quiet --disable-pip-version-check uv; \
	  fi; \
	fi; \
	echo "setup: installing into .venv (the first time some gigabytes, mostly torch)"; \
	env -u VIRTUAL_ENV UV_PYTHON_DOWNLOADS=never "$$uv" sync --quiet --all-extras --python "$$(command -v $(PYTHON))"
	@touch $@

demo: $(READY) ## the whole idea on real images, offline, in under three minutes
	@$(BIN)/meansparse demo $(ARGS)

test: $(READY) ## all tests that need neither a GPU nor a network (ARGS="-k layer" to choose)
	@$(BIN)/python -m pytest -q $(ARGS)

lint: $(READY) ## formatting, lint rules and types
	@$(BIN)/ruff format --check --quiet . || { echo "make lint: the files below want 'make format'"; $(BIN)/ruff format --check .; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --strict
	@echo "lint: clean"

format: $(READY) ## let ruff rewrite the sources
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

docs: $(READY) ## build the documentation into site/, every warning an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "docs: site/index.html"

docs-serve: $(READY) ## show the documentation while you edit it
	@$(BIN)/mkdocs serve

bench: $(READY) ## measure the cost of the operator, the calibration and an attack
	@$(BIN)/python -m tests.benchmarks $(ARGS)

coverage: $(READY) ## look for activations that are missed in some 360 models, and write docs/coverage.md
	@$(BIN)/python -m tests.coverage $(ARGS)

api: $(READY) ## write tests/public_api.txt anew after a wanted change of the public names
	@$(BIN)/python tests/test_project.py

clean: ## remove .venv, .tools and everything that was built
	rm -rf .venv .tools site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
