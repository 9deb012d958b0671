"""Speed of the app in Chromium beside its goals and beside a bare Streamlit app, for the bundled run of each model.

    python -m tests.bench_app [--times 5] [--model smollm2] [--model books-5m]

The bare app has two pages: Explore's map and a head's chart, made beforehand, with a metric, a table and a slider; and
one line of text. Both apps take turns, so a busy machine slows both. A visit begins with an empty browser; "cold" is
the first to a server that has just come up. Times of actions are the browser's own: from the press of a key or button
to the frame after the one in which the answer stands. The server's CPU seconds depend least on what else runs. Bytes
are those of the websocket, both ways; Streamlit's own files, the same for every app, are beside them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from analysis.selftest import synthetic_run
from analysis.workspace import Workspace
from app import library
from app.figures import heat, positions
from tests.support.browser import served, settled

MODELS = ("smollm2", "books-5m")
PAGES = ("Explore", "Evaluate", "Tune", "Demo", "Help", "Verdict")
TITLES = dict(
    Verdict="Can I", Explore="Which", Evaluate="What does", Tune="Where should", Demo="Show me", Help="Help"
)  # fmt: skip
RUNS = 1000  # of the workspace that is listed
GOALS = {"page": 0.7, "cell": 0.3, "arrow": 0.3, "slider": 0.3}  # seconds, by the first word of what is done
TIMES_BARE = 1.6  # the first chart, of the bare app's
GOAL_LIST = 0.5  # seconds
GOAL_BYTES = 3e6
BARE = """
import json
from pathlib import Path
import numpy as np
import streamlit as st

st.set_page_config(layout="wide")
here = Path(__file__).parent
heat, head = (json.loads((here / name).read_text()) for name in ("heat.json", "head.json"))
heat["series"][0]["selectedMode"] = "single"

@st.fragment
def panes():
    left, right = st.columns([2, 3])
    with left:
        chosen = st.echarts_chart(heat, key="map_chart", height=HEIGHT, on_select="rerun")
    with right:
        st.markdown(f"#### {chosen.selection.selected}")
        st.slider("Position", 0, 100, key="step")
        step = st.session_state["step"]
        st.echarts_chart(head | {"title": {"text": str(step)}}, key="head", height=340, alt=f"Step {step}")

def charts():
    st.title("Charts")
    st.metric("A metric", 1)
    panes()
    st.dataframe({"layer": np.arange(30), "value": np.arange(30.0)})

def words():
    st.title("Words")

st.navigation([st.Page(charts, title="Charts", default=True), st.Page(words, title="Words")], position="top").run()
"""
SEEN = """() => {
    const chart = '.js-plotly-plot .main-svg image, .js-plotly-plot .points, [data-testid=stEChartsChart] canvas';
    if (!document.querySelector(chart)) return false;
    window.drawnAt ??= performance.now();
    return performance.now() > window.drawnAt;  // a frame later
}"""
# The script has ended, and nothing on the page is old or still being loaded.
WHOLE = """
    !!document.querySelector('[data-test-script-state=notRunning]') &&
    !document.querySelector('[data-stale=true], [data-testid=stSkeleton], .st-key-first_chart')"""
# The clock starts with the first press after it was set; it stops a frame after the answer stands.
STOPWATCH = """
for (const press of ['pointerdown', 'keydown'])
    addEventListener(press, () => { window.pressedAt ??= performance.now() }, true);
window.answered = stands => {
    if (window.pressedAt === undefined || !stands) return false;
    if (window.stoodAt === undefined) { window.stoodAt = performance.now(); return false }
    return performance.now() - window.pressedAt;
}"""


@dataclass
class Figures:
    """What was measured of an app, by name: seconds, CPU seconds of the server, and bytes."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    sent: dict[str, list[int]] = field(default_factory=dict)
    files: list[int] = field(default_factory=list)
    """Bytes of Streamlit's own files, compressed as they were sent."""


class Session:
    """A browser's visit to a server: what it takes and what is sent for it."""

    def __init__(self, browser: Browser, address: str, figures: Figures) -> None:
        self.figures, self.address, self.bytes, self.files = figures, address, 0, 0
        port = address.rpartition(":")[2]
        self.server = next(
            child for child in psutil.Process().children() if any(port in word for word in child.cmdline())
        )
        self.context = browser.new_context(viewport={"width": 1400, "height": 900})
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.page.add_init_script(STOPWATCH)
        network = self.context.new_cdp_session(self.page)
        network.send("Network.enable")
        network.on("Network.loadingFinished", self._loaded)
        self.page.on("websocket", self._listen)

    def _loaded(self, event: dict[str, int]) -> None:
        self.files += event["encodedDataLength"]

    def _listen(self, socket: object) -> None:
        for way in ("framereceived", "framesent"):
            socket.on(way, self._count)  # type: ignore[attr-defined]

    def _count(self, frame: bytes) -> None:
        self.bytes += len(frame)

    @contextmanager
    def _metered(self, name: str) -> Iterator[None]:
        began, sent = sum(self.server.cpu_times()[:2]), self.bytes
        yield
        settled(self.page)
        self.figures.cpu.setdefault(name, []).append(sum(self.server.cpu_times()[:2]) - began)
        self.figures.sent.setdefault(name, []).append(self.bytes - sent)

    def visit(self, path: str, name: str) -> None:
        """Open a page, and note when its first chart is seen."""
        with self._metered(name):
            began = time.perf_counter()
            self.page.goto(f"{self.address}/{path}", wait_until="commit")
            self.page.wait_for_function(SEEN, polling="raf")
            self.figures.seconds.setdefault(name, []).append(time.perf_counter() - began)
        self.figures.files.append(self.files)

    def act(self, name: str, act: Callable[[Page], object], answer: str) -> None:
        """Press something, and note when the answer, a condition in JavaScript, stands and the script has ended."""
        with self._metered(name):
            self.page.evaluate("window.pressedAt = window.stoodAt = undefined; window.busyAt = undefined")
            act(self.page)
            took = self.page.wait_for_function(f"() => answered(({answer}) && ({WHOLE}))", polling="raf").json_value()
            self.figures.seconds.setdefault(name, []).append(took / 1000)

    def close(self) -> None:
        self.context.close()


def drawn(key: str, alt: str) -> str:
    """Condition: the chart of that key is drawn, and its alternative text holds a regular expression."""
    label = f"document.querySelector('.st-key-{key} [data-testid=stEChartsChart]')?.ariaLabel"
    return f"/{alt}/.test({label})"


def opened(head: str) -> str:
    """Condition: the head of that name, a regular expression, is open, and its chart drawn."""
    shown = drawn("by_position_a", f"{head},")
    return f"/^{head}:/.test(document.querySelector('.st-key-explore h4').innerText) && {shown}"


def click_cell(page: Page, layer: int, head: int, shape: tuple[int, int]) -> None:
    """Click a cell of Explore's map, inside the frame of `app.figures.heat`."""
    box = page.locator(".st-key-map_chart canvas").first.bounding_box()
    assert box is not None
    x = box["x"] + 38 + (box["width"] - 44) * (head + 0.5) / shape[1]
    y = box["y"] + 22 + (box["height"] - 80) * (layer + 0.5) / shape[0]
    page.mouse.move(x - 2, y - 2)
    page.mouse.click(x, y)


def ours(session: Session, model: str, shape: tuple[int, int], round_: int) -> None:
    """What a user does in the app."""
    layer, head = shape[0] // 2 + round_ % 2, 1
    for moved in (0, 1):
        name = f"L{layer} KV"
        head += moved
        session.act(
            "cell click", lambda page, head=head: click_cell(page, layer, head, shape),
            opened(rf"{name}\d+ Q{head}"),
        )  # fmt: skip
    session.act(
        "arrow key", lambda page: page.keyboard.press("ArrowUp"),
        opened(rf"L{layer - 1} KV\d+ Q{head}"),
    )  # fmt: skip
    _keep_ratio(session, "slider on Explore", "document.querySelector('.st-key-explore').innerText")
    for page in PAGES[1:] + PAGES[:1]:
        session.act(
            f"page {page}", lambda at, page=page: at.get_by_role("link", name=page, exact=True).first.click(),
            f"document.querySelector('h1')?.innerText.startsWith('{TITLES[page]}')",
        )  # fmt: skip
        if page == "Verdict":
            _keep_ratio(session, "slider on Verdict", "document.querySelector('.st-key-answer').innerText")


def _keep_ratio(session: Session, name: str, told: str) -> None:
    """Move the keep ratio of the header by a step, and wait until what is told of it is another."""
    page = session.page
    page.locator(".st-key-header").get_by_role("button", name=re.compile("keep")).first.click()
    slider = page.get_by_role("slider", name="Keep ratio")
    slider.wait_for()
    settled(page)
    page.evaluate(f"window.before = {told}")
    session.act(name, lambda page: _move(slider), f"{told} !== window.before")
    page.keyboard.press("Escape")
    settled(page)


def _move(slider: Locator) -> None:
    slider.focus()
    slider.press("ArrowLeft")


def bare(session: Session, shape: tuple[int, int]) -> None:
    """The same in the bare app."""
    page = session.page
    for head in (1, 2):
        page.evaluate("window.before = document.querySelector('h4').innerText")
        session.act(
            "cell click", lambda page, head=head: click_cell(page, shape[0] // 2, head, shape),
            "document.querySelector('h4').innerText !== window.before",
        )  # fmt: skip
    session.act("slider", lambda page: page.get_by_role("slider").press("ArrowRight"), drawn("head", "Step 1"))
    for title in ("Words", "Charts"):
        session.act(
            f"page {title}", lambda page, title=title: page.get_by_role("link", name=title, exact=True).first.click(),
            f"document.querySelector('h1')?.innerText === '{title}'",
        )  # fmt: skip


def bare_app(folder: Path, model: str) -> tuple[str, ...]:
    """Write the bare app, and return the command that serves it."""
    run = library.run(library.entries("run", model=model)[0].id)
    shape = (run.n_layers, run.n_heads)
    gamma = library.values_of(library.entries("run", model=model)[0].id, 0).of("gamma")
    names = np.array([f"L{layer} Q{head}" for layer, head in np.ndindex(shape)]).reshape(shape)
    map_ = heat.clickable_map(gamma, heat.Scale("Γ", diverging=True), kv_heads=run.n_kv_heads, names=names, notes=names)
    half = np.arange(run.n_tokens) % 2 == 0
    head = positions.norm_and_attention(
        run.key_norm[0, 0], run.probe_attention[0, 0].astype(float), run.labels, kept=half, height=340
    )
    folder.mkdir()
    (folder / "heat.json").write_text(json.dumps(map_), encoding="utf-8")
    (folder / "head.json").write_text(json.dumps(head), encoding="utf-8")
    page = folder / "bare.py"
    page.write_text(BARE.replace("HEIGHT", str(heat.map_height(run.n_layers))), encoding="utf-8")
    return ("-m", "streamlit", "run", str(page))


def listing(home: Path) -> list[float]:
    """Seconds to list a workspace of `RUNS` runs: in a process that has not seen it, then again."""
    workspace, run = Workspace(home / "workspace"), synthetic_run()
    for i in range(RUNS):
        workspace.add(replace(run, text=f"{run.text} {i}"), name=f"run {i}")
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        assert len(Workspace(home / "workspace").entries("run")) == RUNS
        seconds.append(time.perf_counter() - began)
    return seconds


def told(model: str, of: dict[str, Figures]) -> None:
    """Print medians, each beside its goal."""
    print(f"\n{model}: seconds (lowest to highest), CPU seconds of the server, kB of the websocket, goal")
    median = statistics.median
    for name, figures in of.items():
        for what, seconds in figures.seconds.items():
            goal = f"{GOALS[what.split()[0]]} s" if what.split()[0] in GOALS else ""
            if what.startswith("first chart"):
                goal = f"{median(seconds) / median(of['bare'].seconds[what]):.2f} times bare, goal {TIMES_BARE}"
            print(
                f"  {name}  {what:18} {median(seconds):5.2f} ({min(seconds):.2f} to {max(seconds):.2f})  "
                f"{median(figures.cpu[what]):5.2f}  {median(figures.sent[what]) / 1e3:6.1f}  {goal}"
            )
        most = max(median(sent) for sent in figures.sent.values()) / 1e6
        print(f"  {name}  at most {most:.2f} MB a page, goal {GOAL_BYTES / 1e6:g}; ", end="")
        print(f"Streamlit's own files {median(figures.files) / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--model", action="append", choices=MODELS)
    asked = parser.parse_args()
    if shutil.which("chromium") is None:
        sys.exit("There is no chromium on this machine: apt install chromium.")
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        browser.new_context().new_page().goto("about:blank")  # the browser itself is warm before anything is timed
        for model in asked.model or MODELS:
            run = library.run(library.entries("run", model=model)[0].id)
            shape = (run.n_layers, run.n_heads)
            of = {"bare": Figures(), "ours": Figures()}
            commands = {"bare": bare_app(Path(folder) / model, model), "ours": ("-m", "app")}
            for i in range(asked.times):
                for name, figures in of.items():
                    with served(Path(folder) / "home", command=commands[name]) as address:
                        for state in ("cold", "warm"):
                            session = Session(browser, address, figures)
                            session.visit(f"explore?model={model}" if name == "ours" else "", f"first chart, {state}")
                            if state == "warm":
                                (ours(session, model, shape, i) if name == "ours" else bare(session, shape))
                            session.close()
            told(model, of)
        print(
            f"{RUNS:,} runs listed: {', then '.join(f'{s:.3f} s' for s in listing(Path(folder)))} (goal {GOAL_LIST} s)"
        )
        browser.close()


if __name__ == "__main__":
    main()
