"""Settings of tasks: each number has its bounds, which the page and an evaluation check alike."""

from dataclasses import replace

import pytest

from analysis.errors import SettingsError
from analysis.evaluation.settings import Bounds, check_settings, settings_of
from analysis.evaluation.tasks import TASKS

NUMBERS = [
    (task, setting) for task in TASKS for setting in settings_of(TASKS[task].settings) if setting.kind in (int, float)
]


@pytest.mark.parametrize(("task", "setting"), NUMBERS, ids=[f"{task}-{setting.name}" for task, setting in NUMBERS])
def test_a_number_below_its_least_or_above_its_most_is_refused_by_name_and_the_first_ones_are_not(task, setting):
    first = TASKS[task].settings()
    check_settings(first)
    assert setting.bounds.least >= 0  # there is no negative length, count, share or seed
    for wrong in {-5, setting.bounds.least - 1, setting.bounds.most + 1} - {float("inf")}:
        with pytest.raises(SettingsError, match=setting.name):
            check_settings(replace(first, **{setting.name: (1, wrong) if setting.several else wrong}))


def test_every_list_of_numbers_and_every_count_is_among_them():
    named = {(task, setting.name) for task, setting in NUMBERS}
    assert {("passkey", "lengths"), ("needle", "depths"), ("ruler", "samples"), ("lm", "new_tokens")} <= named


def test_bounds_say_what_a_number_may_be():
    assert (str(Bounds(1)), str(Bounds(0, 1))) == ("1 or more", "from 0 to 1")
