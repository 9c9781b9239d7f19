# make demo   the whole path at small size, from raw videos to generated videos
# make test   the test suite
# make test-slurm   the tests on a real SLURM cluster inside this machine (Debian's packages, installed if missing)
# All set up .venv first when it is not there or the dependencies changed.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Where pip looks for torch besides its own index, e.g. https://download.pytorch.org/whl/cpu for the small CPU build.
TORCH_INDEX ?=
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input

SHELL_SCRIPTS := $(wildcard slurm/*.sh slurm/*.sbatch slurm/container/*.sh tests/slurm/*.sh tests/slurm/lab/*.sh \
  tests/slurm/lab/bin/* .ci/run)

DEMO_ARGS ?=
PYTEST_ARGS ?=

.PHONY: help setup demo test test-slurm lint clean
.DEFAULT_GOAL := help

help:
	@echo "make setup   create $(VENV) and install the package with its CPU dependencies"
	@echo "make demo    raw videos -> trained model -> generated videos, into runs/demo (DEMO_ARGS=...)"
	@echo "make test    run the tests (PYTEST_ARGS=...)"
	@echo "make test-slurm  run the SLURM tests on a real cluster of namespaces (PYTEST_ARGS=...)"
	@echo "make lint    ruff, mypy, and shellcheck where it is installed"
	@echo "make clean   remove $(VENV), caches and build products; runs/ stays"
	@echo "variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH_INDEX=$(TORCH_INDEX)"

setup: $(STAMP)

# An environment that was only half made (an interrupted install) has no stamp and is completed here.
$(STAMP): setup.py requirements-cpu.txt megatron_video/VERSION
	@echo "== setup 1/4: Python"
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	  ok = sys.version_info >= (3, 11); print("using", sys.executable, v); \
	  sys.exit(None if ok else "Python 3.11 or newer is needed; %s is %s. Use: make PYTHON=python3.12 ..." % (sys.executable, v))'
	@echo "== setup 2/4: virtual environment $(VENV)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "== setup 3/4: torch (about 1 GB on disk, the longest part)"
	$(PIP) install --progress-bar off $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements-cpu.txt
	@echo "== setup 4/4: the package, its dependencies and the developer tools"
	$(PIP) install --progress-bar off -e ".[dev]"
	@touch $@
	@echo "== setup done"

demo: $(STAMP)
	$(BIN)/megatron-video demo $(DEMO_ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Packages: slurmctld slurmd slurm-client munge iproute2 shellcheck; faketime for the test of a wrong clock.
test-slurm: $(STAMP)
	PYTHON=$(BIN)/python tests/slurm/run.sh $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@if command -v shellcheck >/dev/null; then set -x; shellcheck $(SHELL_SCRIPTS); \
	  else echo "shellcheck is not installed: shell scripts were not checked"; fi

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
