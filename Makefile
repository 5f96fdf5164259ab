# `make help` lists the targets. Everything runs inside .venv, which `make setup` builds from requirements.lock.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
PY := .venv/bin/python
# `make test T=tests/unit/deploy` narrows any test target to a path, a node id or a `-k`-style list of them.
T ?=
PYTEST := $(PY) -m pytest $(PYTEST_ARGS)

SETUP := .venv/.installed
GEN := gen/.generated
# Folders are listed too: removing a proto touches its folder, so stale code goes away.
PROTO_INPUTS := $(shell find protos -type d -o -type f -name '*.proto' 2>/dev/null)
CHECKED := $(wildcard libs services clients deploy)

.PHONY: help setup lock gen up down status clean logs demo test test-unit test-contract test-integration test-e2e bench lint format

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(SETUP) ## make .venv from requirements.lock

$(SETUP): requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; try: make setup PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m pip --disable-pip-version-check install -q --require-hashes -r requirements.lock
	@site=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && printf '%s\n%s\n' "$(CURDIR)" "$(CURDIR)/gen" > "$$site/groundswell.pth"
	@touch $@

lock: ## resolve requirements.in again into requirements.lock
	@$(PY) -m uv pip compile -q --python-version 3.11 --universal --generate-hashes --no-annotate --no-header --upgrade -o requirements.lock requirements.in

gen: $(GEN) ## generate Python from protos/ into gen/ (only when a proto changed)

$(GEN): $(SETUP) $(PROTO_INPUTS) deploy/gen.py
	@$(PY) deploy/gen.py
