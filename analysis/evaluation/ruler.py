"""RULER's tasks (arXiv 2404.06654), made here from a seed. Its own files are read by `ruler_files`.

Eleven of the thirteen tasks need no download; the two about documents are made from questions that are given. Templates
and numbers are RULER's (github.com/NVIDIA/RULER, `scripts/data/synthetic`), and so are the quirks that a model can see.
What differs: the words to hide (`wordlist`); the essay, which may be any text and begins at another sentence for each
example; and that keys, values and names never repeat within an example, so that a question has one answer. Knows no
model.
"""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count, islice, pairwise, repeat
from random import Random
from string import ascii_lowercase, ascii_uppercase
from typing import TYPE_CHECKING, NamedTuple

from analysis.demo.presets import bundled_texts
from analysis.errors import SettingsError
from analysis.evaluation.examples import Example, fill, largest, sentences
from analysis.evaluation.passkey import FILLER
from analysis.evaluation.wordlist import ADJECTIVES, NOUNS, VERBS
from analysis.texts.tokens import check_text
from l2kv.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DEPTHS = tuple(round(100 * step / 39) for step in range(40))  # per cent of the sentences; needles take different ones
_LONG = 4096  # tokens from which the word counts are RULER's; below they are those of its shorter variant
_HOPS = 4  # in a chain of assignments
_COMMON = 10  # words to find
_CODED = 6  # letters of a coded word
_SHOWN_TOKENS = 500  # of the solved example of variable tracking, at most half of all


class Prompt(NamedTuple):
    """Text of an example."""

    context: str
    question: str
    answer_prefix: str
    references: Sequence[str]


@dataclass(frozen=True, slots=True)
class Material:
    """Material that examples are made from."""

    n_tokens: int
    number: int = 0
    """Number of the example in its set."""
    words: tuple[str, ...] = ()
    """Words of the essay."""
    starts: tuple[int, ...] = ()
    """Indices of the words that begin a sentence."""
    shown_lines: int = 0
    """Lines of noise in the solved example of variable tracking."""
    questions: Questions | None = None


@dataclass(frozen=True, slots=True)
class Questions:
    """Questions about documents."""

    documents: tuple[str, ...]
    asked: tuple[Asked, ...]


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about documents, by their indices."""

    question: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    """Documents that the answer is in."""
    near: tuple[int, ...] = ()
    """Documents of the same article, the first to stand beside those."""


@dataclass(frozen=True, slots=True)
class RulerTask:
    """One of RULER's tasks."""

    title: str
    about: str
    """One line on the question."""
    max_new_tokens: int
    make: Callable[[Random, int, Material], Prompt]
    """Makes the example of a size."""
    least: int
    """Smallest size, in the units that `make` has."""
    question: re.Pattern[str]
    """Beginning of the question in a prompt, at the last match."""
    answer: re.Pattern[str] = field(default=re.compile(r" ?Answer:"))
    """Beginning of the answer's prefix after that."""
    scorer: str = "string_match_all"
    needs: str = ""
    """"essay" or "questions" where it is made from such."""


def ruler_examples(
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    n_tokens: int,
    n_samples: int,
    seed: int = 0,
    essay: str | None = None,
    questions: Questions | None = None,
) -> tuple[Example, ...]:
    """Make examples of a RULER task, each as long as fits.

    The same arguments give the same examples, and a larger number begins with the same ones.

    Args:
        task: one of `RULER`.
        n_tokens: most tokens of an example, those to generate included.
        essay: text of the haystacks; the bundled texts if None.
        questions: questions of qa_1 and qa_2, from `ruler_files.read_questions`.

    Raises:
        SettingsError: the task is unknown, or lacks its questions.
        TextError: `n_tokens` are too few for the task, or the essay is empty.
    """
    entry = RULER.find(task)
    if entry.needs == "questions" and questions is None:
        raise SettingsError(f"{task} needs a file of questions in SQuAD's or HotpotQA's JSON. Give its path.")
    material = Material(n_tokens, questions=questions and _shuffled(questions, seed))
    if entry.needs == "essay":
        material = _with_essay(material, "\n\n".join(bundled_texts().values()) if essay is None else essay)
    if task == "vt":
        material = _with_shown_lines(material, tokenizer)
    examples, size = [], 0
    for number in range(n_samples):
        make = partial(_example, task, seed, replace(material, number=number))
        example, size = fill(tokenizer, make, n_tokens=n_tokens, least=entry.least, guess=size)
        examples.append(example)
    return tuple(examples)


def _example(task: str, seed: int, material: Material, size: int) -> Example:
    """The example of a size: chance falls the same for all sizes, as far as they go."""
    entry = RULER[task]
    prompt = entry.make(Random(f"{task} {seed} {material.number}"), size, material)
    name = f"{task} {material.n_tokens} seed {seed} {material.number}"
    return example_of(name, task, prompt, {"n_tokens": material.n_tokens})


def example_of(name: str, task: str, prompt: Prompt, labels: Mapping[str, float]) -> Example:
    """Make a prompt an example of a task. A single needle's depth is a label: the share of the context before it."""
    entry = RULER[task]
    if task.startswith("niah") and len(prompt.references) == 1 and prompt.references[0] in prompt.context:
        labels = {**labels, "depth": prompt.context.index(prompt.references[0]) / len(prompt.context)}
    return Example(
        name,
        task,
        prompt.context,
        prompt.question,
        prompt.answer_prefix,
        tuple(prompt.references),
        entry.max_new_tokens,
        entry.scorer,
        labels=labels,
    )


def _shuffled(questions: Questions, seed: int) -> Questions:
    """The questions in an order in which the first few are of several articles."""
    return replace(questions, asked=tuple(Random(f"questions {seed}").sample(questions.asked, len(questions.asked))))


def _with_essay(material: Material, essay: str) -> Material:
    check_text(essay)
    by_sentence = [sentence.split(" ") for sentence in sentences(essay)]
    starts = [0]
    for words in by_sentence[:-1]:
        starts.append(starts[-1] + len(words))
    return replace(material, words=tuple(chain(*by_sentence)), starts=tuple(starts))


def _with_shown_lines(material: Material, tokenizer: PreTrainedTokenizerBase) -> Material:
    """The material with a solved example of variable tracking as long as it may be."""
    most = min(_SHOWN_TOKENS, material.n_tokens // 2)

    def fits(lines: int) -> bool:
        return len(tokenizer(_shown_chain(Random(0), lines), add_special_tokens=False)["input_ids"]) <= most

    return replace(material, shown_lines=largest(fits, least=_HOPS + 1))


def _niah(
    rng: Random,
    size: int,
    material: Material,
    *,
    haystack: str,
    key: str = "words",
    value: str = "numbers",
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
) -> Prompt:
    """Needles that give values of keys, and a question for the values of some. Sizes are words, lines or needles."""
    new_keys, new_values = _distinct(_DRAW[key], rng), _distinct(_DRAW[value], rng)
    hidden = [(name, list(islice(new_values, values))) for name in islice(new_keys, keys)]
    asked = rng.sample(hidden, queries)
    needles = [_needle(value, name, each) for name, held in hidden for each in held]
    rng.shuffle(needles)
    if haystack == "essay":
        begin, depths = rng.choice(material.starts), sorted(rng.sample(_DEPTHS, len(needles)))
        text = sentences(" ".join(material.words[i % len(material.words)] for i in range(begin, begin + size)))
        context = " ".join(_inserted(text, needles, [len(text) * depth // 100 for depth in depths]))
    else:
        endless = repeat(FILLER) if haystack == "noise" else map(partial(_needle, value), new_keys, new_values)
        lines = list(islice(endless, size))
        context = "\n".join(_inserted(lines, needles, sorted(rng.sample(range(size), len(needles)))))
    names = [name for name, _ in asked]
    query = ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]
    one = queries * values == 1
    what, some, are, all_are = (value[:-1], "A", "is", "is") if one else (value, "Some", "are", "are all")
    return Prompt(
        f"{some} special magic {what} {are} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {what} afterwards.\n{context}\n",
        f"What {all_are} the special magic {what} for {query} mentioned in the provided text?",
        f" The special magic {what} for {query} mentioned in the provided text {are}",
        [each for _, held in asked for each in held],
    )


def _needle(value: str, name: str, held: str) -> str:
    return f"One of the special magic {value} for {name} is: {held}."


def _tracking(rng: Random, size: int, material: Material) -> Prompt:
    """Variables that are assigned one value, each by the one before, in lines of noise. Sizes are lines."""
    shown = _shown_chain(rng, material.shown_lines)
    context, question, prefix, names = _chain(rng, size, letters=5)
    return Prompt(f"{shown}\n\n{context}", question, prefix, names)


def _shown_chain(rng: Random, lines: int) -> str:
    context, question, prefix, names = _chain(rng, lines, letters=3)
    return f"{context}{question}{prefix} {' '.join(names)}"


def _chain(rng: Random, lines: int, *, letters: int) -> Prompt:
    names = list(islice(_distinct(lambda rng: "".join(rng.choices(ascii_uppercase, k=letters)), rng), _HOPS + 1))
    value = str(rng.randrange(10_000, 99_999))
    chained = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(names))]
    context = "\n".join(_inserted([FILLER] * lines, chained, sorted(rng.sample(range(lines), len(chained)))))
    return Prompt(
        f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n",
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        f" Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables are "
        f"assigned the value {value}, they are: ",
        names,
    )


def _common_words(rng: Random, size: int, material: Material) -> Prompt:
    """A numbered list of words of which ten are more common, after a solved one. Sizes are different words."""
    (shown, few, once), (often, seldom) = ((40, 10, 3), (30, 3)) if material.n_tokens >= _LONG else ((20, 3, 1), (6, 1))
    context, question, prefix, words = _word_list(rng, shown, few, once)
    solved = f"{context}{question}{prefix} {_numbered(words)}\n"
    context, question, prefix, words = _word_list(rng, size, often, seldom)
    return Prompt(solved + context, question, prefix, words)


def _word_list(rng: Random, n: int, often: int, seldom: int) -> Prompt:
    words = rng.sample([*_WORDS, *islice(_distinct(_compound, rng), max(0, n - len(_WORDS)))], n)
    common, uncommon = words[:_COMMON], words[_COMMON:]
    listed = common * often + uncommon * seldom
    rng.shuffle(listed)
    return Prompt(
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{_numbered(listed)}\n",
        "Question: What are the 10 most common words in the above list?",
        " Answer: The top 10 words that appear most often in the list are:",
        common,
    )


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(words, 1))


def _frequent_words(rng: Random, size: int, material: Material) -> Prompt:
    """Coded words whose counts fall as 1 / rank², the first of them dots. Sizes are words, the rarest not counted."""
    n_words = max(5, (material.n_tokens - 50) // 50)
    words = ["...", *islice(_distinct(lambda rng: "".join(rng.choices(ascii_lowercase, k=_CODED)), rng), n_words - 1)]
    share = 6 / math.pi**2  # of the first: 1 / zeta(2)
    coded = [word for rank, word in enumerate(words, 1) for _ in range(int(size * share / rank**2))]
    rng.shuffle(coded)
    return Prompt(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {' '.join(coded)}\n",
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
        words[1:4],
    )


def _questions(rng: Random, size: int, material: Material) -> Prompt:
    """A question about one of many documents. Sizes are documents beyond those that are needed."""
    assert material.questions is not None
    documents, asked = material.questions.documents, material.questions.asked
    one = asked[material.number % len(asked)]
    others = [i for i in range(len(documents)) if i not in {*one.needed, *one.near}]
    beside = [*rng.sample(one.near, len(one.near)), *rng.sample(others, len(others))]
    beside = [*beside, *islice(chain.from_iterable(repeat(range(len(documents)))), max(0, size - len(beside)))][:size]
    held = [*one.needed, *beside]
    rng.shuffle(held)
    task = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    listed = "\n\n".join(f"Document {place}:\n{documents[i]}" for place, i in enumerate(held, 1))
    return Prompt(
        f"{task}\n\nThe following are given documents.\n\n{listed}\n\n",
        f"{task}\n\nQuestion: {one.question}",
        " Answer:",
        one.answers,
    )


def _inserted(lines: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> Iterator[str]:
    """The lines with a needle before each of these places, which rise."""
    before = 0
    for needle, place in zip(needles, places, strict=True):
        yield from lines[before:place]
        yield needle
        before = place
    yield from lines[before:]


def _distinct(draw: Callable[[Random], str], rng: Random) -> Iterator[str]:
    """Draws without end, each once."""
    seen: set[str] = set()
    for drawn in (draw(rng) for _ in count()):
        if drawn not in seen:
            seen.add(drawn)
            yield drawn


def _compound(rng: Random) -> str:
    return rng.choice(NOUNS) + rng.choice(NOUNS)


_WORDS = sorted(NOUNS + ADJECTIVES + VERBS)
_DRAW: dict[str, Callable[[Random], str]] = {
    "words": lambda rng: f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}",
    "numbers": lambda rng: str(rng.randrange(1_000_000, 10_000_000)),
    "uuids": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
}


def _needles(title: str, about: str, **settings: str | int) -> RulerTask:
    needs = "essay" if settings["haystack"] == "essay" else ""
    make = partial(_niah, **settings)  # type: ignore[arg-type]
    return RulerTask(title, about, 128, make, 1, _MAGIC, re.compile(r" ?The special magic"), needs=needs)


_MAGIC = re.compile(r"What (?:is|are all) the special magic")
_DOCUMENTS = re.compile(r"Answer the question based on the given documents\.")

RULER: Registry[RulerTask] = Registry(
    "RULER task",
    SettingsError,
    {
        "niah_single_1": _needles("Single needle, noise", "The number of a key, in repeated lines.", haystack="noise"),
        "niah_single_2": _needles("Single needle, essay", "The number of a key, in an essay.", haystack="essay"),
        "niah_single_3": _needles(
            "Single UUID, essay", "The UUID of a key, in an essay.", haystack="essay", value="uuids"
        ),
        "niah_multikey_1": _needles("Four keys", "The number of one key of four.", haystack="essay", keys=4),
        "niah_multikey_2": _needles("Keys only", "The number of one key among nothing but keys.", haystack="needles"),
        "niah_multikey_3": _needles(
            "UUIDs only", "The UUID of one UUID among nothing but such.", haystack="needles", key="uuids", value="uuids"
        ),
        "niah_multivalue": _needles("Four values", "All four numbers of a key.", haystack="essay", values=4),
        "niah_multiquery": _needles("Four queries", "The numbers of four keys.", haystack="essay", keys=4, queries=4),
        "vt": RulerTask(
            "Variable tracking",
            "The variables that a value was handed on to.",
            30,
            _tracking,
            _HOPS + 1,
            re.compile(r"Question: Find all variables that are assigned the value"),
        ),
        "cwe": RulerTask(
            "Common words",
            "The ten most common words of a list.",
            120,
            _common_words,
            _COMMON + 1,
            re.compile(r"Question: What are the 10 most common words in the above list\?"),
        ),
        "fwe": RulerTask(
            "Frequent words",
            "The three most frequent coded words.",
            50,
            _frequent_words,
            60,  # with fewer the third and the fourth can be as frequent
            re.compile(r"Question: Do not provide any explanation\."),
        ),
        "qa_1": RulerTask(
            "Questions, one hop",
            "A question about one of many documents.",
            32,
            _questions,
            0,
            _DOCUMENTS,
            scorer="string_match_part",
            needs="questions",
        ),
        "qa_2": RulerTask(
            "Questions, two hops",
            "A question whose answer takes two of many documents.",
            32,
            _questions,
            0,
            _DOCUMENTS,
            scorer="string_match_part",
            needs="questions",
        ),
    },
)
"""RULER's tasks by name."""

OFFLINE = tuple(name for name, task in RULER.items() if task.needs != "questions")
"""The eleven that need no file."""
