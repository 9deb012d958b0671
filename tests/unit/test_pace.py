"""How long a model takes: examples worked by hand."""

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from analysis import pace
from analysis.evaluation.lm import Lengths
from analysis.pace import Pace
from analysis.selftest import synthetic_run

# The synthetic run: 3 layers of 4 heads of 8 numbers, so of width 32 and about 12 * 3 * 32^2 = 36,864 weights; each
# pair of its 97 tokens counts 300 multiplications in 12 heads. 97 * 36,864 + 97^2 * 3,600 = 37,448,208.
RUN = replace(synthetic_run(), seconds=37.448208)


def test_a_run_tells_the_time_of_a_text_of_another_length():
    told = Pace.of([RUN])  # a microsecond for each multiplication
    assert (told.token, told.pair) == pytest.approx((0.036864, 0.0036))
    assert told.capture(97) == pytest.approx(RUN.seconds)
    assert told.capture(194) == pytest.approx(2 * 3.575808 + 4 * 33.8724)


def test_the_quickest_run_counts_and_one_that_was_not_timed_does_not():
    slow, untimed = replace(RUN, seconds=100.0), replace(RUN, seconds=0.0)
    assert Pace.of([slow, RUN, untimed]) == Pace.of([RUN])
    assert Pace.of([untimed]) is None


def test_predictions_take_a_capture_and_a_pass_for_each_prompt_and_five_tokens_for_one_after_it():
    one = Pace(token=0.01, pair=0.001, by="by hand")
    # 2 prompts of 10: captures 2 * (0.1 + 0.1), passes 2 * 0.1; 8 - 2 continuations of 4: 24 tokens at 0.05.
    assert one.predictions(2, 8, Lengths(10, 4)) == pytest.approx(0.4 + 0.2 + 1.2)


def test_caches_that_write_one_after_the_other_take_forty_tokens_of_a_prompt_for_each_new_one():
    one = Pace(token=0.01, pair=0.001, by="by hand")
    assert one.generations(3, 100, 4) == pytest.approx(3 * (1.0 + 1.6))


def test_a_rough_pace_goes_by_the_size_and_the_machine_and_says_so(monkeypatch):
    monkeypatch.setattr(pace, "_multiplication", lambda: 1e-6)
    rough = Pace.rough(RUN)
    assert (rough.token, rough.pair) == pytest.approx((0.036864, 0.0036))
    assert rough == Pace.rough(LlamaConfig(num_hidden_layers=3, num_attention_heads=4, hidden_size=32))
    assert rough.told(150) == "about 2 min, a rough figure by the model's size and this machine's CPU"


def test_a_multiplication_is_timed_within_what_machines_take():
    assert 1e-14 < pace._multiplication() < 1e-7
