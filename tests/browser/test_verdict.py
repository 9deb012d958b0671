"""The engineer's flow in a real Chromium: measure, leave, come back, change the limits, take the script and run it."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.support.browser import settled
from tests.support.paths import ROOT

pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine (apt install chromium)"),
]
LONG = 300_000  # milliseconds, on a busy machine
FEW = "&min_excerpts=2&min_samples=5"


def test_from_not_yet_to_an_answer_and_a_script_that_runs_as_pasted(page, address):
    assert page.get_by_role("heading", level=1).inner_text() == "Can I halve this cache?"
    assert page.get_by_text("NOT YET", exact=True).is_visible()
    page.get_by_role("button", name="Measure").click()
    for label, value in (("Excerpts", "2"), ("Passkeys, and needles", "5")):
        page.get_by_role("spinbutton", name=label, exact=True).fill(value)
        page.get_by_role("spinbutton", name=label, exact=True).press("Enter")
    page.get_by_role("combobox", name="Tokens of their prompts").click()
    page.get_by_role("option", name="400", exact=True).click()
    page.get_by_text(re.compile("needles take about .* on this machine, with prompts of 400 tokens")).wait_for(
        timeout=LONG
    )
    page.get_by_role("button", name="Start").click()
    page.get_by_role("button", name="Cancel").wait_for(timeout=LONG)
    page.wait_for_url(re.compile("job="))
    page.goto(page.url)  # a reload finds the job again
    page.get_by_text("Measuring books-5m").first.wait_for(timeout=LONG)
    page.get_by_role("button", name="Cancel").wait_for(state="detached", timeout=LONG)

    page.goto(f"{address}/?model=books-5m&max_ppl=90{FEW}")
    page.get_by_role("heading", name="GO", exact=True).wait_for(timeout=LONG)
    settled(page)
    tiles = page.get_by_test_id("stMetricValue").all_inner_texts()
    assert tiles[0].startswith("× ") and "→" in tiles[1] and "→" in tiles[2]
    assert "passkey and needle" in page.get_by_text("is not judged").first.inner_text()  # 5 million weights find none
    page.get_by_text("Use it: a script").click()
    script = page.get_by_test_id("stCode").locator("code").inner_text()
    assert "keep_ratio=0.5" in script and "protect_last=32" in script and "skip_layers=()" in script
    ran = subprocess.run(
        [sys.executable, "-c", script.replace("\u00a0", " ")], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0 and len(ran.stdout) > 20, ran.stderr


@pytest.mark.parametrize("width", [800, 1400])
def test_the_page_is_as_wide_as_the_screen_and_its_answer_in_view(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    settled(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.get_by_test_id("stHeading").count() >= 2 and page.locator("h1").count() == 1
    answer = page.locator(".st-key-answer").bounding_box()
    assert answer["y"] + answer["height"] < 900


def test_a_line_of_the_checklist_leads_to_the_page_that_settles_it(page):
    page.get_by_role("link", name="Prove").first.click()
    settled(page)
    assert "/evaluate" in page.url and "What does it cost" in page.get_by_role("heading", level=1).inner_text()
