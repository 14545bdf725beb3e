# The executable companion to the Batch Normalization paper.  `make help` lists what there is.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
SEEDS  ?= 1 2 3
JOBS   ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count() or 1)')
BIN    := .venv/bin
BOOK   := _build/book
HTML   := _build/html
NAMES  := $(patsubst chapters/%.ipynb,%,$(sort $(wildcard chapters/*.ipynb)))
LEDGER := $(filter 16_claims,$(NAMES))
MODULES := $(shell find bnlib -name '*.py')
DATA   := $(shell find data)
PAGES  := _config.yml _toc.yml references.bib $(shell find _static) $(wildcard chapters/*.md)
EXECUTED = $(NAMES:%=$(BOOK)/chapters/%.ipynb)

# Chapters run in parallel: share the cores between them, and never ask a terminal for anything.
export OMP_NUM_THREADS ?= 1
export PYTHONUNBUFFERED := 1

.PHONY: help env book chapters pdf test seeds run bench lint lock clean

help:  ## this list
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

env: .venv/.installed  ## the environment in .venv, exactly as requirements.lock says

.venv/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}. Try: make PYTHON=python3.12 env") if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/python -m uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	touch $@

book: env  ## the book in _build/html; executes only chapters that are out of date, JOBS at a time
	@$(MAKE) --no-print-directory --keep-going --jobs=$(JOBS) chapters
	@$(MAKE) --no-print-directory $(HTML)/.rendered
	@echo "The book is in $(HTML)/index.html"

# Execution.  The rules in depends.mk say which modules each chapter uses; make remakes them first.
chapters: $(EXECUTED)

ifneq ($(filter chapters,$(MAKECMDGOALS)),)
include _build/depends.mk
endif

_build/depends.mk: $(NAMES:%=chapters/%.ipynb) $(MODULES) | .venv/.installed
	@mkdir -p $(@D)
	@$(BIN)/python -m bnlib.book.depends $(BOOK)/chapters $(NAMES:%=chapters/%.ipynb) > $@.tmp
	@mv $@.tmp $@

$(BOOK)/chapters/%.ipynb: chapters/%.ipynb requirements.lock | .venv/.installed
	@$(BIN)/python -m bnlib.book.execute $< $@

# The ledger gathers what all the other chapters have measured.
$(LEDGER:%=$(BOOK)/chapters/%.ipynb): $(filter-out $(LEDGER:%=$(BOOK)/chapters/%.ipynb),$(EXECUTED))

# Rendering, from a folder that holds the executed chapters beside copies of the other pages.
# In its mode `auto` Jupyter Book would execute again every chapter with a cell that prints nothing.
$(HTML)/.rendered: $(EXECUTED) $(PAGES) $(MODULES) requirements.lock
	@rm -rf $(BOOK)/_static
	@cp -Rp _toc.yml references.bib _static $(BOOK)
	@sed 's/execute_notebooks: auto/execute_notebooks: "off"/' _config.yml > $(BOOK)/_config.yml
	@cp -p chapters/*.md $(BOOK)/chapters
	$(BIN)/jupyter-book build -q -W -n --keep-going --all --path-output . $(BOOK)
	@touch $@

pdf: book  ## the book as one PDF, _build/book.pdf; needs Chromium
	@$(BIN)/python -m bnlib.book.pdf $(HTML) _build/book.pdf

run: env  ## CHAPTER=10_mnist P="steps=2000 seed=1": one chapter with your parameters, to _build/run
	@$(BIN)/python -m bnlib.book.execute "chapters/$(CHAPTER).ipynb" "_build/run/$(CHAPTER).ipynb" --parameters "$${P-}"
	@echo "Executed: _build/run/$(CHAPTER).ipynb"

seeds: env  ## SEEDS="1 2 3": every chapter with other seeds, outside the book; prints the verdicts that move
	-@$(MAKE) --no-print-directory --keep-going --jobs=$(JOBS) $(foreach s,$(SEEDS),$(patsubst %,_build/seeds/$(s)/%.ipynb,$(filter-out $(LEDGER),$(NAMES))))
	@$(BIN)/python -m bnlib.book.seeds $(SEEDS:%=_build/seeds/%)

_build/seeds/%.ipynb: | .venv/.installed
	@BNLIB_LEDGER_REPORT=1 $(BIN)/python -m bnlib.book.execute chapters/$(notdir $*).ipynb $@ --parameters "seed=$(patsubst %/,%,$(dir $*))"

test: env  ## every test, JOBS at a time; those that read the rendered book need `make book` and Chromium
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

bench: env  ## every script in benchmarks, one after another
	@for script in $(wildcard benchmarks/*.py); do echo "== $$script"; $(BIN)/python "$$script"; done

lint: env  ## formatting, style and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

lock: env  ## resolve pyproject.toml again into requirements.lock
	$(BIN)/python -m uv pip compile pyproject.toml --all-extras --universal --generate-hashes --no-header --output-file requirements.lock

clean:  ## remove what was built; the environment stays
	rm -rf _build
