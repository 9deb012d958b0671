"""The pages Plan, Skip layers and Generate as Streamlit runs them, without a browser."""

import shutil

import pytest
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

from analysis import Plan, load_study
from analysis.captures import load_run
from analysis.demo.presets import BundledResults, FoundPresets, Preset, bundled_results
from analysis.models.load import BUNDLED_MODELS
from analysis.plans.ablation import Ablation
from analysis.plans.front import Front
from analysis.records import load
from analysis.timelines import Timeline
from app.components import controls
from app.views import generate
from app.views.generate import Column
from l2kv import CompressionSpec
from tests.support.paths import BUNDLED, ROOT
from tests.support.texts import TEMPLATE

N_LAYERS, N_HEADS = 6, 8  # as the demo run


def opened(page="plan", **state):
    """The app on a page, with a session that holds `state`."""
    app = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=60)
    for key, value in state.items():
        app.session_state[key] = value
    return go(app, page)


def go(app, page):
    app._page_hash = calc_hash(page)  # switch_page knows only pages that are files
    return app.run()


def button(app, label):
    return next(button for button in app.button if button.label == label)


def charts(app):
    return len(app.get("plotly_chart"))


def words(app):
    kinds = (app.markdown, app.caption, app.info, app.warning, app.error)
    return "\n".join(element.value for kind in kinds for element in kind).replace("\\", "")


def upload(app, key, name, content):
    next(box for box in app.file_uploader if box.key == key).set_value((name, content, "")).run()


@pytest.mark.parametrize("model", BUNDLED_MODELS)
def test_what_is_bundled_can_be_read_and_is_of_the_model_that_it_is_bundled_with(model):
    found = bundled_results(model)
    assert found.demo and load_run(found.demo).model == model
    if found.study:
        assert load_study(found.study).complete and load_study(found.study).model == model
    if found.presets:
        assert load(FoundPresets, found.presets).model == model
    for file, kind in ((found.front, Front), (found.ablation, Ablation), (found.timeline, Timeline)):
        if file:
            assert load(kind, file).model == model


@pytest.mark.parametrize("name", ["", ".", "..", "texts", "/etc", "Qwen/Qwen3-0.6B", "a" * 5000, "\0"])
def test_nothing_is_bundled_of_a_model_that_is_not(name):
    assert bundled_results(name) == BundledResults()


# plan


# skip layers


# generate


def test_two_compressions_are_decoded_beside_the_full_cache():
    app = opened("generate", beside=True, new_tokens=3, keep_ratio=0.5, prompt="The old man looked at the sea. " * 4)
    app.slider(key="second_keep_ratio").set_value(1.0).run()
    button(app, "Generate").click().run()
    preview = app.session_state["generated"]
    assert not app.exception and not app.error and preview.done
    assert [column.spec.keep_ratio for column in preview.columns] == [0.5, 1.0]
    assert len(preview.compressed) == 2 and preview.compressed[1].token_ids == preview.full.token_ids
    assert preview.agreement(1) == 1.0 and charts(app) == 1
    assert "Nothing was evicted" in words(app)


SEA = "The old man looked at the sea, and the sea looked at the old man. Then he said to his wife: "


@pytest.fixture
def offered(monkeypatch):
    """A task that the full cache solves, one that it does not, and a question, for books-5m."""
    from analysis.models.load import load_model
    from analysis.preview import stream

    *_, (full,) = stream(load_model("books-5m"), SEA, [None], max_new_tokens=6)
    everything, little = CompressionSpec(keep_ratio=1.0), CompressionSpec(keep_ratio=0.05)
    offered = (
        Preset("Solved", SEA, spec=everything, answer=full.text.strip()),
        Preset("Solved, but not from little", SEA, spec=little, answer=full.text.strip()),
        Preset("Not solved", SEA, spec=everything, answer="xylophone"),
        Preset("No task", SEA, spec=little),
        Preset("A question", "Who is it?", answer="x", chat=True),
    )
    monkeypatch.setattr(generate, "presets", lambda model: offered if model == "books-5m" else offered[3:4])
    return offered


def generated(name, **changes):
    app = opened("generate", new_tokens=8, **changes)
    app.selectbox(key="prompt_preset").set_value("A question").run()
    app.selectbox(key="prompt_preset").set_value(name).run()
    button(app, "Generate").click().run()
    assert not app.exception and app.session_state["generated"].done
    return app


def test_colour_is_for_the_task_and_not_for_the_same_tokens(offered):
    app = generated("Solved")
    assert len(app.success) == 1 and "found" in app.success[0].value and not (app.error or app.warning)
    assert words(app).count(":green-badge") == 2 and ":red-badge" not in words(app)
    assert len(app.session_state["generated"].full.token_ids) < 8  # decided, and stopped
    app = generated("Solved, but not from little")
    assert len(app.error) == 1 and "not found" in app.error[0].value and not (app.success or app.warning)
    assert words(app).count(":green-badge") == words(app).count(":red-badge") == 1
    app = generated("Not solved")
    assert "The full cache does not give the answer" in words(app)
    assert not (app.success or app.error or app.warning)
    app = generated("No task")
    assert not (app.success or app.error or app.warning) and "badge" not in words(app)
    assert "The texts differ from new token" in "".join(caption.value for caption in app.caption)


def test_text_that_was_edited_is_no_task_any_more(offered):
    app = opened("generate", new_tokens=2)
    app.selectbox(key="prompt_preset").set_value("Not solved").run()
    app.text_area(key="prompt").set_value(SEA + "No").run()
    assert app.selectbox(key="prompt_preset").value == generate.OWN
    button(app, "Generate").click().run()
    assert app.session_state["generated"].answer == "" and not app.error


def test_presets_are_those_of_the_model_that_is_chosen(offered, tmp_path, monkeypatch):
    shutil.copytree(BUNDLED, tmp_path / "other")
    monkeypatch.setenv("L2KV_MODEL_DIRS", str(tmp_path))
    app = opened("generate")
    app.selectbox(key="prompt_preset").set_value("Solved").run()
    app.selectbox(key="generate_model").set_value(str(tmp_path / "other")).run()
    assert not app.exception and app.selectbox(key="prompt_preset").options == ["No task", generate.OWN]
    assert not [toggle for toggle in app.toggle if toggle.key == "chat"]  # it has no template


def test_a_question_is_asked_through_the_chat_template_of_a_model_that_has_one(offered, tmp_path, monkeypatch):
    shutil.copytree(BUNDLED, tmp_path / "books-5m")
    (tmp_path / "books-5m" / "chat_template.jinja").write_text(TEMPLATE)
    monkeypatch.setenv("L2KV_MODEL_DIRS", str(tmp_path))
    app = opened("generate", generate_model=str(tmp_path / "books-5m"), new_tokens=3)
    assert app.toggle(key="chat").value is False
    app.selectbox(key="prompt_preset").set_value("A question").run()
    assert app.toggle(key="chat").value is True and "with the chat template" in words(app)
    button(app, "Generate").click().run()
    assert not app.exception and app.session_state["generated"].chat
    app.selectbox(key="prompt_preset").set_value("No task").run()
    assert app.toggle(key="chat").value is False


def test_the_plan_is_decoded_with_and_the_controls_beside_it():
    plan = Plan("books-5m", CompressionSpec(layer_ratios={0: 0.9, 1: 0.1}, protect_last=4))
    app = opened("generate", plan=plan, beside=True, new_tokens=2, prompt="The old man looked at the sea. " * 4)
    button(app, "Generate").click().run()
    first, second = app.session_state["generated"].columns
    assert not app.exception and first == Column("plan", plan.spec) and second.spec.layer_ratios is None


def test_a_plan_for_more_layers_than_the_model_has_gets_an_answer():
    plan = Plan("books-5m", CompressionSpec(layer_ratios={40: 0.5}))
    app = opened("generate", plan=plan, new_tokens=2)
    button(app, "Generate").click().run()
    assert not app.exception and len(app.error) == 1


def test_a_compression_is_told_in_words():
    spec = CompressionSpec(keep_ratio=0.25, policy="high_norm", skip_layers=(0, 3), protect_last=8, prune_after=64)
    assert controls.in_words(spec) == "**25% kept**, high norm, last 8 protected, layers 0, 3 whole, from 64 tokens on"
    by_head = CompressionSpec(policy="signed_norm", directions=[["low"]], head_ratios={(0, 0): 0.5})
    assert controls.in_words(by_head) == "**50% kept** by kv head, low or high norm by head"
    assert (
        controls.in_words(CompressionSpec(budget=100, skip_layers=(2,)))
        == "**100 tokens kept**, low norm, layer 2 whole"
    )
