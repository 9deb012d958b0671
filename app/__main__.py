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
    from app import library, state
    from app.screens import explore  # noqa: F401

    library.answer_of(state.run_id(), state.PROBE.default)


if __name__ == "__main__":
    main(sys.argv[1:])
