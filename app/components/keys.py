"""Keys of a page: pressed anywhere but in a field, each does what a button would; `?` lists them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import streamlit as st

from app import state

_SHOWN = {"ArrowLeft": "←", "ArrowRight": "→", "ArrowUp": "↑", "ArrowDown": "↓"}
_PAUSE = 150  # milliseconds from one message to the next while keys are pressed
_MOST = 100  # presses that are told again
_DONE = state.Slot("keys_done", 0.0)
"""When the last press was that has been obeyed, by the browser's clock."""
_LISTENER = st.components.v2.component(
    "keys",
    html="""<button type="button" class="hint"></button>
<dialog aria-label="Keys of this page"><h2>Keys</h2><dl></dl>
<form method="dialog"><button>Close</button></form></dialog>
""",
    css="""
.hint { background: none; border: 0; padding: 0; cursor: pointer; text-align: left;
  font: 0.875rem var(--st-font); color: color-mix(in srgb, var(--st-text-color) 75%, transparent); }
.hint:hover { color: var(--st-primary-color); }
dialog { font: 1rem var(--st-font); color: var(--st-text-color); background: var(--st-background-color);
  border: 1px solid var(--st-border-color); border-radius: 0.5rem; padding: 1rem 1.5rem; }
dialog::backdrop { background: rgba(0, 0, 0, 0.4); }
h2 { font-size: 1.1rem; margin: 0 0 0.5rem; }
dl { display: grid; grid-template-columns: auto 1fr; gap: 0.35rem 1rem; margin: 0 0 1rem; }
dt { font-weight: 600; } dd { margin: 0; }
form button { font: inherit; color: inherit; background: none; border: 1px solid var(--st-border-color);
  border-radius: 0.5rem; padding: 0.25rem 0.75rem; cursor: pointer; }
""",
    js=f"""
export default function ({{ data, parentElement, setStateValue }}) {{
  const dialog = parentElement.querySelector("dialog"), hint = parentElement.querySelector(".hint")
  hint.textContent = data.hint
  const list = parentElement.querySelector("dl")
  list.replaceChildren(...data.keys.flatMap(([, shown, about]) => [["dt", shown], ["dd", about]].map(([tag, text]) => {{
    const part = document.createElement(tag)
    part.textContent = text
    return part
  }})))
  const known = new Set(data.keys.map(([key]) => key))
  const open = () => dialog.open || dialog.showModal()
  // Outlives this call, which is made again at every run. What is sent is the latest presses and not the new ones:
  // of several messages the server reads the last.
  const held = (parentElement.held ??= {{ pressed: [] }})
  held.send = () => {{
    setStateValue("pressed", held.pressed)
    held.sent = held.pressed
    held.timer = setTimeout(() => {{
      held.timer = undefined
      if (held.sent !== held.pressed) held.send()
    }}, {_PAUSE})
  }}
  const point = () => {{ held.pointed = true }}
  const listen = event => {{
    const at = event.composedPath()[0]
    if (event.key === "Tab") held.pointed = false
    if (event.ctrlKey || event.metaKey || event.altKey || dialog.open || !(at instanceof Element)) return
    const within = selector => at.closest(selector) ?? at.getRootNode().host?.closest(selector)
    const field = "input, textarea, select, [contenteditable], [role=slider], [role=listbox], [role=menu], " +
      "[role=dialog], [role=application], [data-testid=stDataFrame]"
    // Arrows move within a group that was reached by keyboard; one that was clicked is done with.
    if (within(field) || (within("[role=radio], [role=tab]") && !held.pointed)) return
    if (event.key === "?") open()
    else if (known.has(event.key)) {{
      held.pressed = [...held.pressed.slice(-{_MOST}), [performance.timeOrigin + performance.now(), event.key]]
      if (held.timer === undefined) held.send()
    }} else return
    event.preventDefault()
    event.stopPropagation()
  }}
  hint.onclick = open
  document.addEventListener("pointerdown", point, true)
  document.addEventListener("keydown", listen, true)
  return () => {{
    document.removeEventListener("pointerdown", point, true)
    document.removeEventListener("keydown", listen, true)
  }}
}}
""",
)


def listen(bindings: Mapping[str, tuple[str, Callable[[], object]]], *, hint: str) -> None:
    """Listen to the keys of a page.

    Args:
        bindings: key, as a browser names it, -> what it does in words, and the function that does it.
        hint: line that stands on the page; a click on it lists the keys, as `?` does.
    """

    def pressed() -> None:
        for at, key in st.session_state["keys"].get("pressed") or ():
            if at > _DONE.get() and key in bindings:
                bindings[key][1]()
                _DONE.set(at)

    keys = [(key, _SHOWN.get(key, key), about) for key, (about, _) in bindings.items()]
    _LISTENER(key="keys", data={"hint": hint, "keys": [*keys, ("?", "?", "list the keys")]}, on_pressed_change=pressed)
