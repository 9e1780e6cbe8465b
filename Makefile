# Two commands do everything: `make study` and `make test`. `make help` lists the rest.
PYTHON ?= python3
PROFILE ?= quick
RESULTS ?= results
PAPER ?=
JOBS ?= 2
EXECUTOR ?= local
LOCKED ?=
MINUTES ?= 15

BIN := .venv/bin
# Jobs call `prunestudy` by its name, whether or not the environment is activated.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Dozens of processes start: each would compile the library anew.
unexport PYTHONDONTWRITEBYTECODE
# Recipes read what the user sets from the environment: whatever it holds, it is no shell code.
export PROFILE RESULTS PAPER JOBS EXECUTOR MINUTES
FOLDER := $$RESULTS/$$PROFILE
papers := set -f; for paper in $$PAPER; do set -- "$$@" --paper "$$paper"; done;
chosen := --profile "$$PROFILE" --results "$$RESULTS" "$$@"

.PHONY: help study test lab report slides pages bench gpu status lint clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10
	@echo "variables: PROFILE=quick|cpu|cpu-long|gpu|paper  PAPER='name ...'  JOBS=2  EXECUTOR=local  LOCKED=1  MINUTES=15"

study: .venv/ready  ## run what is missing of the study, then print the summary
	@$(papers) prunestudy study $(chosen) --jobs "$$JOBS" --executor "$$EXECUTOR"

test: .venv/ready  ## run the tests, in two processes
	@$(BIN)/python -m pytest -n 2 --dist worksteal

lab: .venv/ready  ## open JupyterLab: notebooks/, and results/ with the executed copies
	@$(BIN)/jupyter lab --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks

report: pages  ## write the executed notebooks as a site that needs no network
	@$(BIN)/sphinx-build -qWE -d "$(FOLDER)/work/doctrees" "$(FOLDER)/work/docs" "$(FOLDER)/work/report"
	@rm -rf "$(FOLDER)/report" && mv "$(FOLDER)/work/report" "$(FOLDER)/report"
	@echo "$(FOLDER)/report/index.html"

slides: pages  ## write the executed notebooks as slides that need no network
	@$(BIN)/jupyter nbconvert --log-level WARN --config docs/nbconvert.json \
	  --output-dir "$(FOLDER)/slides" "$(FOLDER)"/work/docs/notebooks/*.ipynb
	@cp -r "$(FOLDER)/work/docs/assets/." "$(FOLDER)/slides"
	@ls "$(FOLDER)"/slides/*.html

# What both are made of.
pages: .venv/ready
	@$(BIN)/python docs/arrange.py "$$PROFILE" "$$RESULTS"

bench: .venv/ready  ## measure ratios side by side, write results/bench.md
	@$(BIN)/python bench

gpu: .venv/ready  ## test on a CUDA device, time it, study for the rest of MINUTES
	@end=$$(($$(date +%s) + 60 * $$MINUTES)); \
	$(BIN)/python -m pytest -m cuda -rs -x && $(BIN)/python bench/gpu.py "$$RESULTS/gpu" && \
	prunestudy study --profile gpu --results "$$RESULTS" --minutes "$$(((end - $$(date +%s)) / 60))"

status: .venv/ready  ## say what is done and what is missing
	@$(papers) prunestudy status $(chosen)

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
