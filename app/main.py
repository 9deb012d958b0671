"""The app's entry: `make app`, or `streamlit run app/main.py`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

# `streamlit run` puts this folder on the path, not the one that holds the packages.
sys.path.insert(0, str(Path(__file__).parents[1]))

import streamlit as st

from analysis.errors import UserError
from analysis.models.memory import free_bytes
from analysis.words import human_bytes
from app import address, header
from app.components import markup
from app.engine import Engine
from app.jobs import Jobs
from app.screens import demo, evaluate, tune
from app.screens import help as help_page
from app.views import capture, generate, heads, plan, skip, texts
from l2kv.errors import SpecError

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

ICON = Path(__file__).parent / "assets" / "icon.png"  # a named icon would be fetched from elsewhere
TITLE = "Does low norm predict attention?"
_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")  # an app that listens there can be reached by its operator alone


@st.cache_resource
def engine() -> Engine:
    """The one engine of this server."""
    return Engine(any_folder=st.get_option("server.address") in _THIS_MACHINE)


@st.cache_resource
def jobs() -> Jobs:
    """The jobs of this server."""
    return Jobs(engine())


def _drawn(page: Callable[[], None]) -> Callable[[], None]:
    """Draw a page below the header, and write its address."""

    def draw() -> None:
        address.read()
        header.draw(engine(), jobs())
        page()
        address.write()

    return draw


def _status(place: DeltaGenerator) -> None:
    """The model in memory, and who is at work."""
    loaded = engine().loaded
    if loaded is None:
        model = "no model in memory (the first run loads one)"
    else:
        stored = (
            f"stored as {loaded.stored}, computed and cached in " if loaded.stored not in ("", loaded.dtype) else ""
        )
        model = f"{markup.plain(loaded.name)} in memory, {stored}{loaded.dtype} on {loaded.device}"
    device = loaded.device if loaded else "cpu"
    busy = f" · {engine().waiting} at work or waiting" if engine().waiting else ""
    place.caption(f":material/memory: {model} · {human_bytes(free_bytes(device))} free{busy}")


def main() -> None:
    """Draw the page that the address names."""
    st.set_page_config(page_title=TITLE, page_icon=str(ICON), layout="wide")
    heads_page = st.Page(heads.page, title="Heads", icon=":material/grid_view:", default=True)
    also_heads = st.Page(lambda: heads.page(), title="Heads", url_path="heads", visibility="hidden")  # an address too
    capture_page = st.Page(
        lambda: capture.page(engine(), heads_page), title="Capture", icon=":material/photo_camera:", url_path="capture"
    )
    texts_page = st.Page(lambda: texts.page(engine()), title="Texts", icon=":material/library_books:", url_path="texts")
    skip_page = st.Page(
        lambda: skip.page(engine(), generate_page), title="Skip layers", icon=":material/layers:", url_path="skip"
    )
    plan_page = st.Page(
        lambda: plan.page(engine(), generate_page), title="Plan", icon=":material/savings:", url_path="plan"
    )
    generate_page = st.Page(
        lambda: generate.page(engine()), title="Generate", icon=":material/compare:", url_path="generate"
    )
    tune_page = _drawn(lambda: tune.draw(engine(), jobs()))
    evaluate_page = _drawn(lambda: evaluate.draw(engine(), jobs()))
    demo_page = _drawn(lambda: demo.draw(engine(), jobs()))
    new = [
        st.Page(evaluate_page, title="Evaluate", icon=":material/science:", url_path="evaluate"),
        st.Page(tune_page, title="Tune", icon=":material/tune:", url_path="tune"),
        st.Page(demo_page, title="Demo", icon=":material/slideshow:", url_path="demo"),
        st.Page(_drawn(help_page.draw), title="Help", icon=":material/help:", url_path="help"),
    ]
    pages = [*new, heads_page, also_heads, capture_page, texts_page, skip_page, plan_page, generate_page]
    page = st.navigation(pages, position="top")
    st.html(markup.PAGE_STYLE)
    status = None if page in new else st.empty()  # new pages have it in their header
    if status:
        _status(status)
    try:
        page.run()
    except (UserError, SpecError) as error:
        st.error(markup.plain(str(error)), icon=":material/error:")
    except Exception:
        logging.getLogger(__name__).exception("page %s", page.title)
        st.error(
            "Something went wrong that should not have. What you had on screen is kept; the server's log has the "
            "details.",
            icon=":material/bug_report:",
        )
    if status:
        _status(status)  # again: the page may have loaded a model


main()
