# Everything a newcomer needs: `make demo` and `make test` set up their own environment in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The environment of this checkout, whatever shell it is called from
export PYTHONNOUSERSITE := 1

.PHONY: demo test test-slow lint bench clean

demo: $(VENV)/ready
	$(BIN)/liveselect demo

test: $(VENV)/ready
	$(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "python 3.11 or newer is needed; call make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "python 3.11 or newer is needed, found $$($(PYTHON) --version); call make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "Installing liveselect and what it needs into $(VENV) (a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@# without what they name: their torchvision, which nothing here uses, does not load beside a CPU build of torch
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt \
		kronfluence curvlinops-for-pytorch backpack-for-pytorch
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
