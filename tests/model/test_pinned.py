"""Pinned tokens: decoding is a full forward pass that sees what the spec keeps without them, and them, and no more."""

import dataclasses

import pytest
import torch

from l2kv import CompressedCache, CompressionSpec, SpecError
from tests.support.decoding import IN_CHUNKS, ONE_BY_ONE, decode, kept_sets
from tests.support.models import tokens
from tests.support.oracle import masked_forward

PINNED = (0, 7, 16, 21, 29)  # of the prompt, of its last chunk, and of what comes later


@pytest.mark.parametrize("chunks", [ONE_BY_ONE, IN_CHUNKS], ids=["one by one", "in chunks"])
@pytest.mark.parametrize(
    "spec",
    [
        CompressionSpec(keep_ratio=0.5),
        CompressionSpec(keep_ratio=0.1),
        CompressionSpec(keep_ratio=0.0),
        CompressionSpec(keep_ratio=0.3, policy="high_norm", skip_layers=(1,)),
        CompressionSpec(keep_ratio=0.3, protect_first=1, protect_last=5),
        CompressionSpec(budget=9),
        CompressionSpec(keep_ratio=0.8, schedule="reference", prune_after=14),
        CompressionSpec(keep_ratio=0.4, evict_every=4),
        CompressionSpec(keep_ratio=0.3, head_ratios={(0, 0): 0.9, (2, 1): 0.0}),
    ],
    ids=str,
)
def test_pinned_tokens_are_seen_beside_what_is_kept_without_them(model, spec, chunks):
    ids, spec = tokens(model, sum(chunks)), dataclasses.replace(spec, pinned=PINNED)
    cache = CompressedCache(model.config, spec)
    logits = decode(model, ids, chunks, cache)
    expected, kept = masked_forward(model, ids, chunks, spec)  # the evictions of the spec without them, and they
    assert kept_sets(cache) == kept
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_a_head_that_would_have_evicted_them_holds_that_much_more_and_the_others_nothing(tiny):
    ids, spec = tokens(tiny, 32), CompressionSpec(keep_ratio=0.5)
    without, pinned = (
        CompressedCache(tiny.config, one) for one in (spec, dataclasses.replace(spec, pinned=(3, 5, 8, 13)))
    )
    for cache in (without, pinned):
        decode(tiny, ids, ONE_BY_ONE, cache)
    first = zip(kept_sets(without)[0][0], kept_sets(pinned)[0][0], strict=True)  # the keys of later layers differ
    more = [set(has) - set(had) for had, has in first]
    assert all(set(had) <= set(has) for had, has in zip(kept_sets(without)[0][0], kept_sets(pinned)[0][0], strict=True))
    assert [len(of_head) for of_head in more] == [
        n - m for n, m in zip(pinned.held_by_head[0], without.held_by_head[0], strict=True)
    ]
    assert any(more) and set().union(*more) <= {3, 5, 8, 13}


def test_a_pair_that_is_held_for_being_pinned_does_not_come_back_when_the_budget_grows(tiny):
    """Pinned token 2 is evicted first; 40 tokens later half of them is more than all that was kept then."""
    ids, spec = tokens(tiny, 52), CompressionSpec(keep_ratio=0.25, pinned=(2,))
    cache = CompressedCache(tiny.config, spec)
    decode(tiny, ids, (12, *[1] * 40), cache)
    assert kept_sets(cache) == masked_forward(tiny, ids, (12, *[1] * 40), spec)[1]


@pytest.mark.parametrize("policy", ["random", "streaming", "keydiff", "accumulated", "window", "last_query"])
def test_every_kind_of_policy_keeps_the_pinned(tiny, policy):
    ids = tokens(tiny, 40)
    spec = CompressionSpec(keep_ratio=0.2, policy=policy)
    held = []
    for one in (spec, dataclasses.replace(spec, pinned=(6, 11))):
        cache = CompressedCache(tiny.config, one)
        decode(tiny, ids, (25, *[1] * 15), cache)
        held.append(cache.held_by_head)
        if one.pinned:
            assert all({6, 11} <= set(head) for layer in kept_sets(cache) for head in layer[0])
    assert all(0 <= has - had <= 2 for of_layer in zip(*held, strict=True) for had, has in zip(*of_layer, strict=True))


def test_pinning_nothing_and_pinning_what_is_yet_to_come_change_nothing(tiny):
    ids = tokens(tiny, 20)
    caches = [CompressedCache(tiny.config, CompressionSpec(pinned=pinned)) for pinned in ((), (20, 99))]
    one, other = (decode(tiny, ids, (15, *[1] * 5), cache) for cache in caches)
    assert torch.equal(one, other) and kept_sets(caches[0]) == kept_sets(caches[1])


def test_a_cache_from_a_full_one_pins_as_one_that_the_prompt_is_run_into(tiny):
    from transformers import DynamicCache

    ids, spec = tokens(tiny, 20), CompressionSpec(keep_ratio=0.2, pinned=(4, 9))
    full, run_in = DynamicCache(config=tiny.config), CompressedCache(tiny.config, spec)
    with torch.no_grad():
        tiny(ids, past_key_values=full)
    decode(tiny, ids, (20,), run_in)
    assert kept_sets(CompressedCache.from_full(full, tiny.config, spec)) == kept_sets(run_in)


def test_a_batch_is_refused_since_positions_are_those_of_one_text(tiny):
    cache = CompressedCache(tiny.config, CompressionSpec(pinned=(1,)))
    with pytest.raises(SpecError, match="Pinned tokens are those of one text, got a batch of 2"):
        decode(tiny, tokens(tiny, 12, batch=2), (12,), cache)


def test_in_a_row_that_is_padded_positions_are_those_of_its_text(tiny):
    ids, spec = tokens(tiny, 20), CompressionSpec(keep_ratio=0.2, pinned=(4,))
    cache, mask = CompressedCache(tiny.config, spec), torch.ones(1, 23, dtype=torch.long)
    mask[:, :3] = 0
    padded = torch.cat([ids[:, :3], ids], dim=1)
    from l2kv import compressible

    with compressible(tiny), torch.no_grad():
        tiny(padded, attention_mask=mask, past_key_values=cache, use_cache=True)
    assert all(7 in head for layer in kept_sets(cache) for head in layer[0])


def test_positions_are_checked_sorted_and_each_counted_once():
    assert CompressionSpec(pinned=(n for n in (9, 2, 9))).pinned == (2, 9)
    assert hash(CompressionSpec(pinned=[3])) == hash(CompressionSpec(pinned=(3,))) != hash(CompressionSpec())
    with pytest.raises(SpecError, match="pinned must not be negative"):
        CompressionSpec(pinned=(-1,))
    with pytest.raises(TypeError, match="pinned must be a sequence of positions"):
        CompressionSpec(pinned=3)
