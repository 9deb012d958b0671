"""Tune: where should the bytes go? One quality-memory curve, a table of layers, a plan from it, and its export."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import streamlit as st

from analysis import defaults
from analysis.captures import Capture
from analysis.errors import SettingsError, UserError
from analysis.plans.ablation import COSTLY, POLICIES, Ablation, suggest_by_ablation
from analysis.plans.curves import BY_NORM
from analysis.plans.export import kvpress_code, library_code
from analysis.plans.front import Front, FrontPoint, measure_front, passes
from analysis.plans.skip import RULES, Plan, SkipSuggestion, suggest_skip_layers
from analysis.plans.strategies import STRATEGIES, title_of
from analysis.records import to_json
from analysis.statistics import means, nanmean
from analysis.studies import Study, layer_alr, policy_alr
from analysis.texts.excerpts import SPLIT
from analysis.words import counted, layers_listed
from app import figures, header, library, state
from app.components import choices, documents, markup
from app.components.charts import page_is_dark, show
from app.engine import Engine
from app.jobs import Jobs
from app.report.chapters import INTERVALS, front_figure
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel
    from analysis.progress import Progress

_RULES = {"threshold": "threshold", "count": "number", "gap": "widest gap"}
_BY = {"cost": "Measured cost/MiB", "alr": "ALR, a proxy"}
_STRATEGY = state.Slot("strategy", "", state.Param("strategy", state.one_of(("", *STRATEGIES))))
"""Strategy of the plan to make; empty until the page is drawn: then `_first_strategy`."""


def draw(engine: Engine, jobs: Jobs) -> None:
    """Draw the page."""
    st.title("Where should the bytes go?")
    run = state.run()
    if run is None:
        header.no_run()
        return
    if not run.cache_shape.layers:
        st.info("Every layer of this model has a sliding window, so its cache is bounded. There is nothing to tune.")
        return
    front, ablation = _latest(Front, "front"), _latest(Ablation, "ablation")
    if front is not None:
        st.markdown(markup.headline(front.answer()))
        st.markdown(_best(front))
    left, right = st.columns([3, 2], gap="large")
    with left:
        _curve(front, run)
    with right:
        _layers(run, ablation)
    st.divider()
    _allocate(run, front)
    st.divider()
    st.markdown(f"In force: {header.in_words(state.spec())}.")
    # What is folded is not drawn: the browser needs half a second for the code alone.
    with st.expander(
        "Take it with you: script, kvpress, JSON", icon=":material/code:", key="export", on_change="rerun"
    ) as export:
        if export.open:
            _export(run)
    unmeasured = front is None or not front.points
    with st.expander("Measure", unmeasured, icon=":material/science:", key="measuring", on_change="rerun") as measuring:
        if measuring.open:
            _measure(jobs, run)


def _latest(cls: type[Any], kind: str) -> Any:
    """The latest record of a kind of the model on screen, or None."""
    found = library.entries(kind, model=state.model())
    return library.opened(cls, found[0].id) if found else None


def _curve(front: Front | None, run: Capture) -> None:
    """Every point that was measured: a click puts its compression in force on every page."""
    st.subheader("Quality against memory")
    if front is None or not front.points:
        st.info(
            f"Not measured yet for {markup.plain(state.model())}: *Measure* at the end of this page does it. Until "
            "then the table of layers goes by ALR, a proxy.",
            icon=":material/info:",
        )
        _proxy(run)
        return
    lines = front.lines

    def clicked() -> None:
        points = st.session_state["tune_front"].selection.points
        if points and points[0]["curve_number"] < len(lines):  # the last one is the full cache
            _use_point(front, lines[list(lines)[points[0]["curve_number"]]][points[0]["point_index"]])

    st.plotly_chart(
        front_figure(front),
        key="tune_front", on_select=clicked, selection_mode="points", config={"displaylogo": False},
        alt="Bytes of the cache against the change of the NLL, a line for each allocation strategy",
    )  # fmt: skip
    st.caption(
        f"Change of the NLL after {front.lengths[0]} tokens, the mean over {front.counted}; {INTERVALS}. "
        f"Plans were made on {counted(len(front.planned_on), 'other')}. Lower left is better. "
        "**Click a point to use it.**"
    )
    with st.container(horizontal=True, vertical_alignment="bottom"):
        names, best = list(lines), _least(front)
        name = st.selectbox("Strategy", names, names.index(best.strategy), format_func=title_of, key="tune_line")
        ratios = [point.keep_ratio for point in lines[name]]
        st.selectbox(
            "Keep ratio",
            ratios,
            ratios.index(best.keep_ratio) if best.keep_ratio in ratios else 0,
            format_func="{:.0%}".format,
            key="tune_point",
        )
        st.button("Use this point", on_click=_use_chosen, args=(front,), key="use_point")
    with st.expander("The numbers", icon=":material/table:", key="front_numbers", on_change="rerun") as numbers:
        if numbers.open:
            _numbers(front)


def _numbers(front: Front) -> None:
    rows = [
        row | {"strategy": title_of(row["strategy"]), "nll_change": str(row["nll_change"])} for row in front.table()
    ]
    st.dataframe(rows, hide_index=True, key="front_table")
    if front.left_out:
        st.caption("Left out, as the budget is too small: " + markup.plain("; ".join(front.left_out)))


def _near(front: Front) -> float:
    """Measured keep ratio that is nearest to the header's."""
    return min(
        (point.keep_ratio for point in front.points), key=lambda ratio: abs(ratio - float(state.KEEP_RATIO.get()))
    )


def _least(front: Front) -> FrontPoint:
    """Point of least NLL change at the header's keep ratio."""
    near = _near(front)
    return min((point for point in front.points if point.keep_ratio == near), key=lambda point: point.mean)


def _best(front: Front) -> str:
    """What predicts best at the header's keep ratio, beside the best that keeps the same ratio everywhere."""
    best, uniform = _least(front), front.best("uniform").get(_near(front))
    told = f"At {100 * best.keep_ratio:.3g} % of the pairs, **{title_of(best.strategy)}** predicts best on average: "
    told += f"{_change(front, best)} nats/token, perplexity × {np.exp(best.mean):.3f}"
    if uniform is None or uniform is best:
        return f"{told}."
    told += f"; {title_of(uniform.strategy)}: {_change(front, uniform)}, × {np.exp(uniform.mean):.3f}."
    if any(one.plan is best and one.verdict == "not told apart" for one in front.comparisons()):
        told += " All comparisons considered, the difference may be luck."
    return told


def _change(front: Front, point: FrontPoint) -> str:
    interval = front.interval(point)
    return f"{interval.value:+.3f} (95 % {interval.low:+.3f} to {interval.high:+.3f})".replace("-", "\N{MINUS SIGN}")


def _proxy(run: Capture) -> None:
    """What norms lose in each layer, where nothing was measured yet."""
    spec, judged = state.uniform_spec(), _judged(run)
    if spec.policy not in BY_NORM:
        return
    by_head, chance = nanmean(policy_alr(judged, spec.policy)), nanmean(judged.of("alr_chance"))
    by_layer, n = nanmean(layer_alr(judged, spec.policy)), len(judged.names)
    show(
        figures.layer_alr(by_head / chance, by_layer, threshold=None, skipped=spec.skip_layers),
        key="tune_proxy", alt="Normalised ALR of each layer and head",
        caption="Normalised ALR: the attention lost beyond the ideal order, as a share of what a random order loses. "
        f"Small points are heads, large ones layers; {'one text' if n == 1 else f'means of {n} texts'}. "
        "Shaded layers are skipped.",
    )  # fmt: skip


def _use_chosen(front: Front) -> None:
    """Put in force what the boxes show now, which may be more than the page has been drawn for."""
    strategy, ratio = st.session_state["tune_line"], st.session_state["tune_point"]
    _use_point(front, min(front.lines[strategy], key=lambda point: abs(point.keep_ratio - ratio)))


def _use_point(front: Front, point: FrontPoint) -> None:
    """Put a measured point in force: in the header's controls where they can say it, else as a plan."""
    spec = point.spec
    beyond_the_controls = (spec.budget, spec.layer_ratios, spec.head_ratios, spec.directions, spec.prune_after)
    if spec.policy in choices.policies() and not any(beyond_the_controls):
        state.take_spec(spec)
        return
    note = f"{title_of(point.strategy)}, keep {point.keep_ratio:.0%}: NLL {front.interval(point)}"
    _use_plan(Plan(front.model, spec, note, front.planned_on))


def _use_plan(plan: Plan) -> None:
    state.PLAN.set(library.WORKSPACE.add(plan, name=plan.note.split(":")[0] or "plan").id)


def _layers(run: Capture, ablation: Ablation | None) -> None:
    """The table of layers with what each costs, and the rules that suggest which to skip."""
    st.subheader("Layers to skip")
    spec = state.uniform_spec()
    measured = ablation if ablation is not None and ablation.spec.policy == spec.policy else None
    judged = _judged(run)
    try:
        suggestion = _suggested(run, measured, judged, spec)
    except SettingsError as error:
        st.info(markup.plain(str(error)), icon=":material/info:")
        suggestion = None
    if suggestion is not None:
        st.markdown(f"**Suggested: {layers_listed(suggestion.layers)}.** {markup.plain(suggestion.rule)}")
        st.button(
            "Use this skip list", icon=":material/check:", type="primary", key="use_skip_list",
            disabled=suggestion.layers == spec.skip_layers,
            on_click=lambda: state.SKIP_LAYERS.set(list(suggestion.layers)),
        )  # fmt: skip
    if measured is not None and (measured.spec.keep_ratio, measured.spec.protect_last) != (
        spec.keep_ratio,
        spec.protect_last,
    ):
        st.caption(
            f"Measured for {header.in_words(measured.spec)}; the header says otherwise. Measure it again "
            "for these settings below."
        )
    _table(run, measured, judged, spec)


def _judged(run: Capture) -> Study:
    """What ALR is read from: the study of the model, or the run."""
    study = state.study()
    return (
        study
        if study is not None and study.layer_kinds == run.layer_kinds
        else library.study_of_run(state.run_id(), "next token")
    )


def _suggested(run: Capture, measured: Ablation | None, judged: Study, spec: CompressionSpec) -> SkipSuggestion:
    """Ask for a rule, and suggest layers by it; what was measured comes before the proxy. Raises SettingsError."""
    options: dict[str, Any] = {}
    rules = [(by, rule) for by in (["alr"] if measured is None else ["cost", "alr"]) for rule in RULES]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        by, rule = st.selectbox(
            "Rule", rules, format_func=lambda rule: f"{_BY[rule[0]]}: {_RULES[rule[1]]}", key="tune_rule",
            persist_state="session", help="Every layer takes the same bytes, so the order by cost is that per MiB.",
        )  # fmt: skip
        if rule == "threshold" and by == "cost":
            options["threshold"] = st.number_input(
                "nats/token", 0.0, 1.0, COSTLY, 0.005, format="%.3f", key="tune_cost", width=150
            )
        elif rule == "threshold":
            options["threshold"] = st.number_input("normalised ALR", 0.0, 2.0, 1.0, 0.05, key="tune_alr", width=150)
        elif rule == "count":
            options["count"] = st.number_input("layers", 0, len(run.cache_shape.layers), 2, key="tune_count", width=150)
    if measured is not None and by == "cost":
        return suggest_by_ablation(measured, rule=rule, **options)
    return suggest_skip_layers(judged, spec.policy, rule=rule, **options)


def _table(run: Capture, measured: Ablation | None, judged: Study, spec: CompressionSpec) -> None:
    """One row for each layer, the worst first, with a box to skip it."""
    layers = list(run.cache_shape.layers)
    columns: dict[str, dict[int, float]] = {}
    if measured is not None:
        change = means(measured.nll_change.T, documents=measured.documents)
        for name, values in (("NLL change", change.mean), ("from", change.low), ("to", change.high)):
            columns[name] = dict(zip(measured.layers, (np.round(values, 3) + 0.0).tolist(), strict=True))
    with suppress(SettingsError):  # a policy that norms say nothing of
        columns["normalised ALR"] = dict(enumerate(nanmean(layer_alr(judged, spec.policy)).tolist()))
    if columns:
        worst = next(iter(columns.values()))
        layers.sort(key=lambda layer: -np.nan_to_num(worst.get(layer, 0.0), nan=np.inf))  # undefined: no order at all
    rows: dict[str, Any] = {"skip": [layer in spec.skip_layers for layer in layers], "layer": layers}
    rows |= {name: [of.get(layer) for layer in layers] for name, of in columns.items()}
    numbers = {name: st.column_config.NumberColumn(format="%.3f") for name in columns}
    edited = st.data_editor(
        rows, hide_index=True, height=380, disabled=[name for name in rows if name != "skip"], column_config=numbers,
        key=f"tune_layers_{','.join(map(str, spec.skip_layers))}",
    )  # fmt: skip
    chosen = sorted(layer for layer, skip in zip(layers, edited["skip"], strict=True) if skip)
    if chosen != list(spec.skip_layers):
        state.SKIP_LAYERS.set(chosen)
        st.rerun()
    n = len(judged.names)
    st.caption(
        (
            "NLL change in nats/token when only this layer is compressed, with its 95 % interval, "
            f"{counted(len(measured.documents), 'excerpt')} of {counted(len(set(measured.documents)), 'text')}. "
            if measured
            else ""
        )
        + f"Normalised ALR: 0 ideal, 1 random, 2 reversed; {'the run on screen' if n == 1 else f'mean of {n} texts'}."
    )


def _planned_on(run: Capture) -> tuple[str, tuple[str, ...], str]:
    """Id of the study or run to plan from, the names of its texts, and what it is of in words."""
    study = state.study()
    if study is not None and study.curves is not None and study.protect_last == state.PROTECT_LAST.get():
        return state.study_id(), study.names, counted(len(study.names), "text")
    names = library.study_of_run(state.run_id(), "next token").names
    return state.run_id(), names, f"one text of {run.n_tokens:,} tokens"


def _first_strategy(front: Front | None, offered: Collection[str]) -> str:
    """The strategy to begin with: of the plans offered the best by the mean at the header's keep ratio."""
    if front is not None and front.points:
        near, plans = _near(front), [name for name in offered if STRATEGIES[name].kind == "plan"]
        points = [point for point in front.points if point.keep_ratio == near and point.strategy in plans]
        if points:
            return min(points, key=lambda point: point.mean).strategy
    return "by_head"


def _allocate(run: Capture, front: Front | None) -> None:
    """Divide the budget of the header among the kv heads, by what is known of their attention."""
    st.subheader("Make a plan")
    offered = choices.strategies()
    id, names, of = _planned_on(run)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        if _STRATEGY.get() not in offered:
            _STRATEGY.set(_first_strategy(front, offered))
        strategy = st.selectbox(
            "Allocation strategy", list(offered), format_func=title_of, help=choices.explained(offered),
            **_STRATEGY.widget(),
        )  # fmt: skip
    ratio = round(float(state.KEEP_RATIO.get()), 4)
    try:
        made = library.plan_of(id, int(state.PROTECT_LAST.get()), ratio, strategy)
    except SettingsError as error:
        st.warning(f"There is no such plan: {markup.plain(str(error))}", icon=":material/warning:")
        return
    if np.isnan(made.expected_loss):
        st.markdown("It reads no norms, so nothing is known of what it would lose.")
    else:
        st.markdown(
            f"At {ratio:.0%} of the pairs it would lose **{made.expected_loss:.1%}** of the next token's attention; "
            f"one ratio for all loses {made.uniform_loss:.1%}, and no plan less than {made.bound:.1%}."
        )
    st.caption(
        f"Planned and judged on the same {of}, which flatters a plan; and attention lost is not prediction lost. "
        "Measure it before you ship it."
    )
    layer, head = np.indices(made.ratios.shape).reshape(2, -1)
    show(
        figures.ratio_map(made.ratios, dark=page_is_dark()), key="tune_ratios",
        alt="Share of the tokens that each kv head keeps",
        caption=f"Keep ratio of each kv head, {made.used:.1%} of all pairs. Rows are layers, columns kv heads.",
        table={"layer": layer, "kv head": head, "keep ratio": made.ratios.ravel()},
    )  # fmt: skip
    note = f"{title_of(strategy)}, keep {ratio:.0%}, from {of}"
    st.button(
        "Use this plan", icon=":material/check:", type="primary", key="use_plan",
        on_click=lambda: _use_plan(Plan(run.model, made.to_spec(), note, names)),
    )  # fmt: skip


def _export(run: Capture) -> None:
    """The compression in force as a script, as JSON and for kvpress."""
    spec = state.spec()
    in_force = state.plan() or Plan(run.model, spec, note="set in the app")
    script, kvpress, file = st.tabs(["Script", "kvpress", "Plan (JSON)"])
    with script:
        decision = library.decision(library.evidence(state.model()), spec, state.limits(), state.plan())
        code = library_code(spec, state.model_ref(), told=decision.told(spec))
        st.code(code, language="python", wrap_lines=True)
        st.caption(
            "Every chosen value is in it. It needs l2kv: run it in the environment of `make app`, or `pip install` "
            "this project's folder."
        )
    with kvpress:
        if spec.policy in BY_NORM:
            code = kvpress_code(spec, run.cache_shape, state.model_ref(), n_layers=run.n_layers)
            st.code(code, language="python", wrap_lines=True)
            st.caption("What kvpress can't express stands in its comments.")
        else:
            st.info("Plans by key norm can be written for kvpress; the policy in force is another one.")
    with file:
        text = to_json(in_force)
        st.download_button(
            "Save plan",
            text,
            "plan.json",
            "application/json",
            icon=":material/download:",
            on_click="ignore",
            key="save_plan",
        )
        st.code(text, language="json", height=240)


def _measure(jobs: Jobs, run: Capture) -> None:
    """Measure the curve or the layers: as a job, on texts of the user's own."""
    texts = documents.ask(few="Give texts of your own for an answer on what you run.")
    what = st.segmented_control(
        "What",
        ["Quality against memory", "Cost of each layer"],
        default="Quality against memory",
        required=True,
        key="tune_what",
        persist_state="session",
    )
    try:
        cut = documents.ask_cut("tune")
    except UserError as error:
        st.error(markup.plain(str(error)), icon=":material/error:")
        return
    if what == "Cost of each layer":
        _measure_layers(jobs, run, texts, cut)
    else:
        _measure_front(jobs, run, texts, cut)


def _measure_layers(jobs: Jobs, run: Capture, texts: Any, cut: documents.Cut) -> None:
    spec = replace(state.uniform_spec(), skip_layers=())
    if spec.policy not in POLICIES:
        st.info(f"ALR is about {' and '.join(name.replace('_', ' ') for name in POLICIES)}: choose one in the header.")
        return
    n = cut.excerpts * (len(run.cache_shape.layers) + 2)
    st.caption(f"Each layer alone by the header's settings: {header.in_words(spec)}. {_takes(run, cut, n)}")

    def work(loaded: LoadedModel, progress: Progress) -> str:
        from analysis.plans.ablation import ablate_layers

        asked = {"ablation": spec, "texts": dict(texts), "cut": cut, "model": loaded.name}
        _, file = library.WORKSPACE.results_file(asked)
        made = ablate_layers(
            loaded, cut.given(loaded, texts), spec, settings=cut.lm, out=_part(file), progress=progress
        )
        return library.WORKSPACE.add(made, name=f"cost of each layer, {header.in_words(spec)}").id

    if st.button("Measure the layers", icon=":material/play_arrow:", type="primary", key="measure_layers"):
        title = f"Measuring each layer of {run.model}"
        state.follow(jobs.start(title, state.model_ref(), work, kind="ablation").id)
        st.rerun()


def _measure_front(jobs: Jobs, run: Capture, texts: Any, cut: documents.Cut) -> None:
    offered = choices.strategies(measured=True)
    first = [
        name for name in ("uniform_low", "uniform_signed", "by_layer", "by_head", "adakv", "random") if name in offered
    ]
    strategies: Sequence[str] = st.multiselect(
        "Allocation strategies",
        list(offered),
        first,
        format_func=title_of,
        help=choices.explained(offered),
        key="tune_strategies",
        persist_state="session",
    )
    ratios: Sequence[float] = st.multiselect(
        "Keep ratios",
        defaults.KEEP_RATIOS,
        [0.3, 0.5],
        format_func=lambda ratio: f"{ratio:.0%}",
        key="tune_ratios_asked",
        persist_state="session",
    )
    if not (strategies and ratios):
        st.info("Choose a strategy and a keep ratio at least.")
        return
    window = int(state.PROTECT_LAST.get())
    heads = len(run.cache_shape.layers) * run.n_kv_heads
    n = passes(cut.excerpts, cut.excerpts, keep_ratios=len(ratios), strategies=strategies, kv_heads=heads)
    st.caption(f"{SPLIT} Recent window: {counted(window, 'token')}. {_takes(run, cut, n, planning=True)}")

    def work(loaded: LoadedModel, progress: Progress) -> str:
        asked = {
            "front": [list(strategies), list(ratios), window],
            "texts": dict(texts),
            "cut": cut,
            "model": loaded.name,
        }
        _, file = library.WORKSPACE.results_file(asked)
        made = measure_front(
            loaded,
            *cut.planning_and_measuring(loaded, texts),
            keep_ratios=ratios,
            strategies=strategies,
            settings=cut.lm,
            protect_last=window,
            out=_part(file),
            progress=progress,
        )
        return library.WORKSPACE.add(
            made, name=f"Pareto front, keep {', '.join(f'{ratio:.0%}' for ratio in ratios)}"
        ).id

    if st.button("Measure the curve", icon=":material/play_arrow:", type="primary", key="measure_front"):
        title = f"Measuring quality against memory of {run.model}"
        state.follow(jobs.start(title, state.model_ref(), work, kind="front").id)
        st.rerun()


def _takes(run: Capture, cut: documents.Cut, passes: int, *, planning: bool = False) -> str:
    """What is measured, and how long it takes; with `planning`, as many other prompts are captured beforehand."""
    pace = library.pace(run.model, run)
    seconds = pace.predictions(cut.excerpts * (1 + planning), passes, cut.lm)
    return (
        f"{counted(cut.excerpts, 'excerpt')}, at most {passes:,} passes of {cut.lm.prompt_tokens} + "
        f"{cut.lm.new_tokens} tokens: {pace.told(seconds)}, once the model is in memory."
    )


def _part(file: Any) -> Any:
    """File that a measurement grows in, so that the same one goes on where it was stopped."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.with_suffix(".part.jsonl")
