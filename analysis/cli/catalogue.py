"""`models` and `demo`: which models are at hand, one of them fetched, and what the app opens with made again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from analysis import defaults
from analysis.captures import Capture
from analysis.cli import options
from analysis.cli.inputs import loaded_model, quiet_libraries, texts_of
from analysis.cli.options import out
from analysis.cli.output import row_of, shown, tell, wrote
from analysis.demo.presets import RESULT_FILES, STORY_FILES, FoundPresets, Preset, bundled_texts
from analysis.models.at_hand import fetch, models_at_hand
from analysis.models.sizes import checkpoint_dtype
from analysis.records import load, save
from analysis.stories import Story
from analysis.timelines import Timeline
from l2kv.spec import CompressionSpec

Made = TypeVar("Made")


def models(
    name: Annotated[
        str | None, typer.Argument(parser=str, help="Model to fetch: smollm2, a hub id.", metavar="NAME")
    ] = None,
    json: options.Json = False,
) -> None:
    """List the models at hand, or fetch one by name."""
    if not name:
        columns = dict.fromkeys(("name", "kind", "size", "where"), "")
        tell(columns, map(row_of, models_at_hand()), json=json)
        return
    quiet_libraries()
    with shown("B", scale=True) as progress:
        fetched, folder = fetch(name, progress=progress)
    other = "" if fetched == name else f" (other weights than {name}: not quantised)"
    tell({}, [], json=json, answer=f"{fetched}{other} is in {folder}", name=fetched, folder=str(folder))


def demo(
    to: Annotated[Path, out("demo/my-model; what is in it already is kept", "Folder")],
    texts: Annotated[
        list[Path],
        typer.Argument(
            parser=Path, metavar="TEXTS", help="Text files or folders to search for presets; the bundled by default."
        ),
    ] = [],  # noqa: B006
    model: options.Model = defaults.MODEL,
    without_tasks: Annotated[
        bool, typer.Option("--without-tasks", help="Look for no preset with a task: the model solves none.")
    ] = False,
) -> None:
    """Make what the app opens with: presets, a run, a recorded generation, and stories. Run it again to go on."""
    documents = texts_of(texts)
    loaded = loaded_model(model, "cpu")
    from analysis.demo.finding import ARTICLE, find_presets
    from analysis.demo.telling import record_story
    from analysis.generations import record_timeline, text_sample
    from analysis.recorder import capture

    with shown("prompt") as progress:
        find = partial(find_presets, loaded, documents, tasks=not without_tasks, progress=progress)
        found = _kept(FoundPresets, to / RESULT_FILES["presets"], find)
    first = next(iter(bundled_texts().values()))
    text = next((preset.text for preset in found.presets if preset.name == ARTICLE), first)
    with shown("layer") as progress:
        _kept(Capture, to / RESULT_FILES["demo"], partial(capture, loaded, text, progress=progress))
    # The hardest answer to keep that there is, if there is any.
    stories = found.presets or (Preset("", first),)
    story = max(stories, key=lambda one: (bool(one.answer and not one.chat), -one.spec.keep_ratio if one.spec else -1))
    prompt, question, continuation = story.parts
    sample = text_sample(loaded, prompt, question=question, continuation=continuation, chat=story.chat)
    with shown("token") as progress:
        recorded = partial(record_timeline, loaded, sample, story.spec or CompressionSpec(), progress=progress)
        _kept(Timeline, to / RESULT_FILES["timeline"], recorded)
    told = [preset for preset in found.presets if preset.spec and preset.name != ARTICLE]
    dtype = checkpoint_dtype(model) or ""
    with shown("story") as progress:
        for i, preset in enumerate(told):
            progress(i, len(told), "stories")
            _kept(Story, to / STORY_FILES.format(i), partial(record_story, loaded, preset, dtype=dtype))
    for preset in found.presets:
        print(f"{preset.name}: {preset.why}")


def _kept(cls: type[Made], path: Path, make: Callable[[], Made]) -> Made:
    """Open what a stopped command has made already, or make it now."""
    if not path.exists():
        made = make()
        wrote(save(made, path))
        return made
    return load(cls, path)
