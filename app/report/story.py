"""A story, or a chat of several, as a report: one page with texts, scores, bytes and the code of each compression.

Runs no model, and draws no figures, so it needs no library of charts.
"""

from __future__ import annotations

from datetime import date

from analysis.plans.export import Generation, library_code
from analysis.stories import Story, Told, introduction
from analysis.words import counted, human_bytes, percent
from app.report.writing import Section, Table, document


def report(*turns: Story) -> str:
    """Write a story, or the turns of a chat, as the HTML of one page."""
    first = turns[0]
    told = [Section("What this is", introduction(first))]
    if len(turns) == 1:
        told += [Section("Scores and cost", (_about(first),), table=_scores(first))]
        told += [Section("The prompt", (first.prompt,))]
    else:
        told += [Section(f"Turn {n}", (one.prompt, _about(one)), table=_scores(one)) for n, one in enumerate(turns, 1)]
    code = tuple(
        (f"With this library: {cache.title}", library_code(cache.spec, first.model, _again(first, cache)))
        for cache in first.caches
        if cache.spec is not None
    )
    again = f"The scripts {'answer the first message' if first.chat else 'continue the prompt'} again, "
    again += "and take the most probable token each time"
    again += ": they do not draw the sampled tokens again." if any(turn.sampling.temperature for turn in turns) else "."
    told.append(Section("The code", (again,), code=code))
    lead = f"What compression changes in {first.model}. Written on {date.today():%d %B %Y}."
    return document(first.name, lead, told)


def _about(story: Story) -> str:
    asked = f"Expected: {story.answer}. " if story.answer else ""
    read = counted(story.at(0, 0).seen, "token")
    return (
        f"{asked}{read} read, up to {counted(story.n_steps, 'new token')}; one prompt is an anecdote. "
        "All caches were decoded in step, and what was read was compressed before its last token. "
        + story.sampling.told()
    )


def _scores(story: Story) -> Table:
    last, caches = story.n_steps - 1, range(len(story.caches))
    answer: Table = {
        "answer": [_score(story.score(i, last)) for i in caches],
        "heads that hold the answer": [_share(story.answer_held(i, last)) for i in caches],
    }
    rates = [cache.tokens_per_second for cache in story.caches]
    apart = "" if story.told_apart else ", not told apart"
    timed: Table = {f"tokens/s alone, once{apart}": [f"{rate:.1f}" if rate else "" for rate in rates]}
    return {
        "cache": [cache.title for cache in story.caches],
        **(answer if story.answer else {}),
        f"bytes ({story.dtype})": [human_bytes(story.nbytes(i, last)) for i in caches],
        "share of a full cache of as many tokens": [percent(story.share(i, last)) for i in caches],
        **(timed if any(rates) else {}),
        "text": [story.at(i, last).text for i in caches],
    }


def _again(story: Story, cache: Told) -> Generation:
    return Generation(story.prompt, story.chat, len(cache.steps), story.counted_dtype)


def _score(found: bool | None) -> str:
    return {True: "found", False: "not found", None: "open: it was stopped"}[found]


def _share(held: float | None) -> str:
    return "" if held is None else percent(held)
