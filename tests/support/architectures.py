"""Architectures that are compressed, and some that are refused: tiny models from configs."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from dataclasses import dataclass, field

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from l2kv import CompressedCache, CompressionSpec, compressible
from tests.support.models import TINY

WINDOW = 8  # of sliding layers: less than the texts of the tests
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_HYBRID = {"num_hidden_layers": 4, "layer_types": _ALTERNATING, "sliding_window": WINDOW}
_OLD_SHAPE = {"vocab_size": 160, "n_embd": 48, "n_head": 6, "n_layer": 3, "initializer_range": 0.3}
_LINEAR = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 0,
    "mlp_only_layers": [0, 1, 2, 3],
}
_LATENT = {
    "num_key_value_heads": 6,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 3,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}


@dataclass(frozen=True)
class Architecture:
    """A tiny model, and what is to be expected of a compressed cache for it."""

    config_class: str
    settings: dict = field(default_factory=dict)
    left: int = 0
    """Layers that are left to transformers."""
    refused: str | None = None
    """What the reason must say, of a model that is refused."""
    auto_class: str = "AutoModelForCausalLM"

    def config(self) -> PretrainedConfig:
        return getattr(transformers, self.config_class)(**self.settings)

    def model(self) -> PreTrainedModel:
        """Random weights, in float32."""
        torch.manual_seed(0)
        model = getattr(transformers, self.auto_class).from_config(self.config(), dtype=torch.float32).eval()
        for name, weight in model.named_parameters():
            if "k_norm" in name or "k_layernorm" in name:  # untrained, it gives all keys one norm: rounding would rank
                torch.nn.init.uniform_(weight, 0.2, 2.0)
            if name.endswith("sinks"):  # large enough to take attention away
                torch.nn.init.uniform_(weight, 0.0, 3.0)
        return model


def _modern(config_class: str, *, left: int = 0, **settings) -> Architecture:
    return Architecture(config_class, TINY | settings, left)


def _refused(config_class: str, reason: str, auto_class: str = "AutoModelForCausalLM", **settings) -> Architecture:
    return Architecture(config_class, settings, refused=reason, auto_class=auto_class)


ARCHITECTURES: dict[str, Architecture] = {
    "Llama": _modern("LlamaConfig"),
    "Llama, rotary scaled as in Llama 3": _modern("LlamaConfig", rope_parameters=_LLAMA3),
    "Llama, rotary scaled by YaRN": _modern("LlamaConfig", rope_parameters=_YARN),
    "Mistral": _modern("MistralConfig", sliding_window=None),
    "Mistral with a sliding window": _modern("MistralConfig", left=3, sliding_window=WINDOW),
    "Qwen2": _modern("Qwen2Config"),
    "Qwen3": _modern("Qwen3Config"),
    "Gemma 1": _modern("GemmaConfig"),
    "Gemma 2": _modern("Gemma2Config", left=2, **_HYBRID, query_pre_attn_scalar=4, attn_logit_softcapping=2.0),
    "Gemma 3 (text)": _modern("Gemma3TextConfig", left=2, **_HYBRID, query_pre_attn_scalar=4),
    "Gemma 4 (text)": _modern(
        "Gemma4TextConfig",
        left=2,
        **_HYBRID,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        global_head_dim=16,
        hidden_size_per_layer_input=0,
    ),
    "Gemma 3n (text)": _modern(
        "Gemma3nTextConfig",
        left=3,  # two of them borrow the keys of the others
        **_HYBRID,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=160,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "Phi-3": _modern("Phi3Config", pad_token_id=0),
    "GPT-NeoX": Architecture(
        "GPTNeoXConfig",
        {key: value for key, value in TINY.items() if key not in ("num_key_value_heads", "head_dim")},
    ),
    "GPT-2": Architecture("GPT2Config", _OLD_SHAPE | {"n_positions": 512, "bos_token_id": 0, "eos_token_id": 0}),
    "GPT-BigCode (one kv head)": Architecture(
        "GPTBigCodeConfig", _OLD_SHAPE | {"n_positions": 512, "multi_query": True, "bos_token_id": 0, "eos_token_id": 0}
    ),
    "OLMo 2": _modern("Olmo2Config"),
    "Granite": _modern("GraniteConfig", attention_multiplier=0.5),
    "SmolLM3": _modern("SmolLM3Config", no_rope_layers=[1, 0, 1], pad_token_id=0),
    "gpt-oss": _modern("GptOssConfig", left=2, **_HYBRID, num_local_experts=2, num_experts_per_tok=1),
    "LFM2": _modern("Lfm2Config", left=2, layer_types=["conv", "full_attention", "conv"]),
    "Qwen3-Next": _modern("Qwen3NextConfig", left=2, **_LINEAR),
    "DeepSeek-V3": _refused("DeepseekV3Config", "latents", **(TINY | _LATENT)),
    "Falcon": _refused(
        "FalconConfig",
        "past transformers' registry|cannot replace",
        vocab_size=160,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
    ),
    "Bloom": _refused(
        "BloomConfig", "past transformers' registry|cannot replace", vocab_size=160, hidden_size=48, n_layer=3, n_head=6
    ),
    "Mamba": _refused("MambaConfig", "no key/value cache", vocab_size=160, hidden_size=48, num_hidden_layers=3),
    "T5": _refused(
        "T5Config", "decoder-only", "AutoModelForSeq2SeqLM", vocab_size=160, d_model=48, num_layers=2, d_ff=64
    ),
    "BERT": _refused(
        "BertConfig",
        "decoder-only",
        "AutoModelForMaskedLM",
        vocab_size=160,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=64,
    ),
}


def compress(model: PreTrainedModel) -> CompressedCache:
    """The cache after a few tokens; raises UnsupportedModelError where the model is refused."""
    with compressible(model), torch.no_grad():
        cache = CompressedCache(model.config, CompressionSpec(keep_ratio=0.5))
        model(torch.arange(2, 2 + 2 * WINDOW)[None], past_key_values=cache)
    return cache
