"""`make picture`: the pictures of README and docs, taken from the app itself in Chromium."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from analysis.models.packaged import home
from tests.support.browser import served, settled

TARGET = Path(__file__).parents[1] / "docs" / "pictures"
PAGES = {"verdict": 900, "explore": 860, "demo": 900}
"""Page -> height of its picture, px."""


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        os.symlink(home() / "models", Path(folder) / "models")  # in an empty workspace
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        with served(Path(folder), L2KV_DEMO="smollm2") as address:
            for name, height in PAGES.items():
                page = browser.new_page(viewport={"width": 1280, "height": height})
                page.goto(f"{address}/{name}")
                settled(page)
                page.wait_for_timeout(2000)  # charts are drawn after their script has ended
                if name == "demo":  # to the end of the story
                    for _ in range(99):
                        page.keyboard.press("ArrowRight")
                page.screenshot(path=TARGET / f"{name}.png")
                print(f"wrote {TARGET / name}.png")
        browser.close()


if __name__ == "__main__":
    main()
