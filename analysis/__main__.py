"""The command line: `python -m analysis capture|heads|study|train|card|demo`. All but looking."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.errors import TextError, UserError
from analysis.models import BUNDLED

if TYPE_CHECKING:
    from analysis.across import Means
    from analysis.run import Capture
    from analysis.study import Study


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a mistake of the user's is one line on standard error and the exit status 2."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncancelled", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m analysis", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    capture = commands.add_parser("capture", help="run a model over a text and save what its heads did")
    capture.add_argument("text", help="a text file, or - for standard input")
    capture.add_argument("-o", "--out", type=Path, required=True, help="the run to write, such as run.safetensors")
    _add_model(capture)
    capture.add_argument("--device", help="cuda or cpu (default: the GPU where there is one)")
    capture.set_defaults(run=_capture)

    heads = commands.add_parser("heads", help="what a saved run says of each head")
    heads.add_argument("file", type=Path, help="a saved run")
    heads.set_defaults(run=_heads)

    study = commands.add_parser("study", help="what the heads do over many texts, with intervals")
    study.add_argument("texts", nargs="+", type=Path, help="text files, or folders of .txt files")
    study.add_argument("-o", "--out", type=Path, required=True, help="the table to write, or to go on with")
    _add_model(study)
    study.add_argument("--tokens", type=int, default=512, help="tokens of each piece of text (512, if the model can)")
    study.add_argument("--max-texts", type=int, default=16, help="pieces, taken from the files by turns (16)")
    study.add_argument("--device", help="cuda or cpu (default: the GPU where there is one)")
    study.set_defaults(run=_study)

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
    train.add_argument("--device", help="cuda or cpu (default: the GPU where there is one)")
    train.add_argument("--compile", action="store_true", help="compile the model first: worth it on a GPU")
    train.set_defaults(run=_train)

    card = commands.add_parser("card", help="measure a model that was trained here, and write its model card")
    card.add_argument("folder", type=Path, help="a model folder that `train` has finished")
    _add_texts(card)
    card.add_argument("--data", default="", help="what the training data are, in words: stated on the card")
    card.add_argument("--licence", default="", help="of weights and data, in words: stated on the card")
    card.add_argument(
        "--note", action="append", default=[], help="words, or a file of them, to append; may be repeated"
    )
    card.add_argument("--device", help="cuda or cpu (default: the GPU where there is one)")
    card.set_defaults(run=_card)

    demo = commands.add_parser("demo", help="find presets for a model, and make the run that the app opens with again")
    _add_model(demo)
    _add_texts(demo)
    demo.add_argument(
        "--without-passkey", action="store_true", help="look for no passkey preset: for a model that cannot retrieve"
    )
    demo.add_argument("-o", "--out", type=Path, default=BUNDLED, help="the folder to write to (the app's own)")
    demo.set_defaults(run=_demo)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--model", default="books-5m", help="a bundled name, a folder or a hub id (books-5m)")


def _add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--texts", nargs="+", type=Path, default=[], help="text files or folders of them (default: those of the app)"
    )


def _capture(arguments: argparse.Namespace) -> None:
    text = _text(arguments.text)
    _no_progress_bars()
    from analysis.capturing import capture
    from analysis.models import load_model
    from analysis.run import save_run

    loaded = load_model(arguments.model, device=arguments.device)
    run = capture(loaded, text, on_layer=_progress if sys.stderr.isatty() else None)
    save_run(run, arguments.out)
    for warning in run.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{arguments.out}: {run.n_tokens} tokens, {run.n_layers} layers, {run.seconds:.1f} s on {run.device}")
    _print_answer(run)


def _heads(arguments: argparse.Namespace) -> None:
    from analysis.measures import alr, correlation, sink_share, verdicts
    from analysis.run import load_run

    run = load_run(arguments.file)
    columns = (correlation(run), correlation(run, leave_out=1), alr(run) / run.n_tokens, correlation(run, "spearman"))
    print(f"{run.model}, {run.n_tokens} tokens, the query of the next token; layers and heads count from 0")
    print("layer head kv_head  gamma  no_sink  ALR/n  spearman  sink  verdict")
    share, verdict = sink_share(run), verdicts(run)
    for layer in range(run.n_layers):
        for head in range(run.n_heads):
            gamma, without, loss, rho = (column[layer, head] for column in columns)
            print(
                f"{layer:5} {head:4} {run.kv_head(head):7}  {gamma:+5.2f}  {without:+7.2f}  {loss:5.3f}  {rho:+8.2f}  "
                f"{share[layer, head]:4.2f}  {verdict[layer, head]}"
            )
    _print_answer(run)


def _study(arguments: argparse.Namespace) -> None:
    texts = _texts(arguments.texts)
    _no_progress_bars()
    from analysis.models import load_model
    from analysis.study import pieces, study

    loaded = load_model(arguments.model, device=arguments.device)
    most = (getattr(loaded.config, "max_position_embeddings", None) or sys.maxsize) - 1  # one for the next token
    if arguments.tokens > most:
        print(f"{loaded.name} was trained on {most + 1} positions: pieces are of {most} tokens", file=sys.stderr)
    given = pieces(loaded.tokenizer, texts, n_tokens=min(arguments.tokens, most), at_most=arguments.max_texts)
    count = _counter()
    try:
        done = study(loaded, given, arguments.out, on_text=lambda done, total, name: count("texts", done, total))
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on after the last text that was done.", end="")
        raise
    _print_study(done)
    print(f"wrote {arguments.out}")


def _print_study(study: Study) -> None:
    from analysis.across import answer, head_verdicts, layer_losses, layer_means, means, stability

    columns = (layer_means(study), layer_means(study, "gamma_without_sink"), means(layer_losses(study)))
    verdict = head_verdicts(study)
    print(f"{study.model}, {len(study.names)} texts of {study.n_tokens.min()} to {study.n_tokens.max()} tokens")
    print("means over heads and texts, for the query of the next token; 95 % intervals over texts; layers count from 0")
    print("layer  gamma                 no_sink               ALR/chance            verdicts on heads")
    for layer, words in enumerate(verdict):
        figures = "  ".join(_with_ends(of, layer, sign) for of, sign in zip(columns, ("+", "+", " "), strict=True))
        counts = ", ".join(f"{(words == name).sum()} {name}" for name in sorted(set(words)))
        print(f"{layer:5}  {figures}  {counts}")
    print(stability(layer_losses(study)))
    print(f"Does low norm predict attention in {study.model}? {answer(study)}")


def _with_ends(of: Means, layer: int, sign: str) -> str:
    if not of.defined[layer]:
        return f"{'undefined':20}"
    mean, low, high = (f"{values[layer]:{sign}.2f}" for values in (of.mean, of.low, of.high))
    ends = f"[{low}, {high}]" if of.defined[layer] > 1 else "[one text]"
    return f"{mean} {ends:14}"


def _train(arguments: argparse.Namespace) -> None:
    _no_progress_bars()
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
    texts = _texts(arguments.texts)
    notes = tuple(_text(note) if _is_file(note) else note for note in arguments.note)
    _no_progress_bars()
    from analysis.training.card import Stated, make_card

    stated = Stated(arguments.data, arguments.licence, notes)
    print(f"wrote {make_card(arguments.folder, texts, stated, device=arguments.device, on_stage=_counter())}")


def _demo(arguments: argparse.Namespace) -> None:
    texts = _texts(arguments.texts)
    _no_progress_bars()
    from analysis.finding import find_presets
    from analysis.models import load_model
    from analysis.presets import DEMO_RUN, FOUND_PRESETS, make_demo, save_found

    count = _counter()
    found = find_presets(
        load_model(arguments.model, device="cpu"),
        texts,
        without_passkey=arguments.without_passkey,
        on_done=lambda done, total: count("passages", done, total),
    )
    print(f"wrote {make_demo(arguments.model, arguments.out / DEMO_RUN.name)}")
    print(f"wrote {save_found(found, arguments.out / FOUND_PRESETS.name)}")
    for preset in found.presets:
        print(f"{preset.name}: {preset.why}")


def _print_answer(run: Capture) -> None:
    from analysis.measures import answer

    print(f"Does low norm predict attention in {run.model}? {answer(run)}")


def _no_progress_bars() -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of weights: ours is of layers


def _text(source: str) -> str:
    try:
        return sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"{source} cannot be read as UTF-8 text: {error}") from error


def _texts(sources: Sequence[Path]) -> Mapping[str, str]:
    """Text files, and those of folders, by name; the bundled ones if none are given."""
    if not sources:
        from analysis.presets import bundled_texts

        return bundled_texts()
    files = [file for source in sources for file in (sorted(source.glob("*.txt")) if source.is_dir() else [source])]
    if not files:
        raise TextError(f"There are no .txt files in {', '.join(map(str, sources))}.")
    return {file.stem: _text(str(file)) for file in files}


def _is_file(words: str) -> bool:
    try:
        return Path(words).is_file()
    except OSError:  # too long for a name
        return False


def _counter() -> Callable[[str, int, int], None]:
    """Shows (stage, done, total) on one line; nothing where nobody looks."""
    if not sys.stderr.isatty():
        return lambda stage, done, total: None

    def show(stage: str, done: int, total: int) -> None:
        print(f"\r{stage} {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


def _progress(done: int, total: int) -> None:
    print(f"\rlayer {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
