"""Vetting of a model's `config.json`, as data, before transformers builds anything from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# A config beyond these is a mistake or an attack: building it would take all memory, or forever.
_SIZES = (  # by all the names that transformers' configs have for them
    (1024, "num_hidden_layers num_layers n_layer n_layers layers depth encoder_layers decoder_layers"),
    (1024, "num_encoder_layers num_decoder_layers encoder_num_hidden_layers decoder_num_hidden_layers"),
    (1024, "num_attention_heads num_key_value_heads num_heads n_head n_heads attention_heads"),
    (1024, "encoder_attention_heads decoder_attention_heads"),
    (65_536, "hidden_size d_model n_embd embed_dim emb_dim hidden_dim"),
    (1_048_576, "intermediate_size"),
    (4096, "head_dim"),
    (1024, "num_experts num_local_experts n_routed_experts num_experts_per_tok"),
    (4_000_000, "vocab_size"),
    (10_000, "num_labels"),
)
BOUNDS = {name: bound for bound, names in _SIZES for name in names.split()}

# Bytes of a file that is parsed: many times the largest there is, and few enough that a million keys, each of which
# transformers looks at for a while, are refused before they are parsed.
_MOST_BYTES = {
    **dict.fromkeys(("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json"), 2**20),
    "tokenizer_config.json": 4 * 2**20,
}
_MOST_BYTES_OF_OTHERS = 256 * 2**20  # vocabularies, and which weight is in which file


def read_config(path: Path, name: str) -> PretrainedConfig:
    """Read the config of a decoder-only model with keys to rank. Raises ModelError if it is not one."""
    vet_config(path, name)
    from transformers import AutoConfig

    with reading(name, path.name):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        check_config(config, name)
    return config


def check_config(config: PretrainedConfig, name: str) -> None:
    """Refuse sizes out of range under any name, and models that are not decoder-only or have no keys to rank."""
    _check_bounds(config, name)
    _check_kind(config, name)


def vet_config(path: Path, name: str) -> None:
    """Refuse a config with sizes out of bounds, or one that asks for foreign code or unsupported weights."""
    if not path.is_file():
        raise ModelError(f"{name} is no model folder: it has no config.json.")
    check_length(path, name, called="config.json")
    config = read_json(path, name)
    for part in _parts(config):
        for key, bound in BOUNDS.items():
            value = part.get(key)
            if isinstance(value, (int, float)) and not 0 < value <= bound:
                raise ModelError(f"{name}: config.json says {key} = {value}, which is out of range (1 to {bound}).")
        for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
            if "/" in str(part.get(key, "")):
                raise ModelError(f"{name}: config.json asks for attention code from elsewhere ({part[key]!r:.100}).")
        if "--" in str(part.get("auto_map", "")):
            raise ModelError(f"{name}: config.json asks for code from another repository (auto_map), which is not run.")
        if part.get("quantization_config") is not None:
            raise ModelError(
                f"{name} is quantised{_method(part)}: such weights need kernels that are not loaded here. Give the "
                "unquantised model, or a GGUF file, which is dequantised."
            )


@contextmanager
def reading(name: str, part: str) -> Iterator[None]:
    """Turn whatever transformers' parsers raise within the block into a ModelError that names the broken part."""
    import torch

    from l2kv import UnsupportedModelError

    try:
        yield
    except ModelError:
        raise
    except UnsupportedModelError as error:
        raise ModelError(f"{name}: {error}") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ModelError(f"{name} does not fit into memory. Try a smaller model.") from error
    except BaseException as error:
        # A panic in the Rust of tokenizers is no Exception. Nothing else of that kind, such as Ctrl-C, is caught.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{name}: its {part} cannot be used ({one_line(error)}).") from error


def check_length(path: Path, name: str, *, called: str = "") -> None:
    """Refuse a file that is larger than any of its kind, before it is parsed; `called` names the kind."""
    most = _MOST_BYTES.get(called or path.name, _MOST_BYTES_OF_OTHERS)
    if (size := path.stat().st_size) > most:
        raise ModelError(
            f"{name}: its {path.name} has {size:,} bytes, and {most:,} at most are read: those of models are far "
            "smaller, so this is not one that was saved with a model."
        )


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Read the JSON object in a file. Raises ModelError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{name}: {path.name} cannot be read ({one_line(error)}).") from error
    if not isinstance(content, dict):
        raise ModelError(f"{name}: {path.name} is not a JSON object.")
    return content


def one_line(error: BaseException) -> str:
    """Message of a library's error, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (f"no {text}" if isinstance(error, KeyError) else text)[:300]


def _method(config: dict[str, Any]) -> str:
    """How a model is quantised, as its config says: " (gptq)"."""
    told = config["quantization_config"]
    method = told.get("quant_method") if isinstance(told, dict) else None
    return f" ({method:.40})" if isinstance(method, str) else ""


def _check_bounds(config: PretrainedConfig, name: str) -> None:
    """Refuse sizes out of range that the file gave under a name that is not known here."""
    text_config = config.get_text_config(decoder=True)
    for key in ("num_hidden_layers", "hidden_size"):
        value = getattr(text_config, key, None)
        if isinstance(value, int) and not 0 < value <= BOUNDS[key]:
            raise ModelError(f"{name}: config.json makes {key} {value}, which is out of range (1 to {BOUNDS[key]}).")


def _check_kind(config: PretrainedConfig, name: str) -> None:
    """Refuse a model that is not decoder-only, or has no keys to look at."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    from l2kv.config import check_compressible

    text_config = config.get_text_config(decoder=True)
    check_compressible(text_config)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and text_config is not config:
        raise ModelError(
            f"{name} is multimodal ({config.model_type}: a language model and towers for images or sound), and only "
            "language models are loaded here. From Python, load it with transformers: l2kv's compressible(model) and "
            "CompressedCache compress its language part."
        )
    if not getattr(text_config, "num_attention_heads", None):
        raise ModelError(f"{name}: {config.model_type} has no attention heads, so there are no keys to rank.")


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config and every one within it, however deep."""
    pending = [config]
    while pending:
        yield (part := pending.pop())
        pending += [value for value in part.values() if isinstance(value, dict)]
