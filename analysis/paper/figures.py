"""The paper's figures for any model: the numbers behind each, beside those that the paper reports.

Figures 1, 2 and 7 are read off captures here, 8 and 9 and the factors off vectors (`analysis.paper.why`). `reproduce`
makes them all; a figure's numbers become a record, {"l2kv_figure": 2, ...}. Those that tasks measure are in
`analysis.paper.experiments`. Draws nothing.

Source: Devoto et al., EMNLP 2024, arXiv 2406.11430. Its numbers are quoted where it gives any.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from analysis.captures import Capture
from analysis.errors import SettingsError, TextError
from analysis.measures import attention_loss
from analysis.metrics import correlation, metrics
from analysis.models.load import LoadedModel
from analysis.progress import Progress, unheard
from analysis.records import json_text
from analysis.statistics import nanmean

if TYPE_CHECKING:  # they wait for torch, which reading a figure need not
    from analysis.paper.why import Factors, SinkHead

VERSION = 2
POINTS = 100  # steps of the share dropped
_NO_ORDER = (
    "No head of this model is defined on this text: norms and attention give no order to compare. Try a longer text."
)


@dataclass(frozen=True, slots=True)
class Figure:
    """Title of a figure of the paper, and what the paper reports in it."""

    title: str
    paper: str  # its value, in words


_PICTURE = "A picture, without numbers (Llama-2-7b)."
FIGURES = {
    "fig1": Figure("Key norm and attention of four heads", _PICTURE),
    "fig2": Figure(
        "ALR of every head, over excerpts of text",
        "Llama-2-7b: 0 to 600 over chunks of 1024 tokens; layers 0, 1 and some near 12 high, the rest low.",
    ),
    "fig7": Figure(
        "What norm order loses beyond the ideal order, in the best and in the worst head",
        "Llama-2-7b, 1024 chunks of 1024 tokens: at most 0.010 in layer 7, head 10; up to 1.0 in layer 0, head 0.",
    ),
    "fig8": Figure("The key of a sink beside the others", _PICTURE),
    "fig9": Figure("What the peaked dimensions do to the attention", _PICTURE),
    "factors": Figure("Length or direction: which makes the attention?", "Nothing: it names WHY as future work."),
}


@dataclass(frozen=True, slots=True, eq=False)
class FourHeads:
    """Fig 1: heads from the most negative Γ to the most positive, K <= 4 of them, on one text of T tokens.

    Γ is of the next token's query; Spearman is of the attention received, which the figure draws.
    """

    heads: tuple[tuple[int, int], ...]  # K of (layer, head)
    key_norm: np.ndarray  # [K, T]
    attention: np.ndarray  # [K, T] received, the mean over the queries that can see the key
    gamma: np.ndarray  # [K]
    spearman: np.ndarray  # [K]
    labels: tuple[str, ...]  # T, of the tokens


def four_heads(capture: Capture, heads: Sequence[tuple[int, int]] | None = None) -> FourHeads:
    """Collect norm and attention of some heads: by default lowest and highest Γ, and nearest its terciles.

    Raises:
        TextError: Γ is defined in no head.
        SettingsError: a head is not in the run.
    """
    gamma, rho = correlation(capture), correlation(capture, "spearman", probe="all queries")
    if heads is None:
        defined = np.argwhere(np.isfinite(gamma))
        if not len(defined):
            raise TextError(_NO_ORDER)
        values = gamma[tuple(defined.T)]
        nearest = [abs(values - aim).argmin() for aim in np.quantile(values, [0, 1 / 3, 2 / 3, 1])]
        heads = [_head(defined[i]) for i in dict.fromkeys(nearest)]
    heads = tuple(heads)
    if not all(0 <= layer < capture.n_layers and 0 <= head < capture.n_heads for layer, head in heads):
        raise SettingsError(f"there are {capture.n_layers} layers of {capture.n_heads} heads, got {heads}")
    layer, head = np.array(heads).T
    return FourHeads(
        heads=heads,
        key_norm=capture.key_norm_by_head()[layer, head],
        attention=capture.attention_received[layer, head],
        gamma=gamma[layer, head],
        spearman=rho[layer, head],
        labels=capture.labels,
    )


@dataclass(frozen=True, slots=True, eq=False)
class OverChunks:
    """Fig 2: means over N excerpts. NaN where a head is defined in none of them."""

    n_tokens: np.ndarray  # [N] int
    alr: np.ndarray  # [L, H]
    alr_per_token: np.ndarray  # [L, H] ALR / n, in [0, 1]
    normalised_alr: np.ndarray  # [L, H] ALR over chance level: 0 ideal, 1 random, 2 reversed
    defined: np.ndarray  # [L, H] int, chunks in which the head is
    dropped: np.ndarray  # [S] shares of the tokens dropped, 0 to 1
    excess: np.ndarray  # [L, H, S] Y^m there: attention lost by norm order less that of the ideal order


def over_chunks(captures: Iterable[Capture], *, points: int = POINTS) -> OverChunks:
    """Average over excerpts; memory holds one capture at a time if `captures` is a generator."""
    dropped = np.linspace(0, 1, points + 1)
    n_tokens, rows = [], []
    for run in captures:
        found = metrics(run, names=["alr", "alr_per_token", "normalised_alr"])
        loss = found.of("alr")
        curves = np.full((*loss.shape, len(dropped)), np.nan)
        for layer, head in np.argwhere(np.isfinite(loss)):
            lost = attention_loss(run, layer, head)
            curves[layer, head] = np.interp(dropped, np.linspace(0, 1, run.n_tokens + 1), lost.low_norm - lost.ideal)
        n_tokens.append(run.n_tokens)
        rows.append((*found.values, curves))
    if not rows:
        raise SettingsError("over_chunks needs at least one capture")
    columns = [np.stack(column) for column in zip(*rows, strict=True)]
    defined = np.isfinite(columns[0]).sum(axis=0)
    loss, per_token, normalised, excess = map(nanmean, columns)
    return OverChunks(np.array(n_tokens), loss, per_token, normalised, defined, dropped, excess)


@dataclass(frozen=True, slots=True, eq=False)
class BestAndWorst:
    """Fig 7: the heads of lowest and of highest ALR, means over excerpts."""

    heads: tuple[tuple[int, int], tuple[int, int]]  # (layer, head)
    alr: np.ndarray  # [2]
    dropped: np.ndarray  # [S] shares of the tokens dropped
    excess: np.ndarray  # [2, S] Y^m
    most: np.ndarray  # [2] its largest value
    n_tokens: np.ndarray  # [N] int, of the chunks


def best_and_worst(chunks: OverChunks) -> BestAndWorst:
    """Select the curves of the best and the worst head. Raises TextError if no head is defined."""
    if not chunks.defined.any():
        raise TextError(_NO_ORDER)
    best, worst = (_head(np.unravel_index(pick(chunks.alr), chunks.alr.shape)) for pick in (np.nanargmin, np.nanargmax))
    excess = np.stack([chunks.excess[best], chunks.excess[worst]])
    heads = (best, worst)
    loss = np.array([chunks.alr[head] for head in heads])
    return BestAndWorst(heads, loss, chunks.dropped, excess, excess.max(axis=1), chunks.n_tokens)


def _head(place: Iterable[Any]) -> tuple[int, int]:
    layer, head = place
    return int(layer), int(head)


def reproduce(
    loaded: LoadedModel,
    texts: Sequence[str],
    *,
    only: Sequence[str] = tuple(FIGURES),
    heads: Sequence[tuple[int, int]] | None = None,
    progress: Progress = unheard,
) -> Iterator[tuple[str, object]]:
    """Yield (name, numbers) of each figure that is asked for, as it is done.

    Args:
        texts: excerpts. Figures 2 and 7 are means over them; the others show the first.
        heads: heads of Figure 1, instead of its own choice.

    Raises:
        TextError, OutOfMemoryError, ModelError: as `capture`.
        SettingsError: a figure or head is unknown, or there is no text.
    """
    if unknown := set(only) - set(FIGURES):
        raise SettingsError(f"figures are {', '.join(FIGURES)}, got {', '.join(sorted(unknown))}")
    if not texts:
        raise SettingsError("reproduce needs at least one text")
    from analysis.recorder import capture

    def run_of(i: int) -> Capture:
        run = capture(loaded, texts[i], progress=lambda *_: progress(i, len(texts), "excerpts"))
        progress(i + 1, len(texts), "excerpts")
        return run

    def chunks() -> Iterator[Capture]:
        yield first
        yield from map(run_of, range(1, len(texts)))

    if set(only) - {"factors"}:
        first = run_of(0)
    if "fig1" in only:
        yield "fig1", four_heads(first, heads)
    if {"fig2", "fig7"} & set(only):
        over = over_chunks(chunks())
        yield from ((name, make) for name, make in (("fig2", over), ("fig7", best_and_worst(over))) if name in only)
    if {"fig8", "fig9"} & set(only):
        yield from _of_a_sink(loaded, texts[0], first, only)
    if "factors" in only:
        yield "factors", _factors(loaded, texts[0], progress)


Found = TypeVar("Found")


@dataclass(frozen=True, slots=True, eq=False)
class OfSink(Generic[Found]):
    """Fig 8 (a `SinkKey`) or Fig 9 (a `Zeroing`), with its head."""

    sink: SinkHead
    of: Found


def to_json(name: str, numbers: object, about: Mapping[str, object], *, figure: Figure | None = None) -> str:
    """Write a figure as JSON. `about` describes its origin: model, texts and the like; `figure` is by default ours."""
    figure = figure or FIGURES[name]
    told = {"l2kv_figure": VERSION, "figure": name, "title": figure.title, "paper": figure.paper}
    return json_text({**told, **about, "numbers": numbers})


def _of_a_sink(loaded: LoadedModel, text: str, run: Capture, only: Sequence[str]) -> Iterator[tuple[str, OfSink[Any]]]:
    from analysis.paper.vectors import head_vectors
    from analysis.paper.why import sink_head, sink_key, zeroing

    sink = sink_head(run)
    vectors = head_vectors(loaded, text, sink.layer)
    key = sink_key(vectors, sink.head)
    if "fig8" in only:
        yield "fig8", OfSink(sink, key)
    if "fig9" in only:
        yield "fig9", OfSink(sink, zeroing(vectors, sink.head, key.peaks))


def _factors(loaded: LoadedModel, text: str, progress: Progress) -> Factors:
    from analysis.paper.vectors import each_layer
    from analysis.paper.why import Factors, factors

    layers: list[Factors] = []
    each_layer(
        loaded,
        text,
        lambda vectors: layers.append(factors(vectors)),
        progress=progress,
    )
    return Factors.of(layers)
