# Every target works on a fresh clone: it makes the virtual environment first where that is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# On all cores, where pip compiles on one; workers are fresh processes that keep nothing they compile, and load torch in half
# the time. The file that is left out is of a later Python.
PACKAGES := protocol strategies privacy client server simulations
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x py312_intrinsics
# Three processes also on two cores, for a quarter of the time tests wait for what they started; a file stays in one, so that
# what its tests share is made once, and files keep their order, for those of one long test would come last by number.
PARALLEL := -n 3 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install demo test slow lint format check clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV) (a minute or two the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@rm -rf *.egg-info # what an earlier version left would hide commands that are new
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(COMPILE) $(VENV)/lib $(PACKAGES)
	@touch $@

install: $(INSTALLED) ## make the virtual environment and install into it

demo: $(INSTALLED) ## a federation of four sites on this machine, from certificates to a served model
	@$(BIN)/consortium demo

test: $(INSTALLED) ## the quick tests
	@$(BIN)/python -m pytest -q -m "not slow" $(PARALLEL)

slow: $(INSTALLED) ## the tests that take longer
	@$(BIN)/python -m pytest -q -m slow $(PARALLEL)

lint: $(INSTALLED) ## style and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(INSTALLED) ## put the code into the project's style
	@$(BIN)/ruff check --fix --quiet
	@$(BIN)/ruff format

check: ## everything that CI runs
	@.ci/run

clean: ## remove what the build and the tools left, but not the virtual environment
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
