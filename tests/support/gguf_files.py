"""GGUF files for the tests, written with the gguf package as llama.cpp's converter would write them.

The names and layouts are written down here by hand, from llama.cpp's convert_hf_to_gguf.py; nothing is shared with
what reads them.
"""

import re
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import PreTrainedModel

CHARACTERS = [chr(c) for c in range(33, 127)]  # as byte-level BPE writes them; the space is Ġ
TOKENS = ["<unk>", "<s>", "</s>", "Ġ", *CHARACTERS, "th", "the", "Ġthe"]
MERGES = ["t h", "th e", "Ġ the"]
_NAMES = (  # longest first where one holds another
    (r"^model\.embed_tokens\.", "token_embd."),
    (r"^model\.norm\.", "output_norm."),
    (r"^lm_head\.", "output."),
    (r"^model\.layers\.", "blk."),
    (r"self_attn\.q_proj", "attn_q"),
    (r"self_attn\.k_proj", "attn_k"),
    (r"self_attn\.v_proj", "attn_v"),
    (r"self_attn\.o_proj", "attn_output"),
    (r"self_attn\.qkv_proj", "attn_qkv"),
    (r"self_attn\.q_norm", "attn_q_norm"),
    (r"self_attn\.k_norm", "attn_k_norm"),
    (r"mlp\.gate_up_proj", "ffn_up"),
    (r"mlp\.experts\.down_proj", "ffn_down_exps.weight"),
    (r"mlp\.shared_expert_gate", "ffn_gate_inp_shexp"),
    (r"mlp\.shared_expert\.(gate|up|down)_proj", r"ffn_\1_shexp"),
    (r"mlp\.gate\.", "ffn_gate_inp."),
    (r"mlp\.(gate|up|down)_proj", r"ffn_\1"),
    (r"mlp\.c_fc", "ffn_up"),
    (r"mlp\.c_proj", "ffn_down"),
    (r"input_layernorm", "attn_norm"),
)
_GEMMA = (
    (r"post_attention_layernorm", "post_attention_norm"),
    (r"pre_feedforward_layernorm", "ffn_norm"),
    (r"post_feedforward_layernorm", "post_ffw_norm"),
)
_OTHERS = ((r"post_attention_layernorm", "ffn_norm"),)


def gguf_architecture(model: PreTrainedModel) -> str:
    others = {"gemma3_text": "gemma3", "mistral": "llama", "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
    return others.get(model.config.model_type, model.config.model_type)


def stored_weight(model: PreTrainedModel, name: str, weight: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
    """What is left of a weight that is stored as `kind`: matrices only, by gguf's own dequantisation."""
    if weight.dim() > 1 and "shared_expert_gate" not in name:  # which is a vector there
        return torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)).reshape(weight.shape)
    if gguf_architecture(model).startswith("gemma") and name.endswith("norm.weight"):
        return (weight + 1) - 1  # stored as w + 1 in float32
    return weight


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    drop: tuple[str, ...] = (),
    weights: dict[str, np.ndarray] | None = None,
    blocks: dict[str, tuple[np.ndarray, GGMLQuantizationType]] | None = None,
    metadata: dict[str, object] | None = None,
    tokenizer: dict[str, object] | None = None,
) -> Path:
    """A GGUF file of a model, its matrices stored as `kind`.

    Args:
        drop: tensors to leave out, by GGUF's names; metadata keys too.
        weights: tensors to add or to put in place, by GGUF's names.
        blocks: tensors to put in place that are quantised already: their bytes [rows, bytes] and type.
        metadata: keys to add or to put in place; None leaves one out. Below the architecture's name: ".block_count".
        tokenizer: keys below tokenizer.ggml. in place of a small byte-level one.
    """
    config, architecture = model.config, gguf_architecture(model)
    writer = gguf.GGUFWriter(path, architecture)
    told = {
        ".block_count": config.num_hidden_layers,
        ".context_length": config.max_position_embeddings,
        ".embedding_length": config.hidden_size,
        ".feed_forward_length": config.intermediate_size,
        ".attention.head_count": config.num_attention_heads,
        ".attention.head_count_kv": config.num_key_value_heads,
        ".rope.freq_base": float(_theta(config)),
    }
    if hasattr(config, "rms_norm_eps"):
        told[".attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    else:
        told[".attention.layer_norm_epsilon"] = float(config.norm_epsilon)
    if architecture in ("gemma2", "gemma3", "llama", "qwen3", "qwen3moe"):
        told |= {".attention.key_length": config.head_dim, ".attention.value_length": config.head_dim}
    if architecture in ("llama", "phi3"):
        told[".rope.dimension_count"] = config.head_dim if architecture == "llama" else _rotated(config)
    if architecture.startswith("gemma"):
        told[".attention.sliding_window"] = config.sliding_window
    if architecture.endswith("moe"):
        told[".expert_count"] = config.num_experts
        told[".expert_used_count"] = config.num_experts_per_tok
        told[".expert_feed_forward_length"] = config.moe_intermediate_size
        if architecture == "qwen2moe":
            told[".expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if architecture == "gemma2":
        told[".attn_logit_softcapping"] = config.attn_logit_softcapping
        told[".final_logit_softcapping"] = config.final_logit_softcapping
    _write_metadata(writer, {k: v for k, v in (told | (metadata or {})).items() if k not in drop and v is not None})
    _write_tokenizer(writer, tokenizer or {})
    tensors = dict(_tensors(model))
    for name, weight in (tensors | (weights or {})).items():
        if name in drop:
            continue
        if name in (blocks or {}):
            content, of_kind = blocks[name]
            writer.add_tensor(name, content, raw_dtype=of_kind)
        elif weight.ndim > 1:
            writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(model: PreTrainedModel):
    """GGUF's name and layout of each weight."""
    architecture = gguf_architecture(model)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        renamed = name
        for pattern, replacement in (*_NAMES, *(_GEMMA if architecture.startswith("gemma") else _OTHERS)):
            renamed = re.sub(pattern, replacement, renamed)
        values = weight.numpy().astype(np.float32)
        if "shared_expert_gate" in name:
            values = values[0]
        if "mlp.experts.gate_up_proj" in name:  # [experts, gate then up, hidden]: two tensors in GGUF
            stem = renamed.split("mlp.")[0]
            yield f"{stem}ffn_gate_exps.weight", np.ascontiguousarray(values[:, : values.shape[1] // 2])
            yield f"{stem}ffn_up_exps.weight", np.ascontiguousarray(values[:, values.shape[1] // 2 :])
            continue
        if architecture == "llama" and (".attn_q." in renamed or ".attn_k." in renamed):
            values = _interleaved(values, model.config.head_dim)
        if architecture.startswith("gemma") and renamed.endswith("norm.weight"):
            values = values + 1
        yield renamed, values


def _interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Query or key rows as ggml rotates them: neighbours are a pair, where transformers pairs the halves of a head."""
    result = np.empty_like(rows)
    half = head_dim // 2
    for head in range(len(rows) // head_dim):
        for i in range(half):
            result[head * head_dim + 2 * i] = rows[head * head_dim + i]
            result[head * head_dim + 2 * i + 1] = rows[head * head_dim + half + i]
    return result


def _write_metadata(writer: gguf.GGUFWriter, told: dict[str, object]) -> None:
    for key, value in told.items():
        key = writer.arch + key if key.startswith(".") else key
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, value)


def _write_tokenizer(writer: gguf.GGUFWriter, told: dict[str, object]) -> None:
    tokens = told.get("tokens", TOKENS)
    default = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": TOKENS,
        "token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    _write_metadata(writer, {f"tokenizer.ggml.{k}": v for k, v in (default | told).items() if v is not None})


def _theta(config) -> float:
    rope = config.rope_parameters
    return rope.get("full_attention", rope)["rope_theta"]


def _rotated(config) -> int:
    head_dim = config.hidden_size // config.num_attention_heads
    return int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
