"""Tiny random models of each architecture that is read from GGUF files, and what a file holds of them."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM

from analysis.errors import ModelError
from analysis.models.load import load_model
from tests.support.gguf_files import stored_weight
from tests.support.models import tokens

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large enough for attention that is not uniform
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama, tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters={"rope_theta": 1e5}),
    "llama of wide heads": transformers.LlamaConfig(**SIZES, head_dim=32),  # as Mistral Nemo
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None, head_dim=16),
    "qwen2": transformers.Qwen2Config(**SIZES, rope_parameters={"rope_theta": 1e6}),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=32, query_pre_attn_scalar=32, sliding_window=8),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES | {"num_hidden_layers": 7}, head_dim=32, query_pre_attn_scalar=32, sliding_window=8,
        rope_parameters=GEMMA3_ROPE,
    ),
    "phi3": transformers.Phi3Config(**SIZES),
    "qwen2 of experts": transformers.Qwen2MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64
    ),
    "qwen3 of experts": transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=32, norm_topk_prob=True
    ),
    "starcoder2": transformers.Starcoder2Config(**SIZES),
}  # fmt: skip


def random_model(config: transformers.PretrainedConfig, seed: int = 0) -> transformers.PreTrainedModel:
    """A model in float32, its biases and norms random too: untrained they would be 0 and 1, and hide a mistake."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            torch.nn.init.normal_(weight, 0.1, 0.2)
    return model.requires_grad_(False)


def as_stored(model: transformers.PreTrainedModel, kind: GGMLQuantizationType) -> transformers.PreTrainedModel:
    """A copy of a model with the weights that a file of it holds."""
    result = copy.deepcopy(model)
    for name, weight in result.named_parameters():
        weight.data = stored_weight(model, name, weight.data, kind)
    return result


@torch.no_grad()
def logits(model: transformers.PreTrainedModel, n: int = 24) -> torch.Tensor:
    return model(tokens(model, n)).logits


def refusal(ref: str | Path) -> str:
    with pytest.raises(ModelError) as refused:
        load_model(ref, device="cpu")
    message = str(refused.value)
    assert len(message) < 700 and "\n" not in message and "Traceback" not in message
    return message
