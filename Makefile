PYTHON ?= python3
BIN := .venv/bin
# Three processes for two cores, since tests also wait, each with a PostgreSQL of its own. A file's
# tests stay together, in the order of conftest.py; more would disturb the tests of faults under load.
PARALLEL := --numprocesses=3 --dist=loadfile --no-loadscope-reorder
# Where tests have their servers and files: in memory, if there are 8 GiB. To clone a database takes
# a fifth of the time there.
ROOM = $(shell df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 && $$4 > 8388608 {print "/dev/shm"}')
# Where something looks like a secret and is none: what examples and tests have for a password, and
# the key of a benchmark that signs nothing.
NO_SECRETS := ^(password|secret|sec|nothing is signed here|Zebra|Hippo)$$
# Compiled modules are kept, whatever the environment says: hundreds of processes would each compile
# all of it again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help run run-async test soak bench check lint audit clean

help: ## Say what can be made.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | sort

# An environment is complete when its stamp is there; it is brought up to date when setup.cfg changes.
.venv/run: setup.cfg setup.py
	@$(PYTHON) -c 'import sys; sys.exit("Rollcall needs Python 3.10 or newer") if sys.version_info < (3, 10) else 0'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[embedded]'
	@touch $@

.venv/async: .venv/run
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[embedded,async]'
	@touch $@

.venv/test: .venv/run
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[embedded,test]'
	@touch $@

.venv/bench: .venv/run
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[embedded,bench]'
	@touch $@

.venv/check: .venv/test
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[embedded,test,lint]'
	@touch $@

.venv/audit: .venv/run
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[embedded,audit]'
	@touch $@

run: .venv/run ## Serve on 127.0.0.1:8000 (BIND and PORT change it), the database started if need be.
	@ROLLCALL_AUTH=$${ROLLCALL_AUTH:-off} exec $(BIN)/gunicorn wsgi:app

run-async: .venv/async ## Serve departments, employees and tenants under FastAPI and uvicorn, in the same way.
	@ROLLCALL_AUTH=$${ROLLCALL_AUTH:-off} exec $(BIN)/uvicorn asgi:app --host $${BIND:-127.0.0.1} --port $${PORT:-8000} --no-proxy-headers

test: .venv/test ## Run the whole suite against a real PostgreSQL.
	TMPDIR=$(ROOM) $(BIN)/python -m pytest $(PARALLEL)

soak: .venv/test ## Prove for minutes what the suite proves for seconds; needs pgbouncer, nginx, and root.
	$(BIN)/python -m pytest tests/soak --timeout=900

bench: .venv/bench ## Measure Rollcall beside its peers; needs wrk. QUICK=1: two minutes, only prints.
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick)

check: lint ## Everything that CI runs: format, lint, types, import contracts, tests with coverage.
	$(BIN)/coverage erase
	TMPDIR=$(ROOM) $(BIN)/coverage run -m pytest $(PARALLEL)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: .venv/check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec compose.yaml
	git ls-files -z ':!*.svg' | xargs -0 $(BIN)/detect-secrets-hook --no-verify --exclude-secrets '$(NO_SECRETS)'

audit: .venv/audit ## Ask whether anything that is installed has a known vulnerability; needs the network.
	$(BIN)/pip-audit --local --skip-editable

clean: ## Remove the environment and what was built; the embedded database stays.
	rm -rf .venv *.egg-info build dist .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis
