"""What a compression saves, by arithmetic: bytes, sequences that fit a GPU, and the speed that its bandwidth allows."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from analysis.errors import ModelError, UserError
from analysis.models.gpus import GPUS
from analysis.models.memory import DTYPES
from analysis.models.sizes import checkpoint_dtype, weights_bytes
from analysis.plans.export import LENGTHS, Saving, savings
from analysis.words import human_bytes
from app import state
from app.components import markup, uploads
from app.engine import Engine
from l2kv.config import CacheShape
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from analysis.models.sizes import ModelSize

_LENGTHS = (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072, 1_048_576)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What arithmetic on a cache needs to know of a model."""

    shape: CacheShape
    weights: int | None
    """Bytes of its weights; None if they are not on this machine."""
    dtype: str
    """Dtype of the cache."""


def tile(engine: Engine, spec: CompressionSpec) -> Saving | None:
    """Draw what is saved at one length, with its settings; return it where the weights are known."""
    st.markdown("**Memory**")
    sizes = _sizes(engine)
    if sizes is None:
        st.caption("Sizes are told once the model, or a run of it, is here.")
        return None
    if not sizes.shape.layers:
        st.markdown("Nothing to save: every layer has a sliding window, so its cache is bounded already.")
        return None
    n = int(state.CACHE_TOKENS.get())
    (row,) = _rows(sizes, spec, (n,))
    st.metric(f"Cache of {n:,} tokens, {sizes.dtype}", f"{human_bytes(row.full_bytes)} → {human_bytes(row.kept_bytes)}")
    st.caption(f"{_saved(row)} saved, batch {state.BATCH.get()}")
    if sizes.weights is None:
        st.markdown("The weights are not on this machine, so what fits beside them is not told.")
    else:
        st.markdown(
            f"Sequences that fit {markup.plain(state.GPU.get())}: {_count(row.full_fits)} → "
            f"**{_count(row.kept_fits)}**, beside weights of {human_bytes(sizes.weights)}, as stored"
        )
    with st.popover("GPU, tokens, dtype", icon=":material/tune:"):
        st.selectbox("GPU", list(GPUS), **state.GPU.widget())
        st.selectbox(
            "Tokens of each sequence", sorted({*_LENGTHS, n}), format_func="{:,}".format, **state.CACHE_TOKENS.widget()
        )
        st.number_input("Sequences at once", 1, 4096, **state.BATCH.widget())
        st.selectbox(
            "Cache in", ["", *DTYPES], format_func=lambda name: name or "the model's own dtype",
            **state.CACHE_DTYPE.widget(),
        )  # fmt: skip
        st.caption("Arithmetic: activations and the allocator's waste are not counted.")
    return row if sizes.weights is not None else None


def table(engine: Engine, spec: CompressionSpec) -> None:
    """Draw what is saved at several lengths, in the model on screen or in another one by its config alone."""
    with st.expander(
        "Savings at other lengths, or in a model that is not here", icon=":material/table:", key="savings",
        on_change="rerun",
    ) as savings:  # fmt: skip
        if not savings.open:
            return
        try:
            other = _of_config()
            sizes = _sizes_of(other) if other else _sizes(engine)
            if other:
                spec = replace(spec, skip_layers=(), layer_ratios=None, head_ratios=None)  # those of another model
                other.check(spec)
        except ModelError as error:
            st.error(markup.plain(str(error)), icon=":material/error:")
            return
        if sizes is None or not sizes.shape.layers:
            st.caption("There is no cache here that can be compressed.")
            return
        rows = _rows(sizes, spec, LENGTHS)
        columns = {
            "tokens": [f"{row.n_tokens:,}" for row in rows],
            "full cache": [human_bytes(row.full_bytes) for row in rows],
            "compressed": [human_bytes(row.kept_bytes) for row in rows],
            "saved": [_saved(row) for row in rows],
        }
        if sizes.weights is not None:
            columns |= {
                "sequences that fit, full": [_count(row.full_fits) for row in rows],
                "sequences that fit, compressed": [_count(row.kept_fits) for row in rows],
                "faster at most": [f"× {row.full_seconds / row.kept_seconds:.2f}" for row in rows],
            }
        st.dataframe(columns, hide_index=True)
        st.caption(
            f"Arithmetic for {markup.plain(state.GPU.get())}, batch {state.BATCH.get()}, caches in {sizes.dtype}"
            + (f", weights of {human_bytes(sizes.weights)} as stored" if sizes.weights is not None else "")
            + ". A step of a dense model reads all weights and caches once; a mixture of experts reads fewer weights. "
            "The model need not work at all these lengths."
        )


def _rows(sizes: _Sizes, spec: CompressionSpec, lengths: Sequence[int]) -> tuple[Saving, ...]:
    gpu = GPUS[state.GPU.get()]
    return savings(
        sizes.shape,
        spec,
        weights_bytes=sizes.weights or 0,
        gpu_bytes=gpu.nbytes,
        bandwidth=gpu.bandwidth,
        lengths=lengths,
        batch=int(state.BATCH.get()),
    )


def _sizes(engine: Engine) -> _Sizes | None:
    """Sizes of the model on screen, in its own dtype or the chosen one; None where nothing tells."""
    ref, run = state.model_ref(), state.run()
    try:
        config = engine.config(ref)
        own, weights = (checkpoint_dtype(ref), weights_bytes(ref)) if config else (None, None)
    except UserError:  # it was run once, and is gone
        config, own, weights = None, None, None
    dtype = state.CACHE_DTYPE.get() or (own if own in DTYPES else "bfloat16")
    if run:
        return _Sizes(replace(run.cache_shape, itemsize=DTYPES[dtype]), weights, dtype)
    return None if config is None else _Sizes(CacheShape.of(config, DTYPES[dtype]), weights, dtype)


def _sizes_of(other: ModelSize) -> _Sizes:
    own = str(getattr(other.config, "dtype", None)).removeprefix("torch.")
    dtype = state.CACHE_DTYPE.get() or (own if own in DTYPES else "bfloat16")
    return _Sizes(replace(other.shape, itemsize=DTYPES[dtype]), other.weights_bytes, dtype)


def _of_config() -> ModelSize | None:
    """Another model, by its config alone; None where none is given. Raises ModelError where it is refused."""
    file = st.file_uploader("config.json of another model, without its weights", type="json", key="config_file")
    pasted = st.text_area("Or its text", key="config_text", persist_state="session", height=80, max_chars=200_000)
    text = uploads.text_of(file) if file is not None else pasted
    uploads.show_refused()
    if not text.strip():
        return None
    with st.spinner("Reading the config …"):
        return _size_of(text)


@lru_cache(maxsize=32)
def _size_of(config: str) -> ModelSize:
    """Sizes of a model whose config.json reads so. Raises ModelError."""
    from analysis.models.sizes import model_size

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.json"
        path.write_text(config, encoding="utf-8")
        return model_size(path)


def _saved(row: Saving) -> str:
    return f"{1 - row.kept_bytes / row.full_bytes:.0%}".replace("%", " %")


def _count(fits: int | None) -> str:
    return f"{inf if fits is None else fits:,}"
