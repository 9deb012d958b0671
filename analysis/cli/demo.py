"""`demo`: what the app opens with, made again."""

from __future__ import annotations

import argparse
from pathlib import Path

from analysis.cli.shared import (
    add_model,
    add_texts,
    counter,
    no_progress_bars,
    texts_of,
)
from analysis.models.load import BUNDLED


def add(commands) -> None:
    """Add the commands."""
    demo = commands.add_parser("demo", help="find presets for a model, and make the run that the app opens with again")
    add_model(demo)
    add_texts(demo)
    demo.add_argument(
        "--without-tasks", action="store_true", help="look for no preset with a task: for a model that solves none"
    )
    demo.add_argument("-o", "--out", type=Path, help="the folder to write to (the app's own, of the model's name)")
    demo.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    texts = texts_of(arguments.texts)
    no_progress_bars()
    from analysis.captures import save_run
    from analysis.demo.finding import ARTICLE, find_presets
    from analysis.demo.presets import RESULT_FILES, bundled_texts
    from analysis.models.load import load_model
    from analysis.recorder import capture
    from analysis.records import save

    count = counter()
    loaded = load_model(arguments.model, device="cpu")
    found = find_presets(
        loaded,
        texts,
        tasks=not arguments.without_tasks,
        on_done=lambda done, total: count("prompts", done, total),
    )
    out = arguments.out or BUNDLED / found.model
    first = next(iter(bundled_texts().values()))
    text = next((preset.text for preset in found.presets if preset.name == ARTICLE), first)
    print(f"wrote {save_run(capture(loaded, text), out / RESULT_FILES['demo'])}")
    print(f"wrote {save(found, out / RESULT_FILES['presets'])}")
    for preset in found.presets:
        print(f"{preset.name}: {preset.why}")
