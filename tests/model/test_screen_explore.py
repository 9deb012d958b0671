"""The page Explore as Streamlit runs it, without a browser: its values, its controls, and what it says of bad input."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from analysis.captures import save_run
from analysis.errors import RecordError
from analysis.measures import TOLD, attention_lost
from analysis.metrics import METRICS, PROBES, Metric, gamma, metrics
from analysis.selftest import synthetic_run
from analysis.studies import Study, study_of
from analysis.verdicts import QUESTION, answer, verdict_counts, verdicts
from analysis.words import signed
from analysis.workspace import Workspace
from app import library, new_study, state
from app.engine import Engine
from app.jobs import Jobs
from l2kv.policies import POLICIES
from l2kv.spec import CompressionSpec
from tests.support.paths import BUNDLED as FOLDER
from tests.support.runs import random_run

BUNDLED = {entry.model: entry.id for entry in library.entries("run") if library.is_bundled(entry.id)}
SMALL = BUNDLED["books-5m"]


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "WORKSPACE", Workspace(tmp_path / "workspace"))
    return library.WORKSPACE


def explored(one_text=True, **params):
    """The page as a fresh session opens an address, of one text unless it says otherwise."""

    def script():
        import streamlit as st

        from app import address, state
        from app.engine import Engine
        from app.jobs import Jobs
        from app.screens import explore

        if "jobs" not in st.session_state:
            st.session_state["jobs"] = Jobs(Engine())
        address.read(st.session_state["jobs"]._engine)
        for said in state.notices():
            st.warning(said)
        explore.draw(st.session_state["jobs"]._engine, st.session_state["jobs"], {})
        address.write()

    page = AppTest.from_function(script, default_timeout=60)
    for name, value in ({"model": "books-5m"} | ({"over": "one text"} if one_text else {}) | params).items():
        page.query_params[name] = value
    page.run()
    assert not page.exception
    return page


def told(page):
    kinds = (page.title, page.markdown, page.caption, page.info, page.warning, page.error)
    return "\n".join(element.value for kind in kinds for element in kind).replace("\\", "")


def _box(page, label):
    return next(box for box in page.selectbox if box.label == label)


def shown_map(page):
    """Values of the map, [L, H], NaN where a cell is grey."""
    import json

    chart = page.get("echarts_chart")[0]
    cells = json.loads(chart.proto.spec)["series"][0]["data"]
    layers, heads = cells[-1]["value"][1] + 1, cells[-1]["value"][0] + 1
    return np.array([np.nan if one.get("visualMap") is False else one["value"][2] for one in cells]).reshape(
        layers, heads
    )


def test_the_page_answers_by_layer_and_opens_a_head_that_teaches():
    page = explored(model="smollm2")
    assert page.title[0].value == "Which heads, and why?" and len(page.title) == 1
    assert f"{QUESTION} **Mostly yes.** Layers 1-11, 19, 23-29: low norm predicts attention" in told(page)
    layer, head = state.teaching_head(BUNDLED["smollm2"], "next token")
    assert f"#### L{layer} KV{head // 3} Q{head}: follows the paper" in told(page)
    assert len(page.get("echarts_chart")) == 2 and len(page.get("plotly_chart")) == 1  # map and head; all heads


def test_the_page_opens_on_the_study_where_there_is_one_and_one_text_says_what_the_study_does():
    study = library.opened(Study, library.entries("study", model="smollm2")[0].id)
    word = answer(study).split(".")[0]
    page = explored(one_text=False, model="smollm2")
    assert f"{QUESTION} **{word}.**" in told(page) and "anecdote" not in told(page)
    assert page.query_params["over"] == "many texts" and len(study.names) == 24
    page = explored(model="smollm2")
    assert f"One text is an anecdote. Over 24 texts: **{word}.**" in told(page)


@pytest.mark.parametrize("probe", PROBES)
def test_every_metric_has_a_map_of_its_numbers(probe):
    page = explored(probe=probe)
    for name in METRICS:
        page.selectbox(key=state.MAP.key).set_value(name).run()
        assert not page.exception
        values = library.values_of(SMALL, 0, probe).of(name)
        np.testing.assert_allclose(shown_map(page), values)
        caption = next(line.value for line in page.caption if line.value.startswith(f"**{METRICS[name].title}**"))
        assert any(end in caption for end in ("Weak colour is good", "Strong colour is good", "Purple: ", "No end is"))
        assert ("Grey: undefined" in caption) == np.isnan(values).any()


@pytest.mark.parametrize("probe", PROBES)
def test_the_first_token_and_the_probe_go_together_on_the_map_beside_the_head_and_in_the_answer(probe):
    run = library.run(SMALL)
    page = explored(probe=probe, skip_first="1", layer="3", head="1")
    expected = metrics(run, probe, skip_first=1).of("gamma")
    np.testing.assert_allclose(shown_map(page), expected)
    assert next(tile.value for tile in page.metric if tile.label == "Γ without first") == signed(expected[3, 1])
    counts = verdict_counts(verdicts(study_of(run), probe=probe))
    said = next(line.help for line in page.markdown if "Layer" in line.value and line.help).replace("\\", "")
    assert f"In {counts['follows the paper']} of 48 heads low" in said and f"in {counts['mirror']} high" in said


def test_a_metric_that_is_registered_has_a_map():
    METRICS.register("half_of_gamma", Metric("Half of Γ", "half of Γ", lambda row: gamma(row) / 2))
    try:
        library.study_of_run.cache_clear()
        library.values_of.cache_clear()
        assert "Half of Γ" in explored().selectbox(key=state.MAP.key).options
    finally:
        METRICS.remove("half_of_gamma")
        library.study_of_run.cache_clear()
        library.values_of.cache_clear()


@pytest.mark.parametrize("policy", ["low_norm", "random", "streaming", "accumulated"])
def test_the_attention_lost_is_one_number_on_the_map_and_beside_the_head(policy):
    page = explored(map=state.LOST, policy=policy, keep="0.3", window="16", skip="1", layer="4", head="2")
    lost = attention_lost(library.run(SMALL), CompressionSpec(0.3, policy=policy, protect_last=16, skip_layers=(1,)))
    np.testing.assert_allclose(shown_map(page), lost)
    assert next(metric.value for metric in page.metric if metric.label == "Lost") == f"{lost[4, 2]:.1%}"
    assert f"loses **{lost[4, 2]:.1%}** of the next token" in told(page) and (lost[1] == 0).all()
    assert page.get("echarts_chart")[0].proto.spec.count('"skipped"') == 1


def test_a_map_of_one_text_beside_means_of_many_says_so_where_it_is_chosen():
    page = explored(one_text=False, over="many texts", map=state.LOST)
    assert "Attention lost, this text" in page.selectbox(key=state.MAP.key).options
    assert "**Attention lost at my settings**, this one text." in told(page)


def test_what_a_run_does_not_tell_is_said_and_not_drawn_as_a_number():
    page = explored(map=state.LOST, policy="keydiff")
    assert "does not tell what keydiff keeps" in told(page) and np.isnan(shown_map(page)).all()
    assert next(metric.value for metric in page.metric if metric.label == "Lost") == "not told"
    assert "keydiff" not in TOLD and set(TOLD) < set(POLICIES)


@pytest.mark.parametrize("view", state.VIEWS)
def test_every_view_of_a_head_opens_with_its_number_of_charts(view):
    page = explored(view=view, pinned="1.3", query="2", skip_first="1")
    charts = {"Tokens": 0, "Why": 0}.get(view, 1)
    drawn = len(page.get("plotly_chart")) + len(page.get("echarts_chart"))
    assert drawn == 2 * charts + 2  # A, B, the map, and all heads below
    sides = [line.value[:10] for line in page.markdown if line.value.startswith("#### ")]
    assert sides == ["#### A · L", "#### B · L"]


def test_the_mean_of_many_texts_is_mapped_with_intervals_and_shown_for_the_head():
    page = explored(over="many texts", view="Over texts", layer="2", head="1")
    study = next(entry for entry in library.entries("study", model="books-5m"))
    means = library.means_of(study.id, "gamma", "next token")
    np.testing.assert_allclose(shown_map(page), means.mean)
    n = len(library.opened(state.Study, study.id).names)
    assert f"Mean of {n} texts" in [option for group in page.get("button_group") for option in group.options]
    tiles = {tile.label: tile.value for tile in page.metric}
    assert tiles[f"Γ, {n} texts"] == signed(means.mean[2, 1])
    assert tiles["Γ, here"] == signed(library.values_of(SMALL, 0, "next token").of("gamma")[2, 1])
    assert all(label.endswith((", here", " texts")) for label in tiles)
    assert f"Over {n} texts" in told(page) and "Median Γ" in "".join(line.help or "" for line in page.markdown)


def test_many_texts_are_told_by_layer_and_by_the_order_of_layers():
    page = explored(below="Many texts")
    assert "From how many texts on" in told(page) and len(page.get("plotly_chart")) == 2
    assert any("meaning" in table.value for table in page.table)


def test_heads_that_do_not_match_the_filter_are_faded():
    import json

    page = explored(verdicts="mirror", kv="1,2")
    cells = json.loads(page.get("echarts_chart")[0].proto.spec)["series"][0]["data"]
    verdict = library.verdicts_of(SMALL, "next token")
    for cell in cells:
        head, layer = cell["value"][:2]
        matches = verdict[layer, head] == "mirror" and head // 2 in (1, 2)
        assert ("itemStyle" in cell) == (not matches)


def test_an_address_brings_back_the_whole_view():
    study = next(entry.id for entry in library.entries("study", model="books-5m"))
    asked = {
        "model": "books-5m", "run": SMALL, "over": "many texts", "study": study, "map": "alr", "layer": "3",
        "view": "Loss curves",
        "head": "4", "pinned": "0.2", "query": "3", "verdicts": "mirror,sink only", "kv": "0,3", "below": "Many texts",
        "skip_first": "1", "probe": "all queries", "policy": "streaming", "keep": "0.25", "window": "8", "skip": "2",
    }  # fmt: skip
    page = explored(**asked)
    written = {name: "".join(value) for name, value in page.query_params.items()}
    assert written == asked
    assert "#### A · L3 KV2 Q4" in told(page) and "#### B · L0 KV1 Q2" in told(page)


@pytest.mark.parametrize(("name", "text"), [("map", "best"), ("view", "<b>"), ("verdicts", "good"), ("over", "all")])
def test_a_part_of_the_address_that_the_page_does_not_know_is_named(name, text):
    page = explored(**{name: text})
    assert f"The address says {name}={text}" in told(page) and not page.error


def test_a_head_is_chosen_and_a_layer_skipped_without_a_mouse_on_the_map():
    page = explored(layer="1", head="1")
    _box(page, "Layer").set_value(4).run()
    _box(page, "Head").set_value(6).run()
    assert "#### L4 KV3 Q6" in told(page)
    page.button(key="skip_layer").click().run()
    assert page.session_state[state.SKIP_LAYERS.key] == [4] and "All 460 tokens are kept" in told(page)
    page.button(key="pin").click().run()
    assert all(f"#### {side} · L4 KV3 Q6" in told(page) for side in "AB")


def test_queries_are_stepped_through_and_end_at_the_first_that_is_kept():
    page = explored()
    run = library.run(SMALL)
    before = next(button for button in page.button if button.label == "Query before")
    before.click().run()
    assert f"Attention of token {run.n_tokens - 1} " in told(page)
    assert f"are of the next token; only the chart is of token {run.n_tokens - 1} " in told(page)
    page = explored(query="999")
    assert f"Attention of token {run.n_tokens - len(run.recent_positions)} " in told(page)
    assert next(button for button in page.button if button.label == "Query before").disabled


def test_the_alr_of_a_kv_head_is_of_the_mean_attention_of_its_query_heads():
    run = library.run(SMALL)
    layer, head, group = 2, 5, run.n_heads // run.n_kv_heads
    kv = head // group
    attention = run.probe_attention[layer, kv * group : (kv + 1) * group].astype(float).mean(axis=0)
    lost = ideal = total = 0.0
    by_norm = sorted(range(run.n_tokens), key=lambda i: (run.key_norm[layer, kv, i], i))
    by_attention = sorted(range(run.n_tokens), key=lambda i: attention[i])
    for m in range(run.n_tokens):
        lost += attention[by_norm[-1 - m]]
        ideal += attention[by_attention[m]]
        total += lost - ideal
    assert library.kv_alr_of(SMALL, 0, "next token")[layer, kv] == pytest.approx(total, abs=0.05)


def test_a_run_without_last_queries_opens_with_the_probes_that_it_has(workspace):
    run = library.run(SMALL)
    old = replace(run, recent_attention=run.recent_attention[:0])
    page = explored(run=workspace.add(old, name="old").id, probe="last queries", view="Queries")
    assert page.session_state[state.PROBE.key] == "next token" and "keeps no last queries" in told(page)


def test_a_synthetic_run_is_said_to_be_no_models(workspace):
    page = explored(run=workspace.add(synthetic_run(), name="self-test").id)
    assert "made by no model" in page.success[0].value and not page.error
    np.testing.assert_allclose(shown_map(page), [[-1] * 4, [0] * 4, [1] * 4], atol=1e-6)


def test_a_run_that_is_too_short_says_so_and_every_view_of_it_opens(workspace):
    id = workspace.add(random_run(n=9, layer_kinds=("full", "sliding", "full"), windows=(0, 4, 0)), name="short").id
    page = explored(run=id, layer="1", head="0")
    assert "**This run cannot tell: 9 tokens are too few.** Take a text of some hundred." in told(page)
    assert "never compressed" in told(page) and not [b for b in page.button if b.key == "skip_layer"]
    for view in state.VIEWS:
        assert not explored(run=id, view=view, skip_first="1", pinned="0.1").error


def test_a_model_without_a_run_says_how_to_make_one(tmp_path, monkeypatch):
    shutil.copytree(FOLDER, tmp_path / "elsewhere")
    monkeypatch.setenv("L2KV_MODEL_DIRS", str(tmp_path))
    page = explored(model=str(tmp_path / "elsewhere"))
    assert "There is no run of elsewhere yet" in told(page) and not page.get("echarts_chart")


def test_hostile_tokens_are_shown_and_not_rendered(workspace):
    run = library.run(SMALL)
    hostile = replace(run, labels=("<img src=x>", "![a](b)", "$x$", "\u202e", "\x00", *run.labels[5:-1], "**<b>"))
    page = explored(run=workspace.add(hostile, name="<b>*x*").id, query="1")
    assert r"\*\*\<b\>" in "".join(line.value for line in page.caption)
    page = explored(run=page.session_state[state.RUN.key], view="Tokens")
    strip = next(html for html in page.get("html") if "l2kv-strip" in html.proto.body).proto.body
    assert "&lt;img·src=x&gt;" in strip and "<img" not in strip


def test_two_runs_are_compared_head_by_head(workspace):
    run = library.run(SMALL)
    turned = replace(run, key_norm=run.key_norm.max() + run.key_norm.min() - run.key_norm)
    page = explored(**{"with": workspace.add(turned, name="upside down").id, "run": SMALL})
    assert "Median Γ is" in told(page) and "“upside down” (the other)" in told(page)
    assert len(page.get("plotly_chart")) == 3
    ours, other = (library.values_of(id, 0).of("gamma") for id in (SMALL, page.session_state[state.OTHER_RUN.key]))
    assert np.allclose(ours, -other, atol=0.01)  # every norm order is turned round, and so is the sign, but for ties


def test_runs_of_other_heads_are_compared_as_wholes_and_a_bad_file_is_refused(tmp_path):
    page = explored(below="Another run")
    box = next(box for box in page.file_uploader if box.key == "other_run_file")
    box.set_value(("r.safetensors", b"no run", "")).run()
    assert len(page.error) == 1 and not page.exception
    saved = save_run(synthetic_run(), tmp_path / "r.safetensors")
    box = next(box for box in page.file_uploader if box.key == "other_run_file")
    box.set_value(("r.safetensors", saved.read_bytes(), "")).run()
    assert not page.error and "no head of one is a head of the other" in told(page)


def test_a_part_that_fails_says_why_and_leaves_the_others(monkeypatch):
    def gone(*asked):
        raise RecordError("The file *was* deleted.")

    monkeypatch.setattr(library, "lost_of", gone)
    page = explored(map=state.LOST, layer="2", head="2")
    assert [error.value for error in page.error] == [r"The file \*was\* deleted\."]
    assert "#### L2 KV1 Q2" in told(page)


TEXT = "The old man looked at the sea and the sea looked at him. "


def ended(job):
    """Wait for a job."""
    import time

    for _ in range(1200):
        if not job.running:
            return job
        time.sleep(0.05)
    raise AssertionError(job.stage)


def test_a_study_is_cancelled_kept_shown_and_resumed_to_the_same_as_one_made_at_once(workspace, monkeypatch):
    jobs = Jobs(Engine())
    asked = new_study._Asked("books-5m", (("sea", TEXT * 40),), 32, 4)
    assert asked.done == 0
    job = jobs.find(new_study.start(jobs, "books-5m", asked, "the sea"))
    while job.running and job.done < 2:
        pass
    job.cancel()
    assert ended(job).status == "cancelled"
    (part,) = library.WORKSPACE.entries("study")
    done = int(part.about.split()[0])
    assert 1 <= done < 4 and asked.done == done
    job = ended(jobs.find(new_study.start(jobs, "books-5m", asked, "the sea")))
    assert job.status == "done", job.message
    (whole,) = library.WORKSPACE.entries("study")
    assert whole.id == job.result and whole.about == "4 texts" and not list(workspace.folder.glob(".unfinished*"))
    other = ended(jobs.find(new_study.start(jobs, "books-5m", asked, "again")))
    resumed, at_once = (library.opened(state.Study, id) for id in (whole.id, other.result))
    assert resumed.names == at_once.names and resumed.complete
    np.testing.assert_allclose(resumed.of("gamma"), at_once.of("gamma"), atol=1e-5)


def test_texts_that_are_too_short_end_the_job_with_the_reason():
    jobs = Jobs(Engine())
    job = ended(jobs.find(new_study.start(jobs, "books-5m", new_study._Asked("books-5m", (("a", TEXT),), 512, 2), "a")))
    assert job.status == "failed" and "None of the texts has 512 tokens" in job.message


def test_the_vectors_of_a_layer_are_got_by_a_job_and_explain_all_its_heads():
    from app.components import why

    page = explored(view="Why", layer="1", head="2")
    page.button(key="why_a").click().run()
    assert ended(page.session_state["jobs"].find(page.session_state[state.JOBS.key][-1])).status == "done"
    for head in (2, 5):
        _box(page, "Head").set_value(head).run()
        assert not page.exception
        assert {"why_key_a", "why_zeroed_a", "why_channels_a"} < {chart.key for chart in page.get("plotly_chart")} | {
            ""
        }
        assert "Zeroing dimensions" in told(page) and "of the last query's attention would move" in told(page)
    why._VECTORS.clear()


def test_a_probe_that_the_study_lacks_gives_way_with_a_sentence(workspace):
    run = library.run(SMALL)
    id = workspace.add(study_of(run, run, probes=("all queries",)), name="of one probe").id
    page = explored(one_text=False, over="many texts", study=id, probe="next token")
    assert not page.error and sum("Not measured here: next token" in said.value for said in page.info) == 1
    assert page.session_state[state.PROBE.key] == "all queries"
    assert page.session_state[state.OVER.key] == "many texts"
