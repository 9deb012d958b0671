"""What comes with the program: results, presets and stories of the bundled models."""

import pytest

from analysis import load_study
from analysis.captures import load_run
from analysis.demo.presets import BundledResults, FoundPresets, bundled_results
from analysis.models.load import BUNDLED_MODELS
from analysis.plans.ablation import Ablation
from analysis.plans.front import Front
from analysis.records import load
from analysis.stories import Story
from analysis.timelines import Timeline


@pytest.mark.parametrize("model", BUNDLED_MODELS)
def test_what_is_bundled_can_be_read_and_is_of_the_model_that_it_is_bundled_with(model):
    found = bundled_results(model)
    assert found.demo and load_run(found.demo).model == model
    if found.study:
        assert load_study(found.study).complete and load_study(found.study).model == model
    if found.presets:
        assert load(FoundPresets, found.presets).model == model
    for story in found.stories:
        assert load(Story, story).model == model and story.stat().st_size < 300_000
    for file, kind in ((found.front, Front), (found.ablation, Ablation), (found.timeline, Timeline)):
        if file:
            assert load(kind, file).model == model


@pytest.mark.parametrize("name", ["", ".", "..", "texts", "/etc", "Qwen/Qwen3-0.6B", "a" * 5000, "\0"])
def test_nothing_is_bundled_of_a_model_that_is_not(name):
    assert bundled_results(name) == BundledResults()
