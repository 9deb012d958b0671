"""The address holds what is on screen: a fresh session that opens it shows the same, and bad parts are named."""

import json
import shutil
from dataclasses import replace

import pytest
from streamlit.testing.v1 import AppTest

from analysis.models.load import BUNDLED
from app import library, state
from app.screens import demo, evaluate, tune  # noqa: F401 - they add parameters

RUNS = {entry.model: entry.id for entry in library.entries("run") if library.is_bundled(entry.id)}


def bundled(kind, model="smollm2", at=0):
    return [entry.id for entry in library.entries(kind, model=model) if library.is_bundled(entry.id)][at]


VALID = {
    "model": "smollm2", "run": RUNS["smollm2"], "study": bundled("study"), "plan": bundled("plan"),
    "results": bundled("results"), "timeline": bundled("timeline"), "tokens": "3,17", "story": bundled("story"),
    "with": RUNS["books-5m"], "probe": "all queries", "skip_first": "1", "over": "one text", "map": "alr",
    "verdicts": "follows the paper", "kv": "1", "view": "Scatter", "layer": "7", "head": "5", "pinned": "1.3",
    "below": "Many texts", "query": "2", "policy": "keydiff", "keep": "0.25", "window": "8", "first": "4",
    "skip": "0,2", "dtype": "float16", "gpu": "A100 SXM (80 GB)", "cache_tokens": "8192", "batch": "4",
    "max_ppl": "1.05", "max_points": "7.0", "min_excerpts": "20", "min_samples": "60", "full_finds": "0.8",
    "strategy": "by_head", "demo": "Live", "beside": "keydiff", "beside_keep": "0.25", "told": bundled("story", at=1),
    "task": "needle", "and": bundled("results", at=1),
}  # fmt: skip
"""What each parameter may say, other than its default; a job is none that a fresh server has."""
BEYOND = {"layer": "99", "head": "99", "pinned": "99.0", "kv": "99", "skip": "99"}
"""What another model may have, and not this one."""


@pytest.fixture(autouse=True)
def opens_on_smollm2(monkeypatch):
    monkeypatch.setenv("L2KV_DEMO", "smollm2")


def shown(**params):
    """Parameters of the address after a fresh session has opened one, and what the page said."""

    def script():
        import streamlit as st

        from app import address, state
        from app.components import progress
        from app.engine import Engine
        from app.jobs import Jobs

        address.read(engine := Engine())
        progress.current(Jobs(engine), on_done=print)
        for said in state.notices():
            st.warning(said)
        address.write()

    page = AppTest.from_function(script, default_timeout=60)
    for name, value in params.items():
        page.query_params[name] = value
    page.run()
    assert not page.exception
    return {name: "".join(values) for name, values in page.query_params.items()}, [said.value for said in page.warning]


def test_an_empty_address_becomes_that_of_the_first_model_and_its_run():
    told, said = shown()
    assert told["model"] == "smollm2" and told["run"] == RUNS["smollm2"] and told["keep"] == "0.5" and not said


def test_what_one_session_wrote_another_shows():
    asked = {
        "model": "books-5m",
        "run": RUNS["books-5m"],
        "layer": "2",
        "head": "5",
        "pinned": "1.3",
        "policy": "keydiff",
        "keep": "0.25",
        "window": "8",
        "skip": "0,1",
        "map": "alr",
        "probe": "all queries",
        "skip_first": "1",
    }
    told, said = shown(**asked)
    assert {name: told[name] for name in asked} == asked and not said
    assert shown(**told) == (told, [])


def test_a_run_by_its_id_alone_brings_its_model():
    told, _ = shown(run=RUNS["books-5m"])
    assert told["model"] == "books-5m"


def test_a_run_that_another_session_makes_does_not_take_the_place_of_the_one_on_screen(tmp_path, monkeypatch):
    from app import state

    monkeypatch.setenv("L2KV_HOME", str(tmp_path))
    monkeypatch.setattr("streamlit.session_state", {})
    shown = state.run_id()
    newer = library.WORKSPACE.add_file(library.path_of(shown), name="a copy")
    library.WORKSPACE._write(replace(newer, id="f" * 12))
    assert library.entries("run", model=state.model())[0].id != shown
    assert state.run_id() == shown


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("run", "0" * 12, "names a run that is not on this machine"),
        ("run", "../../etc/passwd", "names a run that is not on this machine"),
        ("keep", "7", "keep=7, which must be from 0.01 to 1"),
        ("keep", "nan", "must be from 0.01 to 1"),
        ("window", "x", "window=x, which is not a value that it can have"),
        ("policy", "best", "must be one of low_norm"),
        ("skip", "<b>", "must be numbers of layers, such as 0,1"),
        ("skip", "99", "skips layer 99; this model has 30"),
        ("layer", "31", "layer 31; this model has 30 layers"),
        ("pinned", "1.99", "layer 1, head 99"),
        ("pinned", "1", "not a value that it can have"),
    ],
)
def test_a_part_that_cannot_be_is_ignored_and_named(name, text, said):
    told, warnings = shown(**{name: text})
    assert len(warnings) == 1 and said in warnings[0]
    assert told == shown()[0]


def test_every_parameter_comes_back_as_it_was_sent():
    assert set(VALID) == set(state.IN_ADDRESS) - {"job"}
    assert shown(**VALID) == (VALID, [])


@pytest.mark.parametrize(("name", "text"), [*((name, "x!") for name in state.IN_ADDRESS), *BEYOND.items()])
def test_one_bad_parameter_drops_itself_alone_among_all_others_and_is_named(name, text):
    told, (said,) = shown(**VALID | {name: text})
    others = VALID.keys() - {name}
    assert {other: told.get(other) for other in others} == {other: VALID[other] for other in others}
    assert {"with": "a run", "and": "results", "told": "a story"}.get(name, name) in said


def test_a_link_of_one_text_names_its_study_too():
    assert shown(over="one text")[0]["study"] == bundled("study")


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("/no/such", "must be allowed by whoever runs the app"),
        ("books-5n", "Did you mean books-5m?"),
        ("no such name", "No such model"),
        ("nobody/nothing-here", "could not be fetched"),
        ("{folders}/encoder", "decoder"),
        ("{folders}/empty", "has no config.json"),
        ("{folders}/quantised", "is quantised"),
    ],
)
def test_a_model_that_cannot_be_is_refused_where_it_is_named_and_the_one_before_stays(ref, said, tmp_path, monkeypatch):
    monkeypatch.setenv("L2KV_MODEL_DIRS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    configs = {
        "encoder": {"model_type": "bert", "architectures": ["BertModel"]},
        "quantised": {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}},
        "empty": None,
    }
    for name, config in configs.items():
        (folder := tmp_path / name).mkdir()
        (folder / "model.safetensors").touch()
        if config:
            (folder / "config.json").write_text(json.dumps(config))
    ref = ref.replace("{folders}", str(tmp_path))
    told, warnings = shown(model=ref, run="0" * 12, layer="99", skip="50", keep="0.25")
    (warning,) = (text.replace("\\", "") for text in warnings)
    assert said in warning and "smollm2 stays on screen" in warning
    assert told == shown(keep="0.25")[0]


def test_settings_of_another_model_are_refused_even_if_there_is_no_run_to_hold_them_against(tmp_path, monkeypatch):
    monkeypatch.setenv("L2KV_MODEL_DIRS", str(tmp_path))
    shutil.copytree(BUNDLED / "books-5m", tmp_path / "mine")
    told, warnings = shown(model=str(tmp_path / "mine"), layer="99", head="1", skip="0,99", kv="9", pinned="1.50")
    assert told["model"] == str(tmp_path / "mine") and told["skip"] == "0"
    assert not {"layer", "pinned", "kv"} & {name for name in told if name != "layer"} and told["layer"] == "0"
    for said in (
        "layer 99; this model has 6 layers",
        "skips layer 99; this model has 6",
        "kv head 9",
        "layer 1, head 50",
    ):
        assert sum(said in warning for warning in warnings) == 1, said


def test_records_of_another_model_are_refused():
    plans = {entry.model: entry.id for entry in library.entries("plan") if library.is_bundled(entry.id)}
    told, (warning,) = shown(model="books-5m", plan=plans["smollm2"])
    assert "names a plan of smollm2" in warning and "plan" not in told
