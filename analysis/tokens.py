"""From text to tokens, with the characters that each token covers. Knows tokenizers; knows no model and no HTML."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from analysis.errors import TextError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_TOKENS = 4  # fewer cannot be ranked in any way that means something

# Not after "Mr.", nor after an initial.
_SENTENCE_END = re.compile(r"""(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])[.!?]["'”’)\]]*(?=\s|$)""")
_LONGEST = 12  # characters a token, more than prose ever takes


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a text, T of them."""

    ids: np.ndarray  # [T] int64
    spans: np.ndarray  # [T, 2] int32: text[start:end]; start == end for tokens the tokenizer added (<s>)
    labels: tuple[str, ...]  # what a reader should see: the characters, or the name of a special token

    def __len__(self) -> int:
        return len(self.ids)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    """Tokens of a text as the tokenizer makes them, its special tokens included.

    A character that several tokens share (an emoji, say) is the label of each, numbered: "🙂 1/4", "🙂 2/4", ...

    Raises:
        TextError: nothing to tokenise, or no valid Unicode.
    """
    check_text(text)
    encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    if not tokenizer.is_fast:  # no spans to be had: the pieces themselves must do
        pieces = tokenizer.convert_ids_to_tokens(ids.tolist())
        return Tokens(ids, np.zeros((len(ids), 2), dtype=np.int32), tuple(pieces))
    spans = np.asarray(encoded["offset_mapping"], dtype=np.int32).reshape(-1, 2)
    names = tokenizer.convert_ids_to_tokens(ids.tolist())
    # SentencePiece puts a space before a text, and claims the first character for it: that token has no characters.
    added = np.array([name == "▁" for name in names[:-1]], dtype=bool) & (spans[1:, 0] == spans[:-1, 0])
    spans[:-1][added, 1] = spans[:-1][added, 0]
    return Tokens(ids, spans, _labels(text, names, spans))


@dataclass(frozen=True, slots=True)
class Passage:
    """Whole sentences of a text, and how it goes on."""

    prompt: str
    following: str  # begins where the prompt ends; it may stop within a word
    prompt_tokens: int  # special ones included


def passages(
    tokenizer: PreTrainedTokenizerBase, text: str, *, at_least: int, at_most: int, following: int = 0
) -> Iterator[Passage]:
    """Consecutive passages of `at_least` to `at_most` tokens, each followed by at least `following` more in the text.

    Those are left out whose last token would be another one if the text went on. Raises TextError as `tokenize`.
    """
    check_text(text)
    start, count, begin = 0, 0, 0  # of the sentence; tokens so far; of the passage
    for end in (match.end() for match in _SENTENCE_END.finditer(text)):
        count += len(tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"])
        start = end
        if count < at_least:
            continue
        prompt, rest = text[begin:end].lstrip(), text[end : end + _LONGEST * following]
        begin, count = end, 0
        ids, whole = tokenize(tokenizer, prompt).ids, tokenize(tokenizer, prompt + rest).ids
        n = len(ids)
        if at_least <= n <= at_most and len(whole) >= n + following and (whole[:n] == ids).all():
            yield Passage(prompt, rest, n)


def check_text(text: str) -> None:
    """Raise TextError unless this is text that can be tokenised."""
    if not text.strip():
        raise TextError("The text is empty. Paste or choose a text first.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(
            f"The text holds half a character (a lone surrogate, U+{ord(text[error.start]):04X}) at position "
            f"{error.start}. Remove it, or paste the text again."
        ) from error


def _labels(text: str, names: list[str], spans: np.ndarray) -> tuple[str, ...]:
    pieces = [text[start:end] or name for (start, end), name in zip(spans.tolist(), names, strict=True)]
    # They need not have the same span: the first may cover the space before as well.
    shared = (spans[1:, 0] < spans[:-1, 1]) & (spans[1:, 1] > spans[1:, 0])
    same = [False, *shared.tolist()]
    labels, start = [], 0
    for end in range(1, len(pieces) + 1):
        if end < len(pieces) and same[end]:
            continue
        parts = end - start
        labels += [pieces[i] if parts == 1 else f"{pieces[i]} {i - start + 1}/{parts}" for i in range(start, end)]
        start = end
    return tuple(labels)
