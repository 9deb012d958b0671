"""Models of a known shape with random weights, caches filled with random pairs, and what memory bandwidth allows.

Right for time and memory, never for quality. Weights and pairs are drawn on the device itself, and caches are filled
layer by layer, so that at most one layer's pairs are there twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    StaticCache,
)

from l2kv import CompressedCache, CompressionSpec
from l2kv.config import CacheShape


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    tied: bool = False

    def config(self, positions: int) -> LlamaConfig:
        """Config for texts of up to `positions` tokens."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=positions,
            tie_word_embeddings=self.tied,
            eos_token_id=None,
            attn_implementation="sdpa",
        )


SMOLLM2 = Shape("SmolLM2-135M", 30, 576, 9, 3, 64, 1536, 49152, tied=True)
LLAMA_8B = Shape("Llama-3-8B", 32, 4096, 32, 8, 128, 14336, 128256)
LLAMA_70B_PART = Shape("Llama-3-70B, 8 of its 80 layers", 8, 8192, 64, 8, 128, 28672, 128256)
TINY = Shape("tiny", 2, 64, 4, 2, 16, 96, 4096)
POSITIONS = 2**18


def random_model(shape: Shape, device: torch.device) -> PreTrainedModel:
    """Build a model with random weights on a device: bfloat16, or float32 on a CPU."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(shape.config(POSITIONS), dtype=dtype)
    return model.eval().requires_grad_(False)


def weight_bytes(model: PreTrainedModel) -> int:
    """Number of bytes of weights that a decoding step reads: of an embedding that is not tied, a row or two."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    every = sum(weight.nbytes for weight in model.parameters())  # a tied one is counted once
    return every if embedding is head else every - embedding.nbytes


def kv_bytes(config: PretrainedConfig, n_tokens: int, *, rows: int = 1, itemsize: int = 2) -> int:
    """Number of bytes of the keys and values of `n_tokens` in each of so many rows."""
    return rows * CacheShape.of(config, itemsize).nbytes(n_tokens)


def bound_seconds(weights: int, pairs: int, bandwidth: float) -> float:
    """Time of a decoding step that does nothing but read weights and pairs (bytes) at `bandwidth` bytes/s."""
    return (weights + pairs) / bandwidth


def bandwidth(device: torch.device, nbytes: int = 4 * 2**30) -> float:
    """Measure memory bandwidth by a large copy, in bytes/s read and written."""
    source = torch.ones(nbytes // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, repeats=5)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Measure the time of some work, from a device that has nothing to do to one that has it done."""
    _wait_for(device)
    started = time.perf_counter()
    work()
    _wait_for(device)
    return time.perf_counter() - started


def median_seconds(
    work: Callable[[], object], device: torch.device, *, repeats: int = 3, warm_up: bool = True
) -> float:
    """Measure the median time of some work, after one that does not count."""
    if warm_up:
        work()
    return median(seconds(work, device) for _ in range(repeats))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def dynamic(model: PreTrainedModel, n_tokens: int, rows: int) -> Cache:
    """Make a DynamicCache of so many random pairs."""
    return _filled(DynamicCache(config=model.config), model, n_tokens, rows)


def static(model: PreTrainedModel, n_tokens: int, rows: int, *, room: int) -> Cache:
    """Make a StaticCache of so many random pairs, and `room` for more."""
    return _filled(StaticCache(config=model.config, max_cache_len=n_tokens + room), model, n_tokens, rows)


def compressed(model: PreTrainedModel, n_tokens: int, rows: int, spec: CompressionSpec) -> Cache:
    """Make a CompressedCache as so many random pairs leave it."""
    return _filled(CompressedCache(model.config, spec), model, n_tokens, rows)


def head_plan(shape: Shape, mean: float) -> dict[tuple[int, int], float]:
    """Keep ratios of single heads, from half the mean to one and a half; the order differs by layer."""
    steps = [mean * (0.5 + head / (shape.kv_heads - 1)) for head in range(shape.kv_heads)]
    return {(i, h): steps[(h + i) % shape.kv_heads] for i in range(shape.layers) for h in range(shape.kv_heads)}


def _filled(cache: Cache, model: PreTrainedModel, n_tokens: int, rows: int) -> Cache:
    """Fill a cache without running the model: random pairs, as a prompt would leave them."""
    shape = CacheShape.of(model.config, model.dtype.itemsize)
    torch.manual_seed(0)
    for layer in cache.layers:
        keys, values = (
            torch.randn(rows, shape.n_kv_heads, n_tokens, shape.head_dim, dtype=model.dtype, device=model.device)
            for _ in range(2)
        )
        layer.update(keys, values)
        if isinstance(cache, CompressedCache):
            layer.unattended = False
            layer.evict_now()
    return cache


def random_token(model: PreTrainedModel, rows: int) -> Tensor:
    """Tokens to begin with, [rows, 1]."""
    return torch.randint(5, model.config.vocab_size, (rows, 1), device=model.device)
