# `make app` and `make test` set up all they need, in a virtual environment beside this file.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8501
MODEL ?= smollm2
MODELS ?=
TEXTS ?=
ARGS ?=

# Where the model cannot be had it says why in a line, and goes on: the app has its runs, and tests of it are skipped.
FETCH = $(BIN)/python -m analysis models smollm2 || true
PYTEST = $(BIN)/python -m pytest -n auto --dist loadgroup

.PHONY: app test test-unit test-model test-browser lint wheel docs bench gpu-check gpu-bench demo picture
app: $(VENV)/app.stamp  ## MODELS=folder offers the models in it, GGUF files too
	@$(FETCH)
	$(if $(MODELS),L2KV_MODEL_DIRS="$(MODELS)") $(BIN)/python -m app --server.port $(PORT)

test: $(VENV)/dev.stamp lint
	@$(FETCH)
	$(PYTEST)

test-unit: $(VENV)/dev.stamp  ## no model and no browser: under a minute
	$(PYTEST) tests/unit

test-model: $(VENV)/dev.stamp  ## models, in process
	@$(FETCH)
	$(PYTEST) tests/model

test-browser: $(VENV)/dev.stamp  ## the app in a real Chromium
	@$(FETCH)
	$(PYTEST) tests/browser

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.support.words

wheel: $(VENV)/dev.stamp  ## the package, into dist/
	$(BIN)/python -m pip wheel . --quiet --no-deps --no-build-isolation --wheel-dir dist

bench: $(VENV)/dev.stamp  ## memory and time of a capture, of a compressed cache and of the app, as ratios to the plain ways
	$(BIN)/python -m tests.bench_capture
	$(BIN)/python -m tests.bench_cache
	$(BIN)/python -m tests.bench_app

# With any Python that has torch for CUDA, transformers, triton and pytest: no virtual environment is made.
gpu-check:  ## on a GPU, four minutes: tests that need one, capture and decoding beside the plain ways, as one JSON
	$(PYTHON) -m tests.gpu.check $(ARGS)

gpu-bench:  ## on a GPU, longer: 128k tokens, batches, a part of a 70B model
	$(PYTHON) -m tests.gpu.bench $(ARGS)

# ARGS=--without-tasks for a model that solves none. TEXTS: also the study of many texts; PLANS=1: plans, too (an hour).
SHOWN := analysis/bundled/$(notdir $(MODEL))
demo: $(VENV)/dev.stamp  ## all that the app opens with again, of MODEL=name or folder, found in TEXTS="files or folders"
	$(BIN)/python -m analysis demo $(TEXTS) --model $(MODEL) $(ARGS)
	$(BIN)/python -m analysis verdict --model $(MODEL) -o $(SHOWN)
ifneq ($(TEXTS),)
	rm -f $(SHOWN)/study.safetensors
	$(BIN)/python -m analysis study $(TEXTS) --model $(MODEL) --excerpts 24 -o $(SHOWN)/study.safetensors
endif
ifneq ($(PLANS),)
	$(BIN)/python -m analysis ablation $(TEXTS) --model $(MODEL) --excerpts 32 -o $(SHOWN)/causal.json
	$(BIN)/python -m analysis front $(TEXTS) --model $(MODEL) --excerpts 32 -o $(SHOWN)/front.json
endif
	$(BIN)/python -m tests.picture

docs: $(VENV)/dev.stamp  ## docs/cli.md and docs/registries.md, from the program
	$(BIN)/python -m tests.support.docs

picture: $(VENV)/dev.stamp  ## the README's picture, from the app itself
	$(BIN)/python -m tests.picture

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/app.stamp: requirements.txt pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(VENV)/dev.stamp: requirements-dev.txt $(VENV)/app.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
