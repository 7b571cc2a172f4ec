# Everything runs in a virtual environment that the first target to need it creates.
# Overridable: PYTHON (makes the environment), VENV (where it is), WORKERS (0: tests in one process),
# DEMO (further options of the demo, such as --seed 1).
PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= auto

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Packages are compiled when they are first imported: all of them at once takes longer than the rest
# of the installation. So the results have to be kept.
unexport PYTHONDONTWRITEBYTECODE

# Each test process gets one thread: several processes with a thread per core slow each other down.
THREADS := $(if $(filter-out 0,$(WORKERS)),OMP_NUM_THREADS=1 )

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test pytest bench lint clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Create the virtual environment, or bring it up to date

demo: $(INSTALLED) ## Train a small language model from nothing, in minutes
	$(BIN)/textenvs train TextGen-v0 --top-p 0.95 --timesteps 49152 $(DEMO)

# The type checker has one thread, most of the time; beside the tests it costs half of what it takes.
test: $(INSTALLED) ## Lint and run the tests, side by side
	@$(MAKE) --no-print-directory --jobs=2 lint pytest

pytest: $(INSTALLED)
	$(THREADS)$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -p no:benchmark --durations=25

bench: $(INSTALLED) ## Run the benchmarks
	$(BIN)/python -m pytest benchmarks/

lint: $(INSTALLED) ## Check style (ruff), format (ruff) and types (mypy)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean: ## Remove caches and build products; the virtual environment stays
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find * -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo >&2 \
	    "The versions in constraints.txt need Python 3.11 or newer, but '$(PYTHON)' is" \
	    "$$($(PYTHON) --version 2>&1): run make with PYTHON=/path/to/a/newer/python."; exit 1; }
	@echo "Installing textenvs and its tools into $(VENV) (minutes the first time) ..."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# The pip that comes with Python may take three times as long to find out what to install.
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=26'
	$(BIN)/python -m pip install --no-compile --constraint constraints.txt --editable '.[dev]'
	@touch $@
