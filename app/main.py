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
from app import address, header
from app.components import markup
from app.engine import Engine
from app.jobs import Jobs
from app.screens import demo, evaluate, explore, tune, verdict
from app.screens import help as help_page
from l2kv.errors import SpecError

if TYPE_CHECKING:
    from streamlit.navigation.page import StreamlitPage

ICON = Path(__file__).parent / "assets" / "icon.png"  # a named icon would be fetched from elsewhere
TITLE = "Can I halve this KV cache?"
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
        address.read(engine())
        header.draw(engine(), jobs())
        page()
        address.write()

    return draw


def main() -> None:
    """Draw the page that the address names."""
    st.set_page_config(page_title=TITLE, page_icon=str(ICON), layout="wide")

    def by_path() -> dict[str, StreamlitPage]:
        return {page.url_path: page for page in pages}

    draw_verdict = _drawn(lambda: verdict.draw(engine(), jobs(), by_path()))
    pages = [
        st.Page(draw_verdict, title="Verdict", icon=":material/gavel:", default=True),
        st.Page(draw_verdict, title="Verdict", url_path="verdict", visibility="hidden"),  # an address like the others
    ]
    for name, icon, draw in (
        ("Explore", "grid_view", lambda: explore.draw(engine(), jobs(), by_path())),
        ("Evaluate", "science", lambda: evaluate.draw(engine(), jobs())),
        ("Tune", "tune", lambda: tune.draw(engine(), jobs())),
        ("Demo", "slideshow", lambda: demo.draw(engine(), jobs())),
        ("Help", "help", help_page.draw),
    ):
        pages.append(st.Page(_drawn(draw), title=name, icon=f":material/{icon}:", url_path=name.lower()))
    page = st.navigation(pages, position="top")
    st.html(markup.PAGE_STYLE)
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


main()
