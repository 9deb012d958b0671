"""The strip of the eviction time machine, a component of our own: a cell for each token, at any step of a generation.

All numbers are sent once, and the browser scrubs through them. Knows no models; asks for nothing to be run.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from analysis.timelines import Timeline
from app.components import markup

_HTML = """
<div class="time-machine" role="group" aria-label="Eviction time machine">
  <div class="controls">
    <button class="play" type="button">Play</button>
    <input class="step" type="range" min="0" value="0" aria-label="Step of the generation">
    <output class="told"></output>
  </div>
  <ul class="legend">
    <li><i style="--filled: 100%"></i>held in all kv heads</li>
    <li><i style="--filled: 40%"></i>in some</li>
    <li><i style="--filled: 0%"></i>evicted by all</li>
    <li><i class="dot"></i>not read yet</li>
    <li><i class="under"></i>continuation</li>
    <li><i class="under first"></i>first token, the usual attention sink</li>
  </ul>
  <canvas class="strip" tabindex="0" role="slider" aria-label="Token" aria-valuemin="0"></canvas>
  <p class="about"></p>
  <p class="text"></p>
</div>
"""
_HERE = Path(__file__).parent


@lru_cache(maxsize=1)
def _component() -> Any:
    css, js = ((_HERE / f"timeline.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return st.components.v2.component("l2kv_timeline", html=_HTML, css=css, js=js)


def strip(
    timeline: Timeline, *, key: str, chosen: Sequence[int], on_choose: Callable[[tuple[int, ...]], object]
) -> None:
    """Draw the strip.

    Args:
        timeline: the recorded generation.
        key: key of the element, one for each recording.
        chosen: positions of the tokens that are outlined.
        on_choose: called with the positions of others that the user chooses, before the page is drawn again.
    """

    def take() -> None:
        sent = st.session_state[key].chosen
        on_choose(tuple(token for token in sent if type(token) is int and 0 <= token < len(timeline.labels)))

    _component()(key=key, data=content(timeline) | {"id": key, "chosen": list(chosen)}, on_chosen_change=take)


@lru_cache(maxsize=4)
def content(timeline: Timeline) -> dict[str, Any]:
    """What the browser is sent: arrays as base64 of their little-endian bytes."""
    step, token, heads = timeline.evictions
    return {
        "labels": [markup.visible(label) for label in timeline.labels],
        "seen": timeline.seen.tolist(),
        "heads": timeline.n_heads,
        "context": timeline.n_context,
        "question": timeline.n_question,
        "starts": _encoded(np.searchsorted(step, np.arange(len(timeline.seen) + 1)), "<u4"),
        "tokens": _encoded(token, "<u4"),
        "counts": _encoded(heads, "<u4"),
        "attention": _encoded(timeline.mean_attention.mean(axis=0), "<f4"),
        "nats": _encoded(timeline.nats, "<f4"),
    }


def _encoded(values: np.ndarray, dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()
