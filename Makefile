# Each target sets up what it needs in $(VENV) first, and only when a pyproject.toml or constraints.txt has changed.
#   make setup                     the environment alone, in .venv
#   make fast                      the tests that take no time, in under 90 seconds
#   make test                      everything: lint, types, unit, contract, documentation and property tests
#   make test PYTHON=python3.12    with another interpreter (the environment is made once: also say VENV=)
#   make test VENV=path            in another environment, made there unless it exists
#   make test VENV=path INSTALL=no in an existing environment, exactly as it is

PYTHON ?= python3
VENV ?= .venv
INSTALL ?= yes
# Worker processes for the tests. Each imports everything anew, which only the whole suite is long enough for.
WORKERS ?= 0
# The suite is many small tensors: threads inside an operation only get in each other's way.
export OMP_NUM_THREADS ?= 1

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# What the environment was installed from; the folder counts because the install is editable.
KEY := $(shell (pwd; cat pyproject.toml reference/pyproject.toml constraints.txt) | cksum | cut -d ' ' -f 1)
ifeq ($(INSTALL),no)
DEV :=
DOCS :=
else
DEV := $(VENV)/.marble-dev-$(KEY)
DOCS := $(VENV)/.marble-docs-$(KEY)
endif

.DEFAULT_GOAL := test
.PHONY: setup test fast faults coverage demo check props docs bench clean

test: WORKERS = 2
test: check ## everything that has to pass before a change lands
	$(PY) -m pytest -n $(WORKERS)

fast: $(DEV) ## the answer to a change in under 90 seconds: without what trains, compiles or starts processes
	$(PY) -m pytest -m "not slow" -n $(WORKERS)

faults: $(DEV) ## break it on purpose: 100 kills, every write failing, 10,000 damaged arguments of each public function
	PHASES=all KILLS=50 RANKS=10 FUZZ=10000 DISK=all REQUESTS=1000 $(PY) -m pytest -n $(WORKERS) tests/faults

coverage: $(DEV) ## which lines the tests reach
	$(PY) -m pytest -n $(WORKERS) --cov=marble_core --cov=reference --cov-report=term --cov-report=html:site/coverage

setup: $(DEV) ## the environment alone

# Training is large tensors: here the threads are torch's to choose.
demo: $(DEV) ## minutes: three rules on rewards that conflict in the small world, with a report
	@env -u OMP_NUM_THREADS $(PY) -m reference demo

check: $(DEV) ## lint, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

props: WORKERS = 2
props: $(DEV) ## the property tests with ten times the examples
	HYPOTHESIS_PROFILE=props $(PY) -m pytest -n $(WORKERS) property_tests

docs: $(DOCS) ## the documentation, into site/
	$(PY) -m zensical build --strict --clean

bench: $(DEV) ## tables of speed and accuracy
	$(PY) -m benchmarks.solver
	$(PY) -m benchmarks.gradients
	$(PY) -m benchmarks.trainer --small

clean: ## what the other targets leave behind, the environment included
	rm -rf .venv site build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	$(PYTHON) -m venv $(VENV)

# Not $(PY) itself: installing packages must not depend on the interpreter's date.
# pip and the build back end are installed first: groups need a recent pip, and the back end's version is pinned as well.
EDITABLE := -e . -e './reference[rewards]'
$(VENV)/.marble-dev-$(KEY): | $(PY)
	$(PIP) install --quiet -c constraints.txt 'pip>=25.1' hatchling
	$(PIP) install --quiet --no-build-isolation -c constraints.txt $(EDITABLE) --group dev
	rm -f $(VENV)/.marble-dev-*
	touch $@

$(VENV)/.marble-docs-$(KEY): | $(VENV)/.marble-dev-$(KEY)
	$(PIP) install --quiet --no-build-isolation -c constraints.txt $(EDITABLE) --group dev --group docs
	rm -f $(VENV)/.marble-docs-*
	touch $@
