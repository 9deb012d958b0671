"""Which GGUF file is meant, what loading it takes, and how the app offers it."""

import logging
import os
import time
from pathlib import Path

import gguf
import pytest
import torch

from analysis.errors import ModelError, OutOfMemoryError
from analysis.models import gguf_models
from analysis.models import load as load_module
from analysis.models.gguf import read_gguf
from analysis.models.load import load_model, loading_note, model_folder
from analysis.models.sizes import model_size, weights_bytes
from analysis.workspace import Workspace
from app import engine, header, library, new_run
from app.jobs import Jobs
from tests.support.gguf_files import TOKENS
from tests.support.gguf_models import CONFIGS, logits, random_model, refusal

# Which file is meant


def test_a_folder_with_one_gguf_file_is_that_file(gguf_file, tmp_path):
    for name in ("README.md", "config.json", "tokenizer_config.json", "adapter_config.json"):
        (tmp_path / name).write_text("{nothing that is read")  # what lies beside the file has no say
    (tmp_path / "my model.Q8_0.gguf").symlink_to(gguf_file)
    loaded = load_model(tmp_path, device="cpu")
    assert loaded.name == "my model.Q8_0"
    assert model_folder(tmp_path) == tmp_path / "my model.Q8_0.gguf"


def test_a_folder_with_several_asks_for_one_by_its_path(gguf_file, tmp_path):
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).symlink_to(gguf_file)
    message = refusal(tmp_path)
    assert "holds 2 GGUF files (a.gguf, b.gguf). Give the path of one of them." in message
    assert load_model(tmp_path / "b.gguf", device="cpu").name == "b"


def test_safetensors_come_before_gguf(gguf_file, tmp_path):
    model = random_model(CONFIGS["llama"], seed=1)
    model.save_pretrained(tmp_path)
    load_model(gguf_file, device="cpu").tokenizer.save_pretrained(tmp_path)
    (tmp_path / "x.gguf").symlink_to(gguf_file)
    assert torch.equal(logits(load_model(tmp_path, device="cpu").model), logits(model))


def test_a_blob_of_ollama_is_known_by_its_first_bytes(gguf_file, tmp_path):
    blob = tmp_path / ("sha256-" + "5a" * 32)
    blob.symlink_to(gguf_file)
    assert load_model(blob, device="cpu").name == "sha256-5a5a5a5a5a5a"


@pytest.mark.parametrize("ref", ["missing.gguf", "no/such.gguf", "/no/such/folder/x.gguf", "https://x/y.gguf"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(ref):
    assert "No such model" in refusal(ref)


def test_a_pipe_of_that_name_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.gguf")
    assert "No such model" in refusal(tmp_path / "x.gguf")


# Memory


def test_what_it_takes_is_told_first(gguf_file, caplog):
    with caplog.at_level(logging.WARNING, "analysis.models.load"):
        load_model(gguf_file, device="cpu")
    note = loading_note(gguf_file, device="cpu")
    assert note in caplog.text
    assert note.startswith("tiny is stored as float16") and "dequantised to float32: loading takes about" in note
    assert loading_note("books-5m") == ""


@pytest.mark.parametrize(
    ("free", "advice"),
    [
        (0.9, "In half the precision it would fit: load_model(..., dtype=torch.bfloat16)."),
        (0.1, "A model of about 7,800 weights would fit."),
    ],
)
def test_a_file_that_would_not_fit_is_refused_before_its_weights_are_read(gguf_file, monkeypatch, free, advice):
    file = read_gguf(gguf_file)
    needed = gguf_models.dequantising_bytes(file, 4)
    monkeypatch.setattr(load_module, "usable_bytes", lambda device: int(needed * free))
    monkeypatch.setattr(gguf_models, "_dequantised", None)
    with pytest.raises(OutOfMemoryError) as refused:
        load_model(gguf_file, device="cpu")
    assert (
        advice in str(refused.value) and "may be used" in str(refused.value) and "tiny is stored" in str(refused.value)
    )


def test_a_gpu_must_hold_the_weights_too(gguf_file, monkeypatch):
    monkeypatch.setattr(load_module, "usable_bytes", lambda device: 2**40 if str(device) == "cpu" else 1000)
    with pytest.raises(OutOfMemoryError, match="1000 B on cuda"):
        load_model(gguf_file, device="cuda")


def test_a_file_that_changes_while_it_is_loaded_is_refused(gguf_file, tmp_path, monkeypatch):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_file.read_bytes())
    monkeypatch.setattr(load_module, "_check_room", lambda *_: path.write_bytes(gguf_file.read_bytes()[:-5000]))
    assert "x: its weights cannot be used" in refusal(path)


# Sizes, and the app


def test_its_size_is_that_of_the_weights_as_they_are_stored(gguf_file):
    size = model_size(gguf_file)
    stored = sum(tensor.n_bytes for tensor in gguf.GGUFReader(gguf_file).tensors)
    assert size.weights_bytes == weights_bytes(gguf_file) == stored
    assert (size.name, size.counted, size.config.num_hidden_layers) == ("tiny", False, 2)


def test_files_in_allowed_folders_are_offered_by_the_app(gguf_file, tmp_path, monkeypatch):
    monkeypatch.delenv("L2KV_MODEL_DIRS", raising=False)
    (tmp_path / "models" / "maker").mkdir(parents=True)
    for file in ("a.gguf", "maker/b.gguf", "maker/c.txt"):
        (tmp_path / "models" / file).write_bytes(gguf_file.read_bytes())
    with pytest.raises(ModelError, match="L2KV_MODEL_DIRS"):
        engine.check_allowed(str(gguf_file))
    monkeypatch.setenv("L2KV_MODEL_DIRS", str(tmp_path / "models"))
    offered = [Path(ref).relative_to(tmp_path).as_posix() for ref in engine.allowed_models() if "/" in ref]
    assert offered == ["models/a.gguf", "models/maker/b.gguf"]
    for file in ("a.gguf", "maker/b.gguf"):
        assert engine.check_allowed(str(tmp_path / "models" / file)) == str(tmp_path / "models" / file)
    (tmp_path / "models" / "out.gguf").symlink_to(gguf_file)
    with pytest.raises(ModelError, match="L2KV_MODEL_DIRS"):
        engine.check_allowed(str(tmp_path / "models" / "out.gguf"))
    tokenizer, config = engine.Engine().tokenizer_and_config(str(tmp_path / "models" / "a.gguf"))
    assert config.num_hidden_layers == 2 and tokenizer("the")["input_ids"] == [TOKENS.index("the")]


def test_the_app_runs_a_file_and_names_how_it_is_stored_computed_and_cached(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setenv("L2KV_MODEL_DIRS", str(gguf_file.parent))
    monkeypatch.setattr(library, "WORKSPACE", Workspace(tmp_path / "workspace"))
    of = engine.Engine()
    jobs = Jobs(of)
    job = jobs.find(new_run.start(jobs, str(gguf_file), "the end of the thing", "a run"))
    while job.running:
        time.sleep(0.01)
    assert job.status == "done", job.message
    run = library.run(job.result)
    assert (run.text, run.dtype, run.stored) == ("the end of the thing", "float32", "float16")
    told = header.status(of, jobs)[1].replace("\\", "")
    assert "tiny in memory, stored as float16, computed and cached in float32 on cpu" in told
