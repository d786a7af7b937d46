# Everything runs in .venv, which `make install` creates. `make help` lists the targets.
PYTHON ?= python3
BIN    := .venv/bin
SC     := $(BIN)/sctool

# Settings of `make pipeline` and of its steps below; override them on the command line.
DATA   ?= photos
COND   ?= canny
METHOD ?= scedit
BASE   ?= mini
STEPS  ?= 1000
WORK   ?= work/pipeline
SIZE   ?= crop:$(BASE)

.PHONY: help install demo test check lint types imports pipeline annotate train sample evaluate clean
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "  make pipeline DATA=laion/ COND=canny METHOD=scedit BASE=mini   all steps on your own data"

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: .venv/ready ## create .venv with all dependencies

demo: .venv/ready ## photographs -> edges -> a controlled model -> images and numbers, in minutes on a CPU
	$(SC) annotate photos --cond canny --size crop:mini --out work/demo/data --quiet
	$(SC) annotate core/assets/drawings --cond canny --size crop:mini --out work/demo/drawings --quiet
	$(SC) train --preset demo --name demo --data work/demo/data --val-data work/demo/drawings --out work/demo/runs
	$(SC) evaluate --runs work/demo/runs --steps 25 --nmse --clip --report work/demo
	@echo "Look at work/demo/runs/$$(cat work/demo/runs/latest)/samples/sheet.png and work/demo/report.html"

test: .venv/ready ## run the tests, which include the README's commands
	$(BIN)/python -m pytest -n auto

check: lint types imports test ## everything that must pass before a change is merged

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/pyright --pythonpath $(BIN)/python --level error

imports: .venv/ready
	$(BIN)/lint-imports

# The same steps on your own data, one after the other; each resumes where it stopped.
annotate: .venv/ready
	$(SC) annotate $(DATA) --cond $(COND) --size $(SIZE) --out $(WORK)/data

train: annotate
	$(SC) train --method $(METHOD) --cond $(COND) --base $(BASE) --data $(WORK)/data --steps $(STEPS) --out $(WORK)/runs --json \
	  | tee $(WORK)/train.json

sample: train
	$(SC) sample --tuner "$$($(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["run"])' < $(WORK)/train.json)"

evaluate: train
	$(SC) evaluate --runs $(WORK)/runs --json | tee $(WORK)/evaluation.json

pipeline: evaluate ## annotate, train and evaluate on DATA with COND, METHOD and BASE

clean: ## remove the output of the demo and the pipeline
	rm -rf work/demo $(WORK)
