# What one does while developing. `make help` lists it; `make quick PYTHON=python` takes another Python than .venv's.
PYTHON ?= .venv/bin/python
QUICK = -m "not slow and not real_size"
TWO = -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help install quick test long lint types coverage docs matrix ci lock bench

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install:  ## make .venv, with the locked libraries and all that is needed to develop
	python3 -m venv .venv && .venv/bin/pip install -c requirements.lock -e ".[dev]"

quick:  ## the fast tests, in less than a minute on two cores
	$(PYTHON) -m pytest $(TWO) $(QUICK)

test:  ## all tests but the long ones and those of the official sizes, in some twelve minutes on two cores
	$(PYTHON) -m pytest $(TWO)

long:  ## the tests that take long
	$(PYTHON) -m pytest $(TWO) -m long

lint:  ## ruff: rules and format; transformers' linter of model files
	$(PYTHON) -m ruff check && $(PYTHON) -m ruff format --check && $(PYTHON) -m mlinter hf_gpt_scratch/model

types:  ## mypy
	$(PYTHON) -m mypy

coverage:  ## which lines the fast tests run; fails below the floor in pyproject.toml
	$(PYTHON) -m coverage erase
	OMP_NUM_THREADS=1 $(PYTHON) -m coverage run -m pytest $(QUICK)
	$(PYTHON) -m coverage combine --quiet
	$(PYTHON) -m coverage report

docs:  ## build the documentation; warnings are errors
	$(PYTHON) -m mkdocs build --strict

matrix:  ## the tests on other versions of the libraries: make matrix VERSIONS="5.8.1 5.24.0/2.15.0/3.13"
	.ci/matrix $(or $(VERSIONS),all)

ci:  ## the README's commands with the locked, the oldest and the newest libraries
	.ci/run

lock:  ## write requirements.lock anew
	.ci/lock

bench:  ## the benchmarks: make bench ARGUMENTS=--help
	$(PYTHON) benchmarks/all.py $(ARGUMENTS)
