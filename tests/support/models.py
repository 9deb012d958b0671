"""Tiny random models, built from configs, in float32."""

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

TINY = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.3,  # large enough for attention that is not uniform
}
TOKENIZER_VOCABULARY = {"vocab_size": 4096}
ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
}
MODELS = (*ARCHITECTURES, "stories260K", "books-5m")
OTHERS = {
    "mistral, sliding window": (MistralForCausalLM, MistralConfig, {"sliding_window": 10}),
    "gemma 2, soft cap and hybrid": (Gemma2ForCausalLM, Gemma2Config, {"sliding_window": 10}),
    "gpt-oss, sinks": (GptOssForCausalLM, GptOssConfig, {"sliding_window": 10, "num_local_experts": 4, "head_dim": 8}),
    "gpt-2, no rotary": (GPT2LMHeadModel, GPT2Config, {"n_layer": 3, "n_head": 6, "n_embd": 48}),
}


def build(name: str, **changes) -> PreTrainedModel:
    """A tiny random model of an architecture, in float32."""
    torch.manual_seed(0)
    model_class, config_class = ARCHITECTURES[name]
    model = model_class(config_class(**(TINY | changes))).eval()
    for key, weight in model.named_parameters():
        if key.endswith("k_norm.weight"):  # untrained, it gives all keys one norm, and rounding would rank them
            torch.nn.init.uniform_(weight, 0.2, 2.0)
    return model


def tokens(model: PreTrainedModel, n: int, *, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, n], none twice in a row.

    In layer 0 the same token has the same key norm wherever it stands, and rounding would decide between its copies.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([2 + torch.randperm(model.config.vocab_size - 2, generator=generator)[:n] for _ in range(batch)])
