# Each target makes what it needs: a virtual environment in .venv with lq installed from this folder.
PYTHON ?= python3
BIN := .venv/bin
# Setuptools warns of editable installs, whatever they are.
INSTALL := PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --editable

.PHONY: demo test test-oldest test-slow test-gpu docs lint format clean

demo: .venv/demo.stamp
	OMP_NUM_THREADS=1 $(BIN)/python examples/quickstart.py

test: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile

# The fast tests with the oldest versions that pyproject.toml declares (constraints/oldest.txt), in an environment of its own; on
# Python 3.10 to 3.12, the last for which some of them have wheels. Without anyio's plug-in: the anyio that goes with
# typing-extensions 4.12 uses a name that pytest deprecates, and warnings are errors.
test-oldest: .venv-oldest/stamp
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile -p no:anyio

test-slow: .venv/dev.stamp
	$(BIN)/pytest -m slow

# What only a GPU can show; skipped, with a word about it, without one. The fast tests know a GPU by stand-ins.
test-gpu: .venv/dev.stamp
	$(BIN)/pytest tests/gpu

# The documentation, into docs/_build/html; strict, and without network.
docs: .venv/docs.stamp
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -W --keep-going -n -q docs docs/_build/html

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info docs/_build docs/generated docs/gallery

.venv/bin/pip:
	@echo "Installing torch, lq and what they need into .venv: some minutes and up to 6 GB, the first time"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/demo.stamp: .venv/bin/pip pyproject.toml
	$(INSTALL) ".[demo]"
	touch $@

.venv/dev.stamp: .venv/bin/pip pyproject.toml
	$(INSTALL) ".[dev]"
	touch $@ .venv/demo.stamp

.venv/docs.stamp: .venv/bin/pip pyproject.toml
	$(INSTALL) ".[docs]"
	touch $@

.venv-oldest/stamp: pyproject.toml constraints/oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/pip install --quiet --constraint constraints/oldest.txt --editable ".[dev]"
	touch $@
