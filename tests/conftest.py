"""Fixtures that several test files use. Helpers that are not fixtures are in `tests/support`."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("L2KV_DEMO", "books-5m")  # small, so that pages are drawn fast; test_smollm2 opens on the other

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from analysis.models.load import LoadedModel
from tests.support.models import ARCHITECTURES, MODELS, build
from tests.support.paths import BUNDLED, STORIES

torch.set_num_threads(1)  # tiny models, and a process per core: threads would only wait for each other


@pytest.fixture(scope="session")
def models():
    """name -> model, each built or loaded once."""
    made: dict[str, PreTrainedModel] = {}

    def get(name: str) -> PreTrainedModel:
        if name not in made:
            if name in ARCHITECTURES:
                made[name] = build(name)
            else:
                folder = BUNDLED if name == "books-5m" else STORIES
                if not folder.is_dir():
                    pytest.skip(f"{name} is not on this machine")
                made[name] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return made[name]

    return get


@pytest.fixture(params=MODELS)
def model(request, models) -> PreTrainedModel:
    return models(request.param)


@pytest.fixture
def tiny(models) -> PreTrainedModel:
    return models("llama")


@pytest.fixture(scope="session")
def loaded(models) -> LoadedModel:
    """The bundled model with its tokenizer."""
    return LoadedModel(models("books-5m"), AutoTokenizer.from_pretrained(BUNDLED), "books-5m")


@pytest.fixture(scope="module")
def two_threads():
    """For a real model: two threads, where all else runs on one."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)
