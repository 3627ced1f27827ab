# Two commands: `make repro` runs the pipeline and prints the comparison, `make test` runs the tests.
# Each sets everything up on a machine with Python 3.11 or later, git and make.

PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_HOME ?= $(CURDIR)/.prefect

.PHONY: repro test clean

repro: $(BIN)/.ready ## run what is out of date, then print the comparison
	dvc repro
	@cat data/report/table.md

test: $(BIN)/.ready ## run the tests
	pytest $(PYTEST)

# The file is written last: an installation that was interrupted is done again.
$(BIN)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean: ## remove everything that a command above can make again
	rm -rf .venv .prefect mlflow.db mlartifacts data/calibrate data/prune data/learn data/assemble data/benchmark data/evaluate data/metrics
