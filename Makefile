# Two commands do everything: `make study` and `make test`. `make help` lists the rest.
PYTHON ?= python3
PROFILE ?= quick
PAPER ?=
JOBS ?= 2
EXECUTOR ?= local
LOCKED ?=

BIN := .venv/bin
# Jobs call `prunestudy` by its name, whether or not the environment is activated.
export PATH := $(CURDIR)/$(BIN):$(PATH)
papers := $(foreach paper,$(PAPER),--paper '$(paper)')

.PHONY: help study test lab report slides bench gpu status lint clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10
	@echo "variables: PROFILE=quick|cpu|cpu-long|paper  PAPER='name ...'  JOBS=2  EXECUTOR=local  LOCKED=1"

study: .venv/ready  ## run what is missing of the study, then print the summary
	@prunestudy study --profile '$(PROFILE)' $(papers) --jobs '$(JOBS)' --executor '$(EXECUTOR)'

test: .venv/ready  ## run the tests
	@$(BIN)/python -m pytest

lab: .venv/ready  ## open JupyterLab: notebooks/, and results/ with the executed copies
	@$(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks

report: .venv/ready  ## write the study as a site that needs no network
	@prunestudy report --profile '$(PROFILE)'

slides: .venv/ready  ## write slides of the executed notebooks, of all or of PAPER
	@prunestudy slides $(PAPER) --profile '$(PROFILE)'

bench: .venv/ready  ## measure ratios side by side, write results/bench.md
	@prunestudy bench

gpu: .venv/ready  ## on a CUDA device: its tests, ratios, a short CIFAR study; write results/gpu
	@prunestudy gpu --check && $(BIN)/python -m pytest -m cuda && prunestudy gpu

status: .venv/ready  ## say what is done and what is missing
	@prunestudy status --profile '$(PROFILE)' $(papers)

lint: .venv/ready  ## check and format code and notebooks
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:  ## remove the virtual environment; results stay
	rm -rf .venv

# Set up once, and again when the dependencies change.
.venv/ready: pyproject.toml $(if $(LOCKED),.venv/locked)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	@echo "setting up .venv (a minute or two, once)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	@$(BIN)/python .ci/install --editable '.[dev]'
	@touch $@

# The exact versions that the records were made with; LOCKED=1 asks for them.
.venv/locked: environment.lock
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/python .ci/install --require-hashes --requirement environment.lock
	@touch $@
