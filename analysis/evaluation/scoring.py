"""Scores of generated answers as the benchmarks define them, 0 to 100 each; their mean is the published score.

Knows texts only: no tokenizer and no model. Where a benchmark's own program differs from its published rule, the
docstring says so.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher

from analysis.errors import RecordError, SettingsError
from analysis.evaluation.examples import Example
from l2kv.registry import Registry

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PARAGRAPH = re.compile(r"Paragraph (\d+)")
_CHOICE = re.compile(r"The correct answer is \(([A-D])\)")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(example: Example, text: str) -> float:
    """Score a generated answer, 0 to 100. Raises SettingsError if the scorer is unknown."""
    return SCORERS.find(example.scorer).score(text, example)


def decided(example: Example, text: str) -> bool:
    """Tell whether the score of an unfinished answer can no longer change, however it continues."""
    return SCORERS.find(example.scorer).decided(text, example)


def check_scorable(example: Example, where: str) -> Example:
    """Return an example from a file if its scorer can handle its answers.

    Raises:
        RecordError: it cannot; the message says where and why.
        SettingsError: the scorer is unknown.
    """
    SCORERS.find(example.scorer)
    answers, scorer = example.references, example.scorer
    wrong = {
        "it has no right answer": not answers,
        "a right answer is empty": scorer.startswith("string_match") and not all(map(str.strip, answers)),
        "it has no classes to choose from": scorer == "classification" and not example.all_classes,
        'a right answer names no paragraph, as "Paragraph 3" does': (
            scorer == "retrieval" and not all(map(_PARAGRAPH.search, answers))
        ),
    }
    for reason, applies in wrong.items():
        if applies:
            raise RecordError(f"{where}: {reason}, got {list(answers)}. The task {example.task} cannot be scored.")
    return example


def string_match_all(text: str, references: tuple[str, ...]) -> float:
    """Share of the references that a text holds, ignoring case: RULER's score, except for its questions."""
    return sum(_holds(text, reference) for reference in references) / len(references)


def string_match_part(text: str, references: tuple[str, ...]) -> float:
    """1 if a text holds any of the references, ignoring case, else 0: RULER's score for its questions.

    lm-evaluation-harness has a score of this name that is the share of the references found, as above: a question with
    three spellings of its answer, of which one is given, has 1/3 there.
    """
    return float(any(_holds(text, reference) for reference in references))


def token_f1(text: str, reference: str) -> float:
    """F1 of the words that two texts share, normalised as in SQuAD: lower case, no punctuation, no articles."""
    words, wanted = _squad_words(text), _squad_words(reference)
    return _f1(sum((Counter(words) & Counter(wanted)).values()), len(words), len(wanted))


def rouge_l(text: str, reference: str) -> float:
    """F1 of the words that two texts share in order: ROUGE-L as LongBench has it, from the package `rouge`.

    Shared are the words in a longest common subsequence of a sentence of the one and a sentence of the other. Sentences
    end at every ".", case counts, and a word counts once however often it stands. The package `rouge-score` counts
    every word, in one subsequence of the whole texts, without case and punctuation; of single sentences of different
    lower-case words both say the same.
    """
    sentences, wanted = _rouge_sentences(text), _rouge_sentences(reference)
    shared = {word for one in wanted for other in sentences for word in _common_subsequence(one, other)}
    return _f1(len(shared), len(set().union(*sentences)), len(set().union(*wanted)))


def classification(text: str, reference: str, all_classes: tuple[str, ...]) -> float:
    """1 / the number of classes that a text names if the right one is among them, else 0.

    A class that is part of the right one's name ("number" of "other number") does not count. Of two such classes in a
    row LongBench's own program overlooks the second.
    """
    named = [name for name in all_classes if name in text and (name == reference or name not in reference)]
    return 1 / len(named) if reference in named else 0.0


def retrieval(text: str, reference: str) -> float:
    """Share of the numbers in a text that are the reference's paragraph: 0.5 for "Paragraph 3, or 7" of paragraph 3."""
    paragraph = _PARAGRAPH.search(reference)
    assert paragraph, "check_scorable lets none through that names no paragraph"
    return count(text, paragraph[1])


def count(text: str, reference: str) -> float:
    """Share of the numbers in a text that are the reference."""
    numbers = re.findall(r"\d+", text)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def code_similarity(text: str, reference: str) -> float:
    """Similarity of a reference to the first line of a text that is no comment and no fence, to whole per cents."""
    lines = text.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


def chosen_letter(text: str) -> str | None:
    """Letter that a text chooses by "The correct answer is (B)", or without the parentheses: LongBench v2's rule."""
    text = text.replace("*", "")
    found = _CHOICE.search(text) or re.search(r"The correct answer is ([A-D])", text)
    return found[1] if found else None


@dataclass(frozen=True, slots=True)
class Scorer:
    """A way to score answers, and when a score is final."""

    about: str
    """One line on the meaning of 100."""
    score: Callable[[str, Example], float]
    """Score of a text, 0 to 100."""
    decided: Callable[[str, Example], bool] = lambda text, example: False
    """Tells whether the score of a text can no longer change, whatever follows it."""


def _best(single: Callable[[str, str], float], about: str, *, first_line: bool = False) -> Scorer:
    """Scorer by the reference that a text is nearest to."""

    def best(text: str, example: Example) -> float:
        text = _first_line(text) if first_line else text
        return 100 * max(single(text, reference) for reference in example.references)

    return Scorer(about, best, _line_ended) if first_line else Scorer(about, best)


def _classified(text: str, example: Example) -> float:
    line = _first_line(text)
    return 100 * max(classification(line, reference, example.all_classes) for reference in example.references)


def _chosen(text: str, example: Example) -> float:
    return 100.0 * (chosen_letter(example.answer_prefix + text) in example.references)


def _first_line(text: str) -> str:
    return text.lstrip("\n").split("\n")[0]


def _line_ended(text: str, example: Example) -> bool:
    return "\n" in text.lstrip("\n")


def _holds(text: str, reference: str) -> bool:
    return reference.lower() in text.lower()


def _squad_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _rouge_sentences(text: str) -> list[list[str]]:
    # A sentence of white space alone, such as that after the last stop, is a word to the package: an empty one.
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _common_subsequence(one: list[str], other: list[str]) -> list[str]:
    """A longest common subsequence of two lists of words. Of several, the one that the package `rouge` finds."""
    longest = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, word in enumerate(one, 1):
        for j, with_ in enumerate(other, 1):
            longest[i][j] = longest[i - 1][j - 1] + 1 if word == with_ else max(longest[i - 1][j], longest[i][j - 1])
    found, i, j = [], len(one), len(other)
    while i and j:
        if one[i - 1] == other[j - 1]:
            found.append(one[i - 1])
            i, j = i - 1, j - 1
        elif longest[i - 1][j] > longest[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def _f1(shared: int, of_text: int, of_reference: int) -> float:
    return 2 * shared / (of_text + of_reference) if shared else 0.0


SCORERS: Registry[Scorer] = Registry(
    "scorer",
    SettingsError,
    {
        "string_match_all": Scorer(
            "Every reference is in the answer.",
            lambda text, example: 100 * string_match_all(text, example.references),
            lambda text, example: string_match_all(text, example.references) == 1,
        ),
        "string_match_part": Scorer(
            "A reference is in the answer.",
            lambda text, example: 100 * string_match_part(text, example.references),
            lambda text, example: string_match_part(text, example.references) == 1,
        ),
        "token_f1": _best(token_f1, "The answer has the words of a reference."),
        "token_f1_line": _best(token_f1, "The answer's first line has the words of a reference.", first_line=True),
        "rouge_l": _best(rouge_l, "The answer has the words of a reference, in order."),
        "rouge_l_line": _best(
            rouge_l, "The answer's first line has the words of a reference, in order.", first_line=True
        ),
        "classification": Scorer("The answer's first line names the right class alone.", _classified, _line_ended),
        "retrieval": _best(retrieval, "The answer has the number of the right paragraph alone."),
        "count": _best(count, "The answer has the right number alone."),
        "code_similarity": _best(code_similarity, "The answer's first line of code is the reference."),
        "choice": Scorer(
            "The right letter is chosen.",
            _chosen,
            lambda text, example: bool(_CHOICE.search((example.answer_prefix + text).replace("*", ""))),
        ),
    },
)
"""Scorers by the name that an example has for its own."""
