"""The README's code does what it says."""

import re
import subprocess
import sys

from tests.support.paths import ROOT


def test_the_readme_quick_start_runs_as_printed():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.S)
    assert blocks
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, check=True)
