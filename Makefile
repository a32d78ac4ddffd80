# All set-up happens here: every target first creates or updates the environment in .venv. PYTHON=... chooses the
# interpreter, VENV=... another environment, JAX=... the JAX to install there (`JAX="jax==0.10.0 jaxlib==0.10.0"`),
# ENGINE=.venv/nt-core-build/libnt_engine.a the C++ engine that .venv has, in place of compiling it again.
PYTHON ?= python3
VENV ?= .venv
JAX ?= jax
ENGINE ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
CORE := packages/nt-core
CPP := $(wildcard csrc/*.h csrc/*.cc csrc/*.def csrc/tests/*.cc)
OTHERS := nt-stax nt-predict nt-empirical neural-tangents

# Stamps: what they say was installed is older than they are.
TOOLS := $(VENV)/.tools
# An editable nt-core knows its modules from the time of its installation: other modules, another stamp.
NATIVE := $(VENV)/.nt-core-$(shell find $(CORE)/src -name '*.py' | sort | cksum | cut -d ' ' -f 1)
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs

.PHONY: help setup native demo test test-slow coverage bench bench-peer bench-sweep bench-empirical bench-gradient bench-store bench-ensemble gpu-check gpu-assembly tpu-compile lint format typecheck docs package wheels sanitize clean

help:
	@echo "make demo        the main job: handwritten digits, networks of infinite width, predictions and a figure"
	@echo "make test        fast tests of all packages, and the examples in docstrings"
	@echo "make test-slow   the tests marked slow"
	@echo "make coverage    the fast tests, with line coverage"
	@echo "make bench       benchmarks of this library"
	@echo "make bench-peer  benchmarks against neural-tangents 0.6.5, in an environment of its own, empirical NTKs at the end"
	@echo "make bench-sweep every layer and kind of composition against neural-tangents 0.6.5: is anything slower?"
	@echo "make bench-empirical empirical NTKs, by every implementation, against neural-tangents 0.6.5"
	@echo "make bench-gradient"
	@echo "                 gradients of kernels against neural-tangents 0.6.5: time, compilation and memory"
	@echo "make bench-store kernels on disk: overhead, two processes, memory, and the plan for CIFAR-10"
	@echo "make bench-ensemble"
	@echo "                 ensembles of 5000 points at 100 times against neural-tangents 0.6.5"
	@echo "make gpu-check   the Pallas kernels on the GPU of this machine: accuracy, then times (JAX='jax[cuda13]')"
	@echo "make gpu-assembly, make tpu-compile"
	@echo "                 the Pallas kernels compiled for an H100 or a TPU v5e, which need not be there"
	@echo "make lint        ruff, clang-format (make format mends what it can); make typecheck: pyright"
	@echo "make docs        the documentation, into docs/_build/html"
	@echo "make package     wheels and sdists of all packages, each tested alone in an empty environment"
	@echo "make wheels      binary wheels of nt-core for this platform, by cibuildwheel"
	@echo "make sanitize    the C++ tests under ASan, UBSan and TSan"
	@echo "make native      recompiles the native module, and fails if it cannot"
	@echo "make clean       removes environments and everything that was built"

# ---- set-up

$(TOOLS): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, found " + sys.version.split()[0] + ": make PYTHON=...")'
	@echo "Setting up $(VENV) (once; takes a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install --group dev
	@touch $@

# The extension is compiled against the headers that the released wheels are compiled against, whatever JAX the environment has.
FFI_HEADERS := $(VENV)/ffi
$(FFI_HEADERS): $(CORE)/pyproject.toml | $(TOOLS)
	$(PIP) install --upgrade --no-deps --target $@ "$$(grep -o 'jaxlib==[0-9.]*' $(CORE)/pyproject.toml)"
	@touch $@

$(NATIVE): $(CORE)/pyproject.toml $(shell find csrc -type f) $(FFI_HEADERS)
	@rm -f $(VENV)/.nt-core-[0-9]*
	$(PIP) install --no-build-isolation $(JAX) --editable $(CORE) \
		-C build-dir=$(abspath $(VENV))/nt-core-build \
		-C cmake.define.NT_FFI_INCLUDE_DIR=$(abspath $(FFI_HEADERS))/jaxlib/include \
		-C cmake.define.NT_WARNINGS_ARE_ERRORS=ON -C cmake.define.NT_ENGINE=$(abspath $(ENGINE))
	@$(BIN)/python -c "import nt_core._native" 2>/dev/null || \
		echo "nt-core: no native module, pure Python serves. To see why: $(BIN)/cmake --build $(VENV)/nt-core-build"
	@touch $@

$(READY): $(NATIVE) $(OTHERS:%=packages/%/pyproject.toml)
	$(PIP) install --no-build-isolation $(OTHERS:%=--editable packages/%)
	@touch $@

setup: $(READY)

native:
	@rm -f $(NATIVE)
	@$(MAKE) --no-print-directory setup
	@$(BIN)/python -c "import nt_core._native"

# ---- use

demo: $(READY)
	$(BIN)/python examples/digits.py

# What XLA has compiled for a test is kept for the next run, which then takes less than half the time.
TEST := JAX_COMPILATION_CACHE_DIR=$(abspath $(VENV))/compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1 TF_CPP_MIN_LOG_LEVEL=3 $(BIN)/python -m pytest

test: $(READY)
	$(TEST) -n 2 --dist worksteal $(PYTEST_ARGS)

test-slow: $(READY)
	$(TEST) -n 2 --dist worksteal -m slow $(PYTEST_ARGS)

coverage: $(READY)
	$(TEST) -n 2 --dist worksteal --cov $(PYTEST_ARGS)

bench: $(READY)
	$(BIN)/python -m pytest benchmarks $(PYTEST_ARGS)

bench-peer: $(READY)
	$(BIN)/python benchmarks/peer.py $(BENCH_ARGS)
	$(if $(BENCH_ARGS),,$(BIN)/python benchmarks/empirical.py)

bench-sweep: $(READY)
	$(BIN)/python benchmarks/sweep.py $(BENCH_ARGS)

bench-empirical: $(READY)
	$(BIN)/python benchmarks/empirical.py $(BENCH_ARGS)

bench-gradient: $(READY)
	$(BIN)/python benchmarks/gradient.py $(BENCH_ARGS)

bench-store: $(READY)
	$(BIN)/python benchmarks/store.py $(BENCH_ARGS)

bench-ensemble: $(READY)
	$(BIN)/python benchmarks/ensemble.py $(BENCH_ARGS)

gpu-check: $(READY)
	$(BIN)/python benchmarks/gpu_check.py $(BENCH_ARGS)

# Only what compiles: the other parts of jax[cuda13] need a driver.
gpu-assembly: JAX = jax jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-nvdisasm
gpu-assembly: DEVICE = h100
tpu-compile: JAX = jax[tpu]
tpu-compile: DEVICE = v5e
gpu-assembly tpu-compile: VENV = .venv-$(DEVICE)
gpu-assembly tpu-compile:
	$(MAKE) --no-print-directory setup VENV=$(VENV) JAX="$(JAX)"
	$(VENV)/bin/python benchmarks/deviceless.py --device $(DEVICE) $(BENCH_ARGS)

# ---- checks

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

typecheck: $(READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

package: $(READY)
	$(BIN)/python tests/packaging/check.py

sanitize: $(READY)
	for sanitizer in address,undefined thread; do \
		$(BIN)/cmake -S csrc -B build/sanitize-$$sanitizer -DNT_SANITIZE=$$sanitizer -DNT_WARNINGS_ARE_ERRORS=ON \
			-DNT_FFI_INCLUDE_DIR=$(abspath $(FFI_HEADERS))/jaxlib/include && \
		$(BIN)/cmake --build build/sanitize-$$sanitizer --parallel 2 && \
		$(BIN)/ctest --test-dir build/sanitize-$$sanitizer --no-tests=error --output-on-failure || exit 1; \
	done

# ---- documentation and release

$(DOCS_READY): pyproject.toml $(READY)
	$(PIP) install --group docs
	@touch $@

docs: $(DOCS_READY)
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

wheels: $(READY)
	$(PIP) install cibuildwheel
	$(BIN)/cibuildwheel $(CORE) --output-dir dist

clean:
	rm -rf .venv* build dist docs/_build packages/*/dist
