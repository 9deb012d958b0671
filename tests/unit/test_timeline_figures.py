"""What is drawn of one token of a recorded generation is what was recorded."""

import base64
import json
from dataclasses import replace

import numpy as np
import pytest

from app.components.timeline import content
from app.figures import timeline as figures
from tests.support.timelines import HOSTILE, invented


@pytest.fixture(scope="module")
def recorded():
    return invented()


def drawn(recorded, token):
    after = recorded.evicted_after(token)
    return figures.evictions_by_head(recorded.layers, recorded.heads, after, span=(40, 49)).data


def test_the_map_tells_held_heads_from_evicting_ones_by_sign_as_well_as_colour(recorded):
    token = 5
    held, evicted = drawn(recorded, token)
    for k, (layer, head) in enumerate(zip(recorded.layers, recorded.heads, strict=True)):
        step = recorded.evicted[k, token]
        assert np.isnan(held.z[head][layer]) == bool(step) and np.isnan(evicted.z[head][layer]) == (not step)
        assert (held.text[head][layer], evicted.text[head][layer]) == (("", "×") if step else ("●", ""))
        if step:
            assert evicted.z[head][layer] == recorded.seen[step]


def test_heads_that_layers_lack_are_gaps():
    ragged = invented(layers=3, kv_heads=2)
    fewer = [k for k in range(ragged.n_heads) if (ragged.layers[k], ragged.heads[k]) != (1, 1)]
    ragged = replace(
        ragged,
        layers=tuple(ragged.layers[k] for k in fewer),
        heads=tuple(ragged.heads[k] for k in fewer),
        evicted=ragged.evicted[fewer],
        received=ragged.received[fewer],
    )
    held, evicted = drawn(ragged, 7)
    assert np.isnan(held.z[1][1]) and np.isnan(evicted.z[1][1])


@pytest.mark.parametrize("token", [0, 5, 41, 48])
def test_attention_is_drawn_from_when_the_token_is_read_with_the_heads_that_hold_it(recorded, token):
    attention, holding = figures.attention_by_step(*recorded.history(token), n_heads=recorded.n_heads).data
    first = max(int(recorded.arrived[token]), 1)
    steps = range(first, len(recorded.seen))
    assert attention.x.tolist() == [recorded.seen[step] for step in steps]
    np.testing.assert_allclose(attention.y, [recorded.attention[step - 1, token] for step in steps])
    np.testing.assert_allclose(holding.y, [recorded.held(step)[token] / recorded.n_heads for step in steps])


def test_the_nll_with_and_without_stand_in_one_chart():
    without, pinned = figures.nats_by_token((1.0, 2.0), (0.5, 0.25), ["a", "b"]).data
    assert without.y.tolist() == [1.0, 2.0] and pinned.y.tolist() == [0.5, 0.25]


def test_the_browser_is_sent_what_is_needed_to_scrub_and_no_more():
    recorded = invented(3600, 12, 388, layers=30, kv_heads=3)
    sent = content(recorded)
    assert len(json.dumps(sent)) < 2 * 10**6
    starts, tokens, counts = (
        np.frombuffer(base64.b64decode(sent[name]), "<u4") for name in ("starts", "tokens", "counts")
    )
    held = np.full(len(recorded.labels), recorded.n_heads)
    for step in range(len(recorded.seen)):  # as the browser does it
        np.subtract.at(
            held, tokens[starts[step] : starts[step + 1]], counts[starts[step] : starts[step + 1]].astype(int)
        )
        read = np.arange(len(held)) < recorded.seen[step]
        np.testing.assert_array_equal(held[read], recorded.held(step)[read])


def test_labels_are_sent_with_what_cannot_be_seen_made_visible(recorded):
    labels = content(recorded)["labels"]
    assert labels[HOSTILE.index("\n")] == "⏎" and labels[HOSTILE.index(" the")] == "·the"
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in "".join(labels) and "U+202Eevil" in labels
