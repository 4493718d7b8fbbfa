# make train      set up a virtual environment and train the embedded demonstration
# make test       set up, then lint, type-check and test
# make slow       the tests that are too slow for `make test`
# make docs       build the documentation into site/; warnings are errors
# make sanitize   test the C++ kernels under the address and undefined-behaviour sanitizers (ten minutes)
# make fuzz       search for MINUTES=30 for inputs on which an operator is wrong
# make gpu        on a machine with a GPU and nothing to download: tests, benchmarks, memory, charts in bench/results/
#
# PYTHON=python3.12 picks the interpreter (3.10 or newer), TORCH='torch==2.11.0' the torch requirement.

PYTHON ?= python3
VENV ?= .venv
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1; ls /dev/kfd 2>/dev/null)
TORCH ?= $(if $(HAS_GPU),torch,torch==2.13.0)
TRITON := $(if $(HAS_GPU),triton,triton==3.9.0)
BIN := $(VENV)/bin
# Made anew when another torch is asked for.
TORCH_STAMP := $(VENV)/.torch-$(shell echo '$(TORCH)' | tr -c 'a-zA-Z0-9.\n' '-')
SETUP := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: train test slow lint docs sanitize fuzz gpu clean

train: $(VENV)/.train
	$(BIN)/rpo-kernels train

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -m "not real and not slow" -n 2 --durations 15

slow: $(VENV)/.test
	$(BIN)/python -m pytest -m "slow and not real"

sanitize: $(VENV)/.test
	PYTHON=$(BIN)/python csrc/sanitize.sh -m "not slow"

fuzz: $(VENV)/.test
	$(BIN)/python tests/fuzz/run.py --minutes $(or $(MINUTES),30)

gpu:
	PYTHONPATH=. $(PYTHON) bench/gpu.py

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict --quiet

# Torch goes first and alone, so that nothing else decides which build of it comes.
$(TORCH_STAMP):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)'
	rm -f $(VENV)/.torch-*
	touch $@

$(VENV)/.train: $(TORCH_STAMP) $(SETUP)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train]'
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,bench,test]' '$(TRITON)'
	touch $@

$(VENV)/.docs: $(VENV)/.train
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) site build dist *.egg-info rpo_kernels/_native*.so
