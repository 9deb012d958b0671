"""What uses the kernels of attention statistics, in Triton's interpreter, against the same by torch."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from analysis import capture
from analysis.models.load import LoadedModel
from l2kv import CompressedCache, CompressionSpec, compressible
from l2kv.kernels import statistics
from tests.support.models import TOKENIZER_VOCABULARY, build
from tests.support.paths import BUNDLED
from tests.support.texts import TEXT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


@pytest.fixture
def calls(monkeypatch):
    """Lengths that the kernels were called for."""
    seen, kernel = [], statistics.attention_statistics

    def counted(query, key, **settings):
        seen.append(query.shape[2])
        return kernel(query, key, **settings)

    monkeypatch.setattr(statistics, "attention_statistics", counted)
    return seen


def test_a_capture_by_kernels_is_that_by_torch(calls, monkeypatch):
    loaded = LoadedModel(build("llama", **TOKENIZER_VOCABULARY), AutoTokenizer.from_pretrained(BUNDLED), "llama")
    by = {}
    for way in ("torch", "triton"):
        monkeypatch.setenv("L2KV_KERNELS", way)
        by[way] = capture(loaded, (TEXT * 2)[:700])
    n = by["torch"].n_tokens
    assert calls == [n] * by["torch"].n_layers and by["torch"].tokens_per_bin > 1
    for field in ("attention_received", "probe_attention", "recent_attention", "pooled_scale", "key_norm"):
        np.testing.assert_allclose(getattr(by["triton"], field), getattr(by["torch"], field), atol=1e-5)
    steps = by["triton"].pooled_attention.astype(int) - by["torch"].pooled_attention
    assert abs(steps).max() <= 1  # where a share is on the edge of two of 256 steps


def test_what_accumulated_attention_evicts_is_the_same_by_kernels(calls, monkeypatch):
    model = build("llama")
    ids = torch.arange(2, 92)[None]
    kept = {}
    for way in ("torch", "triton"):
        monkeypatch.setenv("L2KV_KERNELS", way)
        cache = CompressedCache(model.config, CompressionSpec(keep_ratio=0.5, policy="accumulated"))
        with compressible(model), torch.no_grad():
            model(ids, past_key_values=cache)
        kept[way] = [[head.tolist() for head in cache.kept_positions(layer)] for layer in range(len(cache.layers))]
    assert calls == [90] * len(cache.layers)
    assert kept["torch"] == kept["triton"]
