"""Why a head follows norms or does not: its sink's key, its large dimensions, length against direction of its keys.

That takes vectors, which a run does not hold: one pass of the model gets those of a layer, and they are kept for its
other heads.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from analysis.words import duration, head_name
from app import figures, library, state
from app.components import markup
from app.components.charts import show
from app.jobs import Jobs

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel
    from analysis.paper.vectors import HeadVectors
    from analysis.paper.why import Channels, Factors, SinkKey, Zeroing
    from analysis.progress import Progress

_MOST_LAYERS = 4  # whose vectors are kept, some megabytes each
_VECTORS: OrderedDict[tuple[str, int], HeadVectors] = OrderedDict()


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """What the vectors of a head show."""

    key: SinkKey
    zeroing: Zeroing
    channels: Channels
    factors: Factors  # of all heads of the layer


def draw(side: str, layer: int, head: int, jobs: Jobs) -> None:
    """Draw it on one side, "a" or "b", or the button that gets the vectors."""
    run_id = state.run_id()
    run = library.run(run_id)
    if (run_id, layer) not in _VECTORS:
        st.markdown(
            "A run keeps norms. Why they do or do not predict attention is in the key and query vectors of layer "
            f"{layer}: "
            f"one more pass over the text gets them, about {duration(run.seconds)} once the model is in memory. "
            f"Too large for the workspace, they are kept until the app is stopped, for the last {_MOST_LAYERS} layers."
        )
        if st.button(
            f"Get the vectors of layer {layer}", type="primary", icon=":material/play_arrow:", key=f"why_{side}",
            disabled=bool(state.JOBS.get()),
        ):  # fmt: skip
            state.follow(_start(jobs, run_id, layer))
            st.rerun()
        return
    found, named = _found(run_id, layer, head), head_name(layer, run.kv_head(head), head)
    st.markdown(markup.plain(str(found.zeroing)))
    key = found.key
    dimensions = np.arange(len(key.sink))
    show(
        figures.key_dimensions(key.sink, key.others, key.spread, key.peaks),
        key=f"why_key_{side}",
        alt=f"Dimensions of the first token's key beside those of the others, {named}",
        caption=f"The first token's key beside the other {run.n_tokens - 1:,} (mean, ± one deviation). Its peaked "
        "dimensions "
        f"carry {_share(key.lead_of_peaks, key.lead)} of what its logit has over that of the mean key (the paper's "
        "Fig. 8).",
        table={
            "dimension": dimensions,
            "first token": key.sink,
            "others, mean": key.others,
            "others, deviation": key.spread,
            "peaked": np.isin(dimensions, key.peaks),
        },
    )
    _zeroed(side, named, found.zeroing)
    _channels(side, named, found.channels)
    of_length, of_direction = found.factors.without_length[0, head], found.factors.without_direction[0, head]
    if np.isfinite([of_length, of_direction]).all():
        st.markdown(
            f"If all keys were equally long, **{of_length:.0%}** of the last query's attention would move; if all "
            "pointed "
            f"alike, **{of_direction:.0%}**. So here the keys' "
            f"**{'length' if of_length > of_direction else 'direction'}** "
            "makes the attention."
        )


def _zeroed(side: str, named: str, found: Zeroing) -> None:
    share, moved = ([getattr(one, name) for one in found.random] for name in ("sink_share", "distance"))
    show(
        figures.zeroed_dimensions(
            {
                "first token's share": (found.as_it_is.sink_share, found.peaked.sink_share, np.array(share)),
                "attention moved": (None, found.peaked.distance, np.array(moved)),
            }
        ),
        key=f"why_zeroed_{side}",
        alt=f"Effect of zeroing the peaked dimensions of {named} against random ones",
        caption=f"Peaked dimensions of all keys zeroed, against {len(found.random)} draws of as many random ones, "
        "means over "
        f"{found.n_tokens - 1:,} queries (the paper's Fig. 9).",
        table={"draw": range(len(found.random)), "first token's share": share, "attention moved": moved},
    )


def _channels(side: str, named: str, found: Channels) -> None:
    shares = {
        "logits' magnitude, by channel": np.sort(found.magnitude)[::-1].cumsum(),
        "keys' energy, by direction": found.energy.cumsum(),
    }
    show(
        figures.channel_shares(shares),
        key=f"why_channels_{side}",
        alt=f"Share that the largest channels and directions of {named} carry",
        caption=f"{found} The largest first, added up (ThinK's channel magnitudes; singular values of the keys).",
        table={"number": np.arange(1, len(found.magnitude) + 1)} | shares,
    )


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole > 0 else "none"


@library.remembered
def _found(run_id: str, layer: int, head: int) -> _Found:
    from analysis.paper.why import channels, factors, sink_key, zeroing

    vectors = _VECTORS[run_id, layer]
    key = sink_key(vectors, head)
    return _Found(key, zeroing(vectors, head, key.peaks), channels(vectors, head), factors(vectors))


def _start(jobs: Jobs, run_id: str, layer: int) -> str:
    text = library.run(run_id).text

    def work(loaded: LoadedModel, progress: Progress) -> str:
        from analysis.paper.vectors import head_vectors

        _VECTORS[run_id, layer] = head_vectors(loaded, text, layer, progress=progress)
        while len(_VECTORS) > _MOST_LAYERS:
            _VECTORS.popitem(last=False)
        return ""

    return jobs.start(f"Getting the vectors of layer {layer}", state.model_ref(), work, kind="vectors").id
