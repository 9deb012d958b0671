"""Pairs that a layer keeps by norm and at random, without a model."""

import torch

from l2kv import POLICIES, CompressionSpec
from l2kv.layer import CompressedLayer
from l2kv.policies import Pairs
from tests.support.oracle import replay


def test_ties_go_to_the_earlier_position_and_zero_norms_survive():
    """Norms of 0, 1, 2, 3 with many ties, in every cut of the text, against sorted Python lists."""
    norms = torch.randint(0, 4, (2, 3, 40), generator=torch.Generator().manual_seed(1)).float()
    keys = torch.stack([norms, torch.zeros_like(norms)], dim=-1)
    for chunks in ([40], [1] * 40, [7, 1, 1, 20, 11]):
        for policy, sign in (("low_norm", -1), ("high_norm", 1)):
            spec = CompressionSpec(keep_ratio=0.35, policy=policy, protect_last=2)
            layer, start = CompressedLayer(spec, 0), 0
            for chunk in chunks:
                layer.update(keys[:, :, start : start + chunk], keys[:, :, start : start + chunk])
                layer.evict_now()
                start += chunk
            for row in range(2):
                for head in range(3):
                    scores = [sign * x for x in norms[row, head].tolist()]
                    _, kept = replay(scores, chunks, keep_ratio=0.35, protect_last=2)
                    held = layer.positions()[0][row, head]
                    assert sorted(held.tolist()) == kept
                    torch.testing.assert_close(layer.keys[row, head, :, 0], norms[row, head, held])


def test_norms_of_half_precision_keys_are_ranked_in_float32():
    """Keys whose norms differ by less than bfloat16 can tell: 16.0, 16.03, 16.06, ... in a shuffled order."""
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    keys = torch.full((1, 1, 8, 2), 16.0, dtype=torch.bfloat16)
    keys[0, 0, :, 1] = 0.25 * order  # sqrt(16^2 + x^2): all round to 16 in bfloat16 but the last
    layer = CompressedLayer(CompressionSpec(keep_ratio=0.5), 0)
    layer.update(keys, keys)
    layer.evict_now()
    assert sorted(layer.positions()[0][0, 0].tolist()) == sorted((order < 4).nonzero()[:, 0].tolist())


def test_random_scores_are_uniform_and_depend_on_the_seed():
    keys = torch.zeros(1, 4, 20_000, 2)
    one, two = (
        POLICIES["random"].score(Pairs(keys, keys, torch.arange(20_000), 5, (0, 1, 2, 3), seed)) for seed in (0, 1)
    )
    counts = torch.histc(one, bins=10, min=0, max=1) / one.numel()
    assert (counts - 0.1).abs().max() < 0.005
    assert torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1].abs() < 0.02
    assert torch.corrcoef(one).fill_diagonal_(0).abs().max() < 0.03  # between heads
