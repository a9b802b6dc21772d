# Everything runs in .venv, which `make env` makes from the lock file and makes again only when that changes.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.made
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help env demo serve test lint format protos clean

help:
	@echo "make demo     the whole system on this machine, in a few minutes"
	@echo "make serve    a gateway on 127.0.0.1 (ARGS='--base PATH' for another base)"
	@echo "make test     the tests (ARGS='-k name' for some of them)"
	@echo "make lint     ruff and mypy"
	@echo "make format   ruff's fixes and formatting"
	@echo "make protos   the generated gRPC code, from protos/"
	@echo "make env      only the environment, in $(VENV)"

env: $(STAMP)

$(STAMP): requirements.lock requirements-cuda.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Patchbay needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

demo: env
	@$(BIN)/patchbay demo $(ARGS)

serve: env
	@$(BIN)/patchbay serve $(ARGS)

test: env
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=4 --dist=loadfile \
		--no-loadscope-reorder $(ARGS)

lint: env
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: env
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

protos: env
	@$(BIN)/python -m grpc_tools.protoc -I protos --python_out=. --pyi_out=. --grpc_python_out=. \
		protos/gateway/rpc/*.proto

clean:
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
