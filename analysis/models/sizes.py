"""Sizes of a model, from its `config.json` or GGUF header: bytes of weights, shape of its cache. Reads no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.errors import ModelError
from analysis.models.gguf import is_gguf, read_gguf
from analysis.models.load import BUNDLED, BUNDLED_MODELS, check_hub_id, gguf_file, hub_config, model_name
from analysis.models.packaged import PACKAGED, folder_of
from analysis.models.vet import read_config, read_json, reading
from l2kv.config import CacheShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from l2kv.spec import CompressionSpec


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes of a model, which need not be downloaded: all that arithmetic on its cache needs."""

    name: str
    config: PretrainedConfig  # of the language model
    shape: CacheShape
    weights_bytes: int
    counted: bool  # the weights were counted from the config; else their files' sizes were added up

    def check(self, spec: CompressionSpec) -> None:
        """Raise ModelError unless a cache of this model can be compressed by the spec."""
        from l2kv import CompressedCache, SpecError, UnsupportedModelError

        try:
            CompressedCache(self.config, spec, special_ids=())  # whichever they are
        except (UnsupportedModelError, SpecError) as error:
            raise ModelError(f"{self.name}: {error}") from error


def model_size(ref: str | Path) -> ModelSize:
    """Read the sizes of a bundled model, folder, GGUF file, bare `config.json` or hub id (only its config is fetched).

    A GGUF file does not name a dtype for computation: its weights count as stored, its cache at 2 bytes a number.

    Raises:
        ModelError: the config does not exist, or is one that `load_model` would refuse.
    """
    path, name = _config_file(ref)
    if is_gguf(path):
        from analysis.models.gguf_models import gguf_config

        gguf = read_gguf(path)
        config = gguf_config(gguf)
        return ModelSize(gguf.name, config, CacheShape.of(config, 2), gguf.nbytes, counted=False)
    config = read_config(path, name)
    import torch
    from transformers import AutoModelForCausalLM

    with reading(name, path.name):
        text = config.get_text_config(decoder=True)
        itemsize = dtype.itemsize if isinstance(dtype := getattr(text, "dtype", None), torch.dtype) else 2
        weights, counted = _weight_bytes(path), False
        if not weights:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            weights, counted = sum(p.numel() for p in model.parameters()) * itemsize, True
        return ModelSize(name, text, CacheShape.of(text, itemsize), weights, counted)


def weights_bytes(ref: str | Path) -> int | None:
    """Number of bytes in the weight files of a model, or in its index; None if there are neither.

    Waits for no torch. Raises ModelError, as `model_size`.
    """
    path, _ = _config_file(ref)
    return read_gguf(path).nbytes if is_gguf(path) else _weight_bytes(path) or None


def checkpoint_dtype(ref: str | Path) -> str | None:
    """Dtype of a checkpoint's weights, such as "bfloat16", as its config names it; None if it does not.

    Waits for no torch. Raises ModelError, as `model_size`.
    """
    path, name = _config_file(ref)
    if is_gguf(path):  # of several, to save space: what its cache is in is for who loads it to say
        return None
    config = read_json(path, name)
    for part in (config, config.get("text_config")):  # of models that have parts, the language one may name it
        if isinstance(part, dict) and isinstance(dtype := part.get("dtype", part.get("torch_dtype")), str):
            return dtype.removeprefix("torch.")
    return None


def _config_file(ref: str | Path) -> tuple[Path, str]:
    """Where a model's config is (its GGUF file has it), and what to call the model."""
    text = str(ref).strip()
    if text in BUNDLED_MODELS:
        return BUNDLED / text / "config.json", text
    if packaged := PACKAGED.get(text):
        return folder_of(packaged) / "config.json", text
    if file := gguf_file(text):
        return file, model_name(text)
    try:
        path = Path(text).expanduser().resolve()
        if text and path.is_dir():
            return path / "config.json", path.name
        if path.is_file():
            return path, path.parent.name if path.name == "config.json" else path.stem
    except (OSError, RuntimeError):  # too long a name, the home of nobody
        pass
    check_hub_id(text)
    return hub_config(text), text


def _weight_bytes(config: Path) -> int:
    """Bytes of the weights beside a config, or in their index; 0 if there are none."""
    if files := sum(path.stat().st_size for path in config.parent.glob("model*.safetensors")):
        return files
    try:
        index = json.loads((config.parent / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return max(int(index["metadata"]["total_size"]), 0)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0
