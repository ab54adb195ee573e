# Every target works from a fresh clone: it sets up what it needs first and does nothing twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := CMakeLists.txt pyproject.toml $(wildcard kernels/ril_kernels/*.cpp kernels/ril_kernels/*.h kernels/ril_kernels/*/*.cpp kernels/ril_kernels/*/*.h)

CONFIG ?= configs/digits.yaml
RANKS ?= 2

.PHONY: setup train test bench lint
setup: $(STAMP)

$(VENV)/.locked: requirements.lock requirements.peers.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV): several GB, a few minutes."
	$(BIN)/pip install -r requirements.lock
	$(BIN)/pip install --no-deps -r requirements.peers.txt
	touch $@

$(STAMP): $(VENV)/.locked $(NATIVE)
	$(BIN)/pip install --no-build-isolation --no-deps -e .
	@echo "DeepSpeed compiles three small ops for the CPU: up to eight minutes, once."
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -c "from ril_engine.engine import compile_ops; compile_ops()"
	touch $@

train: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --num_accelerators $(RANKS) ril_engine/train.py --config $(CONFIG)

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

bench: setup
	$(BIN)/python -m benchmarks run
	$(BIN)/python -m benchmarks report

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check benchmarks kernels ril_engine tests
