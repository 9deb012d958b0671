"""Keys of a page: pressed anywhere but in a field, each does what a button would; `?` lists them.

Each press has a number, and the latest ones are sent together, so that none is lost where a script runs longer than a
key is held: messages that wait for a script to end replace each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import streamlit as st

from app import state

_SHOWN = {"ArrowLeft": "←", "ArrowRight": "→", "ArrowUp": "↑", "ArrowDown": "↓", " ": "Space"}
_PAUSE = 150  # milliseconds from one message to the next while keys are pressed
_SENT = 64  # latest presses that are sent together
_ANSWERED = state.Slot("keys_answered", 0)
"""Number of the last press that was answered."""
IN_BROWSER = "l2kv-key"
"""Event of the document for keys that a component of the page answers itself."""
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
  const known = new Map(data.keys.map(([key, , , sent]) => [key, sent]))
  const open = () => dialog.showModal()
  // Outlives this call, which is made again at every run. What is sent is the latest presses and not the new ones:
  // of several messages the server reads the last.
  const held = (parentElement.held ??= {{ pressed: [], number: 0 }})
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
    if (event.ctrlKey || event.metaKey || event.altKey || !(at instanceof Element)) return
    const within = selector => at.closest(selector) ?? at.getRootNode().host?.closest(selector)
    const field = "input:not([data-keys=page]), textarea, select, [contenteditable], [role=slider], " +
      "[role=listbox], [role=menu], [role=dialog], [role=application], [data-testid=stDataFrame]"
    // Arrows move within a group that was reached by keyboard; one that was clicked is done with.
    const listed = dialog.open
    if (!listed && (within(field) || (within("[role=radio], [role=tab]") && !held.pointed))) return
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key
    if (key === " " && !listed && within("button, a, summary") && !held.pointed) return
    if (listed && (key === "?" || known.has(key))) dialog.close()  // the key does what it would without the list
    if (key === "?") listed || open()
    else if (known.get(key)) {{
      held.number = Math.max(held.number + 1, Date.now())  // goes on where the listener is made anew
      held.pressed = [...held.pressed, [held.number, key]].slice(-{_SENT})
      if (held.timer === undefined) held.send()
    }} else if (known.has(key)) document.dispatchEvent(new CustomEvent("{IN_BROWSER}", {{ detail: key }}))
    else return
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


def listen(bindings: Mapping[str, tuple[str, Callable[[], object] | None]], *, hint: str) -> None:
    """Listen to the keys of a page.

    Args:
        bindings: key, as a browser names it, -> what it does in words, and the function that does it; None where a
            component of the page does it, which hears `IN_BROWSER`.
        hint: line that stands on the page; a click on it lists the keys, as `?` does.
    """

    def pressed() -> None:
        for number, key in st.session_state["keys"].get("pressed") or ():
            if number > _ANSWERED.get():
                _ANSWERED.set(number)
                if act := bindings.get(key, ("", None))[1]:
                    act()

    keys = [(key, _SHOWN.get(key, key.capitalize()), about, act is not None) for key, (about, act) in bindings.items()]
    listed = [*keys, ("?", "?", "list the keys", False)]
    _LISTENER(key="keys", data={"hint": hint, "keys": listed}, on_pressed_change=pressed)
