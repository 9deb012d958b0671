"""Stories told by a model: live, token by token, turn by turn in a chat, or recorded to come with the program."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import replace

from analysis.demo.presets import Preset
from analysis.demo.questions import HALF
from analysis.evaluation.prompts import decided, decoded, prompt_labels
from analysis.models.load import LoadedModel
from analysis.preview import Columns, heads_that_evict, stream, tokens_per_second
from analysis.progress import Progress, unheard
from analysis.sampling import GREEDY, Sampling
from analysis.stories import FULL, MOST_COUNTED, TIMED, Step, Story, Told, name_of
from l2kv.spec import CompressionSpec


def tell(
    loaded: LoadedModel,
    preset: Preset,
    specs: Mapping[str, CompressionSpec],
    *,
    new_tokens: int,
    dtype: str = "",
    sampling: Sampling = GREEDY,
    progress: Progress = unheard,
) -> Generator[Story, None, None]:
    """Generate, and yield the story after each new token, and at last as ended; a decided task ends it, but not a chat.

    Close the iterator to stop at once. Raises as `analysis.preview.stream`.

    Args:
        preset: the prompt, and the answer if it has one.
        specs: the compressed caches, by name.
        dtype: what bytes are told in; by default what the model runs in.
    """
    rows = stream(
        loaded, preset.text, [None, *specs.values()], max_new_tokens=new_tokens, chat=preset.chat, sampling=sampling,
        count_heads=True, progress=progress,
    )  # fmt: skip
    yield from _grown(_begun(loaded, preset, specs, dtype, sampling), rows)


class Chat:
    """A chat over several caches, full and compressed, which live on between its turns. Keeps no model.

    Each cache has its own answers, and so its own memory of the chat.

    Args:
        specs: the compressed caches, by name.
        dtype: what bytes are told in; by default what the model runs in.
    """

    def __init__(self, specs: Mapping[str, CompressionSpec], *, dtype: str = "") -> None:
        self.specs, self.dtype = dict(specs), dtype
        self.turns: tuple[Story, ...] = ()
        """A story of each message, the last of which grows token by token."""
        self._columns: Columns | None = None

    def say(
        self,
        loaded: LoadedModel,
        message: str,
        *,
        new_tokens: int,
        sampling: Sampling = GREEDY,
        progress: Progress = unheard,
    ) -> Generator[Story, None, None]:
        """Answer a message, as `tell`. An answer that is stopped stays in the caches as far as it got.

        Raises:
            TextError: as `Columns.asked`; the chat stays as it was.
            OutOfMemoryError, ModelError, SpecError: as `stream`; the chat then has to begin anew.
        """
        columns = self._columns or Columns(loaded, [None, *self.specs.values()])
        texts = columns.asked(loaded, message, new_tokens=new_tokens)
        story = _begun(loaded, Preset("Chat", message, chat=True), self.specs, self.dtype, sampling)
        labels = (decoded(loaded.tokenizer, text) if len(text) <= MOST_COUNTED else () for text in texts)
        caches = (replace(cache, labels=read) for cache, read in zip(story.caches, labels, strict=True))
        story = replace(story, caches=tuple(caches))
        # Until they have read it: half a message cannot be answered.
        earlier, self.turns, self._columns = self.turns, (), None
        rows = columns.write(
            loaded, texts, max_new_tokens=new_tokens, sampling=sampling, count_heads=True, progress=progress
        )
        with closing(_grown(story, rows)) as stories:
            for story in stories:
                self.turns, self._columns = (*earlier, story), columns
                yield story


def _begun(
    loaded: LoadedModel, preset: Preset, specs: Mapping[str, CompressionSpec], dtype: str, sampling: Sampling
) -> Story:
    """Everything of a story but its steps."""
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
        sampling=sampling,
    )


def _grown(story: Story, rows: Generator[tuple[Step, ...], None, None]) -> Generator[Story, None, None]:
    with closing(rows):
        for row in rows:
            story = replace(story, caches=tuple(map(_that_wrote, story.caches, row)))
            yield story
            if story.answer and not story.chat and all(decided(story.answer, step.text) for step in row):
                break
    yield replace(story, ended=True)


def _that_wrote(cache: Told, step: Step) -> Told:
    return cache if cache.steps and cache.steps[-1].finished else replace(cache, steps=(*cache.steps, step))


def timed(loaded: LoadedModel, story: Story, *, progress: Progress = unheard) -> Story:
    """Time the decoding of each cache of a story, one after the other. Raises as `stream`."""
    caches = []
    for i, cache in enumerate(story.caches):
        progress(i, len(story.caches), "caches")
        rate = tokens_per_second(loaded, story.prompt, cache.spec, chat=story.chat, new_tokens=TIMED)
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
    *_, story = tell(loaded, preset, {name_of(each): each for each in specs}, new_tokens=new_tokens, dtype=dtype)
    return story
