# `make demo` runs the main job, `make test` the tests. Both do all set-up first, and only once: a virtual environment
# with everything pinned in constraints.txt.
#
#   PYTHON    a Python 3.11 or 3.12                      make demo PYTHON=python3.12
#   VENV      where the packages go                      make demo VENV=/tmp/venv
#   PIP_ARGS  more options of pip, such as an index      make demo PIP_ARGS="--extra-index-url ..."
#   RUN       the demo's run directory                   make demo RUN=/tmp/run
#   SITE      where `make site` writes the documentation make site SITE=/tmp/site
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
RUN ?= runs/demo
SITE ?= build/site

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
INSTALL := $(PIP) install --quiet --disable-pip-version-check $(PIP_ARGS)
STAMP := $(VENV)/.installed

.PHONY: help setup demo test test-slow test-all static check coverage site clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt requirements-demo.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "training, export and tests need Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": name another one, as in PYTHON=python3.12")'
	@echo "installing into $(VENV), once: 2 GB, or 6 GB with the CUDA build of torch (docs/install.md); some minutes" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and alone: which build of it is installed decides about several GB (docs/install.md)
	$(INSTALL) -c constraints.txt torch
	$(INSTALL) -c constraints.txt -e '.[dev]'
	$(INSTALL) --no-deps --require-hashes -r requirements-demo.txt
	@touch $@

demo: $(STAMP)
	$(BIN)/nxm run --demo --out $(RUN)

test: $(STAMP)
	$(BIN)/python -m pytest

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Both in one: what tests of both kinds need is made once.
test-all: $(STAMP)
	$(BIN)/python -m pytest -m 'not exhaustive'

static: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" tools/check --static

check: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" tools/check

coverage: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" tools/check --coverage

# The documentation as a static site, by packages of its own: what the product needs is pinned without them.
site:
	@test -x $(VENV)-site/bin/python || $(PYTHON) -m venv $(VENV)-site
	$(VENV)-site/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r tools/site-requirements.txt
	$(VENV)-site/bin/sphinx-build -q -W --keep-going -b html -c docs/site docs $(SITE)
	@echo "$(SITE)/index.html"

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs/demo
	find nxm_export compressors engines tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "kept: $(VENV) and runs of your own; remove them by hand" >&2
