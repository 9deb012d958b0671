"""The models that tests share, each built or loaded once."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from analysis.models.load import LoadedModel
from tests.support.models import ARCHITECTURES, MODELS, build
from tests.support.paths import BUNDLED, STORIES


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
    """Two threads for a real model; all else runs on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
