"""`python -m app`: the app on this machine; Streamlit's own options may follow."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path


def main(options: Sequence[str] = ()) -> None:
    """Serve the app until it is stopped."""
    threading.Thread(target=_make_ready, daemon=True).start()
    from streamlit.web import cli

    sys.argv = ["streamlit", "run", str(Path(__file__).with_name("main.py")), *options]
    cli.main()


def _make_ready() -> None:
    """Import and compute what the first page needs while a browser loads the frame around it."""
    from streamlit.runtime import Runtime

    while not Runtime.exists():  # parts of pages are registered with it
        time.sleep(0.01)
    from analysis.defaults import PROBE
    from analysis.demo.presets import demo_model
    from app import library
    from app.screens import explore, verdict  # noqa: F401

    for kind in ("study", "run"):
        for entry in library.entries(kind, model=demo_model())[:1]:
            library.answer_of(entry.id, PROBE)


if __name__ == "__main__":
    main(sys.argv[1:])
