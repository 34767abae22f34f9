# The two commands of README, and what contributors run. Each makes what it needs, the virtual environment first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-newer lint docs models clean

quickstart: $(VENV)/user  ## fine-tune a real encoder on real sentences
	$(BIN)/sft-jax train configs/quickstart.yaml

test: $(VENV)/developer  ## every test, offline, on the CPU
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-newer: $(VENV)/developer  ## the smoke part of the tests, for a second interpreter
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/test_smoke.py tests/test_cli.py tests/test_machine.py tests/nn tests/data

lint: $(VENV)/developer  ## format, lint and types, as pre-commit and CI run them
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/developer  ## the pages that are made from the package: configuration, reference, names
	$(BIN)/python docs/make_configuration.py
	$(BIN)/python docs/make_reference.py

models: $(VENV)/developer  ## docs/models.md from what the parity tests measure
	$(BIN)/python -m pytest tests/parity -n 2 --dist loadfile -o junit_family=xunit1 --junitxml=build/parity.xml
	$(BIN)/python docs/make_models.py build/parity.xml

clean:  ## remove the virtual environment
	rm -rf $(VENV)

$(VENV)/user: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/developer: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev,parity]'
	touch $@ $(VENV)/user
