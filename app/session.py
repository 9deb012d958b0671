"""What a session has on screen: the run, the study, the plan, the chosen head, and the compression that pages share.

The compression lives in the widgets themselves (`persist_state="session"`), under one key each on every page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache, wraps
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import streamlit as st

from analysis.captures import Capture, load_run
from analysis.demo.presets import BUNDLED_RUNS, bundled_results, demo_model
from analysis.errors import ModelError
from analysis.measures import by_kv_head
from analysis.metrics import METRICS, HeadValues, by_query, metrics
from analysis.models.memory import DTYPES
from analysis.models.sizes import checkpoint_dtype
from analysis.plans.curves import LossCurves, loss_curves
from analysis.plans.skip import Plan
from analysis.studies import Study, load_study, study_of
from analysis.verdicts import verdicts
from l2kv.policies import POLICIES
from l2kv.spec import CompressionSpec

POLICY_NAMES = {
    "low_norm": "Low norm (the paper)",
    "high_norm": "High norm (its mirror)",
    "random": "Random",
    "streaming": "First and recent (StreamingLLM)",
    "keydiff": "Unlike the other keys (KeyDiff)",
    "accumulated": "Most attention so far (H2O)",
    "window": "Attention of the last 32 queries (SnapKV)",
    "last_query": "Attention of the last query (TOVA)",
}
BY_NORM = ("low_norm", "high_norm", "random")  # what a run can tell the loss of
BY_HEAD = "Low or high norm by head"  # signed_norm: only a plan can say which

_MOST_REMEMBERED = 16  # answers of one function
Thing = TypeVar("Thing")
Settings = ParamSpec("Settings")
Answer = TypeVar("Answer")


_OF_THE_DEMO: dict[str, tuple[object, dict]] = {}


def remembered(
    work: Callable[Concatenate[Thing, Settings], Answer],
) -> Callable[Concatenate[Thing, Settings], Answer]:
    """Have a function of a run or a study, and of settings by position, work each answer out once.

    The session keeps the latest answers on one thing; not the process, which would keep the runs of closed tabs. Only
    those on the demo run are kept for all.
    """
    name = f"{work.__module__}.{work.__qualname__}"

    @wraps(work)
    def ask(thing: Thing, *settings: Settings.args) -> Answer:
        kept = _OF_THE_DEMO if thing is _demo_run() else st.session_state.setdefault("remembered", {})
        of, answers = kept.get(name, (None, None))
        if of is not thing:
            answers = {}
            kept[name] = thing, answers
        with suppress(KeyError):
            return answers[settings]
        answer = answers[settings] = work(thing, *settings)
        for oldest in list(answers)[:-_MOST_REMEMBERED]:
            answers.pop(oldest, None)  # another session may have been first
        return answer

    return ask


@lru_cache(maxsize=2)
def bundled_run(model: str) -> Capture:
    """The run of a model that comes with the program, one of `BUNDLED_RUNS`."""
    return load_run(bundled_results(model).demo)


def _demo_run() -> Capture:
    return bundled_run(demo_model())


@remembered
def study_of_run(run: Capture, probe: str) -> Study:
    """The study of one text that a run is, by one probe."""
    return study_of(run, probes=(probe,))


@remembered
def values_of(run: Capture, skip_first: int, probe: str = "next token") -> HeadValues:
    """Metrics of all heads by a probe. Those that are about the first token are of all tokens, whatever is skipped."""
    study = study_of_run(run, probe)
    whole = HeadValues(study.metrics, study.values[0, 0], study.status[0, 0])
    if not skip_first:
        return whole
    others = metrics(run, probe, skip_first)
    of_all = np.array([METRICS[name].about_sink for name in whole.names])[:, None, None]
    return HeadValues(
        whole.names, np.where(of_all, whole.values, others.values), np.where(of_all, whole.status, others.status)
    )


@remembered
def verdicts_of(run: Capture, probe: str = "next token") -> np.ndarray:
    """Verdict of each head by a probe, [L, H]."""
    return verdicts(study_of_run(run, probe), probe=probe)


@remembered
def kv_alr_of(run: Capture, skip_first: int, probe: str) -> np.ndarray:
    """ALR of all kv heads, [L, Hkv], by the mean attention of the query heads that read each."""
    return metrics(by_kv_head(run), probe, skip_first, ["alr"]).values[0]


@remembered
def gamma_by_query(run: Capture, skip_first: int) -> np.ndarray:
    """Γ of each of the last queries, [W, L, H], with or without the first token."""
    return by_query(run, "gamma_skip_first" if skip_first else "gamma")


@remembered
def curves_of(run: Capture, protect_last: int) -> LossCurves:
    """What each kv head loses at each keep ratio."""
    return loss_curves(run, protect_last=protect_last)


def current_run() -> Capture:
    """The run on screen: the session's own, or the demo."""
    return st.session_state.get("run") or _demo_run()


def is_bundled() -> bool:
    """Whether a run that comes with the program is on screen."""
    return is_demo() or any(current_run() is bundled_run(model) for model in BUNDLED_RUNS)


def is_demo() -> bool:
    """Whether the demo run is on screen."""
    return st.session_state.get("run") is None


def show_run(run: Capture | None) -> None:
    """Put a run on screen; None is the demo. What was chosen for the old one, its model among it, goes with it."""
    st.session_state["run"] = run
    of_the_old = ("layer", "head", "skip_layers", "skip_count", "generated", "remembered", "cache_dtype")
    models = ("model_choice", "model_ref", "generate_model", "study_anyway")
    for key in (*of_the_old, *models):
        st.session_state.pop(key, None)


def other_run() -> Capture | None:
    """The run that the one on screen is compared with: one that was opened or held, or the demo, or none."""
    run = st.session_state.get("other_run")
    return _demo_run() if run is None and not is_demo() else run


def compare_with(run: Capture | None) -> None:
    """Compare the run on screen with this one; None is the demo, where another is on screen."""
    st.session_state["other_run"] = run


@lru_cache(maxsize=4)
def _bundled_study(model: str) -> Study | None:
    file = bundled_results(model).study
    return load_study(file) if file else None


def current_study() -> Study | None:
    """The study on screen: the session's own, or the bundled one of the model on screen. None where there is none.

    One of another model than the run's is shown for as long as the user wants it, and not as that model's answer.
    """
    own, model = st.session_state.get("study"), current_run().model
    if own is not None and (own.model == model or st.session_state.get("study_anyway")):
        return own
    return _bundled_study(model)


def study_of_another() -> Study | None:
    """The session's own study, where it is of another model than the run on screen."""
    own = st.session_state.get("study")
    return own if own is not None and own.model != current_run().model else None


def show_study(study: Study | None) -> None:
    """Put a study on screen; None is the bundled one. The head that was chosen was of the old one."""
    st.session_state["study"] = study
    st.session_state["study_anyway"] = study is not None  # whatever the run on screen is of
    for key in ("study_layer", "study_head", "remembered"):
        st.session_state.pop(key, None)


def plan_in_use() -> Plan | None:
    """The plan that Generate can decode with."""
    return st.session_state.get("plan")


def use_plan(plan: Plan | None) -> None:
    """Put a plan into the session, or drop the one that is there; Generate begins with it."""
    st.session_state["plan"] = plan
    if plan is not None:  # beside it, one ratio for all of the same budget
        st.session_state["second_keep_ratio"] = min(max(round(20 * plan.spec.keep_ratio), 1), 20) / 20
    for key in ("first_by", "second_by"):  # what Generate compresses by: with a new plan it begins anew
        st.session_state.pop(key, None)


def choose_head(layer: int, head: int) -> None:
    """Open a head."""
    st.session_state["layer"], st.session_state["head"] = layer, head


def chosen_head(run: Capture) -> tuple[int, int]:
    """The open head; at first the one that follows the paper most, or errs least against it.

    Of those that there is something to see in, if there are any: not one that looks at nothing but the first token.
    """
    if "layer" not in st.session_state or "head" not in st.session_state:
        values = values_of(run, 0)
        gamma = np.where(np.isnan(values.of("gamma")), 9.0, values.of("gamma"))
        looks_about = (values.of("sink_share") < 0.5) & (gamma < 9)
        best = np.where(looks_about, gamma, 9.0).argmin() if looks_about.any() else gamma.argmin()
        choose_head(*divmod(int(best), run.n_heads))
    return st.session_state["layer"], st.session_state["head"]


def skip_layers_input(run: Capture) -> None:
    """Which layers keep everything."""
    st.multiselect(
        "Layers that keep everything",
        [i for i, kind in enumerate(run.layer_kinds) if kind == "full"],
        key="skip_layers",
        persist_state="session",
        placeholder="None: compress every layer",
        help="Layers count from 0. The page *Skip layers* suggests some.",
    )


def _begin_with(key: str, value: float) -> None:
    """Set a control at first, and again on another page, where its widget is a new one.

    Not as the widget's own default: Streamlit warns of one whose value is set, too, as presets do.
    """
    st.session_state[key] = st.session_state.get(key, value)


def ratio_input(*, second: bool = False) -> None:
    """The share of the tokens that stays, in the first compression or in the second beside it."""
    key = "second_keep_ratio" if second else "keep_ratio"
    _begin_with(key, 0.25 if second else 0.5)
    st.slider(
        "Keep ratio of the second" if second else "Keep ratio", 0.05, 1.0, step=0.05, key=key, persist_state="session",
        help="The share of the tokens seen that each head keeps. 1 keeps the whole cache.",
    )  # fmt: skip


def policy_input(choices: Sequence[str] = tuple(POLICY_NAMES), *, second: bool = False) -> None:
    """Which tokens stay. A policy of another page that is no choice here gives way to the paper's."""
    key = "second_policy" if second else "policy"
    about = "\n".join(f"- **{POLICY_NAMES[name]}**: {POLICIES[name].about}" for name in choices)
    if st.session_state.get(key, choices[0]) not in choices:
        st.session_state[key] = choices[0]
    st.selectbox(
        "Which stay in the second" if second else "Which tokens stay", choices, format_func=POLICY_NAMES.get, key=key,
        persist_state="session", help=about,
    )  # fmt: skip


def protect_last_input() -> None:
    """How many recent tokens are safe."""
    _begin_with("protect_last", 32)
    st.number_input(
        "Protect the last", 0, 4096, step=8, key="protect_last", persist_state="session",
        help="The latest tokens are never evicted. 0 in the paper; without it a new token whose norm is on the wrong "
        "side is evicted in the step that added it.",
    )  # fmt: skip


def prune_after_input() -> None:
    """From how many tokens on the cache is compressed."""
    _begin_with("prune_after", 0)
    st.number_input(
        "Compress from", 0, 1_000_000, step=64, key="prune_after", persist_state="session",
        help="In tokens. A cache of fewer is left alone (prune_after in the paper).",
    )  # fmt: skip


def dtype_of(ref: str) -> str | None:
    """The dtype that a model's checkpoint is in, where it is at hand and says so."""
    try:
        named = checkpoint_dtype(ref)
    except ModelError:
        return None
    return named if named in DTYPES else None


def dtype_input(dtype: str | None, *, key: str = "cache_dtype") -> int:
    """What a cache is to be in: bytes of a number. At first the checkpoint's dtype, where it is known."""
    _begin_with(key, dtype or "bfloat16")
    chosen = st.selectbox(
        "Cache in", list(DTYPES), key=key, persist_state="session", width=150,
        help=(
            f"The checkpoint is in {dtype}, and so is its cache, unless it is loaded otherwise: on a CPU this app "
            "computes in float32."
            if dtype
            else "The checkpoint's own dtype is not known here; most are in bfloat16."
        ),
    )  # fmt: skip
    return DTYPES[chosen]


def take_spec(spec: CompressionSpec, *, beside: CompressionSpec | None = None) -> None:
    """Set the controls to a compression, and to a second one beside it, or none. What they do not show stays out."""
    for name in ("keep_ratio", "policy", "protect_last", "prune_after"):
        st.session_state[name] = getattr(spec, name)
    st.session_state["skip_layers"] = list(spec.skip_layers)
    st.session_state["beside"] = beside is not None
    if beside is not None:
        st.session_state.update(second_keep_ratio=beside.keep_ratio, second_policy=beside.policy)


def current_spec(*, second: bool = False) -> CompressionSpec:
    """The compression as the controls say, those of other pages included; of the second one, where it has its own."""
    state, prefix = st.session_state, "second_" if second else ""
    return CompressionSpec(
        keep_ratio=round(state.get(f"{prefix}keep_ratio", 0.5), 2),
        policy=state.get(f"{prefix}policy", "low_norm"),
        protect_last=int(state.get("protect_last", 32)),
        prune_after=int(state.get("prune_after", 0)),
        skip_layers=tuple(state.get("skip_layers", ())),
    )


def in_words(spec: CompressionSpec) -> str:
    """A compression in a line of Markdown."""
    kept = f"{spec.keep_ratio:.0%} kept" if spec.budget is None else f"{spec.budget} tokens kept"
    shared = " by kv head" if spec.head_ratios else " by layer" if spec.layer_ratios else ""
    policy = (POLICY_NAMES | {"signed_norm": BY_HEAD}).get(spec.policy, spec.policy).split(" (")[0].lower()
    details = [f"**{kept}**{shared}", policy]
    details += [f"last {spec.protect_last} protected"] * bool(spec.protect_last)
    skipped = ", ".join(map(str, spec.skip_layers))
    details += [f"layer{'s' * (len(spec.skip_layers) > 1)} {skipped} whole"] * bool(skipped)
    details += [f"from {spec.prune_after} tokens on"] * bool(spec.prune_after)
    return ", ".join(details)
