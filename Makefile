# The only task runner. Every target makes what it needs first, and does nothing twice: `make demo` and `make test` work on a fresh clone.
#
#   make test SYSTEM=1 PY=/usr/bin/python3    use a Python that already has torch and the test packages: no .venv, no network, build in place
#   make setup PYTHON=python3.12              the Python that .venv is made from

PYTHON ?= python3
WORKERS ?= 2
STAMPS := .stamps

ifdef SYSTEM
PY ?= $(PYTHON)
READY :=
BUILT := $(STAMPS)/build-system
else
PY := .venv/bin/python
READY := $(STAMPS)/venv
BUILT := $(STAMPS)/build
endif

RUN := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTEST := $(RUN) $(ONE_THREAD) $(PY) -m pytest -n $(WORKERS) --dist worksteal --benchmark-disable
ESPER := $(RUN) $(PY) -m esper_elastic.cli
CSRC := $(shell find csrc -type f)
GPU_WORKERS ?= 8
LAYER_TESTS := tests/test_linear.py tests/test_conv2d.py tests/test_batch_norm.py tests/test_layer_norm.py
KERNEL_TESTS := $(filter-out tests/test_triton_aot.py,$(wildcard tests/test_triton_*.py))

.PHONY: setup build demo demo-seeds example-grow example-prune example-skips test test-wide test-slow test-aot test-gpu sanitize-gpu check bench bench-gpu coverage-models docs clean

setup: $(BUILT)

build: $(BUILT)

$(STAMPS)/venv: requirements-test.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet -r requirements-test.txt
	@mkdir -p $(STAMPS) && touch $@

# The library is compiled first, where the compiler's output is seen; the editable installation finds the object files ready.
$(STAMPS)/build: $(STAMPS)/installed $(CSRC) setup.py
	$(RUN) $(PY) setup.py -q build_ext --inplace
	@$(call refuse_failed_build)
	@touch $@

$(STAMPS)/installed: $(READY) pyproject.toml setup.py
	$(RUN) $(PY) setup.py -q build_ext --inplace
	$(RUN) $(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

$(STAMPS)/build-system: $(CSRC) setup.py
	$(RUN) $(PY) setup.py -q build_ext --inplace
	@$(call refuse_failed_build)
	@mkdir -p $(STAMPS) && touch $@

# Without a compiler the package works on its reference ops; with one, a library that does not build is an error here.
define refuse_failed_build
if [ -e esper_elastic/_build_failure.txt ]; then cat esper_elastic/_build_failure.txt; ! command -v "$${CXX:-c++}" >/dev/null; fi
endef

demo: $(BUILT)
	$(ESPER) demo

demo-seeds: $(BUILT)
	$(ESPER) demo --seeds 3

# what decisions in training are for, on Fashion-MNIST: a picture, numbers and the run's events under runs/; SEEDS=3 for means
SEEDS ?= 1
example-grow example-prune example-skips: example-%: $(BUILT)
	$(RUN) $(PY) examples/$*.py --seeds $(SEEDS)

test: $(BUILT)
	$(PYTEST) -m "not wide and not slow and not aot" tests

# what `test` leaves out of what CI runs: the same contracts over many models, peers and places
test-wide: $(BUILT)
	$(PYTEST) -m "wide and not slow and not aot" tests

# every configuration of every Triton kernel, and csrc/cuda, compiled for GPUs that need not be there; what Triton compiled once comes from its cache
test-aot: $(BUILT)
	$(PYTEST) -m aot tests/test_triton_aot.py tests/test_replica.py

test-slow: $(BUILT)
	$(PYTEST) -m slow tests

# On a machine with an NVIDIA GPU: kernels on it instead of in the interpreter, what only a GPU shows, and the contract of the layers there.
GPU_PYTEST := $(RUN) $(PY) -m pytest --benchmark-disable -q
test-gpu: $(BUILT)
	$(GPU_PYTEST) -n $(GPU_WORKERS) tests/test_gpu.py tests/test_training_on_device.py $(KERNEL_TESTS)
	ESPER_ELASTIC_TEST_DEVICE=cuda $(GPU_PYTEST) -n $(GPU_WORKERS) -m "not slow" $(LAYER_TESTS)

# every kernel under the memory checker and the race checker
sanitize-gpu: $(BUILT)
	$(RUN) compute-sanitizer --tool memcheck --error-exitcode 1 $(PY) -m pytest --benchmark-disable -q -x $(KERNEL_TESTS)
	$(RUN) compute-sanitizer --tool racecheck --error-exitcode 1 $(PY) -m pytest --benchmark-disable -q -x $(KERNEL_TESTS)

check: $(READY)
	$(RUN) $(PY) -m ruff check .
	$(RUN) $(PY) -m ruff format --check .
	$(RUN) $(PY) -m mypy

bench: $(BUILT)
	$(RUN) $(PY) -m pytest benchmarks --ignore benchmarks/gpu --benchmark-only --write-results

bench-gpu: $(BUILT)
	$(RUN) $(PY) -m pytest benchmarks/gpu -q --write-results

# how much of each architecture is elastic; writes benchmarks/results/coverage_models.md
coverage-models: $(BUILT)
	$(RUN) $(ONE_THREAD) $(PY) benchmarks/coverage_models.py

# runs the examples that the pages contain
docs: $(BUILT)
	$(RUN) $(PY) -m doctest -o NORMALIZE_WHITESPACE -o ELLIPSIS README.md $(wildcard docs/*.md)

clean:
	rm -rf .venv $(STAMPS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f esper_elastic/_C*.so esper_elastic/_build_failure.txt
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
