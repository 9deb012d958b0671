"""`make picture`: the README's picture, taken from the app itself in Chromium."""

from __future__ import annotations

import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

PORT = 8599
TARGET = Path(__file__).parents[1] / "app" / "assets" / "heads.png"


def main() -> None:
    command = [
        sys.executable,
        "-m",
        "streamlit",
        "run",
        "app/main.py",
        "--server.headless=true",
        f"--server.port={PORT}",
    ]
    server = subprocess.Popen(command, cwd=TARGET.parents[2])
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 1290})
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{PORT}/_stcore/health", timeout=1)
                    break
                except OSError:
                    page.wait_for_timeout(200)
            page.goto(f"http://127.0.0.1:{PORT}")
            page.locator(".js-plotly-plot").nth(5).wait_for()
            page.wait_for_selector("[data-test-script-state=notRunning]")
            page.wait_for_timeout(1500)
            page.screenshot(path=TARGET)
            browser.close()
    finally:
        server.terminate()
    print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
