"""Excerpts: as long as asked for, spread, without overlap, at word borders; those to plan on far from the others."""

import time
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from analysis.errors import TextError
from analysis.texts import excerpts as module
from analysis.texts.excerpts import Excerpt, excerpts, excerpts_from, planning_and_measuring
from analysis.texts.tokens import beginning, tokenize
from tests.support.paths import BUNDLED, STORIES

SENTENCES = [
    "The old man looked at the sea.",
    "It was grey!",
    "He asked Mr. Hale, who said: “It will not rain.”",
]


def prose(n: int, *, of: str = "") -> str:
    """n sentences, of each of which one can tell where it stood."""
    return " ".join(f"{of}{i} {SENTENCES[i % 3]}" for i in range(n))


@pytest.fixture(scope="module", params=["books-5m", "stories260K", "without offsets"])
def tokenizer(request):
    if request.param == "without offsets":
        return ByT5Tokenizer()
    folder = BUNDLED if request.param == "books-5m" else STORIES
    if not folder.is_dir():
        pytest.skip(f"{request.param} is not on this machine")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def books():
    return AutoTokenizer.from_pretrained(BUNDLED)


def places(text: str, found) -> list[tuple[int, int]]:
    """Where the excerpts stand in the text, in its order."""
    starts = [text.index(excerpt.text) for excerpt in found]
    return sorted((start, start + len(excerpt.text)) for start, excerpt in zip(starts, found, strict=True))


@pytest.mark.parametrize("at_most", [1, 2, 3, 7, 12, 24])
def test_excerpts_are_spread_over_the_whole_text_and_lie_apart(tokenizer, at_most):
    text = prose(2000)
    found = excerpts(tokenizer, {"x": text}, n_tokens=50, at_most=at_most)
    assert [e.name for e in found] == [f"x {i}" for i in range(at_most)] and {e.document for e in found} == {"x"}
    stand = places(text, found)
    assert all(end <= start for (_, end), (start, _) in pairwise(stand))
    # No gap is more than twice an even one.
    starts = np.array([start for start, _ in stand] + [len(text)]) / len(text)
    assert np.diff(starts).max() < 2 / at_most + 0.01


@pytest.mark.parametrize("n_tokens", [4, 50, 333])
def test_an_excerpt_has_the_tokens_asked_for_or_a_few_less_and_begins_a_sentence(tokenizer, n_tokens):
    text = prose(1000)
    for excerpt in excerpts(tokenizer, {"x": text}, n_tokens=n_tokens, at_most=9):
        assert n_tokens - 3 <= len(tokenize(tokenizer, excerpt.text)) <= n_tokens
        assert excerpt.text[0].isdigit()  # as all sentences do


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("It goes\non and\non, and ends. " * 400, "It goes"),  # lines that end within a sentence
        ("No sentence ends here\n\nand no word " * 300, "and no word"),
        ("a line\nof verse\n" * 500, ("a line", "of verse")),
        ("word word " * 600, "word"),
    ],
)
def test_an_excerpt_begins_at_the_best_border_that_is_near(books, text, first):
    found = excerpts(books, {"x": text}, n_tokens=20, at_most=8)
    assert len(found) == 8 and all(excerpt.text.startswith(first) for excerpt in found[1:])


def test_asking_for_more_adds_to_those_there_were(books):
    texts = {name: prose(800, of=name) for name in "abcde"}
    many = excerpts(books, texts, n_tokens=40, at_most=40)
    for at_most in (1, 2, 3, 5, 8, 20, 33):
        assert excerpts(books, texts, n_tokens=40, at_most=at_most) == many[:at_most]


def test_texts_take_turns_and_a_short_one_leaves_its_share_to_the_others(books):
    texts = {"a": prose(300), "no": "No.", "b": prose(300), "c": prose(4)}
    found = excerpts(books, texts, n_tokens=30, at_most=11)
    by_text = {name: sum(e.document == name for e in found) for name in texts}
    assert sum(by_text.values()) == 11 and by_text["no"] == 0 and by_text["c"] <= 3
    assert abs(by_text["a"] - by_text["b"]) <= 1
    assert {e.document for e in found[:3]} == {"a", "b", "c"}


def test_of_more_texts_than_are_asked_for_every_so_many_are_taken(books):
    texts = {f"{i:02}": prose(12) for i in range(64)}
    taken = sorted(int(e.document) for e in excerpts(books, texts, n_tokens=30, at_most=8))
    assert taken == list(range(0, 64, 8))


@pytest.mark.parametrize("at_most", [5, 50])
def test_where_there_is_no_room_to_spread_they_follow_each_other(books, at_most):
    text = prose(24)
    room = len(tokenize(books, text)) // 50
    found = excerpts(books, {"x": text}, n_tokens=50, at_most=at_most)
    assert len(found) == min(room, at_most) and room >= 5
    stand = places(text, found)
    assert all(end <= start for (_, end), (start, _) in pairwise(stand))


CLUSTERS = {
    "accents of two characters": "e\u0301a\u0300\u0316" * 400,
    "flags": "🇩🇪🇫🇷" * 300,
    "families": "👩\u200d👩\u200d👧" * 200,
    "Hangul by its letters": unicodedata.normalize("NFD", "한국어" * 300),
    "skin": "👍🏽" * 300,
    "no spaces": "日本語のテキスト" * 200,
    "one letter": "a" * 3000,
    "mostly white": "  \n" * 500 + "word " * 400,
    "many accents": ("Z" + "\u0351\u036b\u0343" * 6) * 80,
}


@pytest.mark.parametrize("text", CLUSTERS.values(), ids=CLUSTERS)
def test_any_text_is_cut_without_overlap_and_never_within_what_one_sees_as_a_character(tokenizer, text):
    found = excerpts(tokenizer, {"x": text}, n_tokens=60, at_most=6)
    assert found and all(0 < len(tokenize(tokenizer, e.text)) <= 60 for e in found)
    assert sum(len(e.text) for e in found) <= len(text)
    for excerpt in found:
        assert unicodedata.category(excerpt.text[0])[0] not in "MC" and excerpt.text[0] not in "\u1175\u11ab\u200d🏽"
        assert excerpt.text[-1] != "\u200d"


def test_of_a_big_text_no_more_is_tokenised_than_the_excerpts_take(books, monkeypatch):
    """A million characters and more, of which 24 excerpts of 512 tokens are 5 %."""
    text, seen = prose(40_000), []
    monkeypatch.setattr(module, "beginning", lambda *args, **kw: seen.append(1) or beginning(*args, **kw))
    assert len(text) > 1.2e6
    started = time.perf_counter()
    assert len(excerpts(books, {"x": text}, n_tokens=512, at_most=24)) == 24
    assert len(seen) == 24 and time.perf_counter() - started < 5


def test_texts_that_cannot_be_cut_are_refused_with_the_reason(books):
    with pytest.raises(TextError, match="None of the texts has 50 tokens"):
        excerpts(books, {"short": "No."}, n_tokens=50, at_most=5)
    with pytest.raises(TextError, match="at least 4"):
        excerpts(books, {"a": prose(9)}, n_tokens=1, at_most=5)
    with pytest.raises(TextError, match="At least one excerpt"):
        excerpts(books, {"a": prose(9)}, n_tokens=50, at_most=-1)
    with pytest.raises(TextError, match="blank: The text is empty"):
        excerpts(books, {"a": prose(9), "blank": " "}, n_tokens=50, at_most=5)


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 10, 40])
@pytest.mark.parametrize("text", [prose(6), *CLUSTERS.values()], ids=["prose", *CLUSTERS])
def test_a_beginning_is_the_longest_that_has_no_more_tokens(tokenizer, text, n_tokens):
    found, enough = beginning(tokenizer, text, n_tokens)
    assert enough and text.startswith(found)
    if found.strip():
        assert len(tokenize(tokenizer, found)) <= n_tokens
    assert beginning(tokenizer, text[:5], 40)[0] == text[:5]


# -------------------------------------------------------------------------------------------------- planning, measuring


def files(*lengths: int) -> dict[str, str]:
    """Files by name; of each sentence one can tell where it stood."""
    return {name: prose(n, of=name) for name, n in zip("abcd", lengths, strict=False)}


def test_of_several_files_every_second_one_is_planned_on(books):
    def split(*lengths, each=4):
        return planning_and_measuring(books, files(*lengths), n_tokens=20, each=each)

    two = files(90, 90)
    assert split(90, 90) == tuple(excerpts(books, {name: two[name]}, n_tokens=20, at_most=4) for name in ("b", "a"))
    planning, measuring = split(90, 90, 90, 90, each=6)
    assert [e.document for e in planning] == list("bdbdbd") and [e.document for e in measuring] == list("acacac")
    assert {e.document for e in split(90, 1, 90)[0]} == {"c"}  # b is too short for an excerpt, and does not count


@pytest.mark.parametrize("each", [1, 2, 3, 8, 99])
def test_of_one_file_the_first_half_is_planned_on_and_the_other_measured_on(books, each):
    text = files(300)
    planning, measuring = planning_and_measuring(books, text, n_tokens=20, each=each)
    plan_places, test_places = places(text["a"], planning), places(text["a"], measuring)
    assert plan_places[-1][1] <= test_places[0][0]
    assert len(measuring) - len(planning) in (0, 1) and 1 <= len(planning) <= each
    if each < 99:  # both are spread over their half
        assert len(planning) == each and test_places[0][0] >= len(text["a"]) * 0.45


def test_a_file_of_one_excerpt_cannot_be_split(books):
    with pytest.raises(TextError, match="a Pareto front needs two"):
        planning_and_measuring(books, {"a": prose(1)}, n_tokens=8, each=3)
    with pytest.raises(TextError, match="None of the texts has 200 tokens"):
        planning_and_measuring(books, files(1, 1), n_tokens=200, each=3)


@pytest.mark.parametrize("mark", ["\u0301", " \u0301", "\n\n\u0301", "\u00a0\u0301\u0308"])
def test_no_excerpt_begins_with_an_accent_that_is_of_no_letter(books, mark):
    text = "The accent stands alone here. " + f"A line ends.{mark} is an acute, and the text goes on after it. " * 120
    found = excerpts(books, {"accents": text}, n_tokens=24, at_most=20)
    assert len(found) > 5 and not any(unicodedata.combining(excerpt.text[0]) for excerpt in found)


def test_texts_are_given_as_excerpts_pairs_or_by_name():
    of_book = Excerpt("a 0", "One.", "a")
    assert excerpts_from([of_book, ("b", "Two.")]) == (of_book, Excerpt("b", "Two."))
    assert excerpts_from({"b": "Two."}) == excerpts_from(iter([("b", "Two.")])) == (Excerpt("b", "Two."),)
    assert excerpts_from(()) == ()
