"""A model folder with a compression in it: transformers' own `generate` then uses a compressed cache.

Files are copied, linked or, of a GGUF file, converted, and none of their code is run: the folder's own code runs only
where a user tells transformers to trust it, which this project's loader never does.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from analysis.errors import RecordError, SettingsError
from analysis.models.load import convert, model_folder, tokenizer_and_config
from analysis.plans.export import generate_code
from analysis.progress import Progress, unheard
from l2kv.policies import OF_FILE, POLICIES
from l2kv.policy_files import policy_source
from l2kv.spec import CompressionSpec

_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "*token*.json",
    "vocab*", "merges.txt", "*.model", "*.jinja", "LICENSE*",
)  # fmt: skip
"""Files of a model, whose folder may hold others too."""


def export_generate(
    ref: str | Path,
    spec: CompressionSpec,
    folder: str | Path,
    *,
    link: bool = False,
    progress: Progress = unheard,
) -> Path:
    """Write a folder of config, tokenizer, weights and `custom_generate/generate.py`, atomically.

    Args:
        ref: the model: a name that `load_model` knows, a GGUF file (written as bfloat16), a folder or a hub id.
        folder: folder to write; it must not exist, or be empty.
        link: link to where the weights are, instead of copying them.
        progress: counts bytes where the model has to be fetched first.

    Raises:
        SettingsError: the folder holds files, or weights cannot be linked.
        SpecError: the spec does not fit the model, or its policy is of a file that is not loaded.
        UnsupportedModelError: the model's cache cannot be compressed.
        ModelError: as `load_model`.
        RecordError: the folder cannot be written.
    """
    from l2kv import CompressedCache, special_ids  # wait for torch

    target = Path(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise SettingsError(f"{target} is there already, and not empty. Choose another folder.")
    source = model_folder(ref, progress=progress)
    if source.is_file() and link:
        raise SettingsError(f"{source.name} is a GGUF file, whose weights are converted: they cannot be linked.")
    tokenizer, config = tokenizer_and_config(ref)
    ids = special_ids(tokenizer) if POLICIES[spec.policy].needs_token_ids else None
    CompressedCache(config, spec, special_ids=ids)  # raises where they do not fit
    code = {"generate.py": generate_code(spec, ids).encode()}
    if OF_FILE.fullmatch(spec.policy):
        module, _, content = policy_source(spec.policy)
        code[f"{module}.py"] = content
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
            made = Path(temporary) / "model"
            made.mkdir()
            _fill(made, source, link)
            (made / "custom_generate").mkdir()
            for name, content in code.items():
                (made / "custom_generate" / name).write_bytes(content)
            made.rename(target)
    except OSError as error:
        raise RecordError(f"{target} cannot be written: {error}. Choose another place.") from error
    return target


def _fill(folder: Path, source: Path, link: bool) -> None:
    """Put the files of a model, a folder or a GGUF file, into a folder."""
    if source.is_file():
        convert(source, folder)
        return
    for file in (file for pattern in _FILES for file in source.glob(pattern)):
        if link and file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file.resolve())
        else:
            shutil.copyfile(file, folder / file.name)
