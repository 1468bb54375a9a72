# flowbridge: `make` alone prints this help.
.DEFAULT_GOAL := help
.PHONY: help install demo serve test check format bench chaos openapi lock clean
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The first of these that is Python 3.11 or newer; `make PYTHON=/path/to/python` names another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

# Without byte code, collecting the tests takes twice as long (24 s of processor time), and so does each of their processes.
unexport PYTHONDONTWRITEBYTECODE

help:  ## show this help
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## ?/  make \1\t/' | expand -t 17

install: $(STAMP)  ## make .venv and install flowbridge with everything it uses

# Debian's bare python3 has no ensurepip: then the machine's own pip fills the environment.
$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "flowbridge needs Python 3.11 or newer; none was found. make PYTHON=/path/to/python3 names one."; exit 2; }
	@test -x $(BIN)/python -a -x $(BIN)/pip || { echo "Making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 \
		|| { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; } \
		|| { echo "Cannot make a virtual environment: install your system's python3-venv package."; exit 2; }; }
	@echo "Installing the pinned packages (a minute or two)"
	@$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)  ## run the main job against a real local homeserver (ARGS=--once: stop after the table)
	@$(BIN)/flowbridge demo $(ARGS)

serve: $(STAMP)  ## run the bridge (ARGS="--port 8090")
	@$(BIN)/flowbridge serve $(ARGS)

test: $(STAMP)  ## run the tests (ARGS="-k name")
	@$(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder $(ARGS)

check: $(STAMP)  ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)  ## put the code into shape
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP)  ## side by side with its peers; writes docs/benchmarks.md (needs nginx and wrk; ARGS=--quick: two minutes, nothing written)
	@$(BIN)/python -m benchmarks $(ARGS)

chaos: $(STAMP)  ## try to lose events, by every means (SECONDS=600, ARGS=outage: that alone, ARGS=--seeds)
	@$(BIN)/python -m tests.chaos $(if $(SECONDS),--seconds $(SECONDS)) $(ARGS)

openapi: $(STAMP)  ## write openapi.json
	@$(BIN)/flowbridge openapi > openapi.json.new && mv openapi.json.new openapi.json

lock: $(STAMP)  ## resolve requirements.lock again
	@$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		--all-extras --upgrade -q pyproject.toml -o requirements.lock
	@$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		--extra postgresql --extra e2ee --extra socks -c requirements.lock -q pyproject.toml -o deploy/requirements.lock

clean:  ## remove .venv and caches
	@rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis dist build
