"""Stories told by a model: live, token by token, or recorded to come with the program."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import replace

from analysis.demo.presets import Preset
from analysis.demo.questions import HALF
from analysis.evaluation.prompts import decided, prompt_labels
from analysis.models.load import LoadedModel
from analysis.preview import GREEDY, Sampling, heads_that_evict, stream, tokens_per_second
from analysis.progress import Progress, unheard
from analysis.stories import FULL, Step, Story, Told, name_of
from l2kv.spec import CompressionSpec


def begin(
    loaded: LoadedModel,
    preset: Preset,
    specs: Mapping[str, CompressionSpec],
    *,
    dtype: str = "",
) -> Story:
    """Make the beginning of a story: everything but its steps.

    Args:
        preset: the prompt, and the answer if it has one.
        specs: the compressed caches, by name.
        dtype: what bytes are told in; by default what the model runs in.

    Raises:
        TextError: as `prompt_tokens`.
    """
    labels, answer_at = prompt_labels(loaded.tokenizer, preset.text, preset.answer, chat=preset.chat)
    return Story(
        model=loaded.name,
        name=preset.name,
        prompt=preset.text,
        caches=(Told(FULL, None), *(Told(name, spec) for name, spec in specs.items())),
        why=preset.why,
        answer=preset.answer,
        chat=preset.chat,
        labels=labels,
        answer_at=answer_at,
        heads=heads_that_evict(loaded),
        counted_dtype=loaded.dtype,
        # Pairs in fewer bits take what they take, whatever the dtype of the rest.
        dtype=loaded.dtype
        if any(spec.key_bits or spec.value_bits for spec in specs.values())
        else dtype or loaded.dtype,
        ended=False,
    )


def tell(
    loaded: LoadedModel,
    story: Story,
    *,
    new_tokens: int,
    sampling: Sampling = GREEDY,
    count_heads: bool = True,
    progress: Progress = unheard,
) -> Generator[Story, None, None]:
    """Generate, and yield the story after each new token, and at last as ended; a decided task ends it, but not a chat.

    Close the iterator to stop at once. Raises as `analysis.preview.stream`.
    """
    rows = stream(
        loaded,
        story.prompt,
        [cache.spec for cache in story.caches],
        max_new_tokens=new_tokens,
        chat=story.chat,
        sampling=sampling,
        count_heads=count_heads,
        progress=progress,
    )
    with closing(rows):
        for row in rows:
            caches = zip(story.caches, row, strict=True)
            story = replace(story, caches=tuple(_with(cache, step) for cache, step in caches))
            yield story
            if story.answer and not story.chat and all(decided(story.answer, step.text) for step in row):
                break
    yield replace(story, ended=True)


def _with(cache: Told, step: Step) -> Told:
    return cache if cache.steps and cache.steps[-1].finished else replace(cache, steps=(*cache.steps, step))


def timed(loaded: LoadedModel, story: Story, *, progress: Progress = unheard) -> Story:
    """Time the decoding of each cache of a story, one after the other. Raises as `stream`."""
    caches = []
    for i, cache in enumerate(story.caches):
        progress(i, len(story.caches), "caches")
        rate = tokens_per_second(loaded, story.prompt, cache.spec, chat=story.chat)
        caches.append(replace(cache, tokens_per_second=rate))
    progress(len(caches), len(caches), "caches")
    return replace(story, caches=tuple(caches))


def record_story(loaded: LoadedModel, preset: Preset, *, dtype: str = "", new_tokens: int = 24) -> Story:
    """Tell a preset to its end: over its own compression, the one beside it, and high norm where random loses the task.

    Raises as `stream`.
    """
    spec = preset.spec or HALF
    specs = [spec, *([preset.beside] if preset.beside else [])]
    if preset.beside and preset.beside.policy == "random" and not preset.chat:
        specs.append(replace(spec, policy="high_norm"))
    story = begin(loaded, preset, {name_of(each): each for each in specs}, dtype=dtype)
    *_, story = tell(loaded, story, new_tokens=new_tokens)
    return story
