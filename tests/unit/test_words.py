"""The list of phrases that are not used: each pattern catches its sample, and spares plain words."""

import pytest

from tests.support.words import PHRASES, QUOTED, in_line


@pytest.mark.parametrize("phrase", PHRASES, ids=lambda phrase: phrase.sample)
def test_a_sentence_with_a_phrase_is_caught(phrase):
    sample = phrase.sample
    for sentence in (sample, f"    # Here {sample} is said.", sample[0].upper() + sample[1:]):
        assert any(place.endswith(f": say {phrase.instead}") for place in in_line(sentence)), sentence


@pytest.mark.parametrize(
    "sentence",
    [
        "The indices of skipped layers are kept.",
        "A whole text, of which every excerpt is kept.",
        "Weights are weighted by cost in a different order.",
        "The Pareto front shows nats/token for each allocation strategy.",
        "ALR over chance level is the normalised ALR.",
        "The figure draws metrics of each part of the cache.",
    ],
)
def test_plain_words_are_spared(sentence):
    assert in_line(sentence) == []


def test_a_line_that_quotes_an_old_file_is_spared():
    assert in_line(f'"causal check",  {QUOTED}') == [] != in_line('"causal check",  # old')
