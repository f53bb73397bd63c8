# make quickstart   set up everything and watch a model learn (SEED=1 for another run)
# make test         set up everything and run the tests
# On a machine without a GPU the CPU build of torch is used where pip finds one (PIP_FIND_LINKS or an index).

PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# the newest torch that the CPU engines are built for; a machine with a GPU keeps the build it has
TORCH := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 'torch>=2.11,<2.14' || echo 'torch==2.13.0')

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install quickstart quickstart-seeds test lint clean

install: $(INSTALLED)

# torch first: any other order lets a dependency choose the build
$(INSTALLED): setup.py pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

quickstart: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" tools/quickstart.sh $(SEED)

# three seeds and the coin-flip control, as a table
quickstart-seeds: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" python tools/bench_quickstart.py --seeds 0 1 2

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build *.egg-info
