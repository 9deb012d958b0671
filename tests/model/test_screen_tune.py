"""The page Tune: what is measured stands before proxies, and what is chosen there is in force on every page."""

import pytest

from analysis.plans.front import Front
from analysis.plans.skip import Plan
from analysis.plans.strategies import STRATEGIES
from analysis.workspace import Workspace
from app import library
from tests.support.screens import opened as opened_screen
from tests.support.screens import unfolded


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "workspace")
    monkeypatch.setattr(library, "WORKSPACE", workspace)
    return workspace


def opened(model="books-5m", **params):
    return opened_screen("tune", model=model, **params)


def said(page):
    return "\n".join(part.value for kind in ("markdown", "caption", "info", "warning") for part in page.get(kind))


def link(page):
    return {name: "".join(values) for name, values in page.query_params.items()}


def test_layers_are_suggested_by_what_was_measured_and_the_list_is_in_force_everywhere():
    page = opened()
    assert "Suggested: layers 1, 3, 4, 5." in said(page)
    page.button(key="use_skip_list").click().run()
    assert link(page)["skip"] == "1,3,4,5" and not page.exception
    assert "skip layers 1, 3, 4, 5" in said(page)  # of the export, which says what is in force


def test_it_answers_at_first_sight_for_smollm2_by_what_was_measured():
    page = opened("smollm2")
    assert "Suggested: layers 18, 23." in said(page) and "32 excerpts of 16 texts" in said(page)
    table = page.dataframe[0].value if page.dataframe else None
    assert "nats/token" in said(page) and "Not measured yet" not in said(page) and table is not None


def test_a_proxy_can_be_chosen_beside_the_measurement_and_says_that_it_is_one():
    page = opened("smollm2")
    rules = page.selectbox(key="tune_rule")
    assert rules.options[0].startswith("Measured cost/MiB") and rules.value[0] == "cost"
    rules.set_value(("alr", "threshold")).run()
    assert "Suggested: layer 0." in said(page) and rules.options[3].startswith("ALR, a proxy")


def test_without_a_measurement_there_is_the_proxy_alone(monkeypatch):
    entries = library.entries
    unmeasured = lambda kind, **of: [] if kind in ("front", "ablation") else entries(kind, **of)  # noqa: E731
    monkeypatch.setattr(library, "entries", unmeasured)
    page = opened("smollm2")
    assert "Not measured yet for smollm2" in said(page) and "Suggested: layer 0." in said(page)
    assert all(option.startswith("ALR, a proxy") for option in page.selectbox(key="tune_rule").options)


def test_other_settings_than_the_measured_ones_are_said():
    assert "the header says otherwise" not in said(opened())
    assert "the header says otherwise" in said(opened(keep="0.25"))


def test_a_uniform_point_sets_the_controls_and_one_by_head_a_plan(workspace):
    page = opened()
    page.selectbox(key="tune_line").set_value("uniform_high").run()
    page.selectbox(key="tune_point").set_value(0.1).run()
    page.button(key="use_point").click().run()
    assert (link(page)["policy"], link(page)["keep"]) == ("high_norm", "0.1") and "plan" not in link(page)
    page.selectbox(key="tune_line").set_value("by_head_by_cost").run()
    page.button(key="use_point").click().run()
    assert not page.exception
    plan = workspace.open(Plan, link(page)["plan"])
    assert plan.spec.head_ratios and plan.model == "books-5m" and plan.planned_on
    assert opened(plan=link(page)["plan"]).session_state["plan_id"] == link(page)["plan"]


def test_a_point_is_used_as_the_boxes_show_it_even_if_the_page_is_not_drawn_since():
    page = opened("smollm2")
    page.selectbox(key="tune_line").set_value("uniform_high")
    page.selectbox(key="tune_point").set_value(0.7)
    page.button(key="use_point").click().run()
    assert not page.exception and (link(page)["policy"], link(page)["keep"]) == ("high_norm", "0.7")


def test_it_says_what_predicts_best_by_the_mean_and_that_it_may_be_luck_and_plans_by_it_where_it_can():
    page = opened("smollm2")
    assert "No plan is clearly better than the best uniform" in said(page)
    front = library.opened(Front, library.entries("front", model="smollm2")[0].id)
    plans = [point for point in front.points if point.keep_ratio == 0.5 and STRATEGIES[point.strategy].kind == "plan"]
    offered = [point for point in plans if not STRATEGIES[point.strategy].needs_costs]
    first = min(offered, key=lambda point: point.mean).strategy
    assert page.selectbox(key="strategy").value == first == link(page)["strategy"]
    page.selectbox(key="strategy").set_value("by_head").run()
    assert link(page)["strategy"] == "by_head" and not page.exception


def test_a_plan_from_the_run_is_saved_and_in_force(workspace):
    page = opened(strategy="by_layer", keep="0.4")
    page.button(key="use_plan").click().run()
    plan = workspace.open(Plan, link(page)["plan"])
    assert plan.spec.layer_ratios or plan.spec.head_ratios
    assert str(plan.spec.keep_ratio) in unfolded(page, "export").code[0].value


def test_the_script_holds_every_chosen_value():
    page = opened(policy="keydiff", keep="0.35", window="16", skip="0,2")
    assert not page.code, "what is folded is not drawn"
    script = unfolded(page, "export").code[0].value
    for value in ("keydiff", "0.35", "protect_last=16", "(0, 2)", "books-5m"):
        assert value in script, value


@pytest.mark.parametrize("policy", ["random", "keydiff", "streaming"])
def test_a_policy_that_norms_say_nothing_of_is_said_and_not_a_traceback(policy):
    page = opened(policy=policy)
    assert not page.exception and not page.error


def test_the_layers_are_measured_as_a_job_with_the_texts_given(workspace):
    import time

    page = unfolded(opened(), "measuring")
    page.text_area(key="documents_pasted").set_value("The pony went on over the bridge in the rain. " * 100).run()
    page.segmented_control(key="tune_what").set_value("Cost of each layer").run()
    page.number_input(key="tune_excerpts").set_value(2)
    page.number_input(key="tune_prompt").set_value(40)
    page.number_input(key="tune_new").set_value(2).run()
    page.button(key="measure_layers").click().run()
    for _ in range(600):
        page.run()
        if "job" not in page.query_params:
            break
        time.sleep(0.2)
    assert not page.exception and not page.error
    (entry,) = workspace.entries("ablation")
    assert "cost of each layer" in entry.name
