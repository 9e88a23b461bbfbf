# `make run` and `make test` are each complete on their own: they create .venv and install what they need.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: run test lint clean

run: .venv/run
	$(BIN)/python run.py --model tiny --image docs/digits.png --prompt "What digits are in the image?"

test: .venv/test
	$(BIN)/python -m pytest

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The test extra brings everything that a run needs, so a run after a test installs nothing.
.venv/run: pyproject.toml constraints.txt | .venv/bin/python
	test .venv/test -nt pyproject.toml -a .venv/test -nt constraints.txt || $(INSTALL) .
	touch $@

.venv/test: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) ".[test]"
	touch $@

clean:
	rm -rf .venv artifacts build *.egg-info
