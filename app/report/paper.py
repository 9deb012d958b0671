"""The paper's figures as sections of a page: what each shows, in words, drawings and tables. Runs no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.evaluation.results import Results
from analysis.evaluation.tasks import TASKS
from analysis.paper.experiments import EXPERIMENTS
from analysis.paper.figures import FIGURES, BestAndWorst, Figure, FourHeads, OfSink, OverChunks, to_json
from analysis.paper.why import Factors, SinkKey, Zeroing
from analysis.records import write_text
from analysis.words import counted, signed, span
from app import figures
from app.components import markup
from app.report import evaluation
from app.report.writing import Drawing, Section, document


def section(name: str, numbers: object) -> Section:
    """The section of a figure of `analysis.paper.FIGURES`."""
    return _SECTIONS[name](numbers)


def write_pages(
    made: Iterable[tuple[str, Any]], folder: Path, *, model: str, excerpts: Sequence[str] = (), n_tokens: int = 0
) -> Iterator[Path]:
    """Write a page and a JSON file for each figure, and an index of them; yields what was written.

    Args:
        made: name and numbers of each figure, as `analysis.paper.figures.reproduce` gives them; of an
            experiment the `Results` of each of its parts, by name.
        excerpts: names of the excerpts that figures were read off, of `n_tokens` each.

    Raises:
        RecordError: a file cannot be written; says which.
    """
    index = []
    about = {"model": model, "texts": excerpts, "tokens_per_excerpt": n_tokens}
    read_off = f"{model}, on excerpts of {n_tokens} tokens; the first is “{next(iter(excerpts), '')}”."
    for name, numbers in made:
        if name in EXPERIMENTS:
            page = _experiment(name, numbers, model)
        else:
            drawn = section(name, numbers)
            words = (drawn.words[0], drawn.words[-1])
            page = _Page(drawn.heading, read_off, words, (replace(drawn, heading=""),), to_json(name, numbers, about))
        html = document(page.heading, page.lead, page.sections, data=page.data)
        yield write_text(html, folder / f"{name}.html")
        yield write_text(page.data, folder / f"{name}.json")
        links = (("The figure", f"{name}.html"), ("Its numbers, as JSON", f"{name}.json"))
        index.append(Section(page.heading, page.words, links=links))
    if len(index) > 1:
        yield write_text(document(f"The paper's figures, for {model}", "", index), folder / "index.html")


@dataclass(frozen=True, slots=True)
class _Page:
    """What the page of a figure holds."""

    heading: str
    lead: str
    words: tuple[str, ...]
    """Words about it in the index."""
    sections: tuple[Section, ...]
    data: str


def _experiment(name: str, numbers: Mapping[str, Results], model: str) -> _Page:
    experiment = EXPERIMENTS[name]
    words = (f"The paper: {experiment.paper}", f"Here: {experiment.here}")
    told = evaluation.summaries(numbers.values())
    data = to_json(name, told, {"model": model, "here": experiment.here}, figure=experiment)
    sections = tuple(
        evaluation.section(
            results,
            heading=TASKS.find(results.task).title + (f": {part}" if part != results.task else ""),
            by_position=tuple(evaluation.SCORES),
        )
        for part, results in numbers.items()
    )
    return _Page(_heading(name, experiment), "\n".join((model, *words)), words, sections, data)


def _fig1(numbers: FourHeads) -> Section:
    labels = [markup.visible(label) for label in numbers.labels]
    drawings = []
    for (layer, head), norm, attention, gamma, rho in zip(
        numbers.heads, numbers.key_norm, numbers.attention, numbers.gamma, numbers.spearman, strict=True
    ):
        drawings.append(
            Drawing(
                figures.norm_and_attention(norm, attention, labels, attention_label="attention received"),
                alt=f"Key norm and attention received by position, layer {layer}, head {head}",
                title=f"Layer {layer}, head {head}: Γ {signed(gamma)}, Spearman {signed(rho)}",
                caption="Key norm above, attention received below (log scale; the mean over the queries that see it).",
                table={
                    "position": range(len(labels)),
                    "token": labels,
                    "key norm": norm,
                    "attention received": attention,
                },
            )
        )
    return _section(
        "fig1",
        f"Γ is {', '.join(map(signed, numbers.gamma))} in these heads, on a text of {len(labels)} tokens.",
        "The heads are those of lowest and highest Γ, and nearest to the thirds between. Where the paper holds (Γ near "
        "−1), peaks of attention stand under valleys of the norm.",
        drawings=drawings,
        columns=2,
    )


def _fig2(numbers: OverChunks) -> Section:
    layer, head = np.indices(numbers.alr.shape).reshape(2, -1)
    drawings = [
        Drawing(
            figures.head_map(values, title=title, diverging=False, zmax=top),
            alt=f"Map of {title} by layer and head",
            title=title,
            caption=caption,
        )
        for title, values, top, caption in (
            ("ALR", numbers.alr, None, "The paper's figure: a sum over the tokens, so it grows with the excerpt."),
            ("ALR / n", numbers.alr_per_token, None, "From 0 to 1: what texts of other lengths may be compared by."),
            ("Normalised ALR", numbers.normalised_alr, 2.0, "0 the ideal order, 1 a random one, 2 the reverse."),
        )
    ]
    flat = {title: getattr(numbers, name).ravel() for title, name in _COLUMNS.items()}
    drawings[0] = replace(drawings[0], table={"layer": layer, "head": head, **flat})
    finite = numbers.alr[np.isfinite(numbers.alr)]
    spread = f"ALR is {finite.min():.3g} to {finite.max():.3g}" if len(finite) else "ALR is undefined in all heads"
    worse = int((numbers.normalised_alr > 1).sum())
    return _section(
        "fig2",
        f"{spread}, the mean over {_excerpts(numbers.n_tokens)}; in {worse} of {numbers.alr.size} heads norm order is "
        "worse than a random one.",
        "ALR is the attention lost by evicting high norms first, less what the ideal order loses, summed over how much "
        "is evicted: low is good. It is of one query an excerpt, the next token's. Rows are layers, columns heads.",
        drawings=drawings,
        columns=2,
    )


_COLUMNS = {
    "ALR": "alr", "ALR / n": "alr_per_token", "Normalised ALR": "normalised_alr", "excerpts it is of": "defined",
}  # fmt: skip


def _fig7(numbers: BestAndWorst) -> Section:
    one, other = (
        f"layer {layer}, head {head}: ALR {loss:.3g}"
        for (layer, head), loss in zip(numbers.heads, numbers.alr, strict=True)
    )
    best, worst = numbers.excess
    return _section(
        "fig7",
        f"At most {numbers.most[0]:.3f} of the attention is lost beyond the ideal in the best head, and up to "
        f"{numbers.most[1]:.3f} in the worst: the mean over {_excerpts(numbers.n_tokens)}.",
        "Best and worst are the heads of lowest and highest ALR, which is the area under these curves, in tokens.",
        drawings=[
            Drawing(
                figures.excess_loss(numbers.dropped, best, worst, names=(one, other)),
                alt="Attention lost by norm order less that of the ideal order, by share of tokens dropped",
                caption="Each panel has its own scale. At both ends all orders agree: nothing is dropped, or all.",
                table={"dropped": numbers.dropped, one: best, other: worst},
            )
        ],
    )


def _fig8(numbers: OfSink[SinkKey]) -> Section:
    key = numbers.of
    peaks = ", ".join(map(str, key.peaks))
    return _section(
        "fig8",
        f"In {numbers.sink} Its key stands apart most in dimensions {peaks}. Against the mean other key its "
        f"logit is {signed(key.lead)}, of which these dimensions make {signed(key.lead_of_peaks)}; the logit itself is "
        f"{signed(key.logit)}, of which they make {signed(key.logit_of_peaks)}.",
        "Logits are means over the queries after the first token; attention follows the difference, since a constant "
        "added to all logits of a query changes nothing. Peaks are the largest |key of the first − mean of the "
        "others| / deviation of the others.",
        drawings=[
            Drawing(
                figures.key_dimensions(key.sink, key.others, key.spread, key.peaks),
                alt="Absolute values of the first token's key by dimension, beside those of the other tokens",
                caption="Absolute values, after rotary embedding and any norm of keys, as the cache holds them.",
                table={
                    "dimension": range(len(key.sink)),
                    "first token": key.sink,
                    "others, mean": key.others,
                    "others, deviation": key.spread,
                    "deviations from the mean (signed values)": key.z,
                },
            )
        ],
    )


def _fig9(numbers: OfSink[Zeroing]) -> Section:
    zeroed, width = numbers.of, numbers.of.tokens_per_bin
    peaked = ", ".join(map(str, zeroed.peaked.dimensions))
    first = ", ".join(map(str, zeroed.random[0].dimensions))
    maps = [
        Drawing(
            figures.pooled_map(pooled, tokens_per_bin=width, n_tokens=zeroed.n_tokens).update_layout(height=430),
            alt=f"Attention map, {title}",
            title=title,
            caption=f"Rows are queries, columns keys, {width} tokens a bin. Its colours have a scale of their own.",
        )
        for title, pooled in (
            ("As it is", zeroed.map_as_it_is),
            (f"Peaked dimensions {peaked} zeroed", zeroed.map_peaked),
            (f"Random dimensions {first} zeroed", zeroed.map_random),
        )
    ]
    tried = (zeroed.as_it_is, zeroed.peaked, *zeroed.random)
    names = ("as it is", "peaked", *(f"random {i}" for i in range(len(zeroed.random))))
    shares, moved = (np.array([getattr(each, name) for each in tried]) for name in ("sink_share", "distance"))
    strip = Drawing(
        figures.zeroed_dimensions(
            {
                "first token gets": (shares[0], shares[1], shares[2:]),
                "moved elsewhere": (None, moved[1], moved[2:]),
            }
        ),
        alt="The first token's share of the attention, and what moved, for peaked and for random dimensions",
        caption="Means over the queries after the first. Moved: the total variation between a query's attention "
        "before and after.",
        table={
            "dimensions": [", ".join(map(str, each.dimensions)) or "none" for each in tried],
            "choice": names,
            "share of the first": shares,
            "moved": moved,
        },
    )
    return _section(
        "fig9",
        str(zeroed),
        f"In {numbers.sink}",
        drawings=(*maps, strip),
        columns=2,
    )


def _factors(numbers: Factors) -> Section:
    layer, head = np.indices(numbers.by_length.shape).reshape(2, -1)
    columns = {
        "Spearman with |k|": numbers.by_length,
        "Spearman with cos": numbers.by_direction,
        "moved by equal lengths": numbers.without_length,
        "moved by equal directions": numbers.without_direction,
    }
    maps = [
        Drawing(
            figures.head_map(columns[title], title=title, diverging=True),
            alt=f"Map of {title} by layer and head",
            title=f"Attention and {what}",
            caption=caption,
        )
        for title, what, caption in (
            ("Spearman with |k|", "key norm alone", "Negative is the paper's claim: short keys get the attention."),
            ("Spearman with cos", "direction alone", "+1: the order of attention is that of the cosines."),
        )
    ]
    plane = Drawing(
        figures.factor_plane(numbers.without_length, numbers.without_direction),
        alt="Every head by how far attention moves when keys are made equally long, and when all point alike",
        title="What moves the attention",
        rows=2,
        caption="Share of the attention that goes elsewhere (total variation). Above the line, directions matter more.",
        table={"layer": layer, "head": head, **{name: values.ravel() for name, values in columns.items()}},
    )
    return _section(
        "factors",
        str(numbers),
        "A logit is |q| · |k| · cos(q, k) · scale. For the last query of the text and the keys before it, all lengths, "
        "or all cosines, are replaced by their mean. A head can attend by direction and still follow the paper: the "
        "keys that point where queries do may be the short ones.",
        drawings=(maps[0], plane, maps[1]),
        columns=2,
    )


_SECTIONS: dict[str, Callable[..., Section]] = {
    "fig1": _fig1, "fig2": _fig2, "fig7": _fig7, "fig8": _fig8, "fig9": _fig9, "factors": _factors,
}  # fmt: skip


def _section(name: str, *words: str, drawings: Iterable[Drawing], columns: int = 1) -> Section:
    figure = FIGURES[name]
    return Section(_heading(name, figure), (*words, f"The paper: {figure.paper}"), tuple(drawings), columns)


def _heading(name: str, figure: Figure) -> str:
    number = f"Figure {name.removeprefix('fig')}: " if name.startswith("fig") else ""
    return f"{number}{figure.title}"


def _excerpts(n_tokens: np.ndarray) -> str:
    return f"{counted(len(n_tokens), 'excerpt')} of {span(n_tokens.tolist())} tokens"
