"""How long the app's first chart takes beside that of a bare Streamlit page, in Chromium, and how much is sent for it.

    python -m tests.bench_app [RUN.safetensors] [--times 3]

The bare page is one Plotly chart, a metric and a table. Each visit begins with an empty browser; "cold" is the first to
a server that has just come up, "warm" the second. A chart counts when it is drawn and a frame has been shown since.
RUN, a saved run, takes the place of the demo run.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).parents[1]
BARE = """
import numpy as np
import plotly.graph_objects as go
import streamlit as st

st.set_page_config(layout="wide")
values = np.random.default_rng(0).uniform(-1, 1, (30, 9))
st.metric("A metric", 1)
st.plotly_chart(go.Figure(go.Heatmap(z=values)))
st.dataframe({"layer": np.arange(30), "value": values[:, 0]})
"""
OTHER_RUN = """
import dataclasses
import sys
from pathlib import Path

from analysis.demo import presets

demo, bundled = Path(sys.argv[1]), presets.bundled_results
presets.bundled_results = lambda model: dataclasses.replace(bundled(model), demo=demo)
from app.__main__ import main

main(sys.argv[2:])
"""
DRAWN = """() => {
    const chart = '.js-plotly-plot .main-svg image, [data-testid=stEChartsChart] canvas';
    if (!document.querySelector(chart)) return false;
    window.drawnAt ??= performance.now();
    return performance.now() > window.drawnAt;  // a frame later
}"""
SETTLED = """() => {
    const done = document.querySelector('[data-test-script-state=notRunning]');
    if (!done || document.querySelector('.st-key-first_chart')) window.busyAt = performance.now();
    return performance.now() - (window.busyAt ??= performance.now()) > 1000;
}"""


@dataclass(frozen=True, slots=True)
class Visit:
    """One visitor's first sight of a page."""

    chart: float  # seconds from the request to the first chart
    all: float  # and until the page is whole
    session: int  # bytes that its script sent until then
    files: int  # bytes of the page itself, compressed as they were sent


@contextmanager
def served(*command: str) -> Iterator[str]:
    """The address of a fresh server that Python starts with a command, once it is up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--server.headless=true", f"--server.port={port}", "--server.fileWatcherType=none")
    server = subprocess.Popen([sys.executable, *command, *options], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None, "the server did not come up"
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def visit(browser: Browser, address: str) -> Visit:
    """Open the page in an empty browser, and wait for its first chart."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60_000)
    session, files = [], []
    network = context.new_cdp_session(page)
    network.send("Network.enable")
    network.on("Network.loadingFinished", lambda event: files.append(event["encodedDataLength"]))
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: session.append(len(frame))))
    began = time.perf_counter()
    page.goto(address, wait_until="commit")
    page.wait_for_function(DRAWN, polling="raf")
    chart = time.perf_counter() - began
    page.wait_for_function(SETTLED, polling=20)
    whole = time.perf_counter() - began - 1  # it has been so for a second
    context.close()
    return Visit(chart, whole, sum(session), int(sum(files)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--times", type=int, default=3)
    arguments = parser.parse_args()
    if shutil.which("chromium") is None:
        sys.exit("There is no chromium on this machine: apt install chromium.")
    visits: dict[tuple[str, str], list[Visit]] = {}
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "bare.py"
        page.write_text(BARE, encoding="utf-8")
        bare = ("-m", "streamlit", "run", str(page))
        ours = ("-c", OTHER_RUN, str(arguments.run.resolve())) if arguments.run else ("-m", "app")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        visit_nothing = browser.new_context()  # the browser itself is warm before anything is timed
        visit_nothing.new_page().goto("about:blank")
        for _ in range(arguments.times):
            for name, command in (("bare", bare), ("ours", ours)):  # in turn: a busy machine slows both
                with served(*command) as address:
                    for state in ("cold", "warm"):
                        visits.setdefault((state, name), []).append(visit(browser, address))
        browser.close()
    print(f"medians of {arguments.times}")
    print("       page   first chart   whole page     session       files")
    for state in ("cold", "warm"):
        for name in ("bare", "ours"):
            seen = visits[state, name]
            chart, whole = (statistics.median(getattr(v, what) for v in seen) for what in ("chart", "all"))
            print(
                f"{state:5}  {name:5}  {chart:9.2f} s  {whole:9.2f} s  {seen[-1].session / 1e3:7.0f} kB  "
                f"{seen[-1].files / 1e3:7.0f} kB"
            )
        ratios = [o.chart / b.chart for o, b in zip(visits[state, "ours"], visits[state, "bare"], strict=True)]
        print(f"{state:5}  ratio  {statistics.median(ratios):9.2f} times (from {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
