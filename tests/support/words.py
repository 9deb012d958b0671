"""The words that users read: a closed list of phrases that code, docs and the command line do not use.

One word for one thing: what is listed here was a second word for something, or no English. `make lint` runs it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTEAD = {
    r"\bdice\b": "random order, chance level",
    r"\byardsticks?\b": "baseline",
    r"\b(left?|leave|leaves|leaving|stays?|stayed|keep|kept) whole\b": "skipped, kept",
    r"\bno signal whole\b": "heads without a signal skip compression",
    r"\bweighed\b": "by measured cost",
    r"\bsh?are(s|d)? out\b|\bshared out\b": "allocate",
    r"\bways? to (share|spend)\b": "allocation strategy",
    r"\bcausal check\b|\bcheck of layers\b": "single-layer ablation",
    r"\bfront record\b|\bfront of ways\b": "Pareto front",
    r"\b(all|everything) but looking\b": "everything except the plots",
    r"\btake it along\b": "export",
    r"\band, or, a\b": "name the field",
    r"\bnats a token\b": "nats/token",
    r"\battention seam\b": "attention hook",
    r"\bleave_out\b|\bwithout_first\b|\bwithout_sink\b": "skip_first",
    r"\bof each part\.": "a noun phrase with its head noun",
    r"\bis off\b(?= than)": "differs",
}
SKIPPED = (
    "app/views/",  # the pages are to be replaced, and their words with them
    "analysis/bundled/",
    "CHANGELOG.md",  # what was said then
    "tests/support/words.py",
)


def found() -> list[str]:
    """Every place with such a phrase, as "file:line: phrase: say ... instead"."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "*.py", "*.md", "*.toml", "*.cff", "*.ipynb", "*.j2", "Makefile"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    places = []
    for name in filter(None, listed.split("\0")):
        if name.startswith(SKIPPED) or not (ROOT / name).is_file():
            continue
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
            for phrase, instead in INSTEAD.items():
                if match := re.search(phrase, line, re.IGNORECASE):
                    places.append(f"{name}:{number}: {match[0]!r}: say {instead}")
    return places


if __name__ == "__main__":
    places = found()
    print("\n".join(places), file=sys.stderr)
    sys.exit(bool(places))
