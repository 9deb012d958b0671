"""A recorded generation, held against a loop that asks the cache, and a full pass with the evicted tokens masked."""

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from analysis import records
from analysis.errors import ModelError, RecordError, SettingsError, TextError
from analysis.evaluation.task import Sample
from analysis.generations import record_timeline, text_sample, what_if
from analysis.models.load import LoadedModel
from analysis.timelines import LAST_QUERIES, MOST_ROWS, Timeline, timeline_bytes
from l2kv import CompressedCache, CompressionSpec, SpecError, compressible
from tests.support.architectures import ARCHITECTURES
from tests.support.causal_models import text_for, tokenizer
from tests.support.oracle import attending
from tests.support.timelines import TEXT, fed_one_by_one

SPECS = [
    CompressionSpec(keep_ratio=0.5, protect_last=8),
    CompressionSpec(keep_ratio=0.2, policy="high_norm", skip_layers=(1,), evict_every=3),
    CompressionSpec(keep_ratio=0.4, head_ratios={(0, 0): 0.1, (2, 1): 0.9}),
    CompressionSpec(keep_ratio=0.3, policy="accumulated"),
]


@pytest.fixture(scope="module", params=SPECS, ids=lambda spec: f"{spec.policy} {spec.keep_ratio}")
def recorded(request, loaded):
    sample = sample_of(loaded)
    return sample, record_timeline(loaded, sample, request.param)


def sample_of(loaded, new_tokens=12):
    """A context, a question of five tokens, and whatever the model writes."""
    ids = text_sample(loaded, TEXT).context
    return Sample("a", ids[:-5], ids[-5:], new_tokens=new_tokens)


def masked_attention(loaded, timeline, held):
    """Attention [L, H, T, T] of one pass over all tokens, in which each sees what its head held when it was fed."""
    total, group = len(timeline.token_ids), loaded.model.config.num_attention_heads // loaded.config.num_key_value_heads
    seen, hide = timeline.seen[1:].tolist(), torch.full((timeline.n_heads, total, total), -torch.inf)
    for head in range(timeline.n_heads):
        for step, (start, end) in enumerate(zip([0, *seen], seen, strict=False)):
            for query in range(start, end):
                before = held[step - 1][head] if step else set()
                for key in [*before, *range(start, query + 1)]:
                    hide[head, query, key] = 0.0
    by_layer = hide.view(loaded.config.num_hidden_layers, -1, total, total).repeat_interleave(group, dim=1)
    found = []

    def attention(module, query, key, value, mask, scaling=None, **_):
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        weights = (query @ key.transpose(-1, -2) * scaling + by_layer[module.layer_idx]).softmax(-1)
        found.append(weights[0])
        return (weights @ value).transpose(1, 2), None

    with attending(loaded.model, attention), torch.no_grad():
        loaded.model(torch.from_numpy(timeline.token_ids)[None], use_cache=False)
    return torch.stack(found).numpy()


def test_each_head_holds_at_each_step_what_a_cache_says_that_is_asked_after_each_token(loaded, recorded):
    _, timeline = recorded
    held, _ = fed_one_by_one(loaded, timeline, timeline.spec)
    assert len(held) == len(timeline.seen) - 1
    for step, of_heads in enumerate(held, start=1):
        for head, positions in enumerate(of_heads):
            holding = (timeline.evicted[head] == 0) | (timeline.evicted[head] > step)
            assert set(np.flatnonzero(holding & (np.arange(len(holding)) < timeline.seen[step])).tolist()) == positions
        counted = [sum(token in positions for positions in of_heads) for token in range(len(timeline.labels))]
        assert timeline.held(step).tolist() == counted
    assert (timeline.held(0)[: timeline.n_context] == timeline.n_heads).all()
    assert timeline.held(0)[timeline.n_context :].sum() == 0


def test_the_nll_is_that_of_a_plain_loop_and_the_tokens_are_its_greedy_ones(loaded, recorded):
    sample, timeline = recorded
    _, nats = fed_one_by_one(loaded, timeline, timeline.spec)
    np.testing.assert_allclose(timeline.nats, nats, atol=1e-4)
    given = record_timeline(
        loaded, replace(sample, target=timeline.token_ids[timeline.n_context + timeline.n_question :]), timeline.spec
    )
    assert given.given and not timeline.given
    for field in fields(Timeline):
        if field.name not in ("given", "context_seconds", "seconds"):
            np.testing.assert_array_equal(getattr(given, field.name), getattr(timeline, field.name))


def test_attention_received_is_that_of_a_full_pass_with_the_evicted_masked(loaded, recorded):
    _, timeline = recorded
    held, _ = fed_one_by_one(loaded, timeline, timeline.spec)
    attention = masked_attention(loaded, timeline, held)
    layers, heads, total, _ = attention.shape
    for head in range(timeline.n_heads):  # no token's attention to itself, and the group's mean
        group = heads // (timeline.n_heads // layers)
        layer, first = timeline.layers[head], timeline.heads[head] * group
        rows = attention[layer, first : first + group].mean(axis=0)
        np.fill_diagonal(rows, 0.0)
        starts = [max(0, timeline.n_context - LAST_QUERIES), *timeline.seen[1:-1].tolist()]
        by_step = [rows[start:end].mean(axis=0) for start, end in zip(starts, timeline.seen[1:].tolist(), strict=True)]
        np.testing.assert_allclose(timeline.received[head], np.sum(by_step, axis=0), atol=1e-5)
        for token in (0, 3, total - 4):  # a mean over the steps that it was attended to in
            there = [row[token] for step, row in enumerate(by_step, start=1) if step >= timeline.arrived[token]]
            last = timeline.evicted[head, token] or len(timeline.seen) - 1
            there = there[: last - max(timeline.arrived[token], 1) + 1]
            assert timeline.mean_attention[head, token] == pytest.approx(np.mean(there), abs=1e-5)


@pytest.mark.parametrize("name", ["Gemma 3 (text)", "Gemma 3n (text)", "gpt-oss", "Qwen3-Next"])
def test_layers_that_never_evict_are_left_out(name):
    """Sliding windows, borrowed keys and running states have nothing to show."""
    architecture = ARCHITECTURES[name]
    model = LoadedModel(architecture.model(), tokenizer(), "it")
    ids = text_for(30)[0].numpy()
    timeline = record_timeline(model, Sample("a", ids[:20], ids[20:23], ids[23:]), CompressionSpec(keep_ratio=0.4))
    cache = CompressedCache(model.config, CompressionSpec(keep_ratio=0.4))
    evicting = [i for i, layer in enumerate(cache.layers) if layer in cache.compressed_layers()]
    assert sorted(set(timeline.layers)) == evicting and len(evicting) == len(cache.layers) - architecture.left
    with compressible(model.model), torch.no_grad():
        for piece in torch.from_numpy(ids)[None].split([20, 3, *[1] * 7], dim=1):
            model.model(piece, past_key_values=cache, use_cache=True)
    for head, (layer, number) in enumerate(zip(timeline.layers, timeline.heads, strict=True)):
        held = np.flatnonzero(timeline.evicted[head] == 0).tolist()
        assert cache.kept_positions(layer)[number][0].tolist() == held


@pytest.mark.parametrize(
    "coded",
    [{"key_bits": 8, "value_bits": 4}, {"key_channels": 0.6}, {"head_ratios": {(0, 0): 0.1}, "key_bits": 4}],
    ids=str,
)
def test_pairs_of_fewer_bits_or_channels_are_recorded_and_pinned_as_others(loaded, coded):
    spec = CompressionSpec(keep_ratio=0.4, protect_last=8, **coded)
    timeline = record_timeline(loaded, sample_of(loaded), spec)
    held, nats = fed_one_by_one(loaded, timeline, spec)
    assert timeline.held(len(held)).sum() == sum(map(len, held[-1]))
    np.testing.assert_allclose(timeline.nats, nats, atol=1e-4)
    pinned = timeline.missed(3).tolist()
    (answer,) = what_if(loaded, timeline, [pinned])
    held, nats = fed_one_by_one(loaded, timeline, replace(spec, pinned=pinned))
    assert all(set(pinned) <= of_head for of_head in held[-1])
    np.testing.assert_allclose(answer.with_them, nats, atol=1e-4)


def test_rows_of_steps_are_means_over_heads_and_steps_and_stay_few(loaded):
    timeline = record_timeline(loaded, sample_of(loaded, new_tokens=150), CompressionSpec(keep_ratio=0.5))
    steps = len(timeline.seen) - 1
    assert timeline.steps_per_row == 3 and len(timeline.attention) == -(-steps // 3) <= MOST_ROWS
    in_row = np.minimum(3, steps - 3 * np.arange(len(timeline.attention)))
    total = (timeline.attention * in_row[:, None]).sum(axis=0) * timeline.n_heads
    np.testing.assert_allclose(total, timeline.received.sum(axis=0), rtol=1e-4, atol=1e-5)


def test_evictions_add_up_to_what_is_held(recorded):
    _, timeline = recorded
    step, token, heads = timeline.evictions
    assert (np.diff(step) >= 0).all()
    for at in range(len(timeline.seen)):
        gone = np.bincount(token[step <= at], heads[step <= at], minlength=len(timeline.labels))
        there = timeline.arrived <= at
        assert (timeline.held(at)[there] == timeline.n_heads - gone[there]).all()


def test_the_shortlist_is_of_tokens_that_a_head_read_while_it_could_and_others_evicted(recorded):
    _, timeline = recorded
    worth = []
    for token in range(len(timeline.labels)):
        evicted_by = [head for head in range(timeline.n_heads) if timeline.evicted[head, token]]
        worth.append(len(evicted_by) * max(timeline.mean_attention[head, token] for head in range(timeline.n_heads)))
    shortlist = timeline.missed(5).tolist()
    assert shortlist == sorted(range(len(worth)), key=lambda token: -worth[token])[:5]


def test_what_if_is_a_run_of_that_spec_with_the_tokens_pinned(loaded, recorded):
    _, timeline = recorded
    one, some = timeline.missed(1).tolist(), timeline.missed(4).tolist()
    answers = what_if(loaded, timeline, [one, timeline.missed(4)])
    for pinned, answer in zip((one, some), answers, strict=True):
        held, nats = fed_one_by_one(loaded, timeline, replace(timeline.spec, pinned=pinned))
        _, without = fed_one_by_one(loaded, timeline, timeline.spec)
        np.testing.assert_allclose(answer.with_them, nats, atol=1e-4)
        assert answer.change == pytest.approx(np.mean(nats) - np.mean(without), abs=1e-4)
        assert answer.perplexity_ratio == pytest.approx(math.exp(np.mean(nats) - np.mean(without)), abs=1e-3)
        assert all(set(pinned) <= of_head for of_head in held[-1])
        at_the_end = timeline.held(len(timeline.seen) - 1)[pinned]
        assert answer.pairs == sum(timeline.n_heads - at_the_end) > 0


def test_the_context_of_what_if_is_read_once_for_all_choices(loaded):
    timeline = record_timeline(loaded, sample_of(loaded), SPECS[0])
    read = []
    hook = loaded.model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0].shape[1]))
    try:
        what_if(loaded, timeline, [[0], [1], [2, 3]])
    finally:
        hook.remove()
    assert read.count(timeline.n_context) == 1


def test_a_token_that_no_head_evicted_changes_nothing(loaded):
    timeline = record_timeline(loaded, sample_of(loaded), CompressionSpec(keep_ratio=0.5, protect_first=1))
    (answer,) = what_if(loaded, timeline, [[0]])
    assert answer.pairs == 0 and answer.change == pytest.approx(0.0, abs=1e-5)


def test_it_survives_a_file_and_its_file_is_small(recorded, tmp_path):
    _, timeline = recorded
    again = records.load(Timeline, records.save(timeline, tmp_path / "a.safetensors"))
    for field in fields(Timeline):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(timeline, field.name))
    arrays = load_file(tmp_path / "a.safetensors")
    assert sum(a.nbytes for a in arrays.values()) <= timeline_bytes(timeline.n_heads, len(timeline.labels))
    assert timeline_bytes(90, 4000) < 4 * 10**6


@pytest.mark.parametrize(
    "change",
    [
        {"evicted": -1},
        {"evicted": 10**6},
        {"received": np.nan},
        {"attention": -1.0},
        {"seen": 3},
        {"token_ids": -1},
    ],
    ids=str,
)
def test_a_file_of_what_cannot_be_is_refused(loaded, tmp_path, change):
    timeline = record_timeline(loaded, sample_of(loaded), SPECS[0])
    path = records.save(timeline, tmp_path / "a.safetensors")
    arrays, ((name, value),) = load_file(path), change.items()
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    arrays[name] = arrays[name].copy()
    arrays[name].flat[-1] = value
    save_file(arrays, path, metadata=metadata)
    with pytest.raises(RecordError, match="is not a recorded generation that can be read"):
        records.load(Timeline, path)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": ["a"]},
        {"heads": [10**9] * 24},
        {"heads": [0] * 24},
        {"n_context": 1},
        {"steps_per_row": 0},
        {"seconds": -1.0},
        {"spec": {"keep_ratio": 2.0}},
    ],
    ids=str,
)
def test_a_file_that_says_what_cannot_be_is_refused(loaded, tmp_path, change):
    path = records.save(record_timeline(loaded, sample_of(loaded), SPECS[0]), tmp_path / "a.safetensors")
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    header = json.loads(metadata["header"]) | change
    save_file(load_file(path), path, metadata=metadata | {"header": json.dumps(header)})
    with pytest.raises(RecordError, match="is not a recorded generation that can be read"):
        records.load(Timeline, path)


def test_progress_counts_layers_and_tokens_and_can_cancel(loaded):
    class Cancelled(Exception):
        pass

    heard = []

    def until(what, n):
        def progress(done, total, counted):
            heard.append((done, total, counted))
            if counted == what and done == n:
                raise Cancelled

        return progress

    own = loaded.config._attn_implementation
    for what, n in (("layers", 2), ("tokens", 3)):
        with pytest.raises(Cancelled):
            record_timeline(loaded, sample_of(loaded), SPECS[0], progress=until(what, n))
    assert (6, 6, "layers") in heard and (0, 12, "tokens") in heard
    assert loaded.config._attn_implementation == own


def test_a_prompt_is_put_as_a_chat_where_the_model_has_a_template_and_an_answer_may_be_given(loaded):
    with pytest.raises(TextError, match="no chat template"):
        text_sample(loaded, "Who?", chat=True)
    sample = text_sample(loaded, "The old man looked at the", continuation=" sea.")
    assert loaded.tokenizer.decode(sample.target) == " sea." and len(sample.question) == 1
    asked = text_sample(loaded, "The old man looked at the sea.", question=" What did he see? He saw")
    assert loaded.tokenizer.decode(asked.question) == " What did he see? He saw"
    assert loaded.tokenizer.decode(asked.context, skip_special_tokens=True).endswith("looked at the sea.")
    with pytest.raises(SettingsError, match="a chat is a question already"):
        text_sample(loaded, "Who?", question="Where?", chat=True)


def test_bad_requests_are_refused_with_what_to_do(loaded):
    timeline = record_timeline(loaded, sample_of(loaded), SPECS[0])
    with pytest.raises(SettingsError, match=r"choose one or more of the tokens 0 to \d+ to pin, got \[\]"):
        what_if(loaded, timeline, [[]])
    with pytest.raises(SettingsError, match="got \\[1, 999\\]"):
        what_if(loaded, timeline, [[999, 1]])
    with pytest.raises(ModelError, match="Load that one"):
        what_if(loaded, replace(timeline, weights="0" * 64), [[1]])
    with pytest.raises(SettingsError, match="new_tokens must be 1 or more"):
        text_sample(loaded, TEXT, new_tokens=0)
    with pytest.raises(SpecError, match="layer 99"):
        record_timeline(loaded, sample_of(loaded), CompressionSpec(skip_layers=(99,)))
    with pytest.raises(TextError, match="Give a longer prompt"):
        record_timeline(loaded, replace(sample_of(loaded), context=np.zeros(0, np.int64)), SPECS[0])
