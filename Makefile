# The workflow's commands, one line each; `make` alone lists them.
# PROFILE=sdxl chooses a section of settings.ini, ARGS="--limit 8" adds options (`mhrlhf STAGE --help` lists them).
# Another Python than python3: make setup PYTHON=python3.13
PYTHON ?= python3
UV := uv==0.13.9
BIN := .venv/bin
MHRLHF := $(BIN)/mhrlhf
INSTALL := $(BIN)/uv pip install --python $(BIN)/python
UV_HTTP_TIMEOUT ?= 300
export UV_HTTP_TIMEOUT
.DEFAULT_GOAL := help
.PHONY: help setup test lint test-pipeline generate-images-dual generate-images-single annotate train-reward train-dspo \
        monitor-training evaluate next-round report runs pocket notebooks readme docs docs-serve requirements clean

help: ## this list
	@awk -F ':.*## ' '/^##-/ { print "\n" substr($$0, 5) } /^[a-z-]+:.*## / { printf "  make %-24s%s\n", $$1, $$2 }' Makefile

##- everything on the embedded pocket
test-pipeline: setup ## the whole method on the embedded pocket, in ten to twenty minutes on two cores
	$(MHRLHF) test-pipeline $(ARGS)

##- the steps, on any profile
generate-images-dual: setup ## step 1: images from prompts, by two worker processes (two GPUs where they are)
	$(MHRLHF) generate --variant dual --processes 2 $(ARGS)

generate-images-single: setup ## step 1: images from prompts, by one process
	$(MHRLHF) generate $(ARGS)

annotate: setup ## steps 2 and 3: rating sheet out, ratings in, completeness and agreement
	$(MHRLHF) annotate $(ARGS)

train-reward: setup ## step 4: five reward heads from the ratings
	$(MHRLHF) train-reward $(ARGS)

train-dspo: setup ## step 5: tune the image model so that all aspects rise together
	$(MHRLHF) train-dspo $(ARGS)

evaluate: setup ## base and tuned model on held-out prompts, with intervals
	$(MHRLHF) evaluate $(ARGS)

next-round: setup ## after a tuning: images of the tuned model to rate next, where ratings tell most
	$(MHRLHF) next-round $(ARGS)

monitor-training: setup ## watch a run in TensorBoard
	$(MHRLHF) monitor $(ARGS)

report: setup ## one HTML file about a run: raters, heads, tuning, evaluation, pictures
	$(MHRLHF) report $(ARGS)

runs: setup ## what runs there are; ARGS="--differ A B" for what differs between two
	$(MHRLHF) runs $(ARGS)

pocket: setup ## train the embedded models anew; ARGS="--recipe fast" makes a throw-away pocket in two minutes
	$(BIN)/python -m mhrlhf.pocket.train $(ARGS)

##- the house
setup: .venv/ready ## everything that is needed, into .venv; nothing to do the second time

.venv/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else "Python 3.11, 3.12 or 3.13 is needed, $(PYTHON) is %d.%d: make $(MAKECMDGOALS) PYTHON=python3.13" % v)'
	@echo "setting up .venv: a download of some GB the first time"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV)
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

test: setup ## all tests: lint, the house's order, every notebook, tests/
	@$(BIN)/python tools/test.py

lint: setup ## how the code is written, notebooks too; the rules stand in pyproject.toml
	@$(BIN)/python tools/test.py lint types

notebooks: setup ## run every notebook and save its outputs
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/nbdev-test --save --n-workers 2 && $(BIN)/nbdev-clean

readme: setup ## run nbs/index.ipynb and render README.md from it
	$(BIN)/nbdev-test nbs/index.ipynb --save && $(BIN)/nbdev-clean --fname nbs/index.ipynb && $(BIN)/python tools/readme.py

docs: setup ## the documentation in _docs, from what the notebooks show; nothing is run (nbdev-docs: the same by Quarto)
	$(BIN)/python tools/docs.py

docs-serve: setup ## show it on this machine, until Ctrl-C
	$(BIN)/python tools/docs.py --serve

requirements: setup ## requirements.txt anew from pyproject.toml, with the newest versions
	(sed -n '/^#/p' requirements.txt; $(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --no-annotate --no-header --quiet) > requirements.new && mv requirements.new requirements.txt

clean: ## remove caches and what was built; never images, ratings or models
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache; find mhrlhf nbs tests tools -name __pycache__ -prune -exec rm -rf {} +
