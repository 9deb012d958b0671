"""The pages Plan, Skip layers and Generate as Streamlit runs them, without a browser."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

from analysis import Plan, load_study
from analysis.captures import load_run
from analysis.demo.presets import BundledResults, FoundPresets, Preset, bundled_results
from analysis.metrics import METRICS, PROBES
from analysis.models.load import BUNDLED_MODELS
from analysis.plans.ablation import Ablation
from analysis.plans.front import Front
from analysis.records import load, to_json
from analysis.studies import Study
from analysis.timelines import Timeline
from app import session
from app.components import choices, controls, sources
from app.views import generate
from app.views.generate import Column
from l2kv import CompressionSpec
from tests.support.evaluation import ablation_of, front_of
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


def a_study(n=8, texts=None):
    """A study in which every metric rises from -0.8 in the first layer to 0.8 in the last, with some spread."""
    generator = np.random.default_rng(0)
    values = generator.normal(0, 0.05, (n, len(PROBES), len(METRICS), N_LAYERS, N_HEADS))
    values += np.linspace(-0.8, 0.8, N_LAYERS)[:, None]
    values[:, :, tuple(METRICS).index("alr_chance")] = 1.0
    return Study(
        model="books-5m",
        weights="0" * 64,
        layer_kinds=("full",) * N_LAYERS,
        texts=texts or n,
        names=tuple(f"text {i}" for i in range(n)),
        digests=("0" * 64,) * n,
        probes=tuple(PROBES),
        metrics=tuple(METRICS),
        n_tokens=np.full(n, 128),
        values=values,
        status=np.zeros(values.shape, np.uint8),
    )


def a_front(model="books-5m"):
    def point(strategy, keep, change, **spec):
        spec = CompressionSpec(keep_ratio=keep, protect_last=32, **spec)
        return strategy, keep, spec, tuple(change + 0.01 * i for i in range(8))

    heads = {(layer, head): 0.4 for layer in range(N_LAYERS) for head in range(4)} | {(0, 0): 0.9}
    points = [
        *(point("uniform_low", keep, 0.5 - keep / 2) for keep in (0.3, 0.5)),
        *(point("by_head", keep, 0.3 - keep / 2, head_ratios=heads) for keep in (0.3, 0.5)),
    ]
    return front_of(points, model=model, nbytes={0.3: 300_000, 0.5: 500_000}, full_nbytes=1_000_000)


def a_check(model="books-5m", alr=None):
    change = np.outer(np.arange(N_LAYERS), np.ones(8)) / 100 + 0.001 * np.arange(8)
    spec = CompressionSpec(keep_ratio=0.5, protect_last=32)
    return ablation_of(change, 1 + change, spec=spec, model=model, alr=alr)


@pytest.mark.parametrize("page", ["capture", "skip", "plan", "generate"])
def test_every_page_opens_on_a_fresh_session(page):
    app = opened(page)
    assert not app.exception and not app.error and app.header


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


def test_what_is_measured_is_measured_of_the_model_on_screen_unless_another_is_chosen(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    monkeypatch.setenv("L2KV_MODEL_DIRS", str(tmp_path))
    at_hand = replace(session.demo_run(), model="other")
    for page in ("skip", "plan"):
        app = opened(page, run=at_hand)
        assert app.selectbox(key="model_choice").value == str(tmp_path / "other")
        assert any(box.label == "Measure it for other" for box in app.button)
        app = opened(page, run=of_a_model_that_nothing_was_measured_of())
        assert app.selectbox(key="model_choice").value == sources.OTHER and not app.text_input(key="model_ref").value
        app = opened(page, run=replace(at_hand, model="Qwen/Qwen3-0.6B"))
        assert app.text_input(key="model_ref").value == "Qwen/Qwen3-0.6B"


def test_files_of_one_name_are_both_kept():
    app = opened()
    box = next(box for box in app.file_uploader if box.key.startswith("text_files"))
    box.set_value([("a.txt", b"one " * 50, ""), ("a.txt", b"two " * 60, ""), ("b.txt", b"three", "")]).run()
    sources = app.session_state["sources"]
    assert [name for name in sources] == ["a.txt", "a.txt (2)", "b.txt"]
    assert list(sources.values()) == ["one " * 50, "two " * 60, "three"]


# plan


def test_a_plan_is_made_from_the_run_and_said_to_be_in_sample():
    app = opened("plan")
    told = words(app)
    assert not app.exception and "In-sample" in told and "less** than one ratio for all" in told
    for strategy in choices.strategies():
        app.selectbox(key="plan_strategy").set_value(strategy).run()
        assert not app.exception and not app.error
    app.selectbox(key="plan_policy").set_value("low_norm").run()
    assert not app.exception


def test_a_budget_that_is_too_small_is_a_warning_that_names_the_least_one():
    app = opened("plan", keep_ratio=0.05)
    assert not app.exception and any("There is no such plan: the keep ratio must be" in w.value for w in app.warning)


def test_a_plan_goes_by_the_study_of_the_model_where_its_curves_are_enough():
    app = opened("plan")
    told = words(app)  # the bundled study has curves with the last 32 protected
    assert not app.exception and "On the 24 texts of the study it would lose" in told and "planned on 24 texts" in told
    app.selectbox(key="plan_strategy").set_value("adakv").run()
    assert not app.exception and "On this text it would lose" in words(app)
    app = opened("plan", protect_last=0)
    assert not app.exception and "On this text it would lose" in words(app)
    app = opened("plan", run=of_a_model_that_nothing_was_measured_of())
    assert not app.exception and "On this text it would lose" in words(app)


def test_a_plan_is_taken_to_generate_and_dropped_there():
    app = opened("plan")
    button(app, "Use this plan in Generate").click().run()
    assert not app.exception and "What does compression change" in app.header[0].value
    plan = app.session_state["plan"]
    assert plan.spec.policy == "signed_norm" and "Plan in use" in words(app)
    assert not [slider for slider in app.slider if slider.key == "keep_ratio"]  # the plan says what is kept
    button(app, "Drop it").click().run()
    assert app.session_state["plan"] is None and "Plan in use" not in words(app)
    assert [slider for slider in app.slider if slider.key == "keep_ratio"]


def test_a_plan_of_another_model_is_shown_with_a_warning():
    app = opened("generate", plan=Plan("other", CompressionSpec()))
    assert any("made for other" in warning.value for warning in app.warning)


def test_a_skip_list_is_opened_as_a_plan_or_refused_in_one_sentence():
    app = opened("plan")
    for given, answer in (("0, 99", "names layer 99"), ("first", "no list of layers"), ("{}", "not a plan")):
        app.text_input(key="plan_skip_list").set_value(given).run()
        button(app, "Open it").click().run()
        assert not app.exception and len(app.error) == 1 and answer in words(app) and "plan" not in app.session_state
    app.text_input(key="plan_skip_list").set_value("[0, 5]").run()
    button(app, "Open it").click().run()
    assert app.session_state["plan"].spec.skip_layers == (0, 5) and "In use on Generate" in words(app)


def test_a_plans_file_comes_back_as_it_was_saved():
    plan = Plan("books-5m", CompressionSpec(keep_ratio=0.3, layer_ratios={1: 0.2, 2: 0.9}), note="by hand")
    app = opened("plan")
    upload(app, "plan_file", "plan.json", to_json(plan).encode())
    button(app, "Open it").click().run()
    assert app.session_state["plan"] == plan


def test_the_front_answers_first_compares_at_equal_bytes_and_gives_a_point_to_generate():
    app = opened("plan", front=a_front())
    told = words(app)
    assert not app.exception and charts(app) == 3
    assert any(line.startswith("##### Yes") for line in told.splitlines())
    app.selectbox(key="front_way").set_value("by_head").run()
    button(app, "Use it in Generate").click().run()
    assert app.session_state["plan"].spec == a_front().points[2].spec


def test_another_front_may_have_other_ways():
    app = opened("plan", front=a_front())
    app.selectbox(key="front_way").set_value("by_head").run()
    front = a_front()
    app.session_state["front"] = replace(front, plans=front.plans[:2])
    app.run()
    assert not app.exception and app.selectbox(key="front_way").value == "uniform_low"


def test_a_front_of_another_model_is_not_shown():
    app = opened("plan", front=a_front("other"), run=of_a_model_that_nothing_was_measured_of())
    assert charts(app) == 2 and "The front that you have is of other" in words(app)
    assert "Nothing was measured for elsewhere yet" in words(app) and "#####" not in words(app)


def test_a_bad_front_is_refused_in_one_sentence():
    app = opened("plan")
    for i, content in enumerate([b"{}", b"[1]", b"\xff\xfe", b'{"l2kv_front": 1}', b"[" * 100_000]):
        upload(app, "front_file", f"{i}.json", content)
        assert not app.exception and len(app.error) == 1, content


def test_what_is_saved_is_told_for_the_gpu_and_the_batch():
    app = opened("plan", saved_batch=4)
    table = app.dataframe[-1].value
    # 6 layers, 4 kv heads of 32, keys and values of 2 bytes, as the checkpoint has them: 3072 bytes a token
    assert table["full cache"][0] == f"{4 * 4096 * 3072 / 2**20:.1f} MiB" and table["saved"][0] == "50%"
    app.selectbox(key="cache_dtype").set_value("float32").run()
    assert app.dataframe[-1].value["full cache"][0] == f"{4 * 4096 * 6144 / 2**20:.1f} MiB"


def test_a_config_alone_tells_what_is_saved_and_a_bad_one_is_refused():
    app = opened("plan")
    config = (ROOT / "analysis" / "bundled" / "books-5m" / "config.json").read_text()
    app.text_area(key="config_text").set_value(config).run()
    assert not app.exception and not app.error and "counted from the config" in words(app)
    app.text_area(key="config_text").set_value('{"num_hidden_layers": 1000000}').run()
    assert len(app.error) == 1 and "num_hidden_layers" in app.error[0].value.replace("\\", "")


DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 64, "vocab_size": 256, "moe_intermediate_size": 16,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "kv_lora_rank": 8, "q_lora_rank": 16,
}  # fmt: skip


def test_a_config_of_a_model_whose_cache_cannot_be_compressed_gets_a_reason_and_no_table():
    app = opened("plan")
    tables = len(app.dataframe)
    app.text_area(key="config_text").set_value(json.dumps(DEEPSEEK)).run()
    assert not app.exception and len(app.error) == 1 and "caches latents" in app.error[0].value
    assert len(app.dataframe) == tables - 1


def test_without_the_weights_no_time_and_no_number_of_sequences_is_told():
    app = opened("plan")
    assert any("a step takes" in column for column in app.dataframe[-1].value)
    app = opened("plan", run=replace(session.demo_run(), model="elsewhere"))
    table = app.dataframe[-1].value
    assert not app.exception and list(table) == ["tokens", "full cache", "compressed", "saved"]
    assert "weights are not on this machine" in words(app)


def test_the_announced_runs_are_those_that_are_made():
    chosen = dict(front_keeps=[0.3, 0.5], front_measured_ways=["uniform_low", "by_head"], continued=3)
    app = opened("plan", **chosen)
    # 3 + 3 captures, then 3 continuations by the full cache and by 4 specs
    assert f"At most {3 + 3 + 3 * 5} runs" in words(app)
    app = opened("plan", **chosen | {"front_measured_ways": ["by_head_by_cost"]})
    # and each of the 24 kv heads alone, and the full cache, on the 3 planning texts
    assert f"At most {3 + 3 + 3 * 3 + 3 * 25} runs" in words(app)


@pytest.mark.parametrize("page", ["skip", "plan", "heads"])
def test_a_model_of_sliding_windows_alone_has_nothing_to_compress(page):
    demo = session.demo_run()
    run = replace(demo, layer_kinds=("sliding",) * N_LAYERS, windows=(64,) * N_LAYERS)
    app = opened(page, run=run)
    assert not app.exception and not app.error
    assert page == "heads" or "Every layer of this model has a sliding window" in words(app)


def test_what_does_not_fit_the_model_is_a_message_and_not_a_traceback():
    def page():
        from contextlib import contextmanager

        from app.components import jobs
        from l2kv import SpecError

        class Engine:
            @contextmanager
            def lend(self, ref, progress):
                yield None

        def refuse(loaded, progress):
            raise SpecError("layers <b>40</b> of 6")

        jobs.run(Engine(), jobs.Job("go", "Go", "books-5m", refuse))

    app = AppTest.from_function(page, default_timeout=60).run()
    app.button(key="go").click().run()
    assert not app.exception and [error.value.replace("\\", "") for error in app.error] == ["layers <b>40</b> of 6"]


# skip layers


RULES_SAY = (("count", "Skip 2 layers, those"), ("gap", "gap"), ("threshold", "Skip every layer"))


def of_a_model_that_nothing_was_measured_of(**changes):
    return replace(session.demo_run(), model="elsewhere", **changes)


def test_layers_are_suggested_by_what_was_measured_where_it_was():
    app = opened("skip", ablation=a_check())
    for rule, said in RULES_SAY:
        app.session_state["skip_rule"] = rule
        app.run()
        assert not app.exception and said in words(app)
        assert "Suggestion, as measured" in words(app) and "Measured by prediction" in words(app)
    assert "Suggestion, as measured: 1, 2, 3, 4, 5." in words(app)  # 0.01 nats and more
    button(app, "Take the suggestion").click().run()
    assert app.session_state["skip_layers"] == [1, 2, 3, 4, 5] and "controls say otherwise" not in words(app)
    app.slider(key="keep_ratio").set_value(0.25).run()
    assert "controls say otherwise" in words(app)


def test_elsewhere_layers_are_suggested_by_a_proxy_that_is_called_one():
    app = opened("skip", run=of_a_model_that_nothing_was_measured_of())
    for rule, said in RULES_SAY:
        app.session_state["skip_rule"] = rule
        app.run()
        assert not app.exception and said in words(app) and "Suggestion by a proxy, ALR" in words(app)
    app = opened("skip", policy="high_norm")  # a check of low norm says nothing of it
    assert "Suggestion by a proxy, ALR" in words(app)


def test_layers_are_suggested_from_the_study_of_the_same_model():
    app = opened("skip", policy="high_norm", study=a_study(), judged_by="study")
    assert not app.exception and "Measured on 8 texts" in words(app)


def test_a_skip_list_is_opened_on_its_page_and_a_bad_one_refused():
    app = opened("skip")
    app.text_input(key="skip_text").set_value("0, 4").run()
    assert app.session_state["skip_layers"] == [0, 4] and not app.error
    app.text_input(key="skip_text").set_value("nine").run()
    assert app.session_state["skip_layers"] == [0, 4] and "no list of layers" in app.error[0].value


def test_what_each_layer_costs_alone_is_shown_for_the_model_that_it_is_of():
    app = opened("skip", ablation=a_check())
    assert not app.exception and charts(app) == 2 and "Spearman of normalised ALR" in words(app)
    app = opened("skip", ablation=a_check("other"), run=of_a_model_that_nothing_was_measured_of())
    assert charts(app) == 1 and "The check that you have is of other" in words(app)
    assert "Nothing was measured for elsewhere yet" in words(app) and "Spearman of ALR" not in words(app)


def test_a_check_that_keeps_the_papers_alr_tells_of_both():
    check = a_check()
    app = opened("skip", ablation=a_check(alr=-check.nll_change), layer_costs_data=True)
    table = next(table.value for table in app.dataframe if "NLL change, nats/token" in table.value)
    assert not app.exception and "of the paper's ALR and that change: −1.00" in words(app)
    assert np.allclose(table["the paper's ALR"], -table["NLL change, nats/token"])


def test_a_bad_check_is_refused_in_one_sentence():
    app = opened("skip")
    upload(app, "ablation_file", "causal.json", b'{"l2kv_causal": 1, "model": "m"}')
    assert not app.exception and len(app.error) == 1


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


def test_generation_is_with_the_model_on_screen_unless_another_is_chosen():
    app = opened("generate", run=of_a_model_that_nothing_was_measured_of())
    assert app.selectbox(key="generate_model").value is None
    button(app, "Generate").click().run()
    assert not app.exception and [error.value for error in app.error] == ["Choose a model first."]
    assert opened("generate").selectbox(key="generate_model").value == session.demo_run().model


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
