"""`train`, `card` and `demo`: a model of one's own, and what the app opens with."""

from __future__ import annotations

import argparse
from pathlib import Path

from analysis.commands.shared import (
    add_device,
    add_model,
    add_texts,
    counter,
    no_progress_bars,
    text_of,
    texts_of,
)
from analysis.errors import UserError
from analysis.models import BUNDLED


def add(commands) -> None:
    """Add the commands."""
    train = commands.add_parser("train", help="train a small model on a folder of .txt or .txt.xz files")
    train.add_argument("corpus", type=Path, help="the folder")
    train.add_argument("-o", "--out", type=Path, required=True, help="the model folder to write, or to go on with")
    train.add_argument("--shape", default="19m", help="tiny, 5m (two CPU cores) or 19m (a GPU; the default)")
    train.add_argument("--start-from", help="a model to go on with; its shape is taken")
    train.add_argument("--minutes", type=float, help="time to train for (20, unless steps are given)")
    for name, kind in (("steps", int), ("length", int), ("batch", int), ("learning-rate", float), ("decay", float)):
        train.add_argument(f"--{name}", type=kind)
    train.add_argument("--synthetic", type=float, help="share of sequences made of passkeys, needles and copies")
    train.add_argument("--seed", type=int)
    train.add_argument("--record-every", type=int, default=250, help="steps between two looks at the heads (250)")
    add_device(train)
    train.add_argument("--compile", action="store_true", help="compile the model first: worth it on a GPU")
    train.set_defaults(run=_train)

    card = commands.add_parser("card", help="measure a model that was trained here, and write its model card")
    card.add_argument("folder", type=Path, help="a model folder that `train` has finished")
    add_texts(card)
    card.add_argument("--data", default="", help="what the training data are, in words: stated on the card")
    card.add_argument("--licence", default="", help="of weights and data, in words: stated on the card")
    card.add_argument(
        "--note", action="append", default=[], help="words, or a file of them, to append; may be repeated"
    )
    add_device(card)
    card.set_defaults(run=_card)

    demo = commands.add_parser("demo", help="find presets for a model, and make the run that the app opens with again")
    add_model(demo)
    add_texts(demo)
    demo.add_argument(
        "--without-passkey", action="store_true", help="look for no passkey preset: for a model that cannot retrieve"
    )
    demo.add_argument("-o", "--out", type=Path, help="the folder to write to (the app's own, of the model's name)")
    demo.set_defaults(run=_demo)


def _train(arguments: argparse.Namespace) -> None:
    no_progress_bars()
    from analysis.training.loop import train
    from analysis.training.recipe import SHAPES, Recipe

    if arguments.shape not in SHAPES:
        raise UserError(f"--shape must be one of {', '.join(SHAPES)}, got {arguments.shape!r}")
    names = ("minutes", "steps", "length", "batch", "learning_rate", "decay", "synthetic", "seed")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if "steps" in given:
        given.setdefault("minutes", None)
    try:
        train(
            arguments.corpus,
            arguments.out,
            Recipe(shape=SHAPES[arguments.shape], **given),
            start_from=arguments.start_from,
            device=arguments.device,
            compiled=arguments.compile,
            record_every=arguments.record_every,
            log=lambda line: print(line, flush=True),
        )
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from the last checkpoint: two minutes are lost, or less.", end="")
        raise
    print(f"wrote {arguments.out}")


def _card(arguments: argparse.Namespace) -> None:
    texts = texts_of(arguments.texts)
    notes = tuple(text_of(note) if _is_file(note) else note for note in arguments.note)
    no_progress_bars()
    from analysis.training.card import Stated, make_card

    stated = Stated(arguments.data, arguments.licence, notes)
    print(f"wrote {make_card(arguments.folder, texts, stated, device=arguments.device, on_stage=counter())}")


def _demo(arguments: argparse.Namespace) -> None:
    texts = texts_of(arguments.texts)
    no_progress_bars()
    from analysis.finding import find_presets
    from analysis.models import load_model
    from analysis.presets import RESULT_FILES, make_demo, save_found

    count = counter()
    found = find_presets(
        load_model(arguments.model, device="cpu"),
        texts,
        without_passkey=arguments.without_passkey,
        on_done=lambda done, total: count("passages", done, total),
    )
    out = arguments.out or BUNDLED / found.model
    print(f"wrote {make_demo(arguments.model, out / RESULT_FILES['demo'])}")
    print(f"wrote {save_found(found, out / RESULT_FILES['presets'])}")
    for preset in found.presets:
        print(f"{preset.name}: {preset.why}")


def _is_file(words: str) -> bool:
    try:
        return Path(words).is_file()
    except OSError:  # too long for a name
        return False
