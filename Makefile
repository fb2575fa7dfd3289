# Everything a newcomer needs: every target that needs it sets up the environment in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The environment of this checkout, whatever shell it is called from
export PYTHONNOUSERSITE := 1

NAME ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-quick test-slow lint typecheck docs pictures public-names bench build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/ready ## pretrain a small model on this machine's texts, with and without selection, and compare
	$(BIN)/liveselect demo

test: $(VENV)/ready ## run the tests
	$(BIN)/python -m pytest -n auto --dist loadscope

test-quick: $(VENV)/ready ## run the tests of mathematics, selectors and estimators that need neither several processes nor long fits
	$(BIN)/python -m pytest -n auto --dist loadscope -m 'not slow and not gpu and not long' tests/functional tests/selectors tests/influence

test-slow: $(VENV)/ready ## run the long tests, which `make test` leaves out
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/ready ## check style, layout, types, spelling and prose
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python tests/prose.py

typecheck: $(VENV)/ready ## check types only
	$(BIN)/mypy

docs: $(VENV)/ready ## build the documentation into build/site; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "Open build/site/index.html"

pictures: $(VENV)/ready ## draw the pictures of the README again, from two real runs; needs Chromium
	$(BIN)/python tests/pictures.py

public-names: $(VENV)/ready ## write tests/public_names.txt again, after a deliberate change of public names
	$(BIN)/python tests/public_names.py

bench: ## list the benchmarks; make bench NAME=gumbel ARGS=... runs one
ifeq ($(NAME),)
	@for file in benchmarks/*.py; do printf '  %-12s %s\n' "$$(basename $$file .py)" "$$(sed -n '1s/^"""//p' $$file)"; done
else
	@$(MAKE) --no-print-directory $(VENV)/ready
	$(BIN)/python benchmarks/$(NAME).py $(ARGS)
endif

build: $(VENV)/ready ## build dist/*.tar.gz and dist/*.whl
	$(BIN)/python -c "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"

$(VENV)/ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "python 3.11 or newer is needed; call make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "python 3.11 or newer is needed, found $$($(PYTHON) --version); call make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing liveselect and what it needs into $(VENV) (a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	@# without what they name: their torchvision, which nothing here uses, does not load beside a CPU build of torch
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt \
		kronfluence curvlinops-for-pytorch backpack-for-pytorch
	@touch $@

clean: ## remove the environment, builds and caches
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
