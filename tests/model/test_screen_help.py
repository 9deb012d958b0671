"""The page Help: it explains without a model, and shows that the numbers can be trusted."""

import pytest
from streamlit.testing.v1 import AppTest

from analysis.workspace import Workspace
from app import library


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "workspace")
    monkeypatch.setattr(library, "WORKSPACE", workspace)
    return workspace


def opened():
    def script():
        from app import address
        from app.engine import Engine
        from app.screens import help

        address.read(Engine())
        help.draw()
        address.write()

    page = AppTest.from_function(script, default_timeout=60).run()
    assert not page.exception
    return page


def test_there_is_one_title_and_each_word_of_the_header_is_explained():
    page = opened()
    assert [title.value for title in page.title] == ["Help"]
    text = "\n".join(part.value for part in page.markdown)
    words = ("token", "layer", "head", "attention", "norm", "keep ratio", "recent window", "skipped layers", "policy")
    words += ("payload", "attention sink", "perplexity", "passkey", "needle", "plan", "GO, NO-GO", "solid, hollow")
    for word in (*words, "temperature", "top-p", "seed", "chat template"):
        assert f"**{word}" in text, word
    assert text.index("reads a text as tokens") < text.index("KV cache")


def test_the_self_test_passes_and_says_what_it_measured():
    page = opened()
    page.button(key="self_test").click().run()
    assert not page.exception and len(page.success) == 1 and not page.error


def test_the_run_of_the_self_test_is_put_on_screen(workspace):
    page = opened()
    page.button(key="open_self_test").click().run()
    (entry,) = workspace.entries("run")
    assert "".join(page.query_params["run"]) == entry.id and "".join(page.query_params["model"]) == "synthetic"
