# Two commands from nothing but Python 3.10+ and a package index:  make test   and   make demo
#   PYTHON=...        the interpreter to build from; a torch >= 2.5 that it already has is used, else torch is installed
#   COMFYUI_PATH=...  the ComfyUI for the host tests and the demo, if it is not where the README says it is looked for
#   OUT=...           where the demo writes (default: out)
#   ARGS=...          more arguments for pytest, e.g. ARGS="-k layout -x"

PYTHON ?= python3
OUT ?= out
ARGS ?=
ENV := .venv
RUN := $(ENV)/bin/python
READY := $(ENV)/.tonfa-ready

.PHONY: test test-units test-host demo lint format clean
.DEFAULT_GOAL := test

$(READY): pyproject.toml tests/env.py
	$(PYTHON) tests/env.py $(ENV)
	@touch $@

test: lint test-units test-host

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(READY)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

test-units: $(READY)
	$(RUN) -m pytest tests --ignore=tests/host -n auto --dist loadfile $(ARGS)

test-host: $(READY)
	$(RUN) tests/host_env.py test $(ARGS)

# The demo runs inside ComfyUI when one is found and its packages can be installed, and says so when it does not.
demo: $(READY)
	@$(RUN) tests/host_env.py build || echo "The ComfyUI environment could not be built: the demo runs without ComfyUI."
	$(RUN) -m tonfa demo --out $(OUT)

clean:
	rm -rf .venv .venv-host-* build out *.egg-info .pytest_cache .ruff_cache .hypothesis
