"""Loading a model safely: safetensors only, no remote code, `config.json` vetted before anything is built from it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUNDLED = Path(__file__).parent / "bundled"
BUNDLED_MODELS = tuple(sorted(p.parent.name for p in BUNDLED.glob("*/config.json")))

# A config beyond these is a mistake or an attack: building it would take all memory, or forever.
_BOUNDS = {
    "num_hidden_layers": 1024,
    "hidden_size": 65_536,
    "intermediate_size": 1_048_576,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 4096,
    "vocab_size": 4_000_000,
    "n_layer": 1024,
    "n_embd": 65_536,
    "n_head": 1024,
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
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


def load_model(ref: str | Path, *, device: str | None = None, dtype: torch.dtype | None = None) -> LoadedModel:
    """Load a decoder-only model by the name of a bundled one, a local folder, or a Hugging Face hub id.

    Args:
        ref: such as "books-5m", "/models/my-llama" or "Qwen/Qwen3-0.6B".
        device: "cuda", "cpu", ...; the GPU where there is one, if not given.
        dtype: float32 on a CPU and bfloat16 elsewhere, if not given.

    Raises:
        ModelError: there is no such model, or it is unsafe, incomplete or not decoder-only; the message says which.
    """
    folder = model_folder(ref)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from l2kv import UnsupportedModelError, check_compressible

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    safe = {"trust_remote_code": False, "local_files_only": True}
    name = _name(ref)
    try:
        check_compressible(AutoConfig.from_pretrained(folder, **safe).get_text_config(decoder=True))
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **safe
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
    except UnsupportedModelError as error:
        raise ModelError(f"{name}: {error}") from error
    except MemoryError as error:
        raise ModelError(f"{name} does not fit into memory. Try a smaller model.") from error
    # transformers reports a broken folder by whatever its parsers happen to raise.
    except Exception as error:
        raise ModelError(f"{name} could not be loaded: {_first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{name} is incomplete: {len(missing)} weights are missing, the first is {missing[0]}.")
    return LoadedModel(model.eval().to(device), tokenizer, name)


def model_folder(ref: str | Path) -> Path:
    """The vetted local folder of a model; a hub id is fetched first (its config before its weights)."""
    text = str(ref).strip()
    if text in BUNDLED_MODELS:
        return BUNDLED / text
    if Path(text).expanduser().is_dir():
        folder = Path(text).expanduser().resolve()
        _vet(folder, text)
        return folder
    if not _HUB_ID.fullmatch(text):
        raise ModelError(
            f"No such model: {text!r}. Give the name of a bundled model ({', '.join(BUNDLED_MODELS)}), a folder that "
            "exists, or a Hugging Face id such as Qwen/Qwen3-0.6B."
        )
    return _fetch(text)


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        _vet_config(Path(hf_hub_download(hub_id, "config.json")), hub_id)
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
            f"({_first_line(error)}). Check the name and the connection, or give a local folder."
        ) from error
    _vet(folder, hub_id)
    return folder


def _vet(folder: Path, name: str) -> None:
    """Refuse a model folder that is unsafe or not one."""
    _vet_config(folder / "config.json", name)
    if not list(folder.glob("*.safetensors")):
        others = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf")]
        found = f" (found {others[0]}: convert it with transformers' save_pretrained)" if others else ""
        raise ModelError(f"{name} has no .safetensors weights{found}. Other formats can run code, and are not read.")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = set(_read_json(index, name).get("weight_map", {}).values())
        for shard in shards:
            if Path(shard).name != shard:
                raise ModelError(f"{name}: {index.name} points outside its folder ({shard!r}).")
            if not (folder / shard).exists():
                raise ModelError(f"{name} is incomplete: {shard} is missing.")


def _vet_config(path: Path, name: str) -> None:
    if not path.exists():
        raise ModelError(f"{name} is no model folder: it has no config.json.")
    config = _read_json(path, name)
    for part in [config, *(v for v in config.values() if isinstance(v, dict))]:
        for key, bound in _BOUNDS.items():
            value = part.get(key)
            if isinstance(value, (int, float)) and not 0 < value <= bound:
                raise ModelError(f"{name}: config.json says {key} = {value}, which is out of range (1 to {bound}).")
        for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
            if "/" in str(part.get(key, "")):
                raise ModelError(f"{name}: config.json asks for attention code from elsewhere ({part[key]!r}).")
    if any("--" in str(target) for target in (config.get("auto_map") or {}).values()):
        raise ModelError(f"{name}: config.json asks for code of another repository (auto_map). It is not run.")
    if config.get("quantization_config"):
        raise ModelError(f"{name} is quantised, which is not supported yet. Give the unquantised model.")


def _read_json(path: Path, name: str) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{name}: {path.name} cannot be read ({_first_line(error)}).") from error
    if not isinstance(content, dict):
        raise ModelError(f"{name}: {path.name} is not a JSON object.")
    return content


def _name(ref: str | Path) -> str:
    text = str(ref).strip()
    return Path(text).expanduser().resolve().name if Path(text).expanduser().is_dir() else text


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]
