"""Each page, as axe reads it and as it is laid out: contrast, names, roles; no sideways scroll, nothing cut off.

Text of charts is drawn as SVG or on a canvas, which axe leaves out: its contrast is worked out here.
"""

import re
import shutil

import pytest

from app.figures.style import QUIET
from tests.support.browser import settled

pytestmark = [
    pytest.mark.xdist_group("browser accessible"),
    pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine (apt install chromium)"),
]
PAGES = ("verdict", "explore", "evaluate", "tune", "demo", "demo?demo=Live", "help")
STREAMLITS_OWN: dict[str, str] = {}
"""Rules of axe that markup of Streamlit breaks which no page can change -> why."""
CHART_TEXT = """() => {
    const on = getComputedStyle(document.querySelector("[data-testid=stApp]")).backgroundColor
    const texts = [...document.querySelectorAll(
        ".js-plotly-plot .xtick text, .js-plotly-plot .ytick text, .js-plotly-plot .g-xtitle text," +
        ".js-plotly-plot .g-ytitle text, .js-plotly-plot .legendtext, .js-plotly-plot .cbaxis text")]
    return [on, [...new Set(texts.map(text => getComputedStyle(text).fill))]]
}"""
CUT_OFF = """width => [...document.querySelectorAll("[data-testid=stMain] *")].filter(one => {
    const box = one.getBoundingClientRect()
    return box.width && box.height && box.right > width + 1 && !one.closest("[data-testid=stDataFrame], pre, svg")
}).map(one => one.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize(("scheme", "width"), [("light", 1400), ("dark", 1400), ("light", 800), ("dark", 800)])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_no_serious_finding_and_nothing_is_cut_off(browser, address, name, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(60_000)
    page.goto(f"{address}/{name}{'&' if '?' in name else '?'}model=books-5m")
    settled(page)
    page.wait_for_function("() => !document.querySelector('[data-stale=true]')")
    assert page.locator("h1:visible").count() == 1
    assert page.evaluate("document.querySelector('[data-testid=stMain]').scrollWidth") <= width
    assert page.evaluate(CUT_OFF, width) == []
    background, fills = page.evaluate(CHART_TEXT)
    fills += [QUIET[scheme == "dark"]] if page.locator("[data-testid=stEChartsChart]").count() else []
    assert {fill: contrast(fill, background) for fill in fills if contrast(fill, background) < 4.5} == {}
    if width == 1400:  # at 800 the header has two lines, and the same markup
        assert page.locator(".st-key-header").bounding_box()["height"] < 60
        found = axe.Axe().run(page).response["violations"]
        serious = [rule for rule in found if rule["impact"] in ("serious", "critical")]
        assert [told(rule) for rule in serious if rule["id"] not in STREAMLITS_OWN] == []
    page.close()


def told(rule):
    return rule["id"], [(node["html"][:200], node["failureSummary"]) for node in rule["nodes"]]


def contrast(one, other):
    """WCAG's contrast of two opaque CSS colours."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    base, parts = (16, r"[\dA-F]{2}") if colour.startswith("#") else (10, r"\d+")
    channels = [int(channel, base) / 255 for channel in re.findall(parts, colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_contrast_is_that_of_the_standard():
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("#767676", "#FFFFFF") == contrast("rgb(118, 118, 118)", "rgb(255, 255, 255)")
    assert contrast("rgb(118, 118, 118)", "rgb(255, 255, 255)") == pytest.approx(4.54, abs=0.01)
