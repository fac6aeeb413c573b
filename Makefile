# Every target does its own set-up. PYTHON chooses the interpreter (3.11 or 3.12), ARGS is passed through.
VENV := .venv
BIN := $(VENV)/bin
# The venv keeps the interpreter it was made with until PYTHON names another.
PYTHON ?= $(or $(wildcard $(shell cat $(VENV)/.setup-python 2>/dev/null)),python3)
RUN ?= runs/quickstart
# Of megatron-core, for test-engine: 0.15, or 0.19 with PYTHON=python3.12.
LINE ?= 0.15
ARGS ?=
# Processes that run tests side by side; each starts up to six workers of its own for distributed tests (8 GB in all).
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup setup-hf setup-gguf setup-vllm quickstart test test-slow test-sweep test-broken test-engine smoke-engine \
	test-gpu test-vllm test-families lint format docs clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make .venv with the exact pins of constraints.txt (about 3 minutes, then nothing)
	@$(PYTHON) scripts/setup_venv.py

setup-hf:  ## make .venv-hf with the Hugging Face reference (transformers 5) that NeMo's pins exclude
	@$(PYTHON) scripts/setup_venv.py --venv .venv-hf --constraints constraints-hf.txt --no-project

setup-gguf:  ## make .venv-gguf with llama.cpp (one prebuilt wheel), in which GGUF children are checked
	@$(PYTHON) scripts/setup_venv.py --venv .venv-gguf --constraints constraints-gguf.txt --no-project

setup-vllm:  ## make .venv-vllm with vLLM for CPUs (4 minutes, 3 GB), which only test-vllm needs
	@$(PYTHON) scripts/setup_venv.py --venv .venv-vllm --constraints constraints-vllm.txt --no-project

quickstart: setup  ## a real parent becomes a verified nested family on this machine (under 10 minutes)
	@NEMO_ELASTIC_UNDER_MAKE=1 $(BIN)/nemo-elastic quickstart --out $(RUN) $(ARGS)

lint: setup  ## ruff: rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

test: lint  ## lint and every test that takes under 20 seconds
	@$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-slow: setup setup-hf setup-gguf  ## the tests that take over 20 seconds, Hugging Face's and llama.cpp's among them; a sample of every sweep
	@$(PYTEST) -m "slow and not gpu and not vllm and not families" $(ARGS) || [ $$? -eq 5 ]  # 5: there is none

test-sweep: setup  ## every case of the sweeps that test-slow draws a sample of
	@$(PYTEST) -m "sweep" --sweep all $(ARGS)

test-broken: setup  ## every broken input of every verb, in one process: exit code 2, one message, nothing written
	@$(PYTEST) tests/test_broken_inputs.py -m "not slow" --sweep all $(ARGS)

test-engine:  ## the tests that touch Megatron under another line of megatron-core (LINE=0.15, or 0.19 on Python 3.12)
	@if [ "$(LINE)" = 0.15 ] || $(PYTHON) -c pass 2>/dev/null; then $(PYTHON) scripts/test_engine.py --line $(LINE) -n $(JOBS) --dist loadfile $(ARGS); \
	else echo "test-engine: there is no $(PYTHON) here: skipped"; fi

smoke-engine:  ## a few of them, for CI: the older line still works (under 3 minutes)
	@$(PYTHON) scripts/test_engine.py --smoke -n $(JOBS) --dist loadfile $(ARGS)

test-gpu: setup  ## the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu $(ARGS)

test-vllm: setup setup-vllm  ## children in vLLM against their family (not in CI)
	@$(BIN)/python -m pytest -m vllm tests/test_vllm.py -rP $(ARGS)

test-families: setup setup-hf  ## every family of Hugging Face models against transformers, six steps of each at TP2 PP2 (test-slow runs two)
	@$(PYTEST) -m "families" tests/test_hf_families.py tests/test_family_parallel.py -rP $(ARGS)

format: setup  ## let ruff mend and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: setup  ## write docs/cli.md, config.md, scale.md and gpu.md from the code and the results
	@$(BIN)/python scripts/reference.py
	@$(BIN)/python scripts/scale.py
	@$(BIN)/python benchmarks/gpu/pages.py

clean:  ## remove build products and caches; keeps runs/ and the venvs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find nemo_elastic tests scripts examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
