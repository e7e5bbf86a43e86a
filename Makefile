# `make run` trains, `make test` tests; either first makes a virtual environment in .venv.
PYTHON ?= python3
# The constraints are for visdom's build; older pips know the first variable, newer ones the second.
PIP = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt .venv/bin/pip

run: .venv/.run
	.venv/bin/python main.py

test: .venv/.test
	.venv/bin/python -m pytest

.venv/.run: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -r requirements.txt
	touch $@

.venv/.test: .venv/.run requirements-test.txt
	$(PIP) install -r requirements-test.txt
	touch $@

.PHONY: run test
