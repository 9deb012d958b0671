"""Folders of models, rewritten so that they should be refused, and the message with which they are."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from analysis.errors import ModelError
from analysis.models.load import load_model

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


def rewrite(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    weights = load_file(folder / WEIGHTS) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({k: v for k, v in weights.items() if v is not None}, folder / WEIGHTS, metadata={"format": "pt"})


def shard(folder: Path, weight_map: object) -> None:
    (folder / WEIGHTS).rename(folder / "shard.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refusal(ref: str | Path) -> str:
    """The message of the ModelError: short, and a sentence for a reader."""
    with pytest.raises(ModelError) as refused:
        load_model(ref, device="cpu")
    message = str(refused.value)
    assert len(message) < 700
    assert not any(
        word in message for word in ("Traceback", "\n", "site-packages", "object at 0x", "ignore_mismatched")
    )
    return message
