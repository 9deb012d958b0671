"""Scores of answers, against cases worked by hand and values that other programs gave for the same texts."""

import random

import pytest

from analysis.errors import RecordError, SettingsError
from analysis.evaluation.examples import Example
from analysis.evaluation.scoring import (
    SCORERS,
    check_scorable,
    chosen_letter,
    classification,
    code_similarity,
    count,
    decided,
    retrieval,
    rouge_l,
    score,
    string_match_all,
    string_match_part,
    token_f1,
)


def asking(scorer, *references, all_classes=(), answer_prefix=""):
    return Example("0", "task", "context", "question", answer_prefix, references, 8, scorer, all_classes)


@pytest.mark.parametrize(
    ("text", "references", "share"),
    [
        ("The numbers are 123, 456.", ("123", "456"), 1),
        ("123", ("123", "456"), 1 / 2),
        ("It is RIVER.", ("river",), 1),
        ("a riverbank", ("river",), 1),  # a substring is enough, as in RULER
        ("12", ("123",), 0),
        ("", ("123",), 0),
        ("1 2 3 4", ("1", "2", "3", "9"), 3 / 4),
    ],
)
def test_all_references_are_wanted(text, references, share):
    assert string_match_all(text, references) == share
    assert score(asking("string_match_all", *references), text) == 100 * share


def test_any_reference_will_do_where_lm_eval_takes_the_share():
    references = ("Denver Broncos", "The Broncos", "Denver")
    assert string_match_part("It was Denver.", references) == 1
    assert string_match_all("It was Denver.", references) == 1 / 3  # what lm-eval calls string_match_part
    assert score(asking("string_match_part", *references), "Carolina") == 0


@pytest.mark.parametrize(
    ("text", "reference", "f1"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1),
        ("in Paris, France", "Paris", 1 / 2),  # 1 shared of 3 and 1
        ("Paris Paris", "Paris", 2 / 3),  # 1 shared of 2 and 1
        ("a an the", "the", 0),  # nothing is left
        ("it's", "its", 1),  # punctuation goes without a space
        ("London", "Paris", 0),
        ("", "Paris", 0),
    ],
)
def test_token_f1_by_hand(text, reference, f1):
    assert token_f1(text, reference) == pytest.approx(f1)


def test_the_best_reference_counts():
    example = asking("token_f1", "Paris", "in Paris")
    assert score(example, "in Paris") == 100
    assert score(asking("token_f1", "Paris", "London"), "in Paris") == pytest.approx(100 * 2 / 3)


# What the packages gave: rouge 1.0.1 (rouge-l, f) and rouge-score 0.1.2 (rougeL, fmeasure).
ROUGE = [
    ("police kill the gunman", "police killed the gunman", 0.749999995, 0.75),
    ("the gunman kill police", "police killed the gunman", 0.499999995, 0.5),
    ("The cat sat. It ran.", "A cat sat on the mat. It ran off.", 0.5714285668367348, 0.5714285714285714),
    ("w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 0.6153846106508877, 0.5333333333333333),
    ("a b. ", "a b", 0.7999999952000001, 1.0),
    ("a a a b", "a b", 0.999999995, 0.6666666666666666),
    ("The END", "the end", 0.0, 1.0),
    ("x", "y", 0.0, 0.0),
]


@pytest.mark.parametrize(("text", "reference", "longbench", "rouge_score"), ROUGE)
def test_rouge_l_is_the_one_that_longbench_takes(text, reference, longbench, rouge_score):
    assert rouge_l(text, reference) == pytest.approx(longbench, abs=1e-8)


def test_rouge_l_of_distinct_lower_case_words_is_that_of_every_program():
    agreeing = [row for row in ROUGE if "." not in row[0] and row[0].islower() and len(set(row[0].split())) > 3]
    assert len(agreeing) == 2
    for text, reference, _, rouge_score in agreeing:
        assert rouge_l(text, reference) == pytest.approx(rouge_score)


def test_rouge_l_is_as_the_packages_say_where_they_are_installed():
    rouge = pytest.importorskip("rouge")
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    rng, words = random.Random(0), [f"w{i}" for i in range(30)]
    for _ in range(200):
        text, reference = (" ".join(rng.choices([*words, "w1.", "."], k=rng.randint(1, 25))) for _ in range(2))
        if text.strip(" .") and reference.strip(" ."):
            expected = rouge.Rouge().get_scores([text], [reference], avg=True)["rouge-l"]["f"]
            assert rouge_l(text, reference) == pytest.approx(expected, abs=1e-7)
        text, reference = (" ".join(rng.sample(words, rng.randint(1, 25))) for _ in range(2))
        assert rouge_l(text, reference) == pytest.approx(scorer.score(reference, text)["rougeL"].fmeasure)


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("Other number", "Other number", 1),  # "number" is part of it, and does not count
        ("number", "number", 1),
        ("Food or number", "number", 1 / 2),
        ("Other number", "number", 1 / 2),
        ("Food", "number", 0),
        ("", "number", 0),
    ],
)
def test_a_class_is_shared_among_those_named(text, reference, right):
    classes = ("Food", "number", "Other number")
    assert classification(text, reference, classes) == right
    example = asking("classification", reference, all_classes=classes)
    assert score(example, f"\n{text}\nFood") == 100 * right  # the first line counts


def test_numbers_are_counted_among_all_numbers():
    assert retrieval("Paragraph 3", "Paragraph 3") == 1
    assert retrieval("Paragraph 3, or 7", "Paragraph 3") == 1 / 2
    assert retrieval("13", "Paragraph 3") == 0
    assert retrieval("none", "Paragraph 3") == 0
    with pytest.raises(RecordError, match="line 1: a right answer names no paragraph"):
        check_scorable(asking("retrieval", "3"), "line 1")
    assert count("There are 7. Yes, 7 of 9.", "7") == 2 / 3
    assert count("", "7") == 0


def test_code_is_compared_by_its_first_line():
    assert code_similarity("\n# so\nx = 1\ny = 2", "x = 1") == 1
    assert code_similarity("abcd", "bcde") == 0.75  # 2 * 3 of 8 characters
    assert code_similarity("# nothing", "x") == 0


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The correct answer is (B).", "B"),
        ("**The correct answer is (C)**", "C"),
        ("The correct answer is D", "D"),
        ("The correct answer is A ... The correct answer is (B)", "B"),  # the parentheses come first
        ("(B)", None),
        ("The correct answer is (E)", None),
    ],
)
def test_a_letter_is_chosen_in_so_many_words(text, letter):
    assert chosen_letter(text) == letter
    assert score(asking("choice", "B"), text) == (100 if letter == "B" else 0)


def test_a_choice_may_begin_in_the_prefix():
    example = asking("choice", "B", answer_prefix="The correct answer is (")
    assert score(example, "B) because") == 100
    assert not decided(example, "B") and decided(example, "B)")


def test_the_first_line_alone_counts_where_longbench_takes_it():
    example = asking("token_f1_line", "Paris")
    assert score(example, "\n\nParis\nPassage: London") == 100
    assert score(asking("token_f1", "Paris"), "Paris\nPassage: London") == pytest.approx(100 * 2 / 4)
    assert score(asking("rouge_l_line", "w1 w2"), "w1 w2\nw3") == 100


@pytest.mark.parametrize("scorer", SCORERS)
def test_what_is_decided_stays_as_it_is_however_the_answer_goes_on(scorer):
    classes = ("12", "B")
    example = asking(scorer, {"retrieval": "Paragraph 12", "choice": "B"}.get(scorer, "12"), all_classes=classes)
    pieces = ["", " 12", "B", "\n", " The correct answer is", " (B)", " (A)", "."]
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=4))
        if decided(example, text):
            assert {score(example, text + more) for more in pieces} == {score(example, text)}
        assert 0 <= score(example, text) <= 100


def test_answers_are_decided_as_soon_as_they_can_be():
    assert decided(asking("string_match_all", "1", "2"), "2 1") and not decided(
        asking("string_match_all", "1", "2"), "1"
    )
    assert decided(asking("string_match_part", "1", "2"), "2")
    assert decided(asking("token_f1_line", "x"), "\nx\n") and not decided(asking("token_f1_line", "x"), "\nx")
    assert not decided(asking("token_f1", "x"), "x\n\n")


def test_a_scorer_that_there_is_not_is_refused_with_the_nearest():
    with pytest.raises(SettingsError, match=r"Did you mean 'token_f1'\?"):
        score(asking("token_f2", "x"), "x")
    for entry in SCORERS.values():
        assert entry.about.endswith(".")
