# Two commands on a fresh machine: `make run` and `make test`. All else is below; `make help` lists it.
#
#   PYTHON=python3.12      the interpreter that .venv is made with
#   ARGS="MODEL ..."       what `make run` hands to `diffharness run`; without it, the embedded model
#   PYTEST_ARGS="-k rope"  what `make test` hands to pytest
#   BENCH_ARGS="lengths --markdown"  what `make bench` hands to the bench: its parts, and in which form
#   TORCH_ARGS="--index-url https://..."  where pip finds torch, if not where it finds the rest

PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?= -n auto --dist loadfile
BENCH_ARGS ?=
TORCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install -qq --constraint constraints.txt
pinned = $(shell grep '^$(1)==' constraints.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup run test check bench confusion test-real test-converter test-faults test-zoo clean

help:
	@echo 'make run             set up, then run on the embedded model (ARGS="MODEL ..." for another)'
	@echo 'make test            set up, then the tests'
	@echo 'make check           lint, types, layering'
	@echo 'make bench           speed and memory, as ratios'
	@echo 'make confusion       planted damage against verdicts: clean, damaged, of another lineage'
	@echo 'make test-real       SmolLM2 and Gemma 3 270M, 512 tokens each (downloads 350 MB)'
	@echo "make test-converter  our GGUFs against those of llama.cpp's own converter"
	@echo 'make test-faults     engines with planted faults, and sound ones: each must get its verdict (builds llama.cpp)'
	@echo "make test-zoo        128 models of llama.cpp's own generator: every node replayed, every graph compared (builds it)"
	@echo 'make setup           set up only'
	@echo 'make clean           remove what the above made'

setup: $(VENV)/.ready-run

# Exit 0 and 1 both mean that a verdict was reached. The first line keeps an installation that
# cannot even start (Python ends with 1 then) from passing for a verdict.
run: $(VENV)/.ready-run
	@$(BIN)/diffharness --version > /dev/null
	@$(BIN)/diffharness run $(ARGS) || [ $$? -eq 1 ]

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

bench: $(VENV)/.ready-test
	$(BIN)/python -m bench $(BENCH_ARGS)

confusion: $(VENV)/.ready-test
	$(BIN)/python -m bench.confusion

test-real: $(VENV)/.ready-test
	$(BIN)/python -m pytest tests/real -m real --run-real

test-converter: $(VENV)/.ready-converter
	$(BIN)/python -m pytest tests/converter -m converter --run-converter

test-faults: $(VENV)/.ready-test
	$(BIN)/python -m pytest tests/faults -m faults --run-faults

test-zoo: $(VENV)/.ready-test
	$(BIN)/python -m pytest tests/zoo -m zoo --run-zoo

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist

# ---- set-up: each step leaves a stamp, so that it is done once and again when what it read changes

$(VENV)/.ready-venv:
	@$(PYTHON) scripts/check_machine.py
	@echo 'set-up: a virtual environment in $(VENV)'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq '$(call pinned,pip)'
	@touch $@

# torch goes first and by itself, so that pip settles on a build of it before anything else asks for one.
$(VENV)/.ready-torch: $(VENV)/.ready-venv constraints.txt
	@echo 'set-up: $(call pinned,torch)'
	@$(INSTALL) $(TORCH_ARGS) '$(call pinned,torch)'
	@touch $@

$(VENV)/.ready-engine: $(VENV)/.ready-torch
	@echo 'set-up: $(call pinned,llama-cpp-python), built from source: about 9 minutes on 2 cores, once'
	@$(INSTALL) '$(call pinned,llama-cpp-python)'
	@touch $@

$(VENV)/.ready-run: $(VENV)/.ready-engine pyproject.toml
	@echo 'set-up: diffharness and what else it needs'
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready-run
	@echo 'set-up: what the tests need'
	@$(INSTALL) --editable '.[test]'
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready-test
	@echo 'set-up: the linter and the type checker'
	@$(INSTALL) --editable '.[test,dev]'
	@touch $@

$(VENV)/.ready-converter: $(VENV)/.ready-test
	@echo "set-up: what llama.cpp's converter needs"
	@$(INSTALL) --editable '.[test,converter]'
	@touch $@
