"""Batches of rows that differ in length, padded on the left: each row must go on as if it were alone."""

import copy
import itertools
import math

import pytest
import torch
from transformers import DynamicCache

from l2kv import POLICIES, CompressedCache, CompressionSpec, compressible, l2_compress, q_filters
from l2kv.hooks import attention_hook
from tests.support.architectures import ARCHITECTURES
from tests.support.decoding import IN_CHUNKS, ONE_BY_ONE
from tests.support.oracle import attending, target

PAD = 1  # any token: nobody looks at it
SPECIAL = range(0, 160, 7)  # token ids
PADDED = (0, 5, 13, 19)  # tokens before each row's text; with 19, the first chunk of IN_CHUNKS is all padding
TOTAL = sum(ONE_BY_ONE)
UNIFORM = {"keep_ratio": 0.4}
PER_HEAD = {"keep_ratio": 0.7, "head_ratios": {(0, 0): 0.2, (1, 1): 0.9, (2, 0): 0.1, (2, 1): 0.5}}
ALL_OF_IT = {"budget": 10**6, "head_ratios": {(0, 0): 1.0, (1, 1): 1.0}}  # two groups a layer, both whole
_models = {}


@pytest.fixture(params=["Llama", "Qwen3", "GPT-2"])  # GPT-2: a wrong position shows, where rotary hides a shift
def model(request):
    return built(request.param)


@pytest.fixture
def llama():
    return built("Llama")


def built(name):
    if name not in _models:
        _models[name] = ARCHITECTURES[name].model()
    return _models[name]


def padded(model, padding=PADDED, total=TOTAL):
    """(ids [B, total], attention_mask [B, total]) of random rows: no token twice in a row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([2 + torch.randperm(model.config.vocab_size - 2, generator=generator)[:total] for _ in padding])
    mask = torch.ones_like(ids)
    for row, length in enumerate(padding):
        ids[row, :length], mask[row, :length] = PAD, 0
    return ids, mask


def decode(model, ids, mask, chunks, cache):
    """Logits [B, T, V] of the chunks fed one after the other."""
    position_ids = (mask.cumsum(dim=1) - 1).clamp_min(0)
    start, logits = cache.get_seq_length(), []
    with compressible(model), torch.no_grad():
        for chunk in chunks:
            new, start = slice(start, start + chunk), start + chunk
            logits.append(
                model(
                    ids[:, new],
                    attention_mask=mask[:, :start],
                    position_ids=position_ids[:, new],
                    past_key_values=cache,
                ).logits
            )
    return torch.cat(logits, dim=1)


def alone(model, text, padding, chunks, spec):
    """Logits [T, V] of one row without its padding, in one full forward pass where the evicted are masked, and
    kept[layer][kv head]: {position in the padded row}. `chunks` are of the padded row, and so are the counts.
    """
    kept = {}

    def replay(spec, ratio, norms, weights):
        """`weights(query, keys) -> {key: attention}`, all by their position in the padded row."""
        seen, held, visible = 0, [], {}
        received = dict.fromkeys(range(padding + len(text)), 0.0)
        for chunk in chunks:
            for query in range(max(seen, padding), seen + chunk):
                visible[query] = [p for p in [*held, *range(seen, query + 1)] if p >= padding]
                for key, weight in weights(query, visible[query]).items():
                    received[key] += weight
            held, seen = [*held, *range(seen, seen + chunk)], seen + chunk
            score = received if spec.policy == "accumulated" else {p: -norms[p - padding] for p in held if p >= padding}
            first, last = spec.protect_first, spec.protect_last
            safe = [p for p in held if padding <= p < padding + first or p >= seen - last]
            count = max(math.ceil(round(ratio * seen, 9)), min(first + last, seen))
            held = sorted(held, key=lambda p: (p not in safe, p < padding, p >= padding and -score[p], p))[:count]
        return visible, set(held)

    def attention(module, query, key, value, mask, scaling=None, **_):
        kv_heads, _, width = key.shape[1:]
        group = query.shape[1] // kv_heads
        scores = query[0].unflatten(0, (kv_heads, group)) @ key[0, :, None].transpose(-1, -2)
        scores = scores * (width**-0.5 if scaling is None else scaling)  # [Hkv, G, n, n]
        weights = torch.zeros_like(scores)
        kept[module.layer_idx] = []
        for h in range(kv_heads):

            def attend(query, keys, h=h):
                at, columns = query - padding, torch.tensor(keys) - padding
                weights[h, :, at, columns] = scores[h, :, at, columns].softmax(-1)
                return dict(zip(keys, weights[h, :, at, columns].sum(0).tolist(), strict=True))

            norms = key[0, h].pow(2).sum(-1).sqrt().tolist()
            _, held = replay(spec, target(spec, module.layer_idx, h)[0], norms, attend)
            kept[module.layer_idx].append(held)
        return (weights @ value[0, :, None]).flatten(0, 1)[None].transpose(1, 2), None

    with attending(model, attention), torch.no_grad():
        return model(text[None], use_cache=False).logits[0], kept


def real(positions, padding):
    return {p for p in positions if p >= padding}


@pytest.mark.parametrize("chunks", [ONE_BY_ONE, IN_CHUNKS], ids=["one by one", "in chunks"])
@pytest.mark.parametrize("policy", ["low_norm", "accumulated"])
@pytest.mark.parametrize("shares", [UNIFORM, PER_HEAD], ids=["uniform", "per head"])
def test_each_row_keeps_its_own_tokens_and_reads_as_if_alone(model, shares, policy, chunks):
    spec = CompressionSpec(**shares, policy=policy, protect_first=2, protect_last=3)
    (ids, mask), cache = padded(model), CompressedCache(model.config, spec)
    logits = decode(model, ids, mask, chunks, cache)
    for row, padding in enumerate(PADDED):
        expected, kept = alone(model, ids[row, padding:], padding, chunks, spec)
        for layer in range(len(cache)):
            for head, positions in enumerate(cache.kept_positions(layer)):
                held = positions[row].tolist()
                assert real(held, padding) == real(kept[layer][head], padding), (row, layer, head)
                assert len(held) == len(kept[layer][head])  # counts go by the padded length, the same in every row
        torch.testing.assert_close(logits[row, padding:], expected, atol=1e-4, rtol=0)


def test_padding_is_the_first_to_go(llama):
    ids, mask = padded(llama)
    for count in range(0, TOTAL + 1, 3):
        cache = CompressedCache(llama.config, CompressionSpec(budget=count))
        decode(llama, ids, mask, [TOTAL], cache)
        for head in cache.kept_positions(1):
            for row, padding in enumerate(PADDED):
                assert len(real(head[row].tolist(), padding)) == min(count, TOTAL - padding)


def test_the_first_tokens_are_those_of_the_text(llama):
    ids, mask = padded(llama)
    cache = CompressedCache(llama.config, CompressionSpec(keep_ratio=0.0, protect_first=2))
    decode(llama, ids, mask, IN_CHUNKS, cache)
    for head in cache.kept_positions(0):
        assert head.tolist() == [[padding, padding + 1] for padding in PADDED]


@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if not policy.needs_calibration])
def test_every_policy_keeps_of_a_padded_row_what_it_keeps_of_the_row_alone(llama, policy):
    """With a number of tokens to keep, not a share, padding does not even count."""
    (ids, mask), spec = padded(llama), CompressionSpec(budget=7, policy=policy)
    together = CompressedCache(llama.config, spec, special_ids=SPECIAL)
    decode(llama, ids, mask, [20, 9, 1, 1, 1], together)
    for row, padding in enumerate(PADDED):
        one = CompressedCache(llama.config, spec, special_ids=SPECIAL)
        text = ids[row : row + 1, padding:]
        decode(llama, text, torch.ones_like(text), [20 - padding, 9, 1, 1, 1], one)
        for layer in range(3):
            for head, expected in zip(together.kept_positions(layer), one.kept_positions(layer), strict=True):
                assert (head[row] - padding).tolist() == expected[0].tolist()


@pytest.mark.parametrize("prefill_chunk_size", [None, 7])
@pytest.mark.parametrize("policy", ["low_norm", "accumulated"])
@pytest.mark.parametrize("shares", [UNIFORM, PER_HEAD], ids=["uniform", "per head"])
def test_generate_is_decoding_step_by_step(model, shares, policy, prefill_chunk_size):
    ids, mask = padded(model, total=20)
    ids, mask = ids[:3], mask[:3]
    spec = CompressionSpec(**shares, policy=policy)
    with compressible(model):
        out = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=CompressedCache(model.config, spec),
            prefill_chunk_size=prefill_chunk_size,
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=PAD,
        )
    chunks = ((20,) if prefill_chunk_size is None else (7, 7, 6)) + (1,) * 8
    for row, padding in enumerate(PADDED[:3]):
        logits, _ = alone(model, out[row, padding:], padding, chunks, spec)
        assert out[row, 20:].tolist() == logits[19 - padding : -1].argmax(-1).tolist()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("shares", [{"keep_ratio": 1.0}, ALL_OF_IT], ids=["uniform", "per head"])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Gemma 2", "Gemma 3 (text)", "gpt-oss", "OLMo 2"])
def test_keeping_everything_is_the_plain_cache(name, shares, implementation):
    model = built(name)
    ids, mask = padded(model, total=20)
    before = model.config._attn_implementation
    if implementation == "eager":
        model.set_attn_implementation("eager")
    runs = []
    try:
        for cache in (DynamicCache(config=model.config), CompressedCache(model.config, CompressionSpec(**shares))):
            with compressible(model):
                runs.append(
                    model.generate(
                        ids,
                        attention_mask=mask,
                        past_key_values=cache,
                        max_new_tokens=8,
                        do_sample=False,
                        eos_token_id=-1,
                        pad_token_id=PAD,
                        return_dict_in_generate=True,
                        output_logits=True,
                    )
                )
    finally:
        model.set_attn_implementation(before)
    plain, compressed = runs
    assert torch.equal(plain.sequences, compressed.sequences)
    torch.testing.assert_close(torch.stack(plain.logits), torch.stack(compressed.logits), atol=1e-4, rtol=0)


def test_each_beam_scores_as_if_decoded_alone(llama):
    ids, mask = padded(llama, (0, 6, 9), total=16)
    spec = CompressionSpec(**PER_HEAD)
    with compressible(llama):
        out = llama.generate(
            ids,
            attention_mask=mask,
            past_key_values=CompressedCache(llama.config, spec),
            num_beams=3,
            num_return_sequences=3,
            max_new_tokens=6,
            do_sample=False,
            length_penalty=0.0,
            eos_token_id=-1,
            pad_token_id=PAD,
            return_dict_in_generate=True,
            output_scores=True,
        )
    for i, (sequence, score) in enumerate(zip(out.sequences, out.sequences_scores, strict=True)):
        padding = (0, 6, 9)[i // 3]
        logits, _ = alone(llama, sequence[padding:-1], padding, (16, *[1] * 5), spec)
        log_probabilities = logits[15 - padding :].log_softmax(-1)
        assert score.item() == pytest.approx(log_probabilities.gather(1, sequence[16:, None]).sum().item(), abs=1e-3)


@pytest.mark.parametrize("policy", ["low_norm", "accumulated", "window"])
@pytest.mark.parametrize(
    "change,rows",
    [
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
        (lambda cache: cache.batch_select_indices(torch.tensor([3, 1])), [3, 1]),
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0, 3])), [2, 0, 0, 3]),
    ],
    ids=["repeated", "selected", "reordered"],
)
def test_rows_may_be_repeated_selected_and_reordered_midway(llama, change, rows, policy):
    ids, mask = padded(llama)
    spec = CompressionSpec(**PER_HEAD, policy=policy)
    whole, changed = CompressedCache(llama.config, spec), CompressedCache(llama.config, spec)
    decode(llama, ids, mask, [20], whole)
    expected = decode(llama, ids, mask, [5, 1, 1], whole)
    decode(llama, ids, mask, [20], changed)
    change(changed)
    logits = decode(llama, ids[rows], mask[rows], [5, 1, 1], changed)
    torch.testing.assert_close(logits, expected[rows], atol=1e-5, rtol=0)
    for layer in range(3):
        for head, expected_head in zip(changed.kept_positions(layer), whole.kept_positions(layer), strict=True):
            assert torch.equal(head, expected_head[rows])


def test_a_copy_goes_its_own_way(llama):
    ids, mask = padded(llama)
    cache = CompressedCache(llama.config, CompressionSpec(**PER_HEAD, policy="accumulated"))
    decode(llama, ids, mask, [20], cache)
    twin = copy.deepcopy(cache)
    decode(llama, ids.flip(0), mask, [1, 1, 1], twin)  # other tokens, into the copy
    logits = decode(llama, ids, mask, [1, 3], cache)
    untouched = CompressedCache(llama.config, cache.spec)
    expected = decode(llama, ids, mask, [20, 1, 3], untouched)[:, 20:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert twin.get_seq_length() == 23 and cache.get_seq_length() == 24


def test_sampling_with_a_seed_gives_the_same_text_again_and_that_of_the_plain_cache_where_all_is_kept(llama):
    ids, mask = padded(llama, total=20)

    def sample(cache):
        torch.manual_seed(7)
        options = {"do_sample": True, "top_k": 20, "max_new_tokens": 10, "eos_token_id": -1, "pad_token_id": PAD}
        with compressible(llama):
            return llama.generate(ids, attention_mask=mask, past_key_values=cache, **options)

    def compressed(shares):
        return sample(CompressedCache(llama.config, CompressionSpec(**shares)))

    assert torch.equal(compressed(ALL_OF_IT), sample(DynamicCache(config=llama.config)))
    assert torch.equal(compressed(PER_HEAD), compressed(PER_HEAD))
    assert not torch.equal(compressed(PER_HEAD), compressed(ALL_OF_IT))


def test_reset_forgets_the_padding_too(llama):
    spec = CompressionSpec(**PER_HEAD)
    (ids, mask), cache = padded(llama), CompressedCache(llama.config, spec)
    decode(llama, ids, mask, [20, 1], cache)
    cache.reset()
    assert cache.held == (0, 0, 0) and cache.nbytes == 0 and cache.get_seq_length() == 0
    other_ids, other_mask = padded(llama, (2, 0))
    logits = decode(llama, other_ids, other_mask, [20, 4], cache)
    expected = decode(llama, other_ids, other_mask, [20, 4], CompressedCache(llama.config, spec))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_taking_tokens_back_is_refused_for_heads_that_differ(llama):
    (ids, mask), cache = padded(llama), CompressedCache(llama.config, CompressionSpec(**PER_HEAD))
    decode(llama, ids, mask, [20], cache)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)


def test_a_mask_of_other_columns_than_the_tokens_seen_is_refused(llama):
    ids, mask = padded(llama)
    for given in (mask[:, 20:22], mask[:, :20], mask[:, :23], torch.ones(4, 2, dtype=torch.long)):
        cache = CompressedCache(llama.config, CompressionSpec())
        decode(llama, ids, mask, [20], cache)
        message = f"has {given.shape[1]} columns.* 20 tokens and 2 are new"
        with pytest.raises(ValueError, match=message), compressible(llama), torch.no_grad():
            llama(ids[:, 20:22], attention_mask=given, past_key_values=cache)
        decode(llama, ids, mask, [2], cache)  # the refusal did no harm


def test_a_mask_that_takes_padding_back_is_refused(llama):
    ids, mask = padded(llama)
    cache = CompressedCache(llama.config, CompressionSpec())
    decode(llama, ids, mask, [20], cache)
    for given in (None, torch.ones(4, 21, dtype=torch.long), mask[[1, 0, 2, 3], :21]):
        with pytest.raises(ValueError, match="attention_mask of all tokens"), compressible(llama), torch.no_grad():
            llama(ids[:, 20:21], attention_mask=given, past_key_values=cache)


def test_a_mask_given_by_its_place_counts_as_well(llama):
    (ids, mask), spec = padded(llama), CompressionSpec(keep_ratio=0.4)
    by_name, by_place = CompressedCache(llama.config, spec), CompressedCache(llama.config, spec)
    with compressible(llama), torch.no_grad():
        llama.model(ids, attention_mask=mask, past_key_values=by_name)
        llama.model(ids, mask, None, by_place)
    for one, other in zip(by_name.kept_positions(1), by_place.kept_positions(1), strict=True):
        assert torch.equal(one, other)


# Entry points that are given a cache, or a text, and must be told of the padding


ONCE = [
    name
    for name, policy in POLICIES.items()
    if not (policy.needs_attention or policy.needs_calibration or policy.needs_token_ids)
]


def full_cache(model, ids, mask):
    """A plain cache after the padded rows, and for each row one after its text alone."""
    whole, alone = DynamicCache(config=model.config), []
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0), past_key_values=whole)
        for row, shown in zip(ids, mask.bool(), strict=True):
            alone.append(DynamicCache(config=model.config))
            model(row[None, shown], past_key_values=alone[-1])
    return whole, alone


@pytest.mark.parametrize("policy", ONCE)
def test_compressing_once_keeps_of_a_padded_row_what_it_keeps_of_the_row_alone(model, policy):
    (ids, mask), count = padded(model, total=24), 5
    whole, alone = full_cache(model, ids, mask)
    options = {"policy": policy, "protect_first": 1, "protect_last": 2}
    together = l2_compress(whole, attention_mask=mask, keep_ratio=(count - 0.5) / 24, **options)
    for row, padding in enumerate(PADDED):
        one = l2_compress(alone[row], keep_ratio=(count - 0.5) / (24 - padding), **options)
        for layer in range(3):
            for head, expected in zip(together.kept_positions(layer), one.kept_positions(layer), strict=True):
                assert (head[row] - padding).tolist() == expected[0].tolist() and len(expected[0]) == count


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8, 1.0])
def test_padding_is_the_first_to_go_when_a_cache_is_compressed_once(llama, keep):
    """By a sort of the norms; and what is left of it is hidden from the tokens that come."""
    ids, mask = padded(llama, total=24)
    whole, alone = full_cache(llama, ids, mask)
    once, count = l2_compress(whole, attention_mask=mask, keep_ratio=keep), math.ceil(round(keep * 24, 9))
    for layer, row in itertools.product(range(3), range(4)):
        for head, kept in enumerate(once.kept_positions(layer)):
            norms = alone[row].layers[layer].keys[0, head].pow(2).sum(-1).sqrt().tolist()
            best = sorted(range(len(norms)), key=lambda i: norms[i])[:count]
            assert len(kept[row]) == count
            assert real(kept[row].tolist(), PADDED[row]) == {PADDED[row] + i for i in best}
    logits, (more_ids, more_mask) = [], padded(llama, total=27)
    live = CompressedCache(llama.config, CompressionSpec(keep_ratio=keep, evict_every=24))
    decode(llama, more_ids, more_mask, [24], live)
    for cache in (once, live):
        for layer in cache.compressed_layers():
            layer.evict_no_more()
        logits.append(decode(llama, more_ids, more_mask, [1, 2], cache))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


def test_a_full_cache_that_goes_on_live_knows_its_padding(llama):
    (ids, mask), spec = padded(llama), CompressionSpec(keep_ratio=0.4, protect_last=3)
    whole, _ = full_cache(llama, ids[:, :20], mask[:, :20])
    made = CompressedCache.from_full(whole, llama.config, spec, attention_mask=mask[:, :20])
    live = CompressedCache(llama.config, spec)
    decode(llama, ids, mask, [20], live)
    logits = [decode(llama, ids, mask, [1, 4, 1], cache) for cache in (made, live)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
    for one, other in zip(made.kept_positions(1), live.kept_positions(1), strict=True):
        assert torch.equal(one, other)


def test_a_compressed_cache_that_is_compressed_once_more_remembers_its_padding(llama):
    ids, mask = padded(llama, total=24)
    live = CompressedCache(llama.config, CompressionSpec(keep_ratio=0.9))
    decode(llama, ids, mask, [24], live)
    told, remembered = l2_compress(live, keep_ratio=0.3, attention_mask=mask), l2_compress(live, keep_ratio=0.3)
    for one, other in zip(told.kept_positions(1), remembered.kept_positions(1), strict=True):
        assert torch.equal(one, other)
        for row, padding in enumerate(PADDED):
            assert len(real(one[row].tolist(), padding)) == min(7, 24 - padding)  # ceil of .3 * ceil of .9 * 24
    more_ids, more_mask = padded(llama, total=25)
    decode(llama, more_ids, more_mask, [1], remembered)
    with pytest.raises(ValueError, match="attention_mask of all tokens"):
        l2_compress(live, attention_mask=torch.ones_like(mask))


def compressed_once(llama, ids, mask):
    return l2_compress(full_cache(llama, ids, mask)[0], keep_ratio=0.5)


def live_without_a_mask(llama, ids, mask):
    cache = CompressedCache(llama.config, CompressionSpec(keep_ratio=0.5))
    decode(llama, ids, torch.ones_like(mask), [20], cache)
    return cache


def from_full_without_a_mask(llama, ids, mask):
    spec = CompressionSpec(keep_ratio=0.5)
    return CompressedCache.from_full(full_cache(llama, ids, mask)[0], llama.config, spec)


@pytest.mark.parametrize("make", [compressed_once, live_without_a_mask, from_full_without_a_mask])
def test_a_mask_that_hides_what_was_taken_for_text_is_refused(llama, make):
    ids, mask = padded(llama)
    cache = make(llama, ids[:, :20], mask[:, :20])
    with pytest.raises(ValueError, match="attention_mask of all tokens"):
        decode(llama, ids, mask, [2], cache)
    with pytest.raises(ValueError, match="attention_mask of all tokens"):
        l2_compress(cache, attention_mask=mask[:, :20])
    logits = decode(llama, ids, torch.ones_like(mask), [2], cache)  # the refusals did no harm
    assert logits.isfinite().all() and cache.get_seq_length() == 22


def test_padding_that_becomes_text_is_refused_also_before_the_text_began(llama):
    ids, mask = padded(llama)
    cache = CompressedCache(llama.config, CompressionSpec())
    decode(llama, ids[3:], mask[3:], [9], cache)  # all padding so far, as 10 more are
    other = mask[3:].clone()
    other[:, 4:] = 1
    with pytest.raises(ValueError, match="attention_mask of all tokens"):
        decode(llama, ids[3:], other, [2], cache)
    decode(llama, ids[3:], mask[3:], [2], cache)


@pytest.mark.parametrize(
    "wrong,message",
    [
        (lambda mask: mask[:, :23], r"of shape \[4, 24\].*got \[4, 23\]"),
        (lambda mask: mask[:2], r"of shape \[4, 24\].*got \[2, 24\]"),
        (lambda mask: mask[:, None, None], r"of shape \[4, 24\].*got \[4, 1, 1, 24\]"),
        (lambda mask: mask.tolist(), r"of shape \[4, 24\].*got list"),
        (lambda mask: mask.flip(1), "padded on the left"),
        (lambda mask: 1 - mask, "padded on the left"),
    ],
)
def test_a_mask_that_does_not_fit_the_cache_is_refused(llama, wrong, message):
    ids, mask = padded(llama, total=24)
    whole, _ = full_cache(llama, ids, mask)
    with pytest.raises(ValueError, match=message):
        l2_compress(whole, attention_mask=wrong(mask))
    with pytest.raises(ValueError, match=message):
        CompressedCache.from_full(whole, llama.config, CompressionSpec(), attention_mask=wrong(mask))


def test_masks_that_tell_of_no_padding_are_refused(llama):
    """A model takes masks of its own making, too, by which a cache cannot tell where rows begin."""
    ids, _ = padded(llama)
    masks = {"full_attention": torch.zeros(4, 1, 20, 20)}
    with pytest.raises(ValueError, match="no attention mask but that"), compressible(llama), torch.no_grad():
        llama.model(ids[:, :20], attention_mask=masks, past_key_values=CompressedCache(llama.config, CompressionSpec()))


@pytest.mark.parametrize("padding", [(13,), PADDED], ids=["a row", "rows"])
def test_filters_of_padded_texts_are_those_of_the_texts_alone(model, padding):
    """By an eigendecomposition of the second moments of the queries of each text, run alone, in float64."""
    ids, mask = padded(model, padding)
    queries = {}

    def look(inner, module, query, key, value, mask, **options):
        queries.setdefault(module.layer_idx, []).append(query[0].double())
        return inner(module, query, key, value, mask, **options)

    with attention_hook(model, look), torch.no_grad():
        for row, shown in zip(ids, mask.bool(), strict=True):
            model(row[None, shown])
    found = q_filters(model, ids, attention_mask=mask)
    kv_heads = found.shape[1]
    for layer, of_texts in queries.items():
        directions = []
        for of_head in torch.cat(of_texts, dim=1):
            top = torch.linalg.eigh(of_head.T @ of_head).eigenvectors[:, -1]
            directions.append(top * (of_head @ top).sum().sign())
        expected = torch.stack(directions).unflatten(0, (kv_heads, -1)).mean(dim=1)
        torch.testing.assert_close(found[layer].double(), expected, atol=1e-3, rtol=0)
    assert not torch.allclose(found, q_filters(model, ids), atol=0.05)  # which takes padding for text
    torch.testing.assert_close(q_filters(model, ids, attention_mask=torch.ones_like(ids)), q_filters(model, ids))


def test_a_mask_that_does_not_fit_the_calibration_text_or_shows_none_of_it_is_refused(llama):
    ids, mask = padded(llama)
    for wrong in (mask[:, 1:], mask[:2], torch.zeros_like(mask)):
        with pytest.raises(ValueError, match=r"of the shape of input_ids, \[4, "):
            q_filters(llama, ids, attention_mask=wrong)
