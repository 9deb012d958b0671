"""Demo as a user meets it: stories by keys, a run that streams and is cancelled, hostile text, narrow screens."""

import re
import shutil

import pytest

from tests.support.browser import served, settled
from tests.support.texts import HOSTILE, chatty

pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine (apt install chromium)"),
]


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """Folder of a model that has a chat template."""
    return chatty(tmp_path_factory.mktemp("models") / "talker")


@pytest.fixture(scope="module")
def address(tmp_path_factory, talker):
    with served(tmp_path_factory.mktemp("home"), L2KV_MODEL_DIRS=str(talker.parent)) as url:
        yield url


@pytest.fixture
def demo(page, address):
    def open(**params):
        asked = "&".join(f"{name}={value}" for name, value in ({"model": "books-5m"} | params).items())
        page.goto(f"{address}/demo?{asked}")
        page.get_by_role("heading", name="Show me").wait_for()
        settled(page)
        return page

    return open


def written(page):
    return page.locator(".l2kv-new").all_inner_texts()


def test_a_story_opens_at_its_start_names_the_first_key_and_ends_in_view(demo):
    page = demo(model="smollm2")
    page.get_by_text("Press → for the first new token").wait_for()
    assert not written(page) and not page.locator(".l2kv-score, .l2kv-ending").count()
    page.keyboard.press("ArrowRight")
    page.get_by_text("1 new token of 24").wait_for()
    page.get_by_role("slider", name="Step of the story").press("End")
    badges = page.locator(".l2kv-score").all_inner_texts()
    assert badges[:2] == ["✓ found"] * 2 and "✗ not found" in badges
    bottom = page.locator(".l2kv-bytes").last.bounding_box()
    assert bottom["y"] + bottom["height"] < 900
    page.keyboard.press("Space")
    page.get_by_role("button", name="Pause").click()


def test_a_story_is_presented_and_no_key_is_lost_while_a_job_runs_and_ends(demo):
    page, said = demo(), []
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.get_by_role("button", name="Time each cache alone").click()
    page.keyboard.press("p")
    page.get_by_role("button", name="Close").wait_for()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    page.get_by_text("20 new tokens of 24").wait_for(timeout=2000)
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    page.keyboard.press("?")
    page.get_by_role("dialog", name="Keys of this page").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("tokens/s alone").first.wait_for(timeout=120_000)
    settled(page)
    page.get_by_text("17 new tokens of 24").wait_for(timeout=2000)  # the rates came, and the step stayed
    page.get_by_text("hollow by fewer").wait_for()
    page.get_by_text("with other work: not told apart").wait_for()
    assert page.locator("dialog[open]").bounding_box()["height"] >= 900
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Present", exact=True).wait_for()
    page.get_by_text("17 new tokens of 24").wait_for(timeout=2000)
    assert not said


def test_a_presentation_opens_and_closes_at_the_step_shown_and_its_end_fits_the_screen(demo):
    page = demo(model="smollm2")
    page.set_viewport_size({"width": 1400, "height": 900})
    page.get_by_text("A number, 86556, is hidden in a text of 448 tokens").wait_for()
    for key in ("ArrowRight", "ArrowRight", "p"):
        page.keyboard.press(key)
    page.get_by_text("2 new tokens of 24").wait_for(timeout=2000)
    page.keyboard.press("End")
    presented = page.locator("dialog[open]")
    presented.get_by_text("The page Verdict says").wait_for(timeout=2000)
    assert presented.evaluate("dialog => dialog.scrollHeight <= dialog.clientHeight")
    page.keyboard.press("p")
    page.get_by_role("button", name="Present", exact=True).wait_for()
    page.get_by_text("24 new tokens of 24").wait_for(timeout=2000)
    page.keyboard.press("Home")
    page.get_by_text("Press → for the first new token").wait_for(timeout=2000)


def test_the_list_of_keys_closes_by_the_key_that_opens_it_and_hides_no_other(demo):
    page = demo()
    listed = page.get_by_role("dialog", name="Keys of this page")
    for key in ("?", "?", "?", "ArrowRight"):
        page.keyboard.press(key)
    page.get_by_text("1 new token of 24").wait_for(timeout=2000)
    assert not listed.count()
    page.keyboard.press("?")
    listed.wait_for()
    page.keyboard.press("Space")
    page.get_by_role("button", name="Pause").wait_for(timeout=2000)
    assert not listed.count()


def test_caches_stream_and_cancel_keeps_what_was_written(demo):
    page = demo(demo="Live")
    page.get_by_text("Length and sampling").click()
    tokens = page.get_by_label("New tokens").first
    tokens.fill("500")
    tokens.press("Enter")
    settled(page)
    page.get_by_role("button", name="Start", exact=True).click()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.l2kv-new')].filter(each => each.innerText.length > 20).length >= 2"
    )
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_text("Cancelled: what was written until then is kept.").wait_for()
    settled(page)
    kept = written(page)
    assert len(kept) == 2 and all(kept)
    page.wait_for_timeout(700)
    assert written(page) == kept


def test_no_text_of_a_user_becomes_markup_and_a_narrow_page_does_not_scroll_sideways(demo):
    page = demo(demo="Live")
    page.set_viewport_size({"width": 800, "height": 900})
    page.get_by_text("Prompt", exact=True).first.click()
    box = page.get_by_role("textbox", name="Prompt")
    box.fill(HOSTILE + " and so it went on, as it always had, to the end of the day.")
    box.press("Control+Enter")
    settled(page)
    page.get_by_role("button", name="Start", exact=True).click()
    page.get_by_role("button", name="Download report").wait_for(timeout=120_000)
    settled(page)
    assert page.locator(".l2kv-stage img, .l2kv-stage script").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 800
    with page.expect_download() as download:
        page.get_by_role("button", name="Download report").click()
    report = download.value.path().read_text()
    assert len(report) < 1_000_000 and not re.search(r"<img|alert\(1\)</script>", report)


def test_a_chat_is_typed_cancelled_continued_and_reported(demo, talker):
    page = demo(model=talker, demo="Chat")
    page.get_by_text("Length and sampling").click()
    tokens = page.get_by_label("New tokens").first
    tokens.fill("400")
    tokens.press("Enter")
    settled(page)

    def say(text):
        page.get_by_test_id("stChatInputTextArea").click()
        page.keyboard.type(text)  # "p" and the space are keys of the player
        page.keyboard.press("Enter")
        # For the first token: before it, there is no answer to keep.
        page.locator(".l2kv-cache:has(.l2kv-new)", has_text=text).last.wait_for()
        page.get_by_role("button", name="Cancel", exact=True).click()
        settled(page)
        assert page.get_by_text("Cancelled: what was written until then is kept.").count() == 1

    say("Is it <b>right</b>, please?")
    said = written(page)
    say("And happy people?")
    assert written(page)[:2] == said and len(written(page)) == 4 and not page.locator("dialog[open]").count()
    assert page.locator(".l2kv-asked").last.inner_text().strip() == "And happy people?"
    assert page.locator(".l2kv-tokens .hollow[title]").count() or page.get_by_text("Nothing is evicted yet").count()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download report").click()
    report = download.value.path().read_text()
    assert "Turn 2" in report and "And happy people?" in report and "<b>right" not in report
