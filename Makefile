# make demo    install, then draw two-object prompts without and with methods into out/demo
# make test    install with the test extras, then lint, types and tests: what CI runs
# make test-processors   the numerical tests as other processors would run them, and on other inputs (an hour or two;
#              PROCESSORS_ARGS=--sample: what CI runs)
# make bench   install with the test extras, then measure what attention control costs here (docs/benchmarks.md): the
#              overhead table, the operations and pictures of both, into out/bench
# make docs    install with the docs extra, then build the documentation into out/site; every warning is an error
# make clean   remove what these made
# PYTHON=python3.12 chooses the interpreter that .venv is made with (3.10 to 3.13).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_ARGS ?=
BENCH_ARGS ?=
PYTEST_ARGS ?=
PROCESSORS_ARGS ?=
# Of pytest-xdist; empty for one process.
WORKERS ?= --numprocesses logical --maxprocesses 8 --dist worksteal

PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
PACKAGING := setup.py pyproject.toml constraints.txt

# Two threads that soon stop spinning for each other: on cores that others use too, spinning ones take many times as long.
export OMP_NUM_THREADS ?= 2
export GOMP_SPINCOUNT ?= 1000
export MKL_NUM_THREADS ?= $(OMP_NUM_THREADS)
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1
export PYTHONUNBUFFERED ?= 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-processors lint types bench docs clean

help:
	@sed -n 's/^# //p' Makefile

demo: $(VENV)/.installed-demo
	$(BIN)/attnctl-fast demo $(DEMO_ARGS)

# Workers have one thread each.
test: export OMP_NUM_THREADS = 1
test: lint types
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

test-processors: $(VENV)/.installed-test
	$(BIN)/python tests/processors.py $(PROCESSORS_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

bench: $(VENV)/.installed-test
	$(BIN)/attnctl-fast bench overhead --results out/bench/overhead.jsonl $(BENCH_ARGS)
	$(BIN)/attnctl-fast bench ops --results out/bench/ops_cpu.jsonl
	$(BIN)/attnctl-fast bench plot --results out/bench --out out/bench

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The documentation: out/site/index.html"

clean:
	rm -rf $(VENV) out build dist *.egg-info .mypy_cache .ruff_cache .hypothesis .benchmarks

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "attnctl-fast needs Python 3.10 to 3.13; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing)."; \
	  echo "Name another one: make PYTHON=python3.12 ..."; exit 1; } >&2
	@echo "Making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

# torch by itself first, so that no other requirement can choose its version.
$(VENV)/.installed-torch: constraints.txt | $(VENV)/bin/python
	@echo "Installing torch into $(VENV) (the first time this takes minutes)"
	@$(PIP) install --constraint constraints.txt --upgrade pip setuptools
	@$(PIP) install --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	@touch $@

$(VENV)/.installed-demo: $(PACKAGING) | $(VENV)/.installed-torch
	@echo "Installing attnctl-fast[diffusers] into $(VENV)"
	@$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[diffusers]'
	@touch $@

$(VENV)/.installed-test: $(PACKAGING) | $(VENV)/.installed-torch
	@echo "Installing attnctl-fast[test] into $(VENV)"
	@$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[test]'
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-docs: $(PACKAGING) | $(VENV)/.installed-torch
	@echo "Installing attnctl-fast[docs] into $(VENV)"
	@$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	@touch $@
