"""The player of a story, a component of our own: its steps are played, scrubbed and presented in the browser.

All steps are sent once, as the HTML of `app.components.stage`. So a key that is pressed while the server is busy is not
lost, and what the page draws meanwhile does not end a presentation. Knows no models; asks for nothing to be run.
"""

from __future__ import annotations

import base64
import gzip
import json
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import streamlit as st

from analysis.stories import Story
from app.components import keys, stage

_HTML = """
<div class="place"><div class="player" role="group" aria-label="Story">
  <div class="controls">
    <button class="play" type="button">Play</button>
    <button class="back" type="button">← Back</button>
    <button class="next" type="button">Next →</button>
    <input class="step" type="range" min="0" value="0" aria-label="Step of the story" data-keys="page">
    <output class="told"></output>
    <button class="present" type="button">Present</button>
  </div>
  <div class="shown"></div>
</div></div>
<dialog aria-label="Presentation"></dialog>
"""
_HERE = Path(__file__).parent
_KEYS = {
    "ArrowLeft": "one token back",
    "ArrowRight": "next token",
    "Home": "before the first token",
    "End": "last token",
    " ": "play or pause",
    "p": "present in large type; P or Esc closes it",
}


@lru_cache(maxsize=1)
def _component() -> Any:
    css, js = ((_HERE / f"player.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return st.components.v2.component(
        "l2kv_player", html=_HTML, css=stage.CSS + css, js=js.replace("KEY_EVENT", keys.IN_BROWSER)
    )


def player(story: Story, *, at_its_end: bool, note: str = "") -> None:
    """Draw a story that can be played, at its beginning or its end, and listen to its keys. Its end says the note."""
    _component()(key="story_player", data=content(story, note) | {"begin": story.n_steps if at_its_end else 0})
    keys.listen(
        {key: (about, None) for key, about in _KEYS.items()},
        hint="Keys: ← → move, Space plays, P presents, ? lists all",
    )


@lru_cache(maxsize=4)
def content(story: Story, note: str = "") -> dict[str, Any]:
    """What the browser is sent: the HTML of each step, from before the first token on, as base64 of gzipped JSON."""
    steps = [stage.stage(story, step) for step in range(-1, story.n_steps)]
    steps[0] = stage.beginning(story) + steps[0]
    steps[-1] += stage.ending(story, note)
    sent = base64.b64encode(gzip.compress(json.dumps(steps).encode(), 3, mtime=0)).decode()
    told = repr((story.model, story.prompt, [(cache.name, cache.steps[-1:]) for cache in story.caches]))
    return {"id": sha256(told.encode()).hexdigest()[:16], "last": story.n_steps, "steps": sent}
