"""Keys of equal norm in a real text, in three dtypes."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from analysis import alr, capture, correlation
from analysis.models.load import LoadedModel
from analysis.ties import levelled, shared_ranks, tolerance
from tests.support.models import build
from tests.support.paths import BUNDLED

DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(scope="module")
def in_three_dtypes():
    """The runs of a model over one text of few tokens that come often, by dtype: as characters do."""
    tokenizer, runs = AutoTokenizer.from_pretrained(BUNDLED), {}
    for dtype in DTYPES:
        model = build("llama", vocab_size=4096, head_dim=32).to(getattr(torch, dtype))
        runs[dtype] = capture(LoadedModel(model, tokenizer, dtype), "the sea and the old man and the boy " * 20)
    return runs


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_layer_0_tokens_are_equal_and_rounding_does_not_rank_them(in_three_dtypes, dtype):
    run = in_three_dtypes[dtype]
    by_token = [np.flatnonzero(run.token_ids == token) for token in np.unique(run.token_ids)]
    ranks = shared_ranks(levelled(run.key_norm[0], run.dtype)).mean(axis=0)
    assert max(len(np.unique(run.key_norm[0, 0, at])) for at in by_token) > 2  # which rounding tells apart
    for head, at in itertools.product(range(2), by_token):
        assert len(np.unique(ranks[head, at])) == 1


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_two_dtypes_of_one_text_agree_in_layer_0(in_three_dtypes, dtype):
    """To the last bit, but for their attention, in the kv head whose tokens both tell apart; nearly, in the other."""
    exact, run = in_three_dtypes["float32"], in_three_dtypes[dtype]
    apart = [np.diff(np.unique(levels)) for levels in levelled(exact.key_norm[0], "float32")]
    assert apart[0].min() < 0.01 < 2 * tolerance("bfloat16") * exact.key_norm[0, 1].min() < apart[1].min()
    same = replace(run, probe_attention=exact.probe_attention)  # of norms alone
    for figure in (alr, correlation):
        np.testing.assert_allclose(figure(same)[0, 3:], figure(exact)[0, 3:], rtol=1e-9)
        np.testing.assert_allclose(figure(same)[0, :3], figure(exact)[0, :3], rtol=0.01)
    np.testing.assert_allclose(alr(run)[0], alr(exact)[0], rtol=0.02)
