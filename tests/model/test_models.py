"""Loading of models: by which names, and what is refused before a folder is read."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from analysis.errors import ModelError
from analysis.models.load import BUNDLED_MODELS, LoadedModel, load_model, model_folder
from tests.support.model_folders import WEIGHTS, refusal, rewrite, shard
from tests.support.models import build
from tests.support.paths import BUNDLED, STORIES

# What loads


def test_the_bundled_model_loads_by_name_and_knows_its_tokenizer():
    loaded = load_model("books-5m", device="cpu")
    assert "books-5m" in BUNDLED_MODELS
    assert loaded.name == "books-5m"
    assert not loaded.model.training
    assert loaded.model.dtype == torch.float32
    assert loaded.device == torch.device("cpu")
    assert len(loaded.tokenizer) == loaded.config.vocab_size == 4096


def test_a_model_tells_how_many_tokens_it_was_trained_to_read_at_once(folder):
    loaded = load_model(folder, device="cpu")
    assert loaded.positions == 512
    bloom = SimpleNamespace(config=transformers.BloomConfig())  # which does not say
    assert LoadedModel(bloom, loaded.tokenizer, "bloom").positions == sys.maxsize


@pytest.mark.parametrize("as_ref", [Path, str, lambda folder: f"  {folder}/ \n", os.path.relpath])
def test_a_folder_loads_with_the_very_weights_in_it(folder, as_ref):
    loaded = load_model(as_ref(folder), device="cpu")
    assert loaded.name == "tiny"
    for name, weight in load_file(folder / WEIGHTS).items():
        assert torch.equal(loaded.model.state_dict()[name], weight)


def test_a_folder_in_shards_loads(folder):
    shard(folder, dict.fromkeys(load_file(folder / WEIGHTS), "shard.safetensors"))
    assert load_model(folder, device="cpu").model.num_parameters() == build("llama", vocab_size=4096).num_parameters()


def test_the_dtype_asked_for_is_the_dtype_loaded(folder):
    assert load_model(folder, device="cpu", dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_stories260k_loads():
    if not STORIES.is_dir():
        pytest.skip("stories260K is not on this machine")
    assert load_model(STORIES, device="cpu").config.num_hidden_layers == 5


def test_tied_weights_in_half_precision_are_not_taken_for_missing(folder):
    build("llama", vocab_size=4096, tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(folder)
    model = load_model(folder, device="cpu").model
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": None},
        {"dtype": "float16"},
        {"auto_map": {"AutoModelForCausalLM": "modeling_local.Evil"}},  # not of another repository, and not run
        {"_name_or_path": "x/y"},
        {"quantization_config": None},
    ],
    ids=str,
)
def test_a_config_without_harm_loads(folder, changes):
    (folder / "modeling_local.py").write_text("raise SystemExit('remote code was run')")
    rewrite(folder / "config.json", **changes)
    assert type(load_model(folder, device="cpu").model).__name__ == "LlamaForCausalLM"


# Names


@pytest.mark.parametrize(
    "ref",
    [
        "",
        " ",
        "/no/such/folder",
        "a/b/c",
        "../no",
        "~nobody-here/x",
        "x y",
        "a\0b",
        "é/\ud800",
        "x" * 5000,
        "<b>",
        "-x/y",
    ],
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused_with_what_could_be_given(ref, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"No such model.*books-5m.*folder.*Hugging Face"):
        load_model(ref)


@pytest.mark.parametrize("ref", ["Qwen/Qwen3-0.6B", "gpt2", "no--such/model..name"])
def test_a_hub_id_without_a_connection_is_refused_with_its_name_and_what_to_do(ref):
    message = refusal(ref)
    assert repr(ref) in message
    assert "give a folder or a GGUF file" in message


def test_a_hub_that_does_not_answer_is_asked_once_and_none_of_its_clients_words_are_told(monkeypatch):
    asked = []

    def silent(url, **_):
        asked.append(url)
        raise ConnectionError("[Errno 111] words of the client")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", silent)
    message = refusal("nobody/nothing")
    assert len(asked) == 1 and "nobody/nothing/resolve/main/config.json" in asked[0]
    assert "the hub cannot be reached from here" in message and "client" not in message


def test_a_file_is_no_model(folder):
    assert "No such model" in refusal(folder / WEIGHTS)


def test_a_vetted_folder_is_given_back_with_links_resolved(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert model_folder(tmp_path / "link") == folder.resolve()
    assert model_folder("books-5m") == BUNDLED


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", ""])
def test_a_device_that_is_not_there_is_refused(folder, device):
    if not device:
        assert load_model(folder, device=device)  # as if not given
    else:
        with pytest.raises(ModelError, match="tiny: its weights"):
            load_model(folder, device=device)


def test_memory_that_runs_out_on_the_way_to_the_device_is_reported(folder, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers.PreTrainedModel, "to", full)
    assert "does not fit into memory" in refusal(folder)
