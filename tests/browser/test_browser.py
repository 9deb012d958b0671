"""The app as a user meets it, in a real Chromium. Skips, with the reason, where there is none."""

import re
import shutil

import pytest

from tests.support.browser import settled

pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine (apt install chromium)"),
]
OWN_TEXT = "The quick brown fox <b>jumps</b> over $x$ ![lazy](dogs) 🙂 and naps by the river until the evening comes."


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
    "Capture": "Capture a text in a model",
    "Skip layers": "Which layers of",
    "Plan": "Where should the bytes",
    "Generate": "What does compression change",
}


# In the page itself: a question asked from outside may come after the next charts.
COUNT_AT_FIRST = """
new MutationObserver((_, observer) => {
    if (document.querySelector("[data-testid=stEChartsChart] canvas")) {
        window.chartsAtFirst = document.querySelectorAll("[data-testid=stPlotlyChart]").length
        observer.disconnect()
    }
}).observe(document, {childList: true, subtree: true})
"""


def test_the_map_is_seen_before_any_other_chart_is_there(browser, address):
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.add_init_script(COUNT_AT_FIRST)
    page.goto(address)
    page.locator(".js-plotly-plot").first.wait_for()
    at_first = page.evaluate("window.chartsAtFirst")
    page.close()
    assert at_first == 0


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


def test_a_plan_is_made_and_decoded_with_beside_one_ratio_for_all(page):
    go(page, "Plan")
    page.get_by_text(re.compile("it would lose")).wait_for()
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
