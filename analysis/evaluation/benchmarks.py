"""Public benchmarks as tasks: their examples become samples, with their own scores. Runs no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from analysis.demo.presets import bundled_texts
from analysis.errors import SettingsError
from analysis.evaluation import scoring
from analysis.evaluation.examples import Example
from analysis.evaluation.frames import read_frame
from analysis.evaluation.longbench import read_longbench, read_longbench2
from analysis.evaluation.needle import needle_examples
from analysis.evaluation.ruler import OFFLINE, RULER, ruler_examples
from analysis.evaluation.ruler_files import read_questions, read_ruler
from analysis.evaluation.scoring import SCORERS
from analysis.evaluation.settings import Bounds
from analysis.evaluation.task import Sample, Scoring, Task, shortest
from analysis.texts.excerpts import Excerpt
from analysis.texts.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from analysis.models.load import LoadedModel


def sample_of(tokenizer: PreTrainedTokenizerBase, example: Example) -> Sample:
    """Make a sample from an example: its context is compressed, and the rest is read afterwards."""
    rest = tokenizer(example.question + example.answer_prefix, add_special_tokens=False, verbose=False)["input_ids"]
    return Sample(
        example.id,
        tokenize(tokenizer, example.context).ids,
        np.asarray(rest, np.int64),
        new_tokens=example.max_new_tokens,
        at={"task": example.task, **example.labels},
        example=example,
    )


@dataclass(frozen=True, slots=True)
class RulerSettings:
    """Tasks, lengths and number of RULER's samples."""

    tasks: Annotated[tuple[str, ...], "Tasks of RULER.", RULER] = OFFLINE
    lengths: Annotated[tuple[int, ...], "Tokens of an example at most, the answer's included.", Bounds(1)] = (1000,)
    samples: Annotated[int, "Samples of each task and length.", Bounds(1)] = 5
    seed: Annotated[int, "Seed of keys, values and places."] = 0
    questions: Annotated[str, "File of questions for qa_1 or qa_2, in SQuAD's or HotpotQA's JSON."] = ""
    path: Annotated[str, "RULER's own file, in a folder named after its task. Nothing is made then."] = ""


@dataclass(frozen=True, slots=True)
class NeedleSettings:
    """Lengths and depths of the needle map."""

    lengths: Annotated[tuple[int, ...], "Tokens of an example at most, the answer's included.", Bounds(1)] = (
        400,
        1000,
        2000,
    )
    depths: Annotated[tuple[float, ...], "Shares of the haystack before the needle.", Bounds(0, 1)] = (
        0, 0.25, 0.5, 0.75, 1,
    )  # fmt: skip
    samples: Annotated[int, "Haystacks of each length.", Bounds(1)] = 3
    seed: Annotated[int, "Seed of where haystacks begin."] = 0


@dataclass(frozen=True, slots=True)
class FileSettings:
    """File of a benchmark's examples."""

    path: Annotated[str, "The file."] = ""

    def required_path(self) -> str:
        """Path of the file. Raises SettingsError if none was given."""
        if not self.path:
            raise SettingsError("this task reads its examples from a file, and none was given: give its path")
        return self.path


@dataclass(frozen=True, slots=True)
class LongBenchSettings(FileSettings):
    """File of LongBench, and the length that its examples are cut to."""

    n_tokens: Annotated[int, "Tokens of an example at most, its middle cut out; 0 leaves it as it is."] = 0


@dataclass(frozen=True, slots=True)
class FrameSettings(FileSettings):
    """Data frame of kvpress, and how the examples of other tasks than RULER's and LongBench's are scored."""

    scorer: Annotated[str | None, "Scorer of tasks that have none of their own.", SCORERS] = None


def _haystack(texts: Sequence[Excerpt]) -> str | None:
    return "\n\n".join(excerpt.text for excerpt in texts) or None


def _ruler(loaded: LoadedModel, settings: RulerSettings, texts: Sequence[Excerpt]) -> Iterable[Example]:
    if settings.path:
        if texts:
            raise SettingsError("RULER's examples are read from a file or made of texts: give its path or texts.")
        return read_ruler(settings.path)
    questions = read_questions(settings.questions) if settings.questions else None
    return (
        example
        for task in settings.tasks
        for n_tokens in settings.lengths
        for example in ruler_examples(
            loaded.tokenizer,
            task,
            n_tokens=n_tokens,
            n_samples=settings.samples,
            seed=settings.seed,
            essay=_haystack(texts),
            questions=questions,
        )
    )


def _needle(loaded: LoadedModel, settings: NeedleSettings, texts: Sequence[Excerpt]) -> Iterable[Example]:
    return needle_examples(
        loaded.tokenizer,
        _haystack(texts) or "\n\n".join(bundled_texts().values()),
        n_tokens=settings.lengths,
        depths=settings.depths,
        n_samples=settings.samples,
        seed=settings.seed,
    )


def _longbench(loaded: LoadedModel, settings: LongBenchSettings, texts: Sequence[Excerpt]) -> Iterable[Example]:
    return read_longbench(settings.required_path(), loaded.tokenizer, n_tokens=settings.n_tokens or None)


def _longbench2(loaded: LoadedModel, settings: LongBenchSettings, texts: Sequence[Excerpt]) -> Iterable[Example]:
    return read_longbench2(settings.required_path(), loaded.tokenizer, n_tokens=settings.n_tokens or None)


def _frame(loaded: LoadedModel, settings: FrameSettings, texts: Sequence[Excerpt]) -> Iterable[Example]:
    return read_frame(settings.required_path(), scorer=settings.scorer)


ANSWERS = Scoring(
    lambda sample, text: scoring.score(sample.example, text), lambda sample, text: scoring.decided(sample.example, text)
)


def _task(
    title: str, about: str, examples: Callable[[LoadedModel, Any, Sequence[Excerpt]], Iterable[Example]], **other: Any
) -> Task:
    """Make a task of examples that are scored in per cent, each by its own rule."""

    def build(loaded: LoadedModel, settings: Any, texts: Sequence[Excerpt]) -> tuple[Sample, ...]:
        return tuple(sample_of(loaded.tokenizer, example) for example in examples(loaded, settings, texts))

    return Task(title, about, "per cent", True, build, scoring=ANSWERS, right=100, **other)


RULER_TASK = _task(
    "RULER",
    f"RULER's {len(RULER)} tasks of retrieval, tracing and counting, {len(OFFLINE)} of them made here.",
    _ruler,
    settings=RulerSettings,
    texts="may",
    axes=("task", "n_tokens"),
    sketch=partial(shortest, samples=1),
)
NEEDLE_TASK = _task(
    "Needle in a haystack",
    "A sentence hidden in a text, at several lengths and depths, and asked for after compression.",
    _needle,
    settings=NeedleSettings,
    texts="may",
    axes=("n_tokens",),
    share=True,
    sketch=partial(shortest, samples=1),
)
LONGBENCH_TASK = _task(
    "LongBench",
    "Questions and summaries of long texts, from LongBench v1's own file.",
    _longbench,
    settings=LongBenchSettings,
    axes=("task",),
)
LONGBENCH2_TASK = _task(
    "LongBench v2",
    "Questions of four choices about long texts, from LongBench v2's own file.",
    _longbench2,
    settings=LongBenchSettings,
    share=True,
)
FRAME_TASK = _task(
    "kvpress data frame",
    "The examples of a file that kvpress evaluates, with the scores of their benchmarks.",
    _frame,
    settings=FrameSettings,
    axes=("task",),
)
