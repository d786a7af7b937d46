# Everything runs in .venv, which the first target makes. `make help` lists the targets.
PYTHON ?= python3
BIN    := .venv/bin
SC     := $(BIN)/sctool

# What `make pipeline` and the verbs below work on; set them on the command line.
DATA   ?= photos
COND   ?= canny
METHOD ?= scedit
BASE   ?= mini
STEPS  ?= 1000
WORK   ?= work/pipeline
SIZE   ?= crop:$(BASE)

.PHONY: help install demo test check lint types imports pipeline annotate train sample evaluate clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo "  make pipeline DATA=laion/ COND=canny METHOD=scedit BASE=mini   your own data, all verbs in a row"

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: .venv/ready ## make .venv with everything in it

demo: .venv/ready ## photographs -> edges -> a controlled model -> pictures and numbers, in minutes on a CPU
	$(SC) annotate photos --cond canny --size crop:mini --out work/demo/data --quiet
	$(SC) annotate core/assets/drawings --cond canny --size crop:mini --out work/demo/drawings --quiet
	$(SC) train --preset demo --name demo --data work/demo/data --val-data work/demo/drawings --out work/demo/runs
	$(SC) evaluate --runs work/demo/runs --steps 25 --nmse --clip --report work/demo
	@echo "Look at work/demo/runs/$$(cat work/demo/runs/latest)/samples/sheet.png and work/demo/report.html"

test: .venv/ready ## the tests, the README's commands among them
	$(BIN)/python -m pytest

check: lint types imports test ## what must pass before a change is taken

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/pyright --pythonpath $(BIN)/python --level error

imports: .venv/ready
	$(BIN)/lint-imports

# The same verbs one after the other on your own data; each resumes where it was stopped.
annotate: .venv/ready
	$(SC) annotate $(DATA) --cond $(COND) --size $(SIZE) --out $(WORK)/data

train: annotate
	$(SC) train --method $(METHOD) --cond $(COND) --base $(BASE) --data $(WORK)/data --steps $(STEPS) --out $(WORK)/runs --json \
	  | tee $(WORK)/train.json

sample: train
	$(SC) sample --tuner "$$($(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["run"])' < $(WORK)/train.json)"

evaluate: train
	$(SC) evaluate --runs $(WORK)/runs --json | tee $(WORK)/evaluation.json

pipeline: evaluate ## annotate | train | evaluate on DATA with COND, METHOD and BASE

clean: ## remove what the demo and the pipeline made
	rm -rf work/demo $(WORK)
