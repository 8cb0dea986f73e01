# Every target sets up what it needs: a clone, Python 3.11 or later and make suffice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo test test-all test-optimized compilers lint format docs bench clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/installed  ## create .venv and install everything into it

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	sys.exit(None if v >= (3, 11) else "otmdr_jax needs Python 3.11 or later, but " \
	+ sys.executable + " is " + sys.version.split()[0] + ". Run: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

demo: setup  ## train SGD, SAM and OT-MDR on digits (1 minute) and write demo-report/
	$(BIN)/otmdr demo --output demo-report

PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup  ## run the tests, but for those that take long (4 minutes on 2 cores)
	$(PYTEST) -m 'not slow'

test-all: setup  ## run all tests (16 to 18 minutes on 2 cores, less with kept programs)
	$(PYTEST)

test-optimized: setup  ## run all on programs compiled as users' are: takes longer
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(PYTEST) --cpu-limit 0

# Beside the environment, not in it: JAX would look for a GPU at each start.
compilers: setup  ## install XLA's compilers for GPUs and TPUs into .compilers
	rm -rf .compilers
	$(BIN)/python -c 'import importlib.metadata as m; v = m.version("jax"); \
	print(f"jax-cuda13-plugin=={v}\njax-cuda13-pjrt=={v}"); \
	print(*(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))' | \
	$(BIN)/python -m pip install --quiet --no-deps --target .compilers -r /dev/stdin

lint: setup  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## build the site into site/: runs the gallery (3 minutes), needs npm for formulas
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	npm install --silent --no-save --prefix .cache/npm katex@0.16
	$(BIN)/mkdocs build --strict

bench: setup  ## time a step of each method (about 10 minutes)
	$(BIN)/python benchmarks/step_time.py

clean:  ## remove the environment, caches and the demo's report
	rm -rf $(VENV) .venv-newest .compilers .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis site demo-report
