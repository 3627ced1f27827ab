# Two commands: `make repro` runs the pipeline and prints the comparison, `make test` runs the tests.
# Each sets everything up on a machine with Python 3.11 or later, git and make.

PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# `dvc exp run` makes a commit, and a bare machine has no name to sign it with.
export GIT_AUTHOR_NAME ?= $(or $(shell git config user.name),permllm)
export GIT_AUTHOR_EMAIL ?= $(or $(shell git config user.email),permllm@localhost)
export GIT_COMMITTER_NAME ?= $(GIT_AUTHOR_NAME)
export GIT_COMMITTER_EMAIL ?= $(GIT_AUTHOR_EMAIL)
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export ITERATIVE_DO_NOT_TRACK := 1
export MLFLOW_DISABLE_TELEMETRY := true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION := false
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export PREFECT_HOME ?= $(CURDIR)/.prefect

.PHONY: repro mend test ablation objectives server deploy worker flow sweep track ui clean

repro: mend ## run what is out of date, then print the comparison; MODELS=llama-2-7b runs others than run.models
	dvc $(if $(MODELS),exp run --set-param 'run.models=[$(MODELS)]',repro)
	@cat data/report/table.md

mend: $(BIN)/.ready ## put back DVC's lock files if a killed dvc left them cut off
	@python -m flows.mend

ablation: mend ## compare recipes and their switches over seeds; long, resumes row by row
	dvc repro flows/studies/dvc.yaml:ablation

objectives: mend ## combine objectives of permutations with weight updates, over seeds; resumes part by part
	dvc repro flows/studies/dvc.yaml:objectives

test: $(BIN)/.ready ## run the tests
	pytest $(PYTEST)

# Prefect: a schedule, a log per stage, cancelling. The server and the worker stay in front; `make flow` needs both.
server worker deploy flow sweep: export PREFECT_API_URL ?= http://127.0.0.1:4200/api

server: $(BIN)/.ready ## start Prefect's server; its UI is at http://127.0.0.1:4200
	prefect server start --host 127.0.0.1

deploy: $(BIN)/.ready ## register the deployment of prefect.yaml at the server
	prefect work-pool inspect gpu > /dev/null 2>&1 || prefect work-pool create gpu --type process
	prefect --no-prompt deploy --all

worker: export PERMLLM_FOLDER := $(CURDIR)
worker: deploy ## register the deployment, then run what the server hands out, one run at a time
	prefect worker start --pool gpu --limit 1

flow: $(BIN)/.ready ## have a worker run the pipeline; FLOW chooses a part, see the README
	prefect deployment run pipeline/default --watch $(FLOW)

sweep: $(BIN)/.ready ## have all workers run what is out of date, then report here; SWEEP="--remote shared" shares results between clones
	python -m flows.sweep $(SWEEP)

track: $(BIN)/.ready ## copy finished results to MLflow
	python -m flows.track

ui: $(BIN)/.ready ## start MLflow's UI at http://127.0.0.1:5000
	mlflow server --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000 --workers 1

# The file is written last: an installation that was interrupted is done again.
$(BIN)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean: ## remove everything that a command above can make again
	rm -rf .venv .cache .prefect mlflow.db mlartifacts data/calibrate data/prune data/learn data/assemble data/benchmark data/evaluate data/metrics
