"""Controls of the compression that pages share, and their values as a `CompressionSpec`.

The values live in the session (`session.KEEP_RATIO` and so on), so each control is the same one on every page.
"""

from __future__ import annotations

from collections.abc import Sequence

import streamlit as st

from analysis.captures import Capture
from analysis.errors import ModelError
from analysis.models.memory import DTYPES
from analysis.models.sizes import checkpoint_dtype
from app import session
from app.components import choices
from l2kv.policies import POLICIES
from l2kv.spec import CompressionSpec

BY_NORM = ("low_norm", "high_norm", "random")  # what a run can tell the loss of


def title(policy: str) -> str:
    """Title of a policy, by its name."""
    return POLICIES[policy].title if policy in POLICIES else policy  # of a file, of a policy that is not here


def ratio_input(*, second: bool = False) -> None:
    """Ask for the keep ratio of the first compression, or of the second beside it."""
    slot = session.SECOND_KEEP_RATIO if second else session.KEEP_RATIO
    st.slider(
        "Keep ratio of the second" if second else "Keep ratio", 0.05, 1.0, step=0.05, **slot.widget(),
        help="The share of the tokens seen that each head keeps. 1 keeps the whole cache.",
    )  # fmt: skip


def policy_input(names: Sequence[str] = (), *, second: bool = False) -> None:
    """Ask for a policy, one of the names or of all `choices.policies`.

    A policy chosen on another page that is not offered here is replaced by the first one.
    """
    offered = {name: POLICIES[name] for name in names} or choices.policies()
    slot = session.SECOND_POLICY if second else session.POLICY
    if slot.get() not in offered:
        slot.set(next(iter(offered)))
    st.selectbox(
        "Which stay in the second" if second else "Which tokens stay", list(offered), format_func=title,
        help=choices.explained(offered), **slot.widget(),
    )  # fmt: skip


def protect_last_input() -> None:
    """Ask for the number of recent tokens to protect."""
    st.number_input(
        "Protect the last", 0, 4096, step=8, **session.PROTECT_LAST.widget(),
        help="The latest tokens are never evicted. 0 in the paper; without it a new token whose norm is on the wrong "
        "side is evicted in the step that added it.",
    )  # fmt: skip


def prune_after_input() -> None:
    """Ask for the number of tokens from which on the cache is compressed."""
    st.number_input(
        "Compress from", 0, 1_000_000, step=64, **session.PRUNE_AFTER.widget(),
        help="In tokens. A cache of fewer is left alone (prune_after in the paper).",
    )  # fmt: skip


def skip_layers_input(run: Capture) -> None:
    """Ask for the layers to skip."""
    st.multiselect(
        "Layers that keep everything",
        [i for i, kind in enumerate(run.layer_kinds) if kind == "full"],
        **session.SKIP_LAYERS.widget(),
        placeholder="None: compress every layer",
        help="Layers count from 0. The page *Skip layers* suggests some.",
    )


def dtype_of(ref: str) -> str | None:
    """Dtype of a model's checkpoint, if it is on this machine and names one."""
    try:
        named = checkpoint_dtype(ref)
    except ModelError:
        return None
    return named if named in DTYPES else None


def dtype_input(dtype: str | None, *, key: str = session.CACHE_DTYPE.key) -> int:
    """Ask for the cache's dtype; the default is the checkpoint's, where it is known."""
    slot = session.Slot(key, dtype or session.CACHE_DTYPE.default)
    chosen = st.selectbox(
        "Cache in", list(DTYPES), **slot.widget(), width=150,
        help=(
            f"The checkpoint is in {dtype}, and so is its cache, unless it is loaded otherwise: on a CPU this app "
            "computes in float32."
            if dtype
            else "The checkpoint's own dtype is not known here; most are in bfloat16."
        ),
    )  # fmt: skip
    return DTYPES[chosen]


def take_spec(spec: CompressionSpec, *, beside: CompressionSpec | None = None) -> None:
    """Set the controls to a compression, and to a second one or none. Fields without a control are ignored."""
    session.KEEP_RATIO.set(spec.keep_ratio)
    session.POLICY.set(spec.policy)
    session.PROTECT_LAST.set(spec.protect_last)
    session.PRUNE_AFTER.set(spec.prune_after)
    session.SKIP_LAYERS.set(list(spec.skip_layers))
    session.BESIDE.set(beside is not None)
    if beside is not None:
        session.SECOND_KEEP_RATIO.set(beside.keep_ratio)
        session.SECOND_POLICY.set(beside.policy)


def current_spec(*, second: bool = False) -> CompressionSpec:
    """Compression set by the controls, those of other pages included; the second shares what it has no control for."""
    ratio, policy = (
        (session.SECOND_KEEP_RATIO, session.SECOND_POLICY) if second else (session.KEEP_RATIO, session.POLICY)
    )
    return CompressionSpec(
        keep_ratio=round(ratio.get(), 2),
        policy=policy.get(),
        protect_last=int(session.PROTECT_LAST.get()),
        prune_after=int(session.PRUNE_AFTER.get()),
        skip_layers=tuple(session.SKIP_LAYERS.get()),
    )


def in_words(spec: CompressionSpec) -> str:
    """Describe a compression in a line of Markdown."""
    kept = f"{spec.keep_ratio:.0%} kept" if spec.budget is None else f"{spec.budget} tokens kept"
    shared = " by kv head" if spec.head_ratios else " by layer" if spec.layer_ratios else ""
    details = [f"**{kept}**{shared}", title(spec.policy).split(" (")[0].lower()]
    details += [f"last {spec.protect_last} protected"] * bool(spec.protect_last)
    skipped = ", ".join(map(str, spec.skip_layers))
    details += [f"layer{'s' * (len(spec.skip_layers) > 1)} {skipped} whole"] * bool(skipped)
    details += [f"from {spec.prune_after} tokens on"] * bool(spec.prune_after)
    return ", ".join(details)
