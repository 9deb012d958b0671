"""What must hold for every spec and every shape: `CompressedLayer` and `CompressionSpec`, driven by Hypothesis."""

import dataclasses
import json
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l2kv import POLICIES, CompressionSpec
from l2kv.layer import CompressedLayer
from l2kv.spec import share
from tests.support.policies import rescored

LAYERS = 3
MOST_HEADS = 4


def examples(n):
    """The same examples at every run."""
    return settings(
        deadline=None, derandomize=True, database=None, max_examples=n, suppress_health_check=list(HealthCheck)
    )


@dataclass(frozen=True)
class Text:
    """Pairs and queries of a text, and how it is cut."""

    keys: torch.Tensor  # [B, Hkv, T, D]
    values: torch.Tensor
    queries: torch.Tensor  # [B, H, T, D]
    filters: torch.Tensor  # [Hkv, D]
    special: torch.Tensor  # [B, T] bool
    chunks: tuple[int, ...]

    def pieces(self):
        return zip(*(x.split(self.chunks, dim=2) for x in (self.keys, self.values, self.queries)), strict=True)

    def rows(self, change):
        return replace(self, **{name: change(getattr(self, name)) for name in ("keys", "values", "queries", "special")})

    def layer(self, spec, layer_idx):
        layer = CompressedLayer(spec, layer_idx, self.filters)
        layer.special = self.special
        return layer


percents = st.integers(0, 100).map(lambda n: n / 100)


@st.composite
def texts(draw):
    batch, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, MOST_HEADS)), draw(st.integers(1, 2))
    chunks = tuple(draw(st.lists(st.integers(1, 14), min_size=1, max_size=6)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    # Quarters of small whole numbers: with ties, and exact in every dtype.
    quarters = lambda *shape: torch.randint(-9, 10, shape, generator=generator) / 4  # noqa: E731
    shape = (batch, kv_heads, sum(chunks), 2)
    queries = quarters(batch, kv_heads * group, sum(chunks), 2)
    special = quarters(batch, sum(chunks)) > 1
    return Text(quarters(*shape), quarters(*shape), queries, quarters(kv_heads, 2), special, chunks)


@st.composite
def specs(draw, policies=tuple(POLICIES)):
    policy = draw(st.sampled_from(policies))
    heads = st.dictionaries(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, MOST_HEADS - 1)), percents)
    one_target = POLICIES[policy].ranks_whole_layer
    direction = st.lists(st.sampled_from(("low", "high")), min_size=MOST_HEADS, max_size=MOST_HEADS)
    return CompressionSpec(
        keep_ratio=draw(percents),
        budget=draw(st.none() | st.integers(0, 30)),
        prune_after=draw(st.integers(0, 15)),
        skip_layers=draw(st.lists(st.integers(0, LAYERS - 1), max_size=1)),
        policy=policy,
        schedule=draw(st.sampled_from(("seen", "reference"))),
        evict_every=draw(st.integers(1, 6)),
        protect_first=draw(st.integers(0, 4)),
        protect_last=draw(st.integers(0, 6)),
        layer_ratios=draw(st.none() | st.dictionaries(st.integers(0, LAYERS - 1), percents)),
        head_ratios=None if one_target else draw(st.none() | heads),
        directions=draw(st.lists(direction, min_size=LAYERS, max_size=LAYERS)),
        seed=draw(st.integers(0, 3)),
    )


layer_indices = st.integers(0, LAYERS - 1)


def feed(layer, keys, values, queries):
    """As a model does: append, attend, evict."""
    layer.update(keys, values)
    layer.evict(queries, {})


def by_head(layer):
    """[kv head] -> (positions [B, n], keys [B, n, D], values [B, n, D]) in the order of the text."""
    found = {}
    for part, positions in zip(layer.parts(), layer.positions(), strict=True):
        order = positions.argsort(dim=-1)
        for i, head in enumerate(part.heads):
            at = order[:, i, :, None].expand(-1, -1, part.keys.shape[-1])
            found[head] = (
                positions[:, i].gather(1, order[:, i]),
                part.keys[:, i].gather(1, at),
                part.values[:, i].gather(1, at),
            )
    return [found[head] for head in sorted(found)]


def assert_same(one, other):
    assert len(one) == len(other)
    for head, expected in zip(one, other, strict=True):
        for got, wanted in zip(head, expected, strict=True):
            assert torch.equal(got, wanted)


def target(spec, layer, head, base):
    """Whole numbers of a hundredth, so that nothing is rounded: skipped, then the head's, the layer's, and the rest."""
    percent = lambda ratio: -(-round(ratio * 100) * base // 100)  # noqa: E731
    if layer in spec.skip_layers:
        return base
    if (layer, head) in dict(spec.head_ratios or ()):
        return percent(dict(spec.head_ratios)[layer, head])
    if layer in dict(spec.layer_ratios or ()):
        return percent(dict(spec.layer_ratios)[layer])
    return percent(spec.keep_ratio) if spec.budget is None else spec.budget


def counts(spec, layer, kv_heads, chunks):
    """Pairs held by each head after each chunk."""
    held, seen, last, after = [0] * kv_heads, 0, 0, []
    for chunk in chunks:
        seen, held = seen + chunk, [n + chunk for n in held]
        if seen - last >= spec.evict_every:
            last = seen
            for head, n in enumerate(held):
                wanted = target(spec, layer, head, seen if spec.schedule == "seen" else n)
                if layer not in spec.skip_layers and n >= spec.prune_after:
                    held[head] = min(n, max(wanted, min(seen, spec.protect_first + spec.protect_last)))
        after.append(tuple(held))
    return after


@examples(80)
@given(texts(), specs(), layer_indices)
def test_every_head_holds_exactly_as_many_pairs_as_the_spec_says_in_as_many_bytes(text, spec, layer_idx):
    layer, (batch, kv_heads, _, width) = text.layer(spec, layer_idx), text.keys.shape
    for piece, expected in zip(text.pieces(), counts(spec, layer_idx, kv_heads, text.chunks), strict=True):
        feed(layer, *piece)
        assert layer.held_by_head == expected and layer.held == max(expected)
        assert layer.used_nbytes == sum(expected) * batch * 2 * width * 4
        storage = {}
        for part in layer.parts():
            assert part.keys.shape == part.values.shape == (batch, len(part.heads), expected[part.heads[0]], width)
            storage |= {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in (part.keys, part.values)}
        assert layer.nbytes == sum(storage.values())
    assert layer.get_seq_length() == sum(text.chunks)


@examples(60)
@given(texts(), specs(), layer_indices)
def test_the_pairs_held_are_those_of_their_positions_which_are_unique_and_of_the_past(text, spec, layer_idx):
    layer = text.layer(spec, layer_idx)
    for piece in text.pieces():
        feed(layer, *piece)
        for head, (positions, keys, values) in enumerate(by_head(layer)):
            assert (positions[:, 1:] > positions[:, :-1]).all() and ((positions >= 0) & (positions < layer.seen)).all()
            for row in range(len(positions)):
                assert torch.equal(keys[row], text.keys[row, head, positions[row]])
                assert torch.equal(values[row], text.values[row, head, positions[row]])
        assert all(torch.equal(a, b[0]) for a, b in zip(layer.kept_positions(), by_head(layer), strict=True))


@contextmanager
def watched(name):
    """Within the block, (row, kv head, position) -> the score that the policy `name` gave it last."""
    given, policy = {}, POLICIES[name]

    def score(pairs):
        scores = policy.score(pairs)
        positions = pairs.positions.expand(*pairs.keys.shape[:3])
        for row, of_row in enumerate(zip(positions.tolist(), scores.expand_as(positions).tolist(), strict=True)):
            for head, at, values in zip(pairs.heads, *of_row, strict=True):
                given.update({(row, head, p): value for p, value in zip(at, values, strict=True)})
        return scores

    with rescored(name, score):
        yield given


@pytest.mark.parametrize("name", POLICIES)
@examples(25)
@given(data=st.data())
def test_who_is_evicted_scored_no_higher_than_who_stays_and_who_is_protected_stays(name, data):
    text, spec, layer_idx = data.draw(texts()), data.draw(specs((name,))), data.draw(layer_indices)
    with watched(name) as scores:
        layer, before = text.layer(spec, layer_idx), {}
        for piece in text.pieces():
            new = range(layer.seen, layer.seen + piece[0].shape[2])
            feed(layer, *piece)
            safe = {
                *range(min(spec.protect_first, layer.seen)),
                *range(max(0, layer.seen - spec.protect_last), layer.seen),
            }
            for head, positions in enumerate(layer.kept_positions()):
                for row, kept in enumerate(positions.tolist()):
                    there, before[row, head] = {*before.get((row, head), ()), *new}, kept
                    assert safe <= set(kept) <= there
                    if evicted := there - set(kept):
                        order = {p: (-scores[row, head, p], p) for p in there - safe}  # ties: the earlier stays
                        assert max([order[p] for p in set(kept) - safe], default=(-torch.inf, 0)) < min(
                            order[p] for p in evicted
                        )


@examples(60)
@given(texts(), specs([name for name in POLICIES if not POLICIES[name].needs_attention]), layer_indices)
def test_half_precision_keeps_what_float32_keeps_where_the_keys_are_the_same(text, spec, layer_idx):
    kept = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = text.layer(spec, layer_idx)
        for keys, values, queries in text.pieces():
            feed(layer, keys.to(dtype), values.to(dtype), queries.to(dtype))
        assert layer.parts()[0].keys.dtype == dtype
        kept.append([positions.tolist() for positions in layer.kept_positions()])
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize(
    "operation,rows",
    [
        ("reorder_cache", lambda batch: torch.arange(batch).flip(0) // 2),
        ("batch_select_indices", lambda batch: torch.arange(batch)[-2:]),
        ("batch_repeat_interleave", lambda batch: torch.arange(batch).repeat_interleave(2)),
    ],
    ids=["reorder", "select", "repeat"],
)
@examples(30)
@given(data=st.data())
def test_changing_the_rows_of_a_batch_before_an_eviction_or_after_it_is_the_same(operation, rows, data):
    text, spec, layer_idx = data.draw(texts()), data.draw(specs()), data.draw(layer_indices)
    rows = rows(text.keys.shape[0])
    argument = 2 if operation == "batch_repeat_interleave" else rows
    changed, at = text.rows(lambda x: x[rows]), data.draw(st.integers(0, len(text.chunks) - 1))
    expected, before, after = (one.layer(spec, layer_idx) for one in (changed, text, text))
    for i, (plain, other) in enumerate(zip(text.pieces(), changed.pieces(), strict=True)):
        feed(expected, *other)
        before.update(*(other if i > at else plain)[:2])
        if i == at:
            getattr(before, operation)(argument)
        before.evict((other if i >= at else plain)[2], {})
        feed(after, *(other if i > at else plain))
        if i == at:
            getattr(after, operation)(argument)
    assert_same(by_head(before), by_head(expected))
    assert_same(by_head(after), by_head(expected))


MODES = (torch.no_grad, torch.inference_mode, torch.enable_grad)


@examples(80)
@given(texts(), specs(), layer_indices, st.lists(st.sampled_from(MODES), min_size=6, max_size=6))
def test_a_layer_passes_between_the_modes_of_autograd(text, spec, layer_idx, modes):
    plain, mixed = text.layer(spec, layer_idx), text.layer(spec, layer_idx)
    for piece, mode in zip(text.pieces(), modes, strict=False):
        feed(plain, *piece)
        with mode():
            feed(mixed, *(x.clone().requires_grad_() if mode is torch.enable_grad else x.clone() for x in piece))
        assert not any(part.keys.requires_grad or part.values.requires_grad for part in mixed.parts())
    assert_same(by_head(mixed), by_head(plain))


def test_ranks_made_in_inference_mode_may_be_written_to_outside_of_it():
    """The first eviction, which makes them, moves one pair; the keys and values stay in buffers made before."""
    layer = CompressedLayer(CompressionSpec(budget=101, prune_after=102), 0)
    keys = torch.randn(1, 1, 104, 4, generator=torch.Generator().manual_seed(0))
    for chunk, mode in zip(
        keys.split((100, 1, 1, 1, 1), dim=2), (*[torch.no_grad] * 2, *MODES[1:], torch.no_grad), strict=True
    ):
        with mode():
            feed(layer, chunk, chunk, chunk)
    assert layer.held == 101


def most_capacity(n):
    """Storage that is to hold n pairs has an eighth and a few slots more, twice."""
    return n * 81 / 64 + 9.5


@pytest.mark.parametrize("whole", [(0,), (0, 1), (1, 2)], ids=str)
def test_heads_that_keep_all_do_not_keep_the_memory_of_those_that_do_not(whole):
    keys = torch.zeros(1, 3, 100, 4)
    layer = CompressedLayer(CompressionSpec(keep_ratio=0.0, head_ratios={(0, head): 1.0 for head in whole}), 0)
    feed(layer, keys.clone(), keys.clone(), keys)
    assert sum(layer.held_by_head) == 100 * len(whole)
    assert layer.nbytes <= sum(most_capacity(n) for n in layer.held_by_head) * 2 * 4 * 4


@examples(60)
@given(texts(), specs(), layer_indices)
def test_the_slack_is_bounded_once_the_pairs_are_the_layers_own(text, spec, layer_idx):
    layer, (batch, _, _, width) = text.layer(spec, layer_idx), text.keys.shape
    for i, piece in enumerate(text.pieces()):
        feed(layer, *piece)
        if i:
            pair = batch * 2 * width * 4
            assert layer.nbytes <= sum(most_capacity(n) for n in layer.held_by_head) * pair


# The spec.


@examples(60)
@given(specs())
def test_a_spec_survives_json_and_is_a_key(spec):
    again = CompressionSpec(**json.loads(json.dumps(dataclasses.asdict(spec))))
    assert again == spec and hash(again) == hash(spec) and {spec: 1}[again] == 1
    assert replace(spec) == spec


@examples(60)
@given(st.lists(st.none() | percents, max_size=4))
def test_layer_ratios_are_the_same_as_a_mapping_a_row_and_pairs(row):
    pairs = [(layer, ratio) for layer, ratio in enumerate(row) if ratio is not None]
    given = (dict(pairs), pairs, [list(pair) for pair in reversed(pairs)], row, dict(enumerate(row)))
    assert [CompressionSpec(layer_ratios=ratios).layer_ratios for ratios in given] == [tuple(pairs)] * 5


@examples(60)
@given(st.lists(st.none() | st.lists(st.none() | percents, max_size=3), max_size=4))
def test_head_ratios_are_the_same_as_a_mapping_rows_and_pairs(rows):
    pairs = [
        ((layer, head), ratio)
        for layer, row in enumerate(rows)
        for head, ratio in enumerate(row or ())
        if ratio is not None
    ]
    as_lists = [[list(key), ratio] for key, ratio in reversed(pairs)]
    given = (dict(pairs), pairs, as_lists, rows, dict(enumerate(rows)))
    assert [CompressionSpec(head_ratios=ratios).head_ratios for ratios in given] == [tuple(pairs)] * 5


def test_layers_to_skip_may_be_given_one_by_one():
    assert CompressionSpec(skip_layers=(layer for layer in (2, 0))).skip_layers == (0, 2)


def test_a_float32_ratio_is_the_decimal_it_was_written_as():
    for hundredths in range(101):
        spec = CompressionSpec(keep_ratio=np.float32(hundredths / 100))
        assert spec.kept(100, 100, spec.target_of(0, 0)) == hundredths


def test_rows_are_chosen_of_keys_that_are_a_transposed_view():
    keys = torch.randn(2, 50, 2, 8, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    layer = CompressedLayer(CompressionSpec(budget=49), 0)
    layer.update(keys, keys.clone())
    layer.batch_select_indices(torch.tensor([1, 0]))
    layer.evict_now()
    for held in by_head(layer):
        assert held[0].shape[1] == 49
    for head, (positions, held, _) in enumerate(by_head(layer)):
        for row in range(2):
            assert torch.equal(held[row], keys[1 - row, head, positions[row]])


def test_numbers_of_numpy_become_plain_ones():
    spec = CompressionSpec(
        keep_ratio=np.float32(0.5),
        budget=np.int64(5),
        skip_layers=np.arange(2),
        protect_last=np.int32(3),
        layer_ratios={np.int64(1): np.float64(0.5)},
    )
    assert CompressionSpec(**json.loads(json.dumps(dataclasses.asdict(spec)))) == spec


def test_a_ratio_goes_by_the_narrowest_that_names_the_head():
    ratios = {"layer_ratios": {0: 0.2, 1: 0.2}, "head_ratios": {(0, 0): 0.3, (1, 0): 0.3}, "budget": 4}
    layer_and_head = [(0, 0), (1, 0), (1, 1), (2, 0)]

    def kept(spec):
        return [spec.kept(10, 10, spec.target_of(*at)) for at in layer_and_head]

    assert kept(CompressionSpec(skip_layers=(0,), **ratios)) == [10, 3, 2, 4]
    assert kept(CompressionSpec(**ratios)) == [3, 3, 2, 4]
    assert kept(CompressionSpec(layer_ratios={0: 0.2, 1: 0.2}, budget=4)) == [2, 2, 2, 4]
    assert kept(CompressionSpec(budget=4)) == [4, 4, 4, 4]
    assert kept(CompressionSpec()) == [5, 5, 5, 5]


@pytest.mark.parametrize(
    "field,value,names",
    [
        ("keep_ratio", True, "True"),
        ("keep_ratio", -0.1, "-0.1"),
        ("keep_ratio", float("inf"), "inf"),
        ("budget", -1, "-1"),
        ("budget", 2.0, "2.0"),
        ("budget", False, "False"),
        ("prune_after", "9", "'9'"),
        ("skip_layers", "01", "'01'"),
        ("skip_layers", (0, 1.5), "1.5"),
        ("policy", "L2", "'L2'"),
        ("policy", ["low_norm"], "['low_norm']"),
        ("schedule", "seen ", "'seen '"),
        ("evict_every", 0, "0"),
        ("protect_first", -2, "-2"),
        ("protect_last", None, "None"),
        ("layer_ratios", 0.5, "0.5"),
        ("layer_ratios", "half", "'half'"),
        ("layer_ratios", {0: 1.5}, "1.5"),
        ("layer_ratios", {-1: 0.5}, "-1"),
        ("layer_ratios", [0.5, "all"], "'all'"),
        ("head_ratios", 0.5, "0.5"),
        ("head_ratios", {(0, 1): -0.5}, "-0.5"),
        ("head_ratios", {(0, 1, 2): 0.5}, "(0, 1, 2)"),
        ("head_ratios", {(0, -1): 0.5}, "-1"),
        ("head_ratios", [[0.5, 2]], "2"),
        ("head_ratios", [0.5, 0.6], "0.5"),
        ("directions", "low", "'low'"),
        ("directions", ["low"], "['low']"),
        ("directions", [["low", "down"]], "'down'"),
        ("seed", 0.5, "0.5"),
        ("seed", -1, "-1"),
    ],
)
def test_a_refusal_names_the_field_and_the_value(field, value, names):
    with pytest.raises((ValueError, TypeError), match=field) as caught:
        CompressionSpec(**{field: value})
    assert names in str(caught.value)


def test_a_ratio_that_is_a_fraction_keeps_as_many_as_it_says():
    for n in range(1, 301):
        for k in range(n + 1):
            assert share(k / n, n) == k
            assert share(float(np.float32(k / n)), n) == k
