"""The parts of the app that need no browser: escaping, the queue for the model, the pages as Streamlit runs them."""

import shutil
import threading
import time

import numpy as np
import pytest

from analysis import ModelError
from app import engine as engine_module
from app.components import markup
from app.engine import Engine, check_allowed
from app.jobs import Jobs
from tests.support.paths import BUNDLED
from tests.support.screens import opened

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


def test_a_model_that_cannot_be_is_refused_where_it_is_typed_and_the_one_before_stays(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    page = opened("evaluate")
    page.radio(key="model_choice_books-5m").set_value("Another model …").run()
    for ref, said in (("/no/such", "must be allowed"), ("smollm3", "Did you mean"), ("a/b", "could not be fetched")):
        page.text_input(key="model_other").set_value(ref)
        next(button for button in page.button if button.label == "Use this model").click().run()
        assert not page.exception and said in page.error[0].value and "stays" in page.error[0].value
        assert "".join(page.query_params["model"]) == "books-5m"


def test_an_own_folder_has_its_bytes_at_once_and_is_listed_after_a_reload(tmp_path, monkeypatch):
    monkeypatch.setenv("L2KV_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("L2KV_DEMO", "books-5m")
    folder = tmp_path / "mine"
    shutil.copytree(BUNDLED, folder)
    server = (engine := Engine(any_folder=True)), Jobs(engine)
    page = opened("verdict", server=server)
    page.radio(key="model_choice_books-5m").set_value("Another model …").run()
    page.text_input(key="model_other").set_value(str(folder))
    next(button for button in page.button if button.label == "Use this model").click().run()
    assert not page.exception and "".join(page.query_params["model"]) == str(folder)
    # 6 layers of 4 kv heads of 32 numbers, keys and values, 2 bytes
    assert {one.label: one.value for one in page.metric}["Cache of 4,096 tokens, bfloat16"] == "12.0 MiB → 6.0 MiB"
    assert "mine" in opened("verdict", server=server).radio(key="model_choice_books-5m").options
    shutil.rmtree(folder)
    assert "mine" not in opened("verdict", server=server).radio(key="model_choice_books-5m").options
