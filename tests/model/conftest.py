"""The models that tests share, each built or loaded once."""

import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from analysis.models.load import LoadedModel
from tests.support.gguf_files import write_gguf
from tests.support.gguf_models import CONFIGS, random_model
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


@pytest.fixture(scope="session")
def whole_folder(tmp_path_factory) -> Path:
    """A folder of a model that loads. Its tokenizer is the bundled model's."""
    folder = tmp_path_factory.mktemp("whole")
    build("llama", vocab_size=4096).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / file, folder)
    return folder


@pytest.fixture
def folder(whole_folder, tmp_path) -> Path:
    """A copy of that folder, to be broken."""
    return shutil.copytree(whole_folder, tmp_path / "tiny")


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory) -> Path:
    """A GGUF file of a Llama that loads."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, random_model(CONFIGS["llama"]), GGMLQuantizationType.F16)
