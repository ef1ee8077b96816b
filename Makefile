# make demo | make test on a fresh machine (Python >= 3.11, a C++ compiler, make) do all the set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo-results

.PHONY: help install demo test slow check lint format wheel smoke bench clean

help:  ## Show these targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /	/' | expand -t 10

install: $(VENV)/ready  ## Create .venv and build pyprune into it, editable

$(VENV)/ready: pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt --group dev -e .
	touch $@

demo: install  ## Train on real digits, prune, and leave the results in demo-results/
	$(BIN)/pyprune demo --out $(DEMO)

test: install  ## The quick tests
	$(BIN)/python -m pytest

slow: install  ## The slow tests
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: install  ## ruff, mypy --strict, clang-format: report only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -type f)

format: install  ## Format Python and C++ in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -type f)

wheel: install  ## Build the wheel into dist/, with build isolation
	rm -rf dist
	$(BIN)/python -m build -q --wheel

smoke: wheel  ## Install the wheel into a clean environment and try it there
	rm -rf build/smoke && $(PYTHON) -m venv build/smoke
	build/smoke/bin/python -m pip install -q -c constraints.txt dist/*.whl
	cd build/smoke && bin/python -W error -P ../../tests/smoke.py

check: lint smoke test  ## Everything that CI runs

bench: install  ## The benchmarks, peers in the same groups
	$(BIN)/python -m pytest benchmarks -o addopts="" --benchmark-only --benchmark-group-by=group

clean:  ## Remove what was built
	rm -rf build dist $(VENV) $(DEMO)
