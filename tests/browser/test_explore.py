"""Explore as a user meets it: clicks, keys, links, files, a study that is cancelled and continued."""

import json
import re
import shutil

import pytest

from tests.support.browser import settled

pytestmark = [
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine (apt install chromium)"),
]
LEFT, RIGHT, TOP, BOTTOM = 38, 6, 22, 58  # of the map's frame, around its cells


@pytest.fixture
def explore(page, address):
    page.goto(f"{address}/explore")
    settled(page)
    return page


def click_cell(page, layer, head, n_layers=6, n_heads=8):
    box = page.locator(".st-key-map_chart canvas").first.bounding_box()
    x = box["x"] + LEFT + (box["width"] - LEFT - RIGHT) * (head + 0.5) / n_heads
    y = box["y"] + TOP + (box["height"] - TOP - BOTTOM) * (layer + 0.5) / n_layers
    page.mouse.move(x - 2, y - 2)
    page.mouse.click(x, y)


def open_head(page):
    return page.locator(".st-key-explore h4").first.inner_text().split(":")[0]


def opens(page, name):
    page.locator(".st-key-explore h4", has_text=re.compile(f"^{name}:")).first.wait_for()
    settled(page)


def test_a_click_opens_a_head_a_second_one_keeps_it_and_the_link_shows_it_to_another(explore, browser):
    page = explore
    for layer, head in ((4, 6), (0, 3), (5, 0), (5, 0)):
        click_cell(page, layer, head)
        opens(page, f"L{layer} KV{head // 2} Q{head}")
    page.get_by_role("button", name="Pin as B").click()
    page.get_by_role("button", name="Unpin B").wait_for()
    settled(page)
    click_cell(page, 2, 7)
    opens(page, "A · L2 KV3 Q7")
    page.get_by_role("radio", name="Loss curves").click()
    page.get_by_text("my settings: ").first.wait_for()
    settled(page)
    link, heads = page.url, page.locator(".st-key-explore h4").all_inner_texts()
    assert "layer=2&head=7" in link and "pinned=5.0" in link and "view=Loss+curves" in link
    other = browser.new_context(viewport={"width": 1400, "height": 900}).new_page()
    other.goto(link)
    settled(other)
    assert other.locator(".st-key-explore h4").all_inner_texts() == heads and len(heads) == 2
    other.get_by_text("my settings: ").nth(1).wait_for()
    assert other.url == link
    other.context.close()


def test_arrows_move_the_cell_brackets_the_query_and_a_question_mark_lists_the_keys(explore):
    page = explore
    click_cell(page, 2, 2)
    opens(page, "L2 KV1 Q2")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    opens(page, "L3 KV1 Q3")
    page.keyboard.press("[")
    page.get_by_text(re.compile(r"Attention of token \d+")).wait_for()
    page.keyboard.press("]")
    page.get_by_text(re.compile("^Attention of the next token")).wait_for()
    page.get_by_role("radio", name="Queries", exact=True).click()
    page.get_by_text("Γ of each of the last").wait_for()
    page.keyboard.press("ArrowUp")  # after a click on a control, too
    opens(page, "L2 KV1 Q3")
    page.keyboard.press("?")
    assert page.get_by_role("dialog", name="Keys of this page").get_by_text("next query head").is_visible()
    page.keyboard.press("Escape")
    page.get_by_role("combobox", name="Map").focus()
    page.keyboard.press("ArrowDown")  # of the list, not of the map
    page.keyboard.press("Escape")
    settled(page)
    assert open_head(page) == "L2 KV1 Q3"


def test_no_key_is_lost_however_fast_they_are_pressed(explore):
    page = explore
    click_cell(page, 0, 0)
    opens(page, "L0 KV0 Q0")
    for key in ("ArrowRight", "ArrowDown", "ArrowRight") * 5:
        page.keyboard.press(key)
    opens(page, "L5 KV3 Q7")
    for key in ("ArrowLeft", "ArrowUp", "ArrowLeft", "ArrowRight", "ArrowLeft") * 3:
        page.keyboard.press(key)
    opens(page, "L2 KV0 Q1")
    assert "layer=2&head=1" in page.url


def test_a_dialog_that_is_closed_stays_closed_and_the_keys_work_again(explore):
    page = explore
    click_cell(page, 2, 2)
    opens(page, "L2 KV1 Q2")
    page.get_by_role("button", name="Study more texts").click()
    dialog = page.get_by_role("dialog", name="Study more texts")
    dialog.get_by_role("button", name="Close").click()
    dialog.wait_for(state="detached")
    settled(page)
    page.keyboard.press("ArrowRight")
    opens(page, "L2 KV1 Q3")
    page.keyboard.press("ArrowRight")
    opens(page, "L2 KV2 Q4")
    assert page.get_by_role("dialog").count() == 0


def test_each_chart_is_had_as_csv_json_and_png(explore):
    page = explore
    for chart, file in (
        ("map_chart", "gamma_next-token_24-texts"),
        ("by_position_a", r"l\d-kv\d-q\d-by-position_next-token_anne-of-avonlea"),
    ):
        page.locator(f".st-key-{chart}_data button").first.click()
        for kind in ("CSV", "JSON", "PNG"):
            with page.expect_download() as download:
                page.get_by_role("button", name=kind, exact=True).click()
            saved = download.value.path().read_bytes()
            assert re.fullmatch(rf"books-5m_{file}\.{kind.lower()}", download.value.suggested_filename)
            if kind == "CSV":
                assert saved.startswith(b"layer,kv head" if chart == "map_chart" else b"position,token,key norm")
            elif kind == "JSON":
                told = json.loads(saved)
                assert told["of"]["model"] == "books-5m" and len(told["numbers"]) >= 5
                assert "*" not in told["about"] and "\\" not in told["about"]
            else:
                assert saved.startswith(b"\x89PNG") and len(saved) > 10_000
        page.keyboard.press("Escape")
        settled(page)


def test_texts_are_studied_cancelled_and_continued(explore, tmp_path):
    page = explore
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for i, file in enumerate(files):
        file.write_text(" ".join(f"The {i} old man of {n} looked at the sea." for n in range(400)))

    def begin(button):
        page.get_by_role("button", name="Study more texts").click()
        dialog = page.get_by_role("dialog")
        dialog.locator("input[type=file]").set_input_files(files)
        dialog.get_by_text("2 texts, ").wait_for()
        settled(page)
        tokens = dialog.get_by_role("spinbutton", name="Tokens of an excerpt")
        tokens.fill("128")
        tokens.press("Enter")
        dialog.get_by_text("About 24 excerpts").wait_for()
        settled(page)
        dialog.get_by_role("button", name=button).click()

    begin("Start")
    page.get_by_text(re.compile(r"[2-9] of 24 texts")).first.wait_for()
    page.get_by_role("button", name="Cancel", exact=True).click()
    page.get_by_text(re.compile("cancelled after .* of 24 texts are kept")).wait_for()
    settled(page)
    partial = page.get_by_role("radio", name=re.compile(r"Mean of \d+ texts")).inner_text()
    assert int(partial.split()[2]) < 24
    begin(re.compile("Continue"))
    page.get_by_role("radio", name="Mean of 24 texts").wait_for(timeout=180_000)  # 24 captures on a busy machine
    settled(page)
    assert "study=" in page.url and "over=many+texts" in page.url


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [800, 1400])
def test_the_page_has_one_heading_and_no_sideways_scroll(browser, address, scheme, width):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(f"{address}/explore?pinned=1.1&below=Many+texts")
    settled(page)
    assert page.locator("h1").all_inner_texts() == ["Which heads, and why?"]
    assert page.evaluate("document.querySelector('[data-testid=stMain]').scrollWidth") <= width
    page.close()
    assert not wrong
