# `make help` lists the targets. VENV=path uses another virtual environment, PYTHON=path another interpreter.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
RECIPE ?= recipes/quad_w4a4.yaml
OUTPUT ?= outputs/SmolLM2-135M-quad-w4a4
PYTEST_ARGS ?=

# Tools run as modules: a virtual environment that was renamed still works that way.
BIN := $(VENV)/bin/python
KEY := $(shell cat pyproject.toml setup.py constraints.txt | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.installed-$(KEY)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow bench-quality lint format clean distclean

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 14

venv: $(STAMP) ## create the virtual environment, or bring it up to date

# torch goes first, pinned: the packages after it then find it there and leave its build alone.
$(STAMP):
	$(PYTHON) -m venv $(VENV)
	$(BIN) -m pip install --disable-pip-version-check -c constraints.txt torch setuptools
	$(BIN) -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[compress,demo,dev]"
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: $(STAMP) ## compress SmolLM2-135M, reload it, compare with the original
	$(BIN) -m quad_modifiers.demo run --recipe $(RECIPE) --output $(OUTPUT)

test: $(STAMP) ## the tests that need neither GPU, network nor minutes
	$(BIN) -m pytest $(PYTEST_ARGS)

test-slow: $(STAMP) ## the tests on real models
	$(BIN) -m pytest -m slow $(PYTEST_ARGS)

bench-quality: $(STAMP) ## the quality tables of README.md; hours
	$(BIN) -m quad_modifiers.bench quality

lint: $(STAMP) ## ruff and mypy
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m mypy

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN) -m ruff check --fix .
	$(BIN) -m ruff format .

clean: ## remove caches and build products; outputs/ and the environment stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environment as well
	rm -rf .venv
