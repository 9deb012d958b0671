"""Needles in haystacks: their place, and the length of the example."""

import pytest
from transformers import AutoTokenizer

from analysis.errors import SettingsError, TextError
from analysis.evaluation.needle import Needle, needle_examples
from analysis.evaluation.scoring import score
from tests.support.paths import BUNDLED

STRAW = " ".join(f"Straw number {i} lies here." for i in range(30))
DEPTHS = (0, 0.25, 0.5, 1)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="module")
def made(tokenizer):
    return needle_examples(tokenizer, STRAW, n_tokens=(200, 400), depths=DEPTHS, n_samples=2)


def test_there_is_an_example_of_each_length_sample_and_depth(made):
    assert [(e.labels["n_tokens"], e.labels["depth"]) for e in made] == [
        (n, d) for n in (200, 400) for _ in "ab" for d in DEPTHS
    ]
    assert len({example.id for example in made}) == len(made) == 16


def test_no_example_is_longer_than_asked_nor_a_word_shorter(made, tokenizer):
    for example in made:
        n = len(tokenizer(example.context).input_ids) + example.max_new_tokens
        n += len(tokenizer(example.question + example.answer_prefix, add_special_tokens=False).input_ids)
        assert example.labels["n_tokens"] - 12 <= n <= example.labels["n_tokens"]


def test_the_needle_stands_between_sentences_as_near_to_its_depth_as_may_be(made):
    for example in made:
        before, after = example.context.split(Needle().text)
        assert not before or before.endswith("here. ")
        assert after == "\n\n" or after.startswith(" Straw")
        whole = len(before) + len(after.strip())
        sentence = len("Straw number 10 lies here. ")
        near = 1 if example.labels["depth"] == 1 else 1 / 2  # at the end a sentence may be cut off
        assert abs(len(before) - example.labels["depth"] * whole) <= near * sentence + 2


def test_a_sample_is_the_same_haystack_at_every_depth(made):
    for start in range(0, len(made), len(DEPTHS)):
        texts = {
            " ".join(example.context.replace(Needle().text, "").split())[:300] for example in made[start : start + 4]
        }
        assert len(texts) == 1
    assert made[0].context.split("number")[1] != made[4].context.split("number")[1]  # another begins elsewhere


def test_a_needle_of_ones_own_is_asked_and_scored_by_its_answers(tokenizer):
    needle = Needle("Tea is served at five.", "When is tea served?", " At", ("five", "5 o'clock"), 4)
    (example,) = needle_examples(tokenizer, STRAW, n_tokens=[150], depths=[0.5], needle=needle)
    assert needle.text in example.context and example.prompt.endswith("\n\nWhen is tea served? At")
    assert score(example, " FIVE.") == score(example, " 5 o'clock") == 100 and score(example, " six") == 0


def test_what_cannot_be_hidden_is_refused(tokenizer):
    def hide(text=STRAW, n_tokens=200, depth=0.5):
        return needle_examples(tokenizer, text, n_tokens=[n_tokens], depths=[depth])

    with pytest.raises(SettingsError, match=r"shares from 0 to 1, got 50\. For per cents"):
        hide(depth=50)
    with pytest.raises(TextError, match="already holds the needle's answer, 'blue teapot'"):
        hide(f"A BLUE TEAPOT. {STRAW}")
    with pytest.raises(TextError, match="empty"):
        hide(" ")
    with pytest.raises(TextError, match="needle needs at least"):
        hide(n_tokens=20)
