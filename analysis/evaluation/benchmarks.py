"""Public benchmarks as tasks: their examples become samples, with their own scores. Runs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np

from analysis.demo.presets import bundled_texts
from analysis.errors import SettingsError
from analysis.evaluation import scoring
from analysis.evaluation.examples import Example
from analysis.evaluation.frames import read_frame
from analysis.evaluation.longbench import read_longbench, read_longbench2
from analysis.evaluation.needle import needle_examples
from analysis.evaluation.ruler import OFFLINE, RULER, ruler_examples
from analysis.evaluation.ruler_files import read_questions
from analysis.evaluation.task import Sample, Scoring, Task
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

    tasks: Annotated[tuple[str, ...], "Names in `RULER`."] = OFFLINE
    lengths: Annotated[tuple[int, ...], "Tokens of an example at most, the answer's included."] = (1000,)
    samples: Annotated[int, "Samples of each task and length."] = 5
    seed: Annotated[int, "Seed of keys, values and places."] = 0
    questions: Annotated[str, "File for qa_1 or qa_2."] = ""


@dataclass(frozen=True, slots=True)
class NeedleSettings:
    """Lengths and depths of the needle map."""

    lengths: Annotated[tuple[int, ...], "Tokens of an example at most, the answer's included."] = (400, 1000, 2000)
    depths: Annotated[tuple[float, ...], "Shares of the haystack before the needle."] = (0, 0.25, 0.5, 0.75, 1)
    samples: Annotated[int, "Haystacks of each length."] = 3
    seed: Annotated[int, "Seed of where haystacks begin."] = 0


@dataclass(frozen=True, slots=True)
class FileSettings:
    """File of a benchmark's examples."""

    path: Annotated[str, "The file."] = ""
    n_tokens: Annotated[int, "Tokens of an example at most, its middle cut out; 0 leaves it as it is."] = 0

    def required_path(self) -> str:
        """Path of the file. Raises SettingsError if none was given."""
        if not self.path:
            raise SettingsError("this task reads its examples from a file, and none was given: give its path")
        return self.path


def _haystack(texts: Sequence[Excerpt]) -> str | None:
    return "\n\n".join(excerpt.text for excerpt in texts) or None


def _ruler(loaded: LoadedModel, settings: RulerSettings, texts: Sequence[Excerpt]) -> list[Sample]:
    questions = read_questions(settings.questions) if settings.questions else None
    return [
        sample_of(loaded.tokenizer, example)
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
    ]


ANSWERS = Scoring(
    lambda sample, text: scoring.score(sample.example, text), lambda sample, text: scoring.decided(sample.example, text)
)
RULER_TASK = Task(
    title="RULER",
    about=f"RULER's {len(RULER)} tasks of retrieval, tracing and counting, {len(OFFLINE)} of them made here.",
    unit="per cent",
    higher_is_better=True,
    build=_ruler,
    settings=RulerSettings,
    scoring=ANSWERS,
    right=100,
)


def _needle(loaded: LoadedModel, settings: NeedleSettings, texts: Sequence[Excerpt]) -> list[Sample]:
    examples = needle_examples(
        loaded.tokenizer,
        _haystack(texts) or "\n\n".join(bundled_texts().values()),
        n_tokens=settings.lengths,
        depths=settings.depths,
        n_samples=settings.samples,
        seed=settings.seed,
    )
    return [sample_of(loaded.tokenizer, example) for example in examples]


def _longbench(loaded: LoadedModel, settings: FileSettings, texts: Sequence[Excerpt]) -> list[Sample]:
    examples = read_longbench(settings.required_path(), loaded.tokenizer, n_tokens=settings.n_tokens or None)
    return [sample_of(loaded.tokenizer, example) for example in examples]


def _longbench2(loaded: LoadedModel, settings: FileSettings, texts: Sequence[Excerpt]) -> list[Sample]:
    examples = read_longbench2(settings.required_path(), loaded.tokenizer, n_tokens=settings.n_tokens or None)
    return [sample_of(loaded.tokenizer, example) for example in examples]


def _frame(loaded: LoadedModel, settings: FileSettings, texts: Sequence[Excerpt]) -> list[Sample]:
    return [sample_of(loaded.tokenizer, example) for example in read_frame(settings.required_path())]


NEEDLE_TASK = Task(
    "Needle in a haystack",
    "A sentence hidden in a text and asked for after compression, by length and depth.",
    "per cent",
    True,
    _needle,
    NeedleSettings,
    scoring=ANSWERS,
    right=100,
)
LONGBENCH_TASK = Task(
    "LongBench",
    "Questions and summaries of long texts, from LongBench v1's own file.",
    "per cent",
    True,
    _longbench,
    FileSettings,
    scoring=ANSWERS,
    right=100,
)
LONGBENCH2_TASK = Task(
    "LongBench v2",
    "Questions of four choices about long texts, from LongBench v2's own file.",
    "per cent",
    True,
    _longbench2,
    FileSettings,
    scoring=ANSWERS,
    right=100,
)
FRAME_TASK = Task(
    "kvpress data frame",
    "The examples of a file that kvpress evaluates, with the scores of their benchmarks.",
    "per cent",
    True,
    _frame,
    FileSettings,
    scoring=ANSWERS,
    right=100,
)
