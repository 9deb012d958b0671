"""The stage of the page Demo: caches side by side as HTML, each with its text, score, bytes and layers. Pure functions.

Colour carries the task: green where the answer was found, red where it was lost. The full cache is grey. A token of the
prompt is as solid as the share of heads that hold it, and hollow where fewer than half do.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from itertools import pairwise

from analysis.stories import MOST_COUNTED, Story, Told, introduction
from analysis.words import counted, human_bytes, layers_listed, percent, span
from app.components.markup import escaped, visible
from app.figures.style import CONTRAST, FULL_GREY, PRIMARY

_PROMPT_TAIL = 110  # characters
_AROUND = 14  # tokens shown before and after each that says the answer
_MOST = 160  # tokens shown where there is no answer
HALF = 0.5

CSS = f"""
.l2kv-stage {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(16rem, 100%), 1fr)); gap: .75rem; }}
.l2kv-cache {{ border: 1px solid color-mix(in srgb, currentColor 18%, transparent); border-top: 4px solid {PRIMARY};
  border-radius: .5rem; padding: .6rem .8rem; min-width: 0;
  display: grid; grid-template-rows: subgrid; grid-row: span 4; row-gap: .2rem; }}
.l2kv-cache.full {{ border-top-color: {FULL_GREY}; }}
.l2kv-cache.found {{ box-shadow: inset 0 0 0 2px #1B7F3B; }}
.l2kv-cache.lost {{ box-shadow: inset 0 0 0 2px #C0392B; }}
.l2kv-name {{ font-weight: 600; display: flex; gap: .5rem; justify-content: space-between; align-items: flex-start; }}
.l2kv-score {{ color: #fff; border-radius: .4rem; padding: 0 .5rem; font-weight: 600; flex: none; font-size: .9em; }}
.l2kv-score.found {{ background: #1B7F3B; }} .l2kv-score.lost {{ background: #C0392B; }}
.l2kv-said {{ white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; min-height: 3rem; max-height: 16rem;
  overflow-y: auto; unicode-bidi: isolate; margin: .3rem 0; }}
.l2kv-asked {{ color: color-mix(in srgb, currentColor 68%, transparent); }}
.l2kv-new {{ font-weight: 600; }}
.l2kv-bytes {{ font-size: 1.9rem; font-weight: 700; line-height: 1.2; font-variant-numeric: tabular-nums; }}
.l2kv-small {{ font-size: .86rem; }}
.l2kv-layers {{ display: flex; align-items: flex-end; gap: 1px; height: 2.2rem; margin: .3rem 0; }}
.l2kv-layers i {{ flex: 1 1 0; height: 100%; min-width: 1px; position: relative;
  background: color-mix(in srgb, currentColor 12%, transparent); }}
.l2kv-layers i b {{ position: absolute; bottom: 0; left: 0; right: 0; background: {PRIMARY}; }}
.full .l2kv-layers i b {{ background: {FULL_GREY}; }}
.l2kv-tokens {{ line-height: 1.55; font-size: .82rem; max-height: 9rem; overflow-y: auto; unicode-bidi: isolate; }}
.l2kv-tokens span {{ padding: 0 .1rem; margin: 1px; border-radius: 3px; border: 1px solid transparent;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; display: inline-block; max-width: 100%; }}
.l2kv-tokens .hollow {{ border: 1px dashed {FULL_GREY}; text-decoration: line-through; }}
.l2kv-tokens .answer {{ outline: 2px solid {CONTRAST}; font-weight: 700; }}
.l2kv-start {{ margin-bottom: .75rem; font-size: 1.05rem; }} .l2kv-start p {{ margin: 0 0 .3rem; }}
.l2kv-ending {{ margin: .5rem 0; border-left: 4px solid {FULL_GREY}; padding-left: .6rem; }}
.l2kv-ending.found {{ border-color: #1B7F3B; }} .l2kv-ending.lost {{ border-color: #C0392B; }}
"""
STYLE = f"<style>{CSS}</style>"


def stage(story: Story, step: int, *, texts_only: bool = False) -> str:
    """Write all caches of a story after a step (-1 is before the first) as HTML, side by side. It needs `CSS`."""
    boxes = "".join(_cache(story, i, step, texts_only=texts_only) for i in range(len(story.caches)))
    legend = _legend(story) if "l2kv-tokens" in boxes else ""
    return f'<div class="l2kv-stage">{boxes}</div>{legend}'


def _legend(story: Story) -> str:
    answer = ', <span class="answer">outlined</span> those of the answer' if story.answer_at else ""
    of = "chat that each cache had read" if any(cache.labels for cache in story.caches) else "prompt"
    return (
        f'<p class="l2kv-small l2kv-tokens">Tokens of the {of}: <span style="background:color-mix(in srgb, '
        f'{PRIMARY} 45%, transparent)">solid</span> are held by at least half of the {story.heads} kv heads, and can '
        f'be lost in the heads that matter; <span class="hollow">hollow</span> by fewer{answer}.{_rates(story)}</p>'
    )


def _rates(story: Story) -> str:
    """Say what rates of decoding are worth, where there are some."""
    if not any(cache.tokens_per_second for cache in story.caches):
        return ""
    apart = "" if story.told_apart else ": not told apart"
    return f" Tokens/s: measured once, on this machine, with other work{apart}."


def beginning(story: Story) -> str:
    """Write as HTML what a story is about, for readers who know nothing of caches."""
    first, memory, *why = introduction(story)
    more = (f"{memory} Watch the tokens: a hollow one is forgotten in most places.", *why)
    rest = "".join(f"<p>{escaped(text)}</p>" for text in more)
    return f'<div class="l2kv-start"><p><b>{escaped(first)}</b></p>{rest}</div>'


def ending(story: Story, note: str = "") -> str:
    """Write as HTML what the end of a story says of the task. A note says how far the story stands for others."""
    last = story.n_steps - 1
    scores = [story.score(i, last) for i in range(len(story.caches))]
    said = []
    if scores[0] is False:
        said.append(
            _ending(
                "",
                f"The full cache does not give {story.answer} either, so this says nothing of compression: take a task "
                "that the model solves.",
            )
        )
    for i, cache in enumerate(story.caches[1:], 1):
        if scores[0] is False or scores[i] is None:
            continue
        why = _held_in_words(story.answer_held(i, last), found=bool(scores[i]))
        said.append(
            _ending(
                "found" if scores[i] else "lost",
                f"{'✓' if scores[i] else '✗'} {cache.title}: {story.answer} "
                f"{'found' if scores[i] else 'not found'}, in {human_bytes(story.nbytes(i, last))} instead of "
                f"{human_bytes(story.full_nbytes(i, last))}.{why}",
            )
        )
    task = "Only the task counts" if story.answer else "Nothing is asked for here"
    return "".join(said) + _ending("l2kv-small", f"{task}: another wording isn't wrong. {note}")


def _ending(kind: str, text: str) -> str:
    return f'<p class="l2kv-ending {kind}">{escaped(text)}</p>'


def _held_in_words(held: float | None, *, found: bool) -> str:
    """Say how many heads hold the answer's tokens, and where that did not help."""
    if held is None:
        return ""
    lost = held >= HALF and not found
    end = ", and yet it is not found: the heads that matter can be among the others." if lost else "."
    return f" {percent(held)} of heads hold its tokens{end}"


def _cache(story: Story, i: int, step: int, *, texts_only: bool) -> str:
    cache, asked = story.caches[i], f'<span class="l2kv-asked">{escaped(_tail(story))}</span>'
    kind = "full" if cache.spec is None else "compressed"
    if step < 0 or not cache.steps:
        return _box(kind, cache, "", asked, "")
    now = story.at(i, step)
    score = {True: "found", False: "lost", None: ""}[story.score(i, step)]
    says = f'{asked}<span class="l2kv-new">{escaped(now.text)}</span>'
    below = _small(_cut(story, i, step)) if texts_only else _memory(story, i, step) + _tokens(story, i, step)
    return _box(f"{kind} {score}", cache, score, says, below)


def _box(kind: str, cache: Told, score: str, says: str, below: str) -> str:
    word = {"found": "✓ found", "lost": "✗ not found"}.get(score)
    badge = f'<span class="l2kv-score {score}">{word}</span>' if word else ""
    return (
        f'<div class="l2kv-cache {kind}"><div><div class="l2kv-name"><span>{escaped(cache.title)}</span>{badge}</div>'
        f"{_small(escaped(cache.keeps))}</div>"
        f'<div class="l2kv-said" tabindex="0" role="group" aria-label="Text">{says}</div>{below}</div>'
    )


def _tail(story: Story) -> str:
    tail = story.prompt[-_PROMPT_TAIL:]
    if len(story.prompt) > _PROMPT_TAIL:
        tail = "… " + (tail.partition(" ")[2] or tail)
    return tail + "\n" * story.chat  # an answer does not go on with the question


def _memory(story: Story, i: int, step: int) -> str:
    """Write what a cache takes, and as a picture what each of its layers holds of the tokens seen."""
    cache, now = story.caches[i], story.at(i, step)
    spec, seen = cache.spec, counted(now.seen, "token")
    skipped = spec.skip_layers if spec else ()
    share = f"{percent(story.share(i, step))} of a full cache" if spec else ""
    share += f": all in {layers_listed(skipped)}" if skipped else ""
    others = [n for layer, n in enumerate(now.held) if layer not in skipped] or now.held
    told = f"{span(others)} of {seen} held {'in each other' if skipped else 'per'} layer"
    rate = f" · {cache.tokens_per_second:.1f} tokens/s alone" if cache.tokens_per_second else ""
    shares = (n / max(now.seen, 1) for n in now.held)
    bars = "".join(f'<i><b style="height:{share:.0%}"></b></i>' for share in shares)
    notes = [_cut(story, i, step)]
    if now.finished and not now.text:
        notes.append("It ended at once, without a word.")
    if spec is not None and min(now.held) < now.seen and min(now.held) <= spec.protect_first + spec.protect_last:
        notes.append("It holds the protected tokens alone: the policy chose none.")
    if spec is not None and min(now.held) == now.seen <= spec.prune_after:
        notes.append(f"Nothing is evicted yet: that begins at {counted(spec.prune_after, 'token')}.")
    return (
        f'<div><div><span class="l2kv-bytes">{human_bytes(story.nbytes(i, step))}</span> '
        f'<span class="l2kv-small">{share}</span></div>'
        f'<div class="l2kv-layers" role="img" aria-label="{told}">{bars}</div>'
        f"{_small(told + rate)}{_small(' '.join(filter(None, notes)))}</div>"
    )


def _cut(story: Story, i: int, step: int) -> str:
    """Say that an answer of a chat is cut: it does not grow any more, and the model did not end it."""
    now = story.at(i, step)
    cut = story.chat and story.ended and step >= story.n_steps - 1 and not now.finished
    return f"Stopped after {counted(len(now.token_ids), 'token')}." if cut else ""


def _small(text: str) -> str:
    return f'<div class="l2kv-small">{text}</div>'


def _tokens(story: Story, i: int, step: int) -> str:
    """Why an answer is found or lost: the tokens read before it, and how many heads still hold them."""
    now = story.at(i, step)
    if story.caches[i].spec is None or not story.heads:
        return ""
    if not now.kept:
        return _small(f"Which tokens are held is counted for up to {counted(MOST_COUNTED, 'token')}.")
    shares = [n / story.heads for n in now.kept]
    lead = ""
    if (held := story.answer_held(i, step)) is not None:
        lead = _small(f"<b>{escaped(story.answer)}</b> in the prompt: held by {percent(held)} of heads")
    labels = story.caches[i].labels or story.labels
    return f"<div>{lead}{token_strip(labels, shares, story.answer_at, heads=story.heads)}</div>"


def token_strip(labels: Sequence[str], shares: Sequence[float], marked: Sequence[int], *, heads: int) -> str:
    """Write tokens as HTML, each as solid as the share of heads that hold it, with those that say the answer outlined.

    Of a long prompt only what is around the marked tokens is shown, or its beginning and end.
    """
    shown = _shown(len(labels), marked)
    chips = []
    for before, at in pairwise([-1, *shown]):
        if at - before > 1:
            chips.append(f"<em> … {at - before - 1} … </em>")
        share, answer = shares[at], " answer" * (at in marked)
        state = ("solid" if share >= HALF else "hollow") + answer
        word = f"{at}: held by {round(share * heads)} of {counted(heads, 'kv head')}"
        fill = f"background:color-mix(in srgb, {PRIMARY} {share * 45:.0f}%, transparent)" if share >= HALF else ""
        chips.append(f'<span class="{state}" style="{fill}" title="{word}">{html.escape(visible(labels[at]))}</span>')
    if shown and shown[-1] < len(labels) - 1:
        chips.append(f"<em> … {len(labels) - 1 - shown[-1]} … </em>")
    # What scrolls can be reached with the keyboard.
    return f'<div class="l2kv-tokens" tabindex="0" role="group" aria-label="Tokens read">{"".join(chips)}</div>'


def _shown(n: int, marked: Sequence[int]) -> list[int]:
    if marked:
        return sorted({j for i in marked for j in range(max(i - _AROUND, 0), min(i + _AROUND + 1, n))})
    return list(range(n)) if n <= _MOST else [*range(_MOST // 2), *range(n - _MOST // 2, n)]
