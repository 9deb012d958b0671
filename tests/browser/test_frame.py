"""What all pages share, in a browser: the header, jobs that outlive a tab, links, two sessions, and how pages fit."""

import shutil

import pytest

from tests.support.browser import settled

pytestmark = [
    pytest.mark.xdist_group("browser frame"),
    pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine (apt install chromium)"),
]
PAGES = ("verdict", "explore", "evaluate", "tune", "demo", "help")
OWN_TEXT = "The quick brown fox <b>jumps</b> over $x$ ![lazy](dogs) and naps by the river until the evening comes."


def opened(browser, url, **options):
    page = browser.new_page(**{"viewport": {"width": 1400, "height": 900}} | options)
    page.set_default_timeout(60_000)
    page.goto(url)
    settled(page)
    return page


def run_label(page):
    return page.locator(".st-key-header [data-testid=stPopoverButton]:visible").nth(1).inner_text()


def capture(page, text, name):
    page.get_by_role("button", name="New run", exact=True).click()
    page.get_by_role("textbox", name="Text", exact=True).fill(text)
    page.get_by_role("textbox", name="Text", exact=True).press("Control+Enter")
    settled(page)
    page.get_by_role("textbox", name="Name of the run").fill(name)
    page.get_by_role("textbox", name="Name of the run").press("Enter")
    settled(page)
    page.get_by_role("button", name="Start", exact=True).click()


def test_a_text_is_captured_as_a_job_that_a_reload_finds_again_and_its_link_shows_it_to_another(browser, address):
    page = opened(browser, f"{address}/help?model=books-5m")
    capture(page, OWN_TEXT, "my <b>fox</b>")
    page.wait_for_url(lambda url: "job=" in url)
    page.reload()  # while it runs, or just after
    page.wait_for_function("() => !new URL(location).searchParams.has('job')")
    settled(page)
    assert "my <b>fox</b>" in run_label(page)
    other = opened(browser, page.url)
    assert "my <b>fox</b>" in run_label(other) and other.url == page.url
    assert not other.locator("[data-testid=stAlert]").count()
    other.close()
    page.close()


def test_a_link_to_a_run_of_another_machine_says_what_to_do_and_shows_no_other_answer_as_its(browser, address):
    page = opened(browser, f"{address}/explore?model=books-5m&run=000000000000")
    notice = page.locator("[data-testid=stAlert]").first.inner_text()
    assert "not on this machine" in notice and "Open its file" in notice
    page.close()


def test_what_is_set_in_the_header_holds_on_every_page_and_in_the_address(browser, address):
    page = opened(browser, f"{address}/tune?model=books-5m&keep=0.25&policy=keydiff&skip=1")
    for name in ("Explore", "Evaluate", "Demo", "Help", "Tune"):
        page.get_by_role("link", name=name, exact=True).click()
        page.wait_for_url(lambda url, name=name: f"/{name.lower()}?" in url)
        settled(page)
        told = page.locator(".st-key-header [data-testid=stPopoverButton]:visible").nth(2).inner_text()
        assert "25 %" in told and "layer 1" in told and "keep=0.25" in page.url and "policy=keydiff" in page.url, name
    page.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1400), ("dark", 800)])
@pytest.mark.parametrize("name", PAGES)
def test_each_page_has_one_heading_no_sideways_scroll_and_no_error(browser, address, name, scheme, width):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(60_000)
    failures = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    # Streamlit asks for its health below the page's own path first
    page.on("console", lambda said: said.type == "error" and "404" not in said.text and failures.append(said.text))
    page.goto(f"{address}/{name}?model=books-5m")
    settled(page)
    assert page.locator("h1:visible").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not page.get_by_text("Something went wrong").count() and not failures
    page.close()
