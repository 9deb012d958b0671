"""What commands work on: texts from files, folders and standard input, and models."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from analysis.demo.presets import bundled_prose
from analysis.errors import TextError
from analysis.models.load import LoadedModel, load_model
from analysis.texts.excerpts import Excerpt, excerpts
from analysis.texts.read import decoded, read_documents, read_text
from analysis.texts.tokens import notes_of


def text_of(source: str) -> str:
    """The text of a file, or of standard input for "-". Raises TextError."""
    return decoded(sys.stdin.buffer.read(), "Standard input") if source == "-" else read_text(source)


def texts_of(sources: Sequence[Path]) -> Mapping[str, str]:
    """The documents of text files, and of those in folders, by name; the bundled prose if none are given."""
    if not sources:
        return bundled_prose()
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


def loaded_model(model: str, device: str | None = None) -> LoadedModel:
    """A model in memory. Imports torch: call it once all else is checked. Raises ModelError, OutOfMemoryError."""
    quiet_libraries()
    return load_model(model, device=device)


def quiet_libraries() -> None:
    """Keep transformers' progress bars and the hub's retries off the screen."""
    from huggingface_hub.utils.logging import set_verbosity_error
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of weights: ours is of layers
    set_verbosity_error()


def tell_notes(loaded: LoadedModel, texts: Iterable[str]) -> None:
    """Print on standard error what a user should know of the special tokens of texts."""
    for note in notes_of(loaded.tokenizer, texts):
        print(f"note: {note}", file=sys.stderr)


def excerpts_of(loaded: LoadedModel, texts: Mapping[str, str], *, n_tokens: int, at_most: int) -> tuple[Excerpt, ...]:
    """Excerpts of texts, and on standard error what a user should know of them. Raises TextError."""
    found = excerpts(loaded.tokenizer, texts, n_tokens=n_tokens, at_most=at_most)
    tell_notes(loaded, (excerpt.text for excerpt in found))
    return found
