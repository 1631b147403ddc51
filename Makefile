# Every command of the README, and what CI runs. `make help` lists them.
# TORCH=torch==2.11.0 (any requirement that pip takes) installs another torch than the CPU build of 2.13.0.

PYTHON ?= python3
VENV ?= .venv
TORCH ?=
BIN := $(VENV)/bin
export PYTHON_BIN := $(abspath $(BIN))/python
NVCC := $(shell command -v nvcc 2>/dev/null)
SIMT := $(if $(NVCC),ON,OFF)
CPU_TORCH := torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
BUILD_TOOLS := "scikit-build-core>=0.11" "pybind11>=3.0" "cmake>=3.29" "ninja>=1.11"
PYTEST := $(BIN)/python -m pytest

ifndef V
.SILENT:   # V=1 shows the commands
endif

.PHONY: help install demo test lint bench bench-quick bench-peers docs wheel check-abi check-compilers check-aarch64 \
        check-sanitizers check-symbols check-kernels predictions test-large gpu gpu-check gpu-bench gpu-profile gpu-dry-run \
        clean

help:  ## this list
	grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 20

# ---- the environment: one stamp file per step, so that a second run has nothing to do -------------------------------

$(VENV)/pyvenv.cfg:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "pyseq needs Python 3.10 or later")'
	echo "making $(VENV)"
	$(PYTHON) -m venv $(VENV)

# The CPU build of torch where pip finds one (a mirror, a folder of wheels), else from PyTorch's own index.
$(VENV)/.torch: $(VENV)/pyvenv.cfg
	echo "installing $(if $(TORCH),$(TORCH),the CPU build of $(CPU_TORCH))"
ifeq ($(TORCH),)
	$(BIN)/pip install --quiet "$(CPU_TORCH)+cpu" 2>/dev/null || $(BIN)/pip install --quiet --index-url $(CPU_INDEX) $(CPU_TORCH)
else
	$(BIN)/pip install --quiet "$(TORCH)"
endif
	touch $@

$(VENV)/.tools: $(VENV)/.torch pyproject.toml
	echo "installing what pyseq needs to build and run"
	$(BIN)/pip install --quiet $(BUILD_TOOLS) $$($(BIN)/python scripts/requirements.py)
	touch $@

$(VENV)/.dev: $(VENV)/.tools pyproject.toml
	echo "installing what its tests and documentation need"
	$(BIN)/pip install --quiet $$($(BIN)/python scripts/requirements.py test docs)
	touch $@

SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc third_party -type f)
install: $(VENV)/.installed  ## make .venv and install pyseq into it, editable
$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	echo "building pyseq: three instruction sets$(if $(NVCC), and the CUDA kernels), a few minutes on two cores"
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install --quiet --no-build-isolation --no-deps \
	  -Ccmake.define.PYSEQ_SIMT=$(SIMT) -e .
	touch $@

# ---- what a user runs ---------------------------------------------------------------------------------------------------

demo: install  ## train a small Mamba for two minutes, and read what it writes
	$(BIN)/pyseq demo

test: lint $(VENV)/.dev install  ## the linters and every test, on the backends cpu and simt
	$(PYTEST) tests -n 2 --dist worksteal

lint: $(VENV)/.dev install
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.dev install  ## every benchmark: benchmarks/results/<machine>.json, docs/performance.md
	$(BIN)/python -m benchmarks.run

bench-quick: $(VENV)/.dev install  ## few rounds of every benchmark: shows that they run, not how fast
	$(PYTEST) benchmarks --quick -q -p no:xdist

bench-peers: $(VENV)/.dev install  ## install the peers that `make bench` compares with (llama.cpp builds for ten minutes)
	$(BIN)/pip install -r benchmarks/peers/requirements.txt

check-kernels: $(VENV)/.dev install  ## the CUDA kernels' machine code against benchmarks/kernel_budgets.json
	$(BIN)/python -m benchmarks.budgets

predictions: $(VENV)/.dev  ## docs/gpu.md: times of the CUDA kernels, predicted from their budgets
	$(BIN)/python -m benchmarks.predictions --write

gpu:  ## on a machine with a GPU, offline: the three parts below, 8 minutes each; PYTHON is one with torch >= 2.10
	$(PYTHON) -m benchmarks.gpu.machine >/dev/null
	for part in check bench profile; do scripts/gpu.sh $$part || failed="$$failed $$part"; done; \
	  test -z "$$failed" || { echo "make gpu: failed:$$failed" >&2; exit 1; }
gpu-check:  ## builds for that card; its tests, random shapes, graphs, streams, big offsets, compute-sanitizer
	scripts/gpu.sh check
gpu-bench:  ## the card's limits, the timing tables, the peers that import there
	scripts/gpu.sh bench
gpu-profile:  ## hardware counters of the hottest kernels
	scripts/gpu.sh profile
gpu-dry-run: $(VENV)/.dev install  ## without a GPU: every step of `make gpu` that needs none
	PYTHON=$(PYTHON_BIN) scripts/gpu.sh dry-run

docs: $(VENV)/.dev install  ## the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: $(VENV)/.dev install  ## a repaired manylinux wheel in dist/, tried in a bare environment
	PYTHON=$(PYTHON_BIN) scripts/make_wheel.sh

test-large: $(VENV)/.dev install  ## tests past 2^31 elements; tens of GiB of memory
	$(PYTEST) tests -m large --run-large

# ---- proofs of portability ------------------------------------------------------------------------------------------------

check-abi: install  ## the binary built here loads in other torch releases
	PYTHON=$(PYTHON_BIN) scripts/check_torch_versions.sh
check-compilers: $(VENV)/.dev install  ## g++ 11 and clang build it
	PYTHON=$(PYTHON_BIN) scripts/check_compilers.sh
check-aarch64: $(VENV)/.dev install  ## the kernels cross-compile for aarch64
	PYTHON=$(PYTHON_BIN) scripts/check_aarch64.sh
check-sanitizers: $(VENV)/.dev install  ## the kernel tests under the address and undefined-behaviour sanitizers
	PYTHON=$(PYTHON_BIN) scripts/check_sanitizers.sh
check-symbols: $(VENV)/.dev install  ## no weak symbols in wide instruction sets, only torch's C shim
	PYTHON=$(PYTHON_BIN) scripts/check_symbols.sh

clean:  ## remove what make made
	rm -rf $(VENV) build dist site
