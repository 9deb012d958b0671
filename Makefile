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

# Of MODEL=name or folder, on TEXTS="files or folders" or the bundled prose; ARGS=--without-tasks for a model that solves
# none. Stopped, it goes on where it was; what it makes is shown only when all of it is there.
SHOWN ?= analysis/bundled/$(notdir $(MODEL))
MADE := demo/$(notdir $(MODEL))
MEASURED := needle.jsonl study.safetensors causal.json front.json
demo: $(VENV)/dev.stamp  ## all that the app opens with, made again
	@echo "1 of 5: presets, a run, a recorded generation and stories"
	$(BIN)/python -m analysis demo $(TEXTS) --model $(MODEL) $(ARGS) -o $(MADE)
	$(MAKE) $(MEASURED:%=$(MADE)/%)
	mkdir -p $(SHOWN)
	rm -f $(SHOWN)/story-*.json
	mv $(MADE)/*.json $(MADE)/*.jsonl $(MADE)/*.safetensors $(SHOWN)
	rmdir $(MADE)
	$(BIN)/python -m tests.picture

$(MADE)/needle.jsonl:
	@echo "2 of 5: prediction, passkeys, needles and speed, for the verdict"
	$(BIN)/python -m analysis verdict $(TEXTS) --model $(MODEL) -o $(MADE)

$(MADE)/study.safetensors:
	@echo "3 of 5: the heads over many texts"
	$(BIN)/python -m analysis study $(TEXTS) --model $(MODEL) -o $@.part
	mv $@.part $@

$(MADE)/causal.json:
	@echo "4 of 5: what compressing each layer alone costs"
	$(BIN)/python -m analysis ablation $(TEXTS) --model $(MODEL) --excerpts 32 -o $@

$(MADE)/front.json:
	@echo "5 of 5: quality against memory"
	$(BIN)/python -m analysis front $(TEXTS) --model $(MODEL) -o $@

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
