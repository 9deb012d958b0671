"""A story as a report: one page with its text, scores, bytes, and the code of each compression. Runs no model."""

from __future__ import annotations

from analysis.plans.export import Generation, library_code
from analysis.stories import Story, Told
from analysis.words import counted, human_bytes
from app.report.writing import Section, Table, document


def report(story: Story) -> str:
    """Write a story as the HTML of one page. A report has no figures, and so no library of charts."""
    return document(f"What compression changes in {story.model}", story.name, sections(story))


def sections(story: Story) -> tuple[Section, ...]:
    """Write the sections of a story: the scores, the texts, the code."""
    last, caches = story.n_steps - 1, range(len(story.caches))
    scores: Table = {
        "cache": [cache.name for cache in story.caches],
        **({"answer": [_score(story.score(i, last)) for i in caches]} if story.answer else {}),
        f"bytes ({story.dtype})": [human_bytes(story.nbytes(i, last)) for i in caches],
        "share of a full cache of as many tokens": [f"{story.share(i, last):.0%}" for i in caches],
        "heads that hold the answer": [_share(story.answer_held(i, last)) for i in caches],
        "tokens/s alone": [f"{cache.tokens_per_second:.1f}" if cache.tokens_per_second else "not timed"
                           for cache in story.caches],
        "text": [story.at(i, last).text for i in caches],
    }  # fmt: skip
    asked = f"Expected: {story.answer}. " if story.answer else ""
    length = f"Prompt of {counted(len(story.labels), 'token')}, up to {counted(story.n_steps, 'new token')}"
    about = (
        f"{asked}{length}; one prompt is an anecdote. "
        "All caches were decoded in step, and the prompt was compressed before its last token was read. "
        "The scripts do this again, and take the most probable token each time."
    )
    code = tuple(
        (f"With this library: {cache.name}", library_code(cache.spec, story.model, _again(story, cache)))
        for cache in story.caches
        if cache.spec is not None
    )
    return (
        Section("Scores and cost", tuple(filter(None, (story.why, about))), table=scores),
        Section("The prompt", (story.prompt,)),
        Section("The code", code=code),
    )


def _again(story: Story, cache: Told) -> Generation:
    return Generation(story.prompt, story.chat, len(cache.steps), story.counted_dtype)


def _score(found: bool | None) -> str:
    return {True: "found", False: "not found", None: "open: it was stopped"}[found]


def _share(held: float | None) -> str:
    return "" if held is None else f"{held:.0%}"
