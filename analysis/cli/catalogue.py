"""`models` and `demo`: which models are at hand, one of them fetched, and what the app opens with made again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from analysis import defaults
from analysis.captures import save_run
from analysis.cli import options
from analysis.cli.inputs import loaded_model, quiet_libraries, texts_of
from analysis.cli.output import row_of, shown, tell, wrote
from analysis.demo.presets import RESULT_FILES, STORY_FILES, Preset, bundled_texts
from analysis.models.at_hand import fetch, models_at_hand
from analysis.models.load import BUNDLED
from analysis.models.sizes import checkpoint_dtype
from analysis.records import save
from l2kv.spec import CompressionSpec


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
    to: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", parser=Path, help="Folder to write to; by default the app's, named after the model."
        ),
    ] = None,
) -> None:
    """Make what the app opens with: presets, a run, a recorded generation, and the stories of presets."""
    documents = texts_of(texts)
    loaded = loaded_model(model, "cpu")
    from analysis.demo.finding import ARTICLE, find_presets
    from analysis.demo.telling import record_story
    from analysis.generations import record_timeline, text_sample
    from analysis.recorder import capture

    with shown("prompt") as progress:
        found = find_presets(loaded, documents, tasks=not without_tasks, progress=progress)
    folder = to or BUNDLED / found.model
    first = next(iter(bundled_texts().values()))
    text = next((preset.text for preset in found.presets if preset.name == ARTICLE), first)
    wrote(save_run(capture(loaded, text), folder / RESULT_FILES["demo"]))
    wrote(save(found, folder / RESULT_FILES["presets"]))
    # The hardest answer to keep that there is, if there is any.
    stories = found.presets or (Preset("", first),)
    story = max(stories, key=lambda one: (bool(one.answer and not one.chat), -one.spec.keep_ratio if one.spec else -1))
    prompt, question, continuation = story.parts
    sample = text_sample(loaded, prompt, question=question, continuation=continuation, chat=story.chat)
    with shown("token") as progress:
        recorded = record_timeline(loaded, sample, story.spec or CompressionSpec(), progress=progress)
    wrote(save(recorded, folder / RESULT_FILES["timeline"]))
    dtype = checkpoint_dtype(model) or ""
    for i, preset in enumerate(one for one in found.presets if one.spec and one.name != ARTICLE):
        wrote(save(record_story(loaded, preset, dtype=dtype), folder / STORY_FILES.format(i)))
    for preset in found.presets:
        print(f"{preset.name}: {preset.why}")
