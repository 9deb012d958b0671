"""Caches of several specs as one batch: each row is what it is alone, and what the masked full forward pass says."""

import pytest
import torch
from transformers import DynamicCache

from l2kv import (
    POLICIES,
    CompressedCache,
    CompressionSpec,
    SpecError,
    UnsupportedModelError,
    compressible,
    q_filters,
)
from l2kv.cache import cache_nbytes
from l2kv.decoding import prefill
from l2kv.together import CachesTogether, can_run_together
from tests.support.architectures import ARCHITECTURES
from tests.support.models import build, tokens
from tests.support.oracle import masked_forward

PROMPT, TOTAL = 40, 56
STEPS = (3, *[1] * (TOTAL - PROMPT - 3))  # a question at once, and then token by token
SPECIAL = range(0, 160, 7)
DIRECTIONS = (("low", "high"), ("high", "low"), ("high", "low"))
PER_HEAD = {(0, 0): 0.9, (0, 1): 0.2, (2, 1): 0.7}


def every_policy() -> list[CompressionSpec]:
    """Each policy, alone and protected, and with a ratio for each head where it can."""
    specs = []
    for name, policy in POLICIES.items():
        needs = {"directions": DIRECTIONS} if policy.needs_directions else {}
        specs.append(CompressionSpec(0.5, policy=name, **needs))
        specs.append(CompressionSpec(0.3, policy=name, protect_first=2, protect_last=5, skip_layers=(1,), **needs))
        if not policy.ranks_whole_layer:
            specs.append(CompressionSpec(0.4, policy=name, head_ratios=PER_HEAD, protect_last=3, **needs))
    return specs


def assert_same(found, expected):
    """Equal to 2e-5 of the largest logit: products are summed in another order where a batch has more rows."""
    torch.testing.assert_close(found, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


def filled(model, ids, spec) -> CompressedCache:
    """A cache that has read the prompt itself."""
    filters = q_filters(model, ids) if POLICIES[spec.policy].needs_filters else None
    cache = CompressedCache(model.config, spec, filters=filters, special_ids=SPECIAL)
    prefill(model, ids[:, :PROMPT], cache)
    return cache


def decoded(model, ids, cache, steps=STEPS, start=PROMPT):
    """Logits [B, T, V] of what follows."""
    logits = []
    for n in steps:
        logits.append(model(ids[:, start : start + n], past_key_values=cache, use_cache=True).logits)
        start += n
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_every_policy_among_the_others_decodes_as_it_does_alone(name):
    model, specs = build(name), every_policy()
    ids = tokens(model, TOTAL, batch=2)
    with compressible(model), torch.no_grad():
        alone = torch.cat([decoded(model, ids, filled(model, ids, spec)) for spec in specs])
        caches = [filled(model, ids, spec) for spec in specs]
        together = decoded(model, ids.repeat(len(specs), 1), CachesTogether(caches, [2] * len(specs)))
    assert_same(together, alone)
    assert (alone[:2] - alone[2:4]).abs().max() > 1e-2  # the specs do differ


def test_one_recording_pass_serves_every_policy_that_goes_by_attention():
    model = build("llama")
    ids = tokens(model, TOTAL, batch=2)
    specs = [spec for spec in every_policy() if not POLICIES[spec.policy].needs_filters]
    with compressible(model), torch.no_grad():
        full = CompressedCache.recording(model.config, specs)
        prefill(model, ids[:, :PROMPT], full)
        held = cache_nbytes(full, slack=False)
        for spec in specs:
            cache = CompressedCache.from_full(full, model.config, spec, input_ids=ids[:, :PROMPT], special_ids=SPECIAL)
            own = filled(model, ids, spec)
            for layer in range(3):
                for here, there in zip(cache.kept_positions(layer), own.kept_positions(layer), strict=True):
                    assert torch.equal(here, there)
            assert_same(decoded(model, ids, cache), decoded(model, ids, own))
        assert cache_nbytes(full, slack=False) == held  # what it lent was not written to


def test_attention_that_was_not_recorded_is_asked_for():
    model = build("llama")
    ids = tokens(model, TOTAL)
    window, heavy = CompressionSpec(policy="window"), CompressionSpec(policy="accumulated")
    with compressible(model), torch.no_grad():
        full = CompressedCache.recording(model.config, [CompressionSpec(policy="last_query")])
        prefill(model, ids, full)
        for source, spec in ((full, window), (full, heavy), (DynamicCache(config=model.config), heavy)):
            with pytest.raises(SpecError, match=r"needs more than a cache: .* CompressedCache.recording"):
                CompressedCache.from_full(source, model.config, spec)


def test_rows_of_several_specs_are_those_of_full_passes_with_the_evicted_tokens_masked():
    model = build("llama")
    specs = [
        CompressionSpec(0.5),
        CompressionSpec(0.3, policy="high_norm", protect_last=4, skip_layers=(0,)),
        CompressionSpec(0.4, head_ratios=PER_HEAD, protect_first=1),
        CompressionSpec(1.0),
    ]
    ids = tokens(model, TOTAL, batch=2)
    with compressible(model), torch.no_grad():
        caches = CachesTogether([filled(model, ids, spec) for spec in specs], [2] * 4)
        together = decoded(model, ids.repeat(4, 1), caches).unflatten(0, (4, 2))
    for spec, found, cache in zip(specs, together, caches.caches, strict=True):
        expected, kept = masked_forward(model, ids, (PROMPT, *STEPS), spec)
        torch.testing.assert_close(found, expected[:, PROMPT:], atol=1e-4, rtol=1e-4)
        for layer, rows in enumerate(kept):
            held = cache.kept_positions(layer)
            assert [[head[row].tolist() for head in held] for row in range(2)] == rows


@pytest.mark.parametrize(
    "name", ["Gemma 2", "Gemma 3 (text)", "Gemma 3n (text)", "gpt-oss", "GPT-BigCode (one kv head)"]
)
def test_windows_sinks_soft_caps_and_borrowed_keys_are_as_alone(name):
    model = ARCHITECTURES[name].model()
    specs = [CompressionSpec(0.5), CompressionSpec(0.3, policy="accumulated", protect_last=2), CompressionSpec(1.0)]
    ids = tokens(model, TOTAL, batch=2)
    with compressible(model), torch.no_grad():
        full = CompressedCache.recording(model.config, specs)
        prefill(model, ids[:, :PROMPT], full)
        caches = [CompressedCache.from_full(full, model.config, spec) for spec in specs]
        together = decoded(model, ids.repeat(3, 1), CachesTogether(caches, [2] * 3))
        alone = torch.cat([decoded(model, ids, filled(model, ids, spec)) for spec in specs])
    assert_same(together, alone)


def test_rows_that_leave_change_nothing_for_the_others():
    model = build("llama")
    specs = [CompressionSpec(0.5), CompressionSpec(0.3, policy="window", head_ratios=PER_HEAD), CompressionSpec(0.4)]
    ids = tokens(model, TOTAL, batch=3).repeat(3, 1)
    with compressible(model), torch.no_grad():
        alone = torch.cat([decoded(model, ids[:3], filled(model, ids[:3], spec)) for spec in specs])
        caches = CachesTogether([filled(model, ids[:3], spec) for spec in specs], [3] * 3)
        begun = decoded(model, ids, caches, STEPS[:3])
        left, done = [0, 2, 4], PROMPT + sum(STEPS[:3])
        fewer = caches.only(left)
        assert fewer.rows == (2, 1) and fewer.get_seq_length() == done
        rest = decoded(model, ids[left], fewer, STEPS[3:], done)
    assert_same(begun, alone[:, : done - PROMPT])
    assert_same(rest, alone[left, done - PROMPT :])


def test_padded_rows_keep_to_their_own_padding():
    model = build("llama")
    specs = [CompressionSpec(0.5), CompressionSpec(0.4, policy="accumulated")]
    ids = tokens(model, TOTAL, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0

    def run(cache, ids, mask):
        logits, start = [], 0
        for n in (PROMPT, *STEPS):
            shown = {"attention_mask": mask[:, : start + n], "past_key_values": cache, "use_cache": True}
            logits.append(model(ids[:, start : start + n], **shown).logits)
            start += n
        return torch.cat(logits, dim=1)

    with compressible(model), torch.no_grad():
        alone = torch.cat([run(CompressedCache(model.config, spec), ids, mask) for spec in specs])
        caches = CachesTogether([CompressedCache(model.config, spec) for spec in specs], [2, 2])
        together = run(caches, ids.repeat(2, 1), mask.repeat(2, 1))
    real = mask.repeat(2, 1).bool()
    assert_same(together[real], alone[real])


def test_what_cannot_run_together_says_so():
    for name in ("LFM2", "Qwen3-Next"):
        model = ARCHITECTURES[name].model()
        assert not can_run_together(model.config)
        with pytest.raises(UnsupportedModelError, match="running states"):
            CachesTogether([CompressedCache(model.config, CompressionSpec())] * 2, [1, 1])
    model = build("llama")
    assert can_run_together(model.config)
    ids = tokens(model, TOTAL)
    with compressible(model), torch.no_grad():
        read = filled(model, ids, CompressionSpec())
    empty = CompressedCache(model.config, CompressionSpec())
    with pytest.raises(ValueError, match="equally many tokens"):
        CachesTogether([read, empty], [1, 1])
    with pytest.raises(RuntimeError, match="Prepare the model first"), torch.no_grad():
        model(ids, past_key_values=CachesTogether([empty], [1]))
