# Everything from nothing but Python (3.11 or newer), make and pip. `make test` and `make demo` are the two to know.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two workers with one thread each use two cores best: the tests' models are tiny.
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install test examples docs lint wheel demo test-lowest clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

install: $(VENV)/.installed  ## a virtual environment with fewtune, all extras and the development tools

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[all,int8,docs,dev]'
	touch $@

test: install  ## all tests, on the CPU
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

examples: install  ## every script in examples/
	set -e; for script in examples/*.py; do echo "== $$script"; $(BIN)/python $$script; done

docs: install  ## the site, in build/docs; its tutorials run, a warning is an error
	$(BIN)/sphinx-build -W --keep-going --quiet -b html docs build/docs

lint: install  ## style, types, who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

wheel: install  ## build the wheel, and use the core from it in a clean environment
	rm -rf dist build/clean
	$(BIN)/python -m build --quiet --outdir dist
	$(PYTHON) -m venv build/clean
	build/clean/bin/python -m pip install --quiet dist/*.whl
	build/clean/bin/python examples/own_model.py
	build/clean/bin/fewtune --version

demo: export OMP_NUM_THREADS = 2
demo: install  ## the whole path on real weights and images: select, tune, evaluate, apply the task file
	$(BIN)/fewtune demo $(DEMO)

# The lowest versions that are really tested; every other lower bound of pyproject.toml is at least as new as these.
# (NumPy: the interpreter of that torch's Triton fails with newer ones.)
LOWEST := torch==2.9.0 torchvision==0.24.0 timm==1.0.31 numpy==2.0.2
test-lowest:  ## the core's tests with the lowest versions of torch and timm
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --editable '.[all,dev]' $(LOWEST)
	.venv-lowest/bin/python -m pytest -n $(WORKERS) --dist worksteal

clean:
	rm -rf $(VENV) .venv-lowest build dist
