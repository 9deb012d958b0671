"""The app as a user meets it, in a real Chromium. Skips, with the reason, where there is none."""

import shutil

import pytest

pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine (apt install chromium)"),
]


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
    page.goto(f"{address}/explore")
    page.locator(".js-plotly-plot").first.wait_for()
    at_first = page.evaluate("window.chartsAtFirst")
    page.close()
    assert at_first == 0
