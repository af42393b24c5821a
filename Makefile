# Everything runs in .venv, which `make venv` makes; the stamp keeps the second time quick.
PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.streamconv-installed

# What `make bench` converts, and the memory it may take.
BENCH_DIR ?= benchmarks/work
BENCH_LIMIT ?= 512MiB
BENCH_FLAGS ?=

.PHONY: venv test test-all lint demo bench fuzz crash-full test-gpu bench-gpu clean

venv: $(STAMP)

$(STAMP): pyproject.toml tests/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q $(PIP_FLAGS) -c tests/constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -q streamconv  # pip does so only where it copies
	touch $@

# A file of tests stays in one process; long files are among the first, and calibration, which takes memory, is the last.
test: venv
	$(BIN)/python -m pytest -q -n logical --dist loadfile --no-loadscope-reorder -m 'not slow'

test-all: venv
	$(BIN)/python -m pytest -q -n logical --dist loadfile --no-loadscope-reorder

lint: venv
	$(BIN)/ruff check .
	$(BIN)/mypy --strict streamconv

demo: venv
	$(BIN)/python benchmarks/demo.py

# The 2.2 GB Llama shape, every weight format, one rank and four, in a memory cgroup of BENCH_LIMIT, beside cp; BENCH_FLAGS are further flags.
bench: venv
	mkdir -p $(BENCH_DIR)
	set -e; for tp in 1 4; do $(BIN)/streamconv bench --shape llama-1b --work $(BENCH_DIR) --budget $(BENCH_LIMIT) \
	  --quant none --quant int8 --quant int4 --flags "--tp-size $$tp" $(BENCH_FLAGS); done

# Coverage-guided, for FUZZ_SECONDS; what it learns stays in FUZZ_DIR/corpus, an input that breaks something in FUZZ_DIR.
FUZZ_SECONDS ?= 600
FUZZ_DIR ?= build/fuzz
fuzz: $(FUZZ_DIR)/venv/.installed
	mkdir -p $(FUZZ_DIR)/corpus
	PYTHONPATH=. $(FUZZ_DIR)/venv/bin/python tests/fuzz/coverage_guided.py $(FUZZ_DIR)/corpus \
	  -max_total_time=$(FUZZ_SECONDS) -artifact_prefix=$(FUZZ_DIR)/

$(FUZZ_DIR)/venv/.installed:
	$(PYTHON) -m venv $(FUZZ_DIR)/venv
	$(FUZZ_DIR)/venv/bin/python -m pip install --disable-pip-version-check -q $(PIP_FLAGS) -c tests/constraints.txt atheris==3.0.0 safetensors
	touch $@

# Every crash, kill and bit flip of every format; CRASH_FLAGS are those of tests/crash/full.py.
crash-full: venv
	$(BIN)/python -m tests.crash.full $(CRASH_FLAGS)

# On a machine with a GPU. NO_VENV=1 takes PYTHON and its packages as they are, from a plain checkout.
ifdef NO_VENV
GPU_RUN := PYTHONPATH=. $(PYTHON)

else
GPU_RUN := $(BIN)/python
test-gpu bench-gpu: venv
endif

test-gpu:
	$(GPU_RUN) -m pytest -q tests/gpu

# GB/s of source on the GPU and on the CPU, against the pinned copy rate and plain torch; BENCH_GPU_FLAGS="--gb 4 --folder FOLDER".
bench-gpu:
	$(GPU_RUN) benchmarks/gpu.py $(BENCH_GPU_FLAGS)

clean:
	rm -rf demo $(BENCH_DIR) .pytest_cache .mypy_cache .ruff_cache
