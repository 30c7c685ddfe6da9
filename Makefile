# What a person who cloned this types. Everything that is made lies in build/, dist/ and .venv/;
# a target whose inputs did not change starts at once.

SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

UV := tools/uv
# The first Python of at least 3.10 on PATH; else uv looks further, and fetches one if it can.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$name -c 'import sys; sys.version_info >= (3, 10) or sys.exit(1); print(sys.executable)' 2>/dev/null && break; done)
VENV = $(UV) venv --quiet --seed --clear --python '$(or $(PYTHON),>=3.10)'
INSTALL = $(UV) pip install --quiet --python

PACKAGED := $(shell find fal_notebook agent -name '*.py' -o -name py.typed) pyproject.toml README.md LICENSE
CHECKED := fal_notebook agent benchmarks tools tests
WHEEL := build/wheel.stamp

unexport PYTHONPATH
unexport VIRTUAL_ENV
# Where nothing compiled is kept, each of the hundreds of processes of a test run compiles all it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help
help: ## Say what each target does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

# ---------------------------------------------------------------- environments

.PHONY: setup
setup: .venv/stamp ## Make .venv, for development: this folder (editable), linters, test tools

.venv/stamp: pyproject.toml
	@[ -x .venv/bin/python ] || $(VENV) .venv
	$(INSTALL) .venv --group lint --group test --editable .
	@touch $@

.PHONY: setup-system
setup-system: ## Install an OpenSSH server, shells and a browser for the tests that need them (root, Debian or Ubuntu)
	@tools/setup-system

$(WHEEL): $(PACKAGED)
	@mkdir -p build
	@rm -f dist/*.whl
	$(UV) build --quiet --wheel --out-dir dist
	@touch $@

# One environment per use, each with the wheel in it. The packages change seldom, the wheel often,
# so they have a stamp each.
build/%/packages.stamp: pyproject.toml
	@[ -x build/$*/bin/python ] || $(VENV) build/$*
	$(INSTALL) build/$* --group $* --requirements pyproject.toml
	@touch $@

build/%/wheel.stamp: build/%/packages.stamp $(WHEEL)
	$(INSTALL) build/$* --no-deps --reinstall dist/*.whl
	@touch $@

# pyenv keeps its Pythons beside PATH, where uv does not look.
build/oldest/%: PYTHON = $(or $(lastword $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python3.10)),3.10)

.PRECIOUS: build/%/packages.stamp build/%/wheel.stamp

# ---------------------------------------------------------------- what a user does

.PHONY: demo
demo: build/demo/wheel.stamp ## Run notebooks/quickstart.ipynb on this machine and say what it did
	build/demo/bin/python tools/run_notebook.py notebooks/quickstart.ipynb --output build/demo/quickstart.ipynb

.PHONY: lab
lab: build/lab/wheel.stamp ## Open the notebooks in JupyterLab
	build/lab/bin/jupyter lab --notebook-dir notebooks $(shell [ "$$(id -u)" -ne 0 ] || echo --allow-root) $(LAB)

# ---------------------------------------------------------------- what a developer does

# The tests run against the wheel: they are copied to a folder from which the sources cannot be
# imported, so a file that is missing in the wheel is missing in the tests. They wait as much as they compute,
# so three processes share the files between them on two cores; `make test PYTEST="-n 0"` runs all in one.
.PHONY: test
test: build/test/wheel.stamp ## Build the wheel and run every test against it
	@[ "$$(id -u)" -ne 0 ] || tools/setup-system
	@rm -rf build/check
	@mkdir -p build/check
	@cp -R tests notebooks docs benchmarks tools .ci Makefile pyproject.toml .gitignore *.md LICENSE build/check/
	cd build/check && FAL_TEST_WHEEL=1 ../test/bin/python -m pytest -p no:cacheprovider -n 3 --dist loadfile --no-loadscope-reorder $(PYTEST)

# Each run stands by its number: make faults SEED=7 ONLY=123 plays one again.
SEED ?= $(shell date +%s)
RUNS ?= 200
.PHONY: faults
faults: build/test/wheel.stamp ## Kill, cut, slow and fill what 200 scripted runs stand on; count what is lost (root)
	@[ "$$(id -u)" -ne 0 ] || tools/setup-system
	@rm -rf build/check
	@mkdir -p build/check
	@cp -R tests docs pyproject.toml Makefile *.md LICENSE build/check/
	@echo "SEED=$(SEED)"
	cd build/check && FAL_TEST_WHEEL=1 FAL_FAULT_SEED=$(SEED) FAL_FAULT_RUNS=$(RUNS) FAL_FAULT_ONLY=$(ONLY) \
		../test/bin/python -m pytest -p no:cacheprovider -n 3 --dist load tests/faults/test_scripted.py $(PYTEST)

# The same for what concerns cells, with the oldest Python, IPython and kernel that are supported. The replayed
# notebooks are left out: a host has the newest IPython, and what that says in other words is no difference of ours.
OLDEST = tests/test_magics.py tests/test_terminal.py tests/test_notebook_kernel.py tests/test_asking.py tests/agent/test_session.py
.PHONY: test-oldest
test-oldest: build/oldest/wheel.stamp ## Test cells with the oldest Python, IPython and ipykernel
	@rm -rf build/check-oldest
	@mkdir -p build/check-oldest
	@cp -R tests notebooks pyproject.toml build/check-oldest/
	cd build/check-oldest && ../oldest/bin/python -m pytest -p no:cacheprovider -n 2 --dist loadfile $(or $(PYTEST),$(OLDEST))

SECONDS ?= 600
.PHONY: fuzz
fuzz: build/test/wheel.stamp ## Feed each parser and drive each state machine with what nobody thought of, for 10 minutes
	@rm -rf build/check
	@mkdir -p build/check
	@cp -R tests docs pyproject.toml Makefile *.md LICENSE build/check/
	cd build/check && FAL_TEST_WHEEL=1 FAL_FUZZ_SECONDS=$(SECONDS) FAL_FUZZ_DATABASE=$(CURDIR)/.fuzz ../test/bin/python \
		-m pytest -p no:cacheprovider -n 2 --dist load --timeout $$(($(SECONDS) + 600)) tests/fuzz $(PYTEST)

.PHONY: lint
lint: .venv/stamp ## Check style, types and the layers of the architecture
	.venv/bin/ruff check $(CHECKED)
	.venv/bin/ruff format --check $(CHECKED)
	.venv/bin/mypy
	PYTHONPATH=agent .venv/bin/lint-imports

.PHONY: format
format: .venv/stamp ## Rewrite the sources in the project's style
	.venv/bin/ruff check --fix $(CHECKED)
	.venv/bin/ruff format $(CHECKED)

.PHONY: bench
bench: build/bench/wheel.stamp ## Measure calls and apps beside Ray, Dask, ipyparallel, loky, execnet; rewrite docs/benchmarks.md
	build/bench/bin/python benchmarks/calls.py --write docs $(BENCH)
	build/bench/bin/python benchmarks/cells.py --write docs $(BENCH)
	build/bench/bin/python benchmarks/apps.py --write docs $(BENCH)
	build/bench/bin/python benchmarks/connecting.py --write docs $(BENCH)

.PHONY: bench-connecting
bench-connecting: build/bench/wheel.stamp ## Measure new connections to a prepared SSH host; rewrite docs/benchmarks.md
	build/bench/bin/python benchmarks/connecting.py --write docs $(BENCH)

.PHONY: bench-hosts
bench-hosts: build/bench/wheel.stamp ## Measure first contact with a host that has nothing on it (root); rewrite docs/benchmarks.md
	build/bench/bin/python benchmarks/hosts.py --write docs $(BENCH)

.PHONY: bench-cells
bench-cells: build/bench/wheel.stamp ## Measure %%fal cells of a kernel beside plain ones; rewrite docs/benchmarks.md
	build/bench/bin/python benchmarks/cells.py --write docs $(BENCH)

.PHONY: bench-apps
bench-apps: build/bench/wheel.stamp ## Measure apps beside uvicorn behind ssh -L and Ray Serve; rewrite docs/benchmarks.md
	build/bench/bin/python benchmarks/apps.py --write docs $(BENCH)

.PHONY: clean
clean: ## Remove everything that make made, .venv too
	rm -rf build dist .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
