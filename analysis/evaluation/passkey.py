"""The task `passkey`: a number hidden in filler, asked for after compression. Knows tokenizers; runs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import numpy as np

from analysis.errors import SettingsError, TextError
from analysis.evaluation.prompts import FOUND
from analysis.evaluation.settings import Bounds
from analysis.evaluation.task import Sample, Task, shortest
from analysis.texts.excerpts import Excerpt
from analysis.texts.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from analysis.models.load import LoadedModel

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = "What is the pass key? The pass key is"


@dataclass(frozen=True, slots=True)
class PasskeySettings:
    """Lengths of the prompts, depths of the keys, and number of keys."""

    lengths: Annotated[tuple[int, ...], "Tokens of the prompts, at most.", Bounds(1)] = (400, 1000, 2000)
    depths: Annotated[tuple[float, ...], "Where the key is told: 0 before the filler, 1 after it.", Bounds(0, 1)] = (
        0.1, 0.3, 0.5, 0.7, 0.9,
    )  # fmt: skip
    keys: Annotated[int, "Keys asked for at each length and depth.", Bounds(1)] = 4
    seed: Annotated[int, "Seed of the keys."] = 0


def passkeys(count: int, *, seed: int = 0) -> tuple[int, ...]:
    """Draw keys of five digits. Raises SettingsError if `count` is below 1."""
    if count < 1:
        raise SettingsError(f"at least one key is needed, got {count}")
    return tuple(int(key) for key in np.random.default_rng(seed).integers(10_000, 100_000, count))


def passkey_sentence(key: int) -> str:
    """Write the sentence that is hidden in the filler."""
    return f"The pass key is {key}. Remember it. {key} is the pass key."


def passkey_prompt(key: int, *, before: int, after: int) -> str:
    """Write the paper's prompt, with its filler repeated `before` and `after` times; the answer is `key`."""
    return " ".join([TASK, *[FILLER] * before, passkey_sentence(key), *[FILLER] * after, QUESTION])


def passkey_text(tokenizer: PreTrainedTokenizerBase, key: int, *, n_tokens: int, depth: float) -> str:
    """Write the longest passkey prompt of at most `n_tokens` tokens, question included, in whole repeats of the filler.

    Raises:
        TextError: the prompt has more than `n_tokens` tokens even without filler.
        SettingsError: the depth is outside 0 to 1.
    """
    if not 0 <= depth <= 1:
        raise SettingsError(f"depth must be from 0 to 1, got {depth}")

    def prompt(repeats: int) -> str:
        before = round(depth * repeats)
        return passkey_prompt(key, before=before, after=repeats - before)

    def length(repeats: int) -> int:
        return len(tokenize(tokenizer, prompt(repeats)))

    bare = length(0)
    if n_tokens < bare:
        raise TextError(f"A passkey prompt takes {bare} tokens without any filler, more than the {n_tokens} asked for.")
    repeats = (n_tokens - bare) // (length(1) - bare)
    while length(repeats) > n_tokens:  # a tokenizer may join the parts to other tokens than it makes of each
        repeats -= 1
    return prompt(repeats)


def passkey_sample(
    tokenizer: PreTrainedTokenizerBase, key: int, *, n_tokens: int, depth: float, name: str = ""
) -> Sample:
    """Make the sample of one key: a `passkey_text`, cut before its question. Raises as that does."""
    text = passkey_text(tokenizer, key, n_tokens=n_tokens, depth=depth)
    ids = tokenize(tokenizer, text).ids
    context = tokenize(tokenizer, text.removesuffix(f" {QUESTION}")).ids
    shared = min(len(context), len(ids) - 1)
    same = ids[:shared] == context[:shared]
    cut = shared if same.all() else int(same.argmin())
    return Sample(
        name or str(key),
        ids[:cut],
        ids[cut:],
        answer=str(key),
        new_tokens=2 * len(str(key)) + 1,  # more than digits: a space may be a token
        at={"n_tokens": n_tokens, "depth": depth},
    )


def _build(loaded: LoadedModel, settings: PasskeySettings, texts: Sequence[Excerpt]) -> tuple[Sample, ...]:
    return tuple(
        passkey_sample(loaded.tokenizer, key, n_tokens=n, depth=depth, name=f"{n} tokens, depth {depth:g}, key {i}")
        for n in dict.fromkeys(settings.lengths)
        for depth in dict.fromkeys(settings.depths)
        for i, key in enumerate(passkeys(settings.keys, seed=settings.seed))
    )


PASSKEY = Task(
    title="Passkey",
    about="A number hidden in filler, at several lengths and depths, and asked for after compression.",
    unit="share found",
    higher_is_better=True,
    build=_build,
    settings=PasskeySettings,
    scoring=FOUND,
    axes=("n_tokens",),
    share=True,
    sketch=partial(shortest, keys=1),
)
