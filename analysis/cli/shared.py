"""What the commands share: reading texts, and telling how far they are."""

from __future__ import annotations

import argparse
import codecs
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from analysis.errors import TextError, UserError
from analysis.texts.read import decoded, read_documents, read_text

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel


# What is printed that not every encoding has, in letters that all have.
_IN_ASCII = {
    "Γ": "Gamma", "Δ": "Delta", "ρ": "rho", "σ": "sigma", "α": "alpha", "±": "+-", "≥": ">=", "≤": "<=", "≈": "~",
    "×": "x", "÷": "/", "√": "sqrt", "→": "->", "−": "-", "–": "-", "—": "-", "…": "...", "“": '"', "”": '"',
    "‘": "'", "’": "'", "·": "*", "\u00a0": " ", "\u202f": " ",
}  # fmt: skip


def any_encoding(*streams: TextIO | None) -> None:
    """Let streams print what their encoding lacks in other letters, or as "?", in place of raising.

    Standard output is not UTF-8 where it is redirected on Windows, nor in containers without a locale.
    """
    codecs.register_error("l2kv", _in_other_letters)
    for stream in streams:
        if hasattr(stream, "reconfigure"):  # None where there is no console, and anything in a test
            stream.reconfigure(errors="l2kv")


def _in_other_letters(error: UnicodeError) -> tuple[str | bytes, int]:
    """A codec's error handler."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_IN_ASCII.get(c, "?") for c in error.object[error.start : error.end]), error.end


def add_model(parser: argparse.ArgumentParser) -> None:
    """--model."""
    parser.add_argument(
        "-m", "--model", default="smollm2", help="a name (see `models`), a folder, a GGUF file or a hub id (smollm2)"
    )


def add_texts(parser: argparse.ArgumentParser) -> None:
    """--texts."""
    parser.add_argument(
        "--texts", nargs="+", type=Path, default=[], help="text files or folders of them (default: those of the app)"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", help="cuda or cpu (default: the GPU where there is one)")


def add_probe(parser: argparse.ArgumentParser) -> None:
    """--probe, for `probe_of`."""
    parser.add_argument(
        "--probe", default="next-token", help="whose attention: next-token (the default), last-queries or all-queries"
    )


def probe_of(name: str) -> str:
    """The probe that a user means. Raises UserError."""
    from analysis.metrics import PROBES

    if name.replace("-", " ") not in PROBES:
        known = ", ".join(probe.replace(" ", "-") for probe in PROBES)
        raise UserError(f"--probe must be one of {known}; got {name!r}")
    return name.replace("-", " ")


def metric_of(name: str) -> str:
    """The metric that a user means. Raises UserError."""
    from analysis.metrics import METRICS

    if name.replace("-", "_") not in METRICS:
        known = ", ".join(metric.replace("_", "-") for metric in METRICS)
        raise UserError(f"--metric must be one of {known}; got {name!r}")
    return name.replace("-", "_")


def no_progress_bars() -> None:
    """Keep transformers' progress bars and the hub's retries off the screen. Imports them: call it once arguments are
    checked."""
    from huggingface_hub.utils.logging import set_verbosity_error
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of weights: ours is of layers
    set_verbosity_error()


def text_of(source: str) -> str:
    """The text of a file, or of standard input for "-". Raises TextError."""
    return decoded(sys.stdin.buffer.read(), "Standard input") if source == "-" else read_text(source)


def tell_notes(loaded: LoadedModel, texts: Iterable[str]) -> None:
    """Print what a user should know of the special tokens of texts, beside the results."""
    from analysis.texts.tokens import notes_of

    for note in notes_of(loaded.tokenizer, texts):
        print(f"note: {note}", file=sys.stderr)


def texts_of(sources: Sequence[Path]) -> Mapping[str, str]:
    """The documents of text files, and of those in folders, by name; the bundled texts if none are given."""
    if not sources:
        from analysis.demo.presets import bundled_texts

        return bundled_texts()
    files = [file for source in sources for file in (sorted(source.glob("*.txt")) if source.is_dir() else [source])]
    if not files:
        raise TextError(f"There are no .txt files in {', '.join(map(str, sources))}.")
    stems = [file.stem for file in files]
    names = [str(file) if stems.count(file.stem) > 1 else file.stem for file in files]  # no text may hide another
    return {
        document: text
        for name, file in zip(names, files, strict=True)
        for document, text in read_documents(file, name).items()
    }


def counter() -> Callable[[str, int, int], None]:
    """What shows (stage, done, total) on one line; nothing where nobody looks."""
    if not sys.stderr.isatty():
        return lambda stage, done, total: None

    def show(stage: str, done: int, total: int) -> None:
        print(f"\r{stage} {done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


def fetching() -> Callable[[str, int, int], None]:
    """What shows on one line how far a fetch is, in percent; nothing where nobody looks."""
    if not sys.stderr.isatty():
        return lambda what, done, total: None

    def show(what: str, done: int, total: int) -> None:
        line = f"{what}: {done / max(total, 1):4.0%} of {total / 1e6:,.0f} MB\033[K\r"  # the next line replaces it
        print(line, end="", file=sys.stderr, flush=True)

    return show
