# `make demo` and `make test` do all set-up themselves: a fresh machine needs Python 3.11 or later, git and make.
# What they install is the wheel, into .venv; a stamp file there says what is done already.

SHELL := /bin/sh
.DELETE_ON_ERROR:
.PHONY: bench books demo notebooks test matrix stress lint browser clean

VENV := .venv
BIN := $(VENV)/bin
KILL ?= sleep
WORKERS ?= 2

# The first Python that is new enough and can make environments; PYTHON=/path/to/python chooses another.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
UV = $(shell command -v uv || echo $(BIN)/uv)
INSTALL = $(UV) pip install --quiet --python $(BIN)/python
WHEEL = $(firstword $(wildcard $(VENV)/dist/*.whl))

SOURCES := $(shell find durable_nb \( -type f -not -name '*.pyc' \) -o \( -type d -not -name __pycache__ \))

demo: $(VENV)/wheel
	$(BIN)/durable-nb demo --kill $(KILL)

test: $(VENV)/test browser
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup --installed --known-skips-only $(ARGS)

# Processes killed at 2,000 random moments, SEED=7 chooses other ones; a journal opened, checkpointed and closed by three at once;
# a schedule that three processes fire for a minute.
SEED ?= 1
stress: $(VENV)/test
	DURABLE_NB_KILLS=2000 DURABLE_NB_OPENINGS=4000 DURABLE_NB_PROGRAMS=2000 DURABLE_NB_KILLED_PROGRAMS=200 DURABLE_NB_SECONDS=60 DURABLE_NB_SEED=$(SEED) \
	DURABLE_NB_LIMITED_RUNS=1000 \
	$(BIN)/pytest --installed tests/test_processes.py tests/test_replay.py tests/test_schedule.py tests/test_limits_of_processes.py $(ARGS)

# The tests on Python 3.11 to 3.14, with pandas 2 and 3, numpy 1.26 and 2, ipykernel 6 and 7, SDKs on httpx and httpx2, as far as
# the Pythons are there; as root on Debian 3.14 is fetched. By hand, before a release: about an hour. ONLY=3.14 chooses, ARGS are pytest's.
ONLY ?=
matrix: $(VENV)/wheel
	$(BIN)/python tests/matrix.py --wheel "$(WHEEL)" --only "$(ONLY)" --workers $(WORKERS) -- $(ARGS)

# Ratios against raw SQLite, fdatasync, pickle, xxh3, DBOS, joblib and marimo in the same run: about 8 minutes and 6 GB of memory.
# DURABLE_NB_BENCH_MANY=2000 DURABLE_NB_BENCH_STEPS=100 DURABLE_NB_BENCH_BYTES=100000000 make bench: under a minute.
bench: $(VENV)/bench
	$(BIN)/python benchmarks/basics.py
	$(BIN)/python benchmarks/steps.py
	$(BIN)/python benchmarks/http.py
	$(BIN)/python benchmarks/cells.py
	$(BIN)/python benchmarks/view.py

# Twenty notebooks, each in a new kernel plainly, durably, again, by halves and edited: half an hour on two cores.
# NAMES="numpy 13" make books: those whose file names contain one of these.
books: $(VENV)/books
	$(BIN)/python tests/books.py $(NAMES)

# The notebooks are saved with what they show: executed anew, each in a folder of its own. NAMES="coffee" chooses.
notebooks: $(VENV)/test
	$(BIN)/python tests/save_notebooks.py $(NAMES)

lint: $(VENV)/lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

clean:
	rm -rf $(VENV) .matrix dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# An environment is made anew when pyproject.toml changes: a dependency that was taken out must be missed.
$(VENV)/made: pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or later with venv and ensurepip found; set PYTHON=/path/to/python" >&2; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@command -v uv >/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@touch $@

$(VENV)/wheel: $(VENV)/made $(SOURCES) README.md LICENSE
	rm -rf $(VENV)/dist
	$(UV) build --quiet --wheel --python $(BIN)/python --out-dir $(VENV)/dist
	$(INSTALL) --reinstall-package durable-nb $(VENV)/dist/*.whl
	@touch $@

$(VENV)/test: $(VENV)/made | $(VENV)/wheel
	$(INSTALL) "$(WHEEL)[test]"
	@touch $@

$(VENV)/books: $(VENV)/made | $(VENV)/wheel
	$(INSTALL) "$(WHEEL)[books]"
	@touch $@

$(VENV)/bench: $(VENV)/made | $(VENV)/wheel
	$(INSTALL) "$(WHEEL)[bench]"
	@touch $@

$(VENV)/lint: $(VENV)/made | $(VENV)/wheel
	$(INSTALL) "$(WHEEL)[lint]"
	@touch $@

# Tests of the view want a Chromium. On Debian, as root, it is installed; elsewhere those tests are skipped, and say so.
browser:
	@test -x "$${DURABLE_NB_CHROMIUM:-/usr/bin/chromium}" || ! grep -qs '^ID=debian' /etc/os-release || test "$$(id -u)" != 0 || \
	{ echo "installing Chromium with apt-get"; apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	apt-get install -y -qq --no-install-recommends chromium >/dev/null || echo "Chromium could not be installed" >&2; }
