"""A report in a real Chromium: it draws, asks for nothing, and follows light and dark."""

import json
import shutil

import pytest

from analysis.evaluation.results import FULL
from app.report import VERSION, report
from tests.support.evaluation import passkeys_of, predictions_of
from tests.support.runs import random_run
from tests.support.texts import HOSTILE

pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine (apt install chromium)"),
]


def test_a_browser_draws_a_page_asks_for_nothing_and_follows_light_and_dark(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    file = tmp_path / "report.html"
    results = [
        passkeys_of(
            {FULL: {(400, 0.1): [1], (1000, 0.9): [0]}, f"{HOSTILE} 0.25": {(400, 0.1): [1], (1000, 0.9): [0]}}
        ),
        predictions_of({"low_norm 0.5": [[0.0, 3.0]] * 2}),
    ]
    file.write_text(report([random_run(model=HOSTILE, text=HOSTILE.ljust(40))], results=results))
    wrong, ink = [], "getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = chromium.new_page(color_scheme="dark", viewport={"width": 800, "height": 900})
        page.on("request", lambda request: wrong.append(request.url) if request.url != file.as_uri() else None)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(file.as_uri())
        page.locator(".plot").last.locator(".main-svg").first.wait_for()
        assert page.locator(".plot .main-svg").count() >= page.locator(".plot").count() > 5
        dark = page.evaluate(ink)
        page.emulate_media(color_scheme="light")
        for _ in range(100):  # not wait_for_function: what it does to wait is what the page's own policy forbids
            if page.evaluate(ink) != dark:
                break
            page.wait_for_timeout(100)
        assert page.evaluate(ink) != dark
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.evaluate(ink) == "rgb(0, 0, 0)"
        with page.expect_download() as saved:
            page.get_by_role("button", name="Save the numbers").click()
        assert json.loads(saved.value.path().read_text())["l2kv_report"] == VERSION
        chromium.close()
    assert not wrong
