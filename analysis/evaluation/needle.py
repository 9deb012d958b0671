"""Needle in a haystack: one sentence hidden at a depth of a text, and a question about it. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from random import Random
from typing import TYPE_CHECKING

from analysis.errors import SettingsError, TextError
from analysis.evaluation.examples import Example, fill, sentences
from analysis.texts.tokens import SENTENCE_END, check_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Needle:
    """A sentence to hide and the question that it answers."""

    text: str = "The key to the green door is hidden in the blue teapot."
    question: str = "Question: Where is the key to the green door hidden?"
    answer_prefix: str = "\nAnswer: The key to the green door is hidden in"
    references: tuple[str, ...] = ("blue teapot",)
    """Any of them counts, wherever the answer holds it."""
    max_new_tokens: int = 16


def needle_examples(
    tokenizer: PreTrainedTokenizerBase,
    haystack: str,
    *,
    n_tokens: Sequence[int],
    depths: Sequence[float],
    n_samples: int = 1,
    needle: Needle | None = None,
    seed: int = 0,
) -> tuple[Example, ...]:
    """Make examples for every length and depth, each as long as fits.

    A sample begins at a sentence of the haystack drawn by `seed`, the same for all depths, and goes on at the beginning
    where the haystack ends. The needle stands between two sentences, as near to its depth as possible.

    Args:
        n_tokens: lengths in tokens, those to generate included.
        depths: shares of the haystack before the needle, 0 to 1.
        n_samples: samples for each length and depth.
        needle: the sentence and question; None for the default.

    Raises:
        SettingsError: a depth is outside 0 to 1.
        TextError: the haystack is empty or already holds the answer, or a length is too short.
    """
    needle = needle or Needle()
    check_text(haystack)
    if wrong := [depth for depth in depths if not 0 <= depth <= 1]:
        raise SettingsError(f"depths are shares from 0 to 1, got {wrong[0]:g}. For per cents, divide by 100.")
    if given := next((answer for answer in needle.references if answer.lower() in haystack.lower()), None):
        raise TextError(f"The haystack already holds the needle's answer, {given!r}. Hide something else.")
    words, size, examples = [sentence.split(" ") for sentence in sentences(haystack)], 0, []
    for length in n_tokens:
        for sample in range(n_samples):
            begin = Random(f"needle {seed} {sample}").randrange(len(words))
            straw = [word for sentence in words[begin:] + words[:begin] for word in sentence]
            for depth in depths:
                name = f"needle {length} depth {depth:g} seed {seed} {sample}"
                make = partial(_example, name, needle, straw, depth, length)
                example, size = fill(tokenizer, make, n_tokens=length, least=1, guess=size)
                examples.append(example)
    return tuple(examples)


def _example(name: str, needle: Needle, straw: Sequence[str], depth: float, length: int, n_words: int) -> Example:
    text = sentences(" ".join(straw[i % len(straw)] for i in range(n_words)))
    borders = list(accumulate(map(len, text), initial=0))
    ends = len(borders) if SENTENCE_END.search(text[-1]) else len(text)  # a sentence that is cut off ends nowhere
    place = min(range(ends), key=lambda i: abs(borders[i] - depth * borders[-1]))
    context = " ".join([*text[:place], needle.text, *text[place:]])
    return Example(
        name,
        "needle",
        f"{context}\n\n",
        needle.question,
        needle.answer_prefix,
        needle.references,
        needle.max_new_tokens,
        "string_match_part",
        labels={"depth": depth, "n_tokens": length},
    )
