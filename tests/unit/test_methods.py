"""Methods at equal bytes: payloads counted pair by pair in a slow loop, and what cannot meet them named."""

import math
from dataclasses import replace

import numpy as np
import pytest

from analysis.errors import SettingsError
from analysis.evaluation.methods import PROTECTED_RANDOM, RANDOM, compare, prompt_length
from analysis.evaluation.results import FULL
from analysis.evaluation.task import Sample
from analysis.plans.curves import loss_curves
from l2kv import CompressionSpec, SpecError
from l2kv.config import CacheShape
from tests.support.runs import random_run

SHAPE = CacheShape(layers=(0, 1, 2), n_heads=4, n_kv_heads=2, head_dim=8, itemsize=4)
BASE = CompressionSpec(protect_first=4, protect_last=16, skip_layers=(0,))


def payload(spec, n):
    """Bytes of the pairs that a spec keeps of n tokens, one kv head after another."""
    ratios = {**dict(spec.layer_ratios or ()), **dict(spec.head_ratios or ())}
    pairs = 0
    for layer in range(3):
        for head in range(2):
            ratio = ratios.get((layer, head), ratios.get(layer, spec.keep_ratio))
            kept = max(spec.protect_first + spec.protect_last, math.ceil(round(ratio * n, 9)))
            pairs += n if layer in spec.skip_layers else min(n, kept)
    return pairs * 2 * 8 * 4


def test_every_method_of_a_column_holds_the_same_bytes_and_protects_the_same_tokens():
    found = compare(SHAPE, BASE, n_tokens=1000, keep_ratios=(0.5, 0.25), policies=("low_norm", "keydiff"))
    titles = (RANDOM, PROTECTED_RANDOM, "low_norm", "keydiff")
    assert list(found.methods) == [FULL, *(f"{title} {keep}" for keep in (0.5, 0.25) for title in titles)]
    for keep in (0.5, 0.25):
        expected = (1000 * 2 + 1000 * keep * 4) * 2 * 8 * 4
        for title in titles:
            spec = found.methods[f"{title} {keep}"]
            assert payload(spec, 1000) == expected
            ends = (0, 0) if title == RANDOM else (4, 16)
            assert (spec.protect_first, spec.protect_last) == ends and spec.skip_layers == (0,)
    assert found.notes == ()


def test_a_keep_ratio_that_the_protected_tokens_exceed_is_raised_for_the_unprotected_baseline():
    found = compare(SHAPE, replace(BASE, skip_layers=()), n_tokens=100, keep_ratios=(0.1,), policies=("low_norm",))
    assert found.methods["low_norm 0.1"].keep_ratio == 0.1
    assert found.methods["random 0.1"].keep_ratio > 0.19  # 20 of 100 tokens are protected
    assert len({payload(spec, 100) for spec in found.methods.values() if spec}) == 1


def test_without_protected_tokens_or_baselines_there_is_no_row_of_them():
    alone = {"n_tokens": 100, "keep_ratios": (0.5,), "policies": ("low_norm",)}
    bare = CompressionSpec()
    assert list(compare(SHAPE, bare, **alone).methods) == [FULL, "random 0.5", "low_norm 0.5"]
    assert list(compare(SHAPE, bare, **alone, baselines=False).methods) == [FULL, "low_norm 0.5"]


def test_strategies_join_at_the_ratio_that_holds_as_much_and_one_that_cannot_is_left_out_by_name():
    run = random_run()
    layers, kv_heads = run.key_norm.shape[:2]
    shape = CacheShape(tuple(range(layers)), kv_heads, kv_heads, 8, 4)
    base = CompressionSpec(protect_last=4)
    given = {"n_tokens": 1000, "strategies": ("by_head", "by_layer"), "curves": loss_curves(run, protect_last=4)}
    found = compare(shape, base, keep_ratios=(0.5,), **given)
    assert found.notes == () and found.methods["by_head 0.5"].head_ratios
    held = {name: shape.nbytes(1000, spec) for name, spec in found.methods.items() if spec}
    assert max(held.values()) <= 1.01 * min(held.values())
    assert all(spec.protect_last == 4 for name, spec in found.methods.items() if spec and name != "random 0.5")
    left = compare(shape, base, keep_ratios=(0.01,), **given)
    assert "by_head 0.01" not in left.methods and "low_norm 0.01" not in left.methods
    assert any(note.startswith("by_head 0.01 is left out: ") for note in left.notes)
    with pytest.raises(SettingsError, match="give a study"):
        compare(shape, base, n_tokens=100, keep_ratios=(0.5,), strategies=("by_head",))
    with pytest.raises(SettingsError, match="protects the last 4 tokens, and the methods the last 0"):
        compare(shape, CompressionSpec(), keep_ratios=(0.5,), **given)


def test_a_plan_stays_as_it_is_and_what_sets_it_apart_is_told():
    odd = CompressionSpec(0.33, protect_last=16)
    found = compare(SHAPE, BASE, n_tokens=1000, keep_ratios=(0.5,), plans=[("mine", odd)], baselines=False)
    assert found.methods["mine"] is odd and len(found.notes) == 2
    assert found.notes[0] == f"mine holds {payload(odd, 1000):,} bytes of 1,000 tokens, as no other method does."
    assert "protects other tokens: the first 0, the last 16" in found.notes[1]
    same = compare(SHAPE, BASE, n_tokens=1000, keep_ratios=(0.5,), plans=[("mine", replace(BASE, keep_ratio=0.5))])
    assert same.notes == ()
    with pytest.raises(SettingsError, match=r"Two methods are called 'low_norm 0\.5'"):
        compare(SHAPE, BASE, n_tokens=9, keep_ratios=(0.5,), policies=("low_norm",), plans=[("low_norm 0.5", odd)])
    with pytest.raises(SpecError, match="keep_ratio must be from 0 to 1"):
        compare(SHAPE, BASE, n_tokens=9, keep_ratios=(2.0,))


def test_the_length_of_prompts_is_their_median():
    def sample(context, question, target=0):
        return Sample("", *(np.zeros(n, int) for n in (context, question, target)))

    assert prompt_length([sample(10, 2), sample(20, 2), sample(90, 3)]) == 22
    assert prompt_length([sample(0, 1, 50)]) == 50
