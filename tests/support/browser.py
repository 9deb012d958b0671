"""The app in a real browser: a server of its own, and waiting until a page has come to rest."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from tests.support.paths import ROOT


@contextmanager
def served(home: Path, *, command=("-m", "app"), **environment: str):
    """The address of a server whose workspace is in `home`; fails if its log holds a traceback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--server.headless=true", f"--server.port={port}")
    server = subprocess.Popen(
        [sys.executable, *command, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"L2KV_HOME": str(home)} | environment,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/_stcore/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None, server.stdout.read()
                time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        log = server.communicate(timeout=20)[0]
    assert "Traceback" not in log, log


def outside(url, address):
    """Whether a request leaves this machine, which none may."""
    return not url.startswith((address, address.replace("http", "ws"), "data:", "blob:"))


def settled(page):
    """The page is connected, and its script has not run for half a second: on a busy machine a click starts it late."""
    page.evaluate("window.busyAt = performance.now()")
    page.wait_for_function(
        """() => {
            const connected = document.querySelector('[data-test-connection-state=CONNECTED]');
            const done = document.querySelector('[data-test-script-state=notRunning]');
            const more = document.querySelector('.st-key-first_chart');  // to come, once the first chart is drawn
            if (!connected || !done || more) window.busyAt = performance.now();
            return performance.now() - window.busyAt > 500;
        }""",
        polling=50,
    )
