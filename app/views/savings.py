"""What a plan saves, part of the page Plan: bytes, sequences that fit a GPU, and the time that its memory allows."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from analysis.captures import Capture
from analysis.errors import ModelError
from analysis.models.memory import DTYPES
from analysis.models.sizes import weights_bytes
from analysis.plans.export import LENGTHS, Saving, savings
from analysis.words import human_bytes
from app import session
from app.components import controls, markup, sources, uploads
from app.engine import Engine
from l2kv.config import CacheShape
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from analysis.models.sizes import ModelSize

_CHOICES = (1024, 4096, 8192, 16_384, 32_768, 65_536, 131_072, 1_048_576)
_GIB, _GB = 2**30, 10**9


@dataclass(frozen=True, slots=True)
class _Gpu:
    """Memory and its bandwidth, as its maker gives them."""

    gib: float
    gb_per_second: float


_GPUS = {
    "H200 (141 GB)": _Gpu(141, 4800),
    "H100 SXM (80 GB)": _Gpu(80, 3350),
    "A100 SXM (80 GB)": _Gpu(80, 2039),
    "L40S (48 GB)": _Gpu(48, 864),
    "L4 (24 GB)": _Gpu(24, 300),
    "RTX 4090 (24 GB)": _Gpu(24, 1008),
    "RTX 3060 (12 GB)": _Gpu(12, 360),
}
_OWN = "Another GPU"


@dataclass(frozen=True, slots=True)
class _Model:
    """What the arithmetic needs to know of a model."""

    name: str
    shape: CacheShape
    weights_bytes: int | None  # None: not known
    dtype: str | None  # of its checkpoint; None: not known
    source: str = ""  # where the weights are from
    other: ModelSize | None = None  # what is known of one that is not on screen


def section(engine: Engine, run: Capture) -> None:
    """Draw the section."""
    st.subheader("What it saves")
    try:
        model = _of_config() or _of_run(engine, run)
        spec = _spec(model)
        if model.other is not None:
            model.other.check(spec)
    except ModelError as error:
        st.error(markup.plain(str(error)), icon=":material/error:")
        return
    if not model.shape.layers:
        st.info(
            f"Nothing: in {markup.plain(model.name)} every layer has a sliding window, so its cache is bounded "
            "already, and none of it is compressed.",
            icon=":material/info:",
        )
        return
    gpu, batch, itemsize = _gpu(model)
    shape = replace(model.shape, itemsize=itemsize)
    lengths = st.multiselect(
        "Tokens of each sequence", _CHOICES, default=LENGTHS, key="saved_lengths",
        format_func=lambda n: f"{n:,}", persist_state="session", accept_new_options=False,
    )  # fmt: skip
    if not lengths:
        st.info("Choose a length.", icon=":material/info:")
        return
    rows = savings(
        shape,
        spec,
        weights_bytes=model.weights_bytes or 0,
        gpu_bytes=int(gpu.gib * _GIB),
        bandwidth=gpu.gb_per_second * _GB,
        lengths=sorted(lengths),
        batch=batch,
    )
    known = model.weights_bytes is not None
    st.dataframe(_bytes(rows) | (_on_gpu(rows) if known else {}), hide_index=True)
    told = (
        f"Sequences fit beside the weights ({human_bytes(model.weights_bytes)} {model.source}); activations and the "
        "allocator's waste are not counted. A decoding step of a dense model reads all weights and all caches once, so "
        "it cannot be faster than that takes (a mixture of experts reads only some of its weights); what it costs to "
        "choose whom to evict is not in it."
        if known
        else "Its weights are not on this machine, so what fits beside them, and the time of a step, are not told: "
        "load it on the page Capture, or give its config.json above."
    )
    st.caption(
        f"Arithmetic, for a batch of {batch} of {markup.plain(model.name)} with {controls.in_words(spec)}, caches of "
        f"{markup.counted(itemsize, 'byte')} a number. {told} The model need not work at all these lengths."
    )


def _bytes(rows: Sequence[Saving]) -> dict[str, list[str]]:
    return {
        "tokens": [f"{row.n_tokens:,}" for row in rows],
        "full cache": [human_bytes(row.full_bytes) for row in rows],
        "compressed": [human_bytes(row.kept_bytes) for row in rows],
        "saved": [f"{1 - row.kept_bytes / row.full_bytes:.0%}" for row in rows],
    }


def _on_gpu(rows: Sequence[Saving]) -> dict[str, list[str]]:
    """What needs the bytes of the weights to be known. Columns may not have one name, so spaces tell them apart."""
    return {
        "sequences that fit, full": [_count(row.full_fits) for row in rows],
        "compressed ": [_count(row.kept_fits) for row in rows],
        "a step takes at least, full": [_milliseconds(row.full_seconds) for row in rows],
        "compressed  ": [_milliseconds(row.kept_seconds) for row in rows],
    }


def _spec(model: _Model) -> CompressionSpec:
    """The plan in use where it is of this model, or what the controls say."""
    plan, controlled = session.plan_in_use(), controls.current_spec()
    if model.other is not None:
        return replace(controlled, skip_layers=())  # the list is of the model on screen
    if plan is None or plan.model != model.name:
        return controlled
    by = st.segmented_control(
        "Compressed by", ["the plan in use", "the controls"], default="the plan in use", required=True, key="saved_by",
        persist_state="session",
    )  # fmt: skip
    return plan.spec if by == "the plan in use" else controlled


def _gpu(model: _Model) -> tuple[_Gpu, int, int]:
    """The GPU, how many sequences at once, and bytes of a number in the cache."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        name = st.selectbox(
            "GPU", [*_GPUS, _OWN], index=1, key="gpu", persist_state="session",
            format_func=lambda name: f"{name}, {_GPUS[name].gb_per_second:,g} GB/s" if name in _GPUS else name,
        )  # fmt: skip
        if name == _OWN:
            gib = st.number_input("Memory, GiB", 0.5, 1024.0, 16.0, 1.0, key="gpu_gib", persist_state="session")
            speed = st.number_input(
                "Bandwidth, GB/s", 1.0, 50_000.0, 500.0, 50.0, key="gpu_gbs", persist_state="session"
            )
            gpu = _Gpu(gib, speed)
        else:
            gpu = _GPUS[name]
        batch = st.number_input("Sequences at once", 1, 4096, 1, key="saved_batch", persist_state="session")
        key = "cache_dtype" if model.other is None else f"cache_dtype_{model.name}_{model.weights_bytes}"
        itemsize = controls.dtype_input(model.dtype, key=key)
    return gpu, int(batch), itemsize


def _of_config() -> _Model | None:
    """Another model, by its config alone; None where none is given. Raises ModelError where it is refused."""
    with st.expander("For another model, by its config.json (no weights)", icon=":material/deployed_code:"):
        file = st.file_uploader("config.json", type="json", key="config_file")
        pasted = st.text_area("Or its text", key="config_text", persist_state="session", height=120, max_chars=200_000)
        text = uploads.text_of(file) if file is not None else pasted
        uploads.show_refused()
        if not text.strip():
            return None
        name = file.name if file is not None and Path(file.name).stem != "config" else "the config given"
        with st.spinner("Reading the config …"):
            size = replace(_size_of(text), name=name)
    dtype = str(getattr(size.config, "dtype", None)).removeprefix("torch.")
    known = dtype if dtype in DTYPES else None
    return _Model(name, size.shape, size.weights_bytes, known, "counted from the config", other=size)


@lru_cache(maxsize=32)
def _size_of(config: str) -> ModelSize:
    """Of a model whose config.json reads so. Raises ModelError."""
    from analysis.models.sizes import model_size

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.json"
        path.write_text(config, encoding="utf-8")
        return model_size(path)


def _of_run(engine: Engine, run: Capture) -> _Model:
    """The model of the run on screen, as its checkpoint has it: on a CPU what is in memory is twice as large."""
    ref = sources.ref_of(run.model)
    if ref is not None and (weights := weights_bytes(ref)):
        return _Model(run.model, run.cache_shape, weights, controls.dtype_of(ref), "in its files, as they are there")
    loaded = engine.loaded
    if loaded is not None and loaded.name == run.model:  # from the hub
        weights = sum(p.numel() * p.itemsize for p in loaded.model.parameters())
        return _Model(run.model, run.cache_shape, weights, controls.dtype_of(engine.ref), "as they are in memory")
    return _Model(run.model, run.cache_shape, None, None)


def _count(fits: int | None) -> str:
    return "any number" if fits is None else f"{fits:,}"


def _milliseconds(seconds: float) -> str:
    ms = 1000 * seconds
    return f"{ms:.2f} ms" if ms < 10 else f"{ms:,.0f} ms"
