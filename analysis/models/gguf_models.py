"""transformers models from vetted GGUF files: config, tokenizer, and weights, dequantised one by one.

Names and layouts are transformers' own tables (they undo what llama.cpp's converter did, such as the order of a
Llama's query and key rows). What those tables lack is added here, because without it the model would silently be a
different one: the size of a head, scaled rotary embeddings, the scale and the caps of Gemma's
attention, the windows of layers, the digits that a tokenizer keeps apart.

What no GGUF file says is taken as absent: the sliding windows (of 4096 tokens) of Mistral 7B v0.1 and StarCoder2, which
llama.cpp's converter drops. Up to that length these models are the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from analysis.errors import ModelError
from analysis.models.gguf import GgufArray, GgufFile, GgufTensor
from analysis.models.vet import check_config, reading

if TYPE_CHECKING:
    import numpy as np
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Where transformers has another name: of the model, and in its table of GGUF's keys.
_MODEL_TYPES = {"gemma3": "gemma3_text", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
_GPT2_SPLIT = frozenset({"gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais"})  # llama.cpp's names
_DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
_SPECIAL = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_SLICE = 2**22  # weights that are dequantised at a time
_CONTROL, _USER_DEFINED = 3, 4  # types of tokens that are matched whole in a text
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # 3.1 to 3.3


def gguf_config(gguf: GgufFile) -> PretrainedConfig:
    """Build the config that a GGUF file describes. Raises ModelError for features that are not reproduced."""
    with reading(gguf.name, "header"):
        config = _config(gguf)
        check_config(config, gguf.name)
    return config


def _config(gguf: GgufFile) -> PretrainedConfig:
    from transformers import AutoConfig
    from transformers.integrations.ggml import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING

    architecture = gguf.architecture
    model_type = _MODEL_TYPES.get(architecture, architecture)
    tables: Mapping[str, Any] = GGUF_CONFIG_MAPPING
    names: Mapping[str, str | None] = tables.get(architecture) or tables[model_type]
    told: dict[str, Any] = GGUF_CONFIG_DEFAULTS_MAPPING.get(model_type, {}) | {
        name: gguf.of_architecture(key) for key, name in names.items() if name
    }
    told = {name: value for name, value in told.items() if value is not None}
    told.setdefault("num_key_value_heads", told["num_attention_heads"])
    for name, key in _SPECIAL.items():
        told[name] = gguf.metadata.get(f"tokenizer.ggml.{key}")
    told["vocab_size"] = gguf.vocab_size
    told["tie_word_embeddings"] = "output.weight" not in gguf.tensor_names
    told["head_dim"] = _head_dim(gguf)
    told.pop("rope_theta", None)
    told["rope_parameters"] = _rope(gguf)
    if architecture.startswith("gemma"):
        told |= _gemma(gguf)
    if architecture.endswith("moe"):
        told |= _experts(gguf)
    if architecture == "phi3":
        told["sliding_window"] = gguf.of_architecture("attention.sliding_window") or None
        if "original_max_position_embeddings" in (rope := told["rope_parameters"]):  # else its default would win
            told["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    return AutoConfig.for_model(model_type, **told)


def gguf_tokenizer(gguf: GgufFile) -> PreTrainedTokenizerBase:
    """Build the tokenizer of a GGUF file. Its chat template is the file's: transformers runs it in a sandbox."""
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_PRE_TOKENIZER_SPLITS,
        convert_gguf_tokenizer,
        get_gguf_tokenizer,
    )

    split = gguf.metadata.get("tokenizer.ggml.pre")
    known = {*GGUF_PRE_TOKENIZER_SPLITS, *_GPT2_SPLIT, *_DIGITS_APART}
    if gguf.metadata["tokenizer.ggml.model"] == "gpt2" and split not in known:
        raise ModelError(
            f"{gguf.name}: its tokenizer splits text by the rule {split!r:.80} (tokenizer.ggml.pre), which is not "
            "known here: its tokens would not be those it was trained on. Give the model in safetensors."
        )
    with reading(gguf.name, "tokenizer"):
        _, content, options = get_gguf_tokenizer(str(gguf.path))
        backend = _with_special_tokens(convert_gguf_tokenizer(gguf.architecture, content)[0], content)
        if split in _DIGITS_APART:
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    if len(tokenizer) > gguf.vocab_size or any(
        key in content and getattr(tokenizer, key) != content[key] for key in (*_SPECIAL, "unk_token_id")
    ):
        raise ModelError(
            f"{gguf.name}: its special tokens are not in its vocabulary of {len(content['tokens']):,} tokens. "
            "Give the model in safetensors."
        )
    return tokenizer


def _with_special_tokens(backend: Tokenizer, content: dict[str, Any]) -> Tokenizer:
    """The tokenizer with the special tokens that the file has, as it spells them, and no others.

    transformers adds those of the class that it builds (GPT-2's `<|endoftext|>`), beyond the vocabulary. And in a
    byte-level vocabulary it spells all anew that are not in the alphabet of bytes: DeepSeek's `<｜begin▁of▁sentence｜>`
    too, which would then be cut up in a text, or become a new token.

    Args:
        content: as `get_gguf_tokenizer` has it.
    """
    from tokenizers import AddedToken, Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens, types = content["tokens"], content.get("token_type", ())
    alphabet = set(bytes_to_unicode().values())
    special = {
        i: (token, kind)
        for i, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind in (_CONTROL, _USER_DEFINED) and content["tokenizer_type"] == "gpt2" and not set(token) <= alphabet
    }
    if not special and backend.get_vocab_size() <= len(tokens):
        return backend
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < len(tokens)]
    if special:
        spelled = {i: token for token, i in state["model"]["vocab"].items()} | {i: t for i, (t, _) in special.items()}
        state["model"]["vocab"] = {token: i for i, token in spelled.items()}
    backend = Tokenizer.from_str(json.dumps(state))
    for token, kind in special.values():
        add = backend.add_special_tokens if kind == _CONTROL else backend.add_tokens
        add([AddedToken(token, normalized=False, special=kind == _CONTROL)])
    return backend


def gguf_model(gguf: GgufFile, config: PretrainedConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a GGUF file's weights on the CPU, dequantised to `dtype`; return the model and transformers' loading info.

    Raises:
        ModelError: the file has fewer weights than its header describes, or weights without a place in the model.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    if (described := sum(p.numel() for p in empty.parameters())) > gguf.n_weights:
        raise ModelError(
            f"{gguf.name} is incomplete: its header describes {described:,} weights, and it holds {gguf.n_weights:,}. "
            "Fetch or convert it again."
        )
    processor = TENSOR_PROCESSORS.get(gguf.architecture, TensorProcessor)(config=config.to_dict())
    mapping = get_gguf_hf_weights_map(empty, processor)
    # Experts are one tensor in transformers and no module: their names come without the ".weight" that the file has.
    places = {n if n.endswith((".weight", ".bias")) else f"{n}.weight": place for n, place in mapping.items()}
    unplaced = sorted(gguf.tensor_names - set(places) - set(_ROPE_TENSORS))
    if unplaced:
        raise ModelError(
            f"{gguf.name}: {len(unplaced)} of its weights have no place in a model of the architecture "
            f"{gguf.architecture}, the first is {unplaced[0]!r:.80}. Give the model in safetensors."
        )
    weights: dict[str, Tensor] = {}
    for tensor in gguf.tensors:
        if tensor.name not in places:
            continue
        # Of experts, gate and up projection are one in transformers: the processor puts them into `weights` itself.
        result = processor.process(
            _dequantised(gguf, tensor),
            tensor.name,
            tensor_key_mapping=mapping,
            parsed_parameters={"tensors": weights},
        )
        if result.name is not None:
            weights[places[tensor.name]] = torch.from_numpy(result.weights).to(dtype)
    for name, weight in weights.items():
        weights[name] = weight.to(dtype)
    return type(empty).from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )


def dequantising_bytes(gguf: GgufFile, itemsize: int) -> int:
    """Estimate the peak memory of loading, in numbers of `itemsize` bytes."""
    done = peak = 0
    for tensor in gguf.tensors:  # each in float32, on top of those before it, and then in its own dtype
        peak = max(peak, done + tensor.n_weights * (4 if itemsize == 4 else 4 + itemsize))
        done += tensor.n_weights * (4 if "_exps" in tensor.name else itemsize)  # experts stay in float32 up to the end
    return max(peak, done) + 2 * 4 * min(_SLICE, gguf.n_weights)


def _dequantised(gguf: GgufFile, tensor: GgufTensor) -> np.ndarray:
    """A tensor in float32, in torch's order of dimensions."""
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    weights = np.empty(tensor.shape, np.float32)
    rows = weights.reshape(-1, tensor.shape[-1])
    row_bytes, step = tensor.nbytes // len(rows), max(1, _SLICE // tensor.shape[-1])
    for begin in range(0, len(rows), step):  # in slices: gguf takes twice the memory of what it dequantises
        part = rows[begin : begin + step]
        stored = np.fromfile(gguf.path, np.uint8, len(part) * row_bytes, offset=tensor.start + begin * row_bytes)
        # The shape does not fit where the file became shorter meanwhile: that raises.
        part[:] = dequantize(stored.reshape(len(part), row_bytes), GGMLQuantizationType(tensor.type_id))
    return weights


def _head_dim(gguf: GgufFile) -> int:
    told = gguf.of_architecture
    heads = told("attention.head_count")
    keys = told("attention.key_length") or told("embedding_length") // heads
    if (values := told("attention.value_length") or keys) != keys:
        raise _not_reproduced(gguf, f"keys are of {keys} numbers, and values of {values}")
    return keys


def _rope(gguf: GgufFile) -> dict[str, Any]:
    """The rotary embedding in transformers' terms. Raises ModelError for one that is not known here."""
    told, architecture = gguf.of_architecture, gguf.architecture
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": told("rope.freq_base") or 10_000.0}
    head_dim = _head_dim(gguf)
    if (rotated := told("rope.dimension_count") or head_dim) != head_dim:
        if architecture != "phi3":
            raise _not_reproduced(gguf, f"{rotated} of the {head_dim} numbers of a head are rotated")
        rope["partial_rotary_factor"] = rotated / head_dim
    scaling = told("rope.scaling.type") or "none"
    if scaling in ("linear", "yarn"):
        rope |= {"rope_type": scaling, "factor": told("rope.scaling.factor")}
        if scaling == "yarn":
            rope["original_max_position_embeddings"] = told("rope.scaling.original_context_length")
        if None in rope.values():
            raise _not_reproduced(gguf, f"its rotary embedding is scaled ({scaling}), and it does not say how far")
    elif scaling not in ("none", "longrope"):
        raise _not_reproduced(gguf, f"its rotary embedding is scaled by {scaling!r:.80}")
    tensors = {tensor.name: tensor for tensor in gguf.tensors if tensor.name in _ROPE_TENSORS}
    if "rope_freqs.weight" in tensors:
        rope |= _llama3(gguf, tensors["rope_freqs.weight"], rope["rope_theta"])
    elif tensors:
        rope |= _longrope(gguf, tensors)
    elif scaling == "longrope":
        raise _not_reproduced(gguf, "its rotary embedding is scaled (longrope), and the factors are missing")
    if architecture != "gemma3":
        return rope
    local = {"rope_type": "default", "rope_theta": told("rope.freq_base_swa") or 10_000.0}
    return {"full_attention": rope, "sliding_attention": local}


def _llama3(gguf: GgufFile, tensor: GgufTensor, theta: float) -> dict[str, Any]:
    """Llama 3.1's scaling, from the divisors of all frequencies that a GGUF file has in its place.

    The divisors do not say how they came about. They are taken for Llama 3.1's (the largest is its factor) if its
    formula gives the same ones.
    """
    import numpy as np
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    divisors = _dequantised(gguf, tensor).ravel()
    rope = {"rope_type": "llama3", "factor": float(divisors.max()), **_LLAMA3}
    head_dim = 2 * len(divisors)
    config = LlamaConfig(head_dim=head_dim, rope_parameters={"rope_theta": theta, **rope})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    if head_dim != _head_dim(gguf) or not np.allclose(plain / scaled.numpy(), divisors, rtol=1e-3):
        raise _not_reproduced(gguf, f"its rotary embedding is scaled by {tensor.name}, in a way unlike Llama 3.1's")
    return rope


def _longrope(gguf: GgufFile, tensors: dict[str, GgufTensor]) -> dict[str, Any]:
    """Phi-3's scaling: two lists of divisors, and the length up to which the short one holds."""
    told = gguf.of_architecture
    lists = {
        f"{name}_factor": [float(x) for x in _dequantised(gguf, tensors[key]).ravel()]
        for name in ("long", "short")
        if (key := f"rope_factors_{name}.weight") in tensors
    }
    original = told("rope.scaling.original_context_length")
    if gguf.architecture != "phi3" or len(lists) != 2 or type(original) is not int:
        raise _not_reproduced(gguf, "its rotary embedding is scaled by lists of factors, in a way unlike Phi-3's")
    rope = {"rope_type": "longrope", "original_max_position_embeddings": original, **lists}
    if factor := told("rope.scaling.attn_factor"):
        rope["attention_factor"] = factor
    return rope


def _gemma(gguf: GgufFile) -> dict[str, Any]:
    """What Gemma 2 and 3 have besides: scale and caps of attention, and which layers have a window."""
    told, config = gguf.of_architecture, {}
    if told("attention.sliding_window") is None:
        raise _not_reproduced(gguf, "its layers have windows, and it does not say how long")
    # As llama.cpp has it: the files do not say. The 27B models (46 and 62 layers) divide by another number.
    largest = {"gemma2": 46, "gemma3": 62}[gguf.architecture] == told("block_count")
    per_head = told("embedding_length") // told("attention.head_count")
    config["query_pre_attn_scalar"] = per_head if largest else _head_dim(gguf)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if told(key) is not None:
            config[key] = told(key)
    pattern = told("attention.sliding_window_pattern")
    if isinstance(pattern, GgufArray) and pattern.kind == "bool" and pattern.count == told("block_count"):
        slides: Sequence[float] = pattern.items or ()
    elif type(pattern) is int and pattern > 0:
        slides = [(i + 1) % pattern for i in range(told("block_count"))]
    elif pattern is None:
        return config  # as all Gemmas of the generation
    else:
        raise _not_reproduced(gguf, "its pattern of sliding windows is neither a number nor a list of one per layer")
    return config | {"layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides]}


def _experts(gguf: GgufFile) -> dict[str, Any]:
    """The width of a mixture's experts, which transformers' table lacks."""
    if None in map(gguf.of_architecture, ("expert_count", "expert_used_count", "expert_feed_forward_length")):
        raise _not_reproduced(gguf, "it has experts, and does not say how many or how wide")
    told = {"moe_intermediate_size": gguf.of_architecture("expert_feed_forward_length")}
    if gguf.architecture == "qwen2moe":
        told["shared_expert_intermediate_size"] = gguf.of_architecture("expert_shared_feed_forward_length")
    return told


def _not_reproduced(gguf: GgufFile, what: str) -> ModelError:
    return ModelError(f"{gguf.name}: {what}, which is not reproduced from GGUF. Give the model in safetensors.")
