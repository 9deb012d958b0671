"""Phrases that code, docs and the command line do not use: a closed list, which `make lint` looks for.

Each was a second word for something that has one already (the word table of the project), or is no English.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SKIPPED = (
    "analysis/bundled/",
    "CHANGELOG.md",  # names of then
    "tests/support/words.py",
    "tests/unit/test_words.py",
)
QUOTED = "# as old files have it"  # at the end of a line that may say anything


class Phrase(NamedTuple):
    """A phrase that is not used: a pattern for it, a sample that has it, and what to say instead."""

    pattern: str
    sample: str
    instead: str


PHRASES = (
    # One word for one thing.
    Phrase(r"(?<![a-z])dice(?![a-z])", "no better than dice", "random order, chance level"),
    Phrase(r"\byardsticks?\b", "the yardstick", "baseline"),
    Phrase(r"\b(left?|leave|leaves|leaving|stays?|stayed|keep|kept) whole\b", "layers to leave whole", "skip, keep"),
    Phrase(r"\b(left|leave|leaves) uncompressed\b", "which layers to leave uncompressed", "skip"),
    Phrase(r"\bno signal whole\b", "no signal whole", "heads without a signal skip compression"),
    Phrase(r"\bweighed\b", "weighed by cost", "by measured cost"),
    Phrase(r"\bsh?are(s|d)? out\b", "the budget is shared out", "allocate"),
    Phrase(r"\bways? to (share|spend)\b", "ways to spend a budget", "allocation strategy"),
    Phrase(r"\buniform ways\b", "plans and uniform ways", "strategies, baselines"),
    Phrase(r"\bcausal checks?\b|\bcheck of layers\b", "the causal check", "single-layer ablation"),
    Phrase(r"\bfront record\b|\bfront of (ways|norms|bytes)\b", "the front of ways", "Pareto front"),
    Phrase(r"\ba front (takes|needs|at|of|that)\b", "a front takes two texts", "a Pareto front"),
    Phrase(r"\bnats a token\b", "0.1 nats a token", "nats/token"),
    Phrase(r"\battention seam\b|\bthe seam\b|attention_seam", "through the attention seam", "attention hook"),
    Phrase(r"\bleave_out\b|without_(first|sink)\b(?!\")", "leave_out=1", "skip_first"),
    Phrase(r"\binstrument (check|run)\b|\binstrument\(", "an instrument check", "self-test"),
    Phrase(r"\bALR over chance\b(?! level)|\b(?-i:ALR) / chance\b", "ALR / chance", "normalised ALR"),
    Phrase(r"\battention weights\b", "attention weights", "attention probabilities"),
    Phrase(r"\b(chunks|passages) of (a |the )?texts?\b", "chunks of text", "excerpts"),
    Phrase(r"\bhead[ _]figures\b|\bfigures over texts\b|\ba figure over\b", "A figure over texts", "metrics, numbers"),
    Phrase(r"\bGini coefficient\b", "the Gini coefficient", "Gini correlation (Γ)"),
    Phrase(
        r"\b(compare_runs|compare_studies|causal_check|CausalCheck|RunFileError|head_figures|on_stage)\b",
        "raise RunFileError",
        "the name of today",
    ),
    Phrase(
        r"--(keeps?|pieces|weighed|whole-without-signal|causal)(?![\w-])",
        "l2kv plan --keep 0.5",
        "--keep-ratio, --keep-ratios, --excerpts, --strategy, --ablation",
    ),
    # English.
    Phrase(r"\b(all|everything) but looking\b", "all but looking", "everything except the plots"),
    Phrase(r"\btake it along\b", "take it along", "export"),
    Phrase(r"\band, or, a\b", "And, or, a long text", "name the field"),
    Phrase(r"\bof each part\.", "Of each part.", "a noun phrase with its head noun"),
    Phrase(r"\bis off\b(?= than)", "is off than", "differs"),
    Phrase(r"\b(goes|gone|going) on with\b", "the study can be gone on with", "resume, continue"),
    Phrase(r"\bwhole,? or not at all\b", "written whole or not at all", "atomically"),
    Phrase(r"\bcomes? from anyone\b", "a file that may come from anyone", "untrusted"),
    Phrase(r"\blook(ed|s)? into\b", "which is not looked into yet", "capture, inspect, support"),
    Phrase(r"\bhangs? on (how|the|whether)\b", "it hangs on the dtype", "depends on"),
    Phrase(r"\bin the place of\b", "in the place of a ratio", "instead of"),
    Phrase(r"\b(Raises|Raise) \w+, with the reason\b", "Raises RecordError, with the reason.", "say when"),
    Phrase(r"\banother (way|kind|shape|thing|order) than\b", "of another shape than that", "a different ... from"),
    Phrase(r"\bsign of life\b", "pip gave no sign of life", "stopped responding"),
    Phrase(
        r"(?<!\bof )\{len\([^{}]+\)(:,)?\}\*{0,2} (texts|tokens|excerpts|samples|methods|caches|documents|others)\b",
        "{len(names)} texts",
        "counted(len(names), 'text'): there may be one",
    ),
    Phrase(r"\} [a-z]+\{'s' \*", "{n} text{'s' * (n != 1)}", "counted(n, 'text')"),
    Phrase(r"\bif not told\b", "all, if not told which", "by default"),
)


def in_line(line: str) -> list[str]:
    """Phrases in a line of text, as "'the phrase': say ..."."""
    if line.rstrip().endswith(QUOTED):
        return []
    matches = ((phrase, re.search(phrase.pattern, line, re.IGNORECASE)) for phrase in PHRASES)
    return [f"{match[0]!r}: say {phrase.instead}" for phrase, match in matches if match]


def in_repository() -> list[str]:
    """Every place with such a phrase, as "file:line: 'the phrase': say ..."."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "*.py", "*.md", "*.toml", "*.cff", "*.ipynb", "*.j2", "Makefile"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return [
        f"{name}:{number}: {place}"
        for name in filter(None, listed.split("\0"))
        if not name.startswith(SKIPPED) and (ROOT / name).is_file()
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        for place in in_line(line)
    ]


if __name__ == "__main__":
    places = in_repository()
    print(*places, sep="\n", file=sys.stderr)
    sys.exit(bool(places))
