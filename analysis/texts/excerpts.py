"""Excerpts of texts: how long, from where, and which of them plans are made from.

An excerpt is cut by characters, at the borders of sentences or words near places spread evenly over its text, and only
then tokenized: a text of a million characters costs no more than its excerpts. The beginning of a long text says little
about the rest: the first twelve excerpts of a newspaper may come from a single article.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping
from itertools import cycle, islice, zip_longest
from typing import TYPE_CHECKING, NamedTuple

import regex

from analysis.errors import TextError
from analysis.texts.tokens import MIN_TOKENS, SENTENCE_END, beginning, check_text
from analysis.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPARE = 8  # tokens to ask of an excerpt beyond those used: a prompt cut from it may be some tokens shorter
SPLIT = (
    "With two files or more, every second file is planned on and the others are measured on; with one, plans are made "
    "from excerpts of its first half and measured on excerpts of its second."
)
"""`planning_and_measuring` in words."""

_NOT_SPACE = re.compile(r"\S")
# Where an excerpt may begin, the better first: after a sentence or a paragraph, after a line, after a word.
_BORDERS = (re.compile(rf"\n\s*\n|{SENTENCE_END.pattern}"), re.compile(r"\n"), re.compile(r"\s"))
_NEAR = 400  # characters within which each of these is looked for
_SEEN_AS_ONE = regex.compile(r"\X")  # a letter and its accents, or an emoji of several
_CLUSTER = 64  # characters, more than what a reader sees as one ever takes


class Excerpt(NamedTuple):
    """A part of a text, or all of it; without `document` it is a document of its own."""

    name: str  # such as "moby-dick 3"
    text: str
    document: str = ""  # the name of the text that it was cut from; that of the excerpt where it is not given


Texts = Iterable[Excerpt | tuple[str, str]] | Mapping[str, str]
"""Excerpts, (name, text) pairs, or texts by name."""


def excerpts_from(texts: Texts) -> tuple[Excerpt, ...]:
    """Make each text an excerpt, as it is: what has no document is its own."""
    return tuple(Excerpt(*text) for text in (texts.items() if isinstance(texts, Mapping) else texts))


def excerpts(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], *, n_tokens: int, at_most: int
) -> tuple[Excerpt, ...]:
    """Cut excerpts from several texts in turn, spread over each text and without overlap.

    Each has `n_tokens` tokens, special ones included, or a few less: cut from its text it may be tokenized differently.
    A text too short for its share leaves the rest to the others. The texts, and the places in each, come in an order
    whose first few are spread already, and asking for more only appends: a study that is stopped early is no study of
    beginnings, and it can be resumed.

    Args:
        texts: texts by name. Excerpts are numbered from 0: "moby-dick 0", "moby-dick 1", ...

    Raises:
        TextError: no text has enough tokens, no excerpt is asked for, or a text is empty or invalid Unicode.
    """
    if at_most < 1:
        raise TextError(f"At least one excerpt is needed, got {at_most}.")
    if n_tokens < MIN_TOKENS:
        raise TextError(
            f"Excerpts of {counted(n_tokens, 'token')} are too short; at least {MIN_TOKENS} are needed to rank them."
        )
    for name, text in texts.items():
        try:
            check_text(text)
        except TextError as error:
            raise TextError(f"{name}: {error}") from error
    names = list(texts)
    open_ = [names[i] for i in _spread_order(len(names))]
    wanted = dict.fromkeys(open_, 0)
    found: dict[str, dict[int, str]] = {name: {} for name in open_}
    while open_ and (missing := at_most - sum(map(len, found.values()))) > 0:
        for name in islice(cycle(open_), missing):
            wanted[name] += 1
        for name in open_:
            if wanted[name] > len(found[name]):
                found[name] = _cut(tokenizer, texts[name], n_tokens=n_tokens, at_most=wanted[name])
        open_ = [name for name in open_ if len(found[name]) == wanted[name]]
    named = [[Excerpt(f"{name} {i}", cut[at], name) for i, at in enumerate(cut)] for name, cut in found.items()]
    turns = tuple(excerpt for turn in zip_longest(*named) for excerpt in turn if excerpt is not None)
    if not turns:
        raise TextError(f"None of the texts has {n_tokens} tokens. Give longer ones, or ask for fewer tokens.")
    return turns


def planning_and_measuring(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], *, n_tokens: int, each: int
) -> tuple[tuple[Excerpt, ...], tuple[Excerpt, ...]]:
    """Cut excerpts to plan on and excerpts to measure on, at most `each` of either, by the rule in `SPLIT`.

    Excerpts of one file share subject and style: a plan measured on its own file would look better than it is. Files
    too short for one excerpt do not count.

    Raises:
        TextError: there are fewer than two excerpts, or as `excerpts`.
    """

    def cut(given: Mapping[str, str], at_most: int) -> tuple[Excerpt, ...]:
        return excerpts(tokenizer, given, n_tokens=n_tokens, at_most=at_most)

    long = [item for item in texts.items() if _cut(tokenizer, item[1], n_tokens=n_tokens, at_most=1)]
    if len(long) > 1:
        return cut(dict(long[1::2]), each), cut(dict(long[::2]), each)
    # In the order of the text, so that no place that is planned on is near to one that is measured on.
    found = sorted(cut(texts, 2 * each), key=lambda excerpt: texts[excerpt.document].index(excerpt.text))
    half = len(found) // 2
    if not half:
        raise TextError(f"There is one excerpt of {n_tokens} tokens, and a Pareto front needs two. Give a longer text.")
    return tuple(found[:half]), tuple(found[half:])


def _spread_order(n: int) -> list[int]:
    """0 to n - 1, each far from those before it: of 8, 0 4 2 6 1 5 3 7 (van der Corput's sequence)."""
    bits = max(1, (n - 1).bit_length())
    return [i for i in (int(f"{k:0{bits}b}"[::-1], 2) for k in range(1 << bits)) if i < n]


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, *, n_tokens: int, at_most: int) -> dict[int, str]:
    """Excerpts of a text by where they begin: spread over it, or one after the other if so more of them find room."""
    spread: dict[int, str] = {}
    fine = 4 << (at_most - 1).bit_length()  # places, for some will be within an excerpt that is there
    for i in _spread_order(fine):
        start = _first_word(text, _begins(text, i * len(text) // fine) if i else 0)
        before = max((begin for begin in spread if begin <= start), default=-1)
        if start == len(text) or (before >= 0 and before + len(spread[before]) > start):
            continue
        excerpt = _excerpt(tokenizer, text, start, n_tokens)
        if excerpt and not any(start <= begin < start + len(excerpt) for begin in spread):
            spread[start] = excerpt
            if len(spread) == at_most:
                return spread
    packed: dict[int, str] = {}
    start = _first_word(text, 0)
    while len(packed) < at_most and (excerpt := _excerpt(tokenizer, text, start, n_tokens)):
        packed[start] = excerpt
        start = _first_word(text, start + len(excerpt))
    return max(spread, packed, key=len)


def _excerpt(tokenizer: PreTrainedTokenizerBase, text: str, start: int, n_tokens: int) -> str:
    """The excerpt that begins there; empty if there is not enough text."""
    excerpt, enough = beginning(tokenizer, text, n_tokens, start=start) if start < len(text) else ("", False)
    return text[start : _whole(text, start + len(excerpt), after=start)] if enough else ""


def _first_word(text: str, start: int) -> int:
    """Where the white space from there on ends, and accents that follow it, which are of no letter after it."""
    found = _NOT_SPACE.search(text, start)
    first = found.start() if found else len(text)
    while first < len(text) and unicodedata.category(text[first]).startswith("M"):
        first += 1
    return first


def _begins(text: str, place: int) -> int:
    """Where an excerpt from about `place` on begins: after the best border that is near, or where there is none."""
    for border in _BORDERS:
        if near := border.search(text, place, place + _NEAR):
            return near.end()
    return _whole(text, place, after=0)


def _whole(text: str, place: int, *, after: int) -> int:
    """The last place up to `place`, but after `after`, that is not within what a reader sees as one character."""
    near = max(after, place - _CLUSTER)
    ends = (cluster.end() for cluster in _SEEN_AS_ONE.finditer(text, near, place + _CLUSTER))
    return max((end for end in ends if near < end <= place), default=place)
