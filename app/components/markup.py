"""The one escaping of user text for HTML and for Markdown, and the HTML of the app's pages. Pure functions of text.

The report's HTML is Jinja's to escape, after `printable`.

A token may be anything that a user pasted: markup, control characters, text that runs right to left.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence

from analysis.words import counted
from app.figures.style import PRIMARY

MOST_TOKENS = 3000  # of a strip: more is unreadable, and slow to lay out

_SHOWN_AS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍", "\xa0": "⍽"}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|$<>~:^&])")

# Streamlit's own colours of selected buttons, key caps and ticks have contrasts of 2.3 to 4.3.
# Columns go below each other where they would be too narrow for a figure, not only on a phone.
# A chart's toolbar lies at its foot, on the right, where the least is covered. Its nameless PNG is not offered.
PAGE_STYLE = """<style>
[data-testid="stColumn"] { min-width: min(26rem, 100%); }
[class*="st-key-explain_"] { flex-wrap: nowrap; }
[data-testid="stMainBlockContainer"] { padding-top: 4.5rem; }
:is([data-selected="true"], [data-testid="stSliderThumbValue"]) p { color: light-dark(#4A38C9, #B0A8FA); }
button kbd[aria-label] { color: inherit; opacity: 1; }
.js-plotly-plot :is(.xtick, .ytick, [class^="g-x"], [class^="g-y"], .legend, .colorbar) text {
  fill: currentColor !important; }
.js-plotly-plot .modebar-container, .js-plotly-plot .modebar { top: auto !important; bottom: 0; }
[data-testid="stFullScreenFrame"]:has([data-testid="stEChartsChart"]) [data-testid="stElementToolbar"] {
  top: auto; bottom: 0; }
[data-testid="stElementToolbarButton"]:has([aria-label^="Download as PNG"]) { display: none; }
[data-testid="stCaptionContainer"] { opacity: 1; }
[data-testid="stCaptionContainer"] p { color: color-mix(in srgb, currentColor 40%, var(--st-text-color, inherit)); }
</style>"""
_STYLE = f"""<style>
.l2kv-strip {{ line-height: 1.5; font-size: .86rem; max-height: 24rem; overflow-y: auto; unicode-bidi: isolate; }}
.l2kv-strip span {{ display: inline-block; max-width: 100%; padding: 0 .12rem; margin: 1px; border-radius: 3px;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }}
.l2kv-kept {{ background: {PRIMARY}38; border: 1px solid transparent; }}
.l2kv-gone {{ border: 1px dashed #8A8F98; opacity: .62; text-decoration: line-through; }}
</style>"""


def headline(answer: str) -> str:
    """Write an answer as Markdown: its first sentence as the heading, the others below."""
    short, _, rest = answer.partition(". ")
    return f"##### {plain(short)}{'.' * bool(rest)}" + (f"\n\n{plain(rest)}" if rest else "")


def visible(text: str) -> str:
    """Make spaces, line ends and control characters visible. The result is not HTML: escape it."""
    return "".join(_visible_character(c) for c in text)


def printable(text: str) -> str:
    """Make control characters visible, except line ends and tabs."""
    return "".join(c if c in " \n\t" else _visible_character(c) for c in text)


def plain(text: str) -> str:
    """Escape text for Streamlit's Markdown: no links, images, formulas, emoji codes or markup."""
    return _MARKDOWN.sub(r"\\\1", printable(" ".join(text.split())))


def unmarked(markdown: str) -> str:
    """Write a caption's Markdown as plain text: without its escapes, bold and italics."""
    return re.sub(r"\\(.)|\*+", r"\1", markdown)


def escaped(text: str) -> str:
    """Escape running text for HTML, in an element or in a quoted attribute."""
    return html.escape(printable(text))


def token_strip(labels: Sequence[str], kept: Sequence[bool]) -> str:
    """Write tokens as HTML in reading order, kept ones solid, evicted ones hollow and struck through."""
    chips, hidden = [], len(labels) - MOST_TOKENS
    for i, (label, keep) in enumerate(zip(labels, kept, strict=True)):
        if hidden > 0 and i == MOST_TOKENS // 2:
            chips.append(f"<em> … {counted(hidden, 'token')} not shown … </em>")
        if hidden > 0 and MOST_TOKENS // 2 <= i < len(labels) - MOST_TOKENS // 2:
            continue
        state, word = ("l2kv-kept", "kept") if keep else ("l2kv-gone", "evicted")
        chips.append(f'<span class="{state}" title="{i}: {word}">{html.escape(visible(label))}</span>')
    return f'{_STYLE}<div class="l2kv-strip" tabindex="0" role="group" aria-label="Tokens">{"".join(chips)}</div>'


def _visible_character(c: str) -> str:
    if c in _SHOWN_AS:
        return _SHOWN_AS[c]
    return f"U+{ord(c):04X}" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c
