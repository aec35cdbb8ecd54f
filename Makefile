# Two commands do everything, each making its own environment first (quick the second time):
#   make demo   the main job on the built-in model: trace, choose layers, unlearn, score, attack, report
#   make test   the tests

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)-peers
WORKERS ?= $(shell $(PYTHON) -c 'import os; n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1; print(min(n, 4) if n > 1 else 0)')
SMALL := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}  # models this small are slower on two threads than on one

.PHONY: demo test test-slow test-peers coverage lint types floors check builtin clean

demo: $(READY)
	$(SMALL) $(BIN)/palimpsest demo --config configs/demo.yaml $(ARGS)

test: $(READY)
	$(SMALL) $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(READY)
	$(SMALL) $(BIN)/python -m pytest -m slow $(ARGS)

# What holds between this project's files and the tools that read them, and with four bits, in an environment that has those tools.
test-peers: $(PEERS)/.ready
	$(SMALL) $(PEERS)/bin/python -m pytest tests/sae/formats/test_formats_peers.py tests/unlearn/scope/test_quantized.py tests/test_notebooks.py $(ARGS)

# The tests, counting which lines of the packages they run: a summary here, and coverage.xml.
coverage: $(READY)
	$(SMALL) $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		--cov=lm --cov=tracing --cov=sae --cov=unlearn --cov=palimpsest --cov=tools --cov-report=term --cov-report=xml $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

floors: $(READY)
	$(BIN)/lint-imports

check: lint types floors test

# Build the built-in model and its retain model (about 15 minutes on two idle cores); built once: ARGS=--again builds anew, ARGS="--seed 1" another world.
builtin: $(READY)
	$(BIN)/python -m tools.builtin_model.build --out runs/builtin $(ARGS)

$(READY): EXTRAS := tests
$(PEERS)/.ready: EXTRAS := tests,peers,qlora

%/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed; found " + sys.version'
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade pip setuptools wheel
	$*/bin/python -m pip install --quiet --constraint constraints.txt torch
	$*/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	# What a peer brings along may be built for another torch than the one here; nothing uses it, but transformers trips over it.
	$*/bin/python -c 'import torchvision' 2>/dev/null || $*/bin/python -m pip uninstall --yes --quiet torchvision 2>/dev/null
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) build *.egg-info
