"""Synthetic sequences that teach looking back: passkeys, needles, copies. Disclosed in the model card.

The templates of passkey and needle are those of the evaluations; the numbers, places, depths and lengths are drawn.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from analysis.presets import PASSKEY_FILLER, PASSKEY_QUESTION, PASSKEY_TASK, passkey_sentence
from analysis.training.corpus import Corpus

_PLACES = [
    "Avonlea",
    "Boston",
    "Carthage",
    "Dover",
    "Edinburgh",
    "Florence",
    "Geneva",
    "Hamburg",
    "Ithaca",
    "Jaipur",
    "Kyoto",
    "Lisbon",
    "Madrid",
    "Naples",
    "Oxford",
    "Paris",
    "Quebec",
    "Rome",
    "Sparta",
    "Troy",
    "Utrecht",
    "Venice",
    "Warsaw",
    "York",
    "Zurich",
]
_SHORTEST = 48  # tokens of a passkey or needle


class Episodes:
    """Fills sequences with episodes, one after the other, of all lengths and depths."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._kinds = (self._passkey, self._needle, self._copy)

    def sequence(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """`n` tokens of episodes, [n] int64."""
        parts: list[np.ndarray] = []
        room = n
        while room > 0:
            length = int(np.exp(rng.uniform(np.log(_SHORTEST), np.log(max(n, _SHORTEST + 1)))))
            part = self._kinds[rng.integers(len(self._kinds))](rng, min(length, room))[:room]
            parts.append(part)
            room -= len(part)
        return np.concatenate(parts)

    def _passkey(self, rng: np.random.Generator, length: int) -> np.ndarray:
        key = int(rng.integers(10_000, 100_000))
        task, told = self._ids(PASSKEY_TASK), self._ids(f" {passkey_sentence(key)}")
        question = self._ids(f" {PASSKEY_QUESTION} {key}.\n")
        filler = self._ids(f" {PASSKEY_FILLER}") if rng.random() < 0.5 else None
        return self._hide(rng, length, task, told, question, filler)

    def _needle(self, rng: np.random.Generator, length: int) -> np.ndarray:
        place, number = rng.choice(_PLACES), int(rng.integers(10, 10_000))
        told = self._ids(f" The number of {place} is {number}.")
        question = self._ids(f"\nWhat is the number of {place}? The number of {place} is {number}.\n")
        return self._hide(rng, length, self._ids(""), told, question, None)

    def _hide(self, rng, length, task, told, question, filler) -> np.ndarray:
        """Task, filler, what is told, filler, question: filled to `length` with a repeated filler, or book text."""
        room = max(length - len(task) - len(told) - len(question), 0)
        before = int(rng.integers(room + 1))
        fill = (lambda n: np.resize(filler, n)) if filler is not None else (lambda n: self._corpus.draw(rng, n))
        return np.concatenate([task, fill(before), told, fill(room - before), question])

    def _copy(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """A passage, book text, and the passage again. The passage is of a book, of random tokens or of digits."""
        size = max(4, length // int(rng.integers(2, 6)))
        kind = rng.integers(3)
        if kind == 0:
            passage = self._corpus.draw(rng, size)
        else:
            choices = np.arange(2, len(self._corpus.tokenizer)) if kind == 1 else self._ids("0123456789")
            passage = rng.choice(choices, size)
        return np.concatenate([passage, self._corpus.draw(rng, max(length - 2 * size, 1)), passage])

    def _ids(self, text: str) -> np.ndarray:
        return np.array(encode(self._corpus.tokenizer, text), dtype=np.int64)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text without the special ones; safe in threads, which calling the tokenizer itself is not."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
