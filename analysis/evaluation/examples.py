"""Examples of tasks with a generated answer: what is compressed, what is asked afterwards, and the right answers.

Knows tokenizers and files of examples; knows no model, and no benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from analysis.errors import RecordError, TextError
from analysis.texts.read import read_text
from analysis.texts.tokens import SENTENCE_END

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Example:
    """A context to compress, a question to ask afterwards, and the right answers."""

    id: str
    """Name that no other example of its set has."""
    task: str
    """Name of its set: "niah_single_1", "hotpotqa"."""
    context: str
    """Text that is in the cache when it is compressed."""
    question: str
    """Text that the model reads after compression."""
    answer_prefix: str
    """Text that begins the answer. It follows the question, or a chat template's header of the reply."""
    references: tuple[str, ...]
    """Right answers, at least one; the scorer says whether all or any is wanted."""
    max_new_tokens: int
    scorer: str
    """Name of its entry in `scoring.SCORERS`."""
    all_classes: tuple[str, ...] = ()
    """Labels to choose from, for classification."""
    labels: Mapping[str, str | float] = field(default_factory=dict, hash=False)
    """Coordinates to group results by: depth, difficulty, ..."""

    @property
    def prompt(self) -> str:
        """Everything that the model reads."""
        return self.context + self.question + self.answer_prefix


def count_tokens(tokenizer: PreTrainedTokenizerBase, example: Example) -> int:
    """Count the tokens of an example as it is run: its context, what follows, and the longest answer.

    The two texts are tokenized separately, since compression comes between them; special tokens precede the context.
    """
    context = tokenizer(example.context, verbose=False)["input_ids"]
    rest = tokenizer(example.question + example.answer_prefix, add_special_tokens=False, verbose=False)["input_ids"]
    return len(context) + len(rest) + example.max_new_tokens


def fill(
    tokenizer: PreTrainedTokenizerBase,
    make: Callable[[int], Example],
    *,
    n_tokens: int,
    least: int,
    guess: int = 0,
    most: int | None = None,
) -> tuple[Example, int]:
    """Make the largest example that has at most `n_tokens` tokens, its longest answer included.

    Args:
        make: makes an example of a size in its own units (words, lines, documents); more units make it longer.
        least: smallest size that makes sense.
        guess: size to begin at, such as that of the example before.
        most: largest size there is.

    Returns:
        The example and its size.

    Raises:
        TextError: even the smallest is longer; the message says how long.
    """

    def fits(size: int) -> bool:
        return count_tokens(tokenizer, make(size)) <= n_tokens

    if not fits(least):
        first = make(least)
        raise TextError(
            f"{first.task} needs at least {count_tokens(tokenizer, first)} tokens with this tokenizer, "
            f"{first.max_new_tokens} of them for the answer, got {n_tokens}. Ask for more."
        )
    size = largest(fits, least=least, guess=guess, most=most)
    return make(size), size


def largest(fits: Callable[[int], bool], *, least: int, guess: int = 0, most: int | None = None) -> int:
    """Largest size that fits, given that `least` does and that none fits beyond one that does not."""
    low, step = max(least, guess if most is None else min(guess, most)), 1
    if low == least or fits(low):
        while (most is None or low + step <= most) and fits(low + step):
            low, step = low + step, 2 * step
        high = low + step if most is None else min(low + step, most + 1)
    else:
        high = low
        while high - step > least and not fits(high - step):
            high, step = high - step, 2 * step
        low = max(least, high - step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def sentences(text: str) -> list[str]:
    """Split a text into sentences, each run of white space made one space. The dots of ". . ." end no sentence."""
    text = " ".join(text.split())
    ends = [match.end() for match in SENTENCE_END.finditer(text) if text[match.end() + 1 : match.end() + 2] != "."]
    pieces = (text[start:end].strip() for start, end in pairwise([0, *ends, len(text)]))
    return [piece for piece in pieces if piece]


def read_items(path: str | Path, kind: type[Item]) -> Iterator[tuple[int, Item]]:
    """Read a file of JSON lines, or of one JSON array, item by item.

    Args:
        kind: dataclass or `msgspec.Struct` that an item must be; it may hold more fields than that has.

    Yields:
        Each item with its number, from 0.

    Raises:
        RecordError: an item is malformed, or there is none; the message says which and why.
        TextError: the file cannot be read.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            items = msgspec.json.decode(text, type=list[msgspec.Raw])
        except msgspec.DecodeError as error:
            raise RecordError(f"{path} is not JSON: {error}.") from error
        given: list[tuple[str, str | msgspec.Raw]] = [(f"item {i}", item) for i, item in enumerate(items)]
    else:  # not splitlines: a JSON string may hold line separators of Unicode
        given = [(f"line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not given:
        raise RecordError(f"{path} holds no examples.")
    for number, (place, item) in enumerate(given):
        try:
            yield number, msgspec.json.decode(item, type=kind)
        except (msgspec.DecodeError, RecursionError) as error:
            raise RecordError(f"{path}, {place}: {error}.") from error
