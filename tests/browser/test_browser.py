"""The app as a user meets it, in a real Chromium. Skips, with the reason, where there is none."""

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine (apt install chromium)"),
]
OWN_TEXT = "The quick brown fox <b>jumps</b> over $x$ ![lazy](dogs) 🙂 and naps by the river until the evening comes."


@pytest.fixture(scope="module")
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "app",
        "--server.headless=true",
        f"--server.port={port}",
    ]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/_stcore/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None, server.stdout.read()
                time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        log = server.communicate(timeout=20)[0]
    assert "Traceback" not in log, log


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(60_000)
    failures = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("request", lambda request: outside(request.url, address) and failures.append(request.url))
    page.goto(address)
    settled(page)
    yield page
    page.close()
    assert not failures


def outside(url, address):
    """Whether a request leaves this machine, which none may."""
    return not url.startswith((address, address.replace("http", "ws"), "data:", "blob:"))


def settled(page):
    """The page is connected, and its script has not run for half a second: on a busy machine a click starts it late."""
    page.evaluate("window.busyAt = performance.now()")
    page.wait_for_function(
        """() => {
            const connected = document.querySelector('[data-test-connection-state=CONNECTED]');
            const done = document.querySelector('[data-test-script-state=notRunning]');
            const more = document.querySelector('.st-key-first_chart');  // to come, once the first chart is drawn
            if (!connected || !done || more) window.busyAt = performance.now();
            return performance.now() - window.busyAt > 500;
        }""",
        polling=50,
    )


def enter(page, box, text, key="Enter"):
    """Type a text and commit it; a rerun under way may have put the old one back."""
    for _ in range(5):
        box.fill(text)
        box.press(key)
        settled(page)
        if box.input_value() == text:
            return
    raise AssertionError(f"the box would not take {text!r}")


def refused(page, reason):
    """Run is answered with a reason; a click while the page moves under it may be lost."""
    answer = page.get_by_text(re.compile(reason)).first
    for _ in range(5):
        page.get_by_role("button", name="Run", exact=True).click()
        settled(page)
        if answer.count():
            return
    raise AssertionError(f"no answer says {reason!r}: {page.locator('[data-testid=stMain]').inner_text()}")


def go(page, name):
    page.get_by_role("link", name=name, exact=True).click()
    page.wait_for_selector(f"h2:has-text('{HEADERS[name]}')")
    settled(page)


HEADERS = {
    "Heads": "Does low norm predict attention",
    "Capture": "Capture a text in a model",
    "Texts": "Does it hold over many texts",
    "Skip layers": "Which layers of",
    "Plan": "Where should the bytes",
    "Generate": "What does compression change",
}


def click_cell(page, layer, head, n_layers=6, n_heads=8):
    """Click a cell of the first map, by where it is on the screen."""
    plot = page.locator(".js-plotly-plot").first
    cells = plot.locator(".nsewdrag").first
    tip = plot.locator(".hoverlayer .hovertext", has_text=f"layer {layer}, head {head}")
    for _ in range(20):  # until the page has come to rest and Plotly points at the cell
        cells.scroll_into_view_if_needed()  # each time: charts are drawn in any order, and the first may change
        box = cells.bounding_box()
        x = box["x"] + box["width"] * (head + 0.5) / n_heads
        y = box["y"] + box["height"] * (layer + 0.5) / n_layers
        page.mouse.move(x - 4, y - 4)
        page.mouse.move(x, y)
        page.wait_for_timeout(300)
        if tip.count():
            break
    heading = page.get_by_role("heading", name=re.compile(f"^Layer {layer}, head {head}: "))
    for _ in range(3):  # on a busy machine Plotly may not be listening yet
        page.mouse.click(x, y)
        settled(page)
        if heading.count():
            return


# In the page itself: a question asked from outside may come after the next charts.
COUNT_AT_FIRST = """
new MutationObserver((_, observer) => {
    if (document.querySelector(".js-plotly-plot .main-svg")) {
        window.chartsAtFirst = document.querySelectorAll(".js-plotly-plot").length
        observer.disconnect()
    }
}).observe(document, {childList: true, subtree: true})
"""


def test_the_map_is_seen_before_any_other_chart_is_there(browser, address):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.add_init_script(COUNT_AT_FIRST)
    page.goto(address)
    page.locator(".js-plotly-plot").nth(5).wait_for()
    at_first = page.evaluate("window.chartsAtFirst")
    page.close()
    assert at_first == 1


def test_the_page_that_opens_first_has_an_address_like_the_others(page, address):
    page.goto(f"{address}/heads")
    settled(page)
    assert page.get_by_role("heading", name=re.compile(HEADERS["Heads"])).is_visible()
    assert page.get_by_text("Page not found").count() == 0
    assert page.get_by_role("link", name="Heads", exact=True).count() == 1


def test_the_first_thing_seen_is_the_answer_for_the_demo_run(page):
    assert page.get_by_role("heading", name=re.compile("Does low norm predict attention in books-5m")).is_visible()
    assert page.get_by_text(re.compile(r"In \d+ of 48 heads low-norm keys get the attention")).is_visible()
    page.locator(".js-plotly-plot").nth(1).wait_for()
    assert page.get_by_text("no model in memory").is_visible()


def test_a_click_on_a_cell_opens_that_head_and_a_second_click_keeps_it(page):
    for layer, head in ((4, 6), (0, 3), (5, 0), (5, 0)):
        click_cell(page, layer, head)
        page.get_by_role("heading", name=re.compile(f"^Layer {layer}, head {head}: ")).wait_for(timeout=10_000)
    page.get_by_role("button", name="Next head").click()
    page.get_by_role("heading", name=re.compile("^Layer 5, head 1: ")).wait_for()
    page.get_by_text("Leave out the first token").click()
    settled(page)
    assert page.get_by_role("heading", name=re.compile("^Layer 5, head 1: ")).is_visible()
    click_cell(page, 2, 2)
    page.get_by_role("heading", name=re.compile("^Layer 2, head 2: ")).wait_for()


def test_a_text_of_ones_own_is_captured_and_shown_as_it_is(page):
    go(page, "Capture")
    box = page.get_by_label("Text", exact=True)
    enter(page, box, OWN_TEXT, "Control+Enter")
    page.get_by_text(re.compile(r"\d+ tokens.*about.*KiB|MiB")).first.wait_for()
    settled(page)
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text(re.compile("^Your run: ")).wait_for()
    settled(page)
    strip = page.locator(".l2kv-strip")
    assert "<" in strip.inner_text() and "🙂·1/4" in strip.inner_text()
    assert strip.locator("b, img, a").count() == 0
    assert page.locator("[data-testid=stMain] img").count() == 0
    assert page.get_by_text("books-5m in memory").is_visible()


def test_texts_and_models_that_cannot_be_run_get_an_answer(page):
    go(page, "Capture")
    box = page.get_by_label("Text", exact=True)
    for text, reason in (("", "The text is empty"), ("a", "at least 4 are needed")):
        enter(page, box, text, "Control+Enter")
        refused(page, reason)
    enter(page, box, OWN_TEXT, "Control+Enter")
    page.get_by_label("Model", exact=True).click()
    page.get_by_role("option", name=re.compile("Another model")).click()
    reference = page.get_by_role("textbox", name="Hugging Face id, folder or GGUF file")
    for ref, reason in (("no such model!", "No such model"), ("/etc", "must be allowed")):
        enter(page, reference, ref)
        refused(page, reason)


def test_both_columns_stream_and_cancel_stops_them(page):
    go(page, "Generate")
    tokens = page.get_by_label("New tokens")
    enter(page, tokens, "1000")
    page.get_by_role("button", name="Generate", exact=True).click()
    boxes = page.locator(".l2kv-text")
    boxes.nth(1).wait_for()
    early = [boxes.nth(i).inner_text() for i in range(2)]
    page.wait_for_function(
        "before => [...document.querySelectorAll('.l2kv-text')].every((b, i) => b.innerText.length > before[i] + 20)",
        arg=[len(text) for text in early],
    )
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_text("Cancelled: what was generated until then is kept.").wait_for()
    settled(page)
    kept = [boxes.nth(i).inner_text() for i in range(2)]
    assert all(len(after) > len(before) for after, before in zip(kept, early, strict=True))
    page.wait_for_timeout(700)
    assert [boxes.nth(i).inner_text() for i in range(2)] == kept

    enter(page, tokens, "8")
    page.get_by_role("button", name="Generate", exact=True).click()
    settled(page)
    page.get_by_text(re.compile("The same 8 tokens|The texts differ from new token")).wait_for()
    counters = page.get_by_text(re.compile(r"\d+ of \d+ tokens held per layer"))
    assert counters.count() == 2 and re.search(r"5\d% of the full cache", counters.last.inner_text())


def test_a_skip_list_is_suggested_edited_exported_and_taken_over(page):
    go(page, "Skip layers")
    page.get_by_role("button", name="The paper's: 0 and 1").click()
    settled(page)
    page.get_by_text("The plan as JSON and as code").click()
    assert "skip_layers=(0, 1)" in page.locator("code").nth(1).inner_text()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the plan").click()
    assert '"skip_layers": [\n      0,\n      1\n    ]' in download.value.path().read_text()
    page.get_by_role("button", name="Try it in Generate").click()
    page.wait_for_selector("h2:has-text('What does compression change')")
    settled(page)
    tokens = page.get_by_label("New tokens")
    enter(page, tokens, "2")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.get_by_text(re.compile("The same 2 tokens|The texts differ from new token")).wait_for()
    counter = page.get_by_text(re.compile(r"\d+ to \d+ of \d+ tokens held per layer")).inner_text()
    half, whole, seen = map(int, re.match(r"(\d+) to (\d+) of (\d+)", counter).groups())
    assert whole == seen and half == -(-seen // 2)  # layers 0 and 1 hold all, the others half


def test_a_run_is_downloaded_and_opened_again(page, tmp_path):
    go(page, "Capture")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download this run").click()
    saved = tmp_path / "run.safetensors"
    download.value.save_as(saved)
    page.locator("input[type=file]").last.set_input_files(saved)
    page.get_by_text(re.compile("^Your run: ")).wait_for()
    go(page, "Capture")
    saved.write_bytes(b"not a run")
    page.locator("input[type=file]").last.set_input_files(saved)
    page.get_by_text(re.compile("not a run that can be read")).wait_for()


def test_texts_are_studied_cancelled_and_gone_on_with(page, tmp_path):
    go(page, "Texts")
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for i, file in enumerate(files):
        file.write_text(" ".join(f"The {i} old man of {n} looked at the sea." for n in range(400)))
    page.locator("input[type=file]").first.set_input_files(files)
    page.get_by_text(re.compile("^2 texts, ")).wait_for()
    settled(page)
    enter(page, page.get_by_role("spinbutton", name="Tokens an excerpt"), "128")
    page.get_by_role("button", name="Measure it for books-5m", exact=True).click()
    page.get_by_text(re.compile(r"^[2-9] of 24 texts$")).wait_for()
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_text("Cancelled. What was done is kept").wait_for()
    settled(page)
    done = page.get_by_text(re.compile(r"^\d+ of 24 texts are done")).inner_text()
    assert int(done.split()[0]) < 24
    page.get_by_role("button", name="Go on", exact=True).click()
    page.get_by_text("Done: it is shown above.").wait_for(timeout=180_000)  # 24 captures on a busy machine
    assert page.get_by_text(re.compile("^Your study: 24 texts of 128 tokens")).is_visible()


def test_a_plan_is_made_and_decoded_with_beside_one_ratio_for_all(page):
    go(page, "Plan")
    page.get_by_text(re.compile("On this text it would lose")).wait_for()
    page.get_by_role("button", name="Use this plan in Generate").click()
    page.wait_for_selector(f"h2:has-text('{HEADERS['Generate']}')")
    settled(page)
    assert page.get_by_text("Plan in use").is_visible()
    page.get_by_text("Beside it: a second compression").click()
    settled(page)
    enter(page, page.get_by_role("spinbutton", name="New tokens"), "3")
    page.get_by_role("button", name="Generate", exact=True).click()
    counters = page.get_by_text(re.compile(r"\d+ of \d+ tokens held per layer"))
    counters.nth(2).wait_for()
    settled(page)
    shares = [int(re.search(r"(\d+)% of the full cache", counters.nth(i).inner_text())[1]) for i in (1, 2)]
    assert all(49 <= share <= 52 for share in shares)  # equal bytes, by two allocation strategies
    go(page, "Plan")
    page.get_by_role("button", name="Drop it").click()
    settled(page)
    assert page.get_by_text("In use on Generate").count() == 0
