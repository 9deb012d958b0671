"""The paper's experiments for any model: which tasks they are here, with which methods and at which sizes.

An experiment is one or more evaluations, which `analysis.evaluation` runs. Figures that are read off captures are in
`analysis.paper.figures`. Runs no model, and draws nothing.

Source: Devoto et al., EMNLP 2024, arXiv 2406.11430; methods are those of its code (alessiodevoto/l2compress).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.errors import SettingsError
from analysis.evaluation.benchmarks import LongBenchSettings, NeedleSettings
from analysis.evaluation.lm import LmSettings
from analysis.evaluation.passkey import PasskeySettings
from analysis.evaluation.results import FULL, Methods
from analysis.evaluation.tasks import TASKS
from analysis.paper.figures import Figure
from analysis.texts.excerpts import Texts, excerpts, excerpts_from
from analysis.words import counted, layers_listed
from l2kv.registry import Registry
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_NORMS = ("low_norm", "high_norm", "random")
_PAPERS = ((0, 1),)  # the skip list of the paper's code
_SKIP_LISTS = ((), (0,), (0, 1))


@dataclass(frozen=True, slots=True)
class Size:
    """Amount of what an experiment measures."""

    tokens: int
    """Tokens of an excerpt, or of the longest prompt."""
    samples: int
    """Number of excerpts, or of samples at each length and depth."""
    keep_ratios: tuple[float, ...]

    def __str__(self) -> str:
        samples = f"{counted(self.samples, 'sample')} of " * bool(self.samples)
        return f"{samples}{self.tokens} tokens at keep ratios {', '.join(f'{ratio:g}' for ratio in self.keep_ratios)}"


@dataclass(frozen=True, slots=True)
class Part:
    """One evaluation of an experiment."""

    name: str
    """Name within the experiment: "needle"."""
    task: str
    settings: Any
    methods: Callable[[Any], Methods]
    """(settings, as they are run) -> methods."""


@dataclass(frozen=True, slots=True)
class Case:
    """A part of an experiment for one model: the arguments of `evaluate`."""

    name: str
    task: str
    settings: Any
    methods: Methods
    texts: Texts | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment(Figure):
    """A figure of the paper that is measured by tasks."""

    here: str
    """What differs from the paper."""
    size: Size
    quick: Size
    """A size for a laptop."""
    parts: Callable[[Size, Sequence[str]], tuple[Part, ...]]
    """(size, files of examples) -> evaluations. Raises SettingsError if files are needed and none are given."""


def cases(
    loaded: LoadedModel,
    name: str,
    size: Size,
    *,
    documents: Mapping[str, str] | None = None,
    files: Sequence[str] = (),
) -> Iterator[Case]:
    """Yield the evaluations of an experiment, none of more tokens than the model was trained on.

    Args:
        name: name in `EXPERIMENTS`.
        documents: texts to cut excerpts from, or to hide needles in; by default the bundled prose.
        files: files of examples, for those that need some.

    Raises:
        SettingsError: there is no such experiment, or it needs files.
        TextError: no document is long enough.
    """
    size = replace(size, tokens=min(size.tokens, loaded.positions))
    for part in Registry("experiment", SettingsError, EXPERIMENTS).find(name).parts(size, files):
        task, settings = TASKS[part.task], part.settings
        texts: Texts | None = None
        if documents and task.excerpt_tokens:
            n_tokens = task.excerpt_tokens(settings)
            texts = excerpts(loaded.tokenizer, documents, n_tokens=n_tokens, at_most=size.samples)
        elif documents and task.texts != "no":
            texts = excerpts_from(documents)
        elif task.bundled:
            settings, given = task.bundled(loaded, settings)
            texts = given[: size.samples]
        yield Case(part.name, part.task, settings, part.methods(settings), texts)


def _methods(
    keep_ratios: Sequence[float],
    policies: Sequence[str],
    skipped: Sequence[Sequence[int]],
    spec: Callable[..., CompressionSpec],
) -> Methods:
    """The full cache, and a spec for each keep ratio, policy and skip list, by "low_norm 0.5" and the like."""
    methods: dict[str, CompressionSpec | None] = {FULL: None}
    for keep_ratio, policy, skip in product(keep_ratios, policies, skipped):
        name = policy if len(skipped) == 1 else f"{layers_listed(skip)} skipped"
        methods[f"{name} {keep_ratio:g}"] = spec(keep_ratio, policy=policy, skip_layers=skip)
    return methods


def _live(chunk_size: int, keep_ratio: float, **options: Any) -> CompressionSpec:
    """As in the paper's code: a cache grows to a share of the chunk, and keeps 98 % of itself whenever it is there."""
    return CompressionSpec(0.98, prune_after=round(keep_ratio * chunk_size), schedule="reference", **options)


def _once(keep_ratio: float, **options: Any) -> CompressionSpec:
    return CompressionSpec(keep_ratio, **options)


def _prediction(policies: Sequence[str], skipped: Sequence[Sequence[int]], size: Size, _: object) -> tuple[Part, ...]:
    def methods(settings: LmSettings) -> Methods:
        return _methods(size.keep_ratios, policies, skipped, partial(_live, settings.chunk_size))

    return (Part("lm", "lm", LmSettings(chunk_size=size.tokens), methods),)


def _retrieval(policies: Sequence[str], skipped: Sequence[Sequence[int]], size: Size, _: object) -> tuple[Part, ...]:
    methods = _methods(size.keep_ratios, policies, skipped, _once)
    lengths = (size.tokens // 4, size.tokens // 2, size.tokens)
    return (
        Part("needle", "needle", NeedleSettings(lengths, DEPTHS, size.samples), lambda _: methods),
        Part("passkey", "passkey", PasskeySettings(lengths, DEPTHS, size.samples), lambda _: methods),
    )


def _longbench(size: Size, files: Sequence[str]) -> tuple[Part, ...]:
    if not files:
        raise SettingsError(
            "Figure 5 is measured on LongBench's own files, which are not part of this project: give them by --path."
        )
    methods = _methods(size.keep_ratios, _NORMS, _PAPERS, _once)
    return tuple(
        Part(Path(file).stem, "longbench", LongBenchSettings(file, size.tokens), lambda _: methods) for file in files
    )


_PREDICTION = dict(size=Size(2048, 16, (0.5, 0.25)), quick=Size(512, 4, (0.5,)))
_GROWS = (
    "A cache grows to the share of the excerpt that its keep ratio says, then keeps 98 % of what it holds at each token"
)
_ASKED = "The question comes after compression, and the whole answer comes from the compressed cache"
_PROMPTS = "Prompts are shorter, of the size's tokens, half and a quarter of them, with 5 depths each"
EXPERIMENTS = {
    "fig3": Experiment(
        "Prediction by position, by norm and at random",
        "Llama-2-7b, Llama-3-8b, Gemma: up to 50 % evicted, no visible change; keeping high norms is far worse than "
        "random.",
        here=f"{_GROWS}, as in the paper's code. Excerpts are of your own texts, and shorter.",
        parts=partial(_prediction, _NORMS, _PAPERS),
        **_PREDICTION,
    ),
    "fig4": Experiment(
        "Needle and passkey by keep ratio, length and depth",
        "Llama-2-7b-80k: needle 99 % with 50 % evicted, passkey 100 % with 90 % evicted; keeping high norms near 0.",
        here=f"{_ASKED}; the paper's code takes the first token from the full one. {_PROMPTS}.",
        size=Size(4000, 5, (0.9, 0.7, 0.5, 0.3, 0.1)),
        quick=Size(800, 1, (0.5, 0.1)),
        parts=partial(_retrieval, _NORMS, _PAPERS),
    ),
    "fig5": Experiment(
        "LongBench by keep ratio",
        "NarrativeQA, Qasper, HotpotQA, 2WikiMQA and QMSum: a small decrease with 50 % evicted.",
        here=f"{_ASKED}. You bring the files; the middle of an example that is too long is cut out.",
        size=Size(8000, 0, (0.9, 0.7, 0.5, 0.3)),
        quick=Size(2000, 0, (0.5,)),
        parts=_longbench,
    ),
    "fig6": Experiment(
        "Low norm against FastGen",
        "FastGen without attention (local, punctuation, special tokens): low norm is better with up to 50 % evicted.",
        here=f"As Figure 3, with the policy fastgen. {_GROWS}.",
        parts=partial(_prediction, ("low_norm", "fastgen"), _PAPERS),
        **_PREDICTION,
    ),
    "fig10": Experiment(
        "Prediction by skipped layers",
        "Figures 10 to 13, skipped layers {0}, {0, 1} and {0, 1, 12}: little difference.",
        here=f"Skipped layers: none, {{0}} and {{0, 1}}. {_GROWS}.",
        parts=partial(_prediction, ("low_norm",), _SKIP_LISTS),
        **_PREDICTION,
    ),
    "fig16": Experiment(
        "Retrieval by skipped layers",
        "Figures 16 and 17, skip {0} at keep ratio 0.7: 0.876; skip {0, 1}: 0.997, and at 0.8: 1.000.",
        here=f"{_ASKED}. Skipped layers: none, {{0}} and {{0, 1}}. {_PROMPTS}.",
        size=Size(4000, 5, (0.8, 0.7, 0.5, 0.3)),
        quick=Size(800, 1, (0.7, 0.5)),
        parts=partial(_retrieval, ("low_norm",), _SKIP_LISTS),
    ),
}
