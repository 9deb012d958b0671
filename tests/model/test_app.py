"""The parts of the app that need no browser: escaping, the queue for the model, the pages as Streamlit runs them."""

import re
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from analysis import ModelError, TextError
from app import engine as engine_module
from app import session, state
from app.components import choices, controls, jobs, markup, uploads
from app.engine import Engine, check_allowed
from app.views.generate import Column, Parting, Preview
from l2kv import POLICIES
from tests.support.paths import BUNDLED, ROOT

HOSTILE = [
    "<b>",
    "$x$",
    "![i](http://e)",
    "\u202e",
    "\x00",
    "&lt;",
    "<img src=x onerror=alert(1)>",
    "a\nb",
    "\ud800",
    "</div>",
]


def test_no_token_becomes_html():
    strip = markup.token_strip(HOSTILE, [i % 2 == 0 for i in range(len(HOSTILE))])
    body = strip.split("</style>")[1]
    assert body.count("<span") == len(HOSTILE) and body.count("</div>") == 1
    assert not any(tag in body for tag in ("<b>", "<img", "\x00", "\u202e"))
    assert "&lt;b&gt;" in body and "&amp;lt;" in body and "U+202E" in body
    body.encode("utf-8")  # no lone surrogate is left
    assert body.count("l2kv-kept") == body.count("l2kv-gone") == 5


def test_generated_text_is_marked_from_the_first_difference_and_escaped():
    page = markup.generated("<p>", "same <i>other", 5)
    body = page.split("</style>")[1]
    assert '&lt;p&gt;</span>same <span class="l2kv-differs">&lt;i&gt;other</span>' in body
    assert "l2kv-differs" not in markup.generated("p", "same").split("</style>")[1]


def test_markdown_of_users_is_shown_not_rendered():
    for text in HOSTILE[:3]:
        plain = markup.plain(text)
        assert all(c.isalnum() or c in "/ =" or plain[i - 1] == "\\" for i, c in enumerate(plain) if c != "\\")


def test_a_long_strip_leaves_out_its_middle():
    n = markup.MOST_TOKENS + 50
    body = markup.token_strip(["x"] * n, np.ones(n, bool))
    assert "50 tokens not shown" in body and body.count("<span") == markup.MOST_TOKENS


@pytest.fixture
def loads(monkeypatch):
    """An engine whose models are their names, and the list of what was loaded."""
    loaded = []
    monkeypatch.setattr(engine_module, "load_model", lambda ref: loaded.append(ref) or ref)
    return loaded


def ignore(*_):
    pass


def test_sessions_take_turns_in_the_order_they_came(loads):
    engine, order, waits = Engine(), [], []
    inside = threading.Event()

    def session(name):
        with engine.turn("m", on_wait=lambda ahead: waits.append((name, ahead)), on_load=ignore):
            order.append(name)
            inside.set()
            time.sleep(0.5)

    threads = [threading.Thread(target=session, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2] and loads == ["m"] and engine.waiting == 0
    assert (1, 1) in waits and (2, 2) in waits and (2, 1) in waits and not any(name == 0 for name, _ in waits)


def test_giving_up_while_waiting_or_working_frees_the_place(loads):
    engine = Engine()

    class Closed(BaseException):
        pass

    def close(*_):
        raise Closed

    with engine.turn("a", on_wait=ignore, on_load=ignore):
        with pytest.raises(Closed), engine.turn("a", on_wait=close, on_load=ignore):
            pass
        assert engine.waiting == 1
    with pytest.raises(Closed), engine.turn("a", on_wait=ignore, on_load=ignore):
        raise Closed
    assert engine.waiting == 0


def test_one_model_is_resident_and_a_failed_load_leaves_none(loads, monkeypatch):
    engine = Engine()
    for ref in ("a", "a", "b"):
        with engine.turn(ref, on_wait=ignore, on_load=ignore) as loaded:
            assert loaded == ref
    assert loads == ["a", "b"]

    def fail(ref):
        assert engine.loaded is None  # the old one is gone before the new one comes
        raise ModelError("no")

    monkeypatch.setattr(engine_module, "load_model", fail)
    with pytest.raises(ModelError), engine.turn("c", on_wait=ignore, on_load=ignore):
        pass
    assert engine.loaded is None and engine.ref is None


def test_folders_are_opened_only_where_the_operator_allowed(monkeypatch, tmp_path):
    monkeypatch.delenv("L2KV_MODEL_DIRS", raising=False)
    for ref in (str(BUNDLED), "./analysis", "~", "analysis", "../x", "/no/such"):
        with pytest.raises(ModelError, match="L2KV_MODEL_DIRS"):
            check_allowed(ref)
    assert check_allowed(str(BUNDLED), any_folder=True) == str(BUNDLED)  # an app that listens on 127.0.0.1 alone
    with pytest.raises(ModelError, match="There is no folder or file"):
        check_allowed("/no/such/folder", any_folder=True)
    monkeypatch.setenv("L2KV_MODEL_DIRS", str(BUNDLED.parent))
    assert check_allowed(str(BUNDLED)) == str(BUNDLED)
    assert str(BUNDLED) in engine_module.allowed_models()
    (tmp_path / "link").symlink_to(BUNDLED)
    assert check_allowed(str(tmp_path / "link")) == str(BUNDLED)
    with pytest.raises(ModelError):
        check_allowed(f"{BUNDLED}/../../..")
    assert check_allowed(" Qwen/Qwen3-0.6B ") == "Qwen/Qwen3-0.6B" and check_allowed("books-5m") == "books-5m"


@pytest.mark.parametrize("ref", ["x" * 5000, "a/b\0c", "~nobody-at-all/model"])
def test_what_can_be_no_model_is_refused_in_a_line(ref):
    with pytest.raises(ModelError, match="neither the id of a model nor a folder"):
        check_allowed(ref)


def test_a_bundled_model_that_is_misspelt_is_named_at_once():
    with pytest.raises(ModelError, match="Did you mean books-5m"):
        check_allowed("book-5m")


def test_uploads_are_text_or_refused():
    def file(data):
        return SimpleNamespace(name="notes.txt", getvalue=lambda: data)

    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert uploads.decoded(file("déjà vu 😀".encode(encoding))) == "déjà vu 😀"
    for data in ("déjà".encode("latin-1"), bytes(range(256)), b"a\0b", b"\xff\xfea"):
        with pytest.raises(TextError, match=r"notes\.txt"):
            uploads.decoded(file(data))


def step(ids, text):
    from analysis.preview import Step

    return Step(tuple(ids), text, held=(1,), nbytes=1, slack_nbytes=0, finished=False)


def preview(columns=1):
    return Preview("p", tuple(Column(f"column {i}", controls.current_spec()) for i in range(columns)))


def test_a_preview_remembers_where_the_texts_parted():
    parted = preview()
    parted.add(step([1], "a"), step([1], "a"))
    parted.add(step([1, 2], "ab"), step([1, 3], "ac"))
    parted.add(step([1, 2, 4], "abd"), step([1, 3, 4], "acd"))
    assert parted.partings == [Parting(tokens=1, characters=1)]
    other = preview()
    other.add(step([1], "a"), step([2], "b"))
    assert other.partings == [Parting(0, 0)]
    ended = preview()
    ended.add(step([1], "a"), step([1], "a"))
    ended.add(step([1, 2], "ab"), step([1], "a"))  # the compressed one ended its text
    assert ended.partings == [Parting(1, 1)]


def test_each_column_of_a_preview_is_compared_with_the_full_cache_by_itself():
    both = preview(2)
    both.add(step([1], "a"), step([1], "a"), step([5], "e"))
    both.add(step([1, 2], "ab"), step([1, 2], "ab"), step([5, 2], "eb"))
    both.add(step([1, 2, 3], "abc"), step([1, 2, 4], "abd"), step([5, 2, 3], "ebc"))
    assert both.partings == [Parting(2, 2), Parting(0, 0)]
    assert both.agreement(0) == both.agreement(1) == 2 / 3  # token by token, also after they parted


def test_a_task_is_decided_once_every_cache_has_answered_and_a_chat_is_read_to_its_end():
    for chat in (False, True):
        asked = Preview("p", (Column("compressed", controls.current_spec()),), answer="48213", chat=chat)
        asked.add(step([1], " 48"), step([1], " 7"))
        assert not asked.decided
        asked.add(step([1, 2], " 48213"), step([1, 2], " 77"))
        assert asked.decided is not chat
    plain = preview()
    plain.add(step([1], " 48213"), step([1], " 48213"))
    assert not plain.decided  # nothing is right or wrong


def test_bytes_are_told_in_the_dtype_of_the_checkpoint():
    shown = preview()
    shown.cache_dtype, shown.counted_dtype = "bfloat16", "float32"
    assert shown.nbytes(4096) == "2.0 KiB"


def test_nouns_are_counted_as_people_do():
    assert [markup.counted(n, "token") for n in (0, 1, 2, 4096)] == ["0 tokens", "1 token", "2 tokens", "4,096 tokens"]


def test_the_first_sentence_of_an_answer_is_its_headline():
    told = markup.headline("Mostly yes. In 3 of 4 heads so; Γ +0.13. Layer 0: so.")
    assert told.splitlines()[0] == "##### Mostly yes." and "In 3 of 4" in told.splitlines()[2]
    assert markup.headline("It cannot tell.") == "##### It cannot tell\\."


def test_every_value_of_the_session_has_a_key_of_its_own_and_a_home_in_one_file():
    keys = [slot.key for slot in vars(state).values() if isinstance(slot, state.Slot)]
    assert len(keys) == len(set(keys)) > 20
    for file in [*(ROOT / "app" / "components").glob("*.py"), ROOT / "app" / "main.py"]:
        named = re.findall(r"""(?:session_state\W+|key=)["'](\w+)["']""", file.read_text(encoding="utf-8"))
        assert not set(named) & set(keys), (file, named)


def test_a_job_tells_every_stage_and_what_it_gives_to_one_callback_without_a_page(loads, monkeypatch):
    monkeypatch.setattr(engine_module, "model_folder", lambda ref, progress: progress(1, 4, "Fetching x"))
    monkeypatch.setattr(engine_module, "loading_note", lambda ref: "")
    told = []

    def work(loaded, progress):
        progress(1, 2, "texts")
        return loaded.upper()

    def watch(*step):
        told.append(jobs.told(*step))

    assert jobs.Job("id", "Go", "books-5m", work).perform(Engine(), watch) == "BOOKS-5M"
    assert told == ["Fetching x: 25%", "Loading books-5m … ", "Running …", "1 of 2 texts"]


def test_what_a_progress_raises_cancels_a_job_and_frees_its_turn(loads, monkeypatch):
    monkeypatch.setattr(engine_module, "model_folder", lambda ref, progress: None)
    engine = Engine()

    def cancel(done, total, what):
        if what == "texts":
            raise KeyboardInterrupt

    job = jobs.Job("id", "Go", "books-5m", lambda loaded, progress: progress(1, 2, "texts"))
    with pytest.raises(KeyboardInterrupt):
        job.perform(engine, cancel)
    assert engine.waiting == 0


def test_every_policy_that_needs_no_calibration_is_offered():
    assert set(choices.policies()) == {name for name, policy in POLICIES.items() if not policy.needs_calibration}


def test_a_policy_that_is_registered_is_offered_with_its_title_and_its_line():
    def page():
        from app.components import controls

        controls.policy_input()

    POLICIES.register("toy", replace(POLICIES["random"], title="A toy"))
    try:
        box = AppTest.from_function(page, default_timeout=60).run().selectbox(key="policy")
    finally:
        POLICIES.remove("toy")
    assert "A toy" in box.options and f"- **A toy**: {POLICIES['random'].about}" in box.help


def test_a_preset_sets_the_controls_to_its_compression():
    def page():
        import streamlit as st

        from app.components import controls
        from l2kv import CompressionSpec

        if st.button("take"):
            controls.take_spec(CompressionSpec(keep_ratio=0.25, policy="keydiff", skip_layers=(1,), protect_last=0))
        st.write(repr(controls.current_spec()))

    app = AppTest.from_function(page, default_timeout=60).run()
    assert "keep_ratio=0.5" in app.markdown[0].value
    app.button[0].click().run()
    told = app.markdown[0].value
    assert all(part in told for part in ("keep_ratio=0.25", "policy='keydiff'", "skip_layers=(1,)", "protect_last=0"))


def test_a_policy_that_a_page_does_not_know_gives_way_to_the_papers():
    def page():
        from app.components import controls

        controls.policy_input(controls.BY_NORM)

    app = AppTest.from_function(page, default_timeout=60)
    app.session_state["policy"] = "keydiff"
    app.run()
    assert not app.exception and app.selectbox(key="policy").value == "low_norm"


def test_what_was_worked_out_of_a_run_is_kept_until_another_is_asked_of(monkeypatch):
    monkeypatch.setattr(session.st, "session_state", {})
    asked = []

    @session.remembered
    def double(numbers, times):
        asked.append(times)
        return [times * number for number in numbers]

    one, other = [1, 2], [1, 2]  # equal, but not the same
    assert double(one, 2) == [2, 4] == double(one, 2) and asked == [2]
    assert double(other, 2) == [2, 4] and asked == [2, 2]
    for times in range(3, 30):
        double(other, times)
    assert sum(len(answers) for _, answers in session.st.session_state["remembered"].values()) == 16


def test_a_browser_gets_the_first_chart_alone_until_it_has_drawn_it_or_for_long_enough(monkeypatch):
    from app.components import charts

    def page():
        import streamlit as st

        from app.components import charts

        st.write("all" if charts.first_is_drawn() else "the first")

    def told(app):
        assert not app.run().exception
        return app.markdown[0].value

    assert told(AppTest.from_function(page)) == "all"  # no browser: nothing to wait for
    monkeypatch.setattr(charts, "_in_a_browser", lambda: True)
    app, slow = AppTest.from_function(page), AppTest.from_function(page)
    assert told(app) == told(app) == told(slow) == "the first"
    app.session_state["chart_drawn"] = True
    monkeypatch.setattr(charts, "LONGEST_WAIT", 0)
    assert told(app) == told(slow) == "all"


def test_what_was_worked_out_of_the_demo_run_is_kept_for_all_sessions(monkeypatch):
    asked = []

    @session.remembered
    def tokens(run, times):
        asked.append(times)
        return times * run.n_tokens

    for own in ({}, {}):
        monkeypatch.setattr(session.st, "session_state", own)
        assert tokens(session.demo_run(), 2) == 2 * session.demo_run().n_tokens
        assert asked == [2] and not own


def test_what_is_to_be_known_of_special_tokens_is_said_beside_the_result():
    def page():
        import streamlit as st

        from app.components import jobs

        if "told" not in st.session_state:
            st.session_state.update(told=True, work_done=True, notes=("The end token, </s>, is left out.",))
        jobs.run(None, jobs.Job("work", "Run", "any", None))

    app = AppTest.from_function(page, default_timeout=60).run()
    assert not app.exception and [info.value for info in app.info] == [r"The end token, \</s\>, is left out\."]
    assert not app.run().info  # once
