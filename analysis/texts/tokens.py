"""Tokens of a text, with the characters that each covers. Knows tokenizers; knows no model and no HTML."""

from __future__ import annotations

import math
import queue
import re
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.errors import ModelError, TextError
from analysis.models.vet import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_TOKENS = 4  # fewer cannot be ranked in any way that means something

# Not after "Mr.", nor after an initial.
SENTENCE_END = re.compile(r"""(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)(?<!\b[A-Z])[.!?]["'”’)\]]*(?=\s|$)""")
_LONGEST = 12  # characters a token, more than prose ever takes
_USUAL = 6  # characters a token, more than most prose takes
MOST_SECONDS = 60.0  # that a text is waited for
LONG = 20_000  # characters; fewer take no time, however a tokenizer goes about them
_TELLING = 0.3  # seconds, enough to tell how the time grows
_WORD = re.compile(r"\S+")
_SAMPLES, _SAMPLE = 20, 500  # of a longer text, how many stretches of how many characters are counted


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a text, T of them."""

    ids: np.ndarray  # [T] int64
    spans: np.ndarray  # [T, 2] int32: text[start:end]; start == end for tokens the tokenizer added (<s>)
    labels: tuple[str, ...]  # for readers: the characters, or the name of a special token
    notes: tuple[str, ...] = ()  # for readers: remarks on special tokens

    def __len__(self) -> int:
        return len(self.ids)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    """Tokenize a text as a model should read it.

    Special tokens are decided here and nowhere else: those that the tokenizer puts before a text, unless the text has
    them already, and none after it, so that the text can continue. A
    character that several tokens share (an emoji, say) is the label of each, numbered: "🙂 1/4", "🙂 2/4", ...

    Raises:
        TextError: the text is empty or invalid Unicode.
    """
    check_text(text)
    ids, spans, notes = _encoded(tokenizer, text)
    names = list(tokenizer.convert_ids_to_tokens(ids.tolist()))
    if spans is None:  # the tokens' own names must do
        return Tokens(ids, np.zeros((len(ids), 2), dtype=np.int32), tuple(names), notes)
    # SentencePiece puts a space before a text, and claims the first character for it: that token has no characters.
    added = np.array([name == "▁" for name in names[:-1]], dtype=bool) & (spans[1:, 0] == spans[:-1, 0])
    spans[:-1][added, 1] = spans[:-1][added, 0]
    return Tokens(ids, spans, _labels(text, names, spans), notes)


def notes_of(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> tuple[str, ...]:
    """Collect the notes on the tokens of all texts, each once. Raises TextError as `tokenize`."""
    return tuple(dict.fromkeys(note for text in texts for note in tokenize(tokenizer, text).notes))


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    """Ids and spans of `Tokens`, no spans where the tokenizer does not tell them, and notes."""
    if tokenizer.is_fast:
        encoded = _called(tokenizer, text, return_offsets_mapping=True, return_special_tokens_mask=True)
        spans = np.asarray(encoded["offset_mapping"], dtype=np.int32).reshape(-1, 2)
        added = np.asarray(encoded["special_tokens_mask"], dtype=bool)
    else:
        encoded, spans = _called(tokenizer, text), None
        added = _added(encoded["input_ids"], _called(tokenizer, text, add_special_tokens=False)["input_ids"])
    ids, own = np.asarray(encoded["input_ids"], dtype=np.int64), np.flatnonzero(~added)
    if not len(own):
        return ids, spans, ()
    start, end, notes = int(own[0]), int(own[-1]) + 1, []

    def named(some: np.ndarray) -> str:
        return " ".join(tokenizer.convert_ids_to_tokens(some.tolist()))

    if end < len(ids):
        notes.append(
            f"The tokenizer's end token, {named(ids[end:])}, is left out: a text that has ended does not go on."
        )
    if start and (ids[start : 2 * start] == ids[:start]).all() and 2 * start <= end:
        notes.append(f"The text begins with the start token, {named(ids[:start])}, already, so none is put before it.")
    else:
        start = 0
    return ids[start:end], None if spans is None else _covering(text, spans[start:end]), tuple(notes)


def _called(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> Mapping[str, list[Any]]:
    """What the tokenizer makes of a text. Raises TextError where it cannot, or not within `MOST_SECONDS`.

    A long text is left to a thread, for what a tokenizer has begun cannot be ended: it dies with the program. So what
    can be known before to take too long is not begun.
    """
    outcome: queue.SimpleQueue[Mapping[str, list[Any]] | BaseException] = queue.SimpleQueue()

    def call() -> None:
        try:
            if len(text) >= LONG:
                _check_longest_word(tokenizer, text)
            outcome.put(tokenizer(text, verbose=False, **options))
        except BaseException as error:  # what its Rust raises in a panic is no Exception
            outcome.put(error)

    if len(text) < LONG:
        call()
    else:
        threading.Thread(target=call, daemon=True).start()
    try:
        result = outcome.get(timeout=MOST_SECONDS)
    except queue.Empty:
        raise TextError(
            f"The tokenizer has not finished these {len(text):,} characters in {MOST_SECONDS:g} seconds. Shorten the "
            "text, above all long words without spaces, on which some tokenizers are very slow."
        ) from None
    if isinstance(result, BaseException):
        if isinstance(result, TextError) or (not isinstance(result, Exception) and not _panicked(result)):
            raise result  # too long a word, or Ctrl-C
        raise TextError(
            f"The tokenizer cannot read this text ({one_line(result)}): it may be damaged, or not belong to the model."
        ) from result
    return result


def _panicked(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


def _check_longest_word(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Raise TextError if the longest run without a space will take too long, as more and more of it takes.

    The time of some tokenizers grows with the square of a word's length, or its cube.
    """
    word, size, before = max(_WORD.findall(text), key=len, default=""), 1000, 0.0
    while size < len(word):
        started = time.perf_counter()
        tokenizer(word[:size], verbose=False)
        took = time.perf_counter() - started
        if took > _TELLING:
            growth = max(1.0, math.log2(took / before)) if before else 2.0
            if (needed := took * (len(word) / size) ** growth) > MOST_SECONDS:
                raise TextError(
                    f"The text holds a word of {len(word):,} characters, {word[:20]!r} and so on, for which this "
                    f"tokenizer would take about {needed:,.0f} seconds. Shorten it, or add spaces."
                )
            return
        size, before = 2 * size, took


def _added(ids: list[int], bare: list[int]) -> np.ndarray:
    """Which of the ids were put around the `bare` ones; none where these are not among them."""
    at = next((i for i in range(len(ids) - len(bare) + 1) if ids[i : i + len(bare)] == bare), None)
    added = np.full(len(ids), at is not None)
    if at is not None:
        added[at : at + len(bare)] = False
    return added


def _covering(text: str, spans: np.ndarray) -> np.ndarray:
    """The spans, each with the characters after it that were made one with its own, or dropped, but for white space.

    A tokenizer that composes or strips accents claims the letter alone.
    """
    covers = np.flatnonzero(spans[:, 1] > spans[:, 0])
    if not len(covers):
        return spans
    first = covers[0]
    spans[first, 0] -= len(text[: spans[first, 0]].lstrip())
    ends = np.maximum.accumulate(spans[covers, 1])
    following = np.append(np.minimum.accumulate(spans[covers, 0][::-1])[::-1][1:], len(text))
    grown = {
        end: end + len(text[end:start].rstrip())
        for end, start in zip(ends.tolist(), following.tolist(), strict=True)
        if end < start
    }
    spans[covers, 1] = [grown.get(end, end) for end in spans[covers, 1].tolist()]
    return spans


def beginning(tokenizer: PreTrainedTokenizerBase, text: str, n_tokens: int, *, start: int = 0) -> tuple[str, bool]:
    """Cut the longest beginning of `text[start:]` of at most `n_tokens` tokens, and tell if the text has that many.

    No more is tokenized than that needs. On its own the beginning may have a token or two less than within the text.

    Raises:
        TextError: the text is invalid Unicode.
    """
    size = max(1, _USUAL * n_tokens)
    while True:
        window = text[start : start + size]
        ids, spans, _ = _encoded(tokenizer, window)
        if len(ids) > n_tokens or start + size >= len(text):
            break
        size *= 2
    if len(ids) <= n_tokens:
        return window, len(ids) == n_tokens

    def fits(end: int) -> bool:
        return len(_encoded(tokenizer, window[:end])[0]) <= n_tokens

    if spans is None:  # by halves: the first place that is known to be too far is where it ends
        return window[: bisect_left(range(len(window) + 1), True, key=lambda end: not fits(end)) - 1], True
    ends, cut = np.maximum.accumulate(spans[:, 1]), n_tokens  # special tokens have no characters
    while not fits(ends[cut - 1]):
        cut -= 1
    return window[: ends[cut - 1]], True


def about_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Estimate the number of tokens of a text, from samples of it if it is `LONG`. Raises TextError as `tokenize`."""
    check_text(text)
    if len(text) < LONG:
        return len(_encoded(tokenizer, text)[0])
    starts = range(0, len(text), len(text) // _SAMPLES)
    samples = [text[start : start + _SAMPLE] for start in starts]
    counted = sum(len(_encoded(tokenizer, sample)[0]) for sample in samples)
    return counted * len(text) // sum(map(len, samples))


@dataclass(frozen=True, slots=True)
class Passage:
    """Whole sentences of a text, and what follows them."""

    prompt: str
    following: str  # begins where the prompt ends; it may stop within a word
    prompt_tokens: int  # special ones included


def passages(
    tokenizer: PreTrainedTokenizerBase, text: str, *, at_least: int, at_most: int, following: int = 0
) -> Iterator[Passage]:
    """Yield consecutive passages of `at_least` to `at_most` tokens, each followed by at least `following` more.

    A passage whose last token would change if the text continued is dropped. Raises TextError as `tokenize`.
    """
    check_text(text)
    start, count, begin = 0, 0, 0  # of the sentence; tokens so far; of the passage
    for end in (match.end() for match in SENTENCE_END.finditer(text)):
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


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ModelError unless the tokenizer tokenizes a text."""
    try:
        ids = _called(tokenizer, "The sea, 1.", add_special_tokens=False)["input_ids"]
    except TextError as error:
        raise ModelError(f"{name}: {error}") from error
    if not ids:
        raise ModelError(
            f"{name}: its tokenizer has no vocabulary, so it makes no tokens of a text. Look for the files that are "
            "missing beside the weights, such as tokenizer.json."
        )


def check_text(text: str) -> None:
    """Raise TextError unless the text can be tokenized."""
    if not text.strip():
        raise TextError("The text is empty. Give some text.")
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
