"""Presets that show an effect, found by a search with stated criteria, not chosen by eye.

On a model that solves the tasks of `analysis.demo.questions` it searches for those, and for
- article: the first long passage, with whatever half the cache changes in it.

On any other model it searches for two passages:
- calm:    a passage on which keeping half the cache, as the app proposes, changes next to nothing: the mean NLL of the
           tokens that follow moves by less than `Criteria.calm`;
- breaks:  a passage on which keeping half by the paper's own defaults (nothing protected) costs more than
           `Criteria.breaks`.

All candidates are measured, the first that meets a criterion is taken, and the number that did is recorded: a text
that one candidate in fifty gives shows less than one that every second gives. Where none meets it the search fails,
and says how near the best came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, zip_longest

from analysis.demo.presets import FoundPresets, Preset
from analysis.demo.questions import NotFoundError, find_task_presets
from analysis.errors import TextError
from analysis.evaluation.lm import LmSettings, lm_sample
from analysis.evaluation.run import measure
from analysis.evaluation.task import Sample
from analysis.models.load import LoadedModel
from analysis.progress import Progress, unheard
from analysis.texts.excerpts import Excerpt
from analysis.texts.tokens import Passage, passages
from analysis.words import counted
from l2kv import CompressionSpec

CALM_SPEC = CompressionSpec(keep_ratio=0.5, protect_last=32)
"""What the app proposes."""
BREAKS_SPEC = CompressionSpec(keep_ratio=0.5)
"""The paper's defaults."""
ARTICLE = "A long article"
_SLACK = 100  # tokens


@dataclass(frozen=True, slots=True)
class Criteria:
    """Criteria of the search: what a preset must show, and among how many candidates."""

    calm: float = 0.02
    """Nats/token: the NLL must move by less, up or down."""
    breaks: float = 0.5
    """Rise of the NLL that is asked for, nats/token."""
    new_tokens: int = 100
    """Number of tokens after the passage over which the NLL is averaged."""
    lengths: tuple[int, ...] = (256, 400, 520)
    """Least lengths of the passages in tokens; up to 100 more, for the sentence to end."""
    most: int = 48
    """Number of passages tried."""
    article: int = 900
    """Tokens that the article has at least."""


def find_presets(
    loaded: LoadedModel,
    texts: Mapping[str, str],
    *,
    criteria: Criteria | None = None,
    tasks: bool = True,
    progress: Progress = unheard,
) -> FoundPresets:
    """Search for presets: tasks and an article, or, for a model that solves no task, a calm and a breaking passage.

    Args:
        loaded: the model.
        texts: the texts to search, by name.
        criteria: what to search for.
        tasks: search for the tasks of `analysis.demo.questions`, which a small model cannot solve.
        progress: counts answers, or passages for each compression.

    Raises:
        NotFoundError: no candidate meets a criterion.
        TextError, ModelError, OutOfMemoryError: as `measure`.
    """
    criteria = criteria or Criteria()
    if tasks:
        found = (*find_task_presets(loaded, progress=progress), _article(loaded, texts, criteria))
    else:
        measured = _measure(loaded, _candidates(loaded, texts, criteria), criteria, progress)
        found = (_calm(loaded.name, measured, criteria), _breaks(loaded.name, measured, criteria))
    return FoundPresets(loaded.name, found)


@dataclass(frozen=True, slots=True)
class _Measured:
    source: str  # name of the text it is from
    prompt: str
    prompt_tokens: int
    full: float  # NLL with the full cache, nats/token
    calm: float  # with CALM_SPEC
    breaks: float  # with BREAKS_SPEC


def _candidates(loaded: LoadedModel, texts: Mapping[str, str], criteria: Criteria) -> list[tuple[str, Passage]]:
    """Take passages of all texts and lengths in turn, so that the first `most` include each."""
    positions = getattr(loaded.config, "max_position_embeddings", None) or float("inf")
    rows = [
        _passages(loaded, name, text, length, criteria.new_tokens)
        for length in criteria.lengths
        if length + criteria.new_tokens <= positions
        for name, text in texts.items()
    ]
    fitting = (
        row
        for row in chain.from_iterable(zip_longest(*rows))
        if row is not None and row[1].prompt_tokens + criteria.new_tokens <= positions
    )
    found = list(islice(fitting, criteria.most))
    if not found:
        shortest = min(criteria.lengths)
        raise TextError(
            f"No passage of whole sentences of {shortest} tokens with {criteria.new_tokens} more after it fits the "
            f"model's {positions} positions in {counted(len(texts), 'text')}. Give longer texts."
        )
    return found


def _passages(loaded: LoadedModel, name: str, text: str, length: int, following: int) -> Iterator[tuple[str, Passage]]:
    for passage in passages(loaded.tokenizer, text, at_least=length, at_most=length + _SLACK, following=following):
        yield name, passage


def _measure(
    loaded: LoadedModel, candidates: Sequence[tuple[str, Passage]], criteria: Criteria, progress: Progress
) -> list[_Measured]:
    samples = [_sample(loaded, str(i), passage, criteria) for i, (_, passage) in enumerate(candidates)]
    methods = {"full": None, "calm": CALM_SPEC, "breaks": BREAKS_SPEC}
    nll = {(row.sample, row.method): row.value for row in measure(loaded, samples, methods, progress=progress)}
    return [
        _Measured(source, passage.prompt, passage.prompt_tokens, **{name: nll[str(i), name] for name in methods})
        for i, (source, passage) in enumerate(candidates)
    ]


def _sample(loaded: LoadedModel, name: str, passage: Passage, criteria: Criteria) -> Sample:
    text = Excerpt(name, passage.prompt + passage.following)
    return lm_sample(loaded.tokenizer, text, LmSettings(passage.prompt_tokens, criteria.new_tokens))


def _article(loaded: LoadedModel, texts: Mapping[str, str], criteria: Criteria) -> Preset:
    """The first long passage, and what half the cache by three policies changes in it."""
    one = replace(criteria, lengths=(criteria.article,), most=1)
    ((source, passage),) = _candidates(loaded, texts, one)
    compressed = {name.replace("_", " "): replace(CALM_SPEC, policy=name) for name in ("low_norm", "random", "keydiff")}
    full, *rows = measure(loaded, [_sample(loaded, source, passage, criteria)], {"full": None, **compressed})
    told = ", ".join(f"{row.value - full.value:+.3f} by {row.method}" for row in rows)
    why = (
        f"A long text: {passage.prompt_tokens} tokens of {source}, the first passage of {criteria.article} tokens or "
        f"more. The mean NLL of the {criteria.new_tokens} tokens after it changes by {told} (nats/token; half the "
        f"cache, the last {CALM_SPEC.protect_last} protected), in {loaded.name}. One text is an anecdote."
    )
    return Preset(ARTICLE, passage.prompt, why, CALM_SPEC)


def _calm(model: str, measured: Sequence[_Measured], criteria: Criteria) -> Preset:
    def change(one: _Measured) -> float:
        return one.calm - one.full

    chosen, count = _first(
        measured,
        lambda one: abs(change(one)) < criteria.calm,
        lambda: (
            f"calm: |change of NLL| below {criteria.calm:g} with {_in_words(CALM_SPEC)}; the smallest is "
            f"{min(abs(change(one)) for one in measured):.3f} nats/token"
        ),
    )
    why = (
        f"Half the cache, hardly a change. {_told(model, chosen, chosen.calm, CALM_SPEC, criteria)} This passage was "
        f"picked: {count} of {len(measured)} tried stay within {criteria.calm:g}."
    )
    return Preset("Calm: half the cache will do", chosen.prompt, why, CALM_SPEC)


def _breaks(model: str, measured: Sequence[_Measured], criteria: Criteria) -> Preset:
    def change(one: _Measured) -> float:
        return one.breaks - one.full

    chosen, count = _first(
        measured,
        lambda one: change(one) > criteria.breaks,
        lambda: (
            f"breaks: change of NLL above {criteria.breaks:g} with {_in_words(BREAKS_SPEC)}; the largest is "
            f"{max(map(change, measured)):+.3f} nats/token"
        ),
    )
    why = (
        f"Half the cache, and it breaks. {_told(model, chosen, chosen.breaks, BREAKS_SPEC, criteria)} This passage was "
        f"picked: {count} of {len(measured)} tried lose more than {criteria.breaks:g}."
    )
    return Preset("Breaks: nothing protected", chosen.prompt, why, BREAKS_SPEC)


def _first(
    measured: Sequence[_Measured], meets: Callable[[_Measured], bool], criterion: Callable[[], str]
) -> tuple[_Measured, int]:
    """The first that meets a criterion, and how many do."""
    meeting = [one for one in measured if meets(one)]
    if not meeting:
        raise NotFoundError(
            f"None of {len(measured)} passages meets the criterion {criterion()}. Give other texts, or more of them."
        )
    return meeting[0], len(meeting)


def _told(model: str, one: _Measured, with_spec: float, spec: CompressionSpec, criteria: Criteria) -> str:
    return (
        f"With {_in_words(spec)}, the mean NLL of the {criteria.new_tokens} tokens that follow these "
        f"{one.prompt_tokens} of {one.source} goes from {one.full:.3f} to {with_spec:.3f} nats/token "
        f"({with_spec - one.full:+.3f}), in {model}."
    )


def _in_words(spec: CompressionSpec) -> str:
    protected = f"the last {spec.protect_last} protected" if spec.protect_last else "nothing protected"
    return f"keep ratio {spec.keep_ratio:g} by {spec.policy.replace('_', ' ')}, {protected}"
