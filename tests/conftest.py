"""Models for the tests: tiny random ones built from configs, the bundled one, and stories260K where it is at hand."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("L2KV_DEMO", "books-5m")  # small, so that pages are drawn fast; test_smollm2 opens on the other

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from l2kv import POLICIES

torch.set_num_threads(1)  # tiny models, and a process per core: threads would only wait for each other
ROOT = Path(__file__).parents[1]
BUNDLED = ROOT / "analysis" / "bundled" / "books-5m"
STORIES = ROOT.parent / "shared" / "models" / "stories260K"
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
ARCHITECTURES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
}
MODELS = (*ARCHITECTURES, "stories260K", "books-5m")


def build(name: str, **changes) -> PreTrainedModel:
    """A tiny random model of an architecture, in float32."""
    torch.manual_seed(0)
    model_class, config_class = ARCHITECTURES[name]
    model = model_class(config_class(**(TINY | changes))).eval()
    for key, weight in model.named_parameters():
        if key.endswith("k_norm.weight"):  # untrained, it gives all keys one norm, and rounding would rank them
            torch.nn.init.uniform_(weight, 0.2, 2.0)
    return model


@pytest.fixture(scope="session")
def models():
    """name -> model, each built or loaded once."""
    made: dict[str, PreTrainedModel] = {}

    def get(name: str) -> PreTrainedModel:
        if name not in made:
            if name in ARCHITECTURES:
                made[name] = build(name)
            else:
                folder = BUNDLED if name == "books-5m" else STORIES
                if not folder.is_dir():
                    pytest.skip(f"{name} is not on this machine")
                made[name] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return made[name]

    return get


@pytest.fixture(params=MODELS)
def model(request, models) -> PreTrainedModel:
    return models(request.param)


@pytest.fixture
def tiny(models) -> PreTrainedModel:
    return models("llama")


def tokens(model: PreTrainedModel, n: int, *, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, n], none twice in a row.

    In layer 0 the same token has the same key norm wherever it stands, and rounding would decide between its copies.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([2 + torch.randperm(model.config.vocab_size - 2, generator=generator)[:n] for _ in range(batch)])


@contextmanager
def rescored(name, score):
    """Within the block, the policy `name` scores by another function."""
    policy = POLICIES[name]
    POLICIES.remove(name)
    POLICIES.register(name, replace(policy, score=score))
    try:
        yield
    finally:
        POLICIES.remove(name)
        POLICIES.register(name, policy)
