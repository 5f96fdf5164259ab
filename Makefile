# `make help` lists the targets. Everything runs inside .venv, which `make setup` builds from requirements.lock.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Empty: deploy/interpreter.py chooses.
PYTHON ?=
PY := .venv/bin/python
# `make test T=tests/unit/deploy` narrows any test target to a path, a node id or a `-k`-style list of them.
T ?=
PYTEST := $(PY) -m pytest $(PYTEST_ARGS)

SETUP := .venv/.installed
GEN := gen/.generated
# Folders are listed too: removing a proto touches its folder, so stale code goes away.
PROTO_INPUTS := $(shell find protos -type d -o -type f -name '*.proto' 2>/dev/null)
CHECKED := $(wildcard libs services clients deploy examples)
FORMATTED := $(wildcard libs services clients deploy tests bench demo examples)
BUF_CONFIG := $(firstword $(wildcard protos/buf.yaml buf.yaml))

.PHONY: help setup lock gen up down status clean logs compose-env demo test test-unit test-contract test-integration test-e2e \
	bench lint format reference freeze-api

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(SETUP) ## make .venv from requirements.lock

$(SETUP): requirements.lock
	@test -x $(PY) || { python="$(PYTHON)"; test -n "$$python" || python=$$(python3 deploy/interpreter.py); "$$python" -m venv .venv; }
	@$(PY) -c 'import sys; sys.exit("Python 3.11 or newer is needed; try: rm -r .venv && make setup PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@$(PY) -m pip --disable-pip-version-check install -q --require-hashes -r requirements.lock
	@site=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && printf '%s\n%s\n' "$(CURDIR)" "$(CURDIR)/gen" > "$$site/groundswell.pth"
	@touch $@

lock: ## resolve requirements.in again into requirements.lock
	@$(PY) -m uv pip compile -q --python-version 3.11 --universal --generate-hashes --no-annotate --no-header --upgrade -o requirements.lock requirements.in

gen: $(GEN) ## generate Python from protos/ into gen/ (only when a proto changed)

$(GEN): $(SETUP) $(PROTO_INPUTS) deploy/gen.py
	@$(PY) deploy/gen.py

READY := $(SETUP) $(GEN)

up: $(READY) ## start Kafka, Redis, S3 and all services; wait until they are ready
	@$(PY) -m deploy.local up $(if $(SERVERS_ONLY),--servers-only)

down: $(SETUP) ## end exactly what `make up` started
	@$(PY) -m deploy.local down

status: $(SETUP) ## one line a process
	@$(PY) -m deploy.local status

clean: $(SETUP) ## down, and remove the data
	@$(PY) -m deploy.local clean

logs: $(SETUP) ## the end of the logs (L="registry kafka" for some, FOLLOW=1 to go on)
	@$(PY) -m deploy.local logs $(if $(FOLLOW),--follow) $(L)

compose-env: $(SETUP) ## secrets for docker-compose.yml, made once (then: docker compose up --build --wait)
	@$(PY) -m deploy.container.environment

demo: up ## a rollout to a simulated fleet, from outside
	@$(PY) -m demo

test: $(READY) ## every test, one summary (T=path for some), on two processes
	@$(PYTEST) -n 2 $(or $(T),tests)

test-unit: $(READY) ## tests that need no server
	@$(PYTEST) $(or $(T),$(wildcard tests/unit tests/simulation))

test-contract: $(READY) ## every adapter against the contract of its port
	@$(PYTEST) $(or $(T),tests/contract)

test-integration: $(READY) ## tests against the real servers
	@$(PYTEST) $(or $(T),tests/integration)

test-e2e: $(READY) ## all services, from outside
	@$(PYTEST) $(or $(T),tests/e2e)

bench: $(READY) ## benchmarks, each a ratio against a bare baseline of the same run
	@$(PY) -m bench

lint: $(READY) ## ruff, mypy --strict, buf lint, buf breaking, the reference is what the protos say
	@$(PY) -m ruff check $(FORMATTED)
	@$(PY) -m ruff format --check $(FORMATTED)
	@$(PY) -m mypy --strict $(CHECKED)
	@if test -f gen/image.binpb; then .venv/bin/buf lint gen/image.binpb $(if $(BUF_CONFIG),--config $(BUF_CONFIG)); fi
	@.venv/bin/buf breaking gen/image.binpb --against protos/released.binpb $(if $(BUF_CONFIG),--config $(BUF_CONFIG))
	@$(PY) -m deploy.reference --check

reference: $(READY) ## write docs/reference from the comments of the protos
	@$(PY) -m deploy.reference

freeze-api: $(READY) ## make the present protos what `buf breaking` compares with: at a release, never to silence it
	@.venv/bin/buf build gen/image.binpb --exclude-source-info -o protos/released.binpb

format: $(SETUP) ## apply what ruff can
	@$(PY) -m ruff check --fix $(FORMATTED)
	@$(PY) -m ruff format $(FORMATTED)
