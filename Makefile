# `make demo` and `make test` each create .venv, install the project in it and run.

VENV ?= .venv
OUTPUT ?= demo_output
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=
PYTEST_WORKERS ?= auto
TORCH_INDEX ?=

# A name on the PATH is no proof (version managers leave shims that fail), so each candidate has to run.
USABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c '$(USABLE)' >/dev/null 2>&1 && { echo $$python; break; }; done)

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
EXTRAS_demo := train,analysis
EXTRAS_dev := dev

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-lowest lint format wheel install clean

help: ## list the targets and the variables
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo '  OUTPUT=demo_output        where the demo writes'
	@echo '  PYTHON=python3.12         the Python (>= 3.11) that .venv is made with'
	@echo '  PYTEST_ARGS="-k flow"     more arguments for pytest'
	@echo '  PYTEST_WORKERS=0          processes that run the tests of `make test`; one per core by default'
	@echo '  TORCH_INDEX=https://download.pytorch.org/whl/cpu   take torch from there (the CPU build)'

demo: $(VENV)/.installed-demo ## train, export and use an adapter on a small world
	$(VENV)/bin/refalign demo --output $(OUTPUT)

test: $(VENV)/.installed-dev ## run the tests, without the slow ones and those that need a GPU
	$(VENV)/bin/python -m pytest -m "not slow and not gpu" -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

test-all: $(VENV)/.installed-dev ## run every test this machine can run
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# diffusers before 0.40 refuses to look for the weights in a local folder when the Hub is switched off.
test-lowest: ## run the tests with the lowest supported versions, in .venv-lowest
	HF_HUB_OFFLINE=0 $(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

lint: $(VENV)/.installed-dev ## check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/python tools/structure.py

format: $(VENV)/.installed-dev ## fix what ruff can fix
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

wheel: $(VENV)/.installed-dev ## build the source archive and the wheel in dist/
	$(VENV)/bin/python -m build --no-isolation --outdir dist .

install: $(VENV)/.installed-dev ## create .venv with everything development needs

clean: ## remove build outputs and caches, keep .venv
	rm -rf build dist .pytest_cache .ruff_cache

$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS)
	@$(VENV)/bin/python -c '$(USABLE)' >/dev/null 2>&1 || { \
		'$(PYTHON)' -c '$(USABLE)' >/dev/null 2>&1 || { \
			echo "error: PYTHON='$(PYTHON)': no working Python 3.11 or newer with venv;" \
				"install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }; \
		echo "creating $(VENV) with $(PYTHON)"; \
		'$(PYTHON)' -m venv --clear $(VENV); }
	$(if $(TORCH_INDEX),$(PIP) install --no-deps --constraint $(CONSTRAINTS) --index-url $(TORCH_INDEX) torch)
	$(PIP) install --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS_$*)]'
	@touch $@
