"""The page Tune in a real Chromium: a click on a point of the curve puts its compression in force on every page."""

import re
import shutil

import pytest

from tests.support.browser import settled

pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine (apt install chromium)"),
]


def test_a_click_on_a_point_sets_the_policy_everywhere_by_the_controls_or_by_a_plan(page, address):
    page.goto(f"{address}/tune?model=smollm2")
    settled(page)
    assert page.get_by_text("Not measured yet").count() == 0

    def click(strategy: str, place: int) -> None:
        """Click a point of the curve where it is drawn, for others may lie over it."""
        page.locator(".js-plotly-plot .subplot").first.wait_for()
        at = page.evaluate(
            """([strategy, place]) => {
                const plot = document.querySelector('.js-plotly-plot');
                const trace = plot.calcdata.findIndex(of => of[0].trace.name === strategy);
                const [x, y, frame] = [plot._fullLayout.xaxis, plot._fullLayout.yaxis, plot.getBoundingClientRect()];
                const point = plot.calcdata[trace][place];
                return [frame.x + x._offset + x.c2p(point.x), frame.y + y._offset + y.c2p(point.y)];
            }""",
            [strategy, place],
        )
        page.mouse.click(*at)

    click("StreamingLLM", 0)
    page.wait_for_url(re.compile("policy=streaming"))
    settled(page)
    assert "keep=0.1" in page.url and "plan=" not in page.url
    page.get_by_role("link", name="Verdict").click()
    page.get_by_text(re.compile("first and recent · keep 10.%")).first.wait_for()
    page.get_by_role("link", name="Tune").click()
    settled(page)
    click("By head (by cost)", 0)
    page.wait_for_url(re.compile("plan="))
