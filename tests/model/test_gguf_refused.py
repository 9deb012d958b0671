"""GGUF files made by hand: a whole one loads, and one that is damaged is refused or loads, but never breaks."""

import random
from pathlib import Path

import pytest

from analysis.errors import ModelError
from analysis.models.gguf import read_gguf
from analysis.models.load import load_model
from tests.support.gguf_bytes import DATA, KEYS, TENSORS, U32, WHOLE, build, u32


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("whole")


def test_the_file_that_the_hostile_ones_were_made_from_is_whole(folder):
    (path := folder / "whole.gguf").write_bytes(WHOLE)
    gguf = read_gguf(path)
    assert gguf.architecture == "llama" and len(gguf.tensors) == len(TENSORS)
    assert load_model(path, device="cpu").config.num_hidden_layers == 1
    for version, alignment in ((2, 32), (3, 64)):
        keys = KEYS | {"general.alignment": (U32, u32(alignment))}
        path.write_bytes(build(keys, version=u32(version), alignment=alignment))
        assert load_model(path, device="cpu").stored == "float32"


@pytest.mark.parametrize("seed", range(40))
def test_a_file_with_bytes_changed_at_random_is_refused_or_read_but_never_breaks(folder, seed):
    chance = random.Random(seed)
    content = bytearray(WHOLE)
    for _ in range(chance.choice((1, 3, 10, 40))):
        content[chance.randrange(len(WHOLE) - DATA)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    (path := folder / "changed.gguf").write_bytes(content)
    try:
        read_gguf(path)
    except ModelError:
        return
    try:
        load_model(path, device="cpu")  # what passed the header may still be no model
    except ModelError as error:
        assert "\n" not in str(error)
