"""Policies: each against the rule of its paper, reworked with lists and loops; and their other properties."""

import math
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from analysis.models.load import load_model
from l2kv import (
    POLICIES,
    CompressedCache,
    CompressionSpec,
    SpecError,
    compressible,
    l2_compress,
    q_filters,
    special_ids,
)
from l2kv.layer import CompressedLayer
from l2kv.policies import Pairs
from l2kv.probabilities import normalised
from tests.support.models import build, tokens
from tests.support.oracle import attending, replay, target

ONE_BY_ONE = (36, *[1] * 8)
IN_CHUNKS = (34, 5, 1, 4, 1, 3, 1)
SPECIAL = range(0, 160, 7)  # token ids
DIRECTIONS = (("low", "high", "low"), ("high", "high", "low"), ("high", "low", "low"))
WITHOUT_ATTENTION = [name for name, policy in POLICIES.items() if not policy.needs_attention]
WITH_ATTENTION = [name for name, policy in POLICIES.items() if policy.needs_attention]


# The rules, on plain lists. A rule takes a head, and gives the scores, by position, of those held when `seen` were fed.


@dataclass
class Head:
    """One kv head over the whole text: keys [T][D], and the attention scores [T][T] of its query heads, unmasked."""

    layer: int
    index: int
    keys: list
    logits: list
    logits_of_layer: list
    spec: CompressionSpec
    filter: list | None
    ids: list
    values: list


def norm(vector):
    return math.sqrt(math.fsum(x * x for x in vector))


def attention(logits, query, held):
    """What one query gives to each of those held that do not come after it; what is gone takes no part."""
    visible = [p for p in held if p <= query]
    top = max((logits[query][p] for p in visible), default=0.0)
    weights = {p: math.exp(logits[query][p] - top) for p in visible}
    total = math.fsum(weights.values())
    return {p: weight / total for p, weight in weights.items()}


def rule_of_low_norm(head):
    return lambda held, seen: {p: -norm(head.keys[p]) for p in held}


def rule_of_high_norm(head):
    return lambda held, seen: {p: norm(head.keys[p]) for p in held}


def rule_of_signed_norm(head):
    return {"low": rule_of_low_norm, "high": rule_of_high_norm}[head.spec.directions[head.layer][head.index]](head)


def rule_of_random(head):
    def lowbias32(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    def score(p):
        of_head = lowbias32((lowbias32(p + 1) + head.index + 1) % 2**32)
        salt = (head.layer + 1) * 0x10001 + head.spec.seed * 0x1000003
        return lowbias32((of_head + salt) % 2**32) % 2**24

    return lambda held, seen: {p: score(p) for p in held}


def rule_of_streaming(head):
    return lambda held, seen: {p: 10**9 - p if p < 4 else p for p in held}


def rule_of_fastgen(head):
    return lambda held, seen: {p: 10**9 - p if head.ids[p] in SPECIAL else p for p in held}


def rule_of_keydiff(head):
    units = [[x / norm(key) for x in key] for key in head.keys]

    def scores(held, seen):
        anchor = [math.fsum(units[p][d] for p in held) / len(held) for d in range(len(units[0]))]
        return {p: -math.fsum(a * x for a, x in zip(anchor, units[p], strict=True)) / norm(anchor) for p in held}

    return scores


def rule_of_q_filters(head):
    return lambda held, seen: {
        p: math.fsum(f * x for f, x in zip(head.filter, head.keys[p], strict=True)) for p in held
    }


def rule_of_accumulated(head):
    received, counted = {}, 0

    def scores(held, seen):
        nonlocal counted
        for query in range(counted, seen):
            for logits in head.logits:
                for p, weight in attention(logits, query, held).items():
                    received[p] = received.get(p, 0.0) + weight
        counted = seen
        return received

    return scores


def rule_of_q_hitter(head):
    attention_so_far = rule_of_accumulated(head)
    ranges = [{p: max(x) - min(x) for p, x in enumerate(vectors)} for vectors in (head.keys, head.values)]

    def scaled(numbers, held):
        low, high = min(numbers[p] for p in held), max(numbers[p] for p in held)
        return {p: (numbers[p] - low) / (high - low) if high > low else 0.0 for p in held}

    def scores(held, seen):
        received = scaled(attention_so_far(held, seen), held)
        of_keys, of_values = (scaled(of_each, held) for of_each in ranges)
        return {p: received[p] + 1 - (of_keys[p] + of_values[p]) / 2 for p in held}

    return scores


def rule_of_window(head):
    def smoothed(votes, text):
        near = [[votes[p] for p in text[max(0, i - 2) : i + 3]] for i in range(len(text))]
        return {p: math.fsum(votes) / 5 for p, votes in zip(text, near, strict=True)}

    def scores(held, seen):
        votes = dict.fromkeys(held, 0.0)
        for query in range(max(0, seen - 32), seen):
            for logits in head.logits:
                for p, weight in attention(logits, query, held).items():
                    votes[p] += weight
        prefix, recent = [p for p in held if p < seen - 32], [p for p in held if p >= seen - 32]
        return smoothed(votes, prefix) | smoothed(votes, recent)

    return scores


def rule_of_last_query(head):
    def scores(held, seen):
        rows = [attention(logits, seen - 1, held) for logits in head.logits_of_layer]
        return {p: math.fsum(row[p] for row in rows) / len(rows) for p in held}

    return scores


RULES = {name.removeprefix("rule_of_"): rule for name, rule in globals().items() if name.startswith("rule_of_")}


def by_the_rule(model, ids, chunks, spec, filters=None):
    """Logits [B, T, V] and kept[layer][row][kv head], by one full forward pass that hides what the rule evicted."""
    kept = []

    def masked(module, query, key, value, mask, scaling=None, **_):
        layer, (batch, kv_heads) = module.layer_idx, key.shape[:2]
        key, value = (x.repeat_interleave(query.shape[1] // kv_heads, dim=1) for x in (key, value))
        scores = query @ key.transpose(-1, -2) * scaling
        hide = torch.full_like(scores, -torch.inf)
        groups = [
            range(h, h + query.shape[1] // kv_heads) for h in range(0, query.shape[1], query.shape[1] // kv_heads)
        ]
        rows = []
        for b in range(batch):
            logits, of_row, heads = scores[b].tolist(), ids[b].tolist(), []
            for h, group in enumerate(groups):
                ratio, budget = target(spec, layer, h)
                of_filter = None if filters is None else filters[layer, h].tolist()
                head = Head(
                    layer,
                    h,
                    key[b, group[0]].tolist(),
                    [logits[g] for g in group],
                    logits,
                    spec,
                    of_filter,
                    of_row,
                    value[b, group[0]].tolist(),
                )
                visible, held = replay(
                    RULES[spec.policy](head),
                    chunks,
                    keep_ratio=ratio,
                    budget=budget,
                    evict_every=spec.evict_every,
                    protect_first=spec.protect_first,
                    protect_last=spec.protect_last,
                    skipped=layer in spec.skip_layers,
                )
                hide[b, group.start : group.stop].masked_fill_(torch.tensor(visible), 0.0)
                heads.append(held)
            rows.append(heads)
        kept.append(rows)
        return ((scores + hide).softmax(-1) @ value).transpose(1, 2), None

    with attending(model, masked), torch.no_grad():
        logits = model(ids, use_cache=False).logits
    return logits, kept


def decode(model, ids, chunks, cache):
    logits = []
    with compressible(model), torch.no_grad():
        for chunk in ids.split(chunks, dim=1):
            logits.append(model(chunk, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


def kept_sets(cache):
    """As `by_the_rule` has them."""
    layers = [cache.kept_positions(i) for i in range(len(cache))]
    return [[[head[row].tolist() for head in heads] for row in range(len(heads[0]))] for heads in layers]


@pytest.fixture(scope="module")
def gqa():
    """A Llama of 3 layers with 3 kv heads of 2 query heads each."""
    return build("llama", num_key_value_heads=3)


@pytest.fixture(scope="module")
def filters(gqa):
    return q_filters(gqa, tokens(gqa, 60, seed=9))


RATIOS = {(0, 0): 0.3, (0, 1): 0.6, (0, 2): 0.9, (1, 1): 0.2, (2, 0): 0.7, (2, 1): 0.5, (2, 2): 0.7}
AS_PUBLISHED = {  # the recent tokens that a paper keeps besides
    "accumulated": {"budget": 16, "protect_last": 8},
    "window": {"budget": 37, "protect_last": 32},
}
CASES = [
    pytest.param(name, options, id=f"{name}, {about}")
    for name, policy in POLICIES.items()
    for about, options in {
        "one ratio": {"keep_ratio": 0.4},
        "next to nothing": {"budget": 3},
        "as published": AS_PUBLISHED.get(name),
        "seldom and protected": {"budget": 13, "evict_every": 4, "protect_first": 1, "protect_last": 3},
        "a ratio per head": None if policy.ranks_whole_layer else {"head_ratios": RATIOS, "skip_layers": (1,)},
    }.items()
    if options
]


def spec_of(name, **options):
    return CompressionSpec(policy=name, directions=DIRECTIONS if name == "signed_norm" else None, seed=7, **options)


def test_every_policy_has_a_rule_to_be_held_against():
    assert set(RULES) == set(POLICIES)


@pytest.mark.parametrize("chunks", [ONE_BY_ONE, IN_CHUNKS], ids=["one by one", "in chunks"])
@pytest.mark.parametrize("name,options", CASES)
def test_a_policy_keeps_what_its_paper_says_and_decodes_as_if_the_rest_were_masked(gqa, filters, name, options, chunks):
    spec, ids = spec_of(name, **options), tokens(gqa, sum(chunks), batch=2)
    cache = CompressedCache(gqa.config, spec, filters=filters, special_ids=SPECIAL)
    logits = decode(gqa, ids, chunks, cache)
    expected, kept = by_the_rule(gqa, ids, chunks, spec, filters)
    assert kept_sets(cache) == kept
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_attention_worked_out_in_blocks_adds_up_to_the_same(gqa, monkeypatch):
    monkeypatch.setattr("l2kv.layer.QUERIES", 7)
    spec, ids = spec_of("accumulated", budget=9), tokens(gqa, sum(IN_CHUNKS))
    cache = CompressedCache(gqa.config, spec)
    decode(gqa, ids, IN_CHUNKS, cache)
    assert kept_sets(cache) == by_the_rule(gqa, ids, IN_CHUNKS, spec)[1]


@pytest.mark.parametrize("name", POLICIES)
def test_rows_that_change_places_half_way_go_on_as_they_would_have(gqa, filters, name):
    """As beams do: with all that a policy remembers of them."""
    ids, caches = tokens(gqa, 44, batch=2), []
    for first in (ids, ids.flip(0)):
        caches.append(CompressedCache(gqa.config, spec_of(name, keep_ratio=0.5), filters=filters, special_ids=SPECIAL))
        decode(gqa, first[:, :30], (26, 4), caches[-1])
    caches[0].reorder_cache(torch.tensor([1, 0]))
    for cache in caches:
        decode(gqa, ids.flip(0)[:, 30:], (1, 6, 1, 6), cache)
    assert kept_sets(caches[0]) == kept_sets(caches[1])


def test_no_two_policies_keep_the_same(gqa, filters):
    """Else the tests above could not tell them apart."""
    kept = []
    for name in POLICIES:
        cache = CompressedCache(gqa.config, spec_of(name), filters=filters, special_ids=SPECIAL)
        decode(gqa, tokens(gqa, 44), (44,), cache)
        kept.append(str(kept_sets(cache)))
    assert len(set(kept)) == len(POLICIES)


@pytest.mark.parametrize("name", POLICIES)
def test_with_the_same_evictions_it_does_not_matter_how_the_text_is_cut(gqa, filters, name):
    ids, kept = tokens(gqa, 40), []
    for chunks in ((20, 20), (11, 9, 1, 12, 7), (4, 1, 6, 1, 8, 3, 1, 1, 15)):
        cache = CompressedCache(
            gqa.config, spec_of(name, keep_ratio=0.3, evict_every=20), filters=filters, special_ids=SPECIAL
        )
        decode(gqa, ids, chunks, cache)
        kept.append(kept_sets(cache))
    assert kept[0] == kept[1] == kept[2]


def pairs_of(name, total=50):
    """Random pairs of 3 kv heads of 2 rows, in no order, with all that the policy needs."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    policy = POLICIES[name]
    positions = torch.stack([torch.randperm(total, generator=generator) for _ in range(6)]).view(2, 3, total)
    return Pairs(
        keys=draw(2, 3, total, 8),
        values=draw(2, 3, total, 8),
        positions=positions,
        layer_idx=1,
        heads=(0, 1, 2),
        seed=7,
        directions=DIRECTIONS[1],
        filters=draw(3, 8),
        special=draw(2, 3, total) > 1 if policy.needs_token_ids else None,
        received=draw(2, 3, total).abs() if policy.needs_received else None,
        last_rows=draw(2, 3, 2, policy.needs_rows, total).abs() if policy.needs_rows else None,
    )


def part(pairs, *, heads=slice(None), slots=slice(None)):
    """Some heads and some slots of pairs."""
    return replace(
        pairs,
        keys=pairs.keys[:, heads, slots],
        values=pairs.values[:, heads, slots],
        positions=pairs.positions[:, heads, slots],
        heads=pairs.heads[heads],
        directions=pairs.directions[heads],
        filters=pairs.filters[heads],
        special=None if pairs.special is None else pairs.special[:, heads, slots],
        received=None if pairs.received is None else pairs.received[:, heads, slots],
        last_rows=None if pairs.last_rows is None else pairs.last_rows[:, heads, :, :, slots],
    )


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.on_arrival])
def test_a_score_given_on_arrival_is_of_the_pair_alone_to_the_last_bit(name):
    pairs, score = pairs_of(name), POLICIES[name].score
    whole = score(pairs)
    cuts = [score(part(pairs, slots=slots)) for slots in (slice(0, 17), slice(17, 18), slice(18, 50))]
    assert torch.equal(torch.cat(cuts, dim=-1), whole)


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if not policy.ranks_whole_layer])
def test_a_head_is_scored_the_same_alone_and_among_others(name):
    pairs, score = pairs_of(name), POLICIES[name].score
    alone = [score(part(pairs, heads=slice(h, h + 1))) for h in range(3)]
    torch.testing.assert_close(torch.cat(alone, dim=1), score(pairs), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", POLICIES)
def test_scores_are_float32_one_per_pair_and_follow_the_pairs_wherever_they_are_stored(name):
    pairs, score = pairs_of(name), POLICIES[name].score
    scores = score(pairs)
    assert scores.dtype == torch.float32 and scores.expand(2, 3, 50).shape == (2, 3, 50)
    assert POLICIES[name].score(replace(pairs, keys=pairs.keys.bfloat16())).dtype == torch.float32
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(score(part(pairs, slots=shuffled)), scores[..., shuffled], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", POLICIES)
def test_what_a_row_is_padded_with_changes_no_score(name):
    """Padding has negative positions, and gets no attention."""
    pairs = pairs_of(name)
    padded = replace(pairs, positions=pairs.positions - 7)
    padding = padded.positions < 0
    if pairs.received is not None:
        padded = replace(padded, received=pairs.received.masked_fill(padding, 0.0))
    if pairs.last_rows is not None:
        padded = replace(padded, last_rows=pairs.last_rows.masked_fill(padding[:, :, None, None], 0.0))
    if POLICIES[name].ranks_whole_layer:  # the same slots in all heads
        padding = padding[:, :1].expand(2, 3, 50)
        padded = replace(padded, positions=padded.positions[:, :1].expand(2, 3, 50))
    for row in range(2):
        for head in range(3):
            slots = (~padding[row, head]).nonzero()[:, 0]
            alone = part(padded, slots=slots)
            scores, expected = (POLICIES[name].score(p).expand(2, 3, -1)[row, head] for p in (padded, alone))
            torch.testing.assert_close(scores[slots], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_says_in_a_line_what_it_keeps(name):
    about = POLICIES[name].about
    assert about.startswith("Keep ") and about.rstrip(".)") and about.endswith(".") and len(about) <= 120
    assert "\n" not in about


# What each costs: attention only where a policy says that it needs it.


def forbid_attention(monkeypatch):
    def refuse(*_):
        raise AssertionError("attention was worked out")

    for module in [m for name, m in sys.modules.items() if name.split(".")[0] == "l2kv"]:
        if getattr(module, "normalised", None) is normalised:
            monkeypatch.setattr(module, "normalised", refuse)


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
def test_a_policy_that_needs_no_attention_has_none_worked_out(gqa, filters, name, monkeypatch):
    forbid_attention(monkeypatch)
    cache = CompressedCache(gqa.config, spec_of(name, head_ratios=RATIOS), filters=filters, special_ids=SPECIAL)
    decode(gqa, tokens(gqa, 44), IN_CHUNKS[:4], cache)
    assert cache.held == (40, 22, 31)


@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_a_policy_that_needs_attention_has_it_worked_out(gqa, name, monkeypatch):
    forbid_attention(monkeypatch)
    with pytest.raises(AssertionError, match="worked out"):
        decode(gqa, tokens(gqa, 44), (44,), CompressedCache(gqa.config, spec_of(name)))


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
def test_a_policy_that_needs_no_attention_runs_with_flash_attention_alone(name, device):
    """A flash kernel takes no mask and gives no weights, and any other is forbidden here."""
    model = build("llama", num_key_value_heads=3, head_dim=16).to(device, torch.bfloat16)
    ids = tokens(model, 44).to(device)
    found = q_filters(model, ids)
    for options in ({"keep_ratio": 0.5}, {"head_ratios": RATIOS}):
        cache = CompressedCache(model.config, spec_of(name, **options), filters=found, special_ids=SPECIAL)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            logits = decode(model, ids, (40, 1, 1, 1, 1), cache)
        assert logits.isfinite().all() and cache.held == ((22,) * 3 if "keep_ratio" in options else (40, 22, 31))


# What is refused.


def test_a_policy_that_was_measured_on_a_model_asks_for_what_was_measured(gqa, filters):
    with pytest.raises(ValueError, match="signed_norm needs directions"):
        CompressionSpec(policy="signed_norm")
    with pytest.raises(ValueError, match=r"directions must be 3 rows .* of 3"):
        CompressedCache(gqa.config, CompressionSpec(policy="signed_norm", directions=DIRECTIONS[:2]))
    with pytest.raises(ValueError, match=r"directions must be 3 rows .* of 3"):
        CompressedCache(gqa.config, CompressionSpec(policy="signed_norm", directions=[["low"] * 3, ["low"], ["low"]]))
    with pytest.raises(ValueError, match="each of directions must be one of low, high, got 'up'"):
        CompressionSpec(policy="signed_norm", directions=[["up"]])
    with pytest.raises(ValueError, match=r"q_filters needs filters of shape \[3, 3, .*got none.*q_filters\(model"):
        CompressedCache(gqa.config, CompressionSpec(policy="q_filters"))
    for wrong in (filters[:2], filters[:, :2], filters[0], filters[..., 0]):
        with pytest.raises(ValueError, match=r"needs filters of shape \[3, 3, .*got some of shape \["):
            CompressedCache(gqa.config, CompressionSpec(policy="q_filters"), filters=wrong)
    with pytest.raises(ValueError, match=r"filters .*got some of shape \["):
        narrow = CompressedCache(gqa.config, CompressionSpec(policy="q_filters"), filters=filters[..., :5])
        decode(gqa, tokens(gqa, 9), (9,), narrow)


def test_one_order_for_a_whole_layer_refuses_a_ratio_per_head(gqa):
    with pytest.raises(ValueError, match=r"last_query ranks all heads of a layer together.*layer 1"):
        decode(gqa, tokens(gqa, 9), (9,), CompressedCache(gqa.config, spec_of("last_query", head_ratios={(1, 0): 0.2})))
    same = {(1, 0): 0.2, (1, 1): 0.2, (1, 2): 0.2}
    cache = CompressedCache(gqa.config, spec_of("last_query", head_ratios=same))
    decode(gqa, tokens(gqa, 10), (10,), cache)
    assert cache.held == (5, 2, 5)


@pytest.mark.parametrize("name", POLICIES)
def test_compressing_a_cache_once_refuses_what_a_cache_alone_cannot_tell(gqa, name):
    with torch.no_grad():
        given = gqa(tokens(gqa, 20), past_key_values=DynamicCache(config=gqa.config)).past_key_values
    policy = POLICIES[name]
    if policy.needs_attention or policy.needs_calibration or policy.needs_token_ids:
        with pytest.raises(ValueError, match=name):
            l2_compress(given, policy=name)
    else:
        assert l2_compress(given, policy=name).held == (10, 10, 10)


# Token ids.


def test_which_tokens_are_special_survives_generate_in_chunks_and_beams(gqa):
    """As `rule_of_fastgen` has it, of the text that was generated, whatever the cache was told when."""
    ids, spec = tokens(gqa, 21, batch=2), CompressionSpec(budget=9, policy="fastgen")
    caches = [CompressedCache(gqa.config, spec, special_ids=SPECIAL) for _ in range(2)]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    with compressible(gqa):
        chunked = gqa.generate(ids, past_key_values=caches[0], prefill_chunk_size=8, **options)
        searched = gqa.generate(ids, past_key_values=caches[1], num_beams=3, num_return_sequences=3, **options)
    for text, cache, beams in ((chunked, caches[0], 1), (searched, caches[1], 3)):
        assert len(cache.kept_positions(0)[0]) == 2 * beams
        kept = {tuple(row) for head in cache.kept_positions(1) for row in head.tolist()}
        of_texts = set()
        for row in text.tolist():
            score = {p: 10**9 - p if row[p] in SPECIAL else p for p in range(26)}
            of_texts.add(tuple(sorted(sorted(score, key=score.__getitem__)[-9:])))
        assert of_texts <= kept and (kept == of_texts or beams > 1)


def test_a_full_cache_with_its_ids_is_as_if_they_had_been_run_in(gqa):
    ids, spec = tokens(gqa, 40, batch=2), CompressionSpec(keep_ratio=0.4, policy="fastgen", head_ratios=RATIOS)
    live = CompressedCache(gqa.config, spec, special_ids=SPECIAL)
    decode(gqa, ids[:, :30], (30,), live)
    with torch.no_grad():
        full = gqa(ids[:, :30], past_key_values=DynamicCache(config=gqa.config)).past_key_values
    made = CompressedCache.from_full(full, gqa.config, spec, input_ids=ids[:, :30], special_ids=SPECIAL)
    for cache in (live, made):
        decode(gqa, ids[:, 30:], (1, 6, 3), cache)
    assert kept_sets(made) == kept_sets(live)


def test_a_policy_that_goes_by_token_ids_asks_for_them(gqa):
    spec, ids = CompressionSpec(policy="fastgen"), tokens(gqa, 9)
    with pytest.raises(SpecError, match=r"fastgen .*special_ids=special_ids\(tokenizer\)"):
        CompressedCache(gqa.config, spec)
    cache = CompressedCache(gqa.config, spec, special_ids=SPECIAL)
    with pytest.raises(SpecError, match="give input_ids"), compressible(gqa):
        gqa(inputs_embeds=gqa.get_input_embeddings()(ids), past_key_values=cache)
    decode(gqa, ids, (9,), cache)  # the cache is as it was
    assert cache.held == (5, 5, 5)
    with torch.no_grad():
        full = gqa(ids, past_key_values=DynamicCache(config=gqa.config)).past_key_values
    for given, said in ((None, "give input_ids"), (ids[:, 1:], r"of shape \[1, 9\], got \[1, 8\]")):
        with pytest.raises(SpecError, match=said):
            CompressedCache.from_full(full, gqa.config, spec, input_ids=given, special_ids=SPECIAL)


def test_special_ids_are_special_tokens_and_punctuation_alone():
    tokenizer = load_model("books-5m").tokenizer
    texts = {token: tokenizer.decode([token]) for token in special_ids(tokenizer)}
    assert set(tokenizer.all_special_ids) <= set(texts)
    of_text = {text.strip() for token, text in texts.items() if token not in tokenizer.all_special_ids}
    assert {".", ",", "?", "!", ";"} <= of_text
    assert not any(character.isalnum() or character.isspace() for text in of_text for character in text)


# Calibration.


def test_filters_are_the_mean_direction_of_the_queries_of_each_group(gqa):
    """By an eigendecomposition of the queries' second moments, in float64."""
    ids, queries = tokens(gqa, 40, batch=2), {}

    def look(module, query, key, value, mask, scaling=None, **_):
        queries[module.layer_idx] = query.double().transpose(0, 1).flatten(1, 2).numpy()  # [H, B * T, D]
        key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
        hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)
        weights = (query @ key.transpose(-1, -2) * scaling).masked_fill(hidden, -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2), None

    with attending(gqa, look), torch.no_grad():
        gqa(ids, use_cache=False)
    found = q_filters(gqa, ids)
    assert found.shape == (3, 3, 8) and found.dtype == torch.float32
    for layer in range(3):
        for kv_head in range(3):
            directions = []
            for of_head in queries[layer][2 * kv_head : 2 * kv_head + 2]:
                direction = np.linalg.eigh(of_head.T @ of_head).eigenvectors[:, -1]
                directions.append(direction * np.sign((of_head @ direction).mean()))
            np.testing.assert_allclose(found[layer, kv_head], np.mean(directions, axis=0), atol=2e-4)


def test_keys_that_point_where_the_queries_do_stay():
    """The paper's claim: the projection on the filter orders keys as the queries' mean attention scores do."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(200, 8, generator=generator) * 0.3 + torch.tensor([3.0, *[0.0] * 7])
    keys = torch.randn(1, 1, 30, 8, generator=generator)
    layer = CompressedLayer(CompressionSpec(keep_ratio=0.5, policy="q_filters"), 0, torch.eye(8)[:1])
    layer.update(keys, keys)
    layer.evict_now()
    liked = (queries @ keys[0, 0].T).mean(0).topk(15).indices.tolist()
    assert len(set(layer.kept_positions()[0][0].tolist()) & set(liked)) >= 13
