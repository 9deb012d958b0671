"""Tasks: samples, made from texts or from a template, and a score for each. Runs no model.

A sample is a context, which is compressed, and a question, which is run over what is left of it. Then either given
tokens are predicted (their likelihood is the score), or an answer is generated and its text is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from analysis.texts.excerpts import Excerpt

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel


def _no_tokens() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One question to a model, or one continuation to predict."""

    name: str
    """Name, unique among the samples of a task."""
    context: np.ndarray
    """[C] int64 token ids, run first and then compressed. Where there are none the cache evicts from the start."""
    question: np.ndarray
    """[Q] int64, run over what is left of the context."""
    target: np.ndarray = field(default_factory=_no_tokens)
    """[N] int64, the tokens to predict; none where an answer is generated."""
    answer: str = ""
    """The expected answer, where one is generated."""
    new_tokens: int = 0
    """The most tokens that an answer may take."""
    document: str = ""
    """Document that it was cut from, since intervals resample documents; empty for a document of its own."""
    at: Mapping[str, str | float] = field(default_factory=dict)
    """Place in the task's grid: {"n_tokens": 400, "depth": 0.5}."""
    example: Any = None
    """Anything else that the task's scoring needs."""


@dataclass(frozen=True, slots=True)
class NoSettings:
    """Settings of a task that has none."""


def shortest(settings: Any, most: int, **counts: int) -> Any:
    """Settings of the shortest samples alone, of at most so many tokens, and of others than lengths as given."""
    return replace(settings, lengths=(min((*settings.lengths, most)),), **counts)


Build = Callable[["LoadedModel", Any, Sequence[Excerpt]], Sequence[Sample]]
"""(model, the task's settings, texts) -> samples. Runs nothing; raises TextError or SettingsError."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """Score of a generated answer, and when it is final."""

    score: Callable[[Sample, str], float]
    """(sample, generated text) -> score."""
    decided: Callable[[Sample, str], bool] = lambda sample, text: False
    """(sample, text so far) -> whether the score stays as it is, however the text goes on: generation ends there."""


RESERVED = {
    "baselines", "by_position", "context", "device", "excerpts", "help", "json", "keep_ratio", "keep_ratios",
    "key_bits", "key_channels", "model", "out", "output_dir", "plan", "policies", "protect_first", "protect_last",
    "prune_after", "ray", "schedule", "settings", "skip_layers", "strategies", "study", "task", "texts", "to",
    "value_bits", "workers",
}  # fmt: skip
"""Names that no setting of a task may have: the command line has options of these names beside it."""


@dataclass(frozen=True, slots=True)
class Task:
    """A task: how its samples are made and scored.

    Raises:
        ValueError: a setting has no default, or one of the `RESERVED` names.
    """

    title: str
    about: str
    """One line on what it measures."""
    unit: str
    """Unit of the score: "nats/token"."""
    higher_is_better: bool
    build: Build
    settings: type = NoSettings
    """A dataclass of the settings, all with defaults. The command line makes them options, and reads what each is from
    its type: `Annotated[int, "Keys asked for at each length."]`, and of names in a registry which:
    `Annotated[str, "Scorer.", SCORERS]`."""
    texts: Literal["no", "may", "must"] = "no"
    """Whether samples are made of texts that a user gives."""
    excerpt_tokens: Callable[[Any], int] | None = None
    """settings -> tokens of the excerpts that it takes; None: it takes texts as they are."""
    scoring: Scoring | None = None
    """None where samples have a target: the score is its mean NLL."""
    right: float = 1.0
    """The score of a right answer; 100 where it is in per cent."""
    share: bool = False
    """Whether each score is 0 or `right`, so that their mean is a share."""
    axes: tuple[str, ...] = ()
    """Axes of the samples' grid (`Sample.at`) that results are summarised by: a row for each place on them."""
    sketch: Callable[[Any, int], Any] = lambda settings, most: settings
    """(settings, most tokens) -> settings of a few samples, by which others are checked before all samples are made."""
    bundled: Callable[[LoadedModel, Any], tuple[Any, Sequence[Excerpt]]] | None = None
    """(model, settings) -> settings and bundled texts to use if no texts are given; None if some must be."""
    version: int = 1
    """Increased when samples or scores change, so that older files of results are not continued."""

    def __post_init__(self) -> None:
        for setting in fields(self.settings):
            if setting.name in RESERVED:
                raise ValueError(f"{self.title}: no setting may be called {setting.name!r}, as an option is already")
            if setting.default is MISSING and setting.default_factory is MISSING:
                raise ValueError(f"{self.title}: the setting {setting.name!r} needs a default")
