"""The page Verdict as Streamlit runs it, without a browser, on results that were made up."""

import pytest
from streamlit.testing.v1 import AppTest

from analysis.decision.evidence import Evidence
from analysis.demo.presets import bundled_results
from analysis.evaluation.results import FULL, Results
from analysis.plans.skip import Plan
from analysis.records import load
from analysis.workspace import Workspace
from app import state
from tests.support.decision import HALF, PLAN, found, lm, results
from tests.support.paths import BUNDLED, ROOT
from tests.support.screens import opened as screen
from tests.support.screens import unfolded


@pytest.fixture(autouse=True)
def workspace(monkeypatch, tmp_path):
    """A workspace of its own for each test, and a model of which nothing is bundled but a run."""
    monkeypatch.setenv("L2KV_HOME", str(tmp_path))
    monkeypatch.setenv("L2KV_DEMO", "smollm2")
    with monkeypatch.context() as patch:
        patch.setattr("app.library._bundled_entries", _only_runs(library()._bundled_entries))
        library()._bundled_files.cache_clear()
        yield Workspace(tmp_path / "workspace")
    library()._bundled_files.cache_clear()


def library():
    from app import library

    return library


def _only_runs(entries):
    return lambda kind: entries(kind) if kind in ("run", "study") else ()


def keep(workspace, *records):
    for i, record in enumerate(records):
        workspace.add(record, name=f"record {i}")


def opened(**params):
    app = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=120)
    for name, value in params.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception
    return app


def words(app):
    kinds = (app.title, app.markdown, app.caption, app.info, app.warning, app.error)
    return "\n".join(element.value for kind in kinds for element in kind).replace("\\", "")


def button(app, key):
    return next((one for one in app.button if one.key == key), None)


OF = {"model": "smollm2"}
GOOD = (lm(*[0.01] * 16, **OF), found("passkey", 50, **OF), found("needle", 50, **OF))


def test_without_a_measurement_it_says_what_is_missing_and_what_memory_is_saved_all_the_same():
    app = opened()
    said = words(app)
    assert app.title[0].value == "Can I halve this cache?" and len(app.title) == 1
    assert "NOT YET" in said and "16 excerpts, 50 passkeys, 50 needles" in said
    memory = {metric.label: metric.value for metric in app.metric}
    assert memory["Cache of 4,096 tokens, bfloat16"] == "90.0 MiB → 45.0 MiB"  # 30 layers x 3 heads x 64 x 2 x 2 bytes
    assert memory["Decoding on this machine"] == "Not yet measured"
    assert button(app, "measure").label == "Measure"
    assert "Does a low key norm predict attention" in said and not app.code
    assert "CompressionSpec(" in unfolded(app, "script").code[0].value


def test_smollm2_is_answered_at_first_sight_by_what_is_bundled():
    of = bundled_results("smollm2")
    results = [load(Results, file) for file in (of.lm, of.passkey, of.needle)]
    decision = Evidence.of([load(Plan, of.plan), *results]).decide(HALF)
    assert decision.answer == "NO-GO" and decision.smallest is None
    short = [check.short for check in decision.checks]
    assert short == ["× 1.089", "40 of 50 (full 50)", "1 of 50 (full 50)"]
    assert [check.short for check in decision.plan_checks[:3]] == ["× 1.093", "50 of 50 (full 50)", "1 of 50 (full 50)"]


def test_what_passes_is_go_with_its_numbers_and_n(workspace):
    keep(workspace, *GOOD)
    said = words(app := opened())
    assert ":green[GO]" in said and app.metric[0].value == "× 1.010"
    assert "+0.010 nats/token; 16 excerpts" in said and "Passkeys: 50 of 50 (full 50)" in said


def test_limits_in_the_address_change_the_answer(workspace):
    keep(workspace, *GOOD)
    assert "To be measured: 4 more excerpts" in words(opened(min_excerpts="20"))
    said = words(opened(max_ppl="1.005"))
    assert ":gray[NOT YET]" in said and "A plan of the same bytes may pass" in said


def test_a_plan_that_passes_is_used_at_the_press_of_a_button(workspace):
    def planned(task, full, ours, of_plan, n):
        methods = {FULL: (None, [full] * n), "it": (HALF, [ours] * n), "plan": (PLAN, [of_plan] * n)}
        return results(task, methods, **OF)

    lists = (("lm", 2.0, 2.4, 2.0, 16), ("passkey", 1.0, 1.0, 1.0, 50), ("needle", 100.0, 100.0, 100.0, 50))
    keep(workspace, Plan("smollm2", PLAN, "by hand", ("another text",)), *(planned(*one) for one in lists))
    app = opened()
    assert ":green[GO WITH A PLAN]" in words(app) and "made from 1 text" in words(app)
    assert "With a plan of the same bytes: by hand" in words(app)
    assert "head_ratios" in unfolded(app, "script").code[0].value
    button(app, "use_plan").click()
    app.run()
    assert not app.exception and "This plan passes every check" in words(app)
    assert app.session_state[state.PLAN.key] == workspace.entries("plan")[0].id
    assert "".join(app.query_params["plan"]) == workspace.entries("plan")[0].id


def test_the_smallest_ratio_that_passes_can_be_taken(workspace):
    specs = {"a": HALF, "b": type(HALF)(keep_ratio=0.7, protect_last=32)}

    def of(task, full, worse, n):
        scores = {"a": [worse] * n, "b": [full] * n, "plan": [worse] * n}
        methods = {name: ({**specs, "plan": PLAN}[name], values) for name, values in scores.items()}
        return results(task, {FULL: (None, [full] * n), **methods}, **OF)

    tasks = (("lm", 2.0, 2.4, 16), ("passkey", 1.0, 0.0, 50), ("needle", 100.0, 0.0, 50))
    keep(workspace, Plan("smollm2", PLAN, "by hand", ("another text",)), *(of(*one) for one in tasks))
    app = opened()
    assert ":red[NO-GO]" in words(app) and "0.7" in words(app)
    assert button(app, "use_ratio").label == "Keep 70 %"
    button(app, "use_ratio").click()
    app.run()
    assert ":green[GO]" in words(app) and app.title[0].value == "Can I compress this cache?"


def test_a_plan_in_force_is_what_is_judged_and_its_script_is_the_one_of_tune(workspace):
    plan = Plan("smollm2", PLAN, "by hand", ("another text",))
    keep(workspace, *GOOD, plan)
    id = workspace.entries("plan")[0].id
    app = opened(plan=id)
    said = words(app)
    assert app.title[0].value == "Can I use this plan?" and ":gray[NOT YET]" in said
    assert "To be measured of this plan: 16 excerpts, 50 passkeys, 50 needles" in said and "The plan in force" in said
    assert app.metric[0].value == "Not yet measured" and button(app, "measure").label == "Measure"
    script = unfolded(app, "script").code[0].value
    assert script.startswith("# NOT YET. To be measured of this plan") and "head_ratios" in script
    assert unfolded(screen("tune", model="smollm2", plan=id), "export").code[0].value == script

    keep(
        workspace,
        lm(*[0.4] * 16, spec=PLAN, **OF),
        *(found(task, 50, spec=PLAN, **OF) for task in ("passkey", "needle")),
    )
    app = opened(plan=id)
    assert ":red[NO-GO]" in words(app) and "This plan fails 1 of 4 checks." in words(app)
    script = unfolded(app, "script").code[0].value.replace("\n#   ", " ")
    assert (
        script.startswith("# NO-GO.")
        and "# Does it predict text as well as the full cache? Failed. Perplexity × 1.492" in script
    )
    compile(script, "script", "exec")


def test_what_is_measured_in_part_is_no_result(workspace):
    keep(workspace, lm(0.01, 0.01, **OF), found("passkey", 5, 5, 5, **OF))
    app = opened()
    assert app.metric[0].value == "Not yet measured"
    assert "Measured on 2 of the 16 excerpts that it takes." in words(app)
    assert "Passkeys: 5 of 50 measured" in words(app)


def test_results_of_weights_of_the_same_name_but_older_are_left_out(workspace):
    keep(workspace, lm(*[0.4] * 16, weights="old", **OF), *GOOD)
    assert ":green[GO]" in words(opened())


def test_a_file_that_cannot_be_read_counts_for_nothing(workspace):
    keep(workspace, lm(*[0.011] * 16, **OF), *GOOD[1:])
    broken = workspace.path(workspace.entries("results")[-1].id)
    broken.write_text("{")
    app = opened()
    assert "To be measured: 16 excerpts." in words(app) and not app.error


def test_a_model_without_files_here_still_has_its_run(monkeypatch, workspace):
    monkeypatch.setattr("app.components.savings.checkpoint_dtype", _missing)
    said = words(opened())
    assert "The weights are not on this machine" in said


def test_another_model_is_sized_by_its_config_alone_and_a_bad_one_is_refused():
    app = unfolded(opened(), "savings")
    app.text_area(key="config_text").set_value((BUNDLED / "config.json").read_text()).run()
    assert not app.exception
    columns = app.dataframe[0].value
    # 6 layers of 4 kv heads of 32 numbers, keys and values, 2 bytes
    assert next(iter(columns["full cache"])) == "12.0 MiB" == f"{4096 * 6 * 4 * 32 * 2 * 2 / 2**20:.1f} MiB"
    app.text_area(key="config_text").set_value('{"model_type": "bert"}').run()
    assert not app.exception and app.error


def _missing(ref):
    from analysis.errors import ModelError

    raise ModelError("It is gone.")
